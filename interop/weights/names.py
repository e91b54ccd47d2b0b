"""Names and places: the walk over an NNX model, which gives each variable its path and each layer its layout."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from interop.conventions import TORCH_NAMES
from interop.program.recorded import model_of
from interop.variables import Constant, to_numpy
from interop.weights.kinds import layout_of
from interop.weights.layouts import Layout
from interop.weights.nnx_tree import Path, Slot, Tree

# Not what a model has learned: random states, caches of a call, and what a call leaves behind.
_TRANSIENT = (nnx.RngState, Constant, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


def named_variables(root: nnx.Module) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    """Every variable that belongs to a state dict, by its path; a variable with several places has several paths.

    BatchNorm's have PyTorch's names. Random states, constants and buffers with `persistent=False` are left out.
    """
    for path, holder, variable in _variables(root):
        name = TORCH_NAMES.get(path[-1], path[-1]) if isinstance(holder, nnx.BatchNorm) else path[-1]
        yield ".".join((*path[:-1], name)), variable


def nnx_tree(model: nnx.Module) -> Tree:
    """The variables and layers of an NNX model. The layers of an `nnx.Sequential` are its numbers, as in PyTorch.

    An array that is an attribute without a variable around it is none of them, like a tensor in PyTorch that is neither
    a parameter nor a buffer.
    """
    slots = []
    variables: dict[Hashable, nnx.Variable[Any]] = {}
    for path, _, variable in _variables(model):
        value = variable.get_value()
        variables[id(variable)] = variable
        slots.append(Slot(path, id(variable), np.shape(value), jnp.result_type(value), partial(to_numpy, variable)))
    rules: dict[Path, Layout] = {}
    for path, node in nodes(model):
        layout = layout_of(node)
        if layout is not None:
            rules[path] = layout

    def write(values: dict[Hashable, np.ndarray]) -> nnx.Module:
        for key, value in values.items():
            variables[key].set_value(on_device(value, variables[key].get_value()))
        return model

    imported = model_of(model)
    return Tree(type(model).__name__ if imported is None else imported.name, slots, rules, write)


def on_device(value: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) -> jax.Array:
    """A copy of `value` with the dtype of `like`, and spread over devices as it is."""
    array = jnp.array(value.astype(like.dtype), copy=True)
    if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
        return jax.device_put(array, like.sharding)
    return array


def nodes(root: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Every module of an NNX model by each of its paths, parents first."""
    return ((path, node) for path, _, node in _walk(root, (), None, ()) if isinstance(node, nnx.Module))


def _variables(root: nnx.Module) -> Iterator[tuple[Path, Any, nnx.Variable[Any]]]:
    for path, holder, node in _walk(root, (), None, ()):
        kept = isinstance(node, nnx.Variable) and not isinstance(node, _TRANSIENT)
        if kept and node.get_metadata().get("persistent") is not False:
            yield path, holder, node


def _walk(node: Any, path: Path, holder: Any, above: tuple[int, ...]) -> Iterator[tuple[Path, Any, Any]]:
    yield path, holder, node
    if isinstance(node, nnx.Variable) or id(node) in above:
        return
    for name, child in _children(node):
        # torch.nn.Sequential holds its layers by their numbers, nnx.Sequential in a list of the name "layers".
        below = path if name == "layers" and isinstance(node, nnx.Sequential) else (*path, name)
        yield from _walk(child, below, node, (*above, id(node)))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """What hangs under a module or a container of modules."""
    if isinstance(node, nnx.Rngs):
        return
    if isinstance(node, (list, tuple, nnx.List)):
        yield from ((str(index), child) for index, child in enumerate(node))
    elif isinstance(node, (dict, nnx.State)):
        yield from ((str(key), child) for key, child in node.items())
    elif isinstance(node, nnx.Pytree):
        for name, child in vars(node).items():
            if not name.startswith("_pytree__"):
                yield name, child
