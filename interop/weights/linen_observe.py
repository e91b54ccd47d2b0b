"""Which layers a Linen module has: it is run on abstract values, and its layers are noted as they are called."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from interop.weights.kinds import Settings, layout_of, settings_of
from interop.weights.layouts import Layout
from interop.weights.nnx_tree import Path
from jaxnorm.sync import SyncBatchNorm

Inputs = Any  # an array, a sequence of arguments, or a mapping of keyword arguments; None for none


class ObservedLayer(NamedTuple):
    """What is known of a layer that ran."""

    layout: Layout | None
    settings: Settings | None


def observe(
    module: linen.Module,
    variables: Mapping[str, Any],
    shapes: Mapping[Path, tuple[int, ...]],
    asked: Collection[Path],
    inputs: Inputs = None,
) -> dict[Path, ObservedLayer]:
    """Every layer that ran, by its path.

    Without `inputs`, likely ones are tried: images, sequences, tokens. Nothing is guessed by that: an input that does
    not fit the variables is an error of Flax's, and the layers that run are the same for every input that fits.

    Args:
        module, variables: the model; the variables may be abstract.
        shapes: of the variables by their paths.
        asked: the layers that have to be observed.
        inputs: what the module is called with: an array (or jax.ShapeDtypeStruct), a sequence of arguments, or a
            mapping of keyword arguments.

    Raises:
        ValueError: if no input fits, or if layers asked for did not run.
    """
    found: dict[Path, ObservedLayer] = {}
    errors = []
    for args, kwargs in attempts(module, shapes) if inputs is None else [_arguments(inputs)]:
        try:
            found |= _run(module, variables, args, kwargs)
            if not set(asked) <= found.keys():
                with jax.disable_jit():  # what nn.jit traced before, for an equal layer, is not called again
                    found = _run(module, variables, args, kwargs) | found
        except Exception as error:  # of any kind: it is the model's code that runs
            errors.append(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        if found and set(asked) <= found.keys():
            break
    missing = sorted(".".join(path) for path in asked if path not in found)
    if missing or not found:
        reason = f"{type(module).__name__} ran on none of {len(errors)} inputs" + (f" ({errors[-1]})" if errors else "")
        if found:
            reason = f"layers of {type(module).__name__} that did not run: {', '.join(missing)}"
        raise ValueError(
            f"{reason}; what kind its layers are is seen when it runs (on abstract values). Give what it is called "
            'with: inputs=x, inputs=(x, mask) or inputs={"x": x, "train": True}; arrays or jax.ShapeDtypeStruct'
        )
    return found


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _run(
    module: linen.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Path, ObservedLayer]:
    found: dict[Path, ObservedLayer] = {}

    def note(
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        # Flax checks the setup of what it lifts (nn.remat, nn.RNN) on a copy without a place (Module._validate_setup).
        placed = layer.scope is not None and not isinstance(layer.scope, linen.module.TestScope)
        if placed and found.get(layer.path, (None,))[0] is None:
            found[layer.path] = ObservedLayer(layout_of(layer), settings_of(layer))
        return call(*arguments, **keywords)

    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def run(variables: Mapping[str, Any], arrays: list[jax.Array]) -> None:
        given = dict(zip(places, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        with linen.intercept_methods(note):
            module.apply(variables, *args, **kwargs, rngs=rngs, mutable=linen.DenyList("params"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(run, variables, [leaves[i] for i in places])
    return found


# Flags of a call that say whether it is training: their values in eval mode.
_EVAL = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}
_SIZES = {1: (64, 1024), 2: (32, 64, 224, 227, 28, 128, 256, 299, 384, 512), 3: (16, 32, 64)}


def attempts(
    module: linen.Module, shapes: Mapping[Path, tuple[int, ...]]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Likely arguments for a module that is called with one array, and flags that say whether it is training."""
    called = module.inner if isinstance(module, SyncBatchNorm) else module
    parameters = list(inspect.signature(type(called).__call__).parameters.values())[1:]
    flags = {p.name: _EVAL[p.name] for p in parameters if p.name in _EVAL}
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in needed if p.name not in flags]
    if len(needed) != 1:
        return
    choices: list[dict[str, Any]] = [flags]
    if flags and not any(p.default is p.empty for p in parameters if p.name in flags):
        choices.append({})
    if flags:
        choices.append({name: not value for name, value in flags.items()})
    for choice in choices:
        for array in _arrays(shapes):
            yield (array,), choice


def _arrays(shapes: Mapping[Path, tuple[int, ...]]) -> Iterator[jax.ShapeDtypeStruct]:
    kernels = [shape for path, shape in shapes.items() if path[-1] == "kernel"]
    for axes, sizes in _SIZES.items():
        channels = dict.fromkeys(shape[-2] for shape in kernels if len(shape) == axes + 2)
        for size in sizes:
            for number in channels:
                spatial = (size,) * axes
                yield jax.ShapeDtypeStruct((2, *spatial, number), np.float32)
                yield jax.ShapeDtypeStruct((2, number, *spatial), np.float32)
    last = (shape[-1] for path, shape in shapes.items() if path[-1] in ("scale", "mean") and shape)
    for number in dict.fromkeys([*(shape[0] for shape in kernels), *last]):
        yield jax.ShapeDtypeStruct((2, 16, number), np.float32)
        yield jax.ShapeDtypeStruct((2, number), np.float32)
    yield jax.ShapeDtypeStruct((2, 16), jnp.int32)
