"""Moments: of one array, merged. Against NumPy in float64."""

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

import jaxnorm

VALUES = st.floats(-1e6, 1e6, allow_subnormal=False)

TINY = np.finfo(float).tiny  # XLA takes smaller numbers for 0


def samples(rows):
    return hnp.arrays(np.float64, st.tuples(rows, st.just(3)), elements=VALUES)


@examples(60)
@given(samples(st.sampled_from([1, 2, 33])))
def test_moments_are_those_of_numpy(x):
    found = jaxnorm.moments(jnp.asarray(x))
    scale = np.abs(x).max() + TINY / 1e-14
    assert float(found.count) == len(x)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-14 * scale)
    np.testing.assert_allclose(found.variance(), x.var(0), rtol=1e-10, atol=1e-14 * scale**2 / len(x) + TINY)


@examples(60)
@given(st.lists(samples(st.sampled_from([0, 1, 7])), min_size=1, max_size=3))
def test_merged_parts_are_the_whole_uneven_and_empty_ones_included(parts):
    whole = np.concatenate(parts)
    merged = jaxnorm.merge(*(jaxnorm.moments(jnp.asarray(part)) for part in parts))
    assert float(np.max(merged.count)) == len(whole)
    if len(whole):
        scale = np.abs(whole).max() + TINY / 1e-14
        np.testing.assert_allclose(merged.mean, whole.mean(0), atol=1e-13 * scale)
        np.testing.assert_allclose(merged.m2, whole.var(0) * len(whole), rtol=1e-10, atol=1e-13 * scale**2 + TINY)


def test_complex_parts_are_merged_by_their_absolute_squares():
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(12, 3)) + 1j * rng.normal(size=(12, 3)) + np.arange(12)[:, None] * 1j
    merged = jaxnorm.merge(*(jaxnorm.moments(jnp.asarray(part)) for part in np.split(whole, [2, 7])))
    assert jnp.isrealobj(merged.m2)
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.variance(), whole.var(0), rtol=1e-13)


@examples(40)
@given(samples(st.just(12)), hnp.arrays(bool, (12, 3)), st.sampled_from([(12, 3), (12, 1)]))
def test_a_mask_is_the_same_as_leaving_values_out(x, mask, shape):
    mask = mask[:, : shape[1]]
    poisoned = np.where(mask, x, np.nan)  # what does not count is not looked at
    found = jaxnorm.moments(jnp.asarray(poisoned), mask=jnp.asarray(mask))
    for channel in range(3):
        kept = x[mask[:, channel % mask.shape[1]], channel]
        count = np.broadcast_to(found.count, 3)[channel]
        assert count == len(kept)
        if len(kept):
            scale = np.abs(kept).max() + 1e-300
            np.testing.assert_allclose(found.mean[channel], kept.mean(), atol=1e-14 * scale)
            np.testing.assert_allclose(
                found.m2[channel], kept.var() * len(kept), rtol=1e-9, atol=1e-13 * scale**2 + TINY
            )


@pytest.mark.parametrize("axis", [0, 1, -1, 2, (0, 2), (1, -1)])
def test_channels_lie_along_any_axis_or_axes(axis):
    x = np.random.default_rng(0).standard_normal((3, 4, 5))
    kept = {a % 3 for a in np.atleast_1d(axis)}
    reduced = tuple(a for a in range(3) if a not in kept)
    found = jaxnorm.moments(jnp.asarray(x), axis=axis)
    np.testing.assert_allclose(found.mean, x.mean(reduced), rtol=1e-13)
    np.testing.assert_allclose(found.variance(correction=1), x.var(reduced, ddof=1), rtol=1e-13)


def test_a_variance_without_degrees_of_freedom_is_nan_not_a_number_made_up():
    found = jaxnorm.moments(jnp.ones((1, 3)))
    assert np.isnan(found.variance(correction=1)).all()
    np.testing.assert_array_equal(found.variance(), 0)


@pytest.mark.parametrize("axis", [3, -4, (0, 0), (0, -3)])
def test_an_axis_that_does_not_exist_is_an_error(axis):
    with pytest.raises(ValueError, match="axis must name distinct axes"):
        jaxnorm.moments(jnp.ones((2, 3, 4)), axis=axis)


def test_complex_moments_are_those_of_the_modulus():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 3)) + 1j * rng.standard_normal((20, 3)) + 5
    found = jaxnorm.moments(jnp.asarray(x))
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.variance(), x.var(0), rtol=1e-12)
