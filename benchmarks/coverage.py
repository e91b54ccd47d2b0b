"""Which PyTorch models import, and whether they then compute what PyTorch computes.

    python benchmarks/coverage.py                                # the smallest model of each family of each library
    python benchmarks/coverage.py --models 'timm:resnet*'        # whatever matches
    python benchmarks/coverage.py --random 150 --seed 0          # so many other models of timm up to 100 M parameters
    python benchmarks/coverage.py --report docs/coverage.md      # only the table, from the rows there are
    python benchmarks/coverage.py --peer torchax --models 'timm:test_*'     # torchax instead, if Python finds it

Each model runs in a process of its own, in float64, with randomised weights (running statistics and affine parameters
included; see `coverage_models.prepare` and `randomise_statistics`), dropout and stochastic depth off, at the smallest
input that it takes, a model's own casts to float32 left out on both sides: import, eval outputs, one training step
(loss, every gradient, every running statistic), export, strict load by PyTorch, and eval outputs in float32. A row of
JSON for each; models that have a row are not run again. Beside each difference a row has its condition: how far
PyTorch's own result moves when every number of the input moves to a neighbour in float64.

The processes are forked from one that has imported the libraries. Most of a row's time is XLA's compiler, so it
optimises less than usual (`xla_backend_optimization_level`; the same program all the same): 0, or 1 where running takes
longer than compiling.
"""

import argparse
import copy
import ctypes
import json
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
import coverage_models as models  # noqa: E402
import coverage_table as table  # noqa: E402
from coverage_table import TOLERANCE, TOLERANCE_FLOAT32  # noqa: E402

WEIGHTS = 3  # how they are drawn: raised when that changes, so that rows can tell
SLOW_TO_RUN = 0.3  # seconds of PyTorch's step above which compiled code has to be optimised


