"""Special functions of single elements, and arithmetic of integers."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.scipy import special

from interop.ops.dtypes import floating, promoted
from interop.ops.registry import register

for _name, _function in {
    "i0": special.i0,
    "special_i0e": special.i0e,
    "special_i1": special.i1,
    "special_i1e": special.i1e,
    "special_ndtr": special.ndtr,
    "special_ndtri": special.ndtri,
    "special_log_ndtr": special.log_ndtr,
    "special_entr": special.entr,
}.items():
    register(f"aten.{_name}.default", layout="elementwise")(lambda x, f=_function: f(floating(x)))

for _name, _binary in {
    "igamma": special.gammainc,
    "igammac": special.gammaincc,
    "special_zeta": special.zeta,
    "logaddexp2": jnp.logaddexp2,
    "nextafter": jnp.nextafter,
}.items():
    register(f"aten.{_name}.default")(lambda a, b, f=_binary: f(*promoted(a, b, inexact=True)))

register("aten.gcd.default")(lambda a, b: jnp.gcd(*promoted(a, b)))
register("aten.lcm.default")(lambda a, b: jnp.lcm(*promoted(a, b)))


@register("aten.polygamma.default")
def polygamma(n: int, x: Array) -> Array:
    x = floating(x)
    return special.digamma(x) if n == 0 else special.polygamma(jnp.asarray(n), x)


@register("aten.ldexp.Tensor")
def ldexp(x: Array, exponent: Array) -> Array:
    """x 2^exponent."""
    x, exponent = promoted(x, exponent, inexact=True)
    return x * jnp.exp2(exponent)


@register("aten.frexp.Tensor")
def frexp(x: Array) -> tuple[Array, Array]:
    mantissa, exponent = jnp.frexp(x)
    return mantissa, exponent.astype(jnp.int32)
