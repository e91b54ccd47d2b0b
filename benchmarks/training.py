"""What the training tools cost: the EMA, the step against plain Flax, recalibration. Both sides from the same run.

    python benchmarks/training.py                # the default device
    python benchmarks/training.py --rows ema     # ema, step, host, memory, recalibrate
    python benchmarks/training.py --write        # and writes what it printed under benchmarks/results/

On an accelerator the model is ResNet-50 at 224 pixels; on a CPU a narrow ResNet at 32, so that a run takes minutes.
"""

import argparse
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxnorm


class Block(nnx.Module):
    """A bottleneck block of ResNet."""

    def __init__(self, norm: Any, inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        def conv(i: int, o: int, k: int, s: int = 1) -> nnx.Conv:
            return nnx.Conv(i, o, (k, k), s, use_bias=False, rngs=rngs)

        self.conv1, self.bn1 = conv(inputs, width, 1), norm(width, rngs=rngs)
        self.conv2, self.bn2 = conv(width, width, 3, stride), norm(width, rngs=rngs)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), norm(4 * width, rngs=rngs)
        self.shortcut = stride != 1 or inputs != 4 * width
        if self.shortcut:
            self.conv0, self.bn0 = conv(inputs, 4 * width, 1, stride), norm(4 * width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + (self.bn0(self.conv0(x)) if self.shortcut else x))


