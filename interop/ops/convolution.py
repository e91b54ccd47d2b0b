"""Convolutions, channels last inside; kernels stay as PyTorch has them (out, in / groups, spatial...).

On a CPU, XLA's grouped convolutions are written out here as shifted products (depthwise) or as one batched matrix
product (other groups): XLA's own gradient of a grouped convolution takes 10 to 200 times as long there (measured on
JAX 0.10.2: 128 channels in 32 groups, 3x3, on 4x28x28: 2062 ms against 10 ms). Elsewhere `lax.conv_general_dilated`
is used as it is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from interop.ops.layout import Tensor, arranged, channels_last, laid, plain
from interop.ops.registry import register

Padding = tuple[tuple[int, int], ...]
PerDim = int | list[int] | tuple[int, ...]  # one number for all dimensions, or one for each


def per_dim(value: PerDim, count: int) -> tuple[int, ...]:
    """One number for each of `count` dimensions: PyTorch takes a number, or a list of one, for all of them."""
    if isinstance(value, (list, tuple)):
        return tuple(value) * count if len(value) == 1 else tuple(value)
    return (value,) * count


@register(
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default",
    "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding",
    layout="aware",
)  # fmt: skip
def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: PerDim = 1,
    padding: PerDim | Literal["valid", "same"] = 0,
    dilation: PerDim = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv1d, conv2d and conv3d; an input without a batch dimension is taken as one example."""
    weight = plain(weight)
    spatial = weight.ndim - 2
    if input.ndim == spatial + 1:
        result = conv(plain(input)[None], weight, bias, stride, padding, dilation, groups)
        return plain(result)[0]
    stride, dilation = per_dim(stride, spatial), per_dim(dilation, spatial)
    pads = _padding(padding, weight.shape[2:], dilation)
    order = channels_last(input.ndim)
    x = arranged(input, order)
    x, weight = _same_type(x, weight)
    y = _convolution(x, weight, stride, pads, dilation, groups)
    return laid(y if bias is None else y + plain(bias).astype(y.dtype), order)


