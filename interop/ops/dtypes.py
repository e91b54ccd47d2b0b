"""Element types: PyTorch's names, and PyTorch's rules of promotion.

torch.result_type: among tensors with dimensions, tensors without, and Python numbers, an operand of a later group
counts only if its category (bool, integer, floating point, complex) is higher. JAX's own rules differ: they treat a
tensor without dimensions like any other. Matches c10/core/ScalarType.h (promoteTypes) and
aten/src/ATen/native/TypeProperties.cpp (result_type, combine_categories).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from interop.program.nodes import DType

Real = bool | int | float  # a Scalar that has an order
Number = Real | complex  # what PyTorch calls a Scalar
Operand = Array | Number  # a tensor, or the number that stands for one

_SPECIAL = {"bool": jnp.bool_, "half": jnp.float16, "float": jnp.float32, "double": jnp.float64, "long": jnp.int64}


def jax_dtype(dtype: DType | DTypeLike) -> np.dtype:
    """The JAX type for one of PyTorch's.

    64-bit types become 32-bit ones unless jax_enable_x64 is set, as everywhere in JAX.
    """
    if isinstance(dtype, DType):
        name = dtype.name
        found = _SPECIAL.get(name) or getattr(jnp, name, None)
        if found is None:
            raise TypeError(f"JAX has no element type {name}")
        dtype = found
    return jax.dtypes.canonicalize_dtype(dtype)


_default_float: contextvars.ContextVar[str] = contextvars.ContextVar("default_float", default="float32")


def default_float() -> DTypeLike:
    """What PyTorch makes of a Python float among integers: torch.get_default_dtype()."""
    return jax_dtype(jnp.dtype(_default_float.get()))


def default_complex() -> DTypeLike:
    """What it makes of a Python complex number."""
    return jnp.result_type(default_float(), jnp.complex64)


@contextlib.contextmanager
def default_float_of(name: str) -> Iterator[None]:
    """For the time in which a program runs: the default type when it was recorded."""
    token = _default_float.set(name)
    try:
        yield
    finally:
        _default_float.reset(token)


def is_float(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_complex(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


def is_inexact(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def is_integer(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


def lowest(dtype: DTypeLike) -> np.ndarray:
    """What no number of the type is less than."""
    return np.asarray(-np.inf if is_inexact(dtype) else jnp.iinfo(dtype).min, dtype)


def highest(dtype: DTypeLike) -> np.ndarray:
    """What no number of the type is greater than."""
    return np.asarray(np.inf if is_inexact(dtype) else jnp.iinfo(dtype).max, dtype)


def _category(dtype: DTypeLike) -> int:
    if dtype == jnp.bool_:
        return 0
    return 1 if is_integer(dtype) else 2 if is_float(dtype) else 3


def _number_dtype(x: Number) -> DTypeLike:
    if isinstance(x, bool):
        return jnp.bool_
    if isinstance(x, int):
        return jax_dtype(jnp.int64)
    return default_float() if isinstance(x, float) else default_complex()


def _merged(dtypes: list[DTypeLike]) -> DTypeLike:
    merged = dtypes[0]
    for dtype in dtypes[1:]:
        merged = jnp.promote_types(merged, dtype)
    return merged


def result_type(*operands: Operand | None) -> np.dtype:
    """torch.result_type of arrays and Python numbers."""
    groups: list[list[DTypeLike]] = [[], [], []]
    for x in operands:
        if isinstance(x, (bool, int, float, complex)):
            groups[2].append(_number_dtype(x))
        elif x is not None:
            groups[0 if np.ndim(x) else 1].append(x.dtype)
    result = None
    for group in groups:
        if not group:
            continue
        lower = _merged(group)
        if result is None:
            result = lower
        elif _category(lower) > _category(result):
            if is_complex(lower) and is_float(result):
                result = jnp.complex128 if result == jnp.float64 else jnp.complex64
            else:
                result = lower
    return jax.dtypes.canonicalize_dtype(result)


@overload
def promoted(*operands: Operand, inexact: bool = False) -> tuple[Array, ...]: ...
@overload
def promoted(*operands: Operand | None, inexact: bool = False) -> tuple[Any, ...]: ...
def promoted(*operands: Operand | None, inexact: bool = False) -> tuple[Array | None, ...]:
    """The operands as arrays of one type; with `inexact`, integers become the default floating-point type."""
    dtype: DTypeLike = result_type(*operands)
    if inexact and not is_inexact(dtype):
        dtype = default_float()
    return tuple(None if x is None else as_array(x, dtype) for x in operands)


def as_array(x: Operand, dtype: DTypeLike) -> Array:
    """x as an array; a Python integer that the type cannot hold wraps around, as in PyTorch."""
    if isinstance(x, int) and is_integer(dtype):
        return jnp.asarray(np.asarray(x, np.int64).astype(dtype))
    return jnp.asarray(x, dtype)


def floating(x: Array) -> Array:
    """x, integers as the default floating-point type: what PyTorch's unary float operations do."""
    return x if is_inexact(x.dtype) else x.astype(default_float())
