"""The kinds of variables that PyTorch has and Flax has no class for, and PyTorch's dtypes for them.

`nnx.Param` and `nnx.BatchStat` stand for parameters and running statistics. Each variable of an imported model
carries the dtype that it had in PyTorch as `torch_dtype`, since JAX keeps 64-bit integers as 32-bit ones unless
jax_enable_x64 is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxnorm.nnx_frozen import Frozen as Frozen


class Buffer(nnx.Variable[Any]):
    """A buffer that is no running statistic of a BatchNorm layer. `persistent=False` in its metadata keeps it out of
    the state dict.
    """


class Constant(nnx.Variable[Any]):
    """A tensor that the model's code makes by itself. Not part of the state dict."""


def check(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError with every array that JAX, as configured, cannot hold."""
    problems = []
    for name, array in arrays.items():
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        if dtype == array.dtype:
            continue
        if not np.issubdtype(array.dtype, np.integer):
            problems.append(f"{name!r} is {array.dtype}")
        elif array.size and (array.max() > np.iinfo(dtype).max or array.min() < np.iinfo(dtype).min):
            problems.append(f"{name!r} is {array.dtype} with values that do not fit {dtype}")
    if problems:
        raise ValueError(
            "JAX cannot hold these without jax_enable_x64: set it, or convert the PyTorch module (.float(), say):\n  "
            + "\n  ".join(problems)
        )


def to_jax(array: np.ndarray) -> jax.Array:
    """A copy on JAX's side; 64-bit integers become 32-bit ones unless jax_enable_x64 is set."""
    # jnp.array would compile a copy for each shape.
    return jax.device_put(np.array(array, dtype=jax.dtypes.canonicalize_dtype(array.dtype), copy=True))


def to_numpy(variable: nnx.Variable[Any]) -> np.ndarray:
    """The values of a variable, in the dtype that PyTorch knows them by."""
    value = np.asarray(variable[...])
    wanted = variable.get_metadata().get("torch_dtype")
    if wanted is None or not np.issubdtype(value.dtype, np.integer):
        return value
    return value.astype(wanted, copy=False)
