"""Flax source of PyTorch models: proven before it is handed over, of classes, named and loaded as PyTorch's."""

import ast
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision_cpu  # noqa: F401
from flax import nnx
from page_reader import programs
from torch import nn

import interop
import jaxnorm
from interop.porting import proof
from interop.porting.printers import registry

pytestmark = pytest.mark.once
PORTED = pathlib.Path(__file__).parent.parent / "examples" / "ported"


class Gate(nn.Module):
    def __init__(self, width, act):
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1), act

    def forward(self, x):
        return x * torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    def __init__(self, inputs, width, stride=1, gate=False, act=nn.ReLU, noisy=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.gate = Gate(width, act()) if gate else None
        self.act = act()
        self.short = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), nn.BatchNorm2d(width)) if stride > 1 else None
        self.noisy = noisy

    def forward(self, x):
        out = self.act(self.bn(self.conv(x)))
        if self.gate is not None:
            out = self.gate(out)
        if self.training and self.noisy:
            out = out * (1 + 0.1 * torch.rand_like(out))
        return out + (x if self.short is None else self.short(x))


class Net(nn.Module):
    """Blocks of one class with options, what only training does, a list, arrays of its own, a flatten."""

    def __init__(self, blocks=(2, 3), classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        width = 8
        for i, count in enumerate(blocks):
            first = Block(width, 16 * (i + 1), 2, gate=bool(i), noisy=True)
            width = 16 * (i + 1)
            rest = [Block(width, width, gate=True, act=nn.SiLU) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.full((1, width, 1, 1), 0.5))
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width * 4, classes)

    def forward(self, images):
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        x = x * self.scale.view(1, -1, 1, 1) + self.shift
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.drop(x.flatten(1)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def text(net):
    return interop.flax_source(net, torch.zeros(4, 3, 16, 16), name="net")


def made(text, function="net", **options):
    names = {"__name__": "ported"}
    exec(compile(text, "ported.py", "exec"), names)
    return names[function](**options, rngs=nnx.Rngs(0))


def largest(text):
    """The differences that the docstring states."""
    return [float(x) for x in re.findall(r"(?:eval|train|gradients|statistics) (\d\S*e[-+]\d+)", text.split('"""')[1])]


def test_a_model_is_written_as_classes_and_proven(text):
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert list(classes) == ["Gate", "Block", "Net"]  # one for each of PyTorch's, whatever the options
    assert len(largest(text)) == 4 and max(largest(text)) <= 1e-8
    assert "import torch" not in text and "interop" not in text.split('"""')[2]
    assert "not self.deterministic" in text and "nnx.Dropout(0.3" in text
    assert "transpose(0, 3, 1, 2).reshape" in text  # a flatten in PyTorch's order; no other transposition
    assert text.count("transpose") == 1


def test_ruff_has_nothing_to_say(text, tmp_path):
    (tmp_path / "net.py").write_text(text)
    check = ["check", "--select", "E,F,I,UP,B", "--line-length", "120"]
    for arguments in (check, ["format", "--check", "--line-length", "120"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--isolated", str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stdout


def test_checkpoints_load_by_name_and_go_home(net, text):
    model = interop.load_state_dict(made(text), net.state_dict())
    home = interop.state_dict(model)
    for name, expected in net.state_dict().items():
        assert home[name].tobytes() == expected.numpy().tobytes(), name
    Net().load_state_dict(interop.to_torch(home), strict=True)
    model.eval()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    net.train()
    np.testing.assert_allclose(model(jnp.asarray(x.permute(0, 2, 3, 1).numpy())), expected, rtol=1e-4, atol=1e-5)


def test_siblings_are_made_by_arguments(text):
    """Other numbers of blocks and classes are PyTorch's model with these."""
    model = made(text, layers=(3, 1), num_classes=7)
    other = Net(blocks=(3, 1), classes=7)
    interop.load_state_dict(model, other.state_dict())
    model.eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = other.eval()(x).numpy()
    np.testing.assert_allclose(model(jnp.asarray(x.permute(0, 2, 3, 1).numpy())), expected, rtol=1e-4, atol=1e-5)


def test_it_trains_and_synchronises_as_any_flax_model(text):
    model = jaxnorm.convert_sync_batchnorm(made(text), axis_name="batch")
    norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, jaxnorm.nnx.BatchNorm)]
    assert norms and all(norm.axis_name == "batch" for norm in norms)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    model = made(text)
    model.train()
    assert not np.array_equal(model(x), model(x))  # dropout and noise draw anew
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.special.i0(self.first(x)) + torch.lgamma(self.second(x))


def test_what_has_no_expression_is_listed_at_once():
    both = r"(?s)without a plain expression:.*i0.*lgamma"
    with pytest.raises(interop.PortError, match=both):
        interop.flax_source(Strange(), torch.zeros(2, 4))


def test_what_differs_is_not_handed_over(monkeypatch):
    wrong = registry._printers["aten.silu.default"]
    monkeypatch.setitem(registry._printers, "aten.relu.default", wrong)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(interop.PortError, match=r"differs from PyTorch: eval 0 by \d"):
        interop.flax_source(module, torch.randn(6, 4))


def test_what_does_not_run_is_not_handed_over():
    with pytest.raises(interop.PortError, match="does not run"):
        proof.prove("def net(*, rngs):\n    return missing", "net", nn.Linear(2, 2), (torch.zeros(2, 2),))


def test_the_module_is_left_as_it_was(net):
    before = {name: x.clone() for name, x in net.state_dict().items()}
    interop.flax_source(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.zeros(4, 3))
    assert net.training
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


@pytest.mark.parametrize("name", sorted(path.stem for path in PORTED.glob("*.py")))
def test_the_examples_are_what_is_written_today(name):
    """Their classes; that they compute the same was found when they were written, and stands in their docstrings."""
    from interop._flax_source import assembled
    from interop.cli.models import build
    from interop.porting.file import written

    there = (PORTED / f"{name}.py").read_text(encoding="utf-8")
    origin = re.search(r"as (\S+) has it", there)[1]
    assembly = assembled(build(origin, {}), [torch.zeros(2, 3, 64, 64)], name)
    now = written(assembly, name, origin, None)
    assert now.split('"""', 2)[2] == there.split('"""', 2)[2]
    assert max(largest(there)) <= 1e-8


def test_the_page_about_porting_runs(tmp_path, monkeypatch):
    writing, reading = programs("docs/porting.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {}
    writing._replace(text=writing.text.replace("64, 64)", "48, 48)")).run(names)
    reading.run(names)
    assert len(names["other"].layer3.layers) == 6 and names["other"].fc.out_features == 10


def test_the_command(tmp_path, capsys):
    from interop.cli import main

    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    assert main(["port", "torchvision:resnet18", str(tmp_path / "small.py"), "--input", "2,3,nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["port", "test_porting:Gate", str(tmp_path / "gate.py"), "--input", "2,8,6,6"]) == 2
    assert "does not take these options" in capsys.readouterr().err or not (tmp_path / "gate.py").exists()
    assert main(["port", "test_porting:Net", str(tmp_path / "net.py"), "--input", "4,3,16,16"]) == 0
    assert re.search(r"test_porting:Net: \d+ lines, 3 classes", capsys.readouterr().out)
    assert (tmp_path / "net.py").read_text().startswith('"""net in Flax NNX, as test_porting:Net has it in PyTorch.')


class Layer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, features):
        return self.conv(torch.relu(self.norm(torch.cat(features, 1))))


class Dense(nn.Module):
    """Layers named by numbers, each of which is given what all before it gave."""

    def __init__(self, inputs, count):
        super().__init__()
        self.count = count
        for i in range(count):
            self.add_module(f"layer{i + 1}", Layer(inputs + 4 * i, 4))

    def forward(self, x):
        features = [x]
        for i in range(self.count):
            features.append(getattr(self, f"layer{i + 1}")(features))
        return torch.cat(features, 1)


class Heads(nn.Module):
    """One for each scale; what eval mode gives is made of what both modes compute."""

    def __init__(self, widths):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv2d(n, 6, 1), nn.BatchNorm2d(6)) for n in widths)

    def forward(self, scales):
        found = torch.cat([head(x).flatten(2) for head, x in zip(self.heads, scales, strict=True)], 2)
        if self.training:
            return found
        boxes, scores = found.split((4, 2), 1)
        places = torch.arange(found.shape[2], dtype=found.dtype) + 0.5
        return torch.cat([boxes * 2 + places, scores.sigmoid()], 1)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Dense(3, 3), Dense(15, 5), Dense(35, 4)
        self.heads = Heads((15, 35, 51))

    def forward(self, x):
        a = self.first(x)
        b = self.second(nn.functional.avg_pool2d(a, 2))
        c = self.third(nn.functional.interpolate(b, scale_factor=2.0))
        return self.heads((a, b, c))


def test_loops_lists_and_modes_that_end_apart():
    torch.manual_seed(0)
    text = interop.flax_source(Pyramid(), torch.zeros(3, 3, 8, 8))
    assert [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)] == [
        "Layer", "Dense", "Heads", "Pyramid",
    ]  # fmt: skip
    assert 'setattr(self, f"layer{i + 1}", Layer(' in text and "for i in range(self.depth):" in text
    assert "for n in (15, 35, 51)" in text
    assert re.search(r"\w+, \w+ = jnp\.split\(", text)
    heads = text.partition("class Heads")[2].partition("class ")[0]
    assert heads.count("self.heads[0](") == 1  # what both modes compute stands there once
    assert "if self.deterministic:" in heads and heads.count("return ") == 2
    assert max(largest(text)) <= 1e-8


