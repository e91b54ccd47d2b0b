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

from interop._from_torch import from_torch
from interop.arrays import to_numpy
from interop.cli._import import DYNAMIC_HELP, INPUT_HELP, MODEL_HELP, OPTION_HELP, WHICH_HELP
from interop.cli.libraries import require
from interop.cli.models import build, checkpoint_of, dimensions, input_shapes, load, parse_options
from interop.cli.output import table
from interop.running import artifact
from interop.running.module import TracedModule
from interop.tracing import draws
from interop.weights._state_dict import state_dict

if TYPE_CHECKING:
    from torch.nn import Module


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    directory: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="What `jaxnorm import` wrote; without it MODEL is imported here."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A checkpoint for PyTorch's model, to which DIR is held; else DIR's weights."
        ),
    ] = None,
    which: Annotated[str | None, typer.Option(help=WHICH_HELP)] = None,
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    dynamic: Annotated[str | None, typer.Option(help=f"Without DIR. {DYNAMIC_HELP}")] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    float32: Annotated[bool, typer.Option("--float32", help="Compute in float32; else in float64.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="The relative difference that passes; 1e-8, or 1e-3 with --float32.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the input, which is normal.")] = 0,
) -> int:
    """PyTorch against JAX on the same input.

    The PyTorch model gets the weights of --weights, or those that were saved. Compared are the arrays, if --weights
    says what they are to be; the outputs in eval mode; and in train mode the outputs and every array that a step
    changes, the running statistics. Dropout and its like draw the same on both sides: they drop nothing. The exit code
    is 1 if a relative difference (the norm of the difference over the norm of PyTorch's result) is above the tolerance.

    \b
    Examples:
      jaxnorm verify timm:resnet50 resnet50
      jaxnorm verify torchvision:mobilenet_v3_small mobilenet --option num_classes=10 --float32
      jaxnorm verify timm:resnet50 --weights last.pth.tar --which ema
      jaxnorm verify mypackage.models:build mine --input 2,3,64,64
    """
    torch = require("torch")
    limit = (1e-3 if float32 else 1e-8) if tolerance is None else tolerance
    if directory is not None and dynamic is not None:
        raise ValueError(f"--dynamic {dynamic}: {directory} has its own, which were said when it was imported")
    dims = dimensions("0" if dynamic is None else dynamic)
    checkpoint = checkpoint_of(weights, which)
    module = build(model, parse_options(option or []))
    if checkpoint is not None:
        load(module, checkpoint, str(checkpoint.path))
    sizes = input_shapes(module, shapes or [])
    if directory is None:
        taken = from_torch(module, *(torch.zeros(size) for size in sizes), dynamic_dims=dims)
    dtype = np.float32 if float32 else np.float64
    with jax.enable_x64(not float32):
        imported = _cast(taken if directory is None else artifact.load(directory), dtype)
        generator = np.random.default_rng(seed)
        inputs = [generator.normal(size=size).astype(dtype) for size in sizes]
        module = module.float() if float32 else module.double()
        rows = []
        if directory is not None and checkpoint is not None:
            rows.append(("saved", "arrays", *_difference(_arrays(imported, module, directory, str(checkpoint.path)))))
        elif directory is not None:
            load(module, state_dict(imported), directory)
        rows += _compare(torch, module, imported, inputs)
    shown = ", ".join("x".join(map(str, size)) for size in sizes)
    kind = "float32" if float32 else "float64"
    where = f"{directory} in" if directory is not None else "imported to"
    print(f"{model} in PyTorch {torch.__version__}, {where} JAX {jax.__version__}; {kind}, input {shown}\n")
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


def _arrays(imported: TracedModule, module: Module, saved: str, weights: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each array of the saved model beside the one that it should be."""
    ours, theirs = state_dict(imported), {name: to_numpy(value) for name, value in module.state_dict().items()}
    if other := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"{saved} and {weights} are of two models; only one has: {', '.join(other)}")
    return [(ours[name], theirs[name]) for name in theirs]


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
