"""The artifact: what is saved runs again without torch, and a damaged one is a clear error."""

import json
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import interop
from interop.conventions import torch_momentum
from interop.errors import ProgramError
from interop.program.encoding import decode, decode_model, encode, encode_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, bias=False)
        self.bn = torch.nn.BatchNorm2d(8, momentum=0.03, eps=1e-3)
        self.average = torch.nn.BatchNorm2d(8, momentum=None)
        self.drop = torch.nn.Dropout(0.5)
        self.fc = torch.nn.Linear(8, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
        x = torch.relu(self.average(self.bn(self.conv(x)))) * torch.tensor([1.0, 2.0] * 4)[:, None, None]
        return {"logits": self.fc(self.drop(x.mean((2, 3)))), "steps": self.steps}


@pytest.fixture(scope="module")
def model():
    return interop.from_torch(Net(), torch.zeros(2, 3, 8, 8))


@pytest.fixture
def saved(model, tmp_path):
    interop.save(model, tmp_path / "net")
    return tmp_path / "net"


def images(n=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 3, 8, 8)), jnp.float32)


def test_a_saved_model_is_the_same_model(model, saved):
    again = interop.load(saved)
    for mode in ("eval", "train"):
        getattr(model, mode)(), getattr(again, mode)()
        first, second = nnx.clone(model), nnx.clone(again)
        np.testing.assert_array_equal(first(images())["logits"], second(images())["logits"])
        assert all(
            (a == b).all() for a, b in zip(*(interop.state_dict(m).values() for m in (first, second)), strict=True)
        )
    assert nnx.graphdef(model) == nnx.graphdef(again)
    assert torch_momentum(again.bn.momentum) == 0.03
    assert again.average.momentum is None


def test_flags_and_values_are_saved_as_they_are_now(model, tmp_path):
    changed = nnx.clone(model)
    changed.eval()
    changed.bn.momentum, changed.bn.epsilon = 0.5, 0.1
    changed.bn.use_running_average = False
    changed.conv.weight[...] = changed.conv.weight[...] + 1
    interop.save(changed, tmp_path)
    again = interop.load(tmp_path)
    assert (again.bn.momentum, again.bn.epsilon, again.bn.use_running_average) == (0.5, 0.1, False)
    assert (again.deterministic, again.average.use_running_average) == (True, True)
    np.testing.assert_array_equal(again.conv.weight[...], changed.conv.weight[...])


