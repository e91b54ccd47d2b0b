"""State dicts: bit-identical round trips, and every fault of a wrong one at once."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchvision
from flax import nnx
from parity_tools import randomised

import interop
import jaxnorm
from interop.weights._state_dict import _names


class Small(torch.nn.Module):
    """Tied weights, a frozen parameter, a shared layer, buffers of several types, one of them not persistent."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.again = self.bn
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.fixed = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("calls", torch.tensor(2**40))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("third", torch.ones(4, dtype=torch.bfloat16) / 3)
        self.register_buffer("hidden", torch.ones(4), persistent=False)

    def forward(self, x):
        x = self.again(self.bn(self.conv(x))).mean((2, 3))
        return self.second(self.first(x)) * self.fixed * self.mask + self.hidden + self.third


def small():
    module = randomised(Small())
    module.third = module.third.to(torch.bfloat16)
    return module


def imported():
    module = small()
    return module, interop.from_torch(module, torch.zeros(2, 3, 8, 8, dtype=torch.float64))


def assert_identical(found, module):
    expected = module.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        assert found[name].tobytes() == raw.numpy().tobytes(), name


def test_an_import_gives_back_every_entry_bit_for_bit():
    module, model = imported()
    assert_identical(interop.state_dict(model), module)


def test_a_checkpoint_file_of_an_import_loads_strictly_in_pytorch(tmp_path):
    _module, model = imported()
    interop.save_checkpoint(tmp_path / "model.pth", model)
    other = small()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    assert_identical({n: np.asarray(v) for n, v in interop.state_dict(model).items()}, other)


def test_loading_a_state_dict_gives_its_values():
    _module, model = imported()
    other = small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        other.bn.num_batches_tracked.fill_(7)
    assert interop.load_state_dict(model, other.state_dict()) is model
    assert_identical(interop.state_dict(model), other)
    assert model.first.weight is model.second.weight
    assert model.bn is model.again


def test_all_faults_of_a_state_dict_are_listed_and_nothing_is_changed():
    module, model = imported()
    wrong = dict(module.state_dict())
    del wrong["conv.weight"], wrong["first.bias"]
    wrong |= {"extra.weight": torch.ones(1), "bn.weight": torch.ones(5), "conv.bias": torch.zeros(4)}
    with pytest.raises(ValueError) as error:
        interop.load_state_dict(model, wrong)
    for part in (
        "'conv.weight', 'first.bias'",
        "'extra.weight'",
        "bn.weight: (5,) in the state dict, (4,) in the model",
    ):
        assert part in str(error.value)
    assert_identical(interop.state_dict(model), module)


def test_a_checkpoint_of_another_architecture_is_one_error():
    model = interop.from_torch(torchvision.models.resnet50(), torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"missing keys(.|\n)*unexpected keys(.|\n)*shapes that differ"):
        interop.load_state_dict(
            model, torchvision.models.resnet18(num_classes=10).state_dict() | {"head.bias": torch.zeros(1)}
        )


def test_loading_without_strict_keeps_what_is_missing():
    _module, model = imported()
    interop.load_state_dict(model, {"fixed": np.full(4, 3.0), "unknown": np.ones(1)}, strict=False)
    assert (np.asarray(model.fixed[...]) == 3).all()
    with pytest.raises(ValueError, match="shapes that differ"):
        interop.load_state_dict(model, {"fixed": np.ones(5)}, strict=False)


def test_a_checkpoint_older_than_counters_loads():
    module, model = imported()
    old = {n: v for n, v in module.state_dict().items() if not n.endswith("num_batches_tracked")}
    interop.load_state_dict(model, old)


@pytest.mark.parametrize("as_mapping", [False, True])
def test_names_are_changed_on_request(as_mapping):
    module, model = imported()
    given = {f"module.{n}": v for n, v in module.state_dict().items()}
    rename = {n: n.removeprefix("module.") for n in given} if as_mapping else lambda n: n.removeprefix("module.")
    interop.load_state_dict(model, given, rename=rename)
    with pytest.raises(ValueError, match="renamed to one"):
        interop.load_state_dict(model, given, rename=lambda name: "conv.weight")


def test_a_tree_of_batch_norm_layers_has_pytorchs_names():
    class Net(nnx.Module):
        def __init__(self):
            self.norms = nnx.List([jaxnorm.nnx.BatchNorm(3, count_batches=True, rngs=nnx.Rngs(0)) for _ in range(2)])

    expected = torch.nn.ModuleDict({"norms": torch.nn.ModuleList([torch.nn.BatchNorm1d(3) for _ in range(2)])})
    net = Net()
    assert set(interop.state_dict(net)) == set(expected.state_dict())
    interop.load_state_dict(net, expected.state_dict())
    assert float(net.norms[0].var[...][0]) == 1


def test_the_kinds_of_variables_are_told_apart():
    _, model = imported()
    assert type(model.conv.weight) is nnx.Param
    assert isinstance(model.bn, jaxnorm.nnx.BatchNorm)
    assert type(model.bn.mean) is nnx.BatchStat
    assert type(model.fixed) is interop.Frozen
    assert type(model.mask) is interop.Buffer
    assert "hidden" not in interop.state_dict(model)
    assert len(nnx.to_flat_state(nnx.state(model, nnx.Param))) == 7  # a tied weight, or a shared layer's, counts once


