"""Recalibrated statistics are the population's: nearer than PyTorch's update_bn and fvcore's precise BN."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jaxnorm
from jaxnorm import TrainState, recalibrate

WIDTH = 5


class Net(nnx.Module):
    def __init__(self, axis_name=None):
        rngs, options = nnx.Rngs(0), {"param_dtype": jnp.float64}
        self.first, self.second = (nnx.Linear(n, WIDTH, rngs=rngs, **options) for n in (3, WIDTH))
        self.bn1, self.bn2 = (
            jaxnorm.nnx.BatchNorm(WIDTH, axis_name=axis_name, count_batches=True, rngs=rngs, **options) for _ in "12"
        )

    def __call__(self, x):
        x = jax.nn.relu(self.bn1(self.first(x)))
        return self.bn2(self.second(x))


class LinenNet(flax.linen.Module):
    axis_name: str | None = None

    @flax.linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = flax.linen.Dense(WIDTH, param_dtype=jnp.float64)(x)
            x = jaxnorm.linen.BatchNorm(use_running_average=False, axis_name=self.axis_name, param_dtype=jnp.float64)(x)
            x = jax.nn.relu(x)
        return x


def batches():
    """Uneven, and of different means."""
    rng = np.random.default_rng(0)
    return [rng.normal(3 * rng.normal(), 1, size=(n, 3)) for n in (16, 7, 2, 30, 16, 3)]


def population(net):
    """Mean and unbiased variance of each layer's input in eval mode, over all data at once. NumPy, float64."""
    x, found = np.concatenate(batches()), []
    for linear, bn in ((net.first, net.bn1), (net.second, net.bn2)):
        x = x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
        found += [x.mean(0), x.var(0, ddof=1)]
        x = (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + bn.epsilon)
        x = np.maximum(x * np.asarray(bn.scale[...]) + np.asarray(bn.bias[...]), 0)
    return found


def statistics(net):
    return [np.asarray(s[...]) for bn in (net.bn1, net.bn2) for s in (bn.mean, bn.var)]


def error(got, expected):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, expected, strict=True)]


