"""Activation functions.

Their derivatives at the corners are PyTorch's: 0 at the corner of relu, hardtanh, relu6 and hardsigmoid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from interop.ops.dtypes import Number, as_array
from interop.ops.layout import Tensor, array_of, axis_of, laid, order_of, plain
from interop.ops.registry import register


@register("aten.relu.default", "aten.relu_.default", layout="elementwise")
def relu(x: Array) -> Array:
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


@register("aten.hardtanh.default", "aten.hardtanh_.default", layout="elementwise")
def hardtanh(x: Array, min_val: Number = -1, max_val: Number = 1) -> Array:
    """x between min_val and max_val; the derivative is 0 at both (torch: hardtanh_backward)."""
    low, high = jnp.asarray(min_val, x.dtype), jnp.asarray(max_val, x.dtype)
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))


@register("aten.relu6.default", layout="elementwise")
def relu6(x: Array) -> Array:
    return hardtanh(x, 0, 6)


@register("aten.hardsigmoid.default", layout="elementwise")
def hardsigmoid(x: Array) -> Array:
    """relu6(x + 3) / 6.

    The derivative is 0 at -3 and 3, and between them 1 / 6 in single precision, as PyTorch has it for float64 too
    (aten/src/ATen/native/cpu/Activation.cpp, hardsigmoid_backward_kernel).
    """
    return _hardsigmoid(x)


@jax.custom_jvp
def _hardsigmoid(x: Array) -> Array:
    return hardtanh(x + 3, 0, 6) / 6


@_hardsigmoid.defjvp
def _hardsigmoid_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    slope = jnp.asarray(float(np.float32(1 / 6)), x.dtype)
    return _hardsigmoid(x), jnp.where((x > -3) & (x < 3), tangent * slope, jnp.zeros((), x.dtype))


@register("aten.hardswish.default", "aten.hardswish_.default", layout="elementwise")
def hardswish(x: Array) -> Array:
    """x relu6(x + 3) / 6; the derivative is 0 at -3 and 1 at 3 (torch: hardswish_backward)."""
    inside = x * (x + 3) / 6
    return jnp.where(x <= -3, jnp.zeros((), x.dtype), jnp.where(x < 3, inside, x))


@register("aten.leaky_relu.default", layout="elementwise")
def leaky_relu(x: Array, negative_slope: Number = 0.01) -> Array:
    return jnp.where(x > 0, x, x * negative_slope)


@register("aten.prelu.default", "aten._prelu_kernel.default", layout="aware")
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x where positive, weight x elsewhere; one weight, or one for each channel (dimension 1)."""
    weight = plain(weight)
    array = array_of(x)
    if weight.size == 1:
        weight = weight.reshape(())
    else:
        shape = [1] * array.ndim
        shape[axis_of(x, 1) if x.ndim > 1 else 0] = weight.size
        weight = weight.reshape(shape)
    return laid(jnp.where(array > 0, array, weight * array), order_of(x))


@register("aten.elu.default", layout="elementwise")
def elu(x: Array, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1) -> Array:
    negative = jnp.where(x > 0, jnp.zeros((), x.dtype), x) * input_scale
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(negative))


@register("aten.selu.default", layout="elementwise")
def selu(x: Array) -> Array:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@register("aten.celu.default", layout="elementwise")
def celu(x: Array, alpha: Number = 1.0) -> Array:
    return elu(x, alpha, 1, 1 / alpha)


@register("aten.gelu.default", layout="elementwise")
def gelu(x: Array, *, approximate: str = "none") -> Array:
    """x Phi(x), or its approximation by tanh."""
    if approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return 0.5 * x * (1 + lax.erf(x * 0.70710678118654752440))


@register("aten.silu.default", "aten.silu_.default", layout="elementwise")
def silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


@register("aten.mish.default", layout="elementwise")
def mish(x: Array) -> Array:
    return x * jnp.tanh(jax.nn.softplus(x))


@register("aten.softplus.default", layout="elementwise")
def softplus(x: Array, beta: Number = 1, threshold: Number = 20) -> Array:
    """log(1 + exp(beta x)) / beta, and x itself where beta x > threshold."""
    scaled = x * beta
    inside = jnp.where(scaled > threshold, jnp.zeros((), x.dtype), scaled)
    return jnp.where(scaled > threshold, x, jnp.log1p(jnp.exp(inside)) / beta)


@register("aten.log_sigmoid.default", layout="elementwise")
def log_sigmoid(x: Array) -> Array:
    return -jax.nn.softplus(-x)


@register("aten.log_sigmoid_forward.default", layout="elementwise")
def log_sigmoid_forward(x: Array) -> tuple[Array, Array]:
    return log_sigmoid(x), jnp.exp(-jnp.abs(x))


@register("aten.hardshrink.default", layout="elementwise")
def hardshrink(x: Array, lambd: Number = 0.5) -> Array:
    return jnp.where((x >= -lambd) & (x <= lambd), jnp.zeros((), x.dtype), x)


@register("aten.softshrink.default", layout="elementwise")
def softshrink(x: Array, lambd: Number = 0.5) -> Array:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, jnp.zeros((), x.dtype)))


@register("aten.threshold.default", layout="elementwise")
def threshold(x: Array, threshold: Number, value: Number) -> Array:
    return jnp.where(x <= threshold, as_array(value, x.dtype), x)


@register("aten.glu.default", layout="aware")
def glu(x: Tensor, dim: int = -1) -> Tensor:
    """The first half of `dim` times the sigmoid of the second."""
    first, second = jnp.split(array_of(x), 2, axis_of(x, dim))
    return laid(first * jax.nn.sigmoid(second), order_of(x))
