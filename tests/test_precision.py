"""float32 statistics hold their digits at any mean: against float64, on the float32 input taken as exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

MEANS = [0.0, 1e1, 1e2, 1e3, 1e4, 1e5]
RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal((2, 32, 14, 14, 64))
SCALE, BIAS = RNG.standard_normal((2, 64))
AXES = (0, 1, 2)


def reference(x, dy):
    """Output and input gradient in float64, by the closed formula (Ioffe & Szegedy, 2015), in NumPy."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    std = np.sqrt(x.var(AXES) + 1e-5)
    normal = (x - x.mean(AXES)) / std
    dx = SCALE / std * (dy - dy.mean(AXES) - normal * (dy * normal).mean(AXES))
    return normal * SCALE + BIAS, dx


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def op_and_gradient(x, dy, **options):
    scale, bias = jnp.asarray(SCALE, jnp.float32), jnp.asarray(BIAS, jnp.float32)

    def op(x):
        y, moments = jaxnorm.batch_norm(x, scale, bias, **options)
        return y, moments

    y, vjp, moments = jax.vjp(op, x, has_aux=True)
    return y, vjp(dy)[0], moments


@pytest.mark.parametrize("mean", MEANS)
def test_output_gradient_and_variance_are_exact_at_every_mean(mean):
    x, dy = jnp.asarray(X + mean, jnp.float32), jnp.asarray(DY, jnp.float32)
    y, dx, moments = jax.jit(op_and_gradient)(x, dy)
    expected_y, expected_dx = reference(x, dy)
    assert y.dtype == dx.dtype == moments.m2.dtype == jnp.float32
    assert relative_error(y, expected_y) < 1e-6
    assert relative_error(dx, expected_dx) < 1e-6
    np.testing.assert_allclose(moments.variance(), np.asarray(x, np.float64).var(AXES), rtol=1e-5)


@pytest.mark.parametrize("replicas", [2, 8])
@pytest.mark.parametrize("mean", MEANS)
def test_replicas_are_as_exact_as_one_from_the_first_step_on(mean, replicas):
    x, dy = jnp.asarray(X + mean, jnp.float32), jnp.asarray(DY, jnp.float32)

    def step(x, dy):
        y, dx, moments = op_and_gradient(x, dy, axis_name="batch")
        return y, dx, moments.variance()

    parts = (a.reshape(replicas, -1, *X.shape[1:]) for a in (x, dy))
    y, dx, variance = jax.pmap(step, axis_name="batch")(*parts)
    expected_y, expected_dx = reference(x, dy)
    assert relative_error(y.reshape(X.shape), expected_y) < 1e-6
    assert relative_error(dx.reshape(X.shape), expected_dx) < 1e-6
    np.testing.assert_allclose(variance[0], np.asarray(x, np.float64).var(AXES), rtol=1e-5)


def test_replicas_with_means_far_apart_merge_exactly():
    far = np.arange(8.0)[:, None, None, None, None] * 1e4
    x = jnp.asarray(X.reshape(8, 4, 14, 14, 64) + far, jnp.float32)

    def mean_and_variance(x):
        _, moments = jaxnorm.batch_norm(x, axis_name="batch")
        return moments.mean, moments.variance()

    mean, variance = jax.pmap(mean_and_variance, axis_name="batch")(x)
    exact = np.asarray(x, np.float64).reshape(-1, 64)
    np.testing.assert_allclose(variance[0], exact.var(0), rtol=1e-6)
    np.testing.assert_allclose(mean[0], exact.mean(0), rtol=1e-6)


def test_one_wild_part_of_the_batch_does_not_cost_the_variance():
    wild = X.copy()
    wild[0] += 1e3  # the part that places the shift
    x = jnp.asarray(wild, jnp.float32)
    moments = jax.jit(lambda x: jaxnorm.batch_norm(x)[1])(x)
    np.testing.assert_allclose(moments.variance(), np.asarray(x, np.float64).var(AXES), rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -7e5 / 11, 1e-30])
