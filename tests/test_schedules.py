"""A schedule stands where its torch scheduler stands, whatever the optimizer has counted."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.scheduler
import torch
from flax import nnx
from page_reader import programs
from torch.optim import lr_scheduler as schedulers

import interop
import jaxnorm
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


FOLLOWED = MOVING | {
    "triangles": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 3, mode="triangular2"),
    "falling": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 2, 3, mode="exp_range", gamma=0.9),
    "linear": lambda o: schedulers.OneCycleLR(o, 0.3, 40, anneal_strategy="linear", three_phase=True),
}
MOVED = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9),
    "radam": lambda p: torch.optim.RAdam(p, 0.1),
}


@pytest.mark.parametrize("optimizer", MOVED)
@pytest.mark.parametrize("kind", FOLLOWED)
def test_momentum_that_a_scheduler_moves_is_followed(kind, optimizer):
    """From the middle on, with the optimizer's state, and home again."""
    module = _module()
    optimizer = MOVED[optimizer](module.parameters())
    scheduler = FOLLOWED[kind](optimizer)
    _in_torch(module, optimizer, scheduler, range(5))
    before = copy.deepcopy(optimizer.state_dict())
    state = _started(module, optimizer, scheduler, moving=True)
    state = interop.load_optimizer_state(state, optimizer, names=["weight", "bias"], step=5)
    assert str(optimizer.state_dict()) == str(before)
    state = _in_jax(state, 9)
    _in_torch(module, optimizer, scheduler, range(5, 14))
    _assert_equal(state, module)
    home = copy.deepcopy(optimizer)
    home.load_state_dict(interop.optimizer_state_dict(state, optimizer, names=["weight", "bias"]))
    for mine, theirs in zip(home.state.values(), optimizer.state.values(), strict=True):
        for entry, value in theirs.items():
            if value is not None:
                np.testing.assert_allclose(mine[entry], value, rtol=1e-9, atol=1e-12)


TIMM = {
    "cosine": lambda o, **k: timm.scheduler.CosineLRScheduler(o, 12, lr_min=0.01, warmup_t=3, **k),
    "cycles": lambda o, **k: timm.scheduler.CosineLRScheduler(
        o, 5, cycle_mul=1.5, cycle_decay=0.5, cycle_limit=3, warmup_t=2, warmup_prefix=True, k_decay=0.8, **k),
    "step": lambda o, **k: timm.scheduler.StepLRScheduler(o, 4, 0.5, warmup_t=2, **k),
    "multistep": lambda o, **k: timm.scheduler.MultiStepLRScheduler(o, [3, 7], 0.3, **k),
    "poly": lambda o, **k: timm.scheduler.PolyLRScheduler(o, 12, power=0.9, warmup_t=2, **k),
    "tanh": lambda o, **k: timm.scheduler.TanhLRScheduler(o, 12, warmup_t=3, **k),
    "noise": lambda o, **k: timm.scheduler.CosineLRScheduler(
        o, 12, noise_range_t=(2, 9), noise_pct=0.5, noise_std=0.4, noise_seed=3, **k),
}  # fmt: skip


