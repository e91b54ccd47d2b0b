"""Sampling. Distributions are PyTorch's; the numbers are JAX's, drawn from a key for each node and call."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from interop.ops.dtypes import default_float, is_inexact, jax_dtype
from interop.ops.registry import register
from interop.program.guards import Size
from interop.program.nodes import DType


def kept(key: Array, shape: Sequence[Size], p: float) -> Array:
    """True with probability 1 - p."""
    return jax.random.bernoulli(key, 1 - p, tuple(shape))


@register("aten.native_dropout.default", layout="elementwise", random=True)
def native_dropout(x: Array, p: float, train: bool | None, *, key: Array) -> tuple[Array, Array]:
    if train is False or p == 0:
        return x, jnp.ones(x.shape, bool)
    if p == 1:
        return jnp.zeros_like(x), jnp.zeros(x.shape, bool)
    mask = kept(key, x.shape, p)
    return jnp.where(mask, x / (1 - p), jnp.zeros((), x.dtype)), mask


@register("aten.dropout.default", layout="elementwise", random=True)
def dropout(x: Array, p: float, train: bool, *, key: Array) -> Array:
    """Zero with probability p, otherwise x / (1 - p)."""
    return native_dropout(x, p, train, key=key)[0]


@register("aten.feature_dropout.default", random=True)
def feature_dropout(x: Array, p: float, train: bool, *, key: Array) -> Array:
    """Whole channels at once."""
    if not train or p == 0:
        return x
    mask = kept(key, (*x.shape[:2], *(1,) * (x.ndim - 2)), p)
    return jnp.where(mask, x / (1 - p), 0) if p < 1 else jnp.zeros_like(x)


@register("aten.alpha_dropout.default", layout="elementwise", random=True)
def alpha_dropout(x: Array, p: float, train: bool, *, key: Array) -> Array:
    """Keeps mean and variance of a SELU network (aten/src/ATen/native/Dropout.cpp)."""
    if not train or p == 0:
        return x
    if p == 1:
        return jnp.zeros_like(x)
    alpha = 1.7580993408473766
    a = 1 / ((alpha**2 * p + 1) * (1 - p)) ** 0.5
    noise = jnp.where(kept(key, x.shape, p), 0, alpha * a)
    return jnp.where(noise == 0, x * a, 0) + (alpha * a * p - noise).astype(x.dtype)


@register("aten.bernoulli.default", layout="elementwise", random=True)
def bernoulli(x: Array, *, generator: None = None, key: Array) -> Array:
    """1 with probability x; no derivative."""
    return jax.random.bernoulli(key, jax.lax.stop_gradient(x)).astype(x.dtype)


@register("aten.bernoulli.p", "aten.bernoulli_.float", layout="elementwise", random=True)
def bernoulli_p(x: Array, p: float = 0.5, *, generator: None = None, key: Array) -> Array:
    return jax.random.bernoulli(key, p, x.shape).astype(x.dtype)


@register("aten.bernoulli.Tensor", random=True)
def bernoulli_tensor(x: Array, p: Array, *, generator: None = None, key: Array) -> Array:
    return jax.random.bernoulli(key, p, x.shape).astype(x.dtype)


def _real(dtype: DType | None) -> DTypeLike:
    return default_float() if dtype is None else jax_dtype(dtype)


@register("aten.rand.default", random=True)
def rand(size: Sequence[Size], *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return jax.random.uniform(key, tuple(size), _real(dtype))


@register("aten.randn.default", random=True)
def randn(size: Sequence[Size], *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return jax.random.normal(key, tuple(size), _real(dtype))


@register("aten.rand_like.default", layout="elementwise", random=True)
def rand_like(x: Array, *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return jax.random.uniform(key, x.shape, x.dtype if dtype is None else jax_dtype(dtype))


@register("aten.randn_like.default", layout="elementwise", random=True)
def randn_like(x: Array, *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return jax.random.normal(key, x.shape, x.dtype if dtype is None else jax_dtype(dtype))


@register("aten.randint.default", random=True)
def randint(high: int, size: Sequence[Size], *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return randint_low(0, high, size, dtype=dtype, key=key)


@register("aten.randint.low", random=True)
def randint_low(
    low: int, high: int, size: Sequence[Size], *, dtype: DType | None = None, key: Array, **_: object
) -> Array:
    drawn = jax.random.randint(key, tuple(size), low, high)
    return drawn.astype(jax_dtype(jnp.int64) if dtype is None else jax_dtype(dtype))


@register("aten.randint_like.default", layout="elementwise", random=True)
def randint_like_below(x: Array, high: int, *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return randint_like(x, 0, high, dtype=dtype, key=key)


@register("aten.randint_like.low_dtype", layout="elementwise", random=True)
def randint_like(x: Array, low: int, high: int, *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return jax.random.randint(key, x.shape, low, high).astype(x.dtype if dtype is None else jax_dtype(dtype))


@register("aten.randperm.default", random=True)
def randperm(n: int, *, dtype: DType | None = None, key: Array, **_: object) -> Array:
    return jax.random.permutation(key, n).astype(jax_dtype(jnp.int64) if dtype is None else jax_dtype(dtype))


@register("aten.uniform.default", "aten.uniform_.default", layout="elementwise", random=True)
def uniform(x: Array, from_: float = 0.0, to: float = 1.0, *, generator: None = None, key: Array) -> Array:
    return jax.random.uniform(key, x.shape, x.dtype, from_, to)


@register("aten.normal.float_float", random=True)
def normal_sized(
    mean: float, std: float, size: Sequence[Size], *, dtype: DType | None = None, key: Array, **_: object
) -> Array:
    return mean + std * jax.random.normal(key, tuple(size), _real(dtype))


@register("aten.normal.Tensor_float", "aten.normal.Tensor_Tensor", random=True)
def normal_tensor(mean: Array, std: Array | float = 1.0, *, generator: None = None, key: Array) -> Array:
    """No derivative, neither by the mean nor by the deviation."""
    mean, std = jax.lax.stop_gradient((mean, std))
    return mean + std * jax.random.normal(key, jnp.broadcast_shapes(mean.shape, jnp.shape(std)), mean.dtype)


@register("aten.normal_functional.default", "aten.normal_.default", layout="elementwise", random=True)
def normal(x: Array, mean: float = 0.0, std: float = 1.0, *, generator: None = None, key: Array) -> Array:
    return mean + std * jax.random.normal(key, x.shape, x.dtype)


@register("aten.log_normal.default", layout="elementwise", random=True)
def log_normal(x: Array, mean: float = 1.0, std: float = 2.0, *, generator: None = None, key: Array) -> Array:
    return jnp.exp(normal(x, mean, std, key=key))


@register("aten.poisson.default", layout="elementwise", random=True)
def poisson(x: Array, generator: None = None, *, key: Array) -> Array:
    """Counts whose mean is x; no derivative."""
    return jax.random.poisson(key, jax.lax.stop_gradient(x)).astype(x.dtype)


@register("aten.exponential.default", layout="elementwise", random=True)
def exponential(x: Array, lambd: float = 1.0, *, generator: None = None, key: Array) -> Array:
    return jax.random.exponential(key, x.shape, x.dtype) / lambd


@register("aten.rrelu.default", layout="elementwise", random=True)
def rrelu(
    x: Array, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: None = None, *, key: Array
) -> Array:
    """Leaky ReLU with a slope drawn for each element, or the mean slope outside training."""
    slope = jax.random.uniform(key, x.shape, x.dtype, lower, upper) if training else (lower + upper) / 2
    return jnp.where(x > 0, x, x * slope)


@register("aten.multinomial.default", random=True)
def multinomial(x: Array, num_samples: int, replacement: bool = False, *, generator: None = None, key: Array) -> Array:
    if replacement:
        drawn = jax.random.categorical(key, jnp.log(x), shape=(num_samples, *x.shape[:-1]))
        return jnp.moveaxis(drawn, 0, -1).astype(jax_dtype(jnp.int64))
    scores = jnp.log(x) + jax.random.gumbel(key, x.shape, x.dtype if is_inexact(x.dtype) else default_float())
    return jax.lax.top_k(scores, num_samples)[1].astype(jax_dtype(jnp.int64))