def measure(name):
    """One row: what was found for one model."""
    import parity_tools as tools
    import torch

    row = {"model": name, "stage": "build", "ok": False}
    watch = Watch(row)
    try:
        watch.start("build")
        module, shapes = models.build(name)
        row["parameters"] = sum(p.numel() for p in module.parameters())
        module = models.prepare(module, torch)
        initial = copy.deepcopy(module.state_dict())
        with models.all_in_float64(torch):
            shape = models.smallest_input(module, shapes, torch)
            module.load_state_dict(initial)
            del initial
            row["input"] = list(shape)
        check(row, watch, module, (tools.normal(*shape),))
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {error}"[:2000]
        row["trace"] = traceback.format_exc()[-3000:]
    watch.stop()
    row["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def check(row, watch, module, inputs):
    """Fills the row of a prepared module from its import onwards; raises at the first thing that is not as it should
    be. `inputs` is a tuple of tensors, floating ones in float64."""
    import numpy as np
    import parity_tools as tools
    import torch

    import interop
    from interop.tracing import private

    with models.all_in_float64(torch):
        row["batch_norms"] = sum(isinstance(m, private.batch_norm_class()) for m in module.modules())
        models.randomise_statistics(module, inputs, torch)
        row["weights"] = WEIGHTS
    row["calmed"] = rounding(tools, module.eval(), inputs, torch) > TOLERANCE_FLOAT32 / 5
    with models.all_in_float64(torch):
        if row["calmed"]:
            models.calm(module, torch)
            models.randomise_statistics(module, inputs, torch)
        module.train()

        watch.start("import")
        model = interop.from_torch(module, *inputs)
        watch.start("export")
        exported = interop.state_dict(model)
        expected = module.state_dict()
        assert list(exported) == list(expected), "the names differ"
        for key, value in expected.items():
            assert exported[key].tobytes() == value.numpy().tobytes(), f"{key} differs"
        for key, value in exported.items():
            expected[key] = torch.from_numpy(np.array(value))
        # A state dict with the versions of its layers, which some ask for.
        module.load_state_dict(expected, strict=True)
        del exported, expected, value

        watch.start("torch")
        wanted = buffers_alone(tools.torch_step(module, *inputs))
        tools.FAST["xla_backend_optimization_level"] = int(watch.so_far() > SLOW_TO_RUN)
        moved = buffers_alone(tools.torch_step(module, *nudged(inputs, torch)))
        row["condition"] = differences(moved, wanted, tools, np)
        del moved
        watch.start("eval")
        module.eval(), model.eval()
        with torch.no_grad():
            both = (tools.flat(copy.deepcopy(module)(*x)) for x in (nudged(inputs, torch), inputs))  # some write state
            nudge = zip(*both, strict=True)
        row["condition"]["eval"] = max(float(tools.relative(a, b)) for a, b in nudge)
        row["eval"] = compare(tools, module, model, inputs, torch)
        assert row["eval"] < TOLERANCE, (
            f"eval outputs differ by {row['eval']:.1e}; {by_itself(row['condition']['eval'])}"
        )

    watch.start("train")
    module = module.float()  # of half the size
    model.train()
    row |= differences(tools.jax_step(model, *map(tools.to_jax, inputs)), wanted, tools, np)
    for key in ("loss", "gradients", "statistics"):
        assert row[key] < TOLERANCE, (
            f"{key} differ by {row[key]:.1e}{', ' + row['worst'] if key == 'gradients' else ''}; "
            f"{by_itself(row['condition'][key])}"
        )

    watch.start("float32")
    del model, wanted
    single = interop.from_torch(module, *in_float32(inputs))
    row["eval32"] = compare(tools, module, single, in_float32(inputs), torch)
    assert row["eval32"] < TOLERANCE_FLOAT32, (
        f"eval outputs in float32 differ by {row['eval32']:.1e}; "
        f"PyTorch's own differ from its float64 by {rounding(tools, module, inputs, torch):.1e}"
    )
    row |= {"stage": "done", "ok": True}


def by_itself(difference):
    """What of a difference is the model's own: its condition."""
    return f"PyTorch's own move by {difference:.1e} with the last bits of the input"


def measure_torchax(name):
    """The row of a peer: eval outputs and one training step by torchax, as `measure` has them; nothing to export."""
    import jax
    import numpy as np
    import parity_tools as tools
    import torch
    import torchax.interop

    row = {"model": name, "stage": "build", "ok": False, "weights": WEIGHTS}
    watch = Watch(row)
    try:
        watch.start("build")
        module, shapes = models.build(name)
        module = models.prepare(module, torch)
        initial = copy.deepcopy(module.state_dict())
        with models.all_in_float64(torch):
            shape = models.smallest_input(module, shapes, torch)
            module.load_state_dict(initial)
            images = tools.normal(*shape)
            models.randomise_statistics(module, (images,), torch)
            module.train()
            wanted = tools.torch_step(module, images)
            with torch.no_grad():
                expected = tools.flat(module.eval()(images))

        environment = torchax.default_env()
        jitted = torchax.interop.JittableModule(module, dedup_parameters=False)
        params, buffers = (environment.t2j_copy(dict(part)) for part in (jitted.params, jitted.buffers))

        def call(params, buffers, images):
            given = environment.j2t_iso((params, buffers, images))
            with environment:
                result = jitted.functional_call("forward", *given)
            return environment.t2j_iso(result), environment.t2j_iso(given[1])

        def loss(params, buffers, images):
            result, buffers = call(params, buffers, images)
            outputs = tools.flat(result)
            weights = [tools.normal(*y.shape, seed=i).numpy() for i, y in enumerate(outputs)]
            return sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), buffers

        given = (params, buffers, tools.to_jax(images))
        watch.start("eval")
        module.eval()
        found = tools.flat(jax.jit(lambda *args: call(*args)[0], compiler_options=tools.FAST)(*given))
        row["eval"] = max(float(tools.relative(a, b)) for a, b in zip(found, expected, strict=True))
        watch.start("train")
        module.train()
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=tools.FAST)
        (value, after), grads = step(*given)
        state = {**after, **params}
        row |= differences(tools.Step(float(value), grads, state), wanted, tools, np)
        row["stage"] = "done"
        row["ok"] = all(row[key] < TOLERANCE for key in ("eval", "loss", "gradients", "statistics"))
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {error}"[:2000]
        row["trace"] = traceback.format_exc()[-3000:]
    watch.stop()
    return row


def buffers_alone(step):
    """The step without the parameters it began with: memory, in large models."""
    step.state = {name: value for name, value in step.state.items() if name not in step.grads}
    return step


class Watch:
    """Seconds of processor time for each stage: other work on the machine does not count."""

    def __init__(self, row):
        self.row, self.stage, self.since = row, None, 0.0
        row["seconds"] = {}

    def start(self, stage):
        self.stop()
        self.row["stage"] = self.stage = stage
        self.since = time.process_time()

    def so_far(self):
        return time.process_time() - self.since

    def stop(self):
        if self.stage is not None:
            self.row["seconds"][self.stage] = round(self.so_far(), 2)
        self.stage = None


def compare(tools, module, model, inputs, torch):
    with torch.no_grad():
        expected = tools.flat(copy.deepcopy(module)(*inputs))  # of which some write to their state in eval mode too
    found = tools.flat(tools.jax_eval(model, *map(tools.to_jax, inputs)))
    assert len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}"
    return max(float(tools.relative(a, b)) for a, b in zip(found, expected, strict=True))


def nudged(inputs, torch):
    """The inputs with each floating number moved to a neighbour: what PyTorch then computes says how well it is
    determined."""

    def moved(x):
        up = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        return torch.nextafter(x, torch.where(up, torch.inf, -torch.inf).to(x.dtype))

    return tuple(moved(x) if x.is_floating_point() else x for x in inputs)


def in_float32(inputs):
    """The inputs, floating ones in float32."""
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)


