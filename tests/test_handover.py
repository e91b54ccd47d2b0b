"""The whole hand-over: 20 steps in PyTorch, 20 in JAX on 8 replicas, 20 in PyTorch are 60 in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch.optim.lr_scheduler import CosineAnnealingLR

import interop
import jaxnorm

STEPS = 20
CLIP = 0.5


def _module():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, 10),
    ).double()


def _batches():
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(16, 1, 6, 6)), rng.integers(0, 10, 16)) for _ in range(3 * STEPS)]


def _optimizer(module):
    """Parameter groups as usual: no decay for BatchNorm and biases."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1]},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.1},
    ]
    return torch.optim.SGD(groups, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)


def _train_in_torch(module, optimizer, scheduler, ema, batches, start):
    module.train()
    losses = []
    for step, (x, y) in enumerate(batches, start + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        ema.update(module, step)
        losses.append(loss.item())
    return losses


def _loss(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])
    return losses.mean(), {}


def _tensors(state_dict):
    return {name: torch.tensor(x) for name, x in state_dict.items()}


@pytest.mark.parametrize("how", ["pmap"])
def test_20_in_pytorch_20_in_jax_20_in_pytorch_are_60_in_pytorch(how):
    options = {"decay": 0.9, "use_warmup": True}
    batches = _batches()
    first, second, third = (batches[i * STEPS : (i + 1) * STEPS] for i in range(3))

    expected = _module()
    optimizer = _optimizer(expected)
    scheduler = CosineAnnealingLR(optimizer, 3 * STEPS)
    expected_ema = ModelEmaV3(expected, **options)
    expected_losses = _train_in_torch(expected, optimizer, scheduler, expected_ema, batches, 0)

    module = _module()
    optimizer = _optimizer(module)
    scheduler = CosineAnnealingLR(optimizer, 3 * STEPS)
    ema = ModelEmaV3(module, **options)
    losses = _train_in_torch(module, optimizer, scheduler, ema, first, 0)

    # To JAX.
    model = interop.from_torch(module, torch.zeros(2, 1, 6, 6, dtype=torch.float64))
    model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    rates = interop.schedule_from_torch(scheduler, STEPS)
    tx = interop.optax_from_torch(optimizer, names=module, model=model, learning_rate=rates)
    state = jaxnorm.TrainState.create(model, tx, ema=jaxnorm.Ema(**options), rng=jax.random.key(0))
    state = interop.load_optimizer_state(state, optimizer, names=module, step=STEPS)
    averaged = interop.load_state_dict(model, ema.module.state_dict())
    state = state.with_ema_model(averaged)
    step = jaxnorm.data_parallel(jaxnorm.train_step(_loss, clip_norm=CLIP), how=how)
    state = jaxnorm.replicate(state)
    for x, y in second:
        state, metrics = step(state, {"x": jnp.asarray(x), "y": jnp.asarray(y)})
        losses.append(float(metrics["loss"]))
    state = jaxnorm.unreplicate(state)

    # And back.
    module = _module()
    module.load_state_dict(_tensors(interop.state_dict(state.model())), strict=True)
    ema = ModelEmaV3(_module(), **options)
    ema.module.load_state_dict(_tensors(interop.state_dict(state.ema_model())), strict=True)
    for _ in range(STEPS):  # the schedule is PyTorch's own; its optimizer's rates come with it
        scheduler.step()
    optimizer_state = interop.optimizer_state_dict(state, optimizer, names=list(dict(_by_group(module))))
    schedule_state = scheduler.state_dict()
    optimizer = _optimizer(module)
    optimizer.load_state_dict(optimizer_state)
    scheduler = CosineAnnealingLR(optimizer, 3 * STEPS)
    scheduler.load_state_dict(schedule_state)
    for group, rate in zip(optimizer.param_groups, schedule_state["_last_lr"], strict=True):
        group["lr"] = rate
    losses += _train_in_torch(module, optimizer, scheduler, ema, third, 2 * STEPS)

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    for got, wanted in ((module, expected), (ema.module, expected_ema.module)):
        got = got.state_dict()
        for name, x in wanted.state_dict().items():
            np.testing.assert_allclose(got[name], x, rtol=1e-9, atol=1e-12, err_msg=name)


def _by_group(module):
    """Names in the order in which `_optimizer` is given the parameters."""
    named = list(module.named_parameters())
    return [(n, p) for n, p in named if p.ndim > 1] + [(n, p) for n, p in named if p.ndim <= 1]
