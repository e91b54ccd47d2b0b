"""Fourier transforms: PyTorch's three kernels, which all of torch.fft and torch.stft come down to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from interop.ops.registry import register


def _scaled(y: Array, normalization: int, shape: Sequence[int]) -> Array:
    """0: as it is, 1: over the root of the number of values, 2: over their number (fft_norm_mode)."""
    return y if normalization == 0 else y / (math.prod(shape) ** (0.5 if normalization == 1 else 1))


@register("aten._fft_r2c.default")
def r2c(x: Array, dim: Sequence[int], normalization: int, onesided: bool) -> Array:
    y = jnp.fft.rfftn(x, axes=dim) if onesided else jnp.fft.fftn(x, axes=dim)
    return _scaled(y, normalization, [x.shape[d] for d in dim])


@register("aten._fft_c2c.default")
def c2c(x: Array, dim: Sequence[int], normalization: int, forward: bool) -> Array:
    y = jnp.fft.fftn(x, axes=dim) if forward else jnp.fft.ifftn(x, axes=dim, norm="forward")
    return _scaled(y, normalization, [x.shape[d] for d in dim])


@register("aten._fft_c2r.default")
def c2r(x: Array, dim: Sequence[int], normalization: int, last_dim_size: int) -> Array:
    """The last of `dim` holds half of the frequencies, the other half being their conjugates."""
    sizes = [x.shape[d] for d in dim[:-1]] + [last_dim_size]
    y = jnp.fft.irfftn(x, s=sizes, axes=dim, norm="forward")
    return _scaled(y, normalization, sizes)
