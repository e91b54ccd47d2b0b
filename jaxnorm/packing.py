"""A mean and a sum of squares in two words: more digits of the mean than a float32 holds, where it needs them.

Replicas exchange two numbers for each channel. A float32 mean of 1e4 is good to 5e-4, which would cost a channel of
deviation 1 three digits; the sum of squares next to it has more bits than it needs. So where a mean is large against
the deviation, the sum of squares lends its last bits to the mean. With p = log2(|mean| / deviation) there are two
forms:

              word 1                 word 2
    float     m, a float32           0, m2's exponent (8), m2's mantissa (23 - b), e / ulp(m) (b bits)
    fixed     n >> 5, an integer     1, m2's exponent (8), m2's mantissa (18),     n & 31     (5 bits)

The float form has the float32 nearest to the mean, m, and the rest e = mean - m. It lends b = (p + 2) / 2 bits, and
none where p < 2: mean / deviation is then good to 2^-(25 + b - p), m2 to 2^-(24 - b). Where p is about 10 or more, a
float32's exponent and the digits that lie far below the deviation say nothing that is needed, and the fixed form takes
over: n = round(mean / u) with u = 2^-18 of the largest power of two up to the deviation, good to 2^-19 of the deviation
as long as n fits into 37 bits, which it does up to p = 18. In both forms m2 >= 0 leaves the sign bit to tell them
apart.

float64 has digits to spare and is sent as it is."""

import jax.numpy as jnp
from jax import lax

from jaxnorm._typing import Array, Bool, Float, Int, Shaped

_MOST_LENT = 14  # m2 keeps 10 bits; reached where mean/deviation is 2^26, beyond what float32 input resolves
_FIXED_LENT = 5
_FRACTION = 18  # bits of n below the power of two
_LOW = 17  # bits of n that are unpacked into the second float
_FIXED = -(1 << 31)  # the sign bit


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
    square = _bits(m2) & ~_FIXED  # a NaN may have a sign

    lent = _lent(high, square, count)
    half = (1 << lent) >> 1
    steps = jnp.clip(jnp.round(low / _power(_exponent(high) - 23) * (1 << lent)), -half, half - 1)
    digits = jnp.where((lent > 0) & jnp.isfinite(steps), steps, 0).astype(jnp.int32) & ((1 << lent) - 1)
    as_float = _bits(high), square >> lent << lent | digits

    unit = _unit(square >> _FIXED_LENT << _FIXED_LENT, count)
    fixed = _fits_fixed(high, square, unit)
    scaled = jnp.where(fixed, high, 0) / _power(unit)
    upper = jnp.floor(scaled / (1 << _FIXED_LENT))
    rest = jnp.round((scaled - upper * (1 << _FIXED_LENT)) + jnp.where(fixed, low, 0) / _power(unit)).astype(jnp.int32)
    as_fixed = (
        upper.astype(jnp.int32) + (rest >> _FIXED_LENT),
        _FIXED | square >> _FIXED_LENT << _FIXED_LENT | rest & ((1 << _FIXED_LENT) - 1),
    )
    return jnp.stack([jnp.where(fixed, *words) for words in zip(as_fixed, as_float, strict=True)])


def unpack(
    words: Shaped[Array, "..."], count: Float[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """`high`, `low` and `m2` of words stacked along `axis`; the mean is `high + low`."""
    first, second = (lax.index_in_dim(words, i, axis, keepdims=False) for i in (0, 1))
    if words.dtype != jnp.int32:
        return first, jnp.zeros_like(first), second
    count = jnp.broadcast_to(count, first.shape)
    fixed, square = second < 0, second & ~_FIXED

    high = lax.bitcast_convert_type(first, jnp.float32)
    lent = jnp.where(fixed, _FIXED_LENT, _lent(high, square, count))
    mask = (1 << lent) - 1
    steps = square & mask
    signed = jnp.where(steps > mask >> 1, steps - (1 << lent), steps)
    low = jnp.where(lent > 0, signed * _power(_exponent(high) - 23) / (1 << lent), 0)

    unit = _power(_unit(square >> _FIXED_LENT << _FIXED_LENT, count))
    shift = _LOW - _FIXED_LENT
    fixed_high = (first >> shift).astype(jnp.float32) * (1 << _LOW) * unit
    fixed_low = ((first & ((1 << shift) - 1)) << _FIXED_LENT | steps).astype(jnp.float32) * unit

    # The middle of what was truncated, so that the error has no sign.
    m2 = lax.bitcast_convert_type(square >> lent << lent | (1 << lent) >> 1, jnp.float32)
    return jnp.where(fixed, fixed_high, high), jnp.where(fixed, fixed_low, low), m2


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _exponent(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """As it is stored: 127 for 1."""
    return (_bits(x) >> 23) & 0xFF


def _power(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^(exponent - 127), never 0."""
    return lax.bitcast_convert_type(jnp.clip(exponent, 1, 254) << 23, jnp.float32)


def _twice_log(high: Float[Array, "..."], square: Int[Array, "..."], count: Float[Array, "..."]) -> Int[Array, "..."]:
    """2 log2(|mean| / deviation) to within 2, from the exponents alone: deviation^2 = m2 / count."""
    return 2 * (_exponent(high) - 127) - ((square >> 23) - 127) + (_exponent(count) - 127)


def _regular(square: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether m2 is neither 0 (or as good as) nor infinite nor NaN."""
    return (square >= 1 << 23) & (square < 255 << 23)


def _lent(high: Float[Array, "..."], square: Int[Array, "..."], count: Float[Array, "..."]) -> Int[Array, "..."]:
    """How many bits m2 lends in the float form: a function of what both sides know."""
    lent = jnp.minimum((_twice_log(high, square, count) + 4) >> 2, _MOST_LENT)
    return jnp.where((lent > 1) & _regular(square), lent, 0)


def _unit(square: Int[Array, "..."], count: Float[Array, "..."]) -> Int[Array, "..."]:
    """The stored exponent of u: a function of the m2 and count that both sides know, in integers and so exact.

    Between 30 and 180 for every m2 that is a normal float32: scaling by u is exact.
    """
    less = (square & 0x7FFFFF) < (_bits(count) & 0x7FFFFF)
    variance = (square >> 23) - _exponent(count) - less  # floor(log2(m2 / count))
    return (variance >> 1) + 127 - _FRACTION


def _fits_fixed(high: Float[Array, "..."], square: Int[Array, "..."], unit: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether the fixed form is the better one and holds the mean: from about 2^9 to 2^18 deviations."""
    above = _exponent(high) - unit - _FRACTION  # floor(log2(|mean|)) - floor(log2(deviation))
    room = float(2**36 - 2**13)  # less than a sign and 36 bits, for what `low` may add
    return _regular(square) & (above >= 10) & (jnp.abs(high) / _power(unit) < room)
