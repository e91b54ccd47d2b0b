"""Every difference in name between a Flax tree and PyTorch's state dict.

The walk over a tree, and what each variable is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from interop.conventions import TORCH_NAMES
from interop.variables import Constant


def named_variables(root: nnx.Module) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    """Every variable that belongs to a state dict, by PyTorch's name; a variable with several places has several names.

    Random states, constants and buffers with `persistent=False` are left out.
    """
    for path, variable in _walk(root, ()):
        if isinstance(variable, (nnx.RngState, Constant)) or variable.get_metadata().get("persistent") is False:
            continue
        yield ".".join(path), variable


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], nnx.Variable[Any]]]:
    if isinstance(node, nnx.Variable):
        yield path, node
        return
    for name, child in _children(node):
        if isinstance(node, nnx.BatchNorm):
            name = TORCH_NAMES.get(name, name)
        yield from _walk(child, (*path, name))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """What hangs under a module or a container of modules."""
    if isinstance(node, nnx.Rngs):
        return
    if isinstance(node, (list, tuple, nnx.List)):
        yield from ((str(index), child) for index, child in enumerate(node))
    elif isinstance(node, dict):
        yield from ((str(key), child) for key, child in node.items())
    elif isinstance(node, (nnx.Module, nnx.Object)):
        for name, child in vars(node).items():
            if not name.startswith("_pytree__"):
                yield name, child
