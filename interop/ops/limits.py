"""The larger or smaller of two, and what keeps numbers between limits, with PyTorch's derivatives at ties and limits.

These changed in PyTorch 2.14 and 2.15: a program has those of the version that recorded it (`interop.ops.registry`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Number, Operand, is_float, promoted
from interop.ops.registry import register


@register("aten.fmax.default", layout="elementwise")
def fmax(x: Operand, y: Operand) -> Array:
    """The larger, the first of equals; the other one where one is not a number."""
    x, y = promoted(x, y)
    return jnp.where((x >= y) | jnp.isnan(y), x, y)


@register("aten.fmin.default", layout="elementwise")
def fmin(x: Operand, y: Operand) -> Array:
    x, y = promoted(x, y)
    return jnp.where((x <= y) | jnp.isnan(y), x, y)


@jax.custom_jvp
def _shared(value: Array, weights: list[Array], operands: list[Array]) -> Array:
    """`value`; its derivative is the sum of the weights times the operands' derivatives.

    The rules of PyTorch for minima, maxima and limits, which give each operand 1, a half or nothing.
    """
    return value


@_shared.defjvp
def _shared_jvp(
    primals: tuple[Array, list[Array], list[Array]], tangents: tuple[Array, list[Array], list[Array]]
) -> tuple[Array, Array]:
    value, weights, _ = primals
    shares = [
        jnp.where(weight == 0, jnp.zeros((), value.dtype), weight * tangent)
        for weight, tangent in zip(weights, tangents[2], strict=True)
    ]
    return value, jnp.broadcast_to(sum(shares[1:], shares[0]), value.shape)


def _with_weights(value: Array, *parts: tuple[Array, Array | bool]) -> Array:
    """`value`, of the operands and weights in `parts`; integers have no derivative."""
    if not is_float(value.dtype):
        return value
    weights = [jnp.asarray(weight, value.dtype) for _, weight in parts]
    return _shared(*lax.stop_gradient((value, weights)), [operand for operand, _ in parts])


def _halves(x: Array, y: Array) -> Array:
    """x's weight in the larger of x and y as PyTorch has it: a half of equals, 1 where one is no number
    (tools/autograd/derivatives.yaml, maximum)."""
    return jnp.where(x == y, 0.5, jnp.where(x < y, 0.0, 1.0))


@register("aten.fmax.default", layout="elementwise", since="2.14")
def fmax_2_14(x: Operand, y: Operand) -> Array:
    """As `fmax`; the derivative is that of `maximum`."""
    x, y = promoted(x, y)
    return _with_weights(fmax(x, y), (x, _halves(x, y)), (y, _halves(y, x)))


@register("aten.fmin.default", layout="elementwise", since="2.14")
def fmin_2_14(x: Operand, y: Operand) -> Array:
    x, y = promoted(x, y)
    return _with_weights(fmin(x, y), (x, _halves(y, x)), (y, _halves(x, y)))


@register("aten.fmax.default", layout="elementwise", since="2.15")
def fmax_2_15(x: Operand, y: Operand) -> Array:
    """As `fmax`; equals share the derivative."""
    x, y = promoted(x, y)
    return _equals_share(fmax(x, y), x, y, (x > y) | jnp.isnan(y))


@register("aten.fmin.default", layout="elementwise", since="2.15")
def fmin_2_15(x: Operand, y: Operand) -> Array:
    x, y = promoted(x, y)
    return _equals_share(fmin(x, y), x, y, (x < y) | jnp.isnan(y))


def _equals_share(value: Array, x: Array, y: Array, is_x: Array) -> Array:
    return _with_weights(value, (x, jnp.where(x == y, 0.5, is_x)), (y, jnp.where(x == y, 0.5, ~is_x)))


@register("aten.maximum.default", "aten.max.other", layout="elementwise")
def maximum(x: Operand, y: Operand) -> Array:
    return jnp.maximum(*promoted(x, y))


@register("aten.minimum.default", "aten.min.other", layout="elementwise")
def minimum(x: Operand, y: Operand) -> Array:
    return jnp.minimum(*promoted(x, y))


@register("aten.clamp.default", "aten.clip.default", layout="elementwise")
def clamp(x: Array, min: Operand | None = None, max: Operand | None = None) -> Array:
    """x between min and max. The derivative is 1 where min <= x <= max, borders included (torch: clamp_backward).

    That leaves out what is no number.
    """
    x, low, high = promoted(x, min, max)
    x = jnp.where(jnp.isnan(x), lax.stop_gradient(x), x)
    if low is not None:
        x = jnp.where(x < low, low, x)
    if high is not None:
        x = jnp.where(x > high, high, x)
    return x


@register("aten.clamp.Tensor", "aten.clip.Tensor", layout="elementwise")
def clamp_tensor(x: Array, min: Operand | None = None, max: Operand | None = None) -> Array:
    """As `clamp`; a limit has the derivative beyond it, the lower one not where the limits are equal or cross."""
    x, low, high = promoted(x, min, max)
    parts = [(x, (True if low is None else x >= low) & (True if high is None else x <= high))]
    if low is not None:
        parts.append((low, (x < low) & (True if high is None else low < high)))
    if high is not None:
        parts.append((high, (x > high) | (False if low is None else high < low)))
    return _with_weights(clamp(x, low, high), *parts)


@register("aten.clamp_min.Tensor", layout="elementwise")
def clamp_min_tensor(x: Array, min: Operand) -> Array:
    return clamp_tensor(x, min)


@register("aten.clamp_max.Tensor", layout="elementwise")
def clamp_max_tensor(x: Array, max: Operand) -> Array:
    return clamp_tensor(x, None, max)


@register("aten.clamp_min.default", layout="elementwise")
def clamp_min(x: Array, min: Number) -> Array:
    return clamp(x, min)


@register("aten.clamp_max.default", layout="elementwise")
def clamp_max(x: Array, max: Number) -> Array:
    return clamp(x, None, max)


@register("aten.clamp.default", "aten.clip.default", layout="elementwise", since="2.14")
def clamp_2_14(x: Array, min: Operand | None = None, max: Operand | None = None) -> Array:
    """As `clamp`; the derivative is 0 at the limits."""
    x, low, high = promoted(x, min, max)
    x = jnp.where(jnp.isnan(x), lax.stop_gradient(x), x)
    if low is not None:
        x = jnp.where(x <= low, low, x)
    if high is not None:
        x = jnp.where(x >= high, high, x)
    return x


@register("aten.clamp_min.default", layout="elementwise", since="2.14")
def clamp_min_2_14(x: Array, min: Number) -> Array:
    return clamp_2_14(x, min)


@register("aten.clamp_max.default", layout="elementwise", since="2.14")
def clamp_max_2_14(x: Array, max: Number) -> Array:
    return clamp_2_14(x, None, max)


@register("aten.clamp.default", "aten.clip.default", layout="elementwise", since="2.15")
def clamp_2_15(x: Array, min: Operand | None = None, max: Operand | None = None) -> Array:
    """As 2.14's; a limit that no integer of x's dtype passes is none, where it was wrapped into that dtype.

    Raises ValueError where every integer passes it, as PyTorch does (aten/src/ATen/native/TensorCompare.cpp).
    """
    low, high = min, max
    if jnp.issubdtype(x.dtype, jnp.integer):
        values = jnp.iinfo(x.dtype)
        if isinstance(low, int):
            low = _reached("min", low, low > values.max, low < values.min, x)
        if isinstance(high, int):
            high = _reached("max", high, high < values.min, high > values.max, x)
    return clamp_2_14(x, low, high)


def _reached(name: str, limit: int, beyond: bool, idle: bool, x: Array) -> int | None:
    if beyond:
        raise ValueError(f"clamp: {name}={limit} leaves no value of {x.dtype}; give a limit that the dtype can hold")
    return None if idle else limit


@register("aten.clamp_min.default", layout="elementwise", since="2.15")
def clamp_min_2_15(x: Array, min: Number) -> Array:
    return clamp_2_15(x, min)


@register("aten.clamp_max.default", layout="elementwise", since="2.15")
def clamp_max_2_15(x: Array, max: Number) -> Array:
    return clamp_2_15(x, None, max)


@register("aten.clamp.Tensor", "aten.clip.Tensor", layout="elementwise", since="2.14")
def clamp_tensor_2_14(x: Array, min: Operand | None = None, max: Operand | None = None) -> Array:
    """As `clamp`; x shares the derivative with a limit that it equals.

    With both limits, x and the lower one have no part where the limits cross, and x has all of it where all three are
    equal. What is no number has the part that these comparisons leave it.
    """
    x, low, high = promoted(x, min, max)
    value = clamp(x, low, high)
    if low is None or high is None:
        if low is not None:
            return _with_weights(value, (x, _halves(x, low)), (low, _halves(low, x)))
        return value if high is None else _with_weights(value, (x, _halves(high, x)), (high, _halves(x, high)))
    apart = low < high
    of_x = jnp.where((x < low) | (x > high), 0.0, jnp.where(apart & ((x == low) | (x == high)), 0.5, 1.0))
    of_low = jnp.where(apart & (x == low), 0.5, (x < low) & (low <= high))
    of_high = jnp.where(apart & (x == high), 0.5, (low > high) | ((x > high) & (low <= high)))
    return _with_weights(value, (x, of_x), (low, of_low), (high, of_high))


@register("aten.clamp_min.Tensor", layout="elementwise", since="2.14")
def clamp_min_tensor_2_14(x: Array, min: Operand) -> Array:
    return clamp_tensor_2_14(x, min)


@register("aten.clamp_max.Tensor", layout="elementwise", since="2.14")
def clamp_max_tensor_2_14(x: Array, max: Operand) -> Array:
    return clamp_tensor_2_14(x, None, max)
