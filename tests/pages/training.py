"""What docs/training.md takes for granted: an imported model, its loss and data; a torch optimizer in mid-training."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import interop
import jaxnorm

module = torch.nn.Sequential(
    torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
)
model = interop.from_torch(module, torch.zeros(2, 8))
random = np.random.default_rng(0)
loader = [
    {"image": random.normal(size=(32, 8)).astype(np.float32), "label": random.integers(4, size=32)} for _ in range(2)
]
last_batch = {"image": random.normal(size=(200, 8)).astype(np.float32), "label": random.integers(4, size=200)}
optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
taken = 3


def loss_fn(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
    return losses.mean(), {}


def close(model, other):
    expected = other.state_dict() if isinstance(other, torch.nn.Module) else interop.state_dict(other)
    for name, value in expected.items():
        np.testing.assert_allclose(interop.state_dict(model)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def in_training(names):
    """On eight replicas, what PyTorch does with the whole batch."""
    twin = copy.deepcopy(module)
    adam = torch.optim.AdamW(twin.parameters(), 1e-3, weight_decay=1e-4)
    for batch in loader:
        loss = torch.nn.functional.cross_entropy(twin(torch.tensor(batch["image"])), torch.tensor(batch["label"]))
        adam.zero_grad()
        loss.backward()
        adam.step()
    yield
    close(names["model"], twin)


def in_loss_metrics_uneven_batches(names):
    """A padded batch gives the unpadded one's step."""
    yield
    assert names["batch"]["mask"].shape == (256,) and names["batch"]["mask"].sum() == 200
    model = jaxnorm.revert_sync_batchnorm(names["model"])
    step = jax.jit(jaxnorm.train_step(names["loss_fn"]))
    state = jaxnorm.TrainState.create(model, optax.sgd(1.0))
    whole, padded = (step(state, batch) for batch in (last_batch | {"mask": jnp.ones(200, bool)}, names["batch"]))
    close(padded[0].model(), whole[0].model())
    np.testing.assert_allclose(padded[1]["loss"], whole[1]["loss"], rtol=1e-6)
    assert padded[1]["accuracy"] == whole[1]["accuracy"]


def in_hand_over_in_mid_training(names):
    """Rates and momentum as PyTorch has them, and back again."""
    for batch in [*loader, loader[0]]:
        loss = torch.nn.functional.cross_entropy(module(torch.tensor(batch["image"])), torch.tensor(batch["label"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in module.parameters()]
    yield
    assert [float(names["rates"](n)) for n in (3, 4, 6)] == pytest.approx([0.01, 0.001, 0.0001])
    for parameter, expected in zip(module.parameters(), momenta, strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)
