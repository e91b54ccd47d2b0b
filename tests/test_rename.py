"""Names: a rename works in both directions or is an error, and a suggestion is right where it claims to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st

import interop
import jaxnorm
from interop.weights.rename import Renaming, inverse


class Net(linen.Module):
    """Linen's own names: Conv_0, BatchNorm_0, ..."""

    depth: int = 2

    @linen.compact
    def __call__(self, x, train=False):
        for _ in range(self.depth):
            x = linen.Conv(8, (3, 3), use_bias=False)(x)
            x = jaxnorm.linen.BatchNorm(use_running_average=not train, count_batches=True)(x)
        return linen.Dense(5)(x.mean((1, 2)))


def in_torch(depth=2):
    layers = []
    for i in range(depth):
        layers += [
            torch.nn.Conv2d(8 if i else 3, 8, 3, bias=False, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
        ]
    return torch.nn.ModuleDict({"features": torch.nn.Sequential(*layers), "head": torch.nn.Linear(8, 5)})


def linen_net(depth=2):
    module = Net(depth)
    return module, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


BY_HAND = {
    "mapping": {
        f"{old}.{entry}": f"{new}.{entry}"
        for old, new in (
            ("features.0", "Conv_0"),
            ("features.1", "BatchNorm_0"),
            ("features.3", "Conv_1"),
            ("features.4", "BatchNorm_1"),
            ("head", "Dense_0"),
        )
        for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
    "pairs": [
        (r"^features\.0\.", r"Conv_0."),
        (r"^features\.1\.", r"BatchNorm_0."),
        (r"^features\.3\.", r"Conv_1."),
        (r"^features\.4\.", r"BatchNorm_1."),
        (r"^head\.", "Dense_0."),
    ],
    "functions": (
        lambda name: _swapped(name, 0, 1),
        lambda name: _swapped(name, 1, 0),
    ),
}
_LAYERS = [("features.0", "Conv_0"), ("features.1", "BatchNorm_0"), ("features.3", "Conv_1")]
_LAYERS += [("features.4", "BatchNorm_1"), ("head", "Dense_0")]


def _swapped(name, here, there):
    for layer in _LAYERS:
        if name.startswith(layer[here] + "."):
            return layer[there] + name[len(layer[here]) :]
    return name


@pytest.mark.parametrize("rename", BY_HAND.values(), ids=BY_HAND)
def test_one_rename_serves_both_directions(rename):
    module = in_torch()
    model = interop.load_state_dict(linen_net(), module.state_dict(), rename)
    home = interop.state_dict(model, rename)
    assert set(home) == set(module.state_dict())
    for name, value in module.state_dict().items():
        assert home[name].dtype == value.numpy().dtype and (home[name] == value.numpy()).all(), name
    module.load_state_dict({k: torch.tensor(v) for k, v in home.items()}, strict=True)


@pytest.mark.parametrize(
    ("pattern", "replacement", "name", "renamed"),
    [
        (r"^layer(\d)\.(\d+)\.", r"block\1_\2.", "layer1.12.conv1.weight", "block1_12.conv1.weight"),
        (r"(\w+)\.(\w+)$", r"\2/\1", "conv.weight", "weight/conv"),
        (r"^(?P<stage>s\d)\.a", r"x\g<stage>y", "s3.a.b", "xs3y.b"),
        (r"a\.b\\", r"c", "x.a.b\\.y", "x.c.y"),
        (r"([()a\]]+)z", r"\1q", "a()]z", "a()]q"),
        (r"^attn\.qkv\.", r"attn.in_proj_", "attn.qkv.weight", "attn.in_proj_weight"),
        (r"^", r"backbone.", "conv.weight", "backbone.conv.weight"),
    ],
)
def test_a_pair_of_patterns_has_the_inverse_that_follows_from_it(pattern, replacement, name, renamed):
    renaming = Renaming([(pattern, replacement)])
    assert renaming.to_model([name]) == {name: renamed}
    assert renaming.to_torch([renamed]) == {renamed: name}


@given(st.lists(st.sampled_from(["conv", "bn", "0", "1", "12", "layer1"]), min_size=1, max_size=5))
def test_pairs_and_their_inverses_undo_each_other(parts):
    name = ".".join(parts)
    renaming = Renaming([(r"^layer(\d)\.", r"stage\1_"), (r"bn\.(\d+)", r"norm<\1>"), (r"$", r".w")])
    there = renaming.to_model([name])
    assert renaming.to_torch([there[name]]) == {there[name]: name}


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"layer.0", "block", r"'\.0' has no inverse"),
        (r"a|b", "c", r"'\|b' has no inverse"),
        (r"\d+", "n", "has no inverse"),
        (r"(\d)+", r"\1", "has no inverse"),
        (r"(a(b))", r"\1", "has no inverse"),
        (r"(?:a)", "b", "has no inverse"),
        (r"(\d)x(\d)", r"\1", "each group of the pattern once"),
        (r"(\d)", r"\1\1", "each group of the pattern once"),
        (r"(\d)", r"\1\n", "none of"),
    ],
)
def test_patterns_without_an_inverse_are_refused(pattern, replacement, message):
    with pytest.raises(ValueError, match=message):
        inverse(pattern, replacement)
    back = Renaming([(r"^\d+\.x", "y", "^y", "7.x")])
    assert back.to_model(["7.x"]) == {"7.x": "y"} and back.to_torch(["y"]) == {"y": "7.x"}
    with pytest.raises(ValueError, match=r"'3.x' becomes 'y', which goes back to '7.x'"):
        back.to_model(["3.x"])


