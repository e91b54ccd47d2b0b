"""`model(x, mask=...)` of an imported model: examples that do not count are nowhere in the statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from parity_tools import normal, randomised, relative, to_jax

import interop
import jaxnorm


class Model(torch.nn.Module):
    """A function of a few layers."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def frames(self, x):
    """(B, T, C, H, W): the frames are examples of the layers, batch first."""
    b, t = x.shape[:2]
    y = self.norm(self.conv(x.reshape(b * t, *x.shape[2:]))).relu()
    return self.fc(y.mean((2, 3)).reshape(b, t, -1).mean(1))


def time_first(self, x):
    """The same, time first."""
    x = x.transpose(0, 1)
    t, b = x.shape[:2]
    y = self.norm(self.conv(x.flatten(0, 1))).relu()
    return self.fc(y.mean((2, 3)).unflatten(0, (t, b)).amax(0))


def two_views(self, x):
    a, b = self.norm(self.conv(torch.cat([x[:, 0], x[:, 1].flip(-1)]))).relu().mean((2, 3)).chunk(2)
    return self.fc(a * b.softmax(1))


def attention(self, x):
    y = self.norm(self.conv(x[:, 0])).flatten(2)
    weights = (y.transpose(1, 2) @ y).softmax(-1)
    return self.fc(torch.bmm(y, weights).cumsum(2).sort(2)[0].mean(2))


def groups(self, x):
    """Squeeze and excite, grouped convolution, pooling, padding, interpolation."""
    y = torch.nn.functional.pad(self.norm(self.conv(x[:, 1])), (1, 1, 1, 1))
    y = torch.nn.functional.max_pool2d(y, 2) * self.norm.weight.sigmoid()[None, :, None, None]
    y = torch.nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear")
    y = torch.nn.functional.conv2d(y, self.conv.weight[:, :1], groups=4, padding=1) * y.mean((2, 3), keepdim=True)
    return self.fc(torch.einsum("bchw,bchw->bc", y, y))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def own_backward(self, x):
    return self.fc(StraightThrough.apply(self.norm(self.conv(x[:, 0])) * 3).mean((2, 3)))


FUNCTIONS = [frames, time_first, two_views, attention, groups, own_backward]


def made(function):
    torch.manual_seed(0)
    layers = {"conv": torch.nn.Conv2d(3, 4, 3, padding=1), "norm": torch.nn.BatchNorm2d(4), "fc": torch.nn.Linear(4, 2)}
    return randomised(Model(function, **layers))


def loss_fn(model, batch):
    outputs = model(batch["x"], mask=batch["mask"])
    return jaxnorm.Mean.of(jnp.mean(outputs**2, 1), batch["mask"]), {}


def torch_sgd(module, x):
    """The module's state after a step of SGD on the true examples."""
    module(x).square().mean(1).mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
    return module.state_dict()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_padded_batch_makes_the_step_that_pytorch_makes_of_the_true_examples(function):
    module, x = made(function), normal(5, 2, 3, 6, 6)
    state = jaxnorm.TrainState.create(interop.from_torch(module, x), optax.sgd(0.1))
    batch = jaxnorm.pad_batch({"x": x.numpy()}, 8)
    batch["x"][5:] *= 7  # whatever stands there
    state, _ = jax.jit(jaxnorm.train_step(loss_fn))(state, batch)
    expected, found = torch_sgd(module, x), interop.state_dict(state)
    wrong = {name: relative(found[name], value, 1e-3) for name, value in expected.items()}
    assert max(wrong.values()) < 1e-10, wrong


def test_a_padded_batch_over_several_devices_is_the_true_examples_too():
    module, x = made(frames), normal(5, 2, 3, 6, 6)
    for how in ("jit", "shard_map"):
        model, name = interop.from_torch(module, x), None if how == "jit" else "batch"
        state = jaxnorm.TrainState.create(
            model if name is None else jaxnorm.convert_sync_batchnorm(model, name), optax.sgd(0.1)
        )
        step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn, axis_name=name), devices=jax.devices()[:4], how=how)
        state, _ = step(state, jaxnorm.pad_batch({"x": x.numpy()}, 8))
        expected, found = torch_sgd(made(frames), x), interop.state_dict(state.model())
        wrong = {name: relative(found[name], value, 1e-3) for name, value in expected.items()}
        assert max(wrong.values()) < 1e-10, (how, wrong)


