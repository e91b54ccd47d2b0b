"""Modules under quantisation-aware training: observers move and numbers are quantised as in PyTorch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity_tools import jax_step, to_jax, torch_step
from test_ops import call
from torch import nn

import interop

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's, that torchao takes this over
FUSED = "_fused_moving_avg_obs_fq_helper_functional"
LIMITS = {"unsigned": (0, 255, False), "signed": (-128, 127, True), "seven bits": (0, 127, False)}


def extremes(kind, rng, n):
    """Running extremes as layers come by them: at the beginning, one-sided, tiny, huge."""
    if kind == "first":
        return np.full(n, np.inf), np.full(n, -np.inf)
    scale = {"tiny": 1e-8, "small": 1e-3, "usual": 1.0, "huge": 1e30}.get(kind, 1.0)
    low, high = -rng.random(n) * scale, rng.random(n) * scale
    return (np.zeros(n), high) if kind == "positive" else (low, np.zeros(n)) if kind == "negative" else (low, high)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("channels", [None, 0])
@pytest.mark.parametrize("kind", ["first", "usual", "positive", "negative", "small", "tiny", "huge"])
def test_observing_and_quantising(limits, channels, kind):
    low, high, symmetric = LIMITS[limits]
    rng = np.random.default_rng(0)
    size = {"tiny": 1e-8, "small": 1e-3, "huge": 1e30}.get(kind, 1.0)
    for on, quantising in ((1, 1), (0, 1), (1, 0)):
        if kind == "first" and not on:
            continue
        x = (rng.normal(size=(3, 4, 5)) * size).astype(np.float32)
        n = 1 if channels is None else x.shape[channels]
        state = [*(e.astype(np.float32) for e in extremes(kind, rng, n)), np.ones(n, np.float32), np.zeros(n, np.int32)]
        flags = np.array([on]), np.array([quantising])
        rest = (0.01, low, high, 0 if channels is None else channels, channels is not None, symmetric)
        args = [torch.tensor(np.copy(a)) for a in (x, *flags, *state)]
        args[0].requires_grad_()
        wanted = torch.ops.aten._fused_moving_avg_obs_fq_helper_functional(*args, *rest)
        wanted[0].sum().backward()

        def ours(x, flags=flags, state=state, rest=rest):
            found = call(f"aten.{FUSED}.default", x, *map(jnp.asarray, (*flags, *state)), *rest)
            return found[0].sum(), found

        (_, found), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(x))
        names = ("output", "mask", "running_min", "running_max", "scale", "zero_point")
        for name, a, b in zip(names, found, wanted, strict=True):
            # Along channels PyTorch's compiler multiplies and adds in one rounding.
            close = {"rtol": 0 if channels is None else 3e-7, "atol": 0}
            np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), err_msg=f"{name} {on} {quantising}", **close)
        np.testing.assert_array_equal(np.asarray(gradient), args[0].grad.numpy())


def test_quantising_alone():
    x = np.linspace(-3, 3, 31, dtype=np.float32).reshape(1, 31)
    scale, zero = np.array([0.02], np.float32), np.array([3], np.int32)
    for name, args in {
        "fake_quantize_per_tensor_affine.default": (0.02, 3, -50, 50),
        "fake_quantize_per_tensor_affine.tensor_qparams": (scale, zero, -50, 50),
        "fake_quantize_per_channel_affine.default": (scale, zero, 0, -50, 50),
    }.items():
        leaf = torch.tensor(x, requires_grad=True)
        op, _, overload = name.partition(".")
        theirs = getattr(getattr(torch.ops.aten, op), overload)
        wanted = theirs(leaf, *(torch.tensor(a) if isinstance(a, np.ndarray) else a for a in args))
        wanted.sum().backward()
        given = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        ours = lambda x, name=name, given=given: call(f"aten.{name}", x, *given).sum()  # noqa: E731
        np.testing.assert_array_equal(call(f"aten.{name}", jnp.asarray(x), *given), wanted.detach().numpy())
        np.testing.assert_array_equal(jax.grad(ours)(jnp.asarray(x)), leaf.grad.numpy())


def test_the_masks_of_those_in_the_range():
    x = np.linspace(-3, 3, 31, dtype=np.float32).reshape(1, 31)
    scale, zero, off = np.array([0.02], np.float32), np.array([3], np.int32), np.array([0])
    for name, args in {
        "fake_quantize_per_tensor_affine_cachemask": (0.02, 3, -50, 50),
        "fake_quantize_per_channel_affine_cachemask": (scale, zero, 0, -50, 50),
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": (scale, zero, off + 1, -50, 50),
    }.items():
        wanted = getattr(torch.ops.aten, name)(
            torch.tensor(x), *(torch.tensor(a) if isinstance(a, np.ndarray) else a for a in args)
        )
        given = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        found = call(f"aten.{name}.default", jnp.asarray(x), *given)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b.numpy(), err_msg=name)
    name = "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default"
    found, inside = call(name, jnp.asarray(x), *map(jnp.asarray, (scale, zero, off)), -50, 50)
    np.testing.assert_array_equal(found, x)
    assert bool(inside.all())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def eager(x):
    quantization = pytest.importorskip("torch.ao.quantization")  # which PyTorch means to give up for torchao
    module = nn.Sequential(quantization.QuantStub(), Net(), quantization.DeQuantStub()).train()
    module.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(module)


def graph(x):
    quantization = pytest.importorskip("torch.ao.quantization")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    return quantize_fx.prepare_qat_fx(Net().train(), quantization.get_default_qat_qconfig_mapping("fbgemm"), (x,))


@pytest.mark.parametrize("prepare", [eager, graph])
def test_a_module_under_quantisation_aware_training(prepare):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = prepare(x)
    module(x)  # observers learn how many channels there are
    model = interop.from_torch(module, x)
    found, wanted = jax_step(model, to_jax(x)), torch_step(module, x)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-4)
    for name, value in wanted.state.items():
        if "observer" not in name:
            np.testing.assert_allclose(found.state[name], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    module.load_state_dict({k: torch.tensor(np.array(v)) for k, v in found.state.items()}, strict=True)
