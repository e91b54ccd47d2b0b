"""Batch renormalisation is what the paper writes, its derivatives too; over replicas it is that of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx

import interop
import jaxnorm

X = np.random.default_rng(0).standard_normal((8, 5, 6)) * [0.5, 1, 2, 3, 1, 9] + [0, 1, -2, 9, 0.8, 3]
MEAN, VAR = np.linspace(-1, 2, 6), np.linspace(0.8, 3, 6)
SCALE, BIAS = np.linspace(0.5, 1.5, 6), np.linspace(-1, 1, 6)
WEIGHTS = np.random.default_rng(1).standard_normal(X.shape)


def torch_renorm(x, scale, bias, mean, var, r_max, d_max, epsilon=1e-5, counted=None):
    """Algorithm 1, channels last, and the running statistics after it with momentum 0.1."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if counted is None else rows[counted.reshape(-1)]
    batch_mean, batch_var = rows.mean(0), rows.var(0, correction=0)
    sigma_batch, sigma = torch.sqrt(batch_var + epsilon), torch.sqrt(var + epsilon)
    r = (sigma_batch / sigma).clamp(1 / r_max, r_max).detach()
    d = ((batch_mean - mean) / sigma).clamp(-d_max, d_max).detach()
    y = ((x - batch_mean) / sigma_batch * r + d) * scale + bias
    with torch.no_grad():
        return y, 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * rows.var(0)


def expected(r_max, d_max, counted=None):
    x, scale, bias = (torch.tensor(a, requires_grad=True) for a in (X, SCALE, BIAS))
    counted = None if counted is None else torch.tensor(counted)
    y, mean, var = torch_renorm(x, scale, bias, torch.tensor(MEAN), torch.tensor(VAR), r_max, d_max, counted=counted)
    (y * torch.tensor(WEIGHTS)).sum().backward()
    return [a.detach().numpy() for a in (y, mean, var, x.grad, scale.grad, bias.grad)]


