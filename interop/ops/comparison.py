"""Comparisons, logic on bits and booleans, and choice between elements."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from interop.ops.dtypes import Operand, as_array, promoted
from interop.ops.registry import register


def _binary(function: Callable[[Array, Array], Array], *names: str) -> None:
    def apply(x: Operand, y: Operand) -> Array:
        return function(*promoted(x, y))

    register(*(f"aten.{name}" for name in names), layout="elementwise")(apply)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
}
for _name, _function in _COMPARISONS.items():
    _binary(_function, f"{_name}.Tensor", f"{_name}.Scalar")

_BITS: dict[str, Callable[[Array, Array], Array]] = {
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "__and__": jnp.bitwise_and,
    "__or__": jnp.bitwise_or,
    "__xor__": jnp.bitwise_xor,
    "bitwise_left_shift": jnp.left_shift,
    "bitwise_right_shift": jnp.right_shift,
    "__lshift__": jnp.left_shift,
    "__rshift__": jnp.right_shift,
}
for _name, _function in _BITS.items():
    _shifts = _name.startswith("bitwise_") and _name.endswith("_shift")
    _overloads = ["Tensor", "Tensor_Scalar" if _shifts else "Scalar"]
    _overloads += ["Scalar_Tensor"] if _name.startswith("bitwise_") else []
    _binary(_function, *(f"{_name}.{overload}" for overload in _overloads))

_LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}
for _name, _function in _LOGIC.items():
    _binary(_function, f"{_name}.default")


@register("aten.isclose.default", layout="elementwise")
def isclose(x: Operand, y: Operand, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    return jnp.isclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan)


@register(
    "aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar", layout="elementwise"
)
def where(condition: Array, x: Operand, y: Operand) -> Array:
    x, y = promoted(x, y)
    return jnp.where(condition, x, y)


@register("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", layout="elementwise")
def masked_fill(x: Array, mask: Array, value: Operand) -> Array:
    """`value` where `mask` holds; the result has the type of x."""
    return jnp.where(mask, as_array(value, x.dtype), x)


@register("aten.heaviside.default", layout="elementwise")
def heaviside(x: Operand, values: Operand) -> Array:
    x, values = promoted(x, values)
    return jnp.heaviside(x, values).astype(x.dtype)
