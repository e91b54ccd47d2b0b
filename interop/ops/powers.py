"""x ** y, with PyTorch's derivatives at 0."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Operand, is_complex, is_float, is_inexact, jax_dtype, promoted, result_type
from interop.ops.registry import register


@register(
    "aten.pow.Tensor_Tensor",
    "aten.pow.Tensor_Scalar",
    "aten.pow.Scalar",
    layout="elementwise",
)
def power(x: Operand, y: Operand) -> Array:
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


def _whole_power(x: Array, y: Array) -> Array:
    """x ** y of integers or of booleans; with y < 0 it is 0 but for x = 1 and x = -1 (torch: powi)."""
    if x.dtype == jnp.bool_:
        return x | ~y
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.power(x, y)
    inverse = jnp.where(x == 1, 1, jnp.where(x == -1, 1 - 2 * (y & 1), 0)).astype(x.dtype)
    return jnp.where(y < 0, inverse, jnp.power(x, jnp.maximum(y, 0)))


@jax.custom_jvp
def _power(x: Array, y: Array) -> Array:
    return jnp.power(x, y)


@_power.defjvp
def _power_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """By x it is 0 for y = 0, by y it is 0 for x = 0 <= y (torch: pow_backward_self, pow_backward_exponent)."""
    x, y = primals
    result, zero = jnp.power(x, y), jnp.zeros((), x.dtype)
    by_x = jnp.where(y == 0, zero, y * jnp.power(x, y - 1))
    by_y = jnp.where((x == 0) & (jnp.real(y) >= 0), zero, result * jnp.log(x))
    return result, by_x * tangents[0] + by_y * tangents[1]


@register(
    "aten.float_power.Tensor_Tensor", "aten.float_power.Tensor_Scalar", "aten.float_power.Scalar", layout="elementwise"
)
def float_power(x: Any, y: Any) -> Array:
    """x ** y in double precision, as far as JAX has it."""
    wide = jax_dtype(jnp.complex128 if is_complex(result_type(x, y)) else jnp.float64)
    return power(x.astype(wide) if hasattr(x, "dtype") else x, y.astype(wide) if hasattr(y, "dtype") else y)
