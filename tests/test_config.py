"""What is no array goes along: settings read from one framework and put on the other's layers, and exact both ways."""

import copy
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from fuzzing import examples
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import interop
import jaxnorm


class InTorch(nn.Module):
    """Layers of each kind that has settings, none of them the default's."""

    def __init__(self, plain=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8) if plain else nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.cumulative = nn.BatchNorm2d(8) if plain else nn.BatchNorm2d(8, momentum=None)
        self.batch = nn.BatchNorm2d(8, affine=False) if plain else nn.BatchNorm2d(8, affine=False, momentum=0.3)
        self.frozen = nn.BatchNorm2d(8)
        self.group = nn.GroupNorm(2, 8) if plain else nn.GroupNorm(2, 8, eps=1e-6)
        self.instance = nn.InstanceNorm2d(8) if plain else nn.InstanceNorm2d(8, eps=1e-4)
        self.drop = nn.Dropout() if plain else nn.Dropout(0.0)
        self.layer = nn.LayerNorm(8) if plain else nn.LayerNorm(8, eps=1e-6)
        self.rms = nn.RMSNorm(8) if plain else nn.RMSNorm(8, eps=1e-2)
        if not plain:
            self.batch.track_running_stats = False
            self.frozen.eval()

    def forward(self, x):
        x = self.frozen(self.batch(self.cumulative(self.bn(self.conv(x)))))
        x = self.instance(self.group(x))
        return self.rms(self.layer(self.drop(x).mean((2, 3))))


