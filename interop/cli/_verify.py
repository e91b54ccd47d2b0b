"""jaxnorm verify: PyTorch against JAX on the same input, in both modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax.typing import DTypeLike

from interop.cli import draws
from interop.cli._import import INPUT_HELP, MODEL_HELP
from interop.cli.models import build, input_shapes, load, parse_options
from interop.cli.output import require, table
from interop.running import artifact
from interop.running.module import TracedModule
from interop.weights._state_dict import state_dict

if TYPE_CHECKING:
    from torch.nn import Module


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What `jaxnorm import` wrote.")],
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="name=value for the model's constructor; may be repeated.")
    ] = None,
    float32: Annotated[bool, typer.Option("--float32", help="Compute in float32; else in float64.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="The relative difference that passes; 1e-8, or 1e-3 with --float32.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the input, which is normal.")] = 0,
) -> int:
    """PyTorch against JAX on the same input.

    The PyTorch model gets the saved weights. Compared are the outputs in eval mode, and in train mode the outputs and
    every array that a step changes, the running statistics. Dropout and its like draw the same on both sides: they drop
    nothing. The exit code is 1 if a relative difference (the norm of the difference over the norm of PyTorch's result)
    is above the tolerance.

    \b
    Examples:
      jaxnorm verify timm:resnet50 resnet50
      jaxnorm verify torchvision:mobilenet_v3_small mobilenet --option num_classes=10 --float32
      jaxnorm verify mypackage.models:build mine --input 2,3,64,64
    """
    torch = require("torch")
    limit = (1e-3 if float32 else 1e-8) if tolerance is None else tolerance
    module = build(model, parse_options(option or []))
    with jax.enable_x64(not float32):
        imported = _cast(artifact.load(directory), np.float32 if float32 else np.float64)
        sizes = input_shapes(module, shapes or [])
        generator = np.random.default_rng(seed)
        inputs = [generator.normal(size=size).astype(np.float32 if float32 else np.float64) for size in sizes]
        module = module.float() if float32 else module.double()
        load(module, state_dict(imported), directory)
        rows = list(_compare(torch, module, imported, inputs))
    shown = ", ".join("x".join(map(str, size)) for size in sizes)
    kind = "float32" if float32 else "float64"
    print(f"{model} in PyTorch {torch.__version__}, {directory} in JAX {jax.__version__}; {kind}, input {shown}\n")
    table(
        ("mode", "compared", "values", "largest difference", "relative"),
        [(mode, what, f"{n:,}", f"{largest:.2g}", f"{relative:.2g}") for mode, what, n, largest, relative in rows],
        left=2,
    )
    if left_out := draws.uncovered(imported._interop.model.train):
        print(f"\nnot compared in train mode, whose draws differ: {', '.join(left_out)}")
    worst = max((row[4] for row in rows), default=0.0)
    passed = all(row[4] <= limit for row in rows)
    print(f"\n{'equal' if passed else 'different'}: {worst:.2g} at most, tolerance {limit:g}")
    return 0 if passed else 1


def _compare(
    torch: ModuleType, module: Module, imported: TracedModule, inputs: list[np.ndarray]
) -> Iterator[tuple[str, str, int, float, float]]:
    """(mode, what, values, largest difference, relative difference) of everything that is compared."""
    for mode in ("eval",) if draws.uncovered(imported._interop.model.train) else ("eval", "train"):
        theirs, ours = copy.deepcopy(module), nnx.clone(imported)
        getattr(theirs, mode)()
        getattr(ours, mode)()
        for layer in imported._interop.model.batch_norms:
            if layer.frozen:
                theirs.get_submodule(layer.path).eval()
        with torch.no_grad(), draws.same_draws(torch):
            expected = theirs(*map(torch.from_numpy, inputs))
            found = _run(ours, [jnp.asarray(x) for x in inputs])
        pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
        yield mode, "outputs", *_difference(pairs)
        if mode == "train":
            before, after = state_dict(imported), state_dict(ours)
            given, wanted = module.state_dict(), theirs.state_dict()
            statistics = [name for name in wanted if not torch.equal(wanted[name], given[name])]
            changed = [name for name in after if not np.array_equal(after[name], before[name])]
            names = sorted({*statistics, *changed})
            yield mode, "state after", *_difference([(after[name], wanted[name].numpy()) for name in names])


def _run(model: TracedModule, inputs: list[jax.Array]) -> Any:
    """The model's outputs; its state is updated. Compiling takes longer than running once, so it is done lightly."""
    graph, state = nnx.split(model)

    def call(state: nnx.State[Any, Any], inputs: list[jax.Array]) -> tuple[Any, nnx.State[Any, Any]]:
        module = nnx.merge(graph, state)
        return module(*inputs), nnx.state(module)

    options: dict[str, int] | None = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    outputs, after = jax.jit(call, compiler_options=options)(state, inputs)
    nnx.update(model, after)
    return outputs


def _difference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, float, float]:
    """Number of values, largest difference, and the largest relative difference of the pairs (ours, PyTorch's)."""
    count, largest, relative = 0, 0.0, 0.0
    for found, wanted in pairs:
        x, y = (
            np.asarray(value).astype(np.complex128 if np.iscomplexobj(value) else np.float64)
            for value in (found, wanted)
        )
        if x.shape != y.shape:
            raise ValueError(f"JAX gives shape {x.shape} where PyTorch gives {y.shape}")
        gap = np.abs(x - y)
        norm = float(np.linalg.norm(y))
        distance = float(np.linalg.norm(gap))
        count += y.size
        largest = float(np.maximum(largest, gap.max(initial=0.0)))
        relative = float(np.maximum(relative, distance / norm if norm else (0.0 if distance == 0 else np.inf)))
    return count, largest, relative


def _tensors(result: Any) -> list[np.ndarray]:
    """The arrays of a nested result, in order; dictionaries by their keys, dataclasses by their fields."""
    if isinstance(result, Mapping):
        return [leaf for key in sorted(result, key=str) for leaf in _tensors(result[key])]
    if isinstance(result, list | tuple):
        return [leaf for item in result for leaf in _tensors(item)]
    if hasattr(result, "detach"):
        return [result.detach().numpy()]
    if isinstance(result, jax.Array | np.ndarray):
        return [np.asarray(result)]
    return [leaf for item in vars(result).values() for leaf in _tensors(item)] if hasattr(result, "__dict__") else []


def _cast(model: TracedModule, dtype: DTypeLike) -> TracedModule:
    """The model with its floating-point arrays in another dtype, constants included."""
    graph, state = nnx.split(model)

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return nnx.merge(graph, jax.tree.map(cast, state))
