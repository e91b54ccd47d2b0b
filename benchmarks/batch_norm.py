"""The cost of a BatchNorm layer: ours, Flax's (both variance modes) and PyTorch's, in one run and one table.

    python benchmarks/batch_norm.py            # prints the table
    python benchmarks/batch_norm.py --write    # and writes it under benchmarks/results/

Bytes are those that XLA's cost analysis counts for the compiled program, and temporary memory is what it allocates
besides inputs and outputs, both in units of the input. Times are medians of interleaved runs, so that a machine whose
speed drifts slows all sides alike; `ours / flax` is the median of the pairwise ratios. `copy` is the share of the
bandwidth of a copy, measured in the same run, counting input-sized passes: 2 reads and 1 write forward, 4 reads and 1
write backward. Collectives are those of one layer over all devices at hand, under pmap with an axis name and under jit
with a sharded batch.
"""

import argparse
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.hlo import outside_branches

SHAPES = {
    "ResNet-50 first": (16, 112, 112, 64),
    "ResNet-50 middle": (16, 28, 28, 512),
    "ResNet-50 last": (16, 7, 7, 2048),
    "detection, 1 image": (1, 40, 40, 256),
}
LAYERS: dict[str, Callable[..., Any]] = {
    "ours": lambda **fields: jaxnorm.linen.BatchNorm(**fields),
    "flax fast": lambda **fields: linen.BatchNorm(**fields, use_fast_variance=True),
    "flax": lambda **fields: linen.BatchNorm(**fields, use_fast_variance=False),
}
PASSES = {"forward": 3, "forward+backward": 8}  # reads and writes of the input's size, at least
Step = Callable[[], Any]


def jax_step(name: str, x: jax.Array, dy: jax.Array, mode: str) -> tuple[Step, Any]:
    """A training step of the layer, and its compiled program."""
    layer = LAYERS[name](use_running_average=False, dtype=x.dtype)
    variables = layer.init(jax.random.key(0), x)

    def forward(params: Any, statistics: Any, x: jax.Array) -> Any:
        return layer.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])

    def both(params: Any, statistics: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, vjp, updated = jax.vjp(lambda p, x: forward(p, statistics, x), params, x, has_aux=True)
        return y, vjp(dy), updated

    arguments = (variables["params"], variables["batch_stats"], x)
    function, arguments = (forward, arguments) if mode == "forward" else (both, (*arguments, dy))
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments)), compiled


def torch_step(x: np.ndarray, dy: np.ndarray, dtype: str, memory_format: Any, mode: str) -> Step:
    layer = torch.nn.BatchNorm2d(x.shape[-1])
    tx, tdy = (
        torch.tensor(a).permute(0, 3, 1, 2).to(getattr(torch, dtype)).contiguous(memory_format=memory_format)
        for a in (x, dy)
    )

    def step() -> None:
        if mode == "forward":
            with torch.no_grad():
                layer(tx)
        else:
            layer.zero_grad()
            layer(tx.detach().requires_grad_()).backward(tdy)

    return step


