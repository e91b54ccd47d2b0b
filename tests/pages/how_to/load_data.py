"""What docs/how_to/load_data.md takes for granted: a state, and a checkpoint of step 3 that a run goes on from."""

import jax
import numpy as np
import optax
from flax import nnx

import jaxnorm

state = jaxnorm.TrainState.create(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.sgd(0.1))


def in_exact_resume(names):
    yield
    with jaxnorm.Checkpoints("runs/a", config={"batch": 1024, "seed": 0}) as checkpoints:
        checkpoints.save(3, state)
    yield
    assert names["taken"] == 3
    expected = names["batches"](0, batch=1024)
    for _ in range(3):
        next(expected)
    np.testing.assert_array_equal(next(names["loader"])["label"], next(expected)["label"])
