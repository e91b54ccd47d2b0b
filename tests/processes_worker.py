"""What test_processes.py and test_pod.py run in processes of their own, and how they start them.

Processes come from a fork server that has imported everything: half of the time that a start takes.
"""

import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time

PRELOAD = [
    "jax",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "jax.experimental.multihost_utils",
    "jaxnorm",
    "pod",
    "imagenet",
]
FOLDER = pathlib.Path(__file__).parent


class Group:
    """Some processes that are one run: `function(*arguments)` in each, after `JAX_...` tell it who it is."""

    def __init__(self, function, *arguments, processes=2, devices=4, logs, missing=()):
        for path in (FOLDER, FOLDER.parent / "examples"):
            if str(path) not in sys.path:
                sys.path.insert(0, str(path))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        self.logs = [logs / f"{rank}.log" for rank in range(processes)]
        self.processes = {}
        for rank in set(range(processes)) - set(missing):
            settings = (rank, processes, devices, address, str(self.logs[rank]))
            self.processes[rank] = context.Process(target=_run, args=(settings, function, arguments), daemon=True)
            self.processes[rank].start()

    def kill(self, rank, number=signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)

    def wait(self, seconds=400):
        """Exit statuses by rank; the test fails if one does not end by itself."""
        end = time.monotonic() + seconds
        try:
            for rank, process in self.processes.items():
                process.join(max(0.1, end - time.monotonic()))
                assert process.exitcode is not None, f"process {rank} hangs:\n{self.output()}"
        finally:
            for process in self.processes.values():
                process.kill()
        return {rank: process.exitcode for rank, process in self.processes.items()}

    def succeed(self):
        assert set(self.wait().values()) == {0}, self.output()

    def output(self, rank=None):
        ranks = self.processes if rank is None else [rank]
        return "\n".join(self.logs[r].read_text(errors="replace") for r in ranks if self.logs[r].exists())


def _run(settings, function, arguments):
    rank, processes, devices, address, log = settings
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # stdout was a pipe of the fork server's; Python's own objects have to follow
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(rank),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiling takes longer than running here
    }
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    # A fork server's child runs neither the hook nor what is registered for the exit; a program of its own does both.
    status = 0
    try:
        function(*arguments)
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):
            print(status)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    jax.distributed.shutdown()
    sys.exit(status)


# The model and the data of all these tests


def make(axis_name=None, ema=None, rng=3):
    import jax
    import numpy as np
    import optax
    from flax import nnx

    import jaxnorm

    class Net(nnx.Module):
        def __init__(self):
            draw = np.random.default_rng(0).normal
            self.first = nnx.Param(jax.numpy.asarray(draw(size=(4, 6))))
            self.bn = jaxnorm.nnx.BatchNorm(
                6, axis_name=axis_name, momentum=0.9, param_dtype=jax.numpy.float64, rngs=nnx.Rngs(0)
            )
            self.last = nnx.Param(jax.numpy.asarray(draw(size=(6, 3))))

        def __call__(self, x):
            return jax.nn.relu(self.bn(x @ self.first)) @ self.last

    return jaxnorm.TrainState.create(
        Net(), optax.sgd(0.1, momentum=0.9), ema=ema or jaxnorm.Ema(0.9), rng=jax.random.key(rng)
    )


def batches(n):
    import numpy as np

    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(32, 4)) * 2 + 1, "y": rng.integers(0, 3, 32)} for _ in range(n)]


def loss_fn(model, batch):
    import optax

    logits = model(batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def metrics_fn(model, batch):
    import optax

    import jaxnorm

    logits = model(batch["x"])
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]),
        "top2": jaxnorm.in_top_k(logits, batch["y"], 2),
        "confusion": jaxnorm.Confusion.of(logits, batch["y"]),
    }


def arrays(state, metrics):
    """Parameters, running statistics, momentum, EMA, loss and metrics by name."""
    import jax
    import numpy as np

    parts = (state.params, state.batch_stats, state.opt_state, state.ema_state, metrics)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(parts)}


WAYS = {
    "jit": ("jit", None, {}, False),
    "pmap": ("pmap", "batch", {}, True),
    "shard_map": ("shard_map", "batch", {}, False),
    "shard_map, replicated": ("shard_map", "batch", {}, True),
    "shard_map, check_vma=False": ("shard_map", "batch", {"check_vma": False}, True),
}


