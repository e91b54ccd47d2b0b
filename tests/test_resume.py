"""Runs that change between PyTorch's training scripts and JAX in mid-training go on as runs that never left."""

import argparse
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.models
import timm.scheduler
import torch
from page_reader import programs
from parity_tools import relative
from timm.utils import CheckpointSaver, ModelEmaV3
from timm.utils.cuda import NativeScaler
from torch import nn

import interop
import jaxnorm

STEPS = 3  # an epoch


def _module():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double().train()


def _batches(epoch):
    rng = np.random.default_rng(epoch)
    return [rng.normal(size=(8, 4)) for _ in range(STEPS)]


class TorchRun:
    """timm's train.py in short: update, step_update, EMA; and at an epoch's end step(epoch + 1)."""

    def __init__(self):
        self.module = _module()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 0.01, weight_decay=0.1)
        self.scheduler = timm.scheduler.CosineLRScheduler(self.optimizer, 6, warmup_t=2, warmup_lr_init=1e-3)
        self.ema = ModelEmaV3(self.module, decay=0.9)
        self.scaler = NativeScaler(device="cpu")
        self.updates = 0

    def train(self, epochs):
        for epoch in epochs:
            for x in _batches(epoch):
                self.optimizer.zero_grad()
                self.module(torch.from_numpy(x)).square().mean().backward()
                self.optimizer.step()
                self.updates += 1
                self.ema.update(self.module, step=self.updates)
            self.scheduler.step(epoch + 1)


def _loss(model, batch):
    return jnp.square(model(batch)).mean(), {}


def _in_jax(module, run, position):
    """A state with timm's optimizer, schedule and average from there on."""
    model = interop.from_torch(module, torch.zeros(2, 4).double())
    rates = interop.schedule_from_torch(run.scheduler, 6 * STEPS, every=STEPS, position=position)
    tx = interop.optax_from_torch(run.optimizer, names=run.module, model=model, learning_rate=rates)
    return jaxnorm.TrainState.create(model, tx, ema=jaxnorm.Ema(0.9))


def _train(state, epochs):
    step = jax.jit(jaxnorm.train_step(_loss))
    for epoch in epochs:
        for x in _batches(epoch):
            state, _ = step(state, jnp.asarray(x))
    return state


def _assert_same(found, expected):
    """Each array to 1e-10 of its norm."""
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-10, name