def nnx_layer(kind=None, **options):
    kind = kind or jaxnorm.nnx.BatchRenorm
    layer = kind(6, momentum=0.9, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    for name, value in {"mean": MEAN, "var": VAR, "scale": SCALE, "bias": BIAS}.items():
        getattr(layer, name)[...] = jnp.asarray(value)
    return layer


def nnx_step(x, weights, mask=None, limits=None, **options):
    """y, running statistics, and the gradients of sum(weights * y)."""
    graph, params, rest = nnx.split(nnx_layer(**options), nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graph, params, rest, copy=True)
        y = layer(x, mask=mask, **(limits or {}))
        return (y * weights).sum(), (y, layer.mean[...], layer.var[...])

    grads, (y, mean, var) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, mean, var, grads[1], grads[0]["scale"][...], grads[0]["bias"][...]


def linen_step(x, weights, mask=None, limits=None, **options):
    layer = jaxnorm.linen.BatchRenorm(use_running_average=False, momentum=0.9, param_dtype=jnp.float64, **options)
    statistics = {"mean": jnp.asarray(MEAN), "var": jnp.asarray(VAR)}

    def loss(params, x):
        variables = {"params": params, "batch_stats": statistics}
        y, moved = layer.apply(variables, x, mask=mask, mutable=["batch_stats"], **(limits or {}))
        return (y * weights).sum(), (y, moved["batch_stats"])

    params = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
    grads, (y, moved) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, moved["mean"], moved["var"], grads[1], grads[0]["scale"], grads[0]["bias"]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


LIMITS = [(3.0, 5.0), (1.5, 0.7), (1.0, 0.0), (1e9, 1e9)]


@pytest.mark.parametrize("step", [nnx_step, linen_step])
@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_outputs_statistics_and_gradients_are_the_papers(step, r_max, d_max):
    assert_close(step(jnp.asarray(X), WEIGHTS, r_max=r_max, d_max=d_max), expected(r_max, d_max))


def test_the_limits_are_reached_and_not_reached_in_these_data():
    """So that the tests above see both sides of every clip."""
    r = np.sqrt((X.var((0, 1)) + 1e-5) / (VAR + 1e-5))
    d = (X.mean((0, 1)) - MEAN) / np.sqrt(VAR + 1e-5)
    for values in (r > 3, r > 1.5, r < 1 / 1.5, abs(d) > 0.7, abs(d) > 5):
        assert 0 < values.sum() < 6
    assert (d < -0.7).any() and (d > 0.7).any()


@pytest.mark.parametrize("step", [nnx_step, linen_step])
def test_limits_given_in_the_call_come_first_and_may_be_traced(step):
    schedule, traced = optax.linear_schedule(1.0, 2.0, 10), []

    @jax.jit
    def run(count):
        traced.append(count)
        return step(jnp.asarray(X), WEIGHTS, limits={"r_max": schedule(count), "d_max": 0.1 * count})

    assert_close(run(5), expected(1.5, 0.5))
    assert_close(run(7), expected(1.7, 0.7000000000000001))
    assert len(traced) == 1


@pytest.mark.parametrize("step", [nnx_step, linen_step])
def test_masked_values_have_no_part_in_the_statistics(step):
    counted = np.random.default_rng(3).random((8, 5)) > 0.3
    found = step(jnp.asarray(X), WEIGHTS, mask=jnp.asarray(counted[..., None]), r_max=1.5, d_max=0.7)
    assert_close(found, expected(1.5, 0.7, counted))


def test_without_correction_it_is_batch_norm_bit_for_bit():
    found, same = nnx_layer(r_max=1, d_max=0), nnx_layer(jaxnorm.nnx.BatchNorm)
    for training in (True, False):
        y = [layer(jnp.asarray(X), use_running_average=not training) for layer in (found, same)]
        np.testing.assert_array_equal(*y)
        np.testing.assert_array_equal(found.var[...], same.var[...])


def test_without_limits_training_computes_what_eval_does():
    layer = nnx_layer(r_max=1e9, d_max=1e9)
    evaluated = layer(jnp.asarray(X), use_running_average=True)
    np.testing.assert_allclose(layer(jnp.asarray(X)), evaluated, rtol=1e-12, atol=1e-12)


def test_kerass_correction_is_the_same_where_its_statistics_are():
    """`_renorm_correction_and_moments` of Keras 2: y = (x_norm r + d) gamma + beta, r = stddev / renorm_stddev and
    d = (mean - renorm_mean) / renorm_stddev, with rmin, rmax and dmax of `renorm_clipping`."""
    stddev, renorm_stddev = np.sqrt(X.var((0, 1)) + 1e-5), np.sqrt(VAR + 1e-5)
    r = np.clip(stddev / renorm_stddev, 1 / 3, 3)
    d = np.clip((X.mean((0, 1)) - MEAN) / renorm_stddev, -5, 5)
    keras = ((X - X.mean((0, 1))) / stddev * r + d) * SCALE + BIAS
    np.testing.assert_allclose(nnx_layer()(jnp.asarray(X)), keras, rtol=1e-12, atol=1e-12)


def over_replicas(how, step, x, weights):
    """Per-replica results of `step`, the batch in 8 parts."""
    if how == "pmap":
        parts = [a.reshape(8, 1, *a.shape[1:]) for a in (x, weights)]
        return jax.pmap(step, axis_name="batch")(*map(jnp.asarray, parts))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")

    def part(x, weights):
        return jax.tree.map(lambda a: a[None], step(x, weights))

    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(x, weights)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_replicas_are_one_device_on_the_whole_batch(how):
    def step(x, weights):
        return nnx_step(x, weights, r_max=1.5, d_max=0.7, axis_name="batch")

    y, mean, var, dx, dscale, dbias = over_replicas(how, step, X, WEIGHTS)
    found = y.reshape(X.shape), mean[3], var[5], dx.reshape(X.shape), dscale.sum(0), dbias.sum(0)
    assert_close(found, expected(1.5, 0.7))


def test_a_converted_model_corrects_over_its_replicas():
    layer = jaxnorm.convert_sync_batchnorm(nnx_layer(), "batch")
    graph, state = nnx.split(layer)
    y = jax.pmap(lambda x: nnx.merge(graph, state, copy=True)(x), axis_name="batch")(X.reshape(8, 1, 5, 6))
    np.testing.assert_allclose(y.reshape(X.shape), expected(3.0, 5.0)[0], rtol=1e-12, atol=1e-12)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, r_max):
            return jaxnorm.linen.BatchRenorm(use_running_average=False, name="norm")(x, r_max=r_max)

    variables = {
        "params": {"norm": {"scale": SCALE, "bias": BIAS}},
        "batch_stats": {"norm": {"mean": MEAN, "var": VAR}},
    }
    net = jaxnorm.convert_sync_batchnorm(Net(), "batch")
    run = jax.pmap(lambda x: net.apply(variables, x, 1.5, mutable=["batch_stats"])[0], axis_name="batch")
    np.testing.assert_allclose(
        run(X.reshape(8, 1, 5, 6)).reshape(X.shape), expected(1.5, 5.0)[0], rtol=1e-12, atol=1e-12
    )


