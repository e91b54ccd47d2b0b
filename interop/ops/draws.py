"""Random numbers that are none, for comparisons: each draw gives the middle of its distribution, or "keep"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


@contextlib.contextmanager
def middles() -> Iterator[None]:
    """For the time of a comparison: Bernoulli variables are 1 (dropout drops nothing), uniform ones lie in the middle
    and normal ones at the mean."""

    def bernoulli(key: jax.Array, p: ArrayLike = 0.5, shape: Sequence[int] | None = None, **_: object) -> jax.Array:
        return jnp.ones(jnp.shape(p) if shape is None else shape, bool)

    def uniform(
        key: jax.Array,
        shape: Sequence[int] = (),
        dtype: DTypeLike = float,
        minval: jax.Array | float = 0.0,
        maxval: jax.Array | float = 1.0,
    ) -> jax.Array:
        return jnp.full(shape, (minval + maxval) / 2, dtype)

    def normal(key: jax.Array, shape: Sequence[int] = (), dtype: DTypeLike = float) -> jax.Array:
        return jnp.zeros(shape, dtype)

    with mock.patch.multiple(jax.random, bernoulli=bernoulli, uniform=uniform, normal=normal):
        yield
