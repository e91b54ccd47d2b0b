"""Sums, means, extrema, variances, norms, softmax, sorting: what runs along dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from interop.ops.dtypes import Real, is_inexact, jax_dtype
from interop.ops.layout import Tensor, array_of, axis_of, inverse, laid, normal_dim, order_of, plain
from interop.ops.registry import register
from interop.program.nodes import DType

Dims = int | Sequence[int] | None  # one, several, or all


def _dims(dim: Dims, ndim: int) -> tuple[int, ...]:
    """The dimensions meant: None and the empty list mean all of them."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(ndim))
    if isinstance(dim, int):
        dim = [dim]
    return tuple(normal_dim(d, ndim) for d in dim) if ndim else ()


def reduce(function: Callable[[Array, tuple[int, ...], bool], Array], x: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    """`function(array, axes, keepdims)` along PyTorch's dimensions `dim`, in whatever order x lies."""
    dims = _dims(dim, x.ndim)
    order = order_of(x)
    axes = tuple(sorted(inverse(order)[d] for d in dims))
    result = function(array_of(x), axes, keepdim)
    if keepdim:
        return laid(result, order)
    kept = [d for d in order if d not in dims]
    ranks = {d: rank for rank, d in enumerate(sorted(kept))}
    return laid(result, [ranks[d] for d in kept])


@overload
def typed(x: Array, dtype: DType | DTypeLike | None, integers: DTypeLike | None = None) -> Array: ...
@overload
def typed(x: Tensor, dtype: DType | DTypeLike | None, integers: DTypeLike | None = None) -> Tensor: ...
def typed(x: Tensor, dtype: DType | DTypeLike | None, integers: DTypeLike | None = None) -> Tensor:
    """x as `dtype`; without one, integers and booleans as `integers`."""
    if dtype is None and integers is not None and not is_inexact(x.dtype):
        dtype = integers
    return x if dtype is None else laid(array_of(x).astype(jax_dtype(dtype)), order_of(x))


@register("aten.sum.default", "aten.sum.dim_IntList", layout="aware")
def sum_(x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    x = typed(x, dtype, jnp.int64)
    return reduce(lambda a, axes, keep: jnp.sum(a, axes, keepdims=keep, dtype=a.dtype), x, dim, keepdim)


@register("aten.mean.default", "aten.mean.dim", layout="aware")
def mean(x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    return reduce(lambda a, axes, keep: jnp.mean(a, axes, keepdims=keep), typed(x, dtype), dim, keepdim)


@register("aten.nansum.default", layout="aware")
def nansum(x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None) -> Tensor:
    return reduce(lambda a, axes, keep: jnp.nansum(a, axes, keepdims=keep), typed(x, dtype, jnp.int64), dim, keepdim)


def extremum(x: Array, axes: tuple[int, ...], keepdims: bool, largest: bool) -> Array:
    """The largest or smallest element along axes; equal ones share its derivative (torch: scale_grad_by_count)."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return (jnp.max if largest else jnp.min)(x, axes, keepdims=keepdims)
    flat = jnp.moveaxis(x, axes, range(len(axes))).reshape(-1, *(n for a, n in enumerate(x.shape) if a not in axes))
    result = _element(flat, largest)
    return jnp.expand_dims(result, axes) if keepdims else result


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _element(x: Array, largest: bool) -> Array:
    return (jnp.max if largest else jnp.min)(x, 0)


@_element.defjvp
def _element_jvp(largest: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    x, value = primals[0], _element(primals[0], largest)
    return value, shared(x, value, (jnp.argmax if largest else jnp.argmin)(x, axis=0), tangents[0])


def shared(x: Array, value: Array, index: Array, tangent: Array) -> Array:
    """The tangent of the element of x at `index` along the first axis, shared with those that equal its `value`.

    JAX's derivative of a maximum looks for elements that equal it, and divides by their number. That number may be 0:
    where XLA computes x once to find the maximum and once more to compare, it may round differently (seen on a CPU, a
    normalised x at reduced optimisation). The element at `index` counts whatever it equals.
    """
    equal = jnp.where(jnp.isnan(value), jnp.isnan(x), x == value)
    equal |= lax.broadcasted_iota(index.dtype, x.shape, 0) == index
    return jnp.sum(jnp.where(equal, tangent, 0), 0) / jnp.sum(equal, 0, dtype=x.dtype)


@register("aten.amax.default", layout="aware")
def amax(x: Tensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    """The largest element; equal ones share its derivative."""
    return reduce(lambda a, axes, keep: extremum(a, axes, keep, True), x, dim, keepdim)


@register("aten.amin.default", layout="aware")
def amin(x: Tensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    return reduce(lambda a, axes, keep: extremum(a, axes, keep, False), x, dim, keepdim)


@register("aten.aminmax.default", layout="aware")
def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return amin(x, dim, keepdim), amax(x, dim, keepdim)


register("aten.max.default", layout="aware")(amax)
register("aten.min.default", layout="aware")(amin)


def _selected(choose: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
    def apply(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
        if x.ndim == 0:
            return x, jnp.zeros((), jax_dtype(jnp.int64))
        index = choose(lax.stop_gradient(x), axis=dim, keepdims=True)
        value = jnp.take_along_axis(x, index, dim)
        index = index.astype(jax_dtype(jnp.int64))
        return (value, index) if keepdim else (jnp.squeeze(value, dim), jnp.squeeze(index, dim))

    return apply


register("aten.max.dim")(_selected(jnp.argmax))
register("aten.min.dim")(_selected(jnp.argmin))


def _position(choose: Callable[..., Array]) -> Callable[..., Array]:
    def apply(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
        index = choose(x.reshape(-1)) if dim is None else choose(x, axis=dim, keepdims=keepdim)
        if dim is None and keepdim:
            index = index.reshape((1,) * x.ndim)
        return index.astype(jax_dtype(jnp.int64))

    return apply


register("aten.argmax.default")(_position(jnp.argmax))
register("aten.argmin.default")(_position(jnp.argmin))


def _truth(function: Callable[..., Array]) -> Callable[..., Tensor]:
    """A boolean, but a byte of bytes."""

    def apply(x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
        dtype = x.dtype if x.dtype == jnp.uint8 else jnp.bool_
        return reduce(lambda a, axes, keep: function(a, axes, keepdims=keep).astype(dtype), x, dim, keepdim)

    return apply


register("aten._is_all_true.default", "aten.all.default", "aten.all.dim", "aten.all.dims", layout="aware")(
    _truth(jnp.all)
)
register("aten._is_any_true.default", "aten.any.default", "aten.any.dim", "aten.any.dims", layout="aware")(
    _truth(jnp.any)
)


@register("aten.prod.default")
def prod(x: Array, *, dtype: DType | None = None) -> Array:
    return jnp.prod(typed(x, dtype, jnp.int64))


@register("aten.prod.dim_int")
def prod_dim(x: Array, dim: int, keepdim: bool = False, *, dtype: DType | None = None) -> Array:
    return jnp.prod(typed(x, dtype, jnp.int64), axis=dim, keepdims=keepdim)


@register("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList", layout="aware")
def count_nonzero(x: Tensor, dim: Dims = None) -> Tensor:
    return sum_(laid(array_of(x) != 0, order_of(x)), dim)


def _variance(x: Tensor, dim: Dims, correction: Real, keepdim: bool) -> Tensor:
    def variance(a: Array, axes: tuple[int, ...], keep: bool) -> Array:
        count = math.prod(a.shape[axis] for axis in axes)
        centred = a - jnp.mean(a, axes, keepdims=True)
        squares = jnp.real(centred * jnp.conj(centred))
        return jnp.sum(squares, axes, keepdims=keep) / jnp.asarray(max(count - correction, 0), squares.dtype)

    return reduce(variance, x, dim, keepdim)


def _correction(unbiased: bool | None, correction: Real | None) -> Real:
    if correction is not None:
        return correction
    return 1 if unbiased is None else int(unbiased)


@register("aten.var.default")
def var(x: Array, unbiased: bool = True) -> Tensor:
    return _variance(x, None, int(unbiased), False)


@register("aten.var.dim", layout="aware")
def var_dim(x: Tensor, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return _variance(x, dim, int(unbiased), keepdim)


@register("aten.var.correction", layout="aware")
def var_correction(x: Tensor, dim: Dims = None, *, correction: Real | None = None, keepdim: bool = False) -> Tensor:
    return _variance(x, dim, _correction(None, correction), keepdim)


@register("aten.std.default")
def std(x: Array, unbiased: bool = True) -> Array:
    return plain(root(_variance(x, None, int(unbiased), False)))


@register("aten.std.dim", layout="aware")
def std_dim(x: Tensor, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return root(_variance(x, dim, int(unbiased), keepdim))


@register("aten.std.correction", layout="aware")
def std_correction(x: Tensor, dim: Dims = None, *, correction: Real | None = None, keepdim: bool = False) -> Tensor:
    return root(_variance(x, dim, _correction(None, correction), keepdim))


@register("aten.var_mean.correction", layout="aware")
def var_mean(
    x: Tensor, dim: Dims = None, *, correction: Real | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _variance(x, dim, _correction(None, correction), keepdim), mean(x, dim, keepdim)


@register("aten.var_mean.dim", layout="aware")
def var_mean_dim(x: Tensor, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _variance(x, dim, int(unbiased), keepdim), mean(x, dim, keepdim)


@register("aten.std_mean.correction", layout="aware")
def std_mean(
    x: Tensor, dim: Dims = None, *, correction: Real | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return std_correction(x, dim, correction=correction, keepdim=keepdim), mean(x, dim, keepdim)


@register("aten.std_mean.dim", layout="aware")
def std_mean_dim(x: Tensor, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return std_dim(x, dim, unbiased, keepdim), mean(x, dim, keepdim)


@jax.custom_jvp
def _root_or_zero(x: Array) -> Array:
    return jnp.sqrt(x)


@_root_or_zero.defjvp
def _root_or_zero_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    safe = jnp.where(root == 0, jnp.ones_like(root), root)
    return root, jnp.where(root == 0, jnp.zeros_like(root), tangents[0] / (2 * safe))


def root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0, as PyTorch gives std and norms (tools/autograd.

    Std_backward, norm_backward).
    """
    return laid(_root_or_zero(array_of(x)), order_of(x))


@register("aten.logsumexp.default", layout="aware")
def logsumexp(x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    return reduce(lambda a, axes, keep: jax.nn.logsumexp(a, axes, keepdims=keep), x, dim, keepdim)


def _softmax_like(function: Callable[[Array, int], Array], *names: str) -> None:
    def apply(x: Any, dim: int, dtype: DType | bool | None = None, **keywords: Any) -> Tensor:
        dtype = keywords.get("dtype", dtype)
        if isinstance(dtype, bool):  # _softmax(x, dim, half_to_float)
            dtype = jnp.float32 if dtype else None
        x = typed(x, dtype)
        if x.ndim == 0:
            return function(x[None], 0)[0]
        return laid(function(array_of(x), axis_of(x, dim)), order_of(x))

    register(*names, layout="aware")(apply)


_softmax_like(lambda a, axis: jax.nn.softmax(a, axis), "aten.softmax.int", "aten._softmax.default")
_softmax_like(lambda a, axis: jax.nn.log_softmax(a, axis), "aten.log_softmax.int", "aten._log_softmax.default")


@register("aten.cumsum.default")
def cumsum(x: Array, dim: int, *, dtype: DType | None = None) -> Array:
    x = typed(x, dtype, jnp.int64)
    return x if x.ndim == 0 else jnp.cumsum(x, axis=dim, dtype=x.dtype)


@register("aten.cumprod.default")
def cumprod(x: Array, dim: int, *, dtype: DType | None = None) -> Array:
    x = typed(x, dtype, jnp.int64)
    return x if x.ndim == 0 else jnp.cumprod(x, axis=dim, dtype=x.dtype)


@register("aten.logcumsumexp.default")
def logcumsumexp(x: Array, dim: int) -> Array:
    return lax.associative_scan(jnp.logaddexp, x, axis=normal_dim(dim, x.ndim))


@register("aten.sort.default", "aten.sort.stable")
def sort(
    x: Array, dim: int = -1, descending: bool = False, *, stable: bool | None = None, **keywords: Any
) -> tuple[Array, Array]:
    dim, descending = keywords.get("dim", dim), keywords.get("descending", descending)
    index = jnp.argsort(lax.stop_gradient(x), axis=dim, descending=descending, stable=True)
    return jnp.take_along_axis(x, index, dim), index.astype(jax_dtype(jnp.int64))


@register("aten.argsort.default", "aten.argsort.stable")
def argsort(x: Array, dim: int = -1, descending: bool = False, **_: object) -> Array:
    return sort(x, dim, descending)[1]


@register("aten.topk.default")
def topk(x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Array, Array]:
    """The k largest (or smallest) elements in order, and where they are."""
    values, index = sort(x, dim, largest)
    return lax.slice_in_dim(values, 0, k, axis=dim % x.ndim), lax.slice_in_dim(index, 0, k, axis=dim % x.ndim)


def _median(past_nan: bool) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Array]]]:
    """The lower of the two middle elements: of all of x, and with its place along one dimension.

    What is no number is the median, the first of several, or with `past_nan` does not count.
    """

    def along(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
        values, index = sort(jnp.atleast_1d(x), dim)  # what is no number comes last
        numbers = jnp.sum(~jnp.isnan(values), dim, keepdims=True)
        n = values.shape[dim]
        middle = jnp.maximum(numbers - 1, 0) // 2 if past_nan else jnp.where(numbers == n, (n - 1) // 2, numbers)
        values, index = (jnp.take_along_axis(y, middle, dim) for y in (values, index))
        return (values, index) if keepdim and x.ndim else (jnp.squeeze(values, dim), jnp.squeeze(index, dim))

    def of_all(x: Array) -> Array:
        """Equal elements share the derivative (torch: evenly_distribute_backward)."""
        return middle(x.reshape(-1)) if is_inexact(x.dtype) else along(x.reshape(-1), 0)[0]

    @jax.custom_jvp
    def middle(x: Array) -> Array:
        return along(x, 0)[0]

    @middle.defjvp
    def derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        value, index = along(primals[0], 0)
        return value, shared(primals[0], value, index, tangents[0])

    return of_all, along


for _name, _functions in (("median", _median(False)), ("nanmedian", _median(True))):
    register(f"aten.{_name}.default")(_functions[0])
    register(f"aten.{_name}.dim")(_functions[1])


@register("aten.diff.default")
def diff(x: Array, n: int = 1, dim: int = -1, prepend: Array | None = None, append: Array | None = None) -> Array:
    return jnp.diff(x, n, dim, prepend, append)
