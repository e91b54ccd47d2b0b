"""What a mask chooses, `x[mask]`, without a size that depends on values: every row stays in its place.

A chosen tensor has all rows, with the mask flattened in place of its dimensions. Rows that the mask leaves out hold
what the first chosen row holds: what is computed of them is as finite as what is computed of chosen rows, and goes
nowhere, nor does a derivative come back from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Number, highest, lowest
from interop.ops.layout import normal_dim
from interop.ops.registry import register


@register("jaxnorm.masked_rows.default")
def masked_rows(x: Array, mask: Array, dim: int = 0) -> Array:
    """`x[mask]`, or `x[:, mask]` for dim = 1."""
    valid = mask.reshape(-1)
    shape = (*x.shape[:dim], valid.size, *x.shape[dim + mask.ndim :])
    return _filled(x.reshape(shape), valid, dim)


def _filled(x: Array, valid: Array, dim: int) -> Array:
    first = lax.stop_gradient(jnp.take(x, jnp.argmax(valid)[None], axis=dim))
    return jnp.where(_along(valid, dim, x.ndim), x, first)


def _along(valid: Array, dim: int, ndim: int) -> Array:
    return valid.reshape(*[1] * dim, valid.size, *[1] * (ndim - dim - 1))


@register("jaxnorm.masked_places.default")
def masked_places(mask: Array) -> list[Array]:
    """`mask.nonzero(as_tuple=True)`."""
    mask = mask if mask.ndim else mask.reshape(1)
    places = jnp.indices(mask.shape).reshape(mask.ndim, -1)
    return list(_filled(places, mask.reshape(-1) != 0, 1))


@register("jaxnorm.masked_valid.default")
def masked_valid(mask: Array) -> Array:
    """The rows that are chosen, (N,)."""
    return mask.reshape(-1) != 0


@register("jaxnorm.masked_put.default")
def masked_put(x: Array, mask: Array, rows: Array, dim: int = 0, accumulate: bool = False) -> Array:
    """`x[mask] = rows`, `x[mask] += rows`; rows are all rows, or broadcast to them."""
    shape = (*x.shape[:dim], mask.size, *x.shape[dim + mask.ndim :])
    values = jnp.broadcast_to(rows.astype(x.dtype), shape).reshape(x.shape)
    where = mask.reshape(*[1] * dim, *mask.shape, *[1] * (x.ndim - dim - mask.ndim))
    return jnp.where(where, x + values if accumulate else values, x)


@register("jaxnorm.masked_put_at.default")
def masked_put_at(
    x: Array, indices: Sequence[Array | None], rows: Array, valid: Array, accumulate: bool = False
) -> Array:
    """`x[indices] = rows`, for the rows that are valid alone."""
    at = x.at[
        tuple(slice(None) if i is None else jnp.where(valid, i, n) for i, n in zip(indices, x.shape, strict=False))
    ]
    rows = rows.astype(x.dtype)
    return at.add(rows, mode="drop") if accumulate else at.set(rows, mode="drop")


@register("jaxnorm.masked_moment.default")
def masked_moment(
    x: Array,
    valid: Array,
    row_dim: int,
    name: str,
    dims: Sequence[int] | None = None,
    keepdim: bool = False,
    correction: int | float | None = None,
) -> Array:
    """The mean, the variance ("var") or its root ("std") over dimensions, that of the rows among them."""
    options: dict[str, Any] = {
        "axis": tuple(normal_dim(d, x.ndim) for d in dims or range(x.ndim)),
        "keepdims": keepdim,
        "where": _along(valid, row_dim, x.ndim),
    }
    if name == "mean":
        return jnp.mean(x, **options)
    variance = jnp.var(x, correction=1 if correction is None else correction, **options)
    return jnp.sqrt(variance) if name == "std" else variance


@register("jaxnorm.masked_fill.default")
def masked_fill(x: Array, valid: Array, row_dim: int, value: Number) -> Array:
    """x with `value` in rows that do not count; infinities are the limits of x's type."""
    limit = lowest(x.dtype) if value == -math.inf else highest(x.dtype) if value == math.inf else value
    return jnp.where(_along(valid, row_dim, x.ndim), x, jnp.asarray(limit, x.dtype))


@register("jaxnorm.masked_count.default")
def masked_count(valid: Array) -> Array:
    """How many rows there are: `x[mask].shape[0]`."""
    return jnp.sum(valid)


@register("jaxnorm.masked_size.default")
def masked_size(mask: Array) -> int:
    """How many rows there are room for."""
    return math.prod(mask.shape)
