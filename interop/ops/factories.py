"""Tensors made from nothing but sizes and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from interop.ops.dtypes import Number, Operand, as_array, default_complex, default_float, jax_dtype
from interop.ops.registry import register
from interop.program.guards import Size
from interop.program.nodes import DType


def _chosen(dtype: DType | None, *numbers: Number) -> DTypeLike:
    """`dtype`, or what PyTorch infers from Python numbers: bool, int64 or the default floating-point type."""
    if dtype is not None:
        return jax_dtype(dtype)
    if any(isinstance(n, complex) for n in numbers):
        return default_complex()
    if numbers and all(isinstance(n, bool) for n in numbers):
        return jnp.bool_
    return jax_dtype(jnp.int64) if numbers and all(isinstance(n, int) for n in numbers) else default_float()


@register("aten.full.default")
def full(size: Sequence[Size], fill_value: Operand, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.full(
        tuple(size),
        fill_value,
        _chosen(dtype, fill_value)
        if not hasattr(fill_value, "dtype")
        else (fill_value.dtype if dtype is None else jax_dtype(dtype)),
    )


@register("aten.zeros.default", "aten.empty.memory_format")
def zeros(size: Sequence[Size], *, dtype: DType | None = None, **_: object) -> Array:
    """Zeros; also where PyTorch leaves memory as it is."""
    return jnp.zeros(tuple(size), _chosen(dtype))


@register("aten.empty_permuted.default", "aten.empty_strided.default")
def empty_permuted(size: Sequence[Size], _layout: Sequence[int], *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.zeros(tuple(size), _chosen(dtype))


@register("aten.ones.default")
def ones(size: Sequence[Size], *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.ones(tuple(size), _chosen(dtype))


@register("aten.eye.default", "aten.eye.m")
def eye(n: int, m: int | None = None, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.eye(n, m, dtype=_chosen(dtype))


@register("aten.scalar_tensor.default")
def scalar_tensor(value: Number, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.asarray(value, _chosen(dtype))


def _like(x: Array, dtype: DType | None) -> DTypeLike:
    return x.dtype if dtype is None else jax_dtype(dtype)


@register("aten.full_like.default", layout="elementwise")
def full_like(x: Array, fill_value: Number, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.full(x.shape, fill_value, _like(x, dtype))


@register("aten.zeros_like.default", "aten.empty_like.default", "aten.zero.default", layout="elementwise")
def zeros_like(x: Array, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.zeros(x.shape, _like(x, dtype))


@register("aten.ones_like.default", layout="elementwise")
def ones_like(x: Array, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.ones(x.shape, _like(x, dtype))


@register("aten.fill.Scalar", "aten.fill.Tensor", layout="elementwise")
def fill(x: Array, value: Operand) -> Array:
    return jnp.broadcast_to(as_array(value, x.dtype), x.shape)


@register("aten.new_full.default")
def new_full(x: Array, size: Sequence[Size], fill_value: Number, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.full(tuple(size), fill_value, _like(x, dtype))


@register("aten.new_zeros.default", "aten.new_empty.default")
def new_zeros(x: Array, size: Sequence[Size], *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.zeros(tuple(size), _like(x, dtype))


@register("aten.new_ones.default")
def new_ones(x: Array, size: Sequence[Size], *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.ones(tuple(size), _like(x, dtype))


@register("aten.arange.default")
def arange(end: Number, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.arange(end, dtype=_chosen(dtype, end))


@register("aten.arange.start")
def arange_start(start: Number, end: Number, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.arange(start, end, dtype=_chosen(dtype, start, end))


@register("aten.arange.start_step")
def arange_step(start: Number, end: Number, step: Number = 1, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.arange(start, end, step, dtype=_chosen(dtype, start, end, step))


@register("aten.linspace.default")
def linspace(start: Number, end: Number, steps: int, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.linspace(start, end, steps, dtype=_chosen(dtype))


@register("aten.logspace.default")
def logspace(
    start: Number, end: Number, steps: int, base: float = 10.0, *, dtype: DType | None = None, **_: object
) -> Array:
    return jnp.logspace(start, end, steps, base=base, dtype=_chosen(dtype))


@register("aten.tril_indices.default")
def tril_indices(row: int, col: int, offset: int = 0, **_: object) -> Array:
    return jnp.stack(jnp.tril_indices(row, offset, col)).astype(jax_dtype(jnp.int64))


@register("aten.triu_indices.default")
def triu_indices(row: int, col: int, offset: int = 0, **_: object) -> Array:
    return jnp.stack(jnp.triu_indices(row, offset, col)).astype(jax_dtype(jnp.int64))


@register("aten.fft_fftfreq.default")
def fftfreq(n: int, d: float = 1.0, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.fft.fftfreq(n, d, dtype=_chosen(dtype))


@register("aten.fft_rfftfreq.default")
def rfftfreq(n: int, d: float = 1.0, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.fft.rfftfreq(n, d, dtype=_chosen(dtype))


@register("aten.hann_window.default")
def hann_window(length: int, *, dtype: DType | None = None, **_: object) -> Array:
    return jnp.hanning(length + 1)[:-1].astype(_chosen(dtype))


@register("aten._local_scalar_dense.default")
def item(x: Array) -> Array:
    """`x.item()`, where the code only computes with it: a number is no part of autograd's graph."""
    return lax.stop_gradient(x).reshape(())
