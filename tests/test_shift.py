"""A shift is only a shift: whatever it is, statistics and derivatives are the batch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

X, DY = np.random.default_rng(0).standard_normal((2, 64, 5, 6))
AXES = (0, 1)
SHIFTS = [0.0, 0.9, 3.0, -50.0, 1e6, 1e30, -3e38, np.nan, np.inf, -np.inf]


def reference(x, dy):
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    std = np.sqrt(x.var(AXES) + 1e-5)
    normal = (x - x.mean(AXES)) / std
    return normal, (dy - dy.mean(AXES) - normal * (dy * normal).mean(AXES)) / std


def relative_error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("mean", [0.0, 1e5])
@pytest.mark.parametrize("shift", SHIFTS)
def test_output_gradient_and_moments_do_not_depend_on_it(shift, mean):
    x, dy = jnp.asarray(X + mean, jnp.float32), jnp.asarray(DY, jnp.float32)

    def step(x, dy, shift):
        y, vjp, moments = jax.vjp(lambda x: jaxnorm.batch_norm(x, shift=shift), x, has_aux=True)
        return y, vjp(dy)[0], moments

    y, dx, moments = jax.jit(step)(x, dy, jnp.full(6, shift, jnp.float32))
    expected_y, expected_dx = reference(x, dy)
    assert relative_error(y, expected_y) < 1e-6
    assert relative_error(dx, expected_dx) < 1e-6
    np.testing.assert_allclose(moments.variance(), np.asarray(x, np.float64).var(AXES), rtol=2e-6)
    np.testing.assert_allclose(moments.mean, np.asarray(x, np.float64).mean(AXES), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_channel_that_is_near_its_shift_is_not_touched_by_one_that_is_not(shift):
    x = jnp.asarray(X, jnp.float32)
    shifts = jnp.zeros(6).at[2].set(shift)
    others = np.arange(6) != 2
    found, expected = (jaxnorm.batch_norm(x, shift=s.astype(jnp.float32)) for s in (shifts, jnp.zeros(6)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if a.ndim:
            np.testing.assert_array_equal(np.asarray(a)[..., others], np.asarray(b)[..., others])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_spoilt_running_mean_does_not_reach_the_batch(value):
    layer, clean = (jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0)) for _ in range(2))
    layer.mean[...] = jnp.full(6, value, jnp.float32)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(layer(x), clean(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer.var[...], clean.var[...])


def test_no_derivative_flows_through_it():
    def loss(shift):
        return (jaxnorm.batch_norm(jnp.asarray(X), shift=shift)[0] * DY).sum()

    for shift in (0.1, 50.0):
        np.testing.assert_array_equal(jax.grad(loss)(jnp.full(6, shift)), 0)


@pytest.mark.parametrize("way", ["pmap", "check_vma=False", "check_vma=True"])
def test_replicas_whose_running_means_have_drifted_apart_have_the_statistics_of_the_whole_batch(way):
    x, shifts = jnp.asarray(X, jnp.float32), jnp.asarray(np.arange(48.0).reshape(8, 6), jnp.float32)

    def replica(x, shift):
        y, moments = jaxnorm.batch_norm(x, axis_name="batch", shift=shift.reshape(6))
        return y, jnp.broadcast_to(moments.variance(), (1, 6))

    if way == "pmap":
        y, variance = jax.pmap(replica, axis_name="batch")(x.reshape(8, 8, 5, 6), shifts)
    else:
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
        spread = jax.shard_map(
            replica, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=way.endswith("True")
        )
        y, variance = spread(x, shifts)
    assert relative_error(y.reshape(X.shape), reference(x, DY)[0]) < 1e-6
    np.testing.assert_allclose(variance.reshape(8, 6), np.tile(X.var(AXES), (8, 1)), rtol=1e-6)


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, "model"), P(("data", "model"))])
def test_two_numbers_a_channel_are_sent_whatever_is_sharded(spec):
    from test_parallel import collectives, numbers

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    for size in (8, 32):
        x = jax.ShapeDtypeStruct((8, size, size, 6), jnp.float32, sharding=sharding)

        def step(x, shift):
            return jax.vjp(lambda x: jaxnorm.batch_norm(x, shift=shift)[0], x)[1](x)[0]

        def forward(x, shift):
            return jaxnorm.batch_norm(x, shift=shift)[0]

        shift = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=NamedSharding(mesh, P()))
        # XLA for a CPU adds up along one axis of the mesh after the other.
        axes = 2 if spec == P("data", "model") else 1
        for f, passes in ((forward, 1), (step, 2)):
            compiled = jax.jit(f, out_shardings=sharding).lower(x, shift).compile()
            sent = [numbers(shape) for _, shape in collectives(compiled)]
            assert (len(sent), sum(sent)) == (axes * passes, 2 * 6 * axes * passes)


@pytest.mark.parametrize("deviation", [1e-3, 1.0, 1e6, 1e13, 1e17])
def test_gradients_hold_at_any_deviation(deviation):
    x, dy = jnp.asarray(X * deviation, jnp.float32), jnp.asarray(DY, jnp.float32)
    y, vjp = jax.vjp(lambda x: jaxnorm.batch_norm(x)[0], x)
    expected_y, expected_dx = reference(x, dy)
    assert relative_error(y, expected_y) < 1e-6
    assert relative_error(vjp(dy)[0], expected_dx) < 1e-6


def test_a_sum_of_squares_beyond_float32_is_no_number_and_not_a_wrong_one():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4096, 2)) * [3e18, 1.0], jnp.float32)
    y, moments = jaxnorm.batch_norm(x)
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1]).all()
    assert np.isinf(moments.m2[0])


def test_a_masked_value_that_is_no_number_has_no_part_in_any_derivative():
    keep = np.arange(64)[:, None, None] < 60
    clean = jnp.asarray(X)

    def loss(x, scale, bias):
        y, _ = jaxnorm.batch_norm(x, scale, bias, mask=jnp.asarray(keep))
        return (jnp.where(keep, y, 0) ** 3).sum()

    gradients = jax.grad(loss, (0, 1, 2))
    expected = gradients(clean, jnp.ones(6), jnp.zeros(6))
    for bad in (np.nan, np.inf):
        found = gradients(jnp.where(keep, clean, bad), jnp.ones(6), jnp.zeros(6))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_more_values_than_a_float32_counts_one_by_one():
    mask = jnp.broadcast_to(jnp.arange(2**13)[:, None] < 2**13 - 1, (2**13, 2**12))[..., None]
    x = jnp.broadcast_to(jnp.arange(2**13, dtype=jnp.float32)[:, None, None], (2**13, 2**12, 1))
    counted = jax.jit(lambda x, mask: jaxnorm.moments(x, mask=mask).count)(x, mask)
    assert float(counted) == np.float32((2**13 - 1) * 2**12)  # 33,550,336; adding ones ends at 16,777,216


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_of_a_size_that_is_not_known_yet(dtype, masked):
    (b,) = jax.export.symbolic_shape("b")

    def step(x):
        mask = (jnp.arange(x.shape[0]) < 3)[:, None, None] if masked else None
        return jax.value_and_grad(lambda x: (jaxnorm.batch_norm(x, mask=mask)[0].astype("float32") ** 3).sum())(x)

    exported = jax.export.export(jax.jit(step))(jax.ShapeDtypeStruct((b, 5, 6), dtype))
    for n in (4, 16):
        x = jnp.asarray(X[:n], dtype)
        found, expected = exported.call(x), step(x)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        assert relative_error(found[1], np.float64(expected[1])) < (1e-5 if dtype == "float32" else 1e-2)
