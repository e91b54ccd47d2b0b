"""The two words that replicas exchange: what they keep of a mean and a sum of squares, and what passes unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnorm.packing import pack, unpack

COUNTS = st.sampled_from([1.0, 2.0, 3.0, 7.0, 784.0, 12544.0, 5e7])


@jax.jit
def there_and_back(high, low, m2, count):
    words = pack(high, low, m2, count)
    assert words.shape == (2, *high.shape) and words.dtype.itemsize == high.dtype.itemsize
    return unpack(words[None], count, axis=1)


def passed(mean, m2, count):
    """The float64 mean and m2 after the way: `mean` and `m2` in float64, sent as float32."""
    mean, m2, count = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (mean, m2, count)))
    high = mean.astype(np.float32)
    low = (mean - high).astype(np.float32)
    found = there_and_back(high, low, m2.astype(np.float32), count.astype(np.float32))
    high, low, m2 = (np.asarray(part[0], np.float64) for part in found)
    return high + low, m2


def assert_bounds(mean, deviation, count):
    m2 = np.float64(np.float32(deviation**2 * count))
    deviation = np.sqrt(m2 / count)
    found_mean, found_m2 = passed(mean, m2, count)
    p = np.log2(np.maximum(np.abs(mean) / deviation, 1))
    # The float form lends between p/2 - 0.5 and p/2 + 1.25 bits, for exponents alone tell it p.
    mean_bound, m2_bound = 2 ** (p / 2 - 22.5), 2 ** (p / 2 - 22.75)
    # Between 9 and 11, and 17 and 19, either form may be chosen.
    mean_bound = np.where(p < 9, mean_bound, np.where(p > 19, mean_bound, np.maximum(mean_bound, 2.0**-19)))
    surely = (p > 11) & (p < 17)
    mean_bound, m2_bound = (np.where(surely, 2.0**-19, bound) for bound in (mean_bound, m2_bound))
    assert (np.abs(found_mean - mean) <= mean_bound * deviation).all()
    assert (np.abs(found_m2 - m2) <= m2_bound * m2).all()


def test_digits_at_every_mean():
    rng = np.random.default_rng(0)
    p, scale = rng.uniform(-5, 24, 200_000), 2 ** rng.uniform(-20, 20, 200_000)
    count = rng.choice([2.0, 3.0, 784.0, 12544.0], p.shape)
    assert_bounds(rng.choice([-1, 1], p.shape) * 2**p * scale, scale, count)


def test_means_next_to_powers_of_two():
    # Where exponents change, and where the integer of the fixed form is at the end of its 37 bits.
    powers = 2.0 ** np.arange(-3, 24)
    beside = [powers, np.nextafter(powers, 0), np.nextafter(np.float32(powers), np.float32(0)).astype(float)]
    means = np.concatenate([*beside, powers * (1 - 2.0**-25), powers * (1 - 2.0**-38), powers * (1 + 2.0**-30)])
    for deviation in (0.5, 0.7, 0.99999, 1.0, 1.00001, 1.4, 1.42, 1.99999):
        for count in (1.0, 3.0, 784.0):
            assert_bounds(np.concatenate([means, -means]), deviation, count)


FLOATS = st.floats(width=32, allow_subnormal=False)


@given(FLOATS, st.sampled_from([0.0, np.inf, np.nan, -np.nan]), COUNTS)
def test_a_mean_beside_no_deviation_or_none_that_is_a_number_passes_unchanged(mean, m2, count):
    high, low, found = there_and_back(*(np.full((1,), a, np.float32) for a in (mean, 0, m2, count)))
    np.testing.assert_array_equal(high[0] + low[0], np.float32(mean))
    np.testing.assert_array_equal(found[0], np.float32(m2))


@given(FLOATS, st.floats(0, width=32, allow_subnormal=False), COUNTS)
def test_no_numbers_fail(mean, m2, count):
    # Of any size together: the mean passes to float32's digits at least, or to the deviation's.
    high, low, found = there_and_back(*(np.full((1,), a, np.float32) for a in (mean, 0, m2, count)))
    with np.errstate(invalid="ignore"):
        error = np.abs(np.float64(high[0]) + np.float64(low[0]) - mean)
    deviation = np.sqrt(np.float64(m2) / count)
    assert error <= max(2.0**-18 * deviation, 2.0**-24 * abs(mean)) if np.isfinite(mean) else not np.isfinite(high[0])
    np.testing.assert_allclose(found[0], m2, rtol=2.0**-9)


@pytest.mark.parametrize("dtype", [jnp.float64])
def test_float64_is_sent_as_it_is(dtype):
    high, low, m2 = jnp.asarray([1e9, -3.5], dtype), jnp.zeros(2, dtype), jnp.asarray([1.1, 0.0], dtype)
    for found, sent in zip(there_and_back(high, low, m2, jnp.asarray([5.0], dtype)), (high, low, m2), strict=True):
        np.testing.assert_array_equal(found[0], sent)