@pytest.mark.parametrize("in_epochs", [True, False])
@pytest.mark.parametrize("kind", TIMM)
def test_timms_schedulers_as_its_train_loop_steps_them(kind, in_epochs):
    """Three updates an epoch (timm's train.py), layer decay, handed over after two epochs."""
    module = _module()
    groups = [{"params": [module.weight], "lr_scale": 0.5}, {"params": [module.bias], "lr_scale": 1.0}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    scheduler = TIMM[kind](optimizer, t_in_epochs=in_epochs)

    def in_torch(epochs):
        for epoch in epochs:
            for update in range(3 * epoch, 3 * epoch + 3):
                optimizer.zero_grad()
                module(X).square().mean().backward()
                optimizer.step()
                scheduler.step_update(update + 1)
            scheduler.step(epoch + 1)

    in_torch(range(2))
    rates = interop.schedule_from_torch(scheduler, 12, every=3 if in_epochs else 1, position=6)
    model = Linear(module)
    tx = interop.optax_from_torch(optimizer, names=["weight", "bias"], model=model, learning_rate=rates)
    state = TrainState.create(model, tx)
    state = interop.load_optimizer_state(state, optimizer, names=["weight", "bias"], step=6)
    state = _in_jax(state, 12)
    in_torch(range(2, 6))
    _assert_equal(state, module)


class _OfDecay(timm.scheduler.scheduler.Scheduler):
    """The weight decay, by a schedule of one's own on timm's class."""

    def _get_lr(self, t):
        return [value * 0.9**t for value in self.base_values]


def test_a_weight_decay_that_timm_schedules_is_followed():
    module = _module()
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.2)
    scheduler = _OfDecay(optimizer, "weight_decay", t_in_epochs=False)
    with pytest.raises(ValueError, match=r"moves weight_decay.*moving=True"):
        interop.schedule_from_torch(scheduler, 10)
    rates = interop.schedule_from_torch(scheduler, 10, moving=True)
    model = Linear(module)
    tx = interop.optax_from_torch(optimizer, names=["weight", "bias"], model=model, learning_rate=rates)
    state = _in_jax(TrainState.create(model, tx), 8)
    for update in range(8):
        optimizer.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()
        scheduler.step_update(update + 1)
    _assert_equal(state, module)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_a_plateau_is_moved_by_the_metric(mode, threshold_mode):
    """Two groups, from the middle on, thirty metrics; the rates are used, and the scheduler goes on from its state."""
    module = _module()
    optimizer = torch.optim.SGD([{"params": [module.weight]}, {"params": [module.bias], "lr": 0.2}], 0.1, momentum=0.9)
    scheduler = schedulers.ReduceLROnPlateau(
        optimizer,
        mode,
        0.5,
        patience=1,
        threshold=0.05,
        threshold_mode=threshold_mode,
        cooldown=2,
        min_lr=[0.01, 0.004],
    )
    metrics = np.random.default_rng(1).normal(size=34) * 0.2 + 1
    for metric in metrics[:4]:
        scheduler.step(metric)
    plateau = interop.plateau_from_torch(scheduler)
    model = Linear(module)
    tx = interop.optax_from_torch(optimizer, names=["weight", "bias"], model=model, learning_rate=plateau)
    state, at = TrainState.create(model, tx), plateau.start
    state = interop.load_optimizer_state(state, optimizer, names=["weight", "bias"], step=0)
    update = jax.jit(plateau.update)
    for metric in metrics[4:]:
        at = update(at, metric)
        state = _in_jax(plateau.apply(state, at), 1)
        scheduler.step(metric)
        optimizer.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()
        np.testing.assert_allclose(at.rates, [group["lr"] for group in optimizer.param_groups], rtol=1e-12)
    assert float(at.rates[0]) == 0.01  # it came down to the least
    _assert_equal(state, module)
    kept = scheduler.state_dict()
    for name, value in plateau.state_dict(at).items():
        assert value == pytest.approx(kept[name], rel=1e-12)


def test_what_a_plateau_is_not_for_is_refused():
    optimizer = OPTIMIZERS["sgd"](_module().parameters())
    plateau = interop.plateau_from_torch(schedulers.ReduceLROnPlateau(optimizer))
    with pytest.raises(TypeError, match="expected a ReduceLROnPlateau, found LambdaLR; see schedule_from_torch"):
        interop.plateau_from_torch(SCHEDULERS["lambda"](optimizer))
    state = TrainState.create(Linear(_module()), optax.sgd(0.1))
    with pytest.raises(ValueError, match="holds no rate of a plateau"):
        plateau.apply(state, plateau.start)
    two = torch.optim.SGD([{"params": [torch.zeros(2)]}, {"params": [torch.zeros(3)]}], 0.1)
    with pytest.raises(ValueError, match="the plateau is of 1 parameter groups, the optimizer has 2"):
        interop.optax_from_torch(two, learning_rate=plateau)
    with pytest.raises(ValueError, match=r"plateau_from_torch\(scheduler\)"):
        interop.schedule_from_torch(schedulers.ReduceLROnPlateau(optimizer), 3)
    scheduler = TIMM["cosine"](optimizer, t_in_epochs=True)
    for options, message in (
        ({"position": 4, "every": 3}, "in the middle of an epoch"),
        ({"position": -1}, "position is a number of optimizer steps"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.schedule_from_torch(scheduler, 3, **options)
    with pytest.raises(ValueError, match=r"goes by updates .*every=1"):
        interop.schedule_from_torch(TIMM["cosine"](optimizer, t_in_epochs=False), 3, every=2)
    with pytest.raises(ValueError, match="leave position= out"):
        interop.schedule_from_torch(SCHEDULERS["lambda"](optimizer), 3, position=0)


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


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_page_about_training_schedules():
    """The programs of docs/training.md, "Schedules"."""
    module = _module()
    names = {"torch": torch, "timm": timm, "interop": interop, "jaxnorm": jaxnorm, "loss": 1.0}
    names |= {"module": module, "model": Linear(module)}
    for block in programs("docs/training.md", "schedules"):
        names["optimizer"] = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        block.run(names)
    assert names["rates"].every == 20 and len(names["rates"].rates) == 91
    assert int(names["at"].num_bad_epochs) == 2  # of three losses, the first was better
