"""What JAX's transformations need of a program's values: their arrays, apart from the order of their dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from interop.ops.layout import array_of, is_tensor, laid, order_of


def parts(values: Any) -> tuple[list[jax.Array], Callable[[Iterable[jax.Array]], Any]]:
    """The arrays among nested values, and what puts others in their place; sizes are no arrays and stay."""
    leaves, tree = jax.tree.flatten(values, is_leaf=is_tensor)
    orders = [order_of(x) if is_tensor(x) else None for x in leaves]
    others = [None if is_tensor(x) else x for x in leaves]

    def join(arrays: Iterable[jax.Array]) -> Any:
        left = iter(arrays)
        filled = [x if order is None else laid(next(left), order) for x, order in zip(others, orders, strict=True)]
        return jax.tree.unflatten(tree, filled)

    return [array_of(x) for x in leaves if is_tensor(x)], join