def test_layers_that_are_computed_again_have_the_mask_too():
    module, x = made(frames), normal(5, 2, 3, 6, 6)
    model = interop.from_torch(module, x)
    model.checkpoint("norm", "conv")
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    state, _ = jax.jit(jaxnorm.train_step(loss_fn))(state, jaxnorm.pad_batch({"x": x.numpy()}, 8))
    found = interop.state_dict(state)
    assert max(relative(found[n], v, 1e-3) for n, v in torch_sgd(module, x).items()) < 1e-10


def test_in_eval_mode_a_mask_changes_nothing():
    module, x = made(frames), normal(4, 2, 3, 6, 6)
    model = interop.from_torch(module.eval(), x)
    mask = jnp.array([True, False, True, False])
    np.testing.assert_array_equal(model(to_jax(x), mask=mask), model(to_jax(x)))


def mean_of_the_batch(self, x):
    y = self.conv(x[:, 0])
    return self.fc(self.norm(y - y.mean(0)).mean((2, 3)))


def batch_as_channels(self, x):
    y = self.conv(x[:, 0])
    return self.fc(self.norm(y + y.flip(0)).mean((2, 3)))


def pairs(self, x):
    y = self.norm(self.conv(x[:, 0])).mean((2, 3))
    return self.fc(y) @ self.fc(y).sum(0)


def by_hand(self, x):
    y = torch.nn.functional.batch_norm(self.conv(x[:, 0]), None, None, training=True)
    return self.fc(self.norm(y).mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (mean_of_the_batch, r"the BatchNorm layer norm: aten\.mean"),
        (batch_as_channels, r"the BatchNorm layer norm: aten\.flip"),
        (pairs, r"an output: aten\.sum"),
        (by_hand, r"the BatchNorm layer norm: aten\..*batch_norm"),
    ],
)
def test_where_examples_meet_in_another_way_the_mask_is_refused_with_the_place(function, where):
    x = normal(4, 2, 3, 6, 6)
    model = interop.from_torch(made(function), x)
    with pytest.raises(ValueError, match=rf"mask: several examples(.|\n)*{where}"):
        model(to_jax(x), mask=jnp.ones(4, bool))


def test_a_buffer_that_forward_computes_from_the_batch_is_refused():
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)
            self.register_buffer("centre", torch.zeros(3))

        def forward(self, x):
            self.centre.lerp_(x.detach().mean(0), 0.1)
            return self.norm(x)

    model = interop.from_torch(Centred(), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"the buffer centre: aten\.mean.*x\.detach\(\)\.mean\(0\)"):
        model(jnp.ones((4, 3)), mask=jnp.ones(4, bool))


@pytest.mark.parametrize(
    "mask",
    [np.ones((4, 2), bool), np.ones(4), np.ones(3, bool), np.True_],
    ids=["two axes", "float", "length", "scalar"],
)
def test_a_mask_that_is_none_of_examples_is_refused(mask):
    model = interop.from_torch(torch.nn.BatchNorm1d(3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"^mask: "):
        model(jnp.ones((4, 3)), mask=mask)


def test_a_mask_of_the_models_own_is_an_argument_like_any_other():
    class Own(torch.nn.Module):
        def forward(self, x, mask):
            return torch.where(mask, x, 0)

    x, mask = torch.ones(4, 3), torch.tensor([True, False, True, False])[:, None]
    model = interop.from_torch(Own(), x, mask)
    np.testing.assert_array_equal(model(to_jax(x), mask=to_jax(mask)), Own()(x, mask).numpy())


def test_the_state_of_a_model_is_its_own_after_a_refusal():
    x = normal(4, 2, 3, 6, 6)
    model = interop.from_torch(made(mean_of_the_batch), x)
    before = interop.state_dict(model)
    with pytest.raises(ValueError, match="mask"):
        model(to_jax(x), mask=jnp.ones(4, bool))
    after = interop.state_dict(model)
    assert all((after[name] == value).all() for name, value in before.items())
