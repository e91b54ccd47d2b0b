"""Fake quantisation, as models under quantisation-aware training have it (torch.ao.quantization).

    q = clip(round(x / scale) + zero_point, quant_min, quant_max)        y = (q - zero_point) * scale

The derivative is 1 where the rounded value lies in the range, and 0 elsewhere
(aten/src/ATen/native/quantized/FakeQuantPerTensorAffine.cpp).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import jax_dtype
from interop.ops.registry import register

SMALLEST_SCALE = 6.1e-5  # SMALL_SCALE_THRESHOLD of aten/src/ATen/native/quantized/cpu/QuantUtils.h
_TENSOR = "aten.fake_quantize_per_tensor_affine"
_CHANNEL = "aten.fake_quantize_per_channel_affine"


def quantised(x: Array, scale: Array | float, zero_point: Array | int, low: int, high: int) -> tuple[Array, Array]:
    """The quantised numbers as x's type, and which of them lay in the range."""
    scale = jnp.asarray(scale, jnp.float32)
    wide = jnp.result_type(x.dtype, jnp.float32)
    rounded = jnp.round(x.astype(wide) * (1 / scale).astype(wide)) + jnp.asarray(zero_point, wide)
    inside = (rounded >= low) & (rounded <= high)
    y = ((jnp.clip(rounded, low, high) - jnp.asarray(zero_point, wide)) * scale.astype(wide)).astype(x.dtype)
    return lax.stop_gradient(y) + jnp.where(inside, x - lax.stop_gradient(x), 0), inside


def _along(values: Array, ndim: int, axis: int) -> Array:
    return values.reshape([-1 if dim == axis % ndim else 1 for dim in range(ndim)])


@register(f"{_TENSOR}_cachemask.default")
def per_tensor_with_mask(
    x: Array, scale: Array | float, zero_point: Array | int, quant_min: int, quant_max: int
) -> tuple[Array, Array]:
    """With one scale, and the mask of those in the range."""
    return quantised(x, scale, zero_point, quant_min, quant_max)


@register(f"{_TENSOR}.default", f"{_TENSOR}.tensor_qparams")
def per_tensor(x: Array, scale: Array | float, zero_point: Array | int, quant_min: int, quant_max: int) -> Array:
    return quantised(x, scale, zero_point, quant_min, quant_max)[0]


@register("aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default")
def per_tensor_where_enabled(
    x: Array, scale: Array, zero_point: Array, fake_quant_enabled: Array, quant_min: int, quant_max: int
) -> tuple[Array, Array]:
    y, inside = quantised(x, scale, zero_point, quant_min, quant_max)
    enabled = fake_quant_enabled.reshape(()) == 1
    return jnp.where(enabled, y, x), inside | ~enabled


@register(f"{_CHANNEL}_cachemask.default")
def per_channel_with_mask(
    x: Array, scale: Array, zero_point: Array, axis: int, quant_min: int, quant_max: int
) -> tuple[Array, Array]:
    """With a scale for each index of one dimension."""
    return quantised(x, _along(scale, x.ndim, axis), _along(zero_point, x.ndim, axis), quant_min, quant_max)


@register(f"{_CHANNEL}.default")
def per_channel(x: Array, scale: Array, zero_point: Array, axis: int, quant_min: int, quant_max: int) -> Array:
    return per_channel_with_mask(x, scale, zero_point, axis, quant_min, quant_max)[0]


@register("aten._fused_moving_avg_obs_fq_helper_functional.default")
def observed_and_quantised(
    x: Array,
    observer_on: Array,
    fake_quant_on: Array,
    running_min: Array,
    running_max: Array,
    scale: Array,
    zero_point: Array,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Moves the averages of the extremes, where the observer is on, and quantises by them, where that is on.

    aten/src/ATen/native/quantized/cpu/fused_obs_fake_quant.cpp. The layer has observed once before it is imported:
    an average has the shape of its channels.
    """
    rows = jnp.moveaxis(x, ch_axis, 0).reshape(x.shape[ch_axis], -1) if per_row_fake_quant else x.reshape(1, -1)
    if running_min.size != len(rows):
        raise ValueError(
            f"an observer of {len(rows)} channels holds the extremes of {running_min.size}: call the PyTorch module "
            "once before it is imported"
        )
    rows = lax.stop_gradient(rows).astype(jnp.float32)
    observing, quantising = observer_on.reshape(()) == 1, fake_quant_on.reshape(()) == 1

    def moved(running: Array, now: Array) -> Array:
        now = now.reshape(running.shape).astype(running.dtype)
        new = jnp.where(jnp.isinf(running), now, running + averaging_const * (now - running))
        return jnp.where(observing, new.astype(running.dtype), running)

    low, high = moved(running_min, rows.min(1)), moved(running_max, rows.max(1))
    new_scale, new_zero = _parameters(low, high, quant_min, quant_max, symmetric_quant)
    scale = jnp.where(quantising, new_scale.reshape(scale.shape).astype(scale.dtype), scale)
    zero_point = jnp.where(quantising, new_zero.reshape(zero_point.shape).astype(zero_point.dtype), zero_point)
    by_channel = (scale, zero_point) if not per_row_fake_quant else (
        _along(scale, x.ndim, ch_axis), _along(zero_point, x.ndim, ch_axis))  # fmt: skip
    y, inside = quantised(x, by_channel[0], by_channel[1], quant_min, quant_max)
    return jnp.where(quantising, y, x), inside | ~quantising, low, high, scale, zero_point


def _parameters(low: Array, high: Array, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Array, Array]:
    """Scale and zero point, with which zero is one of the quantised numbers.

    aten/src/ATen/native/quantized/cpu/QuantUtils.h (ChooseQuantizationParams), in float64 where JAX has it.
    """
    double, single = jax_dtype(jnp.float64), jnp.float32
    both = (low < 0) & (high > 0) & symmetric
    below, above = -((quant_max - quant_min) // 2 + 1), (quant_max - quant_min) // 2
    most = jnp.maximum(jnp.abs(low / below), jnp.abs(high / above))  # in float32, as there
    low, high = jnp.where(both, most * below, low), jnp.where(both, most * above, high)
    low, high = jnp.minimum(low, 0).astype(single), jnp.maximum(high, 0).astype(single)
    span = quant_max - quant_min
    scale = (high.astype(double) - low.astype(double)) / span
    useless = (scale.astype(single) == 0) | jnp.isinf(1 / scale.astype(single))
    scale = jnp.where(useless, 0.1, scale)
    small = scale < jnp.asarray(SMALLEST_SCALE, single).astype(double)
    smallest = jnp.asarray(SMALLEST_SCALE, single)
    larger = smallest / scale.astype(single)
    wide_low = jnp.where(low == 0, low, jnp.where(high == 0, -smallest * span, low * larger))
    wide_high = jnp.where(low == 0, smallest * span, jnp.where(high == 0, high, high * larger))
    low, high = jnp.where(small, wide_low, low), jnp.where(small, wide_high, high)
    scale = jnp.where(small, smallest.astype(double), scale)
    from_low, from_high = quant_min - low.astype(double) / scale, quant_max - high.astype(double) / scale
    error_low = abs(quant_min) - jnp.abs(low.astype(double) / scale)
    error_high = abs(quant_max) - jnp.abs(high.astype(double) / scale)
    zero_point = jnp.where(error_low < error_high, from_low, from_high)
    zero_point = jnp.where((low < 0) & (high > 0) & symmetric, (quant_min + quant_max) / 2, zero_point)
    return scale.astype(single), jnp.round(jnp.clip(zero_point, quant_min, quant_max)).astype(jnp.int32)