def test_integers_that_jax_cannot_hold_are_errors_at_the_door():
    module = small().float()
    import jax

    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="'calls' is int64 with values that do not fit int32"):
            interop.from_torch(module, torch.zeros(2, 3, 8, 8))
        module.calls.fill_(5)
        with pytest.raises(ValueError, match=r"'conv.weight' is float64"):
            interop.from_torch(copy.deepcopy(module).double(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        model = interop.from_torch(module, torch.zeros(2, 3, 8, 8))
        assert model.calls[...].dtype == jnp.int32
        assert interop.state_dict(model)["calls"].dtype == np.int64
        with pytest.raises(ValueError, match=r"integers too large(.|\n)*calls"):
            interop.load_state_dict(model, {"calls": np.asarray(2**40)}, strict=False)


COUNTED = {"running_mean": np.zeros(3), "running_var": np.ones(3), "num_batches_tracked": np.asarray(4)}


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("num_batches_tracked", np.float32(3e19), r"numbers outside the range of int64: num_batches_tracked"),
        ("num_batches_tracked", np.float32("nan"), r"numbers outside the range of int64: num_batches_tracked"),
        ("weight", np.array([1 + 2j, 1, 1]), r"complex numbers for float32: weight"),
        ("weight", np.array([1.5, None, 1]), r"object instead of numbers: weight"),
        ("weight", np.array([1, 1, -1e300]), r"numbers too large for float32: weight"),
        ("weight", np.array([1, 2**15, 2**16]), r"numbers too large for float16: weight"),
    ],
)
def test_values_that_the_models_dtypes_cannot_hold_are_errors_and_nothing_is_changed(entry, value, message):
    dtype = np.float16 if "float16" in message else np.float32
    layer = jaxnorm.nnx.BatchNorm(3, count_batches=True, param_dtype=dtype, rngs=nnx.Rngs(0))
    before = interop.state_dict(layer)
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(layer, {"weight": np.full(3, 7.0), "bias": np.ones(3), **COUNTED, entry: value})
    for name, value in interop.state_dict(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_values_are_rounded_to_the_models_dtypes():
    layer = jaxnorm.nnx.BatchNorm(3, count_batches=True, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    given = {"weight": np.array([0.1, np.inf, np.nan]), "bias": torch.tensor([1.5, -2.0, 0.0]).to(torch.float8_e4m3fn)}
    interop.load_state_dict(layer, {**COUNTED, **given, "num_batches_tracked": np.float32(5)})
    np.testing.assert_array_equal(np.float32(layer.scale[...]), np.float32([jnp.bfloat16(0.1), np.inf, np.nan]))
    np.testing.assert_array_equal(layer.bias[...], [1.5, -2, 0])
    assert layer.num_batches_tracked[...] == 5


def test_what_is_no_array_is_an_error_that_names_it():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for value in (torch.eye(2).to_sparse(), torch.ones(2, 2, device="meta")):
        with pytest.raises(ValueError, match="not to be read as an array: weight "):
            interop.load_state_dict(model, {"weight": value, "bias": torch.ones(2)})


def test_what_is_no_mapping_from_names_is_an_error_that_says_so():
    with pytest.raises(TypeError, match=r"load_checkpoint reads one from a file\), found str"):
        _names("x.pth", None)
    with pytest.raises(TypeError, match="keys of the state dict have to be strings, found 0"):
        _names({"weight": np.ones(2), 0: np.ones(2)}, None)


def test_without_strict_a_given_bias_of_a_cell_counts_and_the_other_stays():
    cell = nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0))
    given = interop.state_dict(cell) | {"bias_hh": np.arange(12, dtype=np.float32)}
    interop.load_state_dict(cell, given)
    del given["bias_hh"]
    interop.load_state_dict(cell, given | {"bias_ih": np.ones(12, np.float32)}, strict=False)
    np.testing.assert_array_equal(interop.state_dict(cell)["bias_hh"], np.arange(12) + 1)
    blank = nnx.eval_shape(lambda: nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'bias_hh' missing, and the model has no values"):
        interop.load_state_dict(blank, given, strict=False)


class Mixed(nnx.Module):
    """Variables in an nnx.State, and arrays without a variable."""

    def __init__(self):
        self.state = nnx.data(nnx.State({"p": nnx.Param(jnp.ones(3)), "q": {"r": nnx.BatchStat(jnp.full(2, 2.0))}}))
        self.table = jnp.arange(4.0)
        self.rngs = nnx.Rngs(0)


def test_variables_in_a_state_are_part_of_the_state_dict():
    state = interop.state_dict(Mixed())
    assert set(state) == {"state.p", "state.q.r"}
    model = interop.load_state_dict(Mixed(), {name: 5 * value for name, value in state.items()})
    for name, value in interop.state_dict(model).items():
        np.testing.assert_array_equal(value, 5 * state[name])


def test_an_imported_array_shares_no_memory_with_the_module():
    module, model = imported()
    before = np.array(model.conv.weight[...])
    with torch.no_grad():
        module.conv.weight.zero_()
    assert (np.asarray(model.conv.weight[...]) == before).all()


def test_a_train_state_goes_home_as_its_model_does_and_diverged_replicas_are_refused():
    model = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    for name, value in interop.state_dict(model).items():
        np.testing.assert_array_equal(interop.state_dict(state)[name], value)
    replicated = jaxnorm.replicate(state)
    apart = jax.tree.map(lambda x: x + jnp.arange(8.0)[:, None], replicated.batch_stats)
    with pytest.raises(ValueError, match="the replicas differ"):
        interop.state_dict(replicated.replace(batch_stats=apart))
