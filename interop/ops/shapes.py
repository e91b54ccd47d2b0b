"""Shapes.

Views, permutations, joining and splitting. A permutation costs nothing here: it is remembered (see
`interop.ops.layout`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Number, as_array, jax_dtype, promoted
from interop.ops.layout import (
    Tensor,
    arranged,
    array_of,
    axis_of,
    common_order,
    inverse,
    laid,
    normal_dim,
    order_of,
    plain,
)
from interop.ops.registry import register
from interop.program.guards import Size
from interop.program.nodes import DType


@register("aten.permute.default", layout="aware")
def permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    dims = [normal_dim(d, x.ndim) for d in dims]
    new = inverse(dims)  # dimension d of x becomes new[d]
    return laid(array_of(x), [new[d] for d in order_of(x)])


@register("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default", layout="aware")
def transpose(x: Tensor, dim0: int, dim1: int) -> Tensor:
    if x.ndim == 0:
        return x
    dims = list(range(x.ndim))
    first, second = normal_dim(dim0, x.ndim), normal_dim(dim1, x.ndim)
    dims[first], dims[second] = second, first
    return permute(x, dims)


@register("aten.t.default", "aten.mT.default", layout="aware")
def t(x: Tensor) -> Tensor:
    return x if x.ndim < 2 else transpose(x, -1, -2)


@register("aten.adjoint.default", "aten.matrix_H.default", layout="aware")
def adjoint(x: Tensor) -> Tensor:
    return t(laid(jnp.conj(array_of(x)), order_of(x)))


@register("aten.numpy_T.default", layout="aware")
def numpy_t(x: Tensor) -> Tensor:
    """All dimensions in reverse."""
    return permute(x, list(reversed(range(x.ndim))))


@register("aten.movedim.intlist", "aten.movedim.int", layout="aware")
def movedim(x: Tensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Tensor:
    source = [normal_dim(d, x.ndim) for d in ([source] if isinstance(source, int) else source)]
    destination = [normal_dim(d, x.ndim) for d in ([destination] if isinstance(destination, int) else destination)]
    dims = [d for d in range(x.ndim) if d not in source]
    for place, d in sorted(zip(destination, source, strict=True)):
        dims.insert(place, d)
    return permute(x, dims)


@register("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", layout="aware")
def view(x: Tensor, size: Sequence[Size]) -> Tensor:
    """The tensor with another shape. Dimensions that stay neighbours in memory are joined and split where they lie."""
    size = _filled(size, x.size)
    order = order_of(x)
    if order == tuple(range(x.ndim)) or 0 in size:
        return plain(x).reshape(size)
    order, array = _without_ones(x)
    pieces = _pieces([array.shape[axis] for axis in inverse(order)], [n for n in size if n != 1])
    axes = inverse(order)
    if pieces is None:
        return plain(x).reshape(size)
    for dims, _ in pieces:
        if any(axes[b] != axes[a] + 1 for a, b in itertools.pairwise(dims)):
            return plain(x).reshape(size)
    pieces.sort(key=lambda piece: axes[piece[0][0]])
    real = [d for d, n in enumerate(size) if n != 1]
    kept = [real[d] for _, dims in pieces for d in dims]
    kept += [d for d, n in enumerate(size) if n == 1]
    return laid(array.reshape([size[d] for d in kept]), kept)


def _filled(size: Sequence[Size], count: Size) -> list[Size]:
    size = list(size)
    if -1 in size:
        known = math.prod(n for n in size if n != -1)
        size[size.index(-1)] = count // known if known else 0
    return size


def _without_ones(x: Tensor) -> tuple[tuple[Size, ...], Array]:
    """The order and array of x with its dimensions of size 1 left out."""
    kept = [d for d in order_of(x) if x.shape[d] != 1]
    ranks = {d: rank for rank, d in enumerate(sorted(kept))}
    return tuple(ranks[d] for d in kept), array_of(x).reshape([x.shape[d] for d in kept])


def _pieces(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest groups of consecutive dimensions of both shapes that hold the same elements. No shape has a 1.

    None where a symbolic dimension is joined or split, since which size is the larger depends on it then.
    """
    pieces = []
    i = j = 0
    while i < len(old):
        a, b, left, right = [i], [j], old[i], new[j]
        while left != right:
            if not (isinstance(left, int) and isinstance(right, int)):
                return None
            if left < right:
                i += 1
                a.append(i)
                left *= old[i]
            else:
                j += 1
                b.append(j)
                right *= new[j]
        pieces.append((a, b))
        i, j = i + 1, j + 1
    return pieces


@register("aten.view.dtype")
def view_dtype(x: Array, dtype: DType) -> Array:
    return x.view(jax_dtype(dtype))


@register("aten.view_as.default", "aten.reshape_as.default", layout="aware")
def view_as(x: Tensor, other: Tensor) -> Tensor:
    return view(x, other.shape)


