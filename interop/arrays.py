"""Arrays of NumPy, JAX and PyTorch as each other's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interop import dtypes

if TYPE_CHECKING:
    import torch


_DEEPEST = 100


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def to_numpy(value: Any) -> np.ndarray:
    """An array of any of the three libraries as NumPy's, with the same memory where it can be shared.

    bfloat16 and the float8 types are those of ml_dtypes.

    Raises:
        TypeError: for anything else, and for masked arrays with masked values. What torch raises, for tensors without
            values or strides.
    """
    _check_mask(value)
    if not hasattr(value, "dtype"):
        raise TypeError(f"of type {type(value).__module__}.{type(value).__qualname__}")
    if hasattr(value, "detach"):  # torch's, of any class
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        name = dtype_name(tensor.dtype)
        if name in dtypes.TORCH and dtypes.TORCH[name].isbuiltin != 1:  # ml_dtypes', which torch hands to no one
            import torch

            bits = tensor.view({1: torch.uint8, 2: torch.int16}[tensor.element_size()]).numpy()
            return bits.view(dtypes.TORCH[name])
        value = tensor.numpy()
    return dtypes.native(np.asarray(value))


def _check_mask(value: Any) -> None:
    """Neither PyTorch, JAX nor any file has masks: what was masked would be numbers again."""
    if np.ma.is_masked(value):
        raise TypeError("a masked array, whose mask would be lost: fill it (array.filled(0)) or take .data")


def to_torch(tree: Any) -> Any:
    """NumPy's and JAX's arrays as torch tensors, in a mapping, a list or a tuple too; anything else as it is.

    ```python
    >>> interop.to_torch(interop.state_dict(model))["bn1.weight"]      # bfloat16 stays bfloat16
    tensor([1., 1.], dtype=torch.bfloat16)
    ```

    The inverse of `interop.state_dict`'s arrays: every dtype that torch has is kept, bfloat16 and the float8 types
    included, for which `torch.from_numpy` has no counterpart. A NumPy array that can be written to shares its memory
    with the tensor, as with `torch.from_numpy`; others, and JAX's, which nothing may write to, are copied.

    **Arguments:**

    - `tree`: an array, or nested mappings (which become dicts), lists and tuples of them.

    **Returns:** the tree, with tensors on the CPU in the place of the arrays, of the same shapes and dtypes.

    **Raises:**

    - `TypeError`: for arrays of a dtype that torch does not have (text, say), by its name, and for masked arrays with
      masked values.
    - `ValueError`: for what is nested more than 100 deep.
    """
    return _to_torch(tree, 0)


def _to_torch(tree: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep, or in itself")
    if isinstance(tree, (np.ndarray, np.generic, jax.Array)):
        return _tensor(tree)
    if isinstance(tree, Mapping):
        return {key: _to_torch(value, depth + 1) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_to_torch(value, depth + 1) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to_torch(value, depth + 1) for value in tree)
    return tree


def _tensor(array: np.ndarray | np.generic | jax.Array) -> torch.Tensor:
    import torch

    _check_mask(array)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"torch has no dtype {array.dtype} (of random keys; jax.random.key_data gives their numbers)")
    array = dtypes.native(np.asarray(array))
    name = array.dtype.name
    if name not in dtypes.TORCH or not hasattr(torch, name):
        raise TypeError(f"torch has no dtype {name}")
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if dtypes.TORCH[name].isbuiltin == 1:
        return torch.from_numpy(array)
    bits = array.view({1: np.uint8, 2: np.int16}[array.itemsize])
    return torch.from_numpy(bits).view(getattr(torch, name))