def torch_net(net):
    layers = []
    for linear in (net.first, net.second):
        theirs = torch.nn.Linear(linear.in_features, WIDTH).double()
        theirs.weight.data = torch.tensor(np.asarray(linear.kernel[...])).T.contiguous()
        theirs.bias.data = torch.tensor(np.asarray(linear.bias[...]))
        layers += [theirs, torch.nn.BatchNorm1d(WIDTH).double(), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def torch_statistics(module):
    return [s.numpy() for bn in (module[1], module[4]) for s in (bn.running_mean, bn.running_var)]


def precise_bn(module, data):
    """fvcore/nn/precise_bn.py (update_bn_stats, _PopulationVarianceEstimator...): weighted by batch size.

    Each batch's mean and unbiased variance (momentum 1) give its mean and mean square, which are averaged by size.
    """
    momenta = [(bn, bn.momentum) for bn in (module[1], module[4])]
    sums = [np.zeros((2, WIDTH)) for _ in momenta]
    for bn, _ in momenta:
        bn.momentum = 1.0
    module.train()
    total = 0
    with torch.no_grad():
        for x in data:
            module(torch.tensor(x))
            total += len(x)
            for (bn, _), s in zip(momenta, sums, strict=True):
                mean, var = bn.running_mean.numpy(), bn.running_var.numpy()
                s += len(x) * np.stack([mean, var * (len(x) - 1) / len(x) + mean**2])
    found = []
    for mean, square in (s / total for s in sums):
        found += [mean, (square - mean**2) * total / (total - 1)]
    return found


def test_layer_by_layer_gives_the_population_statistics():
    net = Net()
    got = recalibrate(net, batches(), layer_by_layer=True)
    assert max(error(statistics(got), population(net))) < 1e-12
    assert int(got.bn1.num_batches_tracked[...]) == 6
    np.testing.assert_array_equal(net.bn1.mean[...], 0)  # the given model is as it was


def test_nearer_to_the_population_than_update_bn_and_precise_bn():
    net, data = Net(), batches()
    expected = population(net)
    module = torch_net(net)
    torch.optim.swa_utils.update_bn([torch.tensor(x) for x in data], module)
    of_update_bn = error(torch_statistics(module), expected)
    of_precise_bn = error(precise_bn(torch_net(net), data), expected)
    one_pass = error(statistics(recalibrate(net, data)), expected)
    layer_by_layer = error(statistics(recalibrate(net, data, layer_by_layer=True)), expected)
    assert max(one_pass[:2]) < 1e-12 < 0.1 < max(of_update_bn[:2])  # exact where no layer is before
    assert max(one_pass) < max(of_update_bn)
    assert one_pass == pytest.approx(of_precise_bn, abs=1e-9)  # the same quantity, when done in float64
    assert max(layer_by_layer) < 1e-12 < 0.01 < max(of_precise_bn)


def test_far_from_zero_sums_of_squares_lose_what_merged_moments_keep():
    """What is gained on precise BN in one pass: float32 data whose mean is 1e4 deviations away."""
    rng = np.random.default_rng(0)
    data = [(1e4 + rng.normal(size=(n, 4))).astype(np.float32) for n in (100, 30, 7)]
    layer = jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    got = recalibrate(layer, data)
    everything = np.concatenate(data).astype(np.float64)
    np.testing.assert_allclose(got.var[...], everything.var(0, ddof=1), rtol=2e-4)
    x = np.concatenate(data)
    of_squares = (x**2).mean(0) - x.mean(0) ** 2  # as fvcore, in float32
    assert np.abs(of_squares / everything.var(0) - 1).max() > 0.5


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_synchronised_layers_masks_and_train_states(layer_by_layer):
    data = batches()
    expected = statistics(recalibrate(Net(), data, layer_by_layer=layer_by_layer))
    assert max(error(statistics(recalibrate(Net("batch"), data, layer_by_layer=layer_by_layer)), expected)) < 1e-12
    state = TrainState.create(Net(), optax.sgd(0.1))
    after = recalibrate(state, [(x, None) for x in data], layer_by_layer=layer_by_layer)
    assert max(error(statistics(after.model()), expected)) < 1e-12
    replicated = recalibrate(jaxnorm.replicate(state), data, layer_by_layer=layer_by_layer)
    assert max(error(statistics(replicated.model()), expected)) < 1e-12


def test_masked_examples_do_not_count():
    layer = jaxnorm.nnx.BatchNorm(3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    padded = [jaxnorm.pad_batch({"x": x}, 30) for x in batches()]
    got = recalibrate(layer, padded, forward=lambda model, b: model(b["x"], mask=b["mask"][:, None]))
    everything = np.concatenate(batches())
    np.testing.assert_allclose(got.mean[...], everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.var[...], everything.var(0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_linen(axis_name):
    module, data = LinenNet(axis_name), batches()
    variables = LinenNet().init(jax.random.key(0), data[0])
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)
    _, got = recalibrate((module, variables), data, layer_by_layer=True)
    x = np.concatenate(data)
    for i in range(2):
        dense = variables["params"][f"Dense_{i}"]
        x = x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
        stats = got["batch_stats"][f"BatchNorm_{i}"]
        np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(stats["var"], x.var(0, ddof=1), rtol=1e-10)
        x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5), 0)


def test_a_layer_called_twice_sees_both():
    class Twice(nnx.Module):
        def __init__(self):
            self.bn = nnx.BatchNorm(3, rngs=nnx.Rngs(0))  # Flax's own

        def __call__(self, x):
            return self.bn(x), self.bn(x + 10)

    data = [x.astype(np.float32) for x in batches()]
    got = recalibrate(Twice(), data)
    x = np.concatenate([b + shift for b in data for shift in (0, 10)])
    np.testing.assert_allclose(got.bn.mean[...], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.bn.var[...], x.var(0), rtol=1e-5)  # Flax tracks the biased variance


def test_errors_and_progress(capsys):
    with pytest.raises(ValueError, match="no batches"):
        recalibrate(Net(), [])
    with pytest.raises(ValueError, match="called no BatchNorm layer"):
        recalibrate(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), batches())
    with pytest.raises(TypeError, match="give a list or a loader"):
        recalibrate(Net(), iter(batches()), layer_by_layer=True)
    recalibrate(Net(), batches(), progress=True)
    assert "recalibrate" in capsys.readouterr().err
