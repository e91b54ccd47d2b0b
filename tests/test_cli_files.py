"""The command line on files as people have them: settings, several state dicts, runs; and on broken libraries."""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import torch
from torch import nn

import interop
import jaxnorm
from interop.cli import main

ROOT = pathlib.Path(__file__).parents[1]


class Small(nn.Module):
    """Built by name, as `test_cli_files:Small`."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


SMALL = ["test_cli_files:Small", "--input", "4,3,8,8"]


@pytest.fixture
def run(capsys):
    """Runs a command in this process: its exit code and what it printed."""

    def run(*arguments, code=0):
        capsys.readouterr()
        found = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert found == code, out + err
        assert err.count("\n") == (1 if code == 2 else 0), err
        return err if code == 2 else out

    return run


# inspect


def test_inspect_shows_the_settings_and_metadata_of_any_kind(run, tmp_path):
    """Arrays, tensors, namespaces, classes; and of `args` every value, however many there are."""
    many = {f"option_{i}": i for i in range(150)}
    value = {
        "state_dict": Small().state_dict(),
        "args": argparse.Namespace(lr=0.1, mean=(0.4, 0.5), path=pathlib.PurePosixPath("/data"), resume="", **many),
        "rng": torch.get_rng_state(),
        "array": np.ones((3, 2)),
        "number": np.float64(3),
        "history": [{"loss": np.float32(1)}, np.ones(3)],
        "optimizer": torch.optim.SGD(Small().parameters(), 0.1, momentum=0.9).state_dict(),
        "counts": collections.Counter("abca"),
        "kind": torch.optim.lr_scheduler.LinearLR,
        "text": "x" * 1000,
        "epoch": 3,
    }
    torch.save(value, tmp_path / "x.pth.tar")
    out = run("inspect", tmp_path / "x.pth.tar")
    settings = re.search(r"^args: .*\n(?:  .*\n)*", out, re.M)[0]
    assert max(map(len, settings.splitlines())) <= 110
    text = " ".join(settings.split())
    assert text.startswith("args: lr=0.1, mean=[0.4, 0.5], path=/data, resume=,")
    assert all(f"option_{i}={i}" in text for i in range(150))
    assert "\noptimizer: {state, param_groups}\n" in out and "\ncounts: a=2, b=1, c=1\n" in out
    assert "\narray: array (3, 2) float64\n" in out and "\nrng: array (" in out and "\nnumber: 3.0\n" in out
    assert f"\ntext: {'x' * 200}...\n" in out and "\nepoch: 3\n" in out and "\nhistory: " in out and "\nkind: " in out
    found = json.loads(run("inspect", tmp_path / "x.pth.tar", "--json"))
    assert found["metadata"].keys() >= value.keys() - {"state_dict"} and found["metadata"]["epoch"] == 3


def test_inspect_says_how_to_ask_for_each_state_dict(run, tmp_path):
    """What --which model and --which ema mean in this file is what they give."""
    state = {name: value.numpy() for name, value in Small().state_dict().items()}
    average = {name: value + 1 for name, value in state.items()}
    path = tmp_path / "x.pth"
    interop.save_checkpoint(path, state, {"epoch": 3}, ema=average, layout="torchvision")
    rows = [line.split() for line in run("inspect", path).splitlines() if line.startswith("model")]
    assert rows == [["model", "this", "one", "model"], ["model_ema", "ema", "or", "model_ema"]]
    out = run("inspect", path, "--which", "ema")
    assert re.search(r"^model_ema +this one +ema or model_ema$", out, re.M)
    choices = json.loads(run("inspect", path, "--json"))["state_dicts"]
    assert choices[1] == {"name": "model_ema", "which": ["ema", "model_ema"], "taken": False}
    for choice in choices:
        for which in choice["which"]:
            assert interop.load_checkpoint(path, which).metadata["which"] == choice["name"]
    assert "'model', 'model_ema' (an average)" in run("inspect", path, "--which", "best", code=2)
    interop.save_checkpoint(path, state)
    assert "--which" not in run("inspect", path)
    assert "give --weights FILE too" in run("import", *SMALL, "--which", "ema", "--out", tmp_path / "x", code=2)


def test_inspect_says_how_to_ask_for_an_average_inside_of_a_state_dict(run, tmp_path):
    """LitEma's: one state dict, of which the file says nothing more."""
    state = {name: value.numpy() for name, value in Small().state_dict().items()}
    average = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in state.items()}
    interop.save_checkpoint(tmp_path / "x.pth", {**state, **average})
    assert re.search(r"^\(the file\) +this one +model or ema$", run("inspect", tmp_path / "x.pth"), re.M)


