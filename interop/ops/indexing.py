"""Reading and writing by index: gather, scatter, masks, triangles, diagonals."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from interop.ops.dtypes import Number, Operand, as_array, highest, is_inexact, jax_dtype, lowest
from interop.ops.elementwise import div_mode
from interop.ops.layout import normal_dim
from interop.ops.registry import register
from interop.program.guards import Size


@register("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(x: Array, indices: Sequence[Array | None]) -> Array:
    return x[_index(indices)]


def _index(indices: Sequence[Array | None]) -> tuple[Array | slice, ...]:
    """NumPy's index: None stands for a whole dimension."""
    return tuple(slice(None) if i is None else i for i in indices)


@register("aten.index_put.default", "aten._unsafe_index_put.default")
def index_put(x: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    """x with `values` written, or added, at the indices; a boolean index is a mask."""
    values = jnp.asarray(values, x.dtype)
    masks = [i for i in indices if i is not None and i.dtype == jnp.bool_]
    if masks and len(indices) == 1 and values.size == 1:
        mask = masks[0].reshape(masks[0].shape + (1,) * (x.ndim - masks[0].ndim))
        return jnp.where(mask, x + values.reshape(()) if accumulate else values.reshape(()), x)
    if masks and len(indices) == 1 and values.ndim == x.ndim - masks[0].ndim + 1 and is_inexact(x.dtype):
        return _put_chosen(x, masks[0], values, accumulate)
    at = x.at[_index(indices)]
    return at.add(values) if accumulate else at.set(values)


def _put_chosen(x: Array, mask: Array, values: Array, accumulate: bool) -> Array:
    """x with a value for each place that the mask chooses.

    Where it chooses another number of places, which is an error in PyTorch, the result is no number.
    """
    count = len(values)
    if count == 1:  # for every place
        chosen = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return jnp.where(chosen, x + values[0] if accumulate else values[0], x)
    at = x.at[jnp.nonzero(mask, size=count, fill_value=mask.shape)]
    result = at.add(values, mode="drop") if accumulate else at.set(values, mode="drop")
    return jnp.where(jnp.sum(mask) == count, result, jnp.nan)


@register("aten.nonzero_static.default")
def nonzero_static(x: Array, *, size: int, fill_value: int = -1) -> Array:
    """The places of what is not 0, (size, dimensions), cut or filled up."""
    return jnp.stack(jnp.nonzero(x, size=size, fill_value=fill_value), -1)


@register("aten.index_select.default")
def index_select(x: Array, dim: int, index: Array) -> Array:
    return jnp.take(x.reshape(1) if x.ndim == 0 else x, index, axis=dim)


@register("aten.gather.default")
def gather(x: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    """out[i][j] = x[index[i][j]][j] for dim = 0; index may be smaller than x in the other dimensions."""
    return x[_places(index, dim)] if x.ndim else x


def _places(index: Array, dim: int) -> tuple[Array, ...]:
    """For each element of `index`, its own position, with `index` in place of dimension `dim`."""
    places = list(jnp.indices(index.shape, sparse=True))
    places[normal_dim(dim, index.ndim)] = index
    return tuple(places)


@register("aten.scatter.src", "aten.scatter.value")
def scatter(x: Array, dim: int, index: Array, src: Operand) -> Array:
    return x.at[_places(index, dim)].set(_cropped(src, index, x.dtype))


@register("aten.scatter_add.default")
def scatter_add(x: Array, dim: int, index: Array, src: Array) -> Array:
    return x.at[_places(index, dim)].add(_cropped(src, index, x.dtype))


@register("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter_reduce_op(x: Array, dim: int, index: Array, src: Operand, *, reduce: str) -> Array:
    places = _places(index, dim)
    at = x.at[places]
    source = _cropped(src, index, x.dtype)
    return at.add(source) if reduce == "add" else _multiplied(x, places, source)


@register("aten.scatter_reduce.two")
def scatter_reduce(x: Array, dim: int, index: Array, src: Array, reduce: str, *, include_self: bool = True) -> Array:
    return _reduced(x, _places(index, dim), _cropped(src, index, x.dtype), reduce, include_self)


@register("aten.index_reduce.default")
def index_reduce(x: Array, dim: int, index: Array, source: Array, reduce: str, *, include_self: bool = True) -> Array:
    x, source = (jnp.moveaxis(a, dim, 0) for a in (x, source))
    return jnp.moveaxis(_reduced(x, (index,), source, reduce, include_self), 0, dim)


def _reduced(x: Array, places: tuple[Array, ...], source: Array, reduce: str, include_self: bool) -> Array:
    """x, each place of it reduced with what of `source` is for it; without `include_self`, that alone."""
    neutral = {"sum": 0, "mean": 0, "prod": 1, "amax": lowest(x.dtype), "amin": highest(x.dtype)}[reduce]
    start = x if include_self else x.at[places].set(jnp.asarray(neutral, x.dtype))
    at = start.at[places]
    if reduce in ("amax", "amin"):
        return at.max(source) if reduce == "amax" else at.min(source)
    if reduce == "prod":
        return _multiplied(start, places, source)
    if reduce == "sum":
        return at.add(source)
    count = (jnp.ones_like(x) if include_self else jnp.zeros_like(x)).at[places].add(1)
    return div_mode(at.add(source), jnp.maximum(count, 1), None if is_inexact(x.dtype) else "floor")


@jax.custom_jvp
def _multiplied(x: Array, places: tuple[Array, ...], source: Array) -> Array:
    """x.at[places].multiply(source), which JAX derives only where no place is named twice."""
    return x.at[places].multiply(source)


@_multiplied.defjvp
def _multiplied_jvp(
    primals: tuple[Array, tuple[Array, ...], Array], tangents: tuple[Array, object, Array]
) -> tuple[Array, Array]:
    """Each factor's derivative is the product of the others: with a zero among them 0, else the product over it."""
    x, places, source = primals
    product = _nonzero(x).at[places].multiply(_nonzero(source))
    zeros = (x == 0).astype(int).at[places].add(source == 0)

    def others(factor: Array, product: Array, zeros: Array) -> Array:
        return jnp.where(zeros == (factor == 0), product / _nonzero(factor), 0)

    tangent = (
        (tangents[0] * others(x, product, zeros))
        .at[places]
        .add(tangents[2] * others(source, product[places], zeros[places]))
    )
    return _multiplied(*primals), tangent


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, jnp.ones((), x.dtype), x)


def _cropped(src: Operand, index: Array, dtype: DTypeLike) -> Array:
    src = as_array(src, dtype)
    return src[tuple(slice(0, n) for n in index.shape)] if src.ndim else src


def _at(x: Array, dim: int, index: Array | slice | int) -> tuple[Array | slice | int, ...]:
    """`index` along one dimension, all of the others."""
    at: list[Array | slice | int] = [slice(None)] * x.ndim
    at[normal_dim(dim, x.ndim)] = index
    return tuple(at)


@register("aten.index_add.default")
def index_add(x: Array, dim: int, index: Array, source: Array, *, alpha: Number = 1) -> Array:
    return x.at[_at(x, dim, index)].add(alpha * source)


@register("aten.index_copy.default")
def index_copy(x: Array, dim: int, index: Array, source: Array) -> Array:
    return x.at[_at(x, dim, index)].set(source)


@register("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(x: Array, dim: int, index: Array, value: Operand) -> Array:
    return x.at[_at(x, dim, index)].set(as_array(value, x.dtype))


@register("aten.slice_scatter.default")
def slice_scatter(
    x: Array, src: Array, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1
) -> Array:
    return x.at[_at(x, dim, slice(start, end, step))].set(src.astype(x.dtype))


@register("aten.select_scatter.default")
def select_scatter(x: Array, src: Array, dim: int, index: int) -> Array:
    return x.at[_at(x, dim, index)].set(src.astype(x.dtype))


@register("aten.diagonal_scatter.default")
def diagonal_scatter(x: Array, src: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    moved = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    count = src.shape[-1]
    rows = jnp.arange(count) + max(-offset, 0)
    columns = jnp.arange(count) + max(offset, 0)
    return jnp.moveaxis(moved.at[..., rows, columns].set(src.astype(x.dtype)), (-2, -1), (dim1, dim2))


@register("aten.copy.default")
def copy(x: Array, src: Array, non_blocking: bool = False) -> Array:
    """The values of `src`, with the shape and type of x."""
    return jnp.broadcast_to(src.astype(x.dtype), x.shape)


@register("aten.masked_scatter.default")
def masked_scatter(x: Array, mask: Array, source: Array) -> Array:
    """The elements of `source`, in order, where `mask` holds."""
    mask = jnp.broadcast_to(mask, x.shape)
    order = jnp.clip(jnp.cumsum(mask.reshape(-1)) - 1, 0, source.size - 1)
    return jnp.where(mask, source.reshape(-1)[order].reshape(x.shape), x)


@register("aten.embedding.default")
def embedding(
    weight: Array, indices: Array, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Array:
    """Rows of `weight`; the row `padding_idx` gets no gradient.

    With `scale_grad_by_freq` a row's gradient is divided by how often it was asked for.
    """
    rows = jnp.take(weight, indices, axis=0)
    if scale_grad_by_freq:
        part = (1 / jnp.bincount(indices.reshape(-1), length=len(weight))[indices]).astype(rows.dtype)[..., None]
        rows = jax.lax.stop_gradient(rows) + part * (rows - jax.lax.stop_gradient(rows))
    if padding_idx < 0:
        return rows
    return jnp.where((indices == padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)


@register("aten._embedding_bag.default")
def embedding_bag(
    weight: Array,
    indices: Array,
    offsets: Array,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Array, Array, Array, Array]:
    """Sums (mode 0), means (1) or maxima (2) of the rows of each bag; bag i begins at `offsets[i]`.

    What is `padding_idx` does not count, and an empty bag is 0.
    """
    bags = len(offsets) - include_last_offset
    bag = jnp.searchsorted(offsets[:bags], jnp.arange(len(indices)), side="right") - 1
    rows = embedding(weight, indices, -1, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    counts = jnp.ones(len(indices), bool) if padding_idx < 0 else indices != padding_idx
    sizes = jax.ops.segment_sum(counts.astype(indices.dtype), bag, bags)
    if mode == 2 and not len(indices):
        result = jnp.zeros((bags, rows.shape[1]), rows.dtype)
    elif mode == 2:
        low = jax.lax.stop_gradient(jnp.where(counts[:, None], rows, -jnp.inf))
        order = jnp.lexsort((-low, jnp.broadcast_to(bag[:, None], low.shape)), axis=0)  # the first gets the derivative
        first = jnp.take(order, jnp.searchsorted(bag, jnp.arange(bags)), 0, mode="clip")
        chosen = jnp.take_along_axis(rows, first, 0)
        result = jnp.where(sizes[:, None] > 0, chosen, 0)
    else:
        result = jax.ops.segment_sum(jnp.where(counts[:, None], rows, 0), bag, bags)
        if mode == 1:
            result = result / jnp.maximum(sizes, 1)[:, None].astype(rows.dtype)
    return result, bag.astype(indices.dtype), sizes, jnp.zeros_like(sizes)


@register("aten.one_hot.default")
def one_hot(x: Array, num_classes: int = -1) -> Array:
    if num_classes < 0:
        raise ValueError("one_hot needs num_classes: without it the shape of the result depends on data")
    return jax.nn.one_hot(x, num_classes, dtype=jax_dtype(jnp.int64))


@register("aten.take.default")
def take(x: Array, index: Array) -> Array:
    return x.reshape(-1)[index]


@register("aten.put.default")
def put(x: Array, index: Array, source: Array, accumulate: bool = False) -> Array:
    at = x.reshape(-1).at[index]
    return (at.add(source) if accumulate else at.set(source)).reshape(x.shape)


@register("aten.take_along_dim.default")
def take_along_dim(x: Array, indices: Array, dim: int | None = None) -> Array:
    return jnp.take_along_axis(x, indices, dim)


@register("aten.tril.default")
def tril(x: Array, diagonal: int = 0) -> Array:
    return jnp.tril(x, diagonal)


@register("aten.triu.default")
def triu(x: Array, diagonal: int = 0) -> Array:
    return jnp.triu(x, diagonal)


@register("aten.linalg_diagonal.default")
def linalg_diagonal(x: Array, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@register("aten.diagonal.default")
def diagonal(x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@register("aten.diag_embed.default")
def diag_embed(x: Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    size = x.shape[-1] + abs(offset)
    out = jnp.zeros((*x.shape[:-1], size, size), x.dtype)
    rows = jnp.arange(x.shape[-1]) + max(-offset, 0)
    columns = jnp.arange(x.shape[-1]) + max(offset, 0)
    return jnp.moveaxis(out.at[..., rows, columns].set(x), (-2, -1), (dim1, dim2))


@register("aten.searchsorted.Tensor", "aten.searchsorted.Scalar")
def searchsorted(
    sorted_sequence: Array,
    values: Operand,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    """Where in the sorted last dimension each value belongs: one row for all values, or one for each row of them."""
    if sorter is not None:
        sorted_sequence = jnp.take_along_axis(sorted_sequence, sorter, -1)
    search = functools.partial(jnp.searchsorted, side=side or ("right" if right else "left"))
    for _ in range(sorted_sequence.ndim - 1):
        search = jax.vmap(search)
    found = search(sorted_sequence, values)
    return found.astype(jnp.int32 if out_int32 else jax_dtype(jnp.int64))


@register("aten.bucketize.Tensor")
def bucketize(values: Array, boundaries: Array, *, out_int32: bool = False, right: bool = False) -> Array:
    return searchsorted(boundaries, values, out_int32=out_int32, right=right)
