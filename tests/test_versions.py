"""What was tried is what the table says, other versions are named once, and a program keeps the rules of its torch."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import interop
import interop.ops
from interop.errors import ProgramError
from interop.program import versions
from interop.program.encoding import decode_model, encode_model

TABLE = pathlib.Path(__file__).parent.parent / versions.TABLE


def test_what_was_tried_is_what_the_table_says():
    text = TABLE.read_text().partition("<!-- lanes.py: rows -->")[2]
    head, _, *lanes = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    for package, tried in versions.TRIED.items():
        found = {re.sub(r"\+.*", "", row[head.index(package)]) for row in lanes}
        assert tried == (min(found, key=versions.release), max(found, key=versions.release)), package


def test_the_floors_are_what_was_tried():
    text = (TABLE.parent.parent / "pyproject.toml").read_text()
    for package, (lowest, _) in versions.TRIED.items():
        floor = re.search(rf'"{package}>=([\d.]+)"', text)[1]
        assert versions.release(lowest)[: len(versions.release(floor))] == versions.release(floor), package


@pytest.mark.parametrize(("tried", "outside"), [(("2.0.0", "2.1.9"), True), (("99.0", "99.1"), True), (None, False)])
def test_a_version_outside_what_was_tried_is_named_once(tried, outside, monkeypatch, recwarn):
    mine = importlib.metadata.version("torch")
    monkeypatch.setattr(versions, "TRIED", {"torch": tried or (mine, mine)})
    versions.warn_untried.cache_clear()
    for _ in range(2):
        interop.from_torch(torch.nn.Linear(3, 3), torch.zeros(2, 3))
    versions.warn_untried.cache_clear()
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == outside
    if outside:
        assert f"torch {mine} (tried: {tried[0]} to {tried[1]})" in texts[0] and versions.TABLE in texts[0]


def test_a_version_begins_with_numbers():
    assert versions.release("2.14.0a0+gitabc") == (2, 14, 0)
    with pytest.raises(ValueError, match="expected a version"):
        versions.release("newest")


class Limited(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(3)

    def forward(self, x):
        return torch.fmax(x.clamp(-1, 1), torch.ones(())) + 0 * self.bn(x)


def slope_at_the_limit(model):
    return np.asarray(jax.grad(lambda x: model(x).sum())(jnp.ones((2, 3))))[0, 0]


def recorded_by(model, version):
    return dataclasses.replace(model._interop, model=dataclasses.replace(model._interop.model, torch=version))


def test_a_program_keeps_the_rules_of_the_torch_that_recorded_it(tmp_path):
    """clamp and fmax changed in 2.14: x.clamp(-1, 1) at 1, beside an equal number."""
    model = interop.from_torch(Limited().eval(), torch.zeros(2, 3))
    assert model._interop.model.torch == torch.__version__
    for version, slope in (("2.13.0", 1.0), ("2.14.0", 0.0), ("2.15.0", 0.0)):
        model._interop = recorded_by(model, version)
        interop.save(model, tmp_path / version)
        assert slope_at_the_limit(model) == slope_at_the_limit(interop.load(tmp_path / version)) == slope


def test_a_program_of_before_versions_were_written_is_of_the_version_that_there_was(tmp_path):
    model = interop.from_torch(Limited(), torch.zeros(2, 3))
    model._interop = recorded_by(model, "2.13.0")
    interop.save(model, tmp_path)
    written = json.loads((tmp_path / "program.json").read_text())
    assert "torch" not in written["model"]["$Model"]  # so that its digest is what it was
    assert interop.load(tmp_path)._interop.model.torch == "2.13.0"


def test_a_program_of_no_version_is_refused():
    model = interop.from_torch(Limited(), torch.zeros(2, 3))._interop.model
    with pytest.raises(ProgramError, match="torch: expected a version"):
        decode_model(encode_model(dataclasses.replace(model, torch="newest")))


def test_an_operation_may_have_rules_by_version():
    name = "mylib::by_version"
    first, second = (interop.register(name, since=since)(lambda x, since=since: since) for since in ("2.1", "2.10"))
    assert interop.ops.lookup("mylib.by_version.default", "2.0.9") is None
    assert interop.ops.lookup("mylib.by_version.default", "2.9.1").function is first
    assert interop.ops.lookup("mylib.by_version.default", "2.10.0+cpu").function is second
    always = interop.register(name)(lambda x: x)
    assert interop.ops.lookup("mylib.by_version.default", "2.10.0").function is always


def test_limits_beyond_an_integer_dtype():
    """Up to PyTorch 2.14 they are wrapped into the dtype; from 2.15 on no limit, or an error where no value is left."""
    x = jnp.asarray([1, 200], jnp.uint8)
    for name, args in (("clamp", (-3, 300)), ("clamp_min", (-3,)), ("clamp_max", (300,))):
        new = interop.ops.lookup(f"aten.{name}.default", "2.15.0").function
        assert new(x, *args).tolist() == [1, 200]
    assert interop.ops.lookup("aten.clamp_min.default", "2.14.1").function(x, -3).tolist() == [253, 253]
    for args in ((300, None), (None, -1)):
        with pytest.raises(ValueError, match="leaves no value of uint8"):
            interop.ops.lookup("aten.clamp.default", "2.15.0").function(x, *args)
