"""Arithmetic at its limits: what does not count may be no number, deviations of any size, counters at their end."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxnorm
from jaxnorm import LossScale

MASK = np.random.default_rng(1).random((8, 3)) < 0.7
MASK[:3] = True
BAD = [np.nan, np.inf, -np.inf, 3e38, -3e38]


def _operation(x, scale, bias, mask, activation):
    return jaxnorm.batch_norm(x, scale, bias, mask=mask, activation=activation, shift=jnp.full(3, -2e38, x.dtype))[0]


def _normalize(x, scale, bias, mask, activation):
    return jaxnorm.normalize(x, jnp.zeros(3), jnp.full(3, 1e-3), scale, bias, mask=mask, activation=activation)


def _nnx(x, scale, bias, mask, activation, evaluate=False):
    layer = jaxnorm.nnx.BatchNorm(3, activation=activation, use_running_average=evaluate, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = scale, bias
    return layer(x, mask=mask)


def _linen(x, scale, bias, mask, activation, evaluate=False):
    layer = jaxnorm.linen.BatchNorm(evaluate, activation=activation)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[0]


LAYERS = {
    "batch_norm": _operation,
    "normalize": _normalize,
    "nnx": _nnx,
    "nnx, eval": lambda *args: _nnx(*args, evaluate=True),
    "linen": _linen,
    "linen, eval": lambda *args: _linen(*args, evaluate=True),
}


@pytest.mark.parametrize(
    "activation", [None, jax.nn.gelu, lambda y: y * jax.nn.sigmoid(y)], ids=["none", "gelu", "swish"]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_does_not_count_has_no_part_in_any_derivative(layer, activation):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    run = LAYERS[layer]

    @jax.jit
    def gradients(x):
        def loss(x, scale, bias):
            y = run(x, scale, bias, jnp.asarray(MASK), activation)
            return jnp.where(MASK, jnp.sin(y) * (1 + jnp.arange(24.0).reshape(8, 3)), 0).sum()

        scale, bias = jnp.asarray([1.5, 100.0, -2.0], jnp.float32), jnp.asarray([0.1, 0.2, 0.3], jnp.float32)
        value, of_all = jax.value_and_grad(loss, (0, 1, 2))(x, scale, bias)
        return value, (jnp.where(MASK, of_all[0], 0), *of_all[1:]), jnp.where(MASK, 0, of_all[0])

    expected = gradients(np.where(MASK, x, 0))
    for bad in BAD:
        value, found, of_masked = gradients(np.where(MASK, x, np.float32(bad)))
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        for a, b in zip(found, expected[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
        np.testing.assert_array_equal(of_masked, 0)


def test_what_does_not_count_comes_out_as_it_is():
    x = jnp.asarray([[1.0], [2.0], [np.nan], [np.inf]])
    mask = jnp.asarray([[True], [True], [False], [False]])
    y, _ = jaxnorm.batch_norm(x, mask=mask)
    assert np.isfinite(y[:2]).all() and np.isnan(y[2, 0]) and np.isposinf(y[3, 0])


@pytest.mark.parametrize("exponent", range(-15, 19, 3))
def test_gradients_hold_at_any_deviation(exponent):
    deviation, rng = 10.0**exponent, np.random.default_rng(0)
    x, weights = rng.normal(size=(64, 2)), rng.normal(size=(64, 2))
    wide = torch.tensor(x * deviation, requires_grad=True)
    scale = torch.tensor([1.5, -2.0], dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.batch_norm(wide, None, None, scale, training=True, eps=1e-5)
    (y * torch.tensor(weights)).sum().backward()
    narrow = (x * deviation).astype(np.float32)

    def loss(x, scale):
        return (jaxnorm.batch_norm(x, scale)[0] * weights.astype(np.float32)).sum()

    found = jax.grad(loss, (0, 1))(jnp.asarray(narrow), jnp.asarray([1.5, -2.0], jnp.float32))
    for got, expected in zip(found, (wide.grad, scale.grad), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))

    var, inverse = np.float32(deviation) ** 2, 1 / np.sqrt(np.float64(np.float32(deviation) ** 2) + 1e-5)
    of_var = jax.grad(lambda v: jaxnorm.normalize(jnp.asarray([[deviation]], jnp.float32), jnp.zeros(1), v).sum())
    np.testing.assert_allclose(of_var(jnp.asarray([var])), [-0.5 * deviation * inverse**3], rtol=1e-4)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_counter_of_batches_stays_at_its_largest(kind):
    largest, x = jnp.iinfo(jnp.int32).max, jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    start = {"mean": jnp.full(3, 5.0, jnp.float32), "var": jnp.full(3, 7.0, jnp.float32)}
    for count in (largest - 1, largest):
        counter = jnp.asarray(count, jnp.int32)
        if kind == "nnx":
            layer = jaxnorm.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
            layer.num_batches_tracked.set_value(counter)
            layer.mean[...], layer.var[...] = start["mean"], start["var"]
            layer(x)
            found = {
                "num_batches_tracked": layer.num_batches_tracked[...],
                "mean": layer.mean[...],
                "var": layer.var[...],
            }
        else:
            layer = jaxnorm.linen.BatchNorm(False, momentum=None)
            variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": {**start, "num_batches_tracked": counter}}  # fmt: skip  # noqa: E501
            found = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
        assert int(found["num_batches_tracked"]) == largest
        for name in start:  # the share of a batch is 2^-31
            np.testing.assert_allclose(found[name], start[name], rtol=1e-6)


def test_the_loss_scale_is_grad_scalers_up_to_the_largest():
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**125, growth_interval=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.0)
    ours = LossScale.dynamic(2.0**125)
    for finite in [1] * 9 + [0, 1, 1, 1, 0, 0, 0] + [1] * 12:
        theirs.scale(torch.zeros(()))
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([0.0 if finite else np.inf])
        theirs.step(optimizer)
        theirs.update()
        ours = ours.update(jnp.asarray(bool(finite)), interval=2)
        assert float(ours.scale) == theirs.get_scale() < np.inf
        assert int(ours.good_steps) == theirs._growth_tracker.item()


def test_a_top_level_layer_is_named_in_errors():
    layer = jaxnorm.convert_sync_batchnorm(jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), axis_name="batch")
    with pytest.raises(NameError) as raised:
        layer(jnp.ones((4, 3)))
    assert raised.value.__notes__ == ["in the model itself, a BatchNorm layer (3 features)"]
    assert isinstance(layer, flax.nnx.BatchNorm)