def times(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of interleaved runs."""
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < 7:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append((time.perf_counter() - start) * 1e3)
    return found


def collectives(name: str, parallel: str) -> str:
    """How many collectives one layer compiles to: forward, and forward and backward, but for what a branch has that a
    usual step does not take."""
    n = jax.device_count()
    x = jnp.ones((n, 2, 4, 4, 32))
    mesh = jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,))
    axis = "batch" if parallel == "pmap" else None
    layer = LAYERS[name](use_running_average=False, axis_name=axis)
    variables = layer.init(jax.random.key(0), x[0])

    def forward(x: jax.Array) -> Any:
        return layer.apply(variables, x, mutable=["batch_stats"])

    def both(x: jax.Array) -> Any:
        return jax.grad(lambda x: (lambda y, s: ((y * jnp.cos(x)).sum(), s))(*forward(x)), has_aux=True)(x)

    counts = []
    for function in (forward, both):
        if parallel == "pmap":
            lowered = jax.pmap(function, axis_name="batch").lower(x)
        else:
            whole = jax.device_put(x.reshape(-1, *x.shape[2:]), NamedSharding(mesh, P("batch")))
            lowered = jax.jit(function, out_shardings=(NamedSharding(mesh, P("batch")), None)).lower(whole)
        text = outside_branches(lowered.compile().as_text())
        counts.append(
            len(re.findall(r"(?:all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\(", text))
        )
    return f"{counts[0]} / {counts[1]}"


def digits() -> list[str]:
    """Output error against float64 (relative, norm-wise) of float32 input with deviation 1, by its mean."""
    x = np.random.default_rng(0).standard_normal((32, 14, 14, 64))
    means = [0.0, 1e1, 1e2, 1e3, 1e4, 1e5]

    def layer(name: str, x: jax.Array, axis_name: str | None = None) -> Any:
        module = LAYERS[name](use_running_average=False, axis_name=axis_name)
        variables = module.init(jax.random.key(0), x)
        return module.apply(variables, x, mutable=["batch_stats"])[0]

    sides: dict[str, Callable[[np.ndarray], Any]] = {name: jax.jit(partial(layer, name)) for name in LAYERS}
    for n in (2, 8):
        for name in ("ours", "flax fast"):
            # Under vmap the replicas' program and numbers are those of pmap, on any number of devices.
            many = jax.jit(jax.vmap(partial(layer, name, axis_name="batch"), axis_name="batch"))
            sides[f"{name}, {n} replicas"] = lambda x, many=many, n=n: many(x.reshape(n, -1, *x.shape[1:]))
    sides["torch"] = lambda x: (
        torch.nn.BatchNorm2d(64)(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()
    )
    lines = [f"| mean | {' | '.join(f'{mean:g}' for mean in means)} |", "|---" * (len(means) + 1) + "|"]
    for name, side in sides.items():
        errors = []
        for mean in means:
            given = (x + mean).astype(np.float32)
            wide = given.astype(np.float64)
            expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
            found = np.asarray(side(given), np.float64).reshape(x.shape)
            errors.append(f"{np.linalg.norm(found - expected) / np.linalg.norm(expected):.1e}")
        lines.append(f"| {name} | {' | '.join(errors)} |")
    return lines


def rows(seconds: float) -> tuple[list[str], list[float]]:
    lines, ratios = [], []
    for (label, shape), dtype in ((s, d) for s in SHAPES.items() for d in ("float32", "bfloat16")):
        x, dy = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
        jx, jdy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
        for mode in PASSES:
            steps, compiled = {}, {}
            for name in LAYERS:
                steps[name], compiled[name] = jax_step(name, jx, jdy, mode)
            for name, memory_format in (("torch NHWC", torch.channels_last), ("torch NCHW", torch.contiguous_format)):
                steps[name] = torch_step(x, dy, dtype, memory_format, mode)
            copy = jax.jit(lambda x: -x)
            steps["copy"] = lambda copy=copy, jx=jx: jax.block_until_ready(copy(jx))
            found = times(steps, seconds)
            median = {name: statistics.median(values) for name, values in found.items()}
            ratio = statistics.median(a / b for a, b in zip(found["ours"], found["flax fast"], strict=True))
            if mode != "forward":
                ratios.append(ratio)
            share = PASSES[mode] / 2 * median["copy"] / median["ours"]
            cost = [
                f"{compiled[n].cost_analysis()['bytes accessed'] / jx.nbytes:.2f}, "
                f"{compiled[n].memory_analysis().temp_size_in_bytes / jx.nbytes:.2f}"
                for n in LAYERS
            ]
            shown = [f"{median[name]:.2f}" for name in steps if name != "copy"]
            lines.append(
                f"| {label} {'x'.join(map(str, shape))} | {dtype} | {mode} | {' | '.join(shown)} | {ratio:.2f} "
                f"| {share:.0%} | {' | '.join(cost)} |"
            )
            print(lines[-1], flush=True)
    return lines, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="time for each row (default 4)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/batch_norm_<platform>.md")
    options = parser.parse_args()
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    head = [
        f"# BatchNorm on {device.platform}",
        "",
        f"{kind}, {os.cpu_count()} cores; jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}.",
        "Times in ms; then bytes accessed and temporary memory, both in inputs. Bytes of ours in float32 are with those of",
        "both branches of its second look, of which a usual step takes neither.",
        "",
        "| shape | dtype | pass | ours | flax fast | flax | torch NHWC | torch NCHW | ours / flax fast | copy "
        "| ours: bytes, temp | flax fast | flax |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head))
    lines, ratios = rows(options.seconds)
    tail = ["", f"Forward+backward, ours / flax fast, median over the rows: {statistics.median(ratios):.2f}.", ""]
    tail += [
        f"Collectives over {jax.device_count()} devices (forward / forward and backward), but for branches that a",
        "usual step does not take:",
        "",
    ]
    tail += ["| | ours | flax fast | flax |", "|---|---|---|---|"]
    tail += [f"| {how} | {' | '.join(collectives(name, how) for name in LAYERS)} |" for how in ("pmap", "jit")]
    tail += [
        "",
        "Digits: output error against float64, float32 input of deviation 1, 32x14x14x64, by the mean:",
        "",
        *digits(),
    ]
    print("\n".join(tail))
    if options.write:
        path = pathlib.Path(__file__).parent / "results" / f"batch_norm_{device.platform}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(head + lines + tail) + "\n")


if __name__ == "__main__":
    main()
