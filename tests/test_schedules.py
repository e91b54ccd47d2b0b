"""A schedule stands where its torch scheduler stands, whatever the optimizer has counted."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.optim import lr_scheduler as schedulers

import interop
from jaxnorm import TrainState, train_step

X = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3)))


class Linear(nnx.Module):
    def __init__(self, module):
        self.weight, self.bias = (nnx.Param(jnp.asarray(p.detach().numpy())) for p in module.parameters())

    def __call__(self, x):
        return x @ self.weight[...].T + self.bias[...]


def _module():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).double()


STEP = jax.jit(train_step(lambda model, batch: (jnp.mean(model(batch["x"]) ** 2), {})))


def _in_torch(module, optimizer, scheduler, steps, skipped=(), every=1):
    for i in steps:
        optimizer.zero_grad()
        module(X).square().mean().backward()
        if i not in skipped:
            optimizer.step()
        if (i + 1) % every == 0:
            scheduler.step()


def _in_jax(state, n):
    for _ in range(n):
        state, _ = STEP(state, {"x": X.numpy()})
    return state


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}
SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.8)], [8]),
    "chain": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=20), schedulers.ExponentialLR(o, 0.9)]),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.2, 30, cycle_momentum=False),
    "cycles": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 4, cycle_momentum=False),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.3, 12),
}  # fmt: skip


def _started(module, optimizer, scheduler, **options):
    rates = interop.schedule_from_torch(scheduler, steps=20, **options)
    model = Linear(module)
    tx = interop.optax_from_torch(optimizer, names=["weight", "bias"], model=model, learning_rate=rates)
    return TrainState.create(model, tx)


def _assert_equal(state, module):
    for name, x in module.state_dict().items():
        np.testing.assert_allclose(interop.state_dict(state)[name], x, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:Please also save")
def test_handed_over_after_steps_that_mixed_precision_left_out(optimizer, scheduler):
    module = _module()
    optimizer = OPTIMIZERS[optimizer](module.parameters())
    scheduler = SCHEDULERS[scheduler](optimizer)
    _in_torch(module, optimizer, scheduler, range(10), skipped=(3, 6))
    state = _started(module, optimizer, scheduler)
    state = interop.load_optimizer_state(state, optimizer, names=module, step=8)
    _in_torch(module, optimizer, scheduler, range(10, 14))
    _assert_equal(_in_jax(state, 4), module)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_a_fresh_optimizer_the_rates_are_the_schedulers(optimizer):
    module = _module()
    scheduler = SCHEDULERS["lambda"](OPTIMIZERS[optimizer](module.parameters()))
    _in_torch(module, scheduler.optimizer, scheduler, range(10))
    fresh = OPTIMIZERS[optimizer](module.parameters())
    scheduler.optimizer, old = fresh, scheduler.optimizer
    fresh.param_groups[0]["lr"] = old.param_groups[0]["lr"]
    state = _started(module, fresh, scheduler)
    _in_torch(module, fresh, scheduler, range(10, 14))
    _assert_equal(_in_jax(state, 4), module)


def test_a_scheduler_of_epochs_and_rates_for_each_group():
    module = _module()
    groups = [{"params": [module.weight]}, {"params": [module.bias], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    _in_torch(module, optimizer, scheduler, range(9), skipped=(2,), every=3)
    state = _started(module, optimizer, scheduler, every=3)
    state = interop.load_optimizer_state(state, optimizer, names=module, step=8)
    _in_torch(module, optimizer, scheduler, range(9, 16), every=3)
    _assert_equal(_in_jax(state, 7), module)


def test_the_position_goes_on_with_the_state_and_is_not_the_optimizers_count():
    module = _module()
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    scheduler = SCHEDULERS["lambda"](optimizer)
    _in_torch(module, optimizer, scheduler, range(10), skipped=(1, 2, 5))
    state = _started(module, optimizer, scheduler)
    state = _in_jax(interop.load_optimizer_state(state, optimizer, names=module), 3)
    counts = {jax.tree_util.keystr(path): int(x) for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if not x.ndim}  # fmt: skip  # noqa: E501
    assert {name.rpartition(".")[2]: n for name, n in counts.items()} == {"count": 10, "position": 13}
    back = interop.optimizer_state_dict(state, optimizer, names=module)
    assert {float(entries["step"]) for entries in back["state"].values()} == {10}


def test_a_users_own_schedule_goes_by_the_optimizers_count():
    module = _module()
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    _in_torch(module, optimizer, scheduler, range(5))
    tx = interop.optax_from_torch(optimizer, learning_rate=lambda count: 0.1 * 0.9 ** count.astype(float))
    state = interop.load_optimizer_state(TrainState.create(Linear(module), tx), optimizer, names=module)
    _in_torch(module, optimizer, scheduler, range(5, 8))
    _assert_equal(_in_jax(state, 3), module)


def test_a_position_before_the_hand_over_has_no_rate():
    module = _module()
    scheduler = SCHEDULERS["lambda"](OPTIMIZERS["sgd"](module.parameters()))
    _in_torch(module, scheduler.optimizer, scheduler, range(4))
    rates = interop.schedule_from_torch(scheduler, steps=3)
    assert rates.position == 4
    assert np.isnan(rates(jnp.asarray(3))) and float(rates(jnp.asarray(4))) == pytest.approx(0.1 / 5)
    state = TrainState.create(Linear(module), optax.sgd(lambda count: rates(rates.position + count)))
    _in_torch(module, scheduler.optimizer, scheduler, range(4, 7))
    _assert_equal(_in_jax(state, 3), module)


MOVING = {
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.2, 30),
    "cycles": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 4),
}


@pytest.mark.parametrize("optimizer, moved", [("momentum", "momentum"), ("adamw", "betas")])
@pytest.mark.parametrize("kind", MOVING)
def test_schedulers_that_move_momentum_are_refused(kind, optimizer, moved):
    scheduler = MOVING[kind](OPTIMIZERS[optimizer](_module().parameters()))
    with pytest.raises(ValueError, match=f"moves {moved} besides the learning rate.*cycle_momentum=False"):
        interop.schedule_from_torch(scheduler, 5)
    with pytest.raises(ValueError, match=r"base_momentum=(.|\n)*cycle_momentum=False"):
        interop.optax_from_torch(scheduler.optimizer)


class _DecayToo(schedulers.LambdaLR):
    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = group["weight_decay"] * 0.9


def test_what_gives_no_schedule_is_refused_by_name():
    optimizer = OPTIMIZERS["adamw"](_module().parameters())
    with pytest.raises(ValueError, match=r"_DecayToo moves weight_decay"):
        interop.schedule_from_torch(_DecayToo(optimizer, lambda epoch: 1.0), 3)
    optimizer = OPTIMIZERS["adamw"](_module().parameters())
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        interop.schedule_from_torch(schedulers.ReduceLROnPlateau(optimizer), 3)
    with pytest.raises(ValueError, match=r"3 times|31 times"):
        interop.schedule_from_torch(SCHEDULERS["one cycle"](optimizer), 40)
    scheduler = SCHEDULERS["lambda"](OPTIMIZERS["adamw"](_module().parameters()))
    for option in ({"steps": -1}, {"steps": 3, "every": 0}):
        with pytest.raises(ValueError, match="is a number of optimizer steps"):
            interop.schedule_from_torch(scheduler, **option)
    for wrong in (None, "cosine", optimizer, copy):
        with pytest.raises(TypeError, match=r"scheduler is one of torch\.optim\.lr_scheduler"):
            interop.schedule_from_torch(wrong, 3)