def test_a_constant_channel_normalises_to_exactly_the_bias(value):
    scale, bias = jnp.asarray(SCALE, jnp.float32), jnp.asarray(BIAS, jnp.float32)
    x = jnp.full((16, 5, 5, 64), value, jnp.float32)
    for y in (
        jax.jit(lambda x: jaxnorm.batch_norm(x, scale, bias)[0])(x),
        jax.pmap(lambda x: jaxnorm.batch_norm(x, scale, bias, axis_name="i")[0], axis_name="i")(
            x.reshape(8, 2, 5, 5, 64)
        ),
    ):
        np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_poison_only_their_channel_forward_and_backward(bad):
    clean, dy = jnp.asarray(X[:4], jnp.float32), jnp.asarray(DY[:4], jnp.float32)
    dirty = clean.at[3, 5, 6, 7].set(bad)
    step = jax.jit(op_and_gradient)
    others = np.arange(64) != 7
    for got, expected in zip(jax.tree.leaves(step(dirty, dy)), jax.tree.leaves(step(clean, dy)), strict=True):
        if got.ndim:
            np.testing.assert_array_equal(np.asarray(got)[..., others], np.asarray(expected)[..., others])
            assert not np.isfinite(np.asarray(got)[..., 7]).all()


def test_bfloat16_eval_does_not_round_the_statistics():
    mean, var = jnp.asarray(1e3 + X[0, 0, 0], jnp.float32), jnp.asarray(1e-2 + X[0, 0, 1] ** 2, jnp.float32)
    x = jnp.asarray(1e3 + X, jnp.bfloat16)
    y = jaxnorm.normalize(x, mean, var)
    exact = (np.asarray(x, np.float64) - np.asarray(mean, np.float64)) / np.sqrt(np.asarray(var, np.float64) + 1e-5)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, exact) < 2**-8  # the output's own rounding


def test_bfloat16_training_has_float32_statistics():
    x = jnp.asarray(X + 3, jnp.bfloat16)
    y, moments = jax.jit(jaxnorm.batch_norm)(x)
    assert y.dtype == jnp.bfloat16
    assert moments.mean.dtype == moments.m2.dtype == jnp.float32
    np.testing.assert_allclose(moments.mean, np.asarray(x, np.float64).mean(AXES), rtol=1e-6)


@pytest.mark.parametrize("ratio", [0, 4, 16, 64, 256])
@pytest.mark.parametrize("dtype, unit", [("bfloat16", 2**-9), ("float16", 2**-12)])
def test_sums_of_16_bit_input_cost_less_than_its_own_rounding(dtype, unit, ratio):
    """The bounds of `moments.py`: the variance to 2^-24 (1 + r^2), times 8 for the order of the sums; what rounding the
    input costs lies between, up to u r deviations or, just above a power of two, twice that."""
    x = jnp.asarray(X + ratio, dtype)
    taken = np.asarray(x, np.float64)
    normal = (taken - taken.mean(AXES)) / np.sqrt(taken.var(AXES) + 1e-5)
    y, moments = jax.jit(lambda x: jaxnorm.batch_norm(x, dtype=jnp.float32))(x)
    np.testing.assert_allclose(moments.variance(), taken.var(AXES), rtol=2.0**-21 * (1 + ratio**2))
    assert relative_error(y, normal) < 2.0**-22 * (1 + ratio**2)
    if ratio:
        input_error = np.linalg.norm(taken - (X + ratio)) / np.linalg.norm(X)
        assert relative_error(y, normal) < input_error < 2 * unit * ratio


@pytest.mark.parametrize("replicas", [2, 8])
def test_means_halfway_between_two_floats_are_merged_as_others_are(replicas):
    """12 floats at 1e5 often have such a mean; taken for its neighbour it is off by 1/128."""
    x = (np.random.default_rng(0).standard_normal((replicas, 12, 512)) + 1e5).astype(np.float32)
    wide = x.astype(np.float64).reshape(-1, 512)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    y, _ = jax.pmap(lambda x: jaxnorm.batch_norm(x, axis_name="batch"), axis_name="batch")(x)
    assert relative_error(y.reshape(expected.shape), expected) < 1e-5
