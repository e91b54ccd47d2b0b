"""Averages count their own updates: AveragedModel's, timm's and Ultralytics' numbers, whenever a state is averaged."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import jaxnorm
from jaxnorm import Ema, TrainState, data_parallel, replicate, train_step, unreplicate

VALUES = np.random.default_rng(0).normal(size=(30, 4))  # of the weight, step by step


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(VALUES[0]))


class Model(nnx.Module):
    def __init__(self, value=VALUES[0]):
        self.weight = nnx.Param(jnp.asarray(value))

    def __call__(self, x):
        return x @ self.weight[...]


class Ultralytics:
    """ultralytics/utils/torch_utils.py, ModelEMA, of one entry."""

    def __init__(self, module, decay=0.9999, tau=5):
        self.module, self.updates = copy.deepcopy(module), 0
        self.decay = lambda x: decay * (1 - math.exp(-x / tau))

    def update(self, module):
        self.updates += 1
        d = self.decay(self.updates)
        with torch.no_grad():
            self.module.weight.mul_(d).add_((1 - d) * module.weight)


class Timm(ModelEmaV3):
    """Counting its updates for itself."""

    count = 0

    def update(self, module):
        self.count += 1
        super().update(module, self.count)


def _ultralytics():
    return Ema(lambda x: 0.9999 * (1 - jnp.exp(-x.astype(float) / 5)), update_after_step=-1)


KINDS = {
    "equal weights": (Ema.averaged_model, AveragedModel, "n_averaged"),
    "AveragedModel's decay": (
        lambda: Ema.averaged_model(0.9), lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9)), "n_averaged"),
    "timm": (lambda: Ema(0.9), lambda m: Timm(m, 0.9), "count"),
    "timm, warming up": (
        lambda: Ema(0.99, use_warmup=True, update_after_step=2),
        lambda m: Timm(m, 0.99, use_warmup=True, update_after_step=2), "count"),
    "Ultralytics": (_ultralytics, Ultralytics, "updates"),
}  # fmt: skip


def _step(state, i):
    return state.apply_gradients({"weight": jnp.asarray(VALUES[i - 1] - VALUES[i])})  # SGD at rate 1 goes to VALUES[i]


def _take(average, module, i):
    with torch.no_grad():
        module.weight.copy_(torch.tensor(VALUES[i]))
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(module)


def _assert_equal(state, average, counter):
    np.testing.assert_allclose(state.ema_model().weight[...], average.module.weight.detach(), rtol=1e-12)
    assert int(state.ema_state.count) == int(getattr(average, counter))


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_every_kth_step_is_pytorchs(kind, every):
    ours, theirs, counter = KINDS[kind]
    module = Weight()
    state, average = TrainState.create(Model(), optax.sgd(1.0), ema=ours()), theirs(module)
    for i in range(1, 13):
        state = _step(state, i)
        if i % every == 0:
            state = state.update_ema()
            _take(average, module, i)
    _assert_equal(state, average, counter)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_handed_over_goes_on_where_it_was(kind):
    ours, theirs, counter = KINDS[kind]
    module = Weight()
    average = theirs(module)
    for i in range(1, 8):
        _take(average, module, i)
    state = TrainState.create(Model(VALUES[7]), optax.sgd(1.0), ema=ours())
    before = average.module.weight.detach().numpy().copy()
    state = state.with_ema_model(Model(before), updates=int(getattr(average, counter)))
    np.testing.assert_array_equal(state.ema_model().weight[...], before)
    for i in range(8, 12):
        state = _step(state, i).update_ema()
        _take(average, module, i)
    _assert_equal(state, average, counter)


def test_an_average_put_in_at_step_0_is_not_replaced_by_the_first_step():
    state = TrainState.create(Model(), optax.sgd(1.0), ema=Ema(0.9)).with_ema_model(Model(VALUES[5]))
    found = _step(state, 1).update_ema().ema_model().weight[...]
    np.testing.assert_allclose(found, 0.9 * VALUES[5] + 0.1 * VALUES[1], rtol=1e-12)
    for ema in (Ema.averaged_model(), Ema(0.9, use_warmup=True), Ema(0.9, update_after_step=3), _ultralytics()):
        with pytest.raises(ValueError, match=r"how many updates has this average taken.*updates="):
            TrainState.create(Model(), optax.sgd(1.0), ema=ema).with_ema_model(Model())
    with pytest.raises(ValueError, match="updates is a whole number"):
        state.with_ema_model(Model(), updates=-1)
    with pytest.raises(ValueError, match="not the one this average was made for"):
        state.with_ema_model(Model(VALUES[0, :2]))


def _loss(model, batch):
    return jnp.mean(model(batch["x"]) ** 2), {}


def _torch_microbatches(parts, kind, k):
    module = Weight()
    optimizer, average = torch.optim.SGD(module.parameters(), 0.1), KINDS[kind][1](module)
    for i, part in enumerate(torch.tensor(parts)):
        ((part @ module.weight).square().mean() / k).backward()
        if i % k == k - 1:
            optimizer.step()
            optimizer.zero_grad()
            (average.update_parameters if isinstance(average, AveragedModel) else average.update)(module)
    return average


WHERE = {
    "in the object": lambda k: optax.MultiSteps(optax.sgd(0.1), k, accumulator_dtype=jnp.float64),
    "in a chain": lambda k: optax.chain(
        optax.identity(), optax.MultiSteps(optax.sgd(0.1), k, accumulator_dtype=jnp.float64).gradient_transformation()
    ),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["equal weights", "timm, warming up"])
def test_a_microbatch_that_does_not_step_the_optimizer_does_not_move_the_average(kind, where):
    parts = np.random.default_rng(1).normal(size=(8, 16, 4))
    state = TrainState.create(Model(), WHERE[where](3), ema=KINDS[kind][0]())
    step = jax.jit(train_step(_loss))
    by_hand = state.replace(ema=KINDS[kind][0]())
    grad = jax.jit(jax.grad(lambda p, x: jnp.mean((x @ p["weight"]) ** 2)))
    for part in parts:
        state, _ = step(state, {"x": part})
        by_hand = by_hand.apply_gradients(grad(by_hand.params, part)).update_ema()
    average = _torch_microbatches(parts, kind, 3)
    for one in (state, by_hand):
        _assert_equal(one, average, KINDS[kind][2])


@pytest.mark.parametrize("how, device", [("pmap", None), ("pmap", "cpu"), ("shard_map", None), ("jit", "cpu"), ("jit", "pinned_host")])  # fmt: skip  # noqa: E501
def test_so_it_is_on_many_devices_and_for_an_average_kept_elsewhere(how, device):
    parts = np.random.default_rng(1).normal(size=(5, 16, 4))
    tx = optax.MultiSteps(optax.sgd(0.1), 2, accumulator_dtype=jnp.float64)
    state = TrainState.create(Model(), tx, ema=Ema.averaged_model(device=device))
    step = data_parallel(train_step(_loss), how, donate=True)
    state = replicate(state) if how == "pmap" else state
    for part in parts:
        state, _ = step(state, {"x": part})
    state = unreplicate(state) if how == "pmap" else state
    _assert_equal(state, _torch_microbatches(parts, "equal weights", 2), "n_averaged")


def test_steps_that_mixed_precision_leaves_out_are_counted_as_in_pytorchs_loops():
    """`scaler.step(optimizer); scaler.update(); ema.update(model)`: the average is updated in any case."""
    state = TrainState.create(Model(), optax.sgd(0.1), ema=Ema.averaged_model(), loss_scale=jaxnorm.LossScale.dynamic())
    module = Weight()
    optimizer, average = torch.optim.SGD(module.parameters(), 0.1), AveragedModel(module)
    scaler = torch.amp.GradScaler("cpu")
    step = jax.jit(train_step(_loss))
    parts = np.random.default_rng(1).normal(size=(5, 16, 4))
    parts[[1, 3], 0] = np.inf
    for part in parts:
        state, _ = step(state, {"x": part})
        optimizer.zero_grad()
        scaler.scale((torch.tensor(part) @ module.weight).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(module)
    np.testing.assert_allclose(state.ema_model().weight[...], average.module.weight.detach(), rtol=1e-6)
    assert int(state.ema_state.count) == int(average.n_averaged) == 5


def test_a_microbatch_that_mixed_precision_leaves_out_is_no_step():
    tx = optax.MultiSteps(optax.sgd(0.1), 2, accumulator_dtype=jnp.float64)
    state = TrainState.create(Model(), tx, ema=Ema.averaged_model(), loss_scale=jaxnorm.LossScale.dynamic())
    step = jax.jit(train_step(_loss))
    parts = np.random.default_rng(1).normal(size=(4, 16, 4))
    for part in (parts[0], parts[1], np.full((16, 4), np.inf), parts[2], parts[3]):
        state, _ = step(state, {"x": part})
    assert int(state.ema_state.count) == 2
    expected = _torch_microbatches(parts, "equal weights", 2).module.weight.detach()
    np.testing.assert_allclose(state.ema_model().weight[...], expected, rtol=1e-6)


def test_a_state_taken_up_again_goes_on_counting(tmp_path):
    def run(state, steps):
        for i in steps:
            state = _step(state, i)
            state = state.update_ema() if i % 2 == 0 else state
        return state

    start = TrainState.create(Model(), optax.sgd(1.0), ema=Ema.averaged_model())
    whole = run(start, range(1, 11))
    with jaxnorm.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, run(start, range(1, 6)))
        checkpoints.wait()
        taken_up = run(checkpoints.restore(start).state, range(6, 11))
    assert int(taken_up.ema_state.count) == int(whole.ema_state.count) == 5
    np.testing.assert_array_equal(taken_up.ema_model().weight[...], whole.ema_model().weight[...])
