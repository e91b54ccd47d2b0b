"""Attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from interop.ops.random import kept
from interop.ops.registry import register


@register("aten.scaled_dot_product_attention.default", random=True)
def scaled_dot_product_attention(
    query: Array, key_: Array, value: Array, attn_mask: Array | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False, key: Array,
) -> Array:  # fmt: skip
    """softmax(scale q k^T + mask) v over the last two dimensions; scale defaults to 1 / sqrt(d).

    A row that the mask closes wholly gives zeros (aten/src/ATen/native/transformers/attention.cpp, _safe_softmax).
    """
    if enable_gqa:
        key_ = jnp.repeat(key_, query.shape[-3] // key_.shape[-3], -3)
        value = jnp.repeat(value, query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = jnp.matmul(query * scale, jnp.swapaxes(key_, -1, -2))
    if is_causal:
        attn_mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is not None and attn_mask.dtype == jnp.bool_:
        attn_mask = jnp.where(attn_mask, 0, -jnp.inf).astype(scores.dtype)
    if attn_mask is None:
        weights = jax.nn.softmax(scores, -1)
    else:
        scores = scores + attn_mask
        closed = jnp.all(scores == -jnp.inf, -1, keepdims=True)
        weights = jnp.where(closed, 0, jax.nn.softmax(jnp.where(closed, 0, scores), -1))
    if dropout_p > 0:
        weights = jnp.where(kept(key, weights.shape, dropout_p), weights / (1 - dropout_p), 0)
    return jnp.matmul(weights, value)
