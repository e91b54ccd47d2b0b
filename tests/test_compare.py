"""interop.compare finds the planted difference: the right layer, and the right reason."""

import copy

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from page_reader import programs
from parity_tools import normal, randomised
from torch import nn

import interop
import jaxnorm


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=2, dilation=2)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3)
        self.layer1 = Block(8, 8, 2)
        self.layer2 = Block(8, 16, 2, groups=4)
        self.norm = nn.GroupNorm(4, 16)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.layer2(self.layer1(torch.relu(self.stem(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


OPTIONS = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


class FlaxBlock(nnx.Module):
    def __init__(self, inputs, outputs, stride, groups=1):
        pads = ((1, 1), (1, 1))
        self.conv1 = nnx.Conv(
            inputs, outputs, (3, 3), stride, padding=pads, use_bias=False, feature_group_count=groups, **OPTIONS
        )
        self.bn1 = jaxnorm.nnx.BatchNorm(outputs, momentum=0.9, count_batches=True, **OPTIONS)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), padding=((2, 2), (2, 2)), kernel_dilation=2, **OPTIONS)
        self.bn2 = jaxnorm.nnx.BatchNorm(outputs, momentum=0.9, count_batches=True, **OPTIONS)
        self.activation = jax.nn.relu

    def __call__(self, x):
        return jax.nn.relu(self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x))))))


