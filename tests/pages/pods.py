"""What docs/pods.md takes for granted: a model, a loss, and a run that was stopped after 999 steps of 1000."""

import jax
import numpy as np
import optax
from flax import nnx

import interop
import jaxnorm


def loss_fn(model, batch):
    return (model(batch) ** 2).mean(), {}


model = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jaxnorm.nnx.BatchNorm(4, axis_name="batch", rngs=nnx.Rngs(0))
)
tx, ema = optax.adam(1e-2), jaxnorm.Ema(0.99)
steps = 1000
own_part_of_batch = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def in_many_processes(names):
    state = jaxnorm.TrainState.create(model, tx, ema=ema, rng=jax.random.key(0))
    before = interop.state_dict(state)
    with jaxnorm.Checkpoints("runs/a", config={"batch": 1024}) as checkpoints:
        checkpoints.save(999, state, {"position": 999 * 1024})
    yield
    assert names["taken"] == 1000 and int(names["state"].step) == 1
    assert (before["0.weight"] != interop.state_dict(names["state"])["0.weight"]).all()
    with jaxnorm.Checkpoints("runs/a", config={"batch": 1024}) as checkpoints:
        taken, saved, data = checkpoints.restore(state)
    assert taken == 1000 and data == {"position": 1000 * 1024}
    for name, value in interop.state_dict(names["state"]).items():
        np.testing.assert_array_equal(interop.state_dict(saved)[name], value, err_msg=name)