def test_what_is_said_of_many_layers_is_said_once(run, tmp_path):
    layers = {f"block{i}": nn.BatchNorm2d(4) for i in range(20)}
    for i, layer in enumerate(layers.values()):
        layer.running_var.fill_(-1)
        nn.init.normal_(layer.bias)
        with torch.no_grad():
            layer.weight[: 1 + i % 2] = 0
    torch.save(nn.ModuleDict(layers).state_dict(), tmp_path / "x.pth")
    out = run("inspect", tmp_path / "x.pth")
    findings = out.partition("\nfinding ")[2].splitlines()[1:]
    names = "block0, block1, block2 and 17 more"
    assert [line.split()[:2] for line in findings[:-1]] == [["error", "variance"], ["info", "dead_channels"]]
    assert all(names in line for line in findings[:-1])
    assert findings[0].endswith("all 4 channels have a negative running variance")
    assert findings[1].endswith(
        "1 of 4 channels have a scale of about 0 (0); the others likewise, with numbers of their own"
    )
    assert findings[-1] == f"every layer by its name: jaxnorm inspect {tmp_path / 'x.pth'} --json"
    assert len(json.loads(run("inspect", tmp_path / "x.pth", "--json"))["findings"]) == 40


def test_inspect_says_that_a_state_dict_has_no_eps_and_momentum(run, tmp_path):
    said = "eps and momentum are not in a state dict: the model's code has them\n"
    torch.save(Small().state_dict(), tmp_path / "x.pth")
    assert said in run("inspect", tmp_path / "x.pth")
    torch.save(Small(), tmp_path / "y.pth")
    out = run("inspect", tmp_path / "y.pth")
    assert said not in out and re.search(r"^BatchNorm .* eps +momentum$", out, re.M)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "z.pth")
    assert said not in run("inspect", tmp_path / "z.pth")


# verify


def test_verify_takes_the_options_of_import(run, tmp_path):
    module = Small(7)
    module(torch.randn(4, 3, 8, 8))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    average = {name: value * 1.5 if value.dtype == np.float32 else value for name, value in state.items()}
    weights = tmp_path / "last.pth.tar"
    interop.save_checkpoint(weights, state, {"epoch": 1}, ema=average, layout="timm")
    options = [*SMALL, "--weights", weights, "--which", "ema", "--option", "classes=7"]
    run("import", *options, "--dynamic", "0,2,3", "--out", tmp_path / "x")
    out = run("verify", *options, "--dynamic", "0,2,3")
    assert "imported to JAX" in out and "\nequal: " in out and "\nsaved" not in out
    command = [SMALL[0], tmp_path / "x", *options[1:]]
    assert re.search(r"^saved  arrays +\d+ +0 +0$", run("verify", *command), re.M)
    command[command.index("ema")] = "model"
    out = run("verify", *command, code=1)
    name = max(state, key=lambda name: np.abs(average[name] - state[name]).max() if state[name].size else 0)
    (row,) = [line.split() for line in out.splitlines() if line.startswith("saved")]
    assert float(row[3]) == pytest.approx(np.abs(average[name] - state[name]).max(), rel=1e-2)
    assert "\ndifferent: " in out
    assert "x has its own" in run("verify", *command, "--dynamic", "0", code=2)
    assert "give --weights FILE too" in run("verify", *SMALL, "--which", "ema", code=2)


# a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of an imported model, its directory, and its state after each of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    module = Small()
    with jax.enable_x64(False):
        model = interop.from_torch(module, torch.zeros(2, 3, 8, 8))
        interop.save(model, folder / "small")
        state = jaxnorm.TrainState.create(model, optax.adam(0.1), ema=jaxnorm.Ema(0.5))
        step = jax.jit(jaxnorm.train_step(lambda model, batch: ((model(batch) ** 2).mean(), {})))
        states = {}
        with jaxnorm.Checkpoints(folder / "run") as checkpoints:
            for count in (1, 2):
                state, _ = step(state, np.random.default_rng(count).normal(size=(4, 3, 8, 8)).astype(np.float32))
                checkpoints.save(count, state)
                states[count] = (interop.state_dict(state.model()), interop.state_dict(state.ema_model()))
    return folder, states