def test_parts_of_a_batch_are_corrected_each_by_itself():
    layer = nnx_layer(axis_index_groups=[[0], [1]], r_max=1.5, d_max=0.7)
    y = layer(jnp.asarray(X))
    for part in (slice(0, 4), slice(4, 8)):
        arguments = (torch.tensor(a) for a in (X[part], SCALE, BIAS, MEAN, VAR))
        np.testing.assert_allclose(y[part], torch_renorm(*arguments, 1.5, 0.7)[0], rtol=1e-12, atol=1e-12)


def test_its_state_dict_is_a_batch_norms_and_recalibrate_finds_it():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx_layer(count_batches=True)

        def __call__(self, x):
            return self.norm(x, r_max=2.0)

    net = Net()
    torch.nn.BatchNorm1d(6).load_state_dict(
        {name.removeprefix("norm."): torch.tensor(value) for name, value in interop.state_dict(net).items()},
        strict=True,
    )
    recalibrated = jaxnorm.recalibrate(net, [jnp.asarray(X)])
    np.testing.assert_allclose(recalibrated.norm.mean[...], X.mean((0, 1)), rtol=1e-12)


def test_float32_and_bfloat16_input():
    for dtype, digits in (("float32", 1e-5), ("bfloat16", 0.1)):
        layer = jaxnorm.nnx.BatchRenorm(6, rngs=nnx.Rngs(0), promote_dtype=jaxnorm.nnx.input_dtype)
        y = layer(jnp.asarray(X, dtype))
        assert y.dtype == dtype
        arguments = (torch.tensor(a) for a in (X, np.ones(6), np.zeros(6), np.zeros(6), np.ones(6)))
        np.testing.assert_allclose(y.astype(float), torch_renorm(*arguments, 3.0, 5.0)[0], rtol=digits, atol=digits)


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ({"r_max": 0.5}, {}, r"r_max is a finite number from 1; got 0\.5"),
        ({"d_max": -1}, {}, "d_max is a finite number from 0; got -1"),
        ({"track_running_stats": False}, {}, "track_running_stats is True"),
        ({}, {"r_max": jnp.zeros(())}, r"r_max is a finite number from 1; got 0\.0"),
        ({}, {"d_max": jnp.ones(3)}, r"d_max is a number, or a scalar of real numbers; got one of shape \(3,\)"),
        ({}, {"x": jnp.ones((3, 6), complex)}, "x is complex128: batch renormalisation"),
    ],
)
def test_wrong_limits_are_refused_by_name(options, given, says):
    with pytest.raises(ValueError, match=says):
        jaxnorm.nnx.BatchRenorm(6, rngs=nnx.Rngs(0), **options)(**{"x": jnp.asarray(X), **given})
    linen_layer = jaxnorm.linen.BatchRenorm(use_running_average=False, **options)
    variables = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": MEAN, "var": VAR}}
    with pytest.raises(ValueError, match=says):
        linen_layer.apply(variables, mutable=["batch_stats"], **{"x": jnp.asarray(X), **given})
