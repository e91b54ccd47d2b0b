"""Arithmetic and functions of single elements, with PyTorch's promotion of types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from interop.ops.dtypes import (
    as_array,
    floating,
    is_complex,
    is_float,
    is_inexact,
    is_integer,
    jax_dtype,
    promoted,
    result_type,
)
from interop.ops.layout import Tensor, array_of, laid, order_of
from interop.ops.registry import register


def _unary(name: str, function: Callable[[Any], Any], float_result: bool = True) -> None:
    def apply(x: Any) -> Any:
        return function(floating(x) if float_result else x)

    register(f"aten.{name}.default", layout="elementwise")(apply)


for _name, _function in {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log2": jnp.log2,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "tanh": jnp.tanh,
    "asinh": jnp.arcsinh,
    "atanh": jnp.arctanh,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": lambda x: 1 / x,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": lax.erf_inv,
    "sigmoid": jax.nn.sigmoid,
    "special_expit": jax.nn.sigmoid,
    "deg2rad": jnp.deg2rad,
    "rad2deg": jnp.rad2deg,
    "sinc": jnp.sinc,
}.items():
    _unary(_name, _function)

for _name, _function in {
    "neg": jnp.negative,
    "sign": lambda x: _sign(x),
    "sgn": lambda x: _sign(x),
    "square": jnp.square,
    "positive": lambda x: x,
    "real": jnp.real,
    "imag": jnp.imag,
    "conj": jnp.conj,
    "_conj": jnp.conj,
    "resolve_conj": lambda x: x,
    "resolve_neg": lambda x: x,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
    "isfinite": jnp.isfinite,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
    "angle": lambda x: jnp.angle(x) if is_complex(x.dtype) else jnp.angle(lax.stop_gradient(x)),
    "signbit": jnp.signbit,
    "isposinf": jnp.isposinf,
    "isneginf": jnp.isneginf,
}.items():
    _unary(_name, _function, float_result=False)


@jax.custom_jvp
def _acosh(x: Any) -> Any:
    return jnp.arccosh(x)


@_acosh.defjvp
def _acosh_jvp(primals: Any, tangents: Any) -> Any:
    """1 / sqrt(x^2 - 1), below -1 too, where the function is no number: as PyTorch, and as JAX up to 0.11."""
    (x,) = primals
    return _acosh(x), tangents[0] * lax.rsqrt(x * x - 1)


@register("aten.acosh.default", layout="elementwise")
def acosh(x: Any) -> Any:
    return _acosh(floating(x))


@register("aten.digamma.default", "aten.special_digamma.default", layout="elementwise")
def digamma(x: Any) -> Any:
    """The derivative of `lgamma`."""
    return _digamma(floating(x))


@register("aten.lgamma.default", layout="elementwise")
def lgamma(x: Any) -> Any:
    return _lgamma(floating(x))


@jax.custom_jvp
def _digamma(x: Any) -> Any:
    """At 0 it is infinite, with the sign that 0 has not (torch: calc_digamma in aten/src/ATen/native/Math.h)."""
    return jnp.where(x == 0, -jnp.copysign(jnp.inf, x), lax.digamma(x)).astype(x.dtype)


@_digamma.defjvp
def _digamma_jvp(primals: Any, tangents: Any) -> Any:
    return _digamma(primals[0]), tangents[0] * jax.scipy.special.polygamma(1, primals[0])


@jax.custom_jvp
def _lgamma(x: Any) -> Any:
    return lax.lgamma(x)


@_lgamma.defjvp
def _lgamma_jvp(primals: Any, tangents: Any) -> Any:
    return lax.lgamma(primals[0]), tangents[0] * _digamma(primals[0])


def _sign(x: Any) -> Any:
    """-1, 0 or 1; 0 for what is no number; of a complex number its direction."""
    if not is_float(x.dtype):
        return jnp.sign(x)
    return jnp.where(x > 0, 1, jnp.where(x < 0, -1, 0)).astype(x.dtype)


def _whole(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: function(x) if is_inexact(x.dtype) else x


for _name, _function in {
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "trunc": jnp.trunc,
    "fix": jnp.trunc,
    "round": jnp.round,
}.items():
    _unary(_name, _whole(_function), float_result=False)


@register("aten.frac.default", layout="elementwise")
def frac(x: Any) -> Any:
    return x - jnp.trunc(x)


@register("aten.round.decimals", layout="elementwise")
def round_decimals(x: Any, *, decimals: int) -> Any:
    scale = 10.0 ** abs(decimals)
    return jnp.round(x * scale) / scale if decimals >= 0 else jnp.round(x / scale) * scale


@register("aten.abs.default", layout="elementwise")
def absolute(x: Any) -> Any:
    """|x|; its derivative at 0 is 0."""
    if is_complex(x.dtype):
        return jnp.abs(x)
    return x * jnp.sign(x) if is_inexact(x.dtype) else jnp.abs(x)


@register("aten.copysign.Tensor", "aten.copysign.Scalar", layout="elementwise")
def copysign(x: Any, y: Any) -> Any:
    """|x| with the sign of y; the derivative at 0 is 0."""
    x, y = promoted(x, y, inexact=True)
    result = jnp.copysign(x, y)
    return jnp.where(x == 0, lax.stop_gradient(result), result)


@register("aten.logit.default", layout="elementwise")
def logit(x: Any, eps: float | None = None) -> Any:
    """log(x / (1 - x)), of x between eps and 1 - eps; the derivative is that of the function at these too."""
    x = floating(x)
    if eps is not None:
        x = clamp(x, eps, 1 - eps)
    return _logit(x)


@jax.custom_jvp
def _logit(x: Any) -> Any:
    return jnp.log(x / (1 - x))


@_logit.defjvp
def _logit_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (tangent,) = primals, tangents
    slope = 1 / (x * (1 - x))  # infinite at 0 and 1, and none outside (torch: logit_backward)
    return _logit(x), tangent * jnp.where((x < 0) | (x > 1), jnp.full((), jnp.nan, x.dtype), slope)


@register("aten.add.Tensor", "aten.add.Scalar", layout="elementwise")
def add(x: Any, y: Any, alpha: Any = 1) -> Any:
    x, y = promoted(x, y)
    if x.dtype == jnp.bool_:
        return jnp.logical_or(x, y if _is_one(alpha) else jnp.logical_and(y, alpha))
    return x + (y if _is_one(alpha) else y * alpha)


@register("aten.sub.Tensor", "aten.sub.Scalar", layout="elementwise")
def sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    x, y = promoted(x, y)
    return x - (y if _is_one(alpha) else y * alpha)


@register("aten.rsub.Tensor", "aten.rsub.Scalar", layout="elementwise")
def rsub(x: Any, y: Any, alpha: Any = 1) -> Any:
    return sub(y, x, alpha)


def _is_one(alpha: Any) -> bool:
    return isinstance(alpha, (int, float)) and alpha == 1


@register("aten.mul.Tensor", "aten.mul.Scalar", layout="elementwise")
def mul(x: Any, y: Any) -> Any:
    x, y = promoted(x, y)
    return x * y


@register("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor", layout="elementwise")
def div(x: Any, y: Any) -> Any:
    x, y = promoted(x, y, inexact=True)
    return x / y


@register("aten.div.Tensor_mode", "aten.div.Scalar_mode", layout="elementwise")
def div_mode(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return div(x, y)
    x, y = promoted(x, y)
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    return lax.div(*jnp.broadcast_arrays(x, y)) if is_integer(x.dtype) else jnp.trunc(x / y)


@register("aten.floor_divide.default", "aten.floor_divide.Scalar", layout="elementwise")
def floor_divide(x: Any, y: Any) -> Any:
    return jnp.floor_divide(*promoted(x, y))


@register("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.remainder.Scalar_Tensor", layout="elementwise")
def remainder(x: Any, y: Any) -> Any:
    return jnp.remainder(*promoted(x, y))


@register("aten.fmod.Tensor", "aten.fmod.Scalar", layout="elementwise")
def fmod(x: Any, y: Any) -> Any:
    return jnp.fmod(*promoted(x, y))


@register(
    "aten.pow.Tensor_Tensor",
    "aten.pow.Tensor_Scalar",
    "aten.pow.Scalar",
    layout="elementwise",
)
def power(x: Any, y: Any) -> Any:
    """x ** y. A whole number as y is a product of x's, so that the derivative holds at 0 and below."""
    if isinstance(y, (int, float)) and not isinstance(y, bool) and hasattr(x, "dtype"):
        dtype = result_type(x, y)
        x = jnp.asarray(x, dtype)
        if y == 0.5 and is_float(dtype):
            return jnp.sqrt(x)
        if float(y).is_integer() and abs(y) < 64 and (y >= 0 or is_inexact(dtype)):
            return lax.integer_pow(x, int(y))
        return jnp.power(x, y)
    x, y = promoted(x, y)
    x, y = jnp.broadcast_arrays(x, y)
    return _power(x, y) if is_inexact(x.dtype) else _whole_power(x, y)


