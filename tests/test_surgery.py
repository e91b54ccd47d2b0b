"""What users change of an imported model: layers called alone, features, other heads, LoRA, another compute dtype."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from page_reader import programs
from parity_tools import normal, to_jax
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import interop
import jaxnorm


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.squeeze = Squeeze(channels)

    def forward(self, x):
        return self.relu(self.squeeze(self.bn(self.conv(self.relu(x)))) + x)


class Squeeze(nn.Module):
    """As people write it: sizes by view."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        batch, channels = x.shape[0], x.shape[1]
        return x * self.fc(x.mean((2, 3)).view(batch, channels)).sigmoid().view(batch, channels, 1, 1)


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.layers = nn.ModuleList([Block(6), Block(6), Block(6)])
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.layers:
            x = block(x)
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = Net().double()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return module


@pytest.fixture
def x():
    return normal(4, 3, 16, 16)


def close(found, expected):
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "path", ["stem", "stem.0", "layers.1", "layers.2.squeeze", "layers.0.bn", "layers.1.conv", "fc"]
)
def test_a_layer_called_alone_is_pytorchs(module, x, path, training):
    model = interop.from_torch(module.train(training), x)
    layer, inner = module.get_submodule(path), model
    for part in path.split("."):
        inner = inner[part]
    shape = {"stem": (3, 3, 16, 16), "stem.0": (3, 3, 10, 10), "fc": (3, 6)}.get(path, (3, 6, 8, 8))
    given = normal(*shape, seed=1)
    expected = layer(given.clone())
    close(inner(to_jax(given)), expected)
    home = interop.state_dict(model)
    for name, value in module.state_dict().items():  # running statistics moved, of that layer alone
        np.testing.assert_allclose(home[name], value, rtol=1e-12, atol=1e-12)


def test_layers_go_by_index_from_the_end_and_in_a_loop(module, x):
    model = interop.from_torch(module.eval(), x)
    assert model.layers[-1] is model.layers[2] is getattr(model.layers, "2") is model["layers"]["2"]
    given = normal(2, 6, 8, 8)
    expected, found = given, to_jax(given)
    for block, layer in zip(module.layers, model.layers, strict=True):
        expected, found = block(expected.clone()), layer(found)
    close(found, expected)
    with pytest.raises(IndexError, match="'layers' of Net has 3 layers called by numbers, and none at 3"):
        model.layers[3]
    with pytest.raises(KeyError, match=r"has no 'head'; it has .*stem"):
        model["head"]


def test_what_cannot_be_called_alone_says_why(module, x):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.same, self.drop = Both(), nn.Identity(), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.same(self.both(x, x + 1)))

    class Both(nn.Module):
        def forward(self, x, y):
            return x * y - x

    model = interop.from_torch(Two().train(), normal(2, 3))
    one = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="'both' of Two reads 2 values from around it"):
        model.both(one, one)
    with pytest.raises(ValueError, match="'same' of Two does nothing in train mode"):
        model.same(one)
    with pytest.raises(ValueError, match="'drop' of Two draws random numbers: give it rngs="):
        model.drop(one)
    assert set(np.unique(model.drop(jnp.ones((20, 20)), rngs=nnx.Rngs(0)))) == {0.0, 2.0}
    with pytest.raises(TypeError, match="takes 1 array, found 2"):
        model.drop(one, one, rngs=nnx.Rngs(0))


