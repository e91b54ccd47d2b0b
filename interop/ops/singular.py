"""Functions with a place where their derivative is infinite, undefined or a choice: there it is PyTorch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Operand, floating, promoted
from interop.ops.limits import clamp
from interop.ops.registry import register


@jax.custom_jvp
def _acosh(x: Array) -> Array:
    return jnp.arccosh(x)


@_acosh.defjvp
def _acosh_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """1 / sqrt(x^2 - 1), below -1 too, where the function is no number: as PyTorch, and as JAX up to 0.11."""
    (x,) = primals
    return _acosh(x), tangents[0] * lax.rsqrt(x * x - 1)


@register("aten.acosh.default", layout="elementwise")
def acosh(x: Array) -> Array:
    return _acosh(floating(x))


@register("aten.digamma.default", "aten.special_digamma.default", layout="elementwise")
def digamma(x: Array) -> Array:
    """The derivative of `lgamma`."""
    return _digamma(floating(x))


@register("aten.lgamma.default", layout="elementwise")
def lgamma(x: Array) -> Array:
    return _lgamma(floating(x))


@jax.custom_jvp
def _digamma(x: Array) -> Array:
    """At 0 it is infinite, with the sign that 0 has not (torch: calc_digamma in aten/src/ATen/native/Math.h)."""
    return jnp.where(x == 0, -jnp.copysign(jnp.inf, x), lax.digamma(x)).astype(x.dtype)


@_digamma.defjvp
def _digamma_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return _digamma(primals[0]), tangents[0] * jax.scipy.special.polygamma(1, primals[0])


@jax.custom_jvp
def _lgamma(x: Array) -> Array:
    return lax.lgamma(x)


@_lgamma.defjvp
def _lgamma_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return lax.lgamma(primals[0]), tangents[0] * _digamma(primals[0])


@register("aten.logit.default", layout="elementwise")
def logit(x: Array, eps: float | None = None) -> Array:
    """log(x / (1 - x)), of x between eps and 1 - eps; the derivative is that of the function at these too."""
    x = floating(x)
    if eps is not None:
        x = clamp(x, eps, 1 - eps)
    return _logit(x)


@jax.custom_jvp
def _logit(x: Array) -> Array:
    return jnp.log(x / (1 - x))


@_logit.defjvp
def _logit_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    slope = 1 / (x * (1 - x))  # infinite at 0 and 1, and none outside (torch: logit_backward)
    return _logit(x), tangent * jnp.where((x < 0) | (x > 1), jnp.full((), jnp.nan, x.dtype), slope)


@register("aten.atan2.default", layout="elementwise")
def atan2(x: Operand, y: Operand) -> Array:
    """The angle of (y, x); the derivative at (0, 0) is 0 (torch: atan2_backward)."""
    x, y = jnp.broadcast_arrays(*promoted(x, y, inexact=True))
    return _atan2(x, y)


@jax.custom_jvp
def _atan2(x: Array, y: Array) -> Array:
    return jnp.arctan2(x, y)


@_atan2.defjvp
def _atan2_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, y = primals
    square = x * x + y * y
    inverse = jnp.where(square == 0, jnp.zeros((), x.dtype), 1 / square)
    return _atan2(x, y), (y * inverse) * tangents[0] - (x * inverse) * tangents[1]


@register("aten.hypot.default", layout="elementwise")
def hypot(x: Operand, y: Operand) -> Array:
    """The root of x^2 + y^2; its derivative is x / hypot, no number at (0, 0)."""
    x, y = jnp.broadcast_arrays(*promoted(x, y))
    return _hypot(x, y)


@jax.custom_jvp
def _hypot(x: Array, y: Array) -> Array:
    return jnp.hypot(x, y)


@_hypot.defjvp
def _hypot_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, y = primals
    result = _hypot(x, y)
    return result, (x / result) * tangents[0] + (y / result) * tangents[1]


@register("aten.logaddexp.default", layout="elementwise")
def logaddexp(x: Operand, y: Operand) -> Array:
    return jnp.logaddexp(*promoted(x, y))


@register("aten.xlogy.Tensor", "aten.xlogy.Scalar_Other", "aten.special_xlogy.default", layout="elementwise")
def xlogy(x: Operand, y: Operand) -> Array:
    """x log(y), 0 for x = 0; the derivative by x is 0 where x = 0 and y <= 0 (torch: derivatives.yaml, xlogy)."""
    x, y = jnp.broadcast_arrays(*promoted(x, y, inexact=True))
    return _xlogy(x, y)


@jax.custom_jvp
def _xlogy(x: Array, y: Array) -> Array:
    return jax.scipy.special.xlogy(x, y)


@_xlogy.defjvp
def _xlogy_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, y = primals
    by_x = jnp.where((x == 0) & (y <= 0), jnp.zeros((), x.dtype), jnp.log(y))
    return _xlogy(x, y), by_x * tangents[0] + (x / y) * tangents[1]