def _whole_power(x: Any, y: Any) -> Any:
    """x ** y of integers or of booleans; with y < 0 it is 0 but for x = 1 and x = -1 (torch: powi)."""
    if x.dtype == jnp.bool_:
        return x | ~y
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.power(x, y)
    inverse = jnp.where(x == 1, 1, jnp.where(x == -1, 1 - 2 * (y & 1), 0)).astype(x.dtype)
    return jnp.where(y < 0, inverse, jnp.power(x, jnp.maximum(y, 0)))


@jax.custom_jvp
def _power(x: Any, y: Any) -> Any:
    return jnp.power(x, y)


@_power.defjvp
def _power_jvp(primals: Any, tangents: Any) -> Any:
    """By x it is 0 for y = 0, by y it is 0 for x = 0 <= y (torch: pow_backward_self, pow_backward_exponent)."""
    x, y = primals
    result, zero = jnp.power(x, y), jnp.zeros((), x.dtype)
    by_x = jnp.where(y == 0, zero, y * jnp.power(x, y - 1))
    by_y = jnp.where((x == 0) & (jnp.real(y) >= 0), zero, result * jnp.log(x))
    return result, by_x * tangents[0] + by_y * tangents[1]


@register(
    "aten.float_power.Tensor_Tensor", "aten.float_power.Tensor_Scalar", "aten.float_power.Scalar", layout="elementwise"
)
def float_power(x: Any, y: Any) -> Any:
    """x ** y in double precision, as far as JAX has it."""
    wide = jax_dtype(jnp.complex128 if is_complex(result_type(x, y)) else jnp.float64)
    return power(x.astype(wide) if hasattr(x, "dtype") else x, y.astype(wide) if hasattr(y, "dtype") else y)


