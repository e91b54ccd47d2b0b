"""A plan, of devices that are here (what it counts does not depend on the kind), and what it says of bad questions."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm
from interop.cli import main
from jaxnorm import topologies
from jaxnorm._plan import _out_of_memory
from jaxnorm.topologies import Chip, Topology

CHIP = Chip(memory=10**9, bandwidth=1e9, operations=1e12, clock=1e6, link=1e6)


def place():
    return Topology("here:2x4", CHIP, (2, 4), tuple(jax.devices()))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.bn = nnx.Linear(6, 10, rngs=rngs), jaxnorm.nnx.BatchNorm(10, rngs=rngs)
        self.last = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.sin(self.bn(self.first(x))))


def loss_fn(model, x):
    return (model(x) ** 2).mean(), {}


def step_and_state(model):
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1, momentum=0.9), ema=jaxnorm.Ema(0.9))
    return jaxnorm.train_step(loss_fn), state


X = jax.ShapeDtypeStruct((48, 6), np.float32)


def test_a_model_or_a_state_of_another_way_to_be_parallel_is_refused():
    step, state = step_and_state(Net())
    with pytest.raises(ValueError, match="unreplicate"):
        jaxnorm.plan(step, jaxnorm.replicate(state), X, place())
    step, state = step_and_state(jaxnorm.convert_sync_batchnorm(Net(), axis_name="batch"))
    with pytest.raises(ValueError, match="revert_sync_batchnorm"):
        jaxnorm.plan(step, state, X, place(), how="jit")


def test_each_microbatch_sends_its_statistics():
    _, state = step_and_state(Net())
    once, three = (jaxnorm.plan(jaxnorm.train_step(loss_fn, accumulate=k), state, X, place()) for k in (1, 3))
    assert three.statistics.number == 3 * once.statistics.number
    assert three.statistics.bytes == 3 * 2 * (2 * 10 * 4)  # forward and backward, two numbers for each channel


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_what_a_step_keeps_and_sends(how):
    model = Net()
    if how == "shard_map":
        model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    found = jaxnorm.plan(*step_and_state(model), X, place(), how=how)
    parameters = 6 * 10 + 10 + 2 * 10 + 10 * 3 + 3
    assert (found.devices, found.batch, found.fits) == (8, 48, True)
    assert found.memory.parameters == found.memory.optimizer == 4 * parameters
    assert found.memory.average >= 4 * parameters and found.memory.batch == 48 * 6 * 4 // 8
    assert found.memory.total > found.memory.parameters + found.memory.optimizer and found.memory.temporary > 0
    # Forward and backward, two numbers for each channel; shard_map's are merged with others by this compiler, which
    # under jit sends each of the forward pass's twice, alone.
    if how == "jit":
        assert (found.statistics.number, found.statistics.bytes) == (3, (2 + 1) * 2 * 10 * 4)
    assert found.collectives.number >= 2 and found.collectives.bytes >= 4 * parameters + 2 * 2 * 10 * 4
    assert found.largest_batch > 48 and found.largest_batch % 8 == 0
    assert found.cycles == 0  # only a TPU's compiler estimates them
    assert found.seconds == pytest.approx(found.collectives.seconds)
    assert json.loads(json.dumps(found.as_dict()))["memory"]["available"] == CHIP.memory


def test_shapes_are_enough():
    """The state may be described, too; nothing runs."""
    step, state = step_and_state(Net())
    found = jaxnorm.plan(step, jax.eval_shape(lambda: state), X, place())
    assert found.memory == jaxnorm.plan(step, state, X, place()).memory


def test_an_all_reduce_on_a_torus():
    # Around both axes at once. 2 has one link and one hop, 4 two links and two hops.
    expected = 5e-6 + 2 * 3 * 1e-6 + 2 * 7 / 8 * 3000 / (3 * 1e6)
    assert place().all_reduce(3000) == pytest.approx(expected, rel=1e-12)
    assert Topology("here:1", CHIP, (1, 1), tuple(jax.devices()[:1])).all_reduce(3000) == 0


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (52.24G) exceeds "
        "available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 52.24G of "
        "15.75G hbm. Exceeded hbm capacity by 36.49G.",
    ],
)
def test_a_step_that_does_not_fit(monkeypatch, text):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    found = jaxnorm.plan(*step_and_state(Net()), X, place())
    assert not found.fits and found.cycles is None and found.seconds is None
    assert (found.memory.total, found.memory.available) == (int(52.24 * 2**30), int(15.75 * 2**30))
    assert 0 < found.largest_batch < 48


def test_other_complaints_of_the_compiler_are_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        _out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))


def test_bad_questions(monkeypatch):
    step, state = step_and_state(Net())
    with pytest.raises(ValueError, match=r"replicas.*has shape"):
        jaxnorm.plan(step, state, jax.ShapeDtypeStruct((47, 6), np.float32), place())
    with pytest.raises(ValueError, match="'jit' or 'shard_map'"):
        jaxnorm.plan(step, state, X, place(), how="pmap")
    for name in ("h100:8", "v5e", "v5e:4x", "v9:2x2"):
        with pytest.raises(ValueError, match="is no TPU topology: expected a generation"):
            topologies.topology(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxnorm\[tpu\]'"):
        topologies.topology("v5e:2x4")


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr("interop.cli._plan.topology", lambda name: place())
    given = ["--topology", "here:2x4", "--input", "2,3,8,8"]

    def run(*arguments, code=0):
        found = main(["plan", "test_cli:Net", *given, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert found == code, out + err
        return out if code == 0 else err

    return run


def test_the_command(run):
    out = run("--batch", 16, "--batch", 32, "--optimizer", "adamw", "--ema")
    assert "test_cli:Net, input 3x8x8, bfloat16, adamw, EMA" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("here:2x4")]
    assert [row[:3] for row in rows] == [["here:2x4", "16", "yes"], ["here:2x4", "32", "yes"]]
    found = json.loads(run("--batch", 16, "--json"))
    # One forward, which this compiler sends twice, and one backward, merged with some of the gradients.
    assert found[0]["statistics"]["number"] == 3 and found[0]["statistics"]["bytes"] >= 2 * 2 * 8 * 4


def test_bad_arguments_of_the_command(run):
    assert "--batch 12: the 8 devices of here:2x4 do not divide it" in run("--batch", 12, code=2)
    assert "--dtype int8: expected bfloat16 or float32" in run("--batch", 16, "--dtype", "int8", code=2)
    assert "--optimizer lion: expected sgd, momentum, adamw" in run("--batch", 16, "--optimizer", "lion", code=2)
    assert "give one" in run("--batch", 16, "--image", 32, code=2)