def test_a_process_without_torch_loads_it_and_takes_a_training_step(saved):
    code = """
    import sys
    sys.modules["torch"] = None  # importing it fails
    import jax, jax.numpy as jnp, optax
    import interop, jaxnorm

    model = interop.load(sys.argv[1])
    model.train()
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    step = jaxnorm.train_step(lambda model, batch: (jnp.square(model(batch)["logits"]).mean(), {}))
    new, metrics = jax.jit(step)(state, jnp.ones((4, 3, 8, 8)))
    before, after = (interop.state_dict(s.model()) for s in (state, new))
    assert (before["conv.weight"] != after["conv.weight"]).any() or (before["fc.bias"] != after["fc.bias"]).any()
    assert after["bn.num_batches_tracked"] == 1
    interop.save_checkpoint(sys.argv[1] + "/out.safetensors", after)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(saved)], check=True)
    from safetensors.torch import load_file

    Net().load_state_dict(load_file(saved / "out.safetensors"), strict=True)


def test_a_program_is_json_and_comes_back_equal(model):
    description = model._interop.model
    text = json.dumps(encode_model(description), allow_nan=False)
    again = decode_model(json.loads(text))
    assert again == description
    assert hash(again) == hash(description)


@pytest.mark.parametrize("value", [None, True, 3, -1.5, float("inf"), "a", (1, [2, (3,)]), {"a": 1, 2: 3}, 1 + 2j])
def test_every_value_of_the_format_comes_back(value):
    assert decode(json.loads(json.dumps(encode(value), allow_nan=False))) == value


def test_the_format_refuses_what_it_does_not_know():
    for data in ({"$Model": {}}, {"a": 1, "b": 2}, {"$float": "1"}, {"$Value": {"name": "x", "more": 1}}):
        with pytest.raises(ProgramError):
            decode(data)
    with pytest.raises(ProgramError, match="cannot hold"):
        encode(object())


def edited(folder, change):
    path = folder / "program.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "reads version 2 of the format, found 99"),
        (lambda d: d.update(format="other"), "expected the format"),
        (lambda d: d.pop("training"), "training is None"),
        (lambda d: d["model"]["$Model"].pop("train"), "a Model has the fields"),
        (lambda d: d["model"]["$Model"]["train"]["$Program"]["nodes"]["$tuple"].pop(0), "before it is defined"),
        (lambda d: d["model"]["$Model"]["entries"]["$tuple"].pop(0), "unknown entry"),
        (lambda d: d["model"]["$Model"].update(entries=3), "field 'entries'"),
    ],
)
def test_a_damaged_program_is_an_error(saved, change, message):
    edited(saved, change)
    with pytest.raises(interop.CheckpointError, match=message):
        interop.load(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_features", -1), ("num_features", 2**70), ("momentum", 2.0**70), ("eps", {"$float": "nan"})],
)
def test_a_batch_norm_layer_with_impossible_numbers_is_a_damaged_program(saved, field, value):
    edited(saved, lambda d: d["model"]["$Model"]["batch_norms"]["$tuple"][0]["$BatchNormLayer"].update({field: value}))
    with pytest.raises(interop.CheckpointError, match=rf"BatchNorm layer 'bn': {field} = \S+ is not between 0 and"):
        interop.load(saved)


def test_a_changed_program_is_refused_or_is_the_same_program(model, saved):
    """One byte replaced, inserted or taken away, anywhere: what still loads is equal in graphs, flags and arrays."""
    text = (saved / "program.json").read_text()
    rng = np.random.default_rng(0)
    signs = list('{}[]",:0123456789.-+eEaftn$ ')
    outcomes = {"refused": 0, "equal": 0}
    changed = [text.replace('","', '", "', 1)]  # a space between two values changes nothing
    for _ in range(200):
        place, kind = int(rng.integers(len(text))), int(rng.integers(3))
        sign = "" if kind == 0 else str(rng.choice(signs))
        changed.append(text[:place] + sign + text[place + (kind < 2) :])
    for other in changed:
        (saved / "program.json").write_text(other)
        try:
            again = interop.load(saved)
        except (interop.CheckpointError, NotImplementedError):
            outcomes["refused"] += 1
            continue
        outcomes["equal"] += 1
        assert encode_model(again._interop.model) == encode_model(model._interop.model)
        assert nnx.graphdef(again) == nnx.graphdef(model)
        for name, value in interop.state_dict(model).items():
            np.testing.assert_array_equal(interop.state_dict(again)[name], value)
    assert outcomes["refused"] > 100 and outcomes["equal"] > 0


def test_arrays_of_another_program_are_an_error(saved, tmp_path):
    other = interop.from_torch(torch.nn.Linear(3, 3), torch.zeros(2, 3))
    interop.save(other, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(saved / "model.safetensors")
    with pytest.raises(interop.CheckpointError, match="belongs to another program"):
        interop.load(saved)


def test_missing_and_truncated_files_are_errors(saved):
    with pytest.raises(interop.CheckpointError, match=r"program\.json"):
        interop.load(saved / "nowhere")
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(interop.CheckpointError, match="truncated"):
        interop.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(interop.CheckpointError, match="no such file"):
        interop.load(saved)
    (saved / "program.json").write_text((saved / "program.json").read_text()[:-20])
    with pytest.raises(interop.CheckpointError):
        interop.load(saved)


def test_only_imported_models_have_an_artifact(tmp_path):
    with pytest.raises(TypeError, match="from_torch"):
        interop.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)