def in_every_way(folder):
    """Three steps in each way; checkpoints there and back; what is refused. One start of two processes for all."""
    import jax
    import numpy as np

    import jaxnorm

    jax.config.update("jax_enable_x64", True)
    assert jaxnorm.join_processes(heartbeat_timeout=600) == 2
    rank = jax.process_index()
    own = slice(16 * rank, 16 * rank + 16)
    data = [{name: x[own] for name, x in batch.items()} for batch in batches(3)]

    def run(state, way, data):
        how, _, more, replicated = WAYS[way]
        step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how=how, **more)
        state = jaxnorm.replicate(state) if replicated else state
        for batch in data:
            state, metrics = step(state, batch)
        return state, metrics

    for way, (_, axis, _, replicated) in WAYS.items():
        state, metrics = run(make(axis), way, data)
        if replicated:
            assert jaxnorm.replica_divergence(state) == {}
            state = jaxnorm.unreplicate(state)
        np.savez(folder / f"{way}{rank}.npz", **arrays(state, metrics))

    state, metrics = run(make("batch", ema=jaxnorm.Ema(0.9, device="cpu")), "shard_map", data)
    state.ema_model()
    np.savez(folder / f"placed{rank}.npz", **arrays(state, metrics))

    # Statistics that are each replica's own: measured, pooled and chosen from over both processes.
    state, metrics = run(make(None), "pmap", data)
    divergence = jaxnorm.replica_divergence(state)
    np.savez(folder / f"merged{rank}.npz", **arrays(jaxnorm.unreplicate(state, merge=True), divergence))
    np.savez(folder / f"chosen{rank}.npz", **arrays(jaxnorm.unreplicate(state, rank=5), {}))
    with jaxnorm.Checkpoints(folder / "replicated") as checkpoints:  # sharded: an eighth on each device
        checkpoints.save(1, state.batch_stats)

    # From two processes to one, and from one to two.
    with jaxnorm.Checkpoints(folder / "from_two") as checkpoints:
        checkpoints.save(2, run(make("batch"), "shard_map", data[:2])[0], {"position": 64})
    with jaxnorm.Checkpoints(folder / "from_one") as checkpoints:
        assert checkpoints.latest() == 2
        step, state, found = checkpoints.restore(make("batch"))
        assert (step, found) == (2, {"position": 64})
    np.savez(folder / f"from_one{rank}.npz", **arrays(*run(state, "shard_map", data[2:])))

    # Evaluation: 19 examples here and 16 + 5 + 16 there, so another number of batches too.
    examples = {name: np.concatenate([batch[name] for batch in batches(2)])[:56] for name in ("x", "y")}
    cuts = [(0, 19)] if rank == 0 else [(19, 35), (35, 40), (40, 56)]
    parts = [{name: x[a:b] for name, x in examples.items()} for a, b in cuts]
    found = jaxnorm.evaluate(jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn)), make(None), parts)
    np.savez(folder / f"evaluated{rank}.npz", **found)

    for text, refused in {
        "each process gives at least one batch": lambda: jaxnorm.evaluate(
            jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn)), make(None), parts[:rank]
        ),
        "these differ between processes: rng": lambda: run(make("batch", rng=rank), "shard_map", data),
        "not one directory for all processes": lambda: jaxnorm.Checkpoints(folder / f"own{rank}"),
        "4 replicas of this process": lambda: run(make("batch"), "shard_map", [{"x": data[0]["x"][:6]}]),
    }.items():
        try:
            refused()
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(text)


def absent():
    import jaxnorm

    jaxnorm.join_processes(initialization_timeout=2)


def alone():
    import jax

    import jaxnorm

    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        del os.environ[name]
    assert jaxnorm.join_processes() == 1 and not jax.distributed.is_initialized()
    os.environ["JAX_PROCESS_ID"] = "first"
    try:
        jaxnorm.join_processes()
    except ValueError as error:
        assert "JAX_PROCESS_ID is a number; it is set to 'first'" in str(error)
    else:
        raise AssertionError


def fail():
    """Process 1 fails after the first of many sums; process 0 waits for its part of the next."""
    import jax
    import jax.numpy as jnp

    import jaxnorm

    jaxnorm.join_processes(heartbeat_timeout=10)
    from jax.experimental import multihost_utils

    while True:
        multihost_utils.process_allgather(jnp.zeros(()))
        if jax.process_index() == 1:
            raise RuntimeError("this process has had enough")


def work_together():
    """One sum after the other, until someone puts an end to it."""
    import jax.numpy as jnp

    import jaxnorm

    jaxnorm.join_processes(heartbeat_timeout=3)
    from jax.experimental import multihost_utils

    while True:
        multihost_utils.process_allgather(jnp.zeros(()))
        print("working")
        time.sleep(0.01)


def train_until_killed_while_writing(rank, *arguments):
    """`train`, where the kernel kills one process in the middle of a file of the second checkpoint."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores, so that the write fails instead
    train_until_the_disk_is_full(rank, *arguments)


def train_until_the_disk_is_full(rank, *arguments):
    """`train`, where one process has room for the first checkpoint only: no file over 80 kB after that."""
    import resource

    import jax

    import jaxnorm

    save = jaxnorm.Checkpoints.save

    def limited(checkpoints, step, *of_run):
        checkpoints.wait()
        if checkpoints.latest() is not None and jax.process_index() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(checkpoints, step, *of_run)

    jaxnorm.Checkpoints.save = limited
    train(*arguments)


def train(*arguments):
    """examples/pod.py with a small model, of 600 kB: on 2 x 2 devices every part of its largest array is over 80 kB."""
    import jax
    import numpy as np
    import pod
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            draw = np.random.default_rng(0).normal
            self.first = nnx.Param(jax.numpy.asarray(draw(size=(64, 2000)), np.float32))
            self.bn = nnx.BatchNorm(2000, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Param(jax.numpy.asarray(draw(size=(2000, 10)), np.float32))

        def __call__(self, x):
            return self.dropout(jax.nn.relu(self.bn(x.reshape(len(x), -1) @ self.first))) @ self.last

    pod.Net = Net
    sys.argv[1:] = list(arguments)
    pod.main()


def under_slurm():
    """As srun starts two tasks on one node: its variables, and no others."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, number, rank = (os.environ.pop(name) for name in names)
    os.environ |= {
        "SLURM_JOB_ID": address.rpartition(":")[2],  # any number: JAX derives from it a port above the ephemeral ones
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": number,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
    }
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    import jaxnorm

    assert jaxnorm.join_processes() == 2
    assert (jax.process_index(), len(jax.devices()), len(jax.local_devices())) == (int(rank), 8, 4)
    np.testing.assert_array_equal(multihost_utils.process_allgather(np.full(1, jax.process_index())).ravel(), [0, 1])


def train_on_images(*arguments):
    """examples/imagenet.py with these arguments."""
    import imagenet

    sys.argv = ["imagenet.py", *arguments]
    imagenet.main()
