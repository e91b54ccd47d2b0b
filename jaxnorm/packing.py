"""A mean and a sum of squares in two words: more digits of the mean than a float32 holds, where it needs them.

Replicas exchange two numbers for each channel. A float32 mean of 1e4 is good to 5e-4, which would cost a channel of
deviation 1 three digits; the sum of squares next to it has more bits than it needs. So where a mean is large against
the deviation, the sum of squares lends its last bits to the mean. With p = log2(|mean| / deviation),

    lent bits b = (p + 2) / 2:    mean / deviation is good to 2^-(25 + b - p),    m2 to 2^-(25 - b)

which balances the two errors in the normalised output. Where |mean| / deviation is below 4 nothing is lent. float64 has
digits to spare and is sent as it is.

The words, of `m`, the float32 nearest to the mean, the rest `e = mean - m`, |e| <= ulp(m)/2, and m2 >= 0:

    word 1: m        word 2: m2's exponent (8 bits), m2's mantissa (24 - b bits, truncated), e / ulp(m) (b bits)
"""

import jax.numpy as jnp
from jax import lax

from jaxnorm._typing import Array, Float, Int, Shaped

_MOST_LENT = 14  # m2 keeps 10 bits; reached where mean/deviation is 2^26, beyond what float32 input resolves


def pack(
    high: Float[Array, "*channels"],
    low: Float[Array, "*channels"],
    m2: Float[Array, "*channels"],
    count: Float[Array, "..."],
) -> Shaped[Array, "2 *channels"]:
    """Two words for each channel. `high + low` is the mean, `high` its nearest float; `count` values were counted."""
    if high.dtype != jnp.float32:
        return jnp.stack([high, m2])
    count = jnp.broadcast_to(count, m2.shape)
    exponent, mantissa = _split(m2)
    lent = _lent(high, exponent, count)
    half = (1 << lent) >> 1
    steps = jnp.clip(jnp.round(low / _ulp(high) * (1 << lent)), -half, half - 1)
    digits = jnp.where((lent > 0) & jnp.isfinite(steps), steps, 0).astype(jnp.int32) & ((1 << lent) - 1)
    # The sign bit is m2's to use: shift the mantissa up by one.
    word = (exponent << 24) | ((mantissa << 1) >> lent << lent) | digits
    return jnp.stack([_bits(high), word])


def unpack(
    words: Shaped[Array, "..."], count: Float[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """`high`, `low` and `m2` of words stacked along `axis`."""
    first, word = (lax.index_in_dim(words, i, axis, keepdims=False) for i in (0, 1))
    if words.dtype != jnp.int32:
        return first, jnp.zeros_like(first), word
    high = lax.bitcast_convert_type(first, jnp.float32)
    exponent = (word >> 24) & 0xFF
    lent = _lent(high, exponent, jnp.broadcast_to(count, high.shape))
    mask = (1 << lent) - 1
    steps = word & mask
    steps = jnp.where(steps > mask >> 1, steps - (1 << lent), steps)
    low = jnp.where(lent > 0, steps * _ulp(high) / (1 << lent), 0)
    # The middle of what was truncated, so that the error has no sign.
    mantissa = ((word & 0xFFFFFF) >> lent << lent | (1 << lent) >> 1) >> 1
    m2 = lax.bitcast_convert_type((exponent << 23) | mantissa, jnp.float32)
    return high, low, m2


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _split(x: Float[Array, "..."]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    bits = _bits(x)
    return (bits >> 23) & 0xFF, bits & 0x7FFFFF


def _lent(high: Float[Array, "..."], exponent: Int[Array, "..."], count: Float[Array, "..."]) -> Int[Array, "..."]:
    """How many bits m2 lends: a function of what both sides know."""
    # 2 log2(|mean| / deviation), from the exponents alone: deviation^2 = m2 / count.
    twice_p = 2 * (_split(high)[0] - 127) - (exponent - 127) + (_split(count)[0] - 127)
    lent = jnp.minimum((twice_p + 4) >> 2, _MOST_LENT)
    return jnp.where((lent > 1) & (exponent > 0) & (exponent < 255), lent, 0)


def _ulp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The spacing of floats at `x`: 2^(exponent - 23), never 0."""
    exponent = jnp.maximum(_split(x)[0] - 23, 1)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)
