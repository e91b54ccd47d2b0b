"""The type that an imported model computes in."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike


def refuse_other_dtypes(compute_dtype: DTypeLike | None) -> None:
    """Raises ValueError for what is neither None nor a floating dtype."""
    try:
        known = compute_dtype is None or jnp.issubdtype(jnp.dtype(compute_dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"compute_dtype is a floating dtype of JAX (jnp.bfloat16, say), found {compute_dtype!r}")