def test_a_block_that_is_called_again_is_called_once_alone(x):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())

        def forward(self, x):
            return self.block(self.block(self.block(x)))

    module = Again().double()
    model = interop.from_torch(module, x)
    close(model(to_jax(x)), module(x))
    close(model.block(to_jax(x)), module.block(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("names", [["stem", "layers.1"], {"layers.0.relu": "a", "fc": "b"}, ["layers.2.squeeze.fc"]])
def test_features_are_those_of_torchvisions_extractor(module, x, names, training):
    module.drop.p = 0.0  # the two draw other numbers
    expected = create_feature_extractor(copy.deepcopy(module).train(training), names)
    model = interop.features(interop.from_torch(module.train(training), x), names)
    theirs, ours = expected(x.clone()), model(to_jax(x))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        close(ours[name], value)
    home = interop.state_dict(model)
    assert set(home) == set(module.state_dict())
    for name, value in expected.state_dict().items():
        np.testing.assert_allclose(home[name], value, rtol=1e-12, atol=1e-12)


def test_features_leave_the_model_as_it_was_and_work_on(module, x, tmp_path):
    model = interop.from_torch(module.train(), x)
    before = interop.state_dict(model)
    backbone = interop.features(model, ["layers.0"])
    backbone(to_jax(x))
    for name, value in interop.state_dict(model).items():
        np.testing.assert_array_equal(value, before[name])
    interop.save(backbone, tmp_path / "backbone")
    again = interop.load(tmp_path / "backbone")
    backbone.eval(), again.eval()
    np.testing.assert_array_equal(again(to_jax(x))["layers.0"], backbone(to_jax(x))["layers.0"])
    node = next(node.name for node in model.nodes() if node.module == "layers.0.squeeze.fc")
    assert set(interop.features(interop.from_torch(module.eval(), x), [node])(to_jax(x))) == {node}


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["head"], ValueError, r"Net in train mode:\n  'head' is no module that the program calls"),
        ([], ValueError, "one or more"),
        ("stem", TypeError, "a list of layers' paths"),
    ],
)
def test_names_that_are_none_are_refused(module, x, names, error, message):
    with pytest.raises(error, match=message):
        interop.features(interop.from_torch(module, x), names)
    with pytest.raises(TypeError, match=r"expected a model from interop\.from_torch"):
        interop.features(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), ["stem"])


@pytest.mark.parametrize("how", ["jit", "checkpoint"])
def test_another_head_trains_and_goes_home(module, x, how):
    """One step of SGD with a new head, here and in PyTorch: every parameter and running statistic."""
    model = interop.from_torch(module.train(), x)
    module.drop.p = 0.0
    model = interop.from_torch(module, x)
    torch.manual_seed(1)
    module.fc = nn.Linear(6, 3).double()
    model.fc = nnx.Linear(6, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    interop.load_state_dict(model, module.state_dict())
    if how == "checkpoint":
        model.checkpoint(r"layers\.\d", "fc")
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    loss = module(x).square().sum()
    loss.backward()
    optimizer.step()
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    step = jaxnorm.train_step(lambda model, batch: (jnp.square(model(batch)).sum(), {}))
    state, metrics = jax.jit(step)(state, to_jax(x))
    np.testing.assert_allclose(metrics["loss"], loss.detach(), rtol=1e-12)
    home = interop.state_dict(state)
    assert list(home) == list(module.state_dict())
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(home[name], value, rtol=1e-11, atol=1e-12)
    Net(3).double().load_state_dict(interop.to_torch(home), strict=True)


def test_a_layer_inside_a_new_one_keeps_its_weights(module, x):
    """LoRA around a linear layer and a convolution: B = 0 changes nothing, another B what it says."""

    class LoRA(nnx.Module):
        def __init__(self, base, down, up):
            self.base, self.down, self.up = base, nnx.Param(down), nnx.Param(up)

        def __call__(self, x):
            return self.base(x) + (x @ self.down[...]) @ self.up[...]

    model = interop.from_torch(module.eval(), x)
    before = np.asarray(model(to_jax(x)))
    down, up = to_jax(normal(6, 2)), to_jax(normal(2, 5, seed=1))
    model.fc = LoRA(model.fc, down, jnp.zeros((2, 5)))
    np.testing.assert_allclose(model(to_jax(x)), before, rtol=1e-13)
    model.fc.up[...] = up
    module.fc.weight.data += torch.tensor(np.array(down @ up)).T
    close(model(to_jax(x)), module(x))
    assert "fc.base.weight" in interop.state_dict(model)


@pytest.mark.parametrize("training", [False, True])
def test_flaxs_layers_see_their_channels_last(module, x, training):
    """`nnx.Conv` and `nnx.GroupNorm` in the place of PyTorch's, and a BatchNorm with its channels where it says."""
    module.drop.p = 0.0
    model = interop.from_torch(module.train(training), x)
    module.layers[0].conv = nn.Conv2d(6, 6, 5, padding=2).double()
    module.layers[1].bn = nn.GroupNorm(3, 6).double()
    module.layers[2].bn = nn.BatchNorm2d(6).double().train(training)
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    model.layers[0].conv = nnx.Conv(6, 6, (5, 5), padding=2, **options)
    model.layers[1].bn = nnx.GroupNorm(6, 3, epsilon=1e-5, use_fast_variance=False, **options)
    setattr(model.layers, "2", model.layers[2])
    model.layers[2].bn = jaxnorm.nnx.BatchNorm(6, axis=1, momentum=0.9, count_batches=True, **options)
    model.layers[2].bn.use_running_average = not training
    interop.load_state_dict(model, module.state_dict())
    close(model(to_jax(x)), module(x))
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(interop.state_dict(model)[name], value, rtol=1e-12, atol=1e-12)


def test_replacements_that_cannot_be_called_say_why(module, x, tmp_path):
    model = interop.from_torch(module.eval(), x)
    model.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the module at 'drop' was replaced, and the program does not say where"):
        model(to_jax(x))
    model = interop.from_torch(module.eval(), x)
    model.fc = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"'fc' of the model was replaced"):
        interop.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="fc of the model was replaced"):
        interop.features(model, ["stem"])


