"""Normalisation: over layers, groups, instances, and batches where the model calls the function rather than a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

import jaxnorm
from interop.ops.layout import Tensor, arranged, array_of, axis_of, channels_last, laid, order_of, plain
from interop.ops.registry import register


def _wide(x: Array) -> Array:
    """Half-precision numbers as float32: PyTorch computes their statistics in float32."""
    return x.astype(jnp.float32) if x.dtype in (jnp.float16, jnp.bfloat16) else x


def _normalised(x: Array, axes: tuple[int, ...], eps: float) -> tuple[Array, Array, Array]:
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    rstd = lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)
    return centred * rstd, mean, rstd


@register("aten.native_layer_norm.default")
def native_layer_norm(
    x: Array, normalized_shape: Sequence[int], weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y, mean, rstd = _normalised(_wide(x), axes, eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.astype(x.dtype), mean, rstd


@register("aten.layer_norm.default")
def layer_norm(
    x: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Array:
    return native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


@register("aten.rms_norm.default")
def rms_norm(x: Array, normalized_shape: Sequence[int], weight: Array | None = None, eps: float | None = None) -> Array:
    """x / sqrt(mean(x^2) + eps) weight; eps defaults to the machine epsilon of the type computed in."""
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    wide = _wide(x)
    eps = float(jnp.finfo(wide.dtype).eps) if eps is None else eps
    y = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axes, keepdims=True) + eps)
    return (y if weight is None else y * weight).astype(x.dtype)


@register("aten._fused_rms_norm.default")
def fused_rms_norm(
    x: Array, normalized_shape: Sequence[int], weight: Array | None, eps: float | None
) -> tuple[Array, Array]:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    wide = _wide(x)
    limit = float(jnp.finfo(wide.dtype).eps) if eps is None else eps
    return rms_norm(x, normalized_shape, weight, eps), lax.rsqrt(
        jnp.mean(jnp.square(wide), axes, keepdims=True) + limit
    )


@register("aten.group_norm.default", layout="aware")
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Statistics over each group of channels of each example."""
    order = channels_last(x.ndim)
    array = arranged(x, order)
    channels = array.shape[-1]
    grouped = _wide(array).reshape(*array.shape[:-1], num_groups, channels // num_groups)
    y, _, _ = _normalised(grouped, (*range(1, array.ndim - 1), array.ndim), eps)
    y = y.reshape(array.shape)
    y = y if weight is None else y * plain(weight)
    y = y if bias is None else y + plain(bias)
    return laid(y.astype(array.dtype), order)


@register("aten.native_group_norm.default", layout="aware")
def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, Array, Array]:
    y = group_norm(x, group, weight, bias, eps)
    grouped = _wide(plain(x)).reshape(N, group, -1)
    _, mean, rstd = _normalised(grouped, (2,), eps)
    return y, mean[..., 0], rstd[..., 0]


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Array, Array, Array | None, Array | None]:
    """y, the mean and 1 / std used, and the new running statistics (momentum as PyTorch: share of the new batch)."""
    array, axis = array_of(x), axis_of(x, 1)
    shape = [1] * array.ndim
    shape[axis] = array.shape[axis]
    weight, bias, running_mean, running_var = map(plain, (weight, bias, running_mean, running_var))
    if not training:
        rstd = lax.rsqrt(_wide(running_var) + eps)
        y = (_wide(array) - running_mean.reshape(shape)) * rstd.reshape(shape)
        y = y if weight is None else y * weight.reshape(shape)
        y = y if bias is None else y + bias.reshape(shape)
        return laid(y.astype(array.dtype), order_of(x)), running_mean, rstd, running_mean, running_var
    y, moments = jaxnorm.batch_norm(array, weight, bias, axis=axis, epsilon=eps)
    variance = moments.m2 / moments.count
    if running_mean is not None:
        new_mean, new_var = lax.stop_gradient((moments.mean, moments.variance(correction=1)))
        running_mean = (1 - momentum) * running_mean + momentum * new_mean.astype(running_mean.dtype)
        running_var = (1 - momentum) * running_var + momentum * new_var.astype(running_var.dtype)
    return laid(y.astype(array.dtype), order_of(x)), moments.mean, lax.rsqrt(variance + eps), running_mean, running_var


@register("aten.batch_norm.default", layout="aware")
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)[0]


@register("aten._native_batch_norm_legit_functional.default", layout="aware")
def native_batch_norm_functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Array, Array, Array | None, Array | None]:
    return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)


@register("aten._native_batch_norm_legit_no_training.default", layout="aware")
def native_batch_norm_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Array, Array]:
    """On a CPU what PyTorch keeps for the backward pass of eval mode is empty."""
    y = _batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)[0]
    return y, jnp.zeros(0, y.dtype), jnp.zeros(0, y.dtype)


@register("aten._native_batch_norm_legit.no_stats", layout="aware")
def native_batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Array, Array]:
    return _batch_norm(x, weight, bias, None, None, True, momentum, eps)[:3]


@register("aten.native_batch_norm.default", layout="aware")
def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Array, Array]:
    return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)[:3]


@register("aten.instance_norm.default", layout="aware")
def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Statistics over each channel of each example; running statistics only where they normalise."""
    order = channels_last(x.ndim)
    array = arranged(x, order)
    if use_input_stats:
        y, _, _ = _normalised(_wide(array), tuple(range(1, array.ndim - 1)), eps)
    else:
        y = (_wide(array) - plain(running_mean)) * lax.rsqrt(plain(running_var) + eps)
    y = y if weight is None else y * plain(weight)
    y = y if bias is None else y + plain(bias)
    return laid(y.astype(array.dtype), order)


@register("aten.native_channel_shuffle.default", "aten.channel_shuffle.default", layout="aware")
def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """(N, groups, C / groups, ...) with the two swapped, as channels again."""
    order = channels_last(x.ndim)
    array = arranged(x, order)
    split = array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)
    return laid(jnp.swapaxes(split, -1, -2).reshape(array.shape), order)
