"""Order statistics that are no plain sort, with their places; counts of values by bin."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Number, jax_dtype
from interop.ops.registry import register


def _kept(values: Array, places: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    places = places.astype(jax_dtype(jnp.int64))
    return (values, places) if keepdim else (jnp.squeeze(values, dim), jnp.squeeze(places, dim))


@register("aten.kthvalue.default")
def kthvalue(x: Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The k-th smallest, counted from 1."""
    if x.ndim == 0:
        return x, jnp.zeros((), jax_dtype(jnp.int64))
    places = lax.slice_in_dim(jnp.argsort(x, dim), k - 1, k, axis=dim)
    return _kept(jnp.take_along_axis(x, places, dim), places, dim, keepdim)


@register("aten.mode.default")
def mode(x: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The most frequent value, the smallest of several, and its last place."""
    if x.ndim == 0:
        return x, jnp.zeros((), jax_dtype(jnp.int64))
    moved = jnp.moveaxis(x, dim, -1)
    same = moved[..., :, None] == moved[..., None, :]
    counts = same.sum(-1)
    most = counts == counts.max(-1, keepdims=True)
    order = jnp.argsort(moved, -1)
    place = jnp.take_along_axis(order, jnp.argmax(jnp.take_along_axis(most, order, -1), -1, keepdims=True), -1)
    chosen = jnp.take_along_axis(moved, place, -1) == moved
    last = moved.shape[-1] - 1 - jnp.argmax(jnp.flip(chosen, -1), -1, keepdims=True)
    values = jnp.take_along_axis(moved, last, -1)
    return _kept(jnp.moveaxis(values, -1, dim), jnp.moveaxis(last, -1, dim), dim, keepdim)


def _running(x: Array, dim: int, better: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
    """The best so far and its place, the last of several; nan is better than anything."""
    if x.ndim == 0:
        return x, jnp.zeros((), jax_dtype(jnp.int64))
    axis = dim % x.ndim
    places = lax.broadcasted_iota(jax_dtype(jnp.int64), x.shape, axis)

    def best(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, i), (y, j) = a, b
        # Here too, the later one of equals.
        take = (better(y, x) | (y == x) | jnp.isnan(y)) & ((~jnp.isnan(x)) | jnp.isnan(y))
        return jnp.where(take, y, x), jnp.where(take, j, i)

    _, found = lax.associative_scan(best, (lax.stop_gradient(x), places), axis=axis)
    return jnp.take_along_axis(x, found, axis), found


@register("aten.cummax.default")
def cummax(x: Array, dim: int) -> tuple[Array, Array]:
    return _running(x, dim, jnp.greater)


@register("aten.cummin.default")
def cummin(x: Array, dim: int) -> tuple[Array, Array]:
    return _running(x, dim, jnp.less)


@register("aten.histc.default")
def histc(x: Array, bins: int = 100, min: Number = 0, max: Number = 0) -> Array:
    """How many values lie in each of `bins` equal parts of [min, max], by default of what x spans; others are left out.

    The last part includes its upper end. Nothing of it has a gradient.
    """
    x = lax.stop_gradient(x).reshape(-1)
    low, high = (jnp.asarray(bound, x.dtype) for bound in (min, max))
    if x.size:
        spanned = low == high
        low, high = jnp.where(spanned, x.min(), low), jnp.where(spanned, x.max(), high)
    low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    inside = (x >= low) & (x <= high)
    place = jnp.where(inside, (x - low) * bins / (high - low), 0).astype(jnp.int32)
    return jnp.zeros(bins, x.dtype).at[jnp.minimum(place, bins - 1)].add(inside.astype(x.dtype))
