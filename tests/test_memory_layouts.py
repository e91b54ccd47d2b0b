"""A training step whose state lies as the compiler prefers: layouts change nothing but where things are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.memory_layouts import PreferredLayouts

MESH = Mesh(np.array(jax.devices()), ("batch",))
WHOLE, SPLIT = NamedSharding(MESH, P()), NamedSharding(MESH, P("batch"))


def step(state, x):
    y = jnp.einsum("nc,co->no", x, state["w"])
    return {"w": state["w"] * 0.5 + (x.T @ y), "key": jax.random.fold_in(state["key"], 1)}, y.sum()


def compiled():
    return PreferredLayouts(step, state=WHOLE, batch=SPLIT, more=WHOLE, donate=False)


def test_a_state_in_any_layout_is_taken_and_gives_the_same():
    x = jax.device_put(np.random.default_rng(0).normal(size=(16, 4)), SPLIT)
    state = {"w": np.random.default_rng(1).normal(size=(4, 6)), "key": jax.random.key(0)}
    expected, total = jax.jit(step)(state, x)
    turned = Format(Layout(major_to_minor=(1, 0)), WHOLE)
    run = compiled()
    for w in (jax.device_put(state["w"], WHOLE), jax.device_put(state["w"], turned)):
        found, found_total = run({**state, "w": w}, x)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-12)
        np.testing.assert_allclose(found_total, total, rtol=1e-12)
        assert (jax.random.key_data(found["key"]) == jax.random.key_data(expected["key"])).all()
        again, _ = run(found, x)
        np.testing.assert_allclose(again["w"], step(expected, x)[0]["w"], rtol=1e-12)
    assert len(run.programs) == 1


def test_a_program_for_each_shape_dtype_and_precision():
    run = compiled()
    x = jax.device_put(np.ones((16, 4), np.float32), SPLIT)
    state = {"w": np.ones((4, 6), np.float32), "key": jax.random.key(0)}
    run(state, x), run(state, x)
    assert len(run.programs) == 1
    with jax.default_matmul_precision("bfloat16"):
        run(state, x)
    run(state, jax.device_put(np.ones((8, 4), np.float32), SPLIT))
    run({**state, "w": np.ones((4, 6))}, x)
    assert len(run.programs) == 4


def test_without_jit_it_can_be_stepped_through():
    seen = []

    def watched(state, x):
        seen.append(np.asarray(state["w"]).sum())  # a tracer has no value
        return step(state, x)

    run = PreferredLayouts(watched, state=WHOLE, batch=SPLIT, more=WHOLE, donate=False)
    with jax.disable_jit():
        run({"w": jnp.ones((4, 6)), "key": jax.random.key(0)}, jnp.ones((16, 4)))
    assert seen == [24]


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_the_layouts_that_come_back_are_those_that_go_in(how):
    """So that from the second step on nothing is moved."""
    model = jaxnorm.nnx.BatchNorm(4, axis_name="batch" if how == "shard_map" else None, rngs=nnx.Rngs(0))
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    step = jaxnorm.data_parallel(jaxnorm.train_step(lambda m, x: ((m(x) ** 2).mean(), {})), how=how, donate=True)
    x = np.random.default_rng(0).normal(size=(16, 4))
    state, _ = step(state, x)
    (program, _), *_ = step.program().programs.values()
    into, out = (jax.tree.map(lambda f: f.layout, f) for f in (program.input_formats[0][0], program.output_formats[0]))
    assert jax.tree.leaves(into) == jax.tree.leaves(out)