@register("aten.atan2.default", layout="elementwise")
def atan2(x: Any, y: Any) -> Any:
    """The angle of (y, x); the derivative at (0, 0) is 0 (torch: atan2_backward)."""
    x, y = jnp.broadcast_arrays(*promoted(x, y, inexact=True))
    return _atan2(x, y)


@jax.custom_jvp
def _atan2(x: Any, y: Any) -> Any:
    return jnp.arctan2(x, y)


@_atan2.defjvp
def _atan2_jvp(primals: Any, tangents: Any) -> Any:
    x, y = primals
    square = x * x + y * y
    inverse = jnp.where(square == 0, jnp.zeros((), x.dtype), 1 / square)
    return _atan2(x, y), (y * inverse) * tangents[0] - (x * inverse) * tangents[1]


@register("aten.hypot.default", layout="elementwise")
def hypot(x: Any, y: Any) -> Any:
    """The root of x^2 + y^2; its derivative is x / hypot, no number at (0, 0)."""
    x, y = jnp.broadcast_arrays(*promoted(x, y))
    return _hypot(x, y)


@jax.custom_jvp
def _hypot(x: Any, y: Any) -> Any:
    return jnp.hypot(x, y)


@_hypot.defjvp
def _hypot_jvp(primals: Any, tangents: Any) -> Any:
    x, y = primals
    result = _hypot(x, y)
    return result, (x / result) * tangents[0] + (y / result) * tangents[1]


@register("aten.logaddexp.default", layout="elementwise")
def logaddexp(x: Any, y: Any) -> Any:
    return jnp.logaddexp(*promoted(x, y))


@register("aten.xlogy.Tensor", "aten.xlogy.Scalar_Other", "aten.special_xlogy.default", layout="elementwise")
def xlogy(x: Any, y: Any) -> Any:
    """x log(y), 0 for x = 0; the derivative by x is 0 where x = 0 and y <= 0 (torch: derivatives.yaml, xlogy)."""
    x, y = jnp.broadcast_arrays(*promoted(x, y, inexact=True))
    return _xlogy(x, y)


@jax.custom_jvp
def _xlogy(x: Any, y: Any) -> Any:
    return jax.scipy.special.xlogy(x, y)


@_xlogy.defjvp
def _xlogy_jvp(primals: Any, tangents: Any) -> Any:
    x, y = primals
    by_x = jnp.where((x == 0) & (y <= 0), jnp.zeros((), x.dtype), jnp.log(y))
    return _xlogy(x, y), by_x * tangents[0] + (x / y) * tangents[1]


@register("aten.fmax.default", layout="elementwise")
def fmax(x: Any, y: Any) -> Any:
    """The larger, the first of equals; the other one where one is not a number."""
    x, y = promoted(x, y)
    return jnp.where((x >= y) | jnp.isnan(y), x, y)