def _same_type(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return x.astype(dtype), weight.astype(dtype)


def _padding(padding: PerDim | Literal["valid", "same"], kernel: Sequence[int], dilation: Sequence[int]) -> Padding:
    if padding == "valid":
        padding = 0
    if padding == "same":  # the odd one to the right, as aten/src/ATen/native/Convolution.cpp (_convolution_same)
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return tuple((n // 2, n - n // 2) for n in total)
    return tuple((n, n) for n in per_dim(padding, len(kernel)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _convolution(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], pads: Padding, dilation: tuple[int, ...], groups: int
) -> jax.Array:
    """x (N, spatial..., C), weight (O, C / groups, spatial...)."""
    convolve = _whole if groups == 1 or not x.size else _grouped
    return convolve(x, weight, stride, pads, dilation, groups)


def _whole(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], pads: Padding, dilation: tuple[int, ...], groups: int
) -> jax.Array:
    letters = "DHW"[-(x.ndim - 2) :]
    return lax.conv_general_dilated(
        x, weight, stride, pads, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=(f"N{letters}C", f"OI{letters}", f"N{letters}C"),
    )  # fmt: skip


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _grouped(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], pads: Padding, dilation: tuple[int, ...], groups: int
) -> jax.Array:
    """Derivatives keep the input as it is, not cut into windows: those are as many times larger as the kernel is."""
    form = _shifted if weight.shape[1] == 1 else _gathered
    return _on_a_cpu(form, x, weight, stride, pads, dilation, groups)


# A layer's form is decided where it is lowered, not where it is traced: a program may be for another machine. Tracing
# both costs nothing, since jit traces and differentiates them once for all layers of one shape.
@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def _on_a_cpu(
    form: Callable[..., jax.Array],
    x: jax.Array,
    weight: jax.Array,
    stride: tuple[int, ...],
    pads: Padding,
    dilation: tuple[int, ...],
    groups: int,
) -> jax.Array:
    """The convolution, by `form` on a CPU."""

    def formed(x: jax.Array, weight: jax.Array) -> jax.Array:
        return form(x, weight, stride, pads, dilation, groups)

    def whole(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _whole(x, weight, stride, pads, dilation, groups)

    return lax.platform_dependent(x, weight, cpu=formed, default=whole)


def _grouped_jvp(
    stride: tuple[int, ...],
    pads: Padding,
    dilation: tuple[int, ...],
    groups: int,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    (x, weight), (dx, dweight) = primals, tangents
    how = stride, pads, dilation, groups
    y, dy = _grouped(x, weight, *how), None
    if not isinstance(dx, SymbolicZero):
        dy = _grouped(dx, weight, *how)
    if not isinstance(dweight, SymbolicZero):
        # Kept for the backward pass is the input, not what each platform's form would make of it first.
        of_weight = jax.checkpoint(lambda x, w: _on_a_cpu(_by_tap, x, w, *how), prevent_cse=False)(x, dweight)
        dy = of_weight if dy is None else dy + of_weight
    return y, jnp.zeros_like(y) if dy is None else dy


_grouped.defjvp(_grouped_jvp, symbolic_zeros=True)


def _grouped_input(
    x: jax.Array, kernel: Sequence[int], stride: Sequence[int], pads: Padding, dilation: Sequence[int], groups: int
) -> tuple[jax.Array, list[int]]:
    """The padded input (N, in..., groups, C / groups), and the sizes of the result."""
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    sizes = x.shape[1 : 1 + len(kernel)]
    return x, [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]


def cut_windows(
    x: jax.Array, kernel: Sequence[int], stride: Sequence[int], pads: Padding, dilation: Sequence[int], groups: int
) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """For each position in the kernel: its index, and what the kernel sees there, (N, out..., groups, C / groups)."""
    x, out = _grouped_input(x, kernel, stride, pads, dilation, groups)
    for index in itertools.product(*map(range, kernel)):
        start = [i * d for i, d in zip(index, dilation, strict=True)]
        stop = [first + (n - 1) * s + 1 for first, n, s in zip(start, out, stride, strict=True)]
        yield index, lax.slice(x, (0, *start, 0, 0), (x.shape[0], *stop, *x.shape[-2:]), (1, *stride, 1, 1))


def _shifted(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], pads: Padding, dilation: tuple[int, ...], groups: int
) -> jax.Array:
    """One input channel for each group.

    A sum of shifted inputs, each times one number of the kernel for each channel.
    """
    per_group = weight.shape[0] // groups
    total: Any = None
    for index, seen in cut_windows(x, weight.shape[2:], stride, pads, dilation, groups):
        term = seen * weight[(slice(None), 0, *index)].reshape(groups, per_group)
        total = term if total is None else total + term
    return total.reshape(*total.shape[:-2], weight.shape[0])


def _taps(weight: jax.Array, groups: int) -> jax.Array:
    """The kernel as (taps, groups, C / groups, O / groups)."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(3, 0, 2, 1)


def _gathered(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], pads: Padding, dilation: tuple[int, ...], groups: int
) -> jax.Array:
    """What the kernel sees, gathered, times the kernel: one matrix product for each group, all in one batch."""
    seen = [piece for _, piece in cut_windows(x, weight.shape[2:], stride, pads, dilation, groups)]
    columns = jnp.stack(seen, axis=-2)  # N, out..., groups, taps, C / groups
    lead = columns.shape[: x.ndim - 1]
    columns = columns.reshape(math.prod(lead), groups, -1)
    kernel = _taps(weight, groups).swapaxes(0, 1).reshape(groups, -1, weight.shape[0] // groups)
    result = lax.dot_general(columns, kernel, (((2,), (1,)), ((1,), (0,))))  # groups, N * out, O / groups
    return result.transpose(1, 0, 2).reshape(*lead, weight.shape[0])


def _by_tap(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], pads: Padding, dilation: tuple[int, ...], groups: int
) -> jax.Array:
    """The same, one position in the kernel after the other, in a loop.

    Its transpose, the kernel's gradient, cuts one window at a time. XLA would cut all of them as soon as the input is
    known, in the forward pass, and keep them until they are needed.
    """
    kernel = weight.shape[2:]
    x, out = _grouped_input(x, kernel, stride, pads, dilation, groups)
    size = (x.shape[0], *((n - 1) * s + 1 for n, s in zip(out, stride, strict=True)), *x.shape[-2:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(start: jax.Array, tap: jax.Array) -> jax.Array:
        seen = lax.dynamic_slice(x, start, size)
        seen = lax.slice(seen, [0] * x.ndim, size, (1, *stride, 1, 1))
        return seen * tap[:, 0] if tap.shape[1] == 1 else jnp.einsum("...gc,gco->...go", seen, tap)

    taps = _taps(weight, groups)
    starts = np.array([(0, *index, 0, 0) for index in itertools.product(*map(range, kernel))], np.int32)
    starts *= np.array((1, *dilation, 1, 1), np.int32)
    total = term(starts[0], taps[0])
    if len(taps) > 1:
        total, _ = lax.scan(lambda total, tap: (total + term(*tap), None), total, (starts[1:], taps[1:]))
    return total.reshape(*total.shape[:-2], weight.shape[0])


@register("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input", layout="aware")
def conv_transpose(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: PerDim = 1, padding: PerDim = 0,
    output_padding: PerDim = 0, groups: int = 1, dilation: PerDim = 1,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.conv_transpose1d, 2d and 3d.

    The gradient of a convolution; weight (in, out / groups, spatial...).
    """
    weight = plain(weight)
    spatial = weight.ndim - 2
    if input.ndim == spatial + 1:
        result = conv_transpose(plain(input)[None], weight, bias, stride, padding, output_padding, groups, dilation)
        return plain(result)[0]
    stride, dilation = per_dim(stride, spatial), per_dim(dilation, spatial)
    padding, extra = per_dim(padding, spatial), per_dim(output_padding, spatial)
    order = channels_last(input.ndim)
    x, weight = _same_type(arranged(input, order), weight)
    kernel = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(groups * weight.shape[1], weight.shape[0] // groups, *weight.shape[2:])
    kernel = jnp.flip(kernel, tuple(range(2, kernel.ndim)))
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(
        x, zero, [(0, 0, 0), *((low, high, s - 1) for (low, high), s in zip(pads, stride, strict=True)), (0, 0, 0)]
    )
    y = _convolution(x, kernel, (1,) * spatial, ((0, 0),) * spatial, dilation, groups)
    return laid(y if bias is None else y + plain(bias).astype(y.dtype), order)


@register("aten.convolution.default", "aten._convolution.default", layout="aware")
def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: PerDim, padding: PerDim, dilation: PerDim,
    transposed: bool, output_padding: PerDim, groups: int, *_flags: bool,
) -> Tensor:  # fmt: skip
    """aten::convolution: both kinds, in any number of dimensions."""
    if transposed:
        return conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(input, weight, bias, stride, padding, dilation, groups)