def holds(path, state):
    """torch loads it into the module, strictly, and every array has the bits of the state."""
    found = torch.load(path, weights_only=True) if isinstance(path, pathlib.Path) else path
    Small().load_state_dict(found, strict=True)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].numpy().tobytes() == value.tobytes(), name
    return True


def test_a_run_becomes_a_file_for_pytorch_in_one_command(run, trained, tmp_path):
    folder, states = trained
    out = tmp_path / "x.pth"
    command = ["export", folder / "run", out, "--model", folder / "small"]
    assert run(*command) == f"{out}: 8 arrays of Small, step 2 of {folder / 'run'}\n"
    assert holds(out, states[2][0])
    run(*command, "--step", 1)
    assert holds(out, states[1][0])
    assert "the average, step 2" in run(*command, "--ema")
    assert holds(out, states[2][1])
    assert "and their average" in run(*command, "--layout", "torchvision")
    found = torch.load(out, weights_only=True)
    assert holds(found["model"], states[2][0]) and found["model_ema"].pop("n_averaged") == 2
    assert holds({name.removeprefix("module."): x for name, x in found["model_ema"].items()}, states[2][1])
    run(*command, "--layout", "timm")
    found = torch.load(out, weights_only=True)
    assert found["arch"] == "Small" and holds(found["state_dict_ema"], states[2][1])


def test_a_run_is_exported_through_a_model_of_code(run, trained, tmp_path, monkeypatch):
    """Written by hand, or changed after the import: what `package.module:callable` gives."""
    folder, states = trained
    monkeypatch.setattr(sys.modules[__name__], "CODE", lambda: interop.load(folder / "small"), raising=False)
    run("export", folder / "run", tmp_path / "x.pth", "--model", f"{__name__}:CODE", "--rename", "^head=fc")
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {"head.weight", "head.bias"} <= found.keys()
    assert holds({name.replace("head", "fc"): x for name, x in found.items()}, states[2][0])


def test_what_is_wrong_with_a_run_is_one_line(run, trained, tmp_path):
    folder, out = trained[0], tmp_path / "x.pth"
    assert "say whose they are by --model" in run("export", folder / "run", out, code=2)
    assert "has no program.json" in run("export", tmp_path, out, "--model", folder / "small", code=2)
    command = ["export", folder / "run", out, "--model", folder / "small"]
    assert "it has those of steps [1, 2]" in run(*command, "--step", 7, code=2)
    assert "--step, --ema are for a run" in run("export", folder / "small", out, "--step", 1, "--ema", code=2)
    assert "--model is package.module:callable" in run(*command[:-1], "nothing", code=2)
    error = run("inspect", folder / "run", code=2)
    assert "is a run of jaxnorm.Checkpoints (steps 1, 2)" in error and "jaxnorm export" in error
    with pytest.raises(interop.CheckpointError, match=r"jaxnorm.restore_model"):
        interop.load_checkpoint(folder / "run")


# torchvision without operators


def test_models_are_built_where_torchvision_lacks_its_operators(tmp_path):
    """A torchvision that was built for another PyTorch: its own code without its compiled library."""
    import torchvision

    folder = pathlib.Path(torchvision.__file__).parent
    (tmp_path / "torchvision").mkdir()
    for path in folder.iterdir():
        if path.suffix != ".so":
            (tmp_path / "torchvision" / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])}
    code = """
import warnings
warnings.simplefilter("ignore")
import torch
try:
    import torchvision
except RuntimeError as error:  # the test's torchvision is as it is meant to be
    assert "operator torchvision::nms does not exist" in str(error)
else:
    raise AssertionError("torchvision has its operators")
from interop.cli.models import build
assert build("torchvision:squeezenet1_1", {"num_classes": 3}).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
assert build("timm:test_vit", {"num_classes": 3}).num_classes == 3
import torchvision
assert not torchvision.extension._has_ops()
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    assert "Couldn't load custom C++ ops" in str(error)
    print("as it should be")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout == "as it should be\n", found.stderr


def test_other_operators_that_torchvision_lacks_say_what_to_install(run, tmp_path, monkeypatch):
    import importlib

    original = importlib.import_module

    def broken(name, package=None):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::roi_align does not exist")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    error = run("import", "torchvision:resnet18", "--out", tmp_path / "x", code=2)
    assert f"was not built for torch {importlib.metadata.version('torch')}: install both from one place" in error
