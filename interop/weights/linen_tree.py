"""The variables and layers of a Linen model.

Linen's variables are nested names and arrays; what kind of layer they belong to is known to the module alone, and only
while it runs: `linen_observe.py` watches it. Variables without their module are told by names and shapes where these
leave no doubt. (A kernel of four axes may be a convolution's or a transposed convolution's.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import meta

from interop.weights import layouts, recurrent_layouts
from interop.weights.kinds import Settings
from interop.weights.layouts import Layout, Shapes
from interop.weights.linen_observe import Inputs, observe
from interop.weights.names import on_device
from interop.weights.nnx_tree import Layouts, Path, Slot, Tree, checked, matched

_DEEPEST = 100  # collections in collections
# What a call leaves behind, and caches of a call.
_TRANSIENT = ("intermediates", "cache", "perturbations", "params_axes")


def linen_tree(
    module: linen.Module | None, variables: Mapping[str, Any], inputs: Inputs = None, given: Layouts | None = None
) -> Tree:
    """The variables and layers of a Linen model. `write` gives new variables; the old ones stay as they are.

    Args:
        module: without it, layers are told by names and shapes.
        variables: as from `module.init`; boxed ones (`nn.Partitioned`) stay boxed.
        inputs: for `observe`.
        given: layouts for the layers that match these patterns, which need not be told then.

    Raises:
        ValueError: if layers cannot be told.
    """
    slots = _slots(variables)
    twice = [".".join(path) for path, count in Counter(slot.path for slot in slots).items() if count > 1]
    if twice:
        raise ValueError(f"variables of the same name in several collections: {', '.join(twice)}")
    known = matched(checked(given), {slot.path[:end] for slot in slots for end in range(1, len(slot.path))})
    shapes = {slot.path: slot.shape for slot in slots}
    asked = {path[:-1] for path in shapes if not any(path[:end] in known for end in range(1, len(path)))}
    rules: dict[Path, Layout] = {}
    if module is None:
        rules = told_by_names(shapes, asked)
    else:
        layers = observe(module, variables, shapes, asked, inputs)
        rules = {path: layer.layout for path, layer in layers.items() if layer.layout is not None}
        # In the order in which they are called; jax.jit and jax.eval_shape leave variables in alphabetical order.
        order = {path: index for index, path in enumerate(layers)}
        slots.sort(key=lambda slot: order.get(slot.path[:-1], len(order)))

    def write(values: dict[Hashable, np.ndarray]) -> Mapping[str, Any]:
        return _replaced(variables, (), values)

    return Tree("Linen's variables" if module is None else type(module).__name__, slots, rules, write)


def settings(module: linen.Module, variables: Mapping[str, Any], inputs: Inputs = None) -> dict[Path, Settings]:
    """The settings of a Linen model's layers; its mode is none of them, since the call says it."""
    shapes = {slot.path: slot.shape for slot in _slots(variables)}
    known = observe(module, variables, shapes, {path[:-1] for path in shapes}, inputs)
    return {
        path: {name: value for name, value in layer.settings.items() if name != "training"}
        for path, layer in known.items()
        if layer.settings is not None
    }


def _slots(variables: Mapping[str, Any]) -> list[Slot]:
    if not isinstance(variables, Mapping):
        raise TypeError(f"Linen's variables are a mapping of collections, found {type(variables).__name__}")
    slots = []
    for collection, tree in variables.items():
        if collection in _TRANSIENT:
            continue
        for path, leaf in _leaves(tree, ()):
            value = _unboxed(leaf)
            name = ".".join(map(str, (collection, *path)))
            try:
                shape, dtype = np.shape(value), jnp.result_type(value)
            except (TypeError, ValueError):
                raise TypeError(f"the variable {name!r} is no array but {type(value).__name__}") from None
            slots.append(Slot(path, (collection, *path), shape, dtype, partial(_read, name, value)))
    return slots


def _read(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # abstract, or a random key
        raise TypeError(f"the variable {name!r} has no values that NumPy takes: {error}") from None


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if len(path) > _DEEPEST:
        raise ValueError(f"Linen's variables are nested more than {_DEEPEST} deep at {'.'.join(path[:8])!r}")
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _leaves(child, (*path, str(name)))
    elif tree is not None:
        yield path, tree


def _unboxed(leaf: Any) -> Any:
    # Not leaf.unbox(), which puts a sharding constraint on the value.
    return leaf.value if isinstance(leaf, meta.AxisMetadata) and hasattr(leaf, "value") else leaf


def _replaced(tree: Any, path: Path, values: Mapping[Hashable, np.ndarray]) -> Any:
    if isinstance(tree, Mapping):
        new: Any = {name: _replaced(child, (*path, str(name)), values) for name, child in tree.items()}
        return new if isinstance(tree, dict) else type(tree)(new)  # type: ignore[call-arg]
    if path not in values:
        return tree
    value = on_device(values[path], _unboxed(tree))
    return tree.replace_boxed(value) if isinstance(tree, meta.AxisMetadata) else value


_CELLS = {
    frozenset(("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")): recurrent_layouts.LINEN_LSTM,
    frozenset(("ir", "iz", "in", "hr", "hz", "hn")): recurrent_layouts.LINEN_GRU,
}
_ATTENTION = {"query", "key", "value", "out", "query_ln", "key_ln"}


def told_by_names(shapes: Mapping[Path, tuple[int, ...]], asked: set[Path]) -> dict[Path, Layout]:
    """Layouts from the names and shapes of variables alone, for the layers `asked` about.

    Raises:
        ValueError: with all layers that could be of several kinds.
    """
    inside: dict[Path, dict[str, tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        for end in range(len(path)):
            inside.setdefault(path[:end], {})[".".join(path[end:])] = shape
    rules: dict[Path, Layout] = {}
    doubtful = []
    for path in sorted(inside, key=len):
        parts = inside[path]
        children = frozenset(name.partition(".")[0] for name in parts if "." in name)
        if children in _CELLS:
            rules[path] = _CELLS[children]
        elif children <= _ATTENTION and layouts.is_attention(parts):
            rules[path] = layouts.Attention()
            rules |= {(*path, name): layouts.Linear(1, 2) for name in ("query", "key", "value")}
            rules[(*path, "out")] = layouts.Linear(2, 1)
        elif path in asked and path not in rules:
            own = {name: shape for name, shape in parts.items() if "." not in name}
            layout = _by_names(own)
            if layout is not None:
                rules[path] = layout
            elif "kernel" in own:
                doubtful.append(f"  {'.'.join(path)}: a kernel of shape {own['kernel']}")
    if doubtful:
        raise ValueError(
            "\n".join(
                [
                    "variables alone do not say whether these layers are Conv, ConvTranspose, DenseGeneral or another "
                    "kind: give (module, variables), or layouts={'name or pattern': interop.layouts.Conv()}:",
                    *doubtful,
                ]
            )
        )
    return rules


def _by_names(own: Shapes) -> Layout | None:
    names = own.keys()
    if names == {"embedding"}:
        return layouts.Embed()
    if {"mean", "var"} <= names:
        return layouts.BatchNorm()
    if names == {"negative_slope"}:
        return layouts.PReLU()
    if "scale" in names and names <= {"scale", "bias"}:
        return layouts.Norm()
    if "kernel" in names and names <= {"kernel", "bias"}:
        axes, outputs = len(own["kernel"]), len(own.get("bias", (0,)))
        if axes == 2:
            return layouts.Linear()
        if outputs > 1 and axes > outputs:
            return layouts.Linear(axes - outputs, outputs)
    return None