class FlaxNet(nnx.Module):
    def __init__(self):
        self.stem = nnx.Conv(3, 8, (7, 7), 2, padding=((3, 3), (3, 3)), **OPTIONS)
        self.layer1 = FlaxBlock(8, 8, 2)
        self.layer2 = FlaxBlock(8, 16, 2, groups=4)
        self.norm = nnx.GroupNorm(16, 4, epsilon=1e-5, use_fast_variance=False, **OPTIONS)
        self.drop = nnx.Dropout(0.3, rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(16, 5, **OPTIONS)
        self.after = lambda x: x

    def __call__(self, x):
        x = self.norm(self.layer2(self.layer1(jax.nn.relu(self.stem(x)))))
        return self.after(self.fc(self.drop(x.mean((1, 2)))))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return randomised(Net())


@pytest.fixture
def x():
    return normal(2, 3, 32, 32)


@pytest.fixture
def model(module):
    return interop.load_state_dict(FlaxNet(), module.state_dict())


def test_equal_models_agree_in_both_modes_and_are_left_as_they_were(model, module, x):
    before, theirs = interop.state_dict(model), copy.deepcopy(module.state_dict())
    found = interop.compare(model, module, x)
    assert found.agrees and found.first is found.cause is None, str(found)
    assert set(found.outputs) == {"eval", "train"} and max(found.outputs.values()) < 1e-12
    assert len(found.layers) == 2 * 11 and max(layer.alone for layer in found.layers) < 1e-12
    assert "They agree to 1e-08." in str(found)
    for name, value in interop.state_dict(model).items():
        np.testing.assert_array_equal(value, before[name])
        np.testing.assert_array_equal(module.state_dict()[name], theirs[name])


def same_padding(model, module):
    model.layer1.conv1.padding = "SAME"


def other_stride_of_a_dilation(model, module):
    model.layer2.conv2.kernel_dilation = 1
    model.layer2.conv2.padding = ((1, 1), (1, 1))


def other_epsilon(model, module):
    model.layer1.bn2.epsilon = 1e-3


def other_momentum(model, module):
    model.layer2.bn1.momentum = 0.99


def biased_variance(model, module):
    model.layer2.bn1.correction = 0


def other_activation(model, module):
    model.layer1.activation = jax.nn.gelu


def transposed_weights(model, module):
    model.stem.kernel[...] = jnp.swapaxes(model.stem.kernel[...], 0, 1)


def fresh_statistics(model, module):
    model.layer1.bn1.mean[...], model.layer1.bn1.var[...] = jnp.zeros(8), jnp.ones(8)


def head_not_loaded(model, module):
    model.fc.kernel[...] = 2 * model.fc.kernel[...]


def other_groups_of_a_norm(model, module):
    fresh = nnx.GroupNorm(16, 8, epsilon=1e-5, use_fast_variance=False, **OPTIONS)
    fresh.scale[...], fresh.bias[...] = model.norm.scale[...], model.norm.bias[...]
    model.norm = fresh


def computed_in_bfloat16(model, module):
    model.layer2.conv1.dtype = jnp.bfloat16


def softmax_at_the_end(model, module):
    model.after = jax.nn.softmax


def flaxs_own_batch_norm(model, module):
    theirs = nnx.BatchNorm(16, momentum=0.9, epsilon=1e-5, use_fast_variance=False, **OPTIONS)
    for name in ("scale", "bias", "mean", "var"):
        getattr(theirs, name).set_value(getattr(model.layer2.bn2, name)[...])
    model.layer2.bn2 = theirs


PLANTED = [
    (same_padding, "layer1.conv1", "padding is 'SAME' here, ((1, 1), (1, 1)) in PyTorch", True),
    (other_stride_of_a_dilation, "layer2.conv2", "kernel_dilation is 1 here, (2, 2) in PyTorch", True),
    (other_epsilon, "layer1.bn2", "epsilon is 0.001 here, 1e-05 in PyTorch", True),
    (other_momentum, "layer2.bn1", "momentum is 0.99 here, 0.9 in PyTorch", True),
    (biased_variance, "layer2.bn1", "correction is 0 here, 1 in PyTorch", True),
    (other_activation, "layer1.conv2", "after layer1.bn1: relu in PyTorch, gelu (tanh) here", True),
    (transposed_weights, "stem", "weight has its dimensions in another order", True),
    (fresh_statistics, "layer1.bn1", "running_mean is as it was at the beginning", True),
    (head_not_loaded, "fc", "weight holds other values than PyTorch's", True),
    (other_groups_of_a_norm, "norm", "num_groups is 8 here, 4 in PyTorch", True),
    (computed_in_bfloat16, "layer2.conv1", "dtype is", True),
    (softmax_at_the_end, "fc", "what is computed after fc differs", False),
    (flaxs_own_batch_norm, "layer2.bn2", "it tracks the biased variance", True),
]


@pytest.mark.parametrize("plant, path, reason, proved", PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_difference_is_found(model, module, x, plant, path, reason, proved):
    plant(model, module)
    found = interop.compare(model, module, x)
    assert (found.first, found.proved) == (path, proved), str(found)
    assert reason in found.cause
    assert reason in str(found) and not found.agrees


def test_an_imported_model_is_compared_by_its_program(module, x):
    model = interop.from_torch(module, x)
    found = interop.compare(model, module, x)
    assert found.agrees and "draws random numbers" in found.notes[0], str(found)
    model.layer1.bn1.epsilon = 1e-2
    model.layer2.bn2.momentum = 0.5
    found = interop.compare(model, module, x)
    assert found.first == "layer1.bn1" and "epsilon is 0.01 here, 1e-05 in PyTorch" in found.cause and found.proved
    assert [layer.path for layer in found.layers if layer.alone > 1e-8] == ["layer1.bn1", "layer1.bn1", "layer2.bn2"]


class LinenNet(linen.Module):
    padding: object = ((3, 3), (3, 3))

    @linen.compact
    def __call__(self, x, train):
        conv = linen.Conv(8, (7, 7), 2, padding=self.padding, param_dtype=jnp.float64, name="stem")
        norm = flax.linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, param_dtype=jnp.float64, name="bn")
        x = jax.nn.relu(norm(conv(x))).mean((1, 2))
        return linen.Dense(5, param_dtype=jnp.float64, name="fc")(linen.Dropout(0.5, deterministic=not train)(x))


def test_a_linen_model_with_flaxs_same_padding(x):
    """Torchvision's weights in a ResNet as Flax's ImageNet example writes it: no error, and other numbers."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn, self.fc = nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(torch.relu(self.bn(self.stem(x))).mean((2, 3)))

    torch.manual_seed(0)
    module = randomised(Small())
    for padding in ("SAME", ((3, 3), (3, 3))):
        linen_model = LinenNet(padding)
        shapes = jax.eval_shape(lambda k, m=linen_model: m.init(k, jnp.ones((1, 32, 32, 3)), False), jax.random.key(0))
        inputs = (jnp.ones((1, 32, 32, 3)), False)
        state = {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
        pair = interop.load_state_dict((linen_model, shapes), state, inputs=inputs)
        found = interop.compare(pair, module, x, tolerance=1e-6)
        if padding == "SAME":
            assert found.first == "stem" and "padding is 'SAME' here, ((3, 3), (3, 3)) in PyTorch" in found.cause
            assert found.proved
        else:  # in eval it is PyTorch's, up to statistics in float32; in train Flax tracks the biased variance
            assert found.first == "bn" and "it tracks the biased variance" in found.cause, str(found)
            assert found.outputs["eval"] < 1e-7


def test_what_cannot_be_compared_is_refused(model, module, x):
    with pytest.raises(TypeError, match=r"expected an nnx\.Module or Linen's"):
        interop.compare(module, module, x)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        interop.compare(model, model, x)
    with pytest.raises(ValueError, match=r"no layer of the two has the same name: PyTorch has 0\.weight"):
        interop.compare(model, nn.Sequential(nn.Linear(2, 3)), x)


def test_names_that_differ_are_told_by_rename(module, x):
    class Renamed(nnx.Module):
        def __init__(self, model):
            self.backbone = model

        def __call__(self, x):
            return self.backbone(x)

    model = interop.load_state_dict(FlaxNet(), module.state_dict())
    model.layer2.bn1.epsilon = 0.1
    found = interop.compare(Renamed(model), module, x, rename=[(r"^", "backbone.")])
    assert found.first == "layer2.bn1" and found.layers[0].counterpart == "backbone.stem"


def test_statistics_that_are_narrower_are_named(module, x):
    """Flax keeps running statistics in float32 beside parameters in float64."""
    model = interop.load_state_dict(FlaxNet(), module.state_dict())
    norm = model.layer1.bn1
    norm.var.set_value(norm.var[...].astype(jnp.float32))
    found = interop.compare(model, module, x)
    assert found.first == "layer1.bn1" and "running_var is float32 here, float64 in PyTorch" in found.cause


def test_the_page_about_hand_written_models_compares(model, module):
    """The program of docs/hand_written.md, "Where a model differs"."""
    (program,) = programs("docs/hand_written.md", "where-a-model-differs")
    names = {"interop": interop, "model": model, "module": module.double(), "torch": torch}
    torch.set_default_dtype(torch.float64)
    try:
        program.run(names)
        model.layer1.conv1.padding = "SAME"
        with pytest.raises(AssertionError, match="padding is 'SAME' here"):
            program.run(names)
    finally:
        torch.set_default_dtype(torch.float32)