SETTINGS = {
    "": {"kind": "Module", "training": True},
    "bn": {"kind": "BatchNorm", "eps": 1e-3, "momentum": 0.03, "affine": True, "track_running_stats": True},
    "cumulative": {"kind": "BatchNorm", "eps": 1e-5, "momentum": None, "affine": True, "track_running_stats": True},
    "batch": {"kind": "BatchNorm", "eps": 1e-5, "momentum": 0.3, "affine": False, "track_running_stats": False},
    "frozen": {"kind": "BatchNorm", "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True},
    "group": {"kind": "GroupNorm", "eps": 1e-6, "affine": True, "num_groups": 2},
    "instance": {"kind": "InstanceNorm", "eps": 1e-4, "affine": False},
    "drop": {"kind": "Dropout", "p": 0.0, "training": True},
    "layer": {"kind": "LayerNorm", "eps": 1e-6, "affine": True},
    "rms": {"kind": "RMSNorm", "eps": 1e-2, "affine": True},
}
for _name in ("bn", "cumulative", "batch", "frozen"):
    SETTINGS[_name]["training"] = _name != "frozen"


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = InTorch()
    module(torch.randn(4, 3, 8, 8))  # statistics and counters that are not the first ones
    return module


def same_in_torch(one, two):
    """Outputs of two modules, in train mode and then in eval mode, and their buffers in between."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert [m.training for m in one.modules()] == [m.training for m in two.modules()]
    assert torch.equal(one(x), two(x))
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(one.eval()(x), two.eval()(x))


def test_a_modules_config_is_in_its_own_words_and_survives_json(module):
    found = interop.config(module)
    assert found == SETTINGS
    assert json.loads(json.dumps(found)) == found
    assert interop.config(found) == found


@pytest.mark.parametrize("way", ["model", "safetensors", "pth", "torch", "pickled"])
def test_a_config_makes_pytorchs_default_layers_the_same_model(module, tmp_path, way):
    if way == "model":
        model = interop.from_torch(module, torch.zeros(2, 3, 8, 8))
        state, config = interop.state_dict(model), interop.config(model)
        found = {name: layer for name, layer in config.items() if layer["kind"] in ("BatchNorm", "Module")}
        assert found == {name: SETTINGS[name] for name in found} and len(found) == 5
        # a traced graph has the other norms' settings in its nodes
        config |= {name: layer for name, layer in SETTINGS.items() if name not in config}
    elif way == "torch":
        state, config = {name: value.numpy() for name, value in module.state_dict().items()}, interop.config(module)
    elif way == "pickled":
        torch.save({"model": module}, tmp_path / "x.pt")
        checkpoint = interop.load_checkpoint(tmp_path / "x.pt")
        state, config = dict(checkpoint), interop.config(checkpoint)
        assert config == {name: layer for name, layer in SETTINGS.items() if layer["kind"] == "BatchNorm"}
        config |= {name: layer for name, layer in SETTINGS.items() if name not in config}
    else:
        path = tmp_path / f"x.{way}"
        interop.save_checkpoint(path, dict(module.state_dict()), {"config": interop.config(module)})
        checkpoint = interop.load_checkpoint(path)
        state, config = dict(checkpoint), interop.config(checkpoint)
        assert config == SETTINGS
    fresh = InTorch(plain=True)
    fresh.load_state_dict({name: torch.tensor(np.array(value)) for name, value in state.items()}, strict=True)
    assert interop.apply_config(fresh, config) is fresh
    assert interop.config(fresh) == SETTINGS
    same_in_torch(module, fresh)


class InLinen(linen.Module):
    momentum: float | None = 0.9
    epsilon: float = 1e-5
    groups: int = 2

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(8, (3, 3), name="conv")(x)
        x = jaxnorm.linen.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            count_batches=True,
            name="bn",
        )(x)
        x = linen.GroupNorm(self.groups, epsilon=1e-5, name="group")(x)
        x = linen.Dropout(0.5, deterministic=not train, name="drop")(x)
        return linen.LayerNorm(epsilon=1e-5, name="layer")(x.mean((1, 2)))


class InNnx(nnx.Module):
    def __init__(self, momentum=0.9, epsilon=1e-5):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = jaxnorm.nnx.BatchNorm(8, momentum=momentum, epsilon=epsilon, count_batches=True, rngs=rngs)
        self.group = nnx.GroupNorm(8, 2, epsilon=1e-5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layer = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.drop(self.group(self.bn(self.conv(x)))).mean((1, 2)))


def linen_model(**options):
    module = InLinen(**options)
    return module, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def in_torch(**options):
    names = {"conv": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8, **options), "group": nn.GroupNorm(2, 8)}
    return nn.ModuleDict({**names, "drop": nn.Dropout(), "layer": nn.LayerNorm(8)})


def without_modes(config):
    return {
        name: {key: value for key, value in layer.items() if key != "training"}
        for name, layer in config.items()
        if layer["kind"] != "Module"
    }


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_hand_written_models_say_the_same_as_pytorchs_layers(momentum):
    flax = None if momentum is None else 1 - momentum
    expected = interop.config(in_torch(momentum=momentum, eps=1e-3))
    found = interop.config(InNnx(flax, 1e-3))
    assert without_modes(found) == without_modes(expected)
    assert found["bn"]["training"] is True  # NNX's layers know their mode
    found = interop.config(linen_model(momentum=flax, epsilon=1e-3))
    assert found == without_modes(expected)
    fresh = interop.apply_config(in_torch(), found)
    assert without_modes(interop.config(fresh)) == found


def test_a_config_is_put_on_an_nnx_model():
    module = in_torch(momentum=0.3, eps=1e-3).eval()
    model = InNnx()
    assert interop.load_config(model, module) is model
    assert (model.bn.momentum, model.bn.epsilon, model.bn.use_running_average) == (0.7, 1e-3, True)
    assert model.drop.rate == 0.5 and model.drop.deterministic
    assert interop.config(model)["bn"] == interop.config(module)["bn"]
    interop.load_config(model, interop.config(module.train()))
    assert not model.bn.use_running_average and not model.drop.deterministic
    # and what it computes is what PyTorch computes with these settings
    state = {name: value.double() for name, value in module.state_dict().items() if value.is_floating_point()}
    interop.load_state_dict(model, module.state_dict())
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    model.bn(model.conv(jnp.asarray(x)))
    module.bn(module.conv(torch.tensor(x).permute(0, 3, 1, 2)))
    np.testing.assert_allclose(interop.state_dict(model)["bn.running_var"], module.bn.running_var, rtol=1e-5)
    assert not np.allclose(state["bn.running_var"], module.bn.running_var, rtol=1e-2)


def test_a_config_checks_the_code_of_a_linen_model():
    model = linen_model(momentum=0.7, epsilon=1e-3)
    assert interop.load_config(model, in_torch(momentum=0.3, eps=1e-3)) is model
    with pytest.raises(
        ValueError,
        match=r"'bn': eps is 0.001 in the config, 1e-05 by the module's code(.|\n)*momentum is 0.3 in the config, 0.1",
    ):
        interop.load_config(linen_model(), in_torch(momentum=0.3, eps=1e-3))


def test_layers_are_renamed_with_their_arrays():
    rename = [(r"^norm\.", "bn."), (r"^p\.", "drop.")]  # drop has no arrays
    module = in_torch(momentum=0.25)
    theirs = nn.ModuleDict({{"bn": "norm", "drop": "p"}.get(name, name): layer for name, layer in module.items()})
    model = interop.load_config(InNnx(), theirs, rename)
    assert model.bn.momentum == 0.75
    found = interop.config(model, rename)
    assert found["norm"]["momentum"] == 0.25 and found["p"]["p"] == 0.5 and "bn" not in found
    found = interop.config(linen_model(momentum=0.75), rename)
    assert found["norm"]["momentum"] == 0.25 and found["p"]["p"] == 0.5 and "bn" not in found


def test_a_training_state_has_its_models_settings():
    state = jaxnorm.TrainState.create(InNnx(0.75), optax.sgd(0.1))
    assert without_modes(interop.config(state)) == without_modes(interop.config(InNnx(0.75)))
    with pytest.raises(TypeError, match="set those of the model it is made from"):
        interop.load_config(state, {})


MODEL, MODULE = InNnx(), in_torch()


@examples(60)
@given(st.floats(0, 1), st.floats(0, 1e3))
@example(0.1, 1e-5)
@example(1e-20, 1e-3)
@example(0.3, 5e-324)
def test_changing_convention_twice_gives_the_first_number_back(momentum, eps):
    module, model, other = MODULE, MODEL, in_torch()
    module.bn.momentum, module.bn.eps = momentum, eps
    interop.load_config(model, json.loads(json.dumps(interop.config(module))))
    assert float(model.bn.momentum) == float(1 - Fraction(repr(momentum)))
    interop.apply_config(other, json.loads(json.dumps(interop.config(model))))
    assert (other.bn.momentum, other.bn.eps) == (momentum, eps)
    # and from Flax's side, where the other number does not always say which it was
    model.bn.momentum = momentum
    again = copy.deepcopy(model)
    again.bn.momentum = 0.5
    interop.load_config(again, json.loads(json.dumps(interop.config(model))))
    assert again.bn.momentum == momentum


def test_what_does_not_fit_is_listed_and_nothing_changes():
    module = in_torch()
    config = interop.config(module)
    wrong = copy.deepcopy(config)
    wrong["bn"] |= {"momentum": 0.5, "affine": False}
    wrong["group"] |= {"num_groups": 4}
    wrong["layer"] |= {"kind": "RMSNorm"}
    wrong["extra"] = {"kind": "BatchNorm", "eps": 1e-5}
    message = (
        r"'bn': affine is False in the config, True in the model(.|\n)*'group': num_groups is 4 in the config, 2"
        r"(.|\n)*'layer': kind is 'RMSNorm' in the config, 'LayerNorm'(.|\n)*'extra': no layer of this name"
    )
    with pytest.raises(ValueError, match=message):
        interop.apply_config(module, wrong)
    assert interop.config(module) == config
    model = InNnx()
    before = interop.config(model)
    with pytest.raises(ValueError, match=message):
        interop.load_config(model, wrong)
    assert interop.config(model) == before


def test_settings_that_a_layer_cannot_take_are_refused():
    config = {"bn": {"kind": "BatchNorm", "momentum": None, "track_running_stats": True}}
    plain = nnx.Dict(bn=nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="momentum None averages by a counter"):
        interop.load_config(plain, config)
    with pytest.raises(ValueError, match="always tracks"):
        interop.load_config(plain, {"bn": {"kind": "BatchNorm", "track_running_stats": False}})
    with pytest.raises(ValueError, match="not between 0 and 1"):
        interop.load_config(plain, {"bn": {"kind": "BatchNorm", "momentum": 1.5}})
    with pytest.raises(ValueError, match="no running statistics: build it with"):
        interop.apply_config(nn.ModuleDict({"bn": nn.BatchNorm1d(4, track_running_stats=False)}), config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bn": {"eps": 1e-5}},
        {"bn": {"kind": "BatchNorm", "epsilon": 1e-5}},
        {"bn": {"kind": "BatchNorm", "eps": "1e-5"}},
        {"bn": {"kind": "BatchNorm", "affine": 1}},
        {"bn": {"kind": "BatchNorm", "momentum": True}},
    ],
)
def test_what_is_no_config_is_refused(wrong):
    with pytest.raises(ValueError, match=r"not a config of interop\.config:\n  'bn'"):
        interop.apply_config(in_torch(), wrong)


@pytest.mark.parametrize(
    ("layer", "setting", "value"),
    [
        ("bn", "eps", float("nan")),
        ("group", "eps", -1.0),
        ("layer", "eps", float("inf")),
        ("bn", "momentum", 5),
        ("bn", "momentum", float("nan")),
        ("drop", "p", 2.0),
    ],
)
def test_numbers_that_no_layer_can_have_are_refused(layer, setting, value):
    wrong = interop.config(in_torch())
    wrong[layer][setting] = value
    for put, target in ((interop.apply_config, in_torch()), (interop.load_config, InNnx())):
        with pytest.raises(ValueError, match=f"'{layer}': {setting} = {value} is not between 0 and"):
            put(target, wrong)
    module = in_torch()
    setattr(module[layer], setting, value)
    with pytest.raises(ValueError, match=f"'{layer}': {setting} = {float(value)} is not between 0 and"):
        interop.load_config(InNnx(), module)


def test_numpys_numbers_in_a_module_are_json_in_its_config():
    module = in_torch(momentum=np.float32(0.5), eps=np.float32(0.25))
    assert json.loads(json.dumps(interop.config(module)))["bn"]["momentum"] == 0.5


def test_a_checkpoint_without_settings_says_where_they_would_be(tmp_path):
    torch.save(in_torch().state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth says nothing of its layers' settings"):
        interop.config(interop.load_checkpoint(tmp_path / "x.pth"))
    interop.save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)}, {"config": "{"})
    with pytest.raises(ValueError, match="the metadata's config is no JSON"):
        interop.config(interop.load_checkpoint(tmp_path / "x.safetensors"))
    for wrong in (3, {"params": {}}, InLinen()):
        with pytest.raises((TypeError, ValueError), match=r"expected an NNX module|not a config"):
            interop.config(wrong)
