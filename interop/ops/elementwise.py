"""Arithmetic and functions of single elements, with PyTorch's promotion of types."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from interop.ops.dtypes import (
    Number,
    Operand,
    as_array,
    floating,
    is_complex,
    is_float,
    is_inexact,
    is_integer,
    jax_dtype,
    promoted,
)
from interop.ops.layout import Tensor, array_of, laid, order_of
from interop.ops.registry import register
from interop.program.nodes import DType


def _unary(name: str, function: Callable[[Array], Array], float_result: bool = True) -> None:
    def apply(x: Array) -> Array:
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


def _sign(x: Array) -> Array:
    """-1, 0 or 1; 0 for what is no number; of a complex number its direction."""
    if not is_float(x.dtype):
        return jnp.sign(x)
    return jnp.where(x > 0, 1, jnp.where(x < 0, -1, 0)).astype(x.dtype)


def _whole(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
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
def frac(x: Array) -> Array:
    return x - jnp.trunc(x)


@register("aten.round.decimals", layout="elementwise")
def round_decimals(x: Array, *, decimals: int) -> Array:
    scale = 10.0 ** abs(decimals)
    return jnp.round(x * scale) / scale if decimals >= 0 else jnp.round(x / scale) * scale


@register("aten.abs.default", layout="elementwise")
def absolute(x: Array) -> Array:
    """|x|; its derivative at 0 is 0."""
    if is_complex(x.dtype):
        return jnp.abs(x)
    return x * jnp.sign(x) if is_inexact(x.dtype) else jnp.abs(x)


@register("aten.copysign.Tensor", "aten.copysign.Scalar", layout="elementwise")
def copysign(x: Operand, y: Operand) -> Array:
    """|x| with the sign of y; the derivative at 0 is 0."""
    x, y = promoted(x, y, inexact=True)
    result = jnp.copysign(x, y)
    return jnp.where(x == 0, lax.stop_gradient(result), result)


@register("aten.add.Tensor", "aten.add.Scalar", layout="elementwise")
def add(x: Operand, y: Operand, alpha: Number = 1) -> Array:
    x, y = promoted(x, y)
    if x.dtype == jnp.bool_:
        return jnp.logical_or(x, y if _is_one(alpha) else jnp.logical_and(y, alpha))
    return x + (y if _is_one(alpha) else y * alpha)


@register("aten.sub.Tensor", "aten.sub.Scalar", layout="elementwise")
def sub(x: Operand, y: Operand, alpha: Number = 1) -> Array:
    x, y = promoted(x, y)
    return x - (y if _is_one(alpha) else y * alpha)


@register("aten.rsub.Tensor", "aten.rsub.Scalar", layout="elementwise")
def rsub(x: Operand, y: Operand, alpha: Number = 1) -> Array:
    return sub(y, x, alpha)


def _is_one(alpha: Number) -> bool:
    return isinstance(alpha, (int, float)) and alpha == 1


@register("aten.mul.Tensor", "aten.mul.Scalar", layout="elementwise")
def mul(x: Operand, y: Operand) -> Array:
    x, y = promoted(x, y)
    return x * y


@register("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor", layout="elementwise")
def div(x: Operand, y: Operand) -> Array:
    x, y = promoted(x, y, inexact=True)
    return x / y


@register("aten.div.Tensor_mode", "aten.div.Scalar_mode", layout="elementwise")
def div_mode(x: Operand, y: Operand, rounding_mode: str | None = None) -> Array:
    if rounding_mode is None:
        return div(x, y)
    x, y = promoted(x, y)
    if rounding_mode == "floor":
        return _whole_quotient(x, y)
    return lax.div(*jnp.broadcast_arrays(x, y)) if is_integer(x.dtype) else jnp.trunc(x / y)


@register("aten.floor_divide.default", "aten.floor_divide.Scalar", layout="elementwise")
def floor_divide(x: Operand, y: Operand) -> Array:
    return _whole_quotient(*promoted(x, y))


def _whole_quotient(x: Array, y: Array) -> Array:
    """x / y rounded down, from the remainder, as PyTorch computes it (c10/util/generic_math.h, div_floor_floating).

    Infinite or no number where y is 0, which differs between versions of `jnp.floor_divide`. No derivative.
    """
    if not is_inexact(x.dtype):
        return jnp.floor_divide(x, y)
    x, y = lax.stop_gradient(jnp.broadcast_arrays(x, y))
    rest = lax.rem(x, y)
    quotient = (x - rest) / y
    quotient = jnp.where((rest != 0) & ((y < 0) != (rest < 0)), quotient - 1, quotient)
    whole = jnp.floor(quotient)
    whole = jnp.where(quotient - whole > 0.5, whole + 1, whole)
    whole = jnp.where(quotient == 0, jnp.copysign(0.0, x / y).astype(x.dtype), whole)
    return jnp.where(y == 0, x / y, whole)


@register("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.remainder.Scalar_Tensor", layout="elementwise")
def remainder(x: Operand, y: Operand) -> Array:
    return jnp.remainder(*promoted(x, y))


@register("aten.fmod.Tensor", "aten.fmod.Scalar", layout="elementwise")
def fmod(x: Operand, y: Operand) -> Array:
    return jnp.fmod(*promoted(x, y))


@register("aten.lerp.Scalar", "aten.lerp.Tensor", layout="elementwise")
def lerp(start: Operand, end: Operand, weight: Operand) -> Array:
    start, end, weight = promoted(start, end, weight)
    return start + weight * (end - start)


@register("aten.addcmul.default", layout="elementwise")
def addcmul(x: Operand, a: Operand, b: Operand, *, value: Number = 1) -> Array:
    x, a, b = promoted(x, a, b)
    return x + as_array(value, x.dtype) * a * b


@register("aten.addcdiv.default", layout="elementwise")
def addcdiv(x: Operand, a: Operand, b: Operand, *, value: Number = 1) -> Array:
    x, a, b = promoted(x, a, b)
    return x + as_array(value, x.dtype) * a / b


@register("aten.nan_to_num.default", layout="elementwise")
def nan_to_num(x: Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Array:
    return (
        jnp.nan_to_num(x, nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf) if is_inexact(x.dtype) else x
    )


@register("aten.detach.default", "aten.detach_.default", layout="elementwise")
def detach(x: Array) -> Array:
    return lax.stop_gradient(x)


@register(
    "aten.clone.default", "aten.alias.default", "aten.contiguous.default", "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default", "aten.lift.default", layout="elementwise",
)  # fmt: skip
def identity(x: Array, *_: object, **__: object) -> Array:
    """What differs only in where a tensor is stored."""
    return x


@register("aten._to_copy.default", "aten.to.dtype_layout", layout="elementwise")
def to_copy(x: Array, *, dtype: DType | None = None, non_blocking: bool = False, copy: bool = False) -> Array:
    return x if dtype is None else cast(x, dtype)


@register("aten.to.dtype", "prims.convert_element_type.default", layout="elementwise")
def cast(x: Array, dtype: DType | DTypeLike, *_: object, **__: object) -> Array:
    """x as `dtype`; a complex number loses its imaginary part, a number becomes a boolean by x != 0."""
    target = jax_dtype(dtype)
    if is_complex(x.dtype) and not jnp.issubdtype(target, jnp.complexfloating):
        x = jnp.real(x)
    return (x != 0) if target == jnp.bool_ else x.astype(target)


@register("aten.to.device", layout="elementwise")
def to_device(x: Array, device: None, dtype: DType | None = None, *_: object, **__: object) -> Array:
    return x if dtype is None else cast(x, dtype)


@register("aten.to.other", "aten.type_as.default", layout="aware")
def to_other(x: Tensor, other: Tensor, *_: object, **__: object) -> Tensor:
    """x with the type of another tensor, whose shape does not matter."""
    return laid(cast(array_of(x), other.dtype), order_of(x))


@register("aten.polar.default", layout="elementwise")
def polar(magnitude: Array, angle: Array) -> Array:
    return lax.complex(magnitude * jnp.cos(angle), magnitude * jnp.sin(angle))


@register("aten.complex.default", layout="elementwise")
def make_complex(real: Operand, imag: Operand) -> Array:
    return lax.complex(*promoted(real, imag))


@register("aten.special_erf.default", layout="elementwise")
def special_erf(x: Array) -> Array:
    return lax.erf(floating(x))
