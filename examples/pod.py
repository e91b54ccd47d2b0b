"""Training over many processes that may be stopped at any moment, and goes on from its last checkpoint.

The same command line on one host, under SLURM (`srun`), and in a pod on GKE or a TPU; docs/pods.md has the lines that
each cluster needs. To try it out on this machine, two processes of four virtual devices each:

    python -m jaxnorm.launch --processes 2 --devices 4 examples/pod.py --out out/pod

Stop it, in any way, and start it again: it ends with the bits that it would have had. It may go on with as many
processes and devices as you like; sums over replicas are then rounded otherwise. The data are drawn by the program, an
image from its number; put your own reader in `read`.
"""

import argparse
import pathlib
import sys
import time
import zlib

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

import jaxnorm

CLASSES, SIZE, EXAMPLES = 10, 8, 4096
STOPPED = 75  # sysexits.h, EX_TEMPFAIL: start it again


def main() -> None:
    options = parse()
    processes = jaxnorm.join_processes(
        initialization_timeout=options.initialization_timeout, heartbeat_timeout=options.heartbeat_timeout
    )
    devices = jax.devices()
    say(f"{processes} processes, {len(devices)} devices ({devices[0].device_kind})")
    if options.batch % len(devices):
        raise SystemExit(f"--batch {options.batch} is not a multiple of the {len(devices)} devices")
    model = jaxnorm.convert_sync_batchnorm(Net(nnx.Rngs(options.seed)), axis_name="batch")
    state = jaxnorm.TrainState.create(
        model, optax.adam(options.learning_rate), ema=jaxnorm.Ema(0.99), rng=jax.random.key(options.seed)
    )
    step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="shard_map", donate=True)
    # What must be the same when the run is taken up; the number of devices and of steps need not be.
    config = {"batch": options.batch, "learning_rate": options.learning_rate, "seed": options.seed}

    with jaxnorm.Checkpoints(options.out / "checkpoints", config=config) as checkpoints:
        taken, data = 0, {"position": 0}
        if checkpoints.latest() is not None:
            taken, state, data = checkpoints.restore(state)
            say(f"goes on from step {taken}, example {data['position']}")
        sampler = Sampler(EXAMPLES, options.batch, options.seed, data["position"])
        start = time.perf_counter()
        while taken < options.steps:
            state, metrics = step(state, read(sampler.next()))
            taken += 1
            stop = processes > 1 and multihost_utils.reached_preemption_sync_point(taken)
            if taken % options.save_every == 0 or taken == options.steps or stop:
                checkpoints.save(taken, state, {"position": sampler.position})
            if taken % options.log_every == 0 or taken == options.steps:
                loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
                say(f"step {taken}  loss {loss:.4f}  accuracy {accuracy:.1%}  {time.perf_counter() - start:.1f} s")
            if stop:
                checkpoints.wait()
                say(f"was told to stop (SIGTERM): saved at step {taken}")
                sys.exit(STOPPED)
    say(f"done: step {taken}, state {digest(state):08x}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default="out/pod", help="folder that all processes see")
    parser.add_argument("--steps", type=int, default=200, help="training steps in all (default 200)")
    parser.add_argument("--batch", type=int, default=64, help="images a step, over all devices (default 64)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of Adam (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of model, data and their order (default 0)")
    parser.add_argument("--save-every", type=int, default=20, help="steps (default 20)")
    parser.add_argument("--log-every", type=int, default=20, help="steps (default 20)")
    parser.add_argument("--initialization-timeout", type=int, default=300, help="seconds until all have joined")
    parser.add_argument("--heartbeat-timeout", type=int, default=100, help="seconds until a silent process is lost")
    return parser.parse_args()


def say(text: str) -> None:
    """One voice for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Net(nnx.Module):
    """Two convolutions with BatchNorm, dropout, and a classifier."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = nnx.Conv(1, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.conv2, self.bn2 = nnx.Conv(8, 16, (3, 3), 2, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        return self.out(self.dropout(x.mean((1, 2))))


def loss_fn(model: Net, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


class Sampler:
    """The order of the examples: a new permutation in each epoch, a function of the seed and the epoch alone.

    Its whole state is `position`, the number of examples that all processes have taken; it says nothing of how many
    processes and devices there are.
    """

    def __init__(self, examples: int, batch: int, seed: int, position: int = 0) -> None:
        self.examples, self.batch, self.seed, self.position = examples, batch, seed, position
        self.epoch, self.order = -1, np.zeros(0, int)

    def next(self) -> np.ndarray:
        """The numbers of the examples that this process reads for the next batch: its part, and no other's."""
        size = self.batch // jax.process_count()
        first = self.position + jax.process_index() * size
        self.position += self.batch
        return np.array([self.at(i) for i in range(first, first + size)])

    def at(self, i: int) -> int:
        epoch, place = divmod(i, self.examples)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.examples)
        return int(self.order[place])


def read(indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these numbers: noise, and a bright spot whose place is the class."""
    labels = indices % CLASSES
    noise = np.stack([np.random.default_rng(int(i)).normal(size=(SIZE, SIZE)) for i in indices])
    rows, columns = 1 + labels // 5 * 4, 1 + labels % 5
    noise[np.arange(len(indices)), rows, columns] += 4
    return {"image": noise[..., None].astype(np.float32), "label": labels}


def digest(state: jaxnorm.TrainState) -> int:
    """A checksum of every bit of the state."""
    total = 0
    for x in jax.tree.leaves(state):
        x = jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        total = zlib.crc32(np.asarray(x).tobytes(), total)
    return total


if __name__ == "__main__":
    main()