@register("aten.fmin.default", layout="elementwise")
def fmin(x: Any, y: Any) -> Any:
    x, y = promoted(x, y)
    return jnp.where((x <= y) | jnp.isnan(y), x, y)


@jax.custom_jvp
def _shared(value: Any, weights: Any, operands: Any) -> Any:
    """`value`; its derivative is the sum of the weights times the operands' derivatives.

    The rules of PyTorch for minima, maxima and limits, which give each operand 1, a half or nothing.
    """
    return value


@_shared.defjvp
def _shared_jvp(primals: Any, tangents: Any) -> Any:
    value, weights, _ = primals
    shares = [
        jnp.where(weight == 0, jnp.zeros((), value.dtype), weight * tangent)
        for weight, tangent in zip(weights, tangents[2], strict=True)
    ]
    return value, jnp.broadcast_to(sum(shares[1:], shares[0]), value.shape)


def _with_weights(value: Any, *parts: tuple[Any, Any]) -> Any:
    """`value`, of the operands and weights in `parts`; integers have no derivative."""
    if not is_float(value.dtype):
        return value
    weights = [jnp.asarray(weight, value.dtype) for _, weight in parts]
    return _shared(*lax.stop_gradient((value, weights)), [operand for operand, _ in parts])


def _halves(x: Any, y: Any) -> Any:
    """x's weight in the larger of x and y as PyTorch has it: a half of equals, 1 where one is no number
    (tools/autograd/derivatives.yaml, maximum)."""
    return jnp.where(x == y, 0.5, jnp.where(x < y, 0.0, 1.0))


@register("aten.fmax.default", layout="elementwise", since="2.14")
def fmax_2_14(x: Any, y: Any) -> Any:
    """As `fmax`; the derivative is that of `maximum`."""
    x, y = promoted(x, y)
    return _with_weights(fmax(x, y), (x, _halves(x, y)), (y, _halves(y, x)))


@register("aten.fmin.default", layout="elementwise", since="2.14")
def fmin_2_14(x: Any, y: Any) -> Any:
    x, y = promoted(x, y)
    return _with_weights(fmin(x, y), (x, _halves(y, x)), (y, _halves(x, y)))


@register("aten.fmax.default", layout="elementwise", since="2.15")
def fmax_2_15(x: Any, y: Any) -> Any:
    """As `fmax`; equals share the derivative."""
    x, y = promoted(x, y)
    return _equals_share(fmax(x, y), x, y, (x > y) | jnp.isnan(y))


@register("aten.fmin.default", layout="elementwise", since="2.15")
def fmin_2_15(x: Any, y: Any) -> Any:
    x, y = promoted(x, y)
    return _equals_share(fmin(x, y), x, y, (x < y) | jnp.isnan(y))


def _equals_share(value: Any, x: Any, y: Any, is_x: Any) -> Any:
    return _with_weights(value, (x, jnp.where(x == y, 0.5, is_x)), (y, jnp.where(x == y, 0.5, ~is_x)))


@register("aten.maximum.default", "aten.max.other", layout="elementwise")
def maximum(x: Any, y: Any) -> Any:
    return jnp.maximum(*promoted(x, y))


@register("aten.minimum.default", "aten.min.other", layout="elementwise")
def minimum(x: Any, y: Any) -> Any:
    return jnp.minimum(*promoted(x, y))


@register("aten.clamp.default", "aten.clip.default", layout="elementwise")
def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
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
def clamp_tensor(x: Any, min: Any = None, max: Any = None) -> Any:
    """As `clamp`; a limit has the derivative beyond it, the lower one not where the limits are equal or cross."""
    x, low, high = promoted(x, min, max)
    parts = [(x, (True if low is None else x >= low) & (True if high is None else x <= high))]
    if low is not None:
        parts.append((low, (x < low) & (True if high is None else low < high)))
    if high is not None:
        parts.append((high, (x > high) | (False if low is None else high < low)))
    return _with_weights(clamp(x, low, high), *parts)


@register("aten.clamp_min.Tensor", layout="elementwise")
def clamp_min_tensor(x: Any, min: Any) -> Any:
    return clamp_tensor(x, min)


@register("aten.clamp_max.Tensor", layout="elementwise")
def clamp_max_tensor(x: Any, max: Any) -> Any:
    return clamp_tensor(x, None, max)


@register("aten.clamp_min.default", layout="elementwise")
def clamp_min(x: Any, min: Any) -> Any:
    return clamp(x, min)