def test_a_checkpoint_of_timms_train_script_goes_on_here_and_back_there(tmp_path):
    """Two epochs in timm, two here, two in timm again, by its own saver and its own `resume_checkpoint`."""
    whole, run = TorchRun(), TorchRun()
    whole.train(range(6))
    run.train(range(2))
    args = argparse.Namespace(model="small", lr=0.01, sched="cosine")
    saver = CheckpointSaver(
        run.module, run.optimizer, args=args, model_ema=run.ema, amp_scaler=run.scaler, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=0.5)

    # here
    path = tmp_path / "last.pth.tar"
    model, average = interop.load_checkpoint(path, which="model"), interop.load_checkpoint(path, which="ema")
    epoch = interop.first_epoch(model)
    assert epoch == 2 and model.metadata["arch"] == "small" and model.metadata["metric"] == 0.5
    fresh = TorchRun()
    state = _in_jax(fresh.module, fresh, position=epoch * STEPS)
    state = interop.load_state_dict(state, model)
    state = interop.load_optimizer_state(state, model.metadata["optimizer"], names=fresh.module)
    state = state.with_ema_model(interop.load_state_dict(state.model(), average))
    state = _train(state, range(epoch, 4))
    optimizer = interop.optimizer_state_dict(state, run.optimizer, names=run.module)
    metadata = {**model.metadata, "epoch": 3, "optimizer": optimizer, "metric": np.float32(0.25)}
    interop.save_checkpoint(tmp_path / "from_jax.pth.tar", state, metadata, ema=state.ema_model(), layout="timm")

    # and there
    back = TorchRun()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = timm.models.resume_checkpoint(
            back.module, str(tmp_path / "from_jax.pth.tar"), back.optimizer, back.scaler, log_info=True
        )
        timm.models.load_checkpoint(back.ema.module, str(tmp_path / "from_jax.pth.tar"), use_ema=True)
    assert start == 4
    back.updates = start * STEPS
    back.scheduler.step(start)
    back.train(range(start, 6))
    _assert_same(back.module.state_dict(), whole.module.state_dict())
    _assert_same(back.ema.module.state_dict(), whole.ema.module.state_dict())
    for mine, theirs in zip(back.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        _assert_same(mine, theirs)


def test_a_checkpoint_of_torchvisions_reference_script_goes_on_here_and_back_there(tmp_path):
    """references/classification/train.py: model, optimizer, lr_scheduler, epoch, args, model_ema, scaler."""
    whole = TorchRun()
    whole.scheduler = torch.optim.lr_scheduler.StepLR(whole.optimizer, 2, 0.3)
    average = torch.optim.swa_utils.AveragedModel(
        whole.module, avg_fn=lambda mean, x, n: 0.9 * mean + 0.1 * x, use_buffers=True
    )

    def train(run, average, scheduler, epochs):
        for epoch in epochs:
            for x in _batches(epoch):
                run.optimizer.zero_grad()
                run.module(torch.from_numpy(x)).square().mean().backward()
                run.optimizer.step()
                average.update_parameters(run.module)
            scheduler.step()

    def save(run, average, scheduler, epoch, path):
        checkpoint = {
            "model": run.module.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "epoch": epoch,
            "args": argparse.Namespace(lr=0.01),
            "model_ema": average.state_dict(),
            "scaler": None,
        }
        torch.save(checkpoint, path)

    train(whole, average, whole.scheduler, range(2))
    save(whole, average, whole.scheduler, 1, tmp_path / "checkpoint.pth")
    fresh = TorchRun()
    fresh.scheduler = torch.optim.lr_scheduler.StepLR(fresh.optimizer, 2, 0.3)
    model = interop.load_checkpoint(tmp_path / "checkpoint.pth", which="model")
    found = interop.load_checkpoint(tmp_path / "checkpoint.pth", which="model_ema")
    epoch = interop.first_epoch(model)
    assert epoch == 2
    fresh.optimizer.load_state_dict(torch.load(tmp_path / "checkpoint.pth", weights_only=False)["optimizer"])
    fresh.scheduler.load_state_dict(dict(model.metadata["lr_scheduler"]))
    imported = interop.from_torch(fresh.module, torch.zeros(2, 4).double())
    rates = interop.schedule_from_torch(fresh.scheduler, 4 * STEPS, every=STEPS)
    tx = interop.optax_from_torch(fresh.optimizer, names=fresh.module, model=imported, learning_rate=rates)
    state = jaxnorm.TrainState.create(imported, tx, ema=jaxnorm.Ema.averaged_model(0.9, use_buffers=True))
    state = interop.load_state_dict(state, model)
    state = interop.load_optimizer_state(state, model.metadata["optimizer"], names=fresh.module)
    count = int(found.metadata["n_averaged"]) if "n_averaged" in found.metadata else epoch * STEPS
    state = state.with_ema_model(interop.load_state_dict(state.model(), found), updates=count)
    state = _train(state, range(epoch, 4))
    for _ in range(2):  # PyTorch's scheduler goes where JAX went, and sets the groups' rates
        fresh.optimizer.step()
        fresh.scheduler.step()
    metadata = {
        "optimizer": interop.optimizer_state_dict(state, fresh.optimizer, names=fresh.module),
        "lr_scheduler": fresh.scheduler.state_dict(),
        "epoch": 3,
        "n_averaged": 4 * STEPS,
    }
    path = tmp_path / "from_jax.pth"
    interop.save_checkpoint(path, state, metadata, ema=state.ema_model(), layout="torchvision")

    # references/classification/train.py, `if args.resume`
    back = TorchRun()
    back.scheduler = torch.optim.lr_scheduler.StepLR(back.optimizer, 2, 0.3)
    back_average = torch.optim.swa_utils.AveragedModel(
        back.module, avg_fn=lambda mean, x, n: 0.9 * mean + 0.1 * x, use_buffers=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        back.module.load_state_dict(checkpoint["model"])
        back.optimizer.load_state_dict(checkpoint["optimizer"])
        back.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        back_average.load_state_dict(checkpoint["model_ema"])
    start = checkpoint["epoch"] + 1
    train(back, back_average, back.scheduler, range(start, 6))
    train(whole, average, whole.scheduler, range(2, 6))
    _assert_same(back.module.state_dict(), whole.module.state_dict())
    _assert_same(back_average.state_dict(), average.state_dict())


@pytest.mark.parametrize(
    "metadata, expected",
    [({"epoch": 4, "version": 2}, 5), ({"epoch": 4, "version": 1, "arch": "x"}, 4), ({"epoch": 4, "arch": "x"}, 4),
     ({"epoch": 4, "lr_scheduler": {}}, 5), ({"epoch": 4}, 5), ({"epoch": np.int64(4)}, 5),
     ({"epoch": 0, "global_step": 6, "pytorch-lightning_version": "2.5"}, 1), ({"epoch": -1, "train_args": {}}, None)],
)  # fmt: skip
def test_the_first_epoch_of_a_resumed_run(metadata, expected, tmp_path):
    """As timm (version), torchvision, Lightning and Ultralytics (-1: training has ended) go on."""
    interop.save_checkpoint(tmp_path / "x.pth", {"weight": np.ones(2)}, metadata, layout="timm")
    if "version" not in metadata:  # what we save says 2
        assert interop.load_checkpoint(tmp_path / "x.pth").metadata["version"] == 2
    checkpoint = interop.load_checkpoint(tmp_path / "x.pth")
    checkpoint.metadata = metadata
    assert interop.first_epoch(checkpoint) == expected


def test_metadata_may_hold_tensors_and_numpys_numbers(tmp_path):
    metadata = {"loss": torch.tensor(0.5), "epoch": np.int64(3), "metric": np.float32(0.25), "curve": np.arange(3.0)}
    interop.save_checkpoint(tmp_path / "x.pth", {"weight": np.ones(2)}, metadata)
    found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert found["epoch"] == 3 and type(found["epoch"]) is int and found["metric"] == 0.25
    assert found["loss"] == torch.tensor(0.5) and torch.equal(found["curve"], torch.arange(3.0, dtype=torch.float64))


def test_names_can_be_those_of_another_model(tmp_path):
    """`rename=` as in load_state_dict, from PyTorch's names to the model's, used backwards."""
    model = jaxnorm.nnx.BatchNorm(3, count_batches=True, rngs=interop_rngs())
    interop.save_checkpoint(tmp_path / "x.pth", model, rename=[(r"^backbone\.", "")])
    assert "backbone.running_mean" in torch.load(tmp_path / "x.pth", weights_only=True)
    interop.save_checkpoint(tmp_path / "y.safetensors", {"a.weight": np.ones(2)}, rename={"b.weight": "a.weight"})
    assert list(interop.load_checkpoint(tmp_path / "y.safetensors")) == ["b.weight"]


def interop_rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_the_page_about_training_resumes(tmp_path, monkeypatch):
    """The program of docs/training.md, "Checkpoints of training scripts"."""
    monkeypatch.chdir(tmp_path)
    run = TorchRun()
    run.train(range(2))
    CheckpointSaver(run.module, run.optimizer, model_ema=run.ema, checkpoint_dir=".").save_checkpoint(1)
    (program,) = programs("docs/training.md", "checkpoints-of-training-scripts")
    fresh = TorchRun()
    names = {"interop": interop, "module": fresh.module, "optimizer": fresh.optimizer, "epochs": 4}
    names["state"] = _in_jax(fresh.module, fresh, position=2 * STEPS)
    program.run(names)
    assert timm.models.resume_checkpoint(fresh.module, "last.pth.tar", fresh.optimizer) == 4
    _assert_same(fresh.module.state_dict(), run.module.state_dict())
