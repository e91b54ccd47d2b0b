"""Frozen BatchNorm: the same in training and eval, nothing of it trains or moves, and it goes home."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import torchvision
from flax import linen, nnx
from parity_tools import assert_same_step, jax_step, normal, randomised, relative, to_jax, torch_step
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import interop
import jaxnorm


class Detectron2(nn.Module):
    """As detectron2's FrozenBatchNorm2d (detectron2/layers/batch_norm.py): one way with gradients, one without."""

    _version = 3

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return F.batch_norm(x, *given, training=False, eps=self.eps)


def drawn(module):
    generator = torch.Generator().manual_seed(0)
    for name, buffer in module.double().named_buffers():
        low, high = (-0.5, 0.5) if name.endswith(("bias", "mean")) else (0.5, 1.5)
        buffer.copy_(low + (high - low) * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return module


def go_home(model, module):
    module.load_state_dict(
        {name: torch.tensor(value) for name, value in interop.state_dict(model).items()}, strict=True
    )


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, Detectron2])
def test_an_imported_frozen_layer_is_the_same_in_both_modes_and_nothing_of_it_trains(kind):
    module = drawn(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, eps=1e-3), nn.ReLU(), nn.Conv2d(4, 2, 3))).train()
    x = normal(2, 3, 8, 8)
    model = interop.from_torch(module, x)
    before = interop.state_dict(model)
    for training in (True, False):
        module.train(training)
        model.train() if training else model.eval()
        found = jax_step(model, to_jax(x))
        assert_same_step(found, torch_step(module, x), 1e-12)
        assert set(found.grads) == {"0.weight", "0.bias", "3.weight", "3.bias"}
        for name in ("weight", "bias", "running_mean", "running_var"):
            np.testing.assert_array_equal(found.state[f"1.{name}"], before[f"1.{name}"])
    go_home(model, drawn(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 2, 3))))


@pytest.mark.once
def test_a_detection_backbone_with_frozen_layers():
    module = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d, num_classes=5)
    body = drawn(nn.Sequential(*list(module.children())[:5])).train()  # to layer1
    x = normal(2, 3, 32, 32)
    model = interop.from_torch(body, x)
    assert_same_step(jax_step(model, to_jax(x)), torch_step(body, x), 1e-12)
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    go_home(model, body)


class Net(nnx.Module):
    def __init__(self, norm):
        self.conv = nnx.Conv(3, 4, (3, 3), param_dtype=jnp.float64, padding="VALID", rngs=nnx.Rngs(0))
        self.norm = norm

    def __call__(self, x):
        return self.norm(self.conv(x))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), param_dtype=jnp.float64, padding="VALID", name="conv")(x)
        return jaxnorm.linen.FrozenBatchNorm(epsilon=1e-3, param_dtype=jnp.float64, name="norm")(x)


class TorchNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4, eps=1e-3)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_a_hand_written_model_speaks_pytorchs_names_and_computes_what_torchvisions_layer_does():
    module, x = drawn(TorchNet()), normal(2, 3, 8, 8)
    state_dict = {name: value.numpy() for name, value in module.state_dict().items()}
    expected = module(x).detach().numpy().transpose(0, 2, 3, 1)
    images = to_jax(x).transpose(0, 2, 3, 1)
    net = interop.load_state_dict(
        Net(jaxnorm.nnx.FrozenBatchNorm(4, epsilon=1e-3, param_dtype=jnp.float64)), state_dict
    )
    linen_net = LinenNet()
    variables = interop.load_state_dict((linen_net, linen_net.init(jax.random.key(0), images)), state_dict)
    variables = variables[1] if isinstance(variables, tuple) else variables
    for training in (True, False):
        net.train() if training else net.eval()
        np.testing.assert_allclose(net(images), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(linen_net.apply(variables, images), expected, rtol=1e-12, atol=1e-12)
    for held in (net, (linen_net, variables)):
        found = interop.state_dict(held)
        assert list(found) == list(state_dict)
        for name, value in state_dict.items():
            np.testing.assert_array_equal(found[name], value)
    go_home(net, module)
    # nothing of the layer is a parameter
    assert set(nnx.state(net, nnx.Param)) == {"conv"} and set(variables["params"]) == {"conv"}


def test_a_training_step_leaves_it_alone():
    net = Net(jaxnorm.nnx.FrozenBatchNorm(4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    before = interop.state_dict(net)
    state = jaxnorm.TrainState.create(net, optax.adamw(0.1, weight_decay=0.5))
    step = jaxnorm.train_step(lambda model, batch: (jnp.mean(model(batch["x"]) ** 2), {}))
    state, _ = jax.jit(step)(state, {"x": to_jax(normal(2, 8, 8, 3)) + 3})
    after = interop.state_dict(state.model())
    assert not np.array_equal(before["conv.weight"], after["conv.weight"])
    for name in before:
        if name.startswith("norm."):
            np.testing.assert_array_equal(before[name], after[name])


class Many(nnx.Module):
    """Flax's layers and ours, one shared, one in eval mode, a frozen one, two that share a scale."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            [
                nnx.BatchNorm(6, momentum=0.8, epsilon=1e-3, param_dtype=jnp.float64, rngs=rngs),
                jaxnorm.nnx.BatchNorm(6, momentum=None, activation=jnp.tanh, param_dtype=jnp.float64, rngs=rngs),
                jaxnorm.nnx.BatchRenorm(6, use_bias=False, param_dtype=jnp.float64, r_max=2.0, rngs=rngs),
                jaxnorm.nnx.FrozenBatchNorm(6, param_dtype=jnp.float64),
                jaxnorm.nnx.BatchNorm(6, track_running_stats=True, param_dtype=jnp.float64, rngs=rngs),
            ]
        )
        self.shared = self.layers[0]
        self.layers[4].scale = self.layers[1].scale
        self.layers[1].use_running_average = True
        for index, layer in enumerate([*self.layers]):
            for name in ("scale", "bias", "mean", "var"):
                if (variable := getattr(layer, name)) is not None:
                    variable.set_value(variable[...] + 0.1 * index + jnp.linspace(0, 1, 6))  # in float64

    def __call__(self, x):
        for layer in [*self.layers, self.shared]:
            x = layer(x)
        return x


X = to_jax(normal(16, 3, 6))


def test_a_converted_model_computes_what_eval_does_in_both_modes_and_comes_back_as_it_was():
    model = Many()
    graph, state = nnx.split(model)
    evaluated = nnx.merge(graph, state, copy=True)
    evaluated.eval()
    expected = evaluated(X)
    frozen = jaxnorm.convert_frozen_batchnorm(model)
    assert nnx.graphdef(model) == graph  # the original is as it was
    assert all(type(layer) is jaxnorm.nnx.FrozenBatchNorm for layer in frozen.layers)
    assert frozen.shared is frozen.layers[0] and frozen.layers[4].scale is frozen.layers[1].scale
    assert not jax.tree.leaves(nnx.state(frozen, nnx.Param))
    values = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(frozen)))
    for turn in (frozen.train, frozen.eval, lambda: None):
        turn()
        np.testing.assert_allclose(frozen(X), expected, rtol=1e-12, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, values, nnx.to_pure_dict(nnx.state(frozen)))
    split = nnx.merge(*nnx.split(jaxnorm.convert_frozen_batchnorm(model)), copy=True)
    np.testing.assert_allclose(split(X), expected, rtol=1e-12, atol=1e-12)

    once = jaxnorm.convert_frozen_batchnorm(model)
    assert nnx.graphdef(once) == nnx.graphdef(jaxnorm.convert_frozen_batchnorm(once))
    back = jaxnorm.revert_frozen_batchnorm(once)
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in model.layers]
    assert [layer.use_running_average for layer in back.layers] == [layer.use_running_average for layer in model.layers]
    assert back.shared is back.layers[0] and back.layers[4].scale is back.layers[1].scale
    assert [type(v) for _, v in nnx.to_flat_state(nnx.state(back))] == [type(v) for _, v in nnx.to_flat_state(state)]
    back, model = nnx.clone(back), nnx.clone(model)  # which share their statistics
    np.testing.assert_array_equal(back(X), model(X))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(back)), nnx.to_pure_dict(nnx.state(model)))


def test_synchronising_and_recalibrating_leave_frozen_layers_alone():
    frozen = jaxnorm.convert_frozen_batchnorm(Many())
    with pytest.warns(UserWarning, match="Many has no BatchNorm layer to convert"):
        jaxnorm.convert_sync_batchnorm(frozen, "batch")
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        jaxnorm.recalibrate(frozen, [X])

    class Both(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jaxnorm.linen.FrozenBatchNorm(axis_name="no such axis", name="frozen")(x)
            return jaxnorm.linen.BatchNorm(use_running_average=False, momentum=None, name="norm")(x)

    net = Both()
    variables = net.init(jax.random.key(0), X)
    _, moved = jaxnorm.recalibrate((net, variables), [X])
    assert not moved["batch_stats"]["frozen"]["mean"].any() and moved["batch_stats"]["norm"]["mean"].any()
    run = jaxnorm.convert_sync_batchnorm(net, "batch").apply
    y = jax.vmap(lambda x: run(variables, x, mutable=["batch_stats"])[0], axis_name="batch")(X.reshape(2, 8, 3, 6))
    expected, _ = net.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(X.shape), expected, rtol=1e-6, atol=1e-6)


def test_an_imported_model_is_converted_kept_and_taken_home(tmp_path):
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))).train()
    x = normal(2, 3, 8, 8)
    frozen = jaxnorm.convert_frozen_batchnorm(interop.from_torch(module, x))
    module[1].eval().requires_grad_(False)
    expected = torch_step(module, x)
    interop.save(frozen, tmp_path)
    for model in (frozen, interop.load(tmp_path)):
        model.eval(), model.train()
        found = jax_step(model, to_jax(x))
        assert_same_step(found, expected, 1e-12)
        assert set(found.grads) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    go_home(frozen, module)
    back = jaxnorm.revert_frozen_batchnorm(frozen)
    module[1].requires_grad_(True)
    assert_same_step(jax_step(back, to_jax(x)), torch_step(module.train(), x), 1e-12)


def test_freeze_leaves_the_statistics_moving_and_train_undoes_eval_of_one_layer():
    """What docs/batch_norm_variants.md says of `interop.freeze`."""
    module = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).train()
    x = to_jax(normal(6, 3))
    model = interop.from_torch(module, normal(6, 3))
    interop.freeze(model, "1")
    layer = getattr(model, "1")
    before = layer.mean[...]
    layer.use_running_average = True
    model(x)
    np.testing.assert_array_equal(layer.mean[...], before)
    model.train()
    model(x)
    assert relative(layer.mean[...], before) > 1e-3


class Scaled(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_what_cannot_be_frozen_is_refused_by_name():
    with pytest.raises(TypeError, match=r"model: the layer 'norm' is a Scaled, with a __call__ of its own"):
        jaxnorm.convert_frozen_batchnorm(Net(Scaled(4, rngs=nnx.Rngs(0))))
    for function in (jaxnorm.convert_frozen_batchnorm, jaxnorm.revert_frozen_batchnorm):
        with pytest.raises(TypeError, match=r"model: .* the Linen module LinenNet.*linen.FrozenBatchNorm"):
            function(LinenNet())
        with pytest.raises(TypeError, match=r"model: expected a flax\.nnx\.Module"):
            function({})
        with pytest.warns(UserWarning, match="Linear has no BatchNorm layer"):
            function(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"scale has shape|mean has shape"):
        jaxnorm.nnx.FrozenBatchNorm(4)(X)