def rounding(tools, module, inputs, torch):
    """How far PyTorch's float32 outputs are from its float64 ones."""
    with torch.no_grad():
        single = tools.flat(copy.deepcopy(module).float()(*in_float32(inputs)))
        with models.all_in_float64(torch):
            double = tools.flat(module.double()(*inputs))
    return max(float(tools.relative(a, b)) for a, b in zip(single, double, strict=True))


def differences(found, wanted, tools, np):
    floor = 1e-3 * float(np.median([np.linalg.norm(g) for g in wanted.grads.values()]))
    gradients = {key: float(tools.relative(found.grads[key], g, floor)) for key, g in wanted.grads.items()}
    worst = max(gradients, key=gradients.get)
    statistics = [float(tools.relative(found.state[key], value)) for key, value in wanted.state.items()]
    return {
        "loss": abs(found.loss - wanted.loss) / max(abs(wanted.loss), 1e-300),
        "gradients": gradients[worst],
        "worst": worst,
        "statistics": max(statistics, default=0.0),
    }


def ready():
    """Imports what every model needs, and starts nothing that a fork would not survive."""
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if sys.platform == "linux":  # glibc keeps freed memory otherwise: gigabytes, where a model has some
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    import parity_tools  # noqa: F401
    import torch
    import torch.export
    import torchvision_cpu  # noqa: F401  torchvision beside a CPU build of torch

    torch.set_num_threads(1)
    import timm  # noqa: F401


def forked(name, path, limit, measure):
    """The number of a process that writes the row of one model to `path`, and has `limit` seconds of processor time."""
    child = os.fork()
    if child:
        return child
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        log = os.open(path + ".log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        row = measure(name)
        with open(path, "w") as file:
            json.dump(row, file)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def rows_of(todo, jobs, limit, measure=measure):
    """Yields a row for each name as it is done, `jobs` processes at a time; also for a process that died."""
    running, waiting = {}, list(reversed(todo))
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                path = os.path.join(folder, str(len(waiting)))
                running[forked(name, path, limit, measure)] = (name, path, time.perf_counter())
            child, status, used = os.wait4(-1, 0)
            name, path, since = running.pop(child)
            if os.path.exists(path):
                row = json.loads(pathlib.Path(path).read_text())
            elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
                late = used.ru_utime + used.ru_stime >= 0.8 * limit  # the two clocks differ
                why = f"took longer than {limit} s of processor time" if late else "killed, for memory perhaps"
                row = {"model": name, "ok": False, "stage": "time" if late else "process", "reason": why}
            else:
                log = pathlib.Path(path + ".log").read_text()[-300:]
                row = {"model": name, "ok": False, "stage": "process", "reason": f"status {status}: {log}"}
            cpu = round(used.ru_utime + used.ru_stime, 1)
            yield {**row, "cpu": cpu, "wall": round(time.perf_counter() - since, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="patterns such as 'timm:resnet*'")
    parser.add_argument("--random", type=int, default=0, help="so many further models of timm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, default=600, help="seconds of processor time for one model")
    parser.add_argument("--rows", type=pathlib.Path, default=ROOT / "benchmarks" / "out" / "coverage.jsonl")
    parser.add_argument("--again", action="store_true", help="run failed models again")
    parser.add_argument("--report", type=pathlib.Path, help="only write the table")
    parser.add_argument("--peer", choices=["torchax"], help="run this instead; rows in a file of its own")
    arguments = parser.parse_args()
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    families = models.timm_families(arguments.rows.with_name("timm_parameters.json"))
    names = models.chosen(arguments.models, arguments.random, arguments.seed, families)
    peer_rows = arguments.rows.with_name(arguments.rows.stem + "_torchax.jsonl")
    if arguments.report:
        rows, peers = table.read_rows(arguments.rows), table.read_rows(peer_rows)
        table.report(rows, peers, names, families, arguments.report)
        return
    arguments.rows = peer_rows if arguments.peer else arguments.rows
    rows = table.read_rows(arguments.rows)
    sizes = {f"timm:{m}": n for members in families.values() for m, n in members.items()}
    todo = [n for n in names if n not in rows or (arguments.again and not rows[n]["ok"])]
    listed = {**models.smallest_of_each(families), **models.listed()}
    todo.sort(key=lambda n: (n not in listed, ":video." in n, sizes.get(n, 5e6)))  # videos take longest
    ready()
    work = measure_torchax if arguments.peer else measure
    for done, row in enumerate(rows_of(todo, arguments.jobs, arguments.limit, work), 1):
        with arguments.rows.open("a") as file:
            file.write(json.dumps({**row, "family": names[row["model"]]}) + "\n")
        status = "pass" if row["ok"] else f"FAIL at {row['stage']}: {row.get('reason', '')[:160]}"
        print(f"[{done}/{len(todo)}] {row['model']} {row['cpu']} s {status}", flush=True)


if __name__ == "__main__":
    main()
