"""What users do wrong on their first day gets a sentence that says what to do; and what they print is short."""

import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import torch
import ultralytics
from flax import nnx
from torch import nn

import interop
import jaxnorm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


X = torch.zeros(4, 3, 8, 8)
BATCH = {"image": np.zeros((8, 3, 8, 8), np.float32), "label": np.zeros(8, np.int32)}


def loss_fn(model, batch):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture(scope="module")
def imported(module):
    return interop.from_torch(module, X)


@pytest.fixture
def model(imported):
    return nnx.clone(imported)


def step(state, batch, loss_fn=loss_fn, **options):
    return jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), **{"how": "jit"} | options)(state, batch)


def state_of(model, tx=None, **options):
    return jaxnorm.TrainState.create(model, optax.sgd(0.1) if tx is None else tx, **options)


MISTAKES = {
    # importing
    "an Ultralytics tool": (
        lambda m, net: interop.from_torch(ultralytics.YOLO("yolov8n.yaml"), torch.zeros(2, 3, 64, 64)),
        TypeError, r"YOLO.train\(\) takes no mode.*import the network, its \.model"),
    "a class": (lambda m, net: interop.from_torch(Net, X), TypeError, "found the class Net: make one of it"),
    "a state dict": (lambda m, net: interop.from_torch(net.state_dict(), X), TypeError, "expected a torch.nn.Module"),
    "a file": (lambda m, net: interop.from_torch("resnet50.pth", X), TypeError, "expected a torch.nn.Module, found"),
    "no example": (lambda m, net: interop.from_torch(net), TypeError, r"does not take these example inputs: missing"),
    "a NumPy example": (lambda m, net: interop.from_torch(net, X.numpy()), interop.TraceError, "torch.from_numpy"),
    "dynamic_dims that there are not": (
        lambda m, net: interop.from_torch(net, X, dynamic_dims=(0, 7)), ValueError,
        r"dynamic_dims \[7\]: the example inputs have 4 dimensions at most, 0 to 3"),
    "a lazy layer": (
        lambda m, net: interop.from_torch(nn.Sequential(nn.LazyLinear(3)), torch.zeros(2, 3)), ValueError,
        "call the module once before importing it"),
    # calling
    "channels last": (lambda m, net: m(jnp.zeros((4, 8, 8, 3))), ValueError, r"lie last: jnp\.moveaxis\(x, -1, 1"),
    "larger images, channels last": (lambda m, net: m(jnp.zeros((4, 64, 64, 3))), ValueError, r"jnp\.moveaxis"),
    "bytes": (lambda m, net: m(jnp.zeros((4, 3, 8, 8), jnp.uint8)), ValueError, r"scale the images, .* / 255"),
    "a tensor": (lambda m, net: m(X), ValueError, r"Tensor of torch: give jnp\.asarray\(tensor\.numpy\(\)\)"),
    # weights
    "other names": (
        lambda m, net: interop.load_state_dict(m, {f"body.{k}": v for k, v in net.state_dict().items()}), ValueError,
        r"rename=, which interop\.suggest_rename\(model, state_dict\) proposes"),
    "an optimizer's state": (
        lambda m, net: interop.load_state_dict(m, torch.optim.SGD(net.parameters(), 0.1).state_dict()), ValueError,
        r"this is an optimizer's state: interop\.load_optimizer_state takes it"),
    "a path": (lambda m, net: interop.load_state_dict(m, "x.pth"), TypeError, r"interop\.load_checkpoint reads one"),
    "no such file": (lambda m, net: interop.load_checkpoint("nothing.pth"), interop.CheckpointError, "no such file"),
    "no ending": (lambda m, net: interop.save_checkpoint("x", m), interop.CheckpointError, "the ending says"),
    # training
    "a loss alone": (
        lambda m, net: step(state_of(m), BATCH, lambda m, b: m(b["image"]).mean()), TypeError,
        "loss_fn gives a pair, the loss and a mapping of metrics"),
    "a loss for each example": (
        lambda m, net: step(state_of(m), BATCH, lambda m, b: (m(b["image"]).sum(1), {})), ValueError,
        "'loss' is a scalar, the mean over the batch"),
    "a loss of whole numbers": (
        lambda m, net: step(state_of(m), BATCH, lambda m, b: (m(b["image"]).argmax(), {})), ValueError,
        "has no gradient: a loss is a floating number"),
    "metrics that are arrays": (
        lambda m, net: step(state_of(m), BATCH, lambda m, b: (m(b["image"]).mean(), {"a": b["label"]})), ValueError,
        "'a' is a scalar, the mean over the batch"),
    "tensors in the batch": (
        lambda m, net: step(state_of(m), {k: torch.tensor(v) for k, v in BATCH.items()}), TypeError,
        r"\['image'\] is a torch tensor: give tensor\.numpy\(\)"),
    "a batch of unequal lengths": (
        lambda m, net: step(state_of(m), {**BATCH, "label": np.zeros(7, np.int32)}, how="shard_map"), ValueError,
        "split along its first axis"),
    "labels that are one-hot": (
        lambda m, net: step(state_of(m), {**BATCH, "label": np.zeros((8, 4), np.float32)}), TypeError, "integer"),
    "a model for a state": (lambda m, net: step(m, BATCH), TypeError, r"TrainState\.create\(model, tx\)"),
    "torch's optimizer": (
        lambda m, net: state_of(m, torch.optim.SGD(net.parameters(), 0.1)), TypeError,
        r"interop\.optax_from_torch\(optimizer\) makes one"),
    "a rate for an optimizer": (lambda m, net: state_of(m, 0.1), TypeError, "tx is an optax optimizer"),
    "a number for an EMA": (lambda m, net: state_of(m, ema=0.999), TypeError, r"ema is a jaxnorm\.Ema"),
    "a PyTorch model in a state": (lambda m, net: state_of(net), TypeError, r"interop\.from_torch\(module, ex"),
    "a PyTorch model to synchronise": (
        lambda m, net: jaxnorm.convert_sync_batchnorm(net, "batch"), TypeError, r"interop\.from_torch\(module, ex"),
    "an axis name under jit": (
        lambda m, net: step(state_of(jaxnorm.convert_sync_batchnorm(m, axis_name="batch")), BATCH), ValueError,
        r"jaxnorm\.revert_sync_batchnorm\(model\)"),
    "a state without copies under pmap": (
        lambda m, net: step(state_of(m), BATCH, how="pmap"), ValueError, r"replicate\(state\)"),
    "another way to be parallel": (lambda m, net: step(state_of(m), BATCH, how="pjit"), ValueError, "got 'pjit'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_first_mistake_says_what_to_do(mistake, model, module, monkeypatch):
    """Without the suite's type checks, which would refuse some before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        make(model, module)


def test_training_in_eval_mode_is_told(model, caplog):
    model.eval()
    with caplog.at_level(logging.WARNING, "jaxnorm"):
        step(state_of(model), BATCH)
    assert "all 1 BatchNorm layers are in eval mode in this training step: model.train()" in caplog.text
    caplog.clear()
    model.train()
    step(state_of(model), BATCH)
    assert not caplog.records


def test_modules_with_a_train_of_their_own_are_no_tools():
    """Freezing BatchNorm in `train` is common; and so is a method `predict`."""

    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.model = nn.Identity()

        def train(self, flag=True):
            super().train(flag)
            self.bn.eval()
            return self

        def predict(self, x):
            return self(x)

    assert interop.from_torch(Frozen().train(), X).bn.frozen


def test_what_is_printed_is_short(imported, model):
    text = str(imported)
    assert text == repr(imported)
    assert text.splitlines() == [
        "TracedModule of Net (train mode, 295 numbers)",
        "  conv: weight (8, 3, 3, 3), bias (8,)",
        "  bn: 8, momentum=0.9, epsilon=1e-05",
        "  fc: weight (4, 8), bias (4,)",
    ]
    model.fc = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    assert "  fc: flax.Linear, bias (2,), kernel (8, 2)" in str(model) or "fc: flax.Linear, kernel (8, 2)" in str(model)
    state = state_of(model, optax.adam(1e-3), ema=jaxnorm.Ema(0.9))
    assert len(repr(state)) < 400 and repr(state).startswith("TrainState(step=0, params=6 arrays of 258, batch_stats=3")
    assert repr(jaxnorm.replicate(state)).endswith(") in 8 copies")
    assert len(repr(jax.eval_shape(lambda: state))) < 400


def test_a_table_of_the_model_can_be_had(model):
    table = nnx.tabulate(model, jnp.zeros((2, 3, 8, 8)), console_kwargs={"width": 200})
    assert "TracedBatchNorm" in table and "bn" in table


def test_profiles_and_programs_name_the_layers(model):
    lowered = jax.jit(lambda model, x: model(x)).lower(model, jnp.zeros((2, 3, 8, 8)))
    text = lowered.as_text(debug_info=True)
    assert "/conv/" in text and "/bn/" in text and "/fc/" in text