def test_names_that_become_one_or_do_not_come_back_are_refused_in_both_directions():
    module, model = in_torch(), linen_net()
    state = module.state_dict()
    with pytest.raises(ValueError, match=r"renamed to one(.|\n)*'same' from 'features.0.weight', 'features.1.weight'"):
        interop.load_state_dict(model, state, lambda name: "same")
    with pytest.raises(ValueError, match="renamed to one"):
        interop.load_state_dict(model, state, {"a": "b", "c": "b"})
    with pytest.raises(ValueError, match="renamed to one"):
        interop.state_dict(model, [(r"^Conv_0", "b", "Conv_[01]", "conv")])
    with pytest.raises(ValueError, match="rename has no inverse for these names"):
        interop.load_state_dict(model, state, [("features", "head")])
    with pytest.raises(ValueError, match="pair of functions"):
        interop.state_dict(model, lambda name: name)
    for wrong in (("a", "b"), [("a",)], [1]):
        with pytest.raises(TypeError, match="pair"):
            interop.load_state_dict(model, state, wrong)


def test_all_faults_are_listed_by_the_models_names():
    given = dict(in_torch().state_dict())
    del given["head.bias"]
    given |= {"features.0.weight": torch.ones(1), "extra": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing keys: 'Dense_0.bias'(.|\n)*'extra'(.|\n)*Conv_0.weight: \(1,\)"):
        interop.load_state_dict(linen_net(), given, BY_HAND["pairs"])


def test_a_suggestion_in_order_is_right_and_is_not_applied():
    module, model = in_torch(12), linen_net(12)  # with twelve, Linen's Conv_10 sorts before Conv_2
    suggestion = interop.suggest_rename(model, module.state_dict())
    assert not suggestion.unmatched and not suggestion.missing and not suggestion.ambiguous
    expected = {f"features.{3 * i}.weight": f"Conv_{i}.weight" for i in range(12)}
    expected |= {f"features.{3 * i + 1}.bias": f"BatchNorm_{i}.bias" for i in range(12)}
    assert {name: suggestion.rename[name] for name in expected} == expected
    lines = [line.split() for line in str(suggestion).splitlines()]
    assert lines[1] == ["features.0", "Conv_0", "shape"] and ["features.3", "Conv_1", "order"] in lines
    assert lines[-1][:3] == ["25", "layers", "matched,"]
    with pytest.raises(ValueError, match="missing keys"):
        interop.load_state_dict(model, module.state_dict())
    loaded = interop.load_state_dict(model, module.state_dict(), suggestion.rename)
    home = interop.state_dict(loaded, suggestion.rename)
    assert all((home[name] == value.numpy()).all() for name, value in module.state_dict().items())


class Bottleneck(linen.Module):
    """As in Flax's ImageNet example."""

    width: int
    stride: int

    @linen.compact
    def __call__(self, x):
        y = linen.BatchNorm(True)(linen.Conv(self.width, (1, 1), use_bias=False)(x))
        y = linen.BatchNorm(True)(linen.Conv(self.width, (3, 3), self.stride, use_bias=False)(y))
        y = linen.BatchNorm(True)(linen.Conv(4 * self.width, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = linen.Conv(4 * self.width, (1, 1), self.stride, use_bias=False, name="conv_proj")(x)
            x = linen.BatchNorm(True, name="norm_proj")(x)
        return x + y


class ResNet50(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(64, (7, 7), 2, use_bias=False, name="conv_init")(x)
        x = linen.avg_pool(linen.BatchNorm(True, name="bn_init")(x), (2, 2), (2, 2))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return linen.Dense(1000)(x.mean((1, 2)))


def test_a_suggestion_for_a_real_network_is_right():
    """Flax's names of ResNet-50 against torchvision's, whose blocks have a shape in common with their shortcuts."""
    with torch.device("meta"):
        state = torchvision.models.resnet50().state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    module = ResNet50()
    model = (module, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    suggestion = interop.suggest_rename(model, state)
    assert not suggestion.unmatched and not suggestion.missing and not suggestion.ambiguous
    parts = {"conv1": "Conv_0", "bn1": "BatchNorm_0", "conv2": "Conv_1", "bn2": "BatchNorm_1", "conv3": "Conv_2"}
    parts |= {"bn3": "BatchNorm_2", "downsample.0": "conv_proj", "downsample.1": "norm_proj"}
    expected = {"conv1": "conv_init", "bn1": "bn_init", "fc": "Dense_0"}
    number = 0
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            for theirs, ours in parts.items():
                if block == 0 or "downsample" not in theirs:
                    expected[f"layer{stage}.{block}.{theirs}"] = f"Bottleneck_{number}.{ours}"
            number += 1
    assert {match.theirs: match.ours for match in suggestion.matches} == expected


def test_a_suggestion_says_what_is_ambiguous_and_what_fits_nowhere():
    state = {f"{name}.weight": np.zeros((4, 4)) for name in ("a", "b", "c")} | {"odd.weight": np.zeros(3)}
    model = nnx.Dict(first=linear(4, 4), second=linear(4, 4), third=linear(2, 4))
    suggestion = interop.suggest_rename(model, state)
    assert len(suggestion.matches) == 2 and len(suggestion.ambiguous) == 2
    assert set(suggestion.unmatched) - {"a", "b", "c"} == {"odd"} and set(suggestion.missing) == {"third"}
    table = str(suggestion)
    assert "weight (3,)" in table and "weight (4, 2)" in table and "2 of them ambiguous" in table


def test_a_suggestion_uses_the_place_of_a_layer_that_is_defined_elsewhere():
    theirs = {
        f"layer{i}.{name}.weight": np.zeros(shape)
        for i in range(2)
        for name, shape in (("down", (4, 4)), ("x", (4, 5)), ("y", (5, 4)))
    }
    ours = nnx.Dict(**{f"block{i}": nnx.Dict(p=linear(5, 4), q=linear(4, 5), shortcut=linear(4, 4)) for i in range(2)})
    suggestion = interop.suggest_rename(ours, theirs)
    assert suggestion.rename == {
        f"layer{i}.{a}.weight": f"block{i}.{b}.weight"
        for i in range(2)
        for a, b in (("down", "shortcut"), ("x", "p"), ("y", "q"))
    }
    assert {match.reason for match in suggestion.matches} == {"order"} and not suggestion.ambiguous


def linear(inputs, outputs):
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=jax.nn.initializers.zeros, rngs=nnx.Rngs(0))