def test_masks_are_followed_through_a_new_head(module, x):
    module.drop.p = 0.0
    model = interop.from_torch(module.train(), x)
    model.fc = nnx.Linear(6, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    whole = copy.deepcopy(model)
    padded = jaxnorm.pad_batch({"x": to_jax(x)[:3]}, 4)
    found = model(padded["x"], mask=padded["mask"])
    np.testing.assert_allclose(found[:3], whole(to_jax(x)[:3]), rtol=1e-11)


def test_the_compute_dtype_can_be_changed(module, x):
    model = interop.from_torch(module.float().eval(), x.float())
    model.compute_dtype = jnp.bfloat16
    assert model.compute_dtype == jnp.bfloat16
    assert model(to_jax(x.float())).dtype == model.layers[0](jnp.ones((1, 6, 8, 8))).dtype == jnp.bfloat16
    model.compute_dtype = None
    assert model(to_jax(x.float())).dtype == jnp.float32
    with pytest.raises(ValueError, match="compute_dtype is a floating dtype"):
        model.compute_dtype = "int8"


def test_frozen_parameters_do_not_train_and_statistics_do(module, x, tmp_path):
    module.drop.p = 0.0
    model = interop.from_torch(module.train(), x)
    interop.freeze(model, "stem", r"layers\.[01]", "fc.bias")
    for name, parameter in module.named_parameters():
        parameter.requires_grad = not name.startswith(("stem", "layers.0", "layers.1", "fc.bias"))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    module(x).square().sum().backward()
    optimizer.step()
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    step = jaxnorm.train_step(lambda model, batch: (jnp.square(model(batch)).sum(), {}))
    state, _ = jax.jit(step)(state, to_jax(x))
    home = interop.state_dict(state)
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(home[name], value, rtol=1e-11, atol=1e-12)
    interop.save(state.model(), tmp_path / "model")
    assert isinstance(interop.load(tmp_path / "model").fc.bias, interop.Frozen)
    interop.unfreeze(model)
    assert not nnx.state(model, interop.Frozen)
    with pytest.raises(ValueError, match="matches 'head', 'layers'; the model has"):
        interop.freeze(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "head", "kernel", "layers")


def test_the_page_about_changing_models_runs():
    """Each of its programs after the other, in one namespace."""
    torch.set_default_dtype(torch.float32)
    names = {"interop": interop, "jnp": jnp, "jax": jax, "nnx": nnx, "torch": torch, "resnet18": resnet18}
    for block in programs("docs/changing_models.md"):
        block.run(names)
    assert names["y"].shape == (4, 64, 16, 16)
    assert {name: value.shape for name, value in names["pyramid"].items()} == {
        "layer2": (4, 128, 8, 8),
        "layer4": (4, 512, 2, 2),
    }
    assert names["logits"].shape == (4, 10) and names["weights"]["fc.weight"].shape == (10, 512)
    assert names["model"](names["images"]).dtype == jnp.bfloat16
