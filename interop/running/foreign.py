"""A module of the user's own, called in the middle of an imported model's program."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from interop.ops.layout import Tensor, arranged, channels_last, laid, plain

# Flax's layers whose channels lie last, where PyTorch's lie at 1.
_CHANNELS_LAST = (nnx.Conv, nnx.ConvTranspose, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def call_module(module: Any, x: Tensor) -> Tensor:
    """What the user's module gives for a tensor of the program.

    Flax's layers whose channels lie last see them last. Any other module sees PyTorch's axes.
    """
    last = isinstance(module, _CHANNELS_LAST) and x.ndim > 2
    if last and isinstance(module, nnx.BatchNorm) and module.axis != -1:
        last = False
    if not last:
        return _array(module(plain(x)))
    order = channels_last(x.ndim)
    return laid(_array(module(arranged(x, order))), order)


def _array(y: Any) -> jax.Array:
    if not isinstance(y, jax.Array):
        raise TypeError(f"a module in the place of a recorded one gives one array, found {type(y).__name__}")
    return y
