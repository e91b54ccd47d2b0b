"""What update rules are written with: hyperparameters that a schedule may move, bias corrections, caution."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm._typing import Array, Int, PyTree


def number(value: Any) -> Any:
    """A hyperparameter: a number, or an array of one that a schedule moves."""
    return value if isinstance(value, jax.Array) else float(value)


def on(value: Any) -> bool:
    """Whether there is such a thing at all; what a schedule moves may be 0 for a while."""
    return isinstance(value, jax.Array) or bool(value)


def correction(b: float | Array, count: Int[Array, ""]) -> Array:
    """`1 - b**count`, to all digits for b near 1."""
    t = floating(count)
    if isinstance(b, jax.Array):  # moved by a schedule
        return jnp.where(b > 0, -jnp.expm1(t * jnp.log(jnp.where(b > 0, b, 1)).astype(t.dtype)), 1)
    return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)


def floating(count: Array) -> Array:
    """A count as a number to calculate with."""
    return count.astype(jnp.result_type(float))


def like(scalar: Array, x: Array) -> Array:
    """The scalar in the dtype of `x`."""
    return scalar.astype(x.dtype)


def mapped(f: Callable[..., Array], *trees: PyTree) -> PyTree:
    """`f` of corresponding leaves."""
    return jax.tree.map(f, *trees)


def cautious(direction: Array, gradient: Array) -> Array:
    """Only where the direction and the gradient agree, and the more there: https://arxiv.org/abs/2411.16085.

    As in timm/optim: `mask = direction * gradient > 0; direction * mask / max(mean(mask), 1e-3)`.
    """
    mask = (direction * gradient > 0).astype(gradient.dtype)
    return direction * (mask / jnp.maximum(jnp.mean(mask), 1e-3))


def norm(x: Array) -> Array:
    """The root of the sum of squares of the whole array."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def decay_rate(rate: Array, group: Mapping[str, Any]) -> Array:
    """What decoupled weight decay is multiplied by: the rate, or with `corrected_weight_decay` `rate**2 / max_lr`.

    https://arxiv.org/abs/2506.02285; timm keeps the rate that the optimizer was made with as `max_lr_snapshot`.
    """
    return rate * rate / float(group["max_lr_snapshot"]) if group.get("corrected_weight_decay") else rate
