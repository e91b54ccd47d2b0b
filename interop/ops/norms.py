"""Norms of vectors and matrices, and what divides by them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from interop.ops.dtypes import Real, is_inexact
from interop.ops.layout import Tensor, plain
from interop.ops.reductions import Dims, amax, amin, extremum, reduce, root, typed
from interop.ops.registry import register
from interop.program.nodes import DType


def _norm(x: Tensor, p: Any, dim: Dims, keepdim: bool, dtype: DType | None = None) -> Tensor:
    x = typed(x, dtype)
    p = 2 if p is None else p
    if p == 2 or p == "fro":
        squares = reduce(lambda a, axes, keep: jnp.sum(jnp.real(a * jnp.conj(a)), axes, keepdims=keep), x, dim, keepdim)
        return root(squares)

    def norm(a: Array, axes: tuple[int, ...], keep: bool) -> Array:
        size = a * jnp.sign(a) if is_inexact(a.dtype) and not jnp.iscomplexobj(a) else jnp.abs(a)
        if abs(p) == math.inf:
            return extremum(size, axes, keep, p > 0)
        if p == 0:
            return jnp.sum((a != 0).astype(a.dtype), axes, keepdims=keep)
        if p == 1:
            return jnp.sum(size, axes, keepdims=keep)
        of_zero = 0 if p > 0 else jnp.inf
        total = jnp.sum(jnp.where(size == 0, of_zero, jnp.where(size == 0, 1, size) ** p), axes, keepdims=keep)
        return jnp.where(total == 0, 0, jnp.where(total == 0, 1, total) ** (1 / p))

    return reduce(norm, x, dim, keepdim)


@register("aten.linalg_vector_norm.default", layout="aware")
def vector_norm(
    x: Tensor, ord: Real = 2, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    return _norm(x, ord, dim, keepdim, dtype)


@register("aten.norm.Scalar", layout="aware")
def norm_all(x: Tensor, p: Real = 2) -> Tensor:
    return _norm(x, p, None, False)


@register("aten.frobenius_norm.dim", layout="aware")
def frobenius_norm(x: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    return _norm(x, 2, dim, keepdim)


@register("aten.linalg_norm.default", "aten.linalg_norm.ord_str")
def linalg_norm(
    x: Array, ord: Real | str | None = None, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Array:
    """Of all elements without `ord`; with it, of a vector along one dimension, or of a matrix along two."""
    x = typed(x, dtype)
    dims = [dim] if isinstance(dim, int) else list(range(x.ndim)) if not dim else list(dim)
    if ord is None or len(dims) == 1:
        return plain(_norm(x, ord, dims, keepdim))
    return _matrix_norm(x, ord, dims, keepdim)


def _matrix_norm(x: Array, ord: Real | str, dims: list[int], keepdim: bool) -> Array:
    """Of the matrices along two dimensions: sums of |x| in columns or rows and the largest or smallest of them, or of
    the singular values."""
    if ord == "fro":
        return plain(_norm(x, 2, dims, keepdim))
    if ord not in (1, -1, math.inf, -math.inf):
        return jnp.linalg.norm(x, ord, tuple(dims), keepdim)
    summed, left = dims if abs(ord) == 1 else dims[::-1]
    sums = _norm(x, 1, [summed], True)
    result = plain((amax if ord > 0 else amin)(sums, [left], True))
    return result if keepdim else jnp.squeeze(result, tuple(dims))


@register("aten.norm.ScalarOpt_dim", layout="aware")
def norm_dim(
    x: Tensor, p: Real | None = 2, dim: Dims = None, keepdim: bool = False, *, dtype: DType | None = None
) -> Tensor:
    return _norm(x, p, dim, keepdim, dtype)


@register("aten._weight_norm.default")
def weight_norm(v: Array, g: Array, dim: int = 0) -> Array:
    """g v / |v|, the norm taken over all dimensions but `dim`."""
    dims = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / plain(_norm(v, 2, dims, True)))


@register("aten._weight_norm_interface.default")
def weight_norm_interface(v: Array, g: Array, dim: int = 0) -> tuple[Array, Array]:
    dims = [d for d in range(v.ndim) if d != dim % v.ndim]
    norm = plain(_norm(v, 2, dims, True))
    return v * (g / norm), norm


@register("aten.cosine_similarity.default")
def cosine_similarity(a: Array, b: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    """a.b / (max(|a|, eps) max(|b|, eps)) (aten/src/ATen/native/Distance.cpp)."""
    lengths = [jnp.maximum(plain(_norm(x, 2, [dim], True)), eps) for x in (a, b)]
    return jnp.sum((a / lengths[0]) * (b / lengths[1]), dim)
