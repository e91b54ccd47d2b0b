"""The modules and variables of a traced model by PyTorch's paths and names."""

from __future__ import annotations

from typing import Any

from flax import nnx

from interop.conventions import FLAX_NAMES


def variable(root: nnx.Module, name: str) -> nnx.Variable[Any]:
    """The variable with PyTorch's name `name`. Raises KeyError if the tree has none there."""
    holder: Any = root
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part, None)
    if isinstance(holder, nnx.BatchNorm):
        last = FLAX_NAMES.get(last, last)
    found = getattr(holder, last, None)
    if not isinstance(found, nnx.Variable):
        raise KeyError(f"the model has no variable {name!r}")
    return found


def module_at(root: nnx.Module, path: str) -> Any:
    """The layer at `path`."""
    node: Any = root
    for part in path.split(".") if path else ():
        node = getattr(node, part)
    return node