@register("aten.clamp_max.default", layout="elementwise")
def clamp_max(x: Any, max: Any) -> Any:
    return clamp(x, None, max)


@register("aten.clamp.default", "aten.clip.default", layout="elementwise", since="2.14")
def clamp_2_14(x: Any, min: Any = None, max: Any = None) -> Any:
    """As `clamp`; the derivative is 0 at the limits."""
    x, low, high = promoted(x, min, max)
    x = jnp.where(jnp.isnan(x), lax.stop_gradient(x), x)
    if low is not None:
        x = jnp.where(x <= low, low, x)
    if high is not None:
        x = jnp.where(x >= high, high, x)
    return x


@register("aten.clamp_min.default", layout="elementwise", since="2.14")
def clamp_min_2_14(x: Any, min: Any) -> Any:
    return clamp_2_14(x, min)


@register("aten.clamp_max.default", layout="elementwise", since="2.14")
def clamp_max_2_14(x: Any, max: Any) -> Any:
    return clamp_2_14(x, None, max)


@register("aten.clamp.Tensor", "aten.clip.Tensor", layout="elementwise", since="2.14")
def clamp_tensor_2_14(x: Any, min: Any = None, max: Any = None) -> Any:
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
def clamp_min_tensor_2_14(x: Any, min: Any) -> Any:
    return clamp_tensor_2_14(x, min)


@register("aten.clamp_max.Tensor", layout="elementwise", since="2.14")
def clamp_max_tensor_2_14(x: Any, max: Any) -> Any:
    return clamp_tensor_2_14(x, None, max)


@register("aten.lerp.Scalar", "aten.lerp.Tensor", layout="elementwise")
def lerp(start: Any, end: Any, weight: Any) -> Any:
    start, end, weight = promoted(start, end, weight)
    return start + weight * (end - start)


@register("aten.addcmul.default", layout="elementwise")
def addcmul(x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    x, a, b = promoted(x, a, b)
    return x + as_array(value, x.dtype) * a * b


@register("aten.addcdiv.default", layout="elementwise")
def addcdiv(x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    x, a, b = promoted(x, a, b)
    return x + as_array(value, x.dtype) * a / b


@register("aten.nan_to_num.default", layout="elementwise")
def nan_to_num(x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Any:
    return (
        jnp.nan_to_num(x, nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf) if is_inexact(x.dtype) else x
    )


@register("aten.detach.default", "aten.detach_.default", layout="elementwise")
def detach(x: Any) -> Any:
    return lax.stop_gradient(x)


@register(
    "aten.clone.default", "aten.alias.default", "aten.contiguous.default", "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default", "aten.lift.default", layout="elementwise",
)  # fmt: skip
def identity(x: Any, *_: Any, **__: Any) -> Any:
    """What differs only in where a tensor is stored."""
    return x


@register("aten._to_copy.default", "aten.to.dtype_layout", layout="elementwise")
def to_copy(x: Any, *, dtype: Any = None, non_blocking: bool = False, copy: bool = False) -> Any:
    return x if dtype is None else cast(x, dtype)


@register("aten.to.dtype", "prims.convert_element_type.default", layout="elementwise")
def cast(x: Any, dtype: Any, *_: Any, **__: Any) -> Any:
    """x as `dtype`; a complex number loses its imaginary part, a number becomes a boolean by x != 0."""
    target = jax_dtype(dtype)
    if is_complex(x.dtype) and not jnp.issubdtype(target, jnp.complexfloating):
        x = jnp.real(x)
    return (x != 0) if target == jnp.bool_ else x.astype(target)


@register("aten.to.device", layout="elementwise")
def to_device(x: Any, device: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
    return x if dtype is None else cast(x, dtype)


@register("aten.to.other", "aten.type_as.default", layout="aware")
def to_other(x: Tensor, other: Tensor, *_: Any, **__: Any) -> Tensor:
    """x with the type of another tensor, whose shape does not matter."""
    return laid(cast(array_of(x), other.dtype), order_of(x))


@register("aten.polar.default", layout="elementwise")
def polar(magnitude: Any, angle: Any) -> Any:
    return lax.complex(magnitude * jnp.cos(angle), magnitude * jnp.sin(angle))


@register("aten.complex.default", layout="elementwise")
def make_complex(real: Any, imag: Any) -> Any:
    return lax.complex(*promoted(real, imag))


@register("aten.special_erf.default", layout="elementwise")
def special_erf(x: Any) -> Any:
    return lax.erf(floating(x))