class ResNet(nnx.Module):
    """ResNet-50, or a narrower and shallower one."""

    def __init__(self, norm: Any, width: int, depths: tuple[int, ...]) -> None:
        rngs = nnx.Rngs(0)
        self.conv, self.bn = nnx.Conv(3, width, (7, 7), 2, use_bias=False, rngs=rngs), norm(width, rngs=rngs)
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(Block(norm, inputs, width << stage, 2 if i == 0 and stage else 1, rngs))
                inputs = 4 * (width << stage)
        self.blocks, self.head = nnx.List(blocks), nnx.Linear(inputs, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(jax.nn.relu(self.bn(self.conv(x))), (3, 3), (2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of several, taken in turns, so that all see the same machine."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def loss_fn(model: Any, batch: Any) -> Any:
    """Cross entropy and accuracy."""
    logits = model(batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def plain_step(graphdef: Any, tx: Any) -> Any:
    """The same step written out in Flax: no jaxnorm in it."""

    @jax.jit
    def step(params: Any, stats: Any, opt_state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graphdef, params, stats, copy=True)
            value, metrics = loss_fn(model, batch)
            return value, (metrics, nnx.split(model, nnx.Param, ...)[2])

        (value, (metrics, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, {**metrics, "loss": value}

    return step


class Case:
    """A model, data, and an optimizer, large where there is an accelerator."""

    def __init__(self, batch: int | None) -> None:
        self.accelerator = jax.default_backend() != "cpu"
        width, depths, pixels = (64, (3, 4, 6, 3), 224) if self.accelerator else (16, (1, 1, 1, 1), 32)
        self.make = functools.partial(ResNet, width=width, depths=depths)
        size = batch or (128 if self.accelerator else 32)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(size, pixels, pixels, 3)), jnp.float32)
        self.batch = {"x": x, "y": jnp.asarray(rng.integers(0, 1000, size))}
        self.tx = optax.sgd(0.1, momentum=0.9)
        self.repeats = 30 if self.accelerator else 10

    def state(self, ema: jaxnorm.Ema | None = None, norm: Any = jaxnorm.nnx.BatchNorm) -> jaxnorm.TrainState:
        """A fresh training state."""
        return jaxnorm.TrainState.create(self.make(norm), self.tx, ema=ema)

    def stepper(self, ema: jaxnorm.Ema | None = None, norm: Any = jaxnorm.nnx.BatchNorm) -> Callable[[], Any]:
        """A call that trains one step further."""
        step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="jit", devices=jax.devices()[:1])
        kept = [self.state(ema, norm)]

        def run() -> Any:
            kept[0], metrics = step(kept[0], self.batch)
            return kept[0], metrics

        return run


LINES: list[str] = []


def say(line: str) -> None:
    """Prints a line, and keeps it for --write."""
    print(line, flush=True)
    LINES.append(line)


def row(name: str, ours: float, theirs: float, what: str, bound: str = "") -> None:
    """One line: both sides, and their ratio."""
    say(f"{name:<44} {ours * 1e3:9.2f} ms   {what:<28} {theirs * 1e3:9.2f} ms   ratio {ours / theirs:6.3f}   {bound}")


def ema_row(case: Case) -> None:
    """The EMA on the model's device: in the step, and alone against a copy of the state (one read, one write)."""
    times = interleaved({"with": case.stepper(jaxnorm.Ema(0.999)), "without": case.stepper()}, case.repeats)
    row("step with EMA on its device", times["with"], times["without"], "step without", "<= 1.03 of a ResNet-50 step")
    state = case.state(jaxnorm.Ema(0.999))
    ema, tree = jaxnorm.Ema(0.999), {"params": state.params, "batch_stats": state.batch_stats}
    average = ema.init(tree)
    # An update reads two arrays and writes one, a sum of two trees likewise: the floor of any implementation.
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    update = jax.jit(lambda t, s: ema.update(t, s, 5))
    alone = interleaved({"ours": lambda: update(tree, average), "floor": lambda: add(tree, average.average)}, 50)
    row("EMA update alone", alone["ours"], alone["floor"], "a sum of two such trees", "near 1: one pass")
    text = update.lower(tree, average).compile().cost_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(tree))
    say(f"  bytes it touches, in sizes of the state: {text['bytes accessed'] / size:.2f} (two reads and a write: 3)")


def host_row(case: Case) -> None:
    """The EMA on the host: how long the loop is held up by dispatching, and by waiting at the end."""
    for device in ("cpu", "pinned_host"):
        times = interleaved({"with": case.stepper(jaxnorm.Ema(0.999, device=device)), "without": case.stepper()}, 5)
        runs = {"with": case.stepper(jaxnorm.Ema(0.999, device=device)), "without": case.stepper()}
        spent = {}
        for name, run in runs.items():
            state, metrics = run()
            jax.block_until_ready((state, metrics))
            start = time.perf_counter()
            for _ in range(case.repeats):
                state, metrics = run()
                jax.block_until_ready(metrics)  # a loop that logs: waits for the step, not for the average
            spent[name] = (time.perf_counter() - start) / case.repeats
            jax.block_until_ready(state)
        row(f"step with EMA on {device}", spent["with"], spent["without"], "step without", "1: no step waits")
        row("  average waited for at each step", times["with"], times["without"], "step without")


def memory_row(case: Case) -> None:
    """A sharded EMA: bytes of the average on each replica."""
    devices = np.array(jax.devices())
    sharding = NamedSharding(Mesh(devices, ("batch",)), PartitionSpec("batch"))
    state = case.state(jaxnorm.Ema(0.999, device=sharding))
    assert state.ema_state is not None
    leaves = jax.tree.leaves(state.ema_state.average)
    whole = sum(x.nbytes for x in leaves)
    each = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    say(f"sharded EMA over {len(devices)} replicas: {each / 2**20:.2f} MiB each of {whole / 2**20:.2f} MiB,"
          f" {each / whole:.4f} (1/N = {1 / len(devices):.4f})")  # fmt: skip


def step_row(case: Case) -> None:
    """The step against the same loop written out in plain Flax, with the same layers, and with Flax's own."""
    runs: dict[str, Callable[[], Any]] = {
        "ours": case.stepper(),
        "ours, Flax's layers": case.stepper(norm=nnx.BatchNorm),
    }
    for name, norm in (("plain", jaxnorm.nnx.BatchNorm), ("plain, Flax's layers", nnx.BatchNorm)):
        graphdef, params, stats = nnx.split(case.make(norm), nnx.Param, ...)
        step, kept = plain_step(graphdef, case.tx), [params, stats, case.tx.init(params)]

        def run(step: Any = step, kept: list[Any] = kept) -> Any:
            *kept[:], metrics = step(*kept, case.batch)
            return kept, metrics

        runs[name] = run
    times = interleaved(runs, case.repeats)
    row("train_step, same layers", times["ours"], times["plain"], "loop in plain Flax", "<= 1.0")
    row("train_step, Flax's layers", times["ours, Flax's layers"], times["plain, Flax's layers"], "loop in plain Flax", "<= 1.0")  # fmt: skip  # noqa: E501
    row("train_step, jaxnorm's layers", times["ours"], times["plain, Flax's layers"], "all of it Flax's")


def recalibrate_row(case: Case) -> None:
    """Recalibration in one pass against a plain eval pass over the same batches."""
    model = case.make(jaxnorm.nnx.BatchNorm)
    batches = [case.batch["x"]] * 8
    graphdef, state = nnx.split(model)
    evaluate = jax.jit(lambda state, x: _evaluate(graphdef, state, x))

    def recalibration() -> Any:
        return nnx.state(jaxnorm.recalibrate(model, batches))

    start = time.perf_counter()
    jax.block_until_ready(recalibration())
    say(f"  (the first recalibration compiles: {time.perf_counter() - start:.1f} s)")
    times = interleaved({"ours": recalibration, "plain": lambda: [evaluate(state, x) for x in batches]}, 5)
    per_batch, plain = (times[side] / len(batches) for side in ("ours", "plain"))
    row("recalibrate, a batch", per_batch, plain, "a batch of an eval pass")


def _evaluate(graphdef: Any, state: Any, x: Any) -> Any:
    model = nnx.merge(graphdef, state)
    model.eval()
    return model(x)


ROWS = {"ema": ema_row, "host": host_row, "memory": memory_row, "step": step_row, "recalibrate": recalibrate_row}


def main() -> None:
    """Prints the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    say(f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}; "
          f"{len(jax.devices())} x {device.device_kind} ({device.platform})")  # fmt: skip
    case = Case(arguments.batch)
    for name in arguments.rows:
        ROWS[name](case)
    if arguments.write:
        path = pathlib.Path(__file__).parent / "results" / f"training_{device.platform}.md"
        path.write_text("\n".join([f"# Training on {device.platform}", "", "```", *LINES, "```", ""]))


if __name__ == "__main__":
    main()