@register("aten.flatten.using_ints", layout="aware")
def flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if x.ndim == 0:
        return view(x, [1])
    start, end = normal_dim(start_dim, x.ndim), normal_dim(end_dim, x.ndim)
    return view(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


@register("aten.unflatten.int", layout="aware")
def unflatten(x: Tensor, dim: int, sizes: Sequence[Size]) -> Tensor:
    dim = normal_dim(dim, x.ndim)
    return view(x, [*x.shape[:dim], *_filled(sizes, x.shape[dim]), *x.shape[dim + 1 :]])


@register("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", layout="aware")
def squeeze(x: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    if x.ndim == 0:
        return x
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d for d in (normal_dim(d, x.ndim) for d in dims) if x.shape[d] == 1}
    kept = [d for d in order_of(x) if d not in gone]
    ranks = {d: rank for rank, d in enumerate(sorted(kept))}
    return laid(array_of(x).reshape([x.shape[d] for d in kept]), [ranks[d] for d in kept])


@register("aten.unsqueeze.default", layout="aware")
def unsqueeze(x: Tensor, dim: int) -> Tensor:
    dim = dim % (x.ndim + 1)
    order = order_of(x)
    place = order.index(dim) if dim < x.ndim else x.ndim  # before the dimension that it precedes
    shifted = [d + (d >= dim) for d in order]
    return laid(jnp.expand_dims(array_of(x), place), [*shifted[:place], dim, *shifted[place:]])


@register("aten.expand.default", layout="aware")
def expand(x: Tensor, size: Sequence[Size], *, implicit: bool = False) -> Tensor:
    if len(size) != x.ndim:
        x = plain(x)
        x = x.reshape((1,) * (len(size) - x.ndim) + x.shape)
    shape = [n if wanted == -1 else wanted for n, wanted in zip(x.shape, size, strict=True)]
    order = order_of(x)
    return laid(jnp.broadcast_to(array_of(x), [shape[d] for d in order]), order)


@register("aten.expand_as.default", layout="aware")
def expand_as(x: Tensor, other: Tensor) -> Tensor:
    return expand(x, other.shape)


@register("aten.broadcast_tensors.default")
def broadcast_tensors(tensors: Sequence[Array]) -> Sequence[Array]:
    return jnp.broadcast_arrays(*tensors)


@register("aten.repeat.default")
def repeat(x: Array, repeats: Sequence[Size]) -> Array:
    return jnp.tile(x, tuple(repeats))


@register("aten.tile.default")
def tile(x: Array, dims: Sequence[Size]) -> Array:
    return jnp.tile(x, tuple(dims))


@register("aten.repeat_interleave.self_int")
def repeat_interleave(x: Array, repeats: Size, dim: int | None = None, *, output_size: Size | None = None) -> Array:
    return jnp.repeat(x.reshape(-1) if dim is None else x, repeats, 0 if dim is None else dim)


@register("aten.cat.default", "aten.concat.default", "aten.concatenate.default", layout="aware")
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Joined along `dim`, in the order that most of it lies in; PyTorch skips tensors of shape (0,)."""
    tensors = [x for x in tensors if not (x.ndim == 1 and x.shape[0] == 0)] or list(tensors[:1])
    order = common_order(tensors) or tuple(range(tensors[0].ndim))
    arrays = [arranged(x, order) for x in tensors]
    dtype = arrays[0].dtype
    for array in arrays[1:]:
        dtype = jnp.promote_types(dtype, array.dtype)
    axis = inverse(order)[normal_dim(dim, len(order))]
    return laid(jnp.concatenate([array.astype(dtype) for array in arrays], axis), order)


@register("aten.stack.default", layout="aware")
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return cat([unsqueeze(x, dim) for x in tensors], dim)


@register("aten.hstack.default", layout="aware")
def hstack(tensors: Sequence[Tensor]) -> Tensor:
    return cat(tensors, 0 if tensors[0].ndim <= 1 else 1)


@register("aten.slice.Tensor", layout="aware")
def slice_(x: Tensor, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1) -> Tensor:
    index: list[slice] = [slice(None)] * x.ndim
    index[axis_of(x, dim)] = slice(start, end, step)
    return laid(array_of(x)[tuple(index)], order_of(x))


@register("aten.narrow.default", layout="aware")
def narrow(x: Tensor, dim: int, start: Size, length: Size) -> Tensor:
    start = start % x.shape[dim] if start < 0 else start
    return slice_(x, dim, start, start + length)


@register("aten.select.int", layout="aware")
def select(x: Tensor, dim: int, index: int) -> Tensor:
    dim = normal_dim(dim, x.ndim)
    index = index + x.shape[dim] if index < 0 else index
    return squeeze(slice_(x, dim, index, index + 1), dim)


def _cut(x: Tensor, dim: int, sizes: Sequence[Size]) -> list[Tensor]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice_(x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@register("aten.split.Tensor", layout="aware")
def split(x: Tensor, split_size: int, dim: int = 0) -> list[Tensor]:
    total = x.shape[dim]
    sizes = [min(split_size, total - start) for start in range(0, total, split_size)] if split_size else []
    return _cut(x, dim, sizes or [total])


@register("aten.split_with_sizes.default", "aten.split.sizes", layout="aware")
def split_with_sizes(x: Tensor, split_sizes: Sequence[Size], dim: int = 0) -> list[Tensor]:
    return _cut(x, dim, split_sizes)


@register("aten.chunk.default", layout="aware")
def chunk(x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    return split(x, max(-(-x.shape[dim] // chunks), 1), dim)


@register("aten.tensor_split.sections", layout="aware")
def tensor_split(x: Tensor, sections: int, dim: int = 0) -> list[Tensor]:
    size, larger = divmod(x.shape[dim], sections)
    return _cut(x, dim, [size + (i < larger) for i in range(sections)])


@register("aten.unbind.int", layout="aware")
def unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [select(x, dim, index) for index in range(x.shape[dim])]


@register("aten.flip.default", layout="aware")
def flip(x: Tensor, dims: Sequence[int]) -> Tensor:
    return laid(jnp.flip(array_of(x), tuple(axis_of(x, d) for d in dims)), order_of(x)) if dims else x


@register("aten.roll.default", layout="aware")
def roll(x: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Tensor:
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        return jnp.roll(plain(x).reshape(-1), shifts[0]).reshape(x.shape)
    return laid(jnp.roll(array_of(x), tuple(shifts), tuple(axis_of(x, d) for d in dims)), order_of(x))


def _pads(x: Tensor, pad: Sequence[int]) -> list[tuple[int, int]]:
    """PyTorch lists pads from the last dimension on, (before, after) in turn.

    Here one pair for each axis of the array.
    """
    pads = [(0, 0)] * x.ndim
    for i in range(len(pad) // 2):
        pads[axis_of(x, -1 - i)] = (int(pad[2 * i]), int(pad[2 * i + 1]))
    return pads


@register("aten.constant_pad_nd.default", layout="aware")
def constant_pad_nd(x: Tensor, pad: Sequence[int], value: Number | None = 0) -> Tensor:
    """Negative pads cut."""
    array = array_of(x)
    filler = as_array(0 if value is None else value, array.dtype)
    return laid(lax.pad(array, filler, [(low, high, 0) for low, high in _pads(x, pad)]), order_of(x))


@register("aten.pad.default", layout="aware")
def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: Number | None = None) -> Tensor:
    if mode == "constant":
        return constant_pad_nd(x, pad, value)
    pads = _pads(x, pad)
    cut = tuple(slice(max(-low, 0), n - max(-high, 0)) for (low, high), n in zip(pads, array_of(x).shape, strict=True))
    pads = [(max(low, 0), max(high, 0)) for low, high in pads]
    numpy_mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    return laid(jnp.pad(array_of(x)[cut], pads, mode=numpy_mode), order_of(x))


for _n in (1, 2, 3):

    @register(f"aten.reflection_pad{_n}d.default", layout="aware")
    def reflection_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
        return pad(x, padding, "reflect")

    @register(f"aten.replication_pad{_n}d.default", layout="aware")
    def replication_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
        return pad(x, padding, "replicate")


@register("aten.meshgrid.indexing", "aten.meshgrid.default")
def meshgrid(tensors: Sequence[Array], *, indexing: str = "ij") -> list[Array]:
    return list(jnp.meshgrid(*tensors, indexing=indexing))


@register("aten.unfold.default")
def unfold(x: Array, dimension: int, size: int, step: int) -> Array:
    """Windows of `size` along a dimension, in a new last dimension."""
    if x.ndim == 0:
        return x.reshape(1)[:size]
    dim = normal_dim(dimension, x.ndim)
    count = (x.shape[dim] - size) // step + 1
    index = jnp.arange(count)[:, None] * step + jnp.arange(size)
    return jnp.moveaxis(jnp.take(x, index, axis=dim), dim + 1, -1)


@register("aten.as_strided.default")
def as_strided(x: Array, size: Sequence[Size], stride: Sequence[int], storage_offset: int | None = 0) -> Array:
    """Elements of the tensor as it lies contiguous in memory."""
    index: Array | int = storage_offset or 0
    for n, s in zip(size, stride, strict=True):
        index = jnp.asarray(index)[..., None] + jnp.arange(n) * s
    return x.reshape(-1)[index]


@register("aten.view_as_real.default", "aten.view_as_real_copy.default")
def view_as_real(x: Array) -> Array:
    return jnp.stack([jnp.real(x), jnp.imag(x)], -1)


@register("aten.view_as_complex.default")
def view_as_complex(x: Array) -> Array:
    return lax.complex(x[..., 0], x[..., 1])


@register("aten.atleast_1d.default")
def atleast_1d(x: Array) -> Array:
    return jnp.atleast_1d(x)


@register("aten.cartesian_prod.default")
def cartesian_prod(tensors: Sequence[Array]) -> Array:
    grids = jnp.meshgrid(*promoted(*tensors), indexing="ij")
    return jnp.stack([grid.reshape(-1) for grid in grids], -1)
