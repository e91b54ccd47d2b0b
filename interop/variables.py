"""The kinds of variables that PyTorch has and Flax has no class for, and PyTorch's dtypes for them.

`nnx.Param` and `nnx.BatchStat` stand for parameters and running statistics. Each variable of an imported model
carries the dtype that it had in PyTorch as `torch_dtype`, since JAX keeps 64-bit integers as 32-bit ones unless
jax_enable_x64 is set.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Frozen(nnx.Variable[Any]):
    """A parameter that does not train: `requires_grad=False` in PyTorch."""


class Buffer(nnx.Variable[Any]):
    """A buffer that is no running statistic of a BatchNorm layer. `persistent=False` keeps it out of the state dict."""


class Constant(nnx.Variable[Any]):
    """A tensor that the model's code makes by itself. Not part of the state dict."""


def to_jax(array: np.ndarray, name: str) -> jax.Array:
    """A copy on JAX's side. Raises ValueError where JAX, as configured, cannot hold the values."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype != array.dtype:
        advice = "set jax_enable_x64"
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{name!r} is {array.dtype}, which JAX holds as {dtype}: {advice}, or convert the PyTorch module to "
                "float32 first"
            )
        limits = np.iinfo(dtype)
        if array.size and (array.max() > limits.max or array.min() < limits.min):
            raise ValueError(f"{name!r} is {array.dtype} with values that do not fit {dtype}: {advice}")
    return jnp.array(array, dtype=dtype, copy=True)


def to_numpy(variable: Any) -> np.ndarray:
    """The values of a variable, in the dtype that PyTorch knows them by."""
    value = np.asarray(variable[...])
    wanted = variable.get_metadata().get("torch_dtype")
    if wanted is None or not np.issubdtype(value.dtype, np.integer):
        return value
    return value.astype(wanted, copy=False)
