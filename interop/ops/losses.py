"""Losses that PyTorch does not derive from the operations that they are made of; the others it takes apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from interop.ops.registry import register


@jax.custom_jvp
def _cross_entropy(p: Array, target: Array) -> Array:
    return (target - 1) * jnp.maximum(jnp.log1p(-p), -100) - target * jnp.maximum(jnp.log(p), -100)


_cross_entropy.defjvps(
    lambda dp, _, p, target: dp * (p - target) / jnp.maximum((1 - p) * p, 1e-12),
    lambda dt, _, p, target: dt * (jnp.maximum(jnp.log1p(-p), -100) - jnp.maximum(jnp.log(p), -100)),
)


@register("aten.binary_cross_entropy.default")
def binary_cross_entropy(p: Array, target: Array, weight: Array | None = None, reduction: int = 1) -> Array:
    """-target log p - (1 - target) log(1 - p): of each (reduction 0), their mean (1) or sum (2).

    Logarithms stop at -100, and the derivative divides by max(p (1 - p), 1e-12) (aten/src/ATen/native/Loss.cpp).
    """
    losses = _cross_entropy(p, target)
    losses = losses if weight is None else losses * weight
    return (lambda x: x, jnp.mean, jnp.sum)[reduction](losses)