class Stage(nn.Module):
    """The first has no way down: what its block is wide says what would go in."""

    def __init__(self, width, down):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(width // 2, width, 1, 2), nn.BatchNorm2d(width)) if down else None
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x):
        return self.block(x if self.down is None else self.down(x))


def test_an_argument_that_only_some_instances_have():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), Stage(4, False), Stage(8, True), Stage(16, True))
    text = interop.flax_source(module, torch.zeros(3, 3, 8, 8), name="stages")  # within 1e-8, or an error
    assert text.count("class Stage(") == 1 and "2 * in_features" in text


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv3_large_100"])
def test_the_shapes_beside_the_code_are_those_there(name):
    text = (PORTED / f"{name}.py").read_text(encoding="utf-8")
    size = int(re.search(r"# x: \(N, (\d+), \d+, 3\)$", text, re.M)[1])
    beside = r"^(\s+)(\w+) = (.*)  # \(N, (.*)\)$"
    assert len(re.findall(beside, text, re.M)) >= 3
    names = {"__name__": "ported"}
    exec(re.sub(beside, r"\1\2 = \3; assert \2.shape == (2, \4), \2.shape", text, flags=re.M), names)
    model = nnx.eval_shape(lambda: names[name](rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))


def test_bfloat16_stays_bfloat16_as_in_pytorch():
    names = {"__name__": "ported"}
    exec((PORTED / "resnet50.py").read_text(encoding="utf-8"), names)
    model = nnx.eval_shape(lambda: names["resnet50"](rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.bfloat16)
    found = jax.eval_shape(lambda p, r, x: nnx.merge(graph, p, r)(x), params, rest, images)
    assert found.dtype == jnp.bfloat16
