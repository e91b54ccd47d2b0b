"""Imported models through `jax.export`: a symbolic batch, and programs for machines that this one is not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

import interop


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excite."""

    def __init__(self):
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.squeeze, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.grouped(self.depthwise(F.hardswish(self.bn(self.expand(x)))))
        x = x * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return self.fc(torch.flatten(F.avg_pool2d(x, 4), 1))


class Shapes(nn.Module):
    """What is made of the batch's size: views, expand, zeros, concatenation, chunks, resizing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 8)), nn.BatchNorm1d(8)

    def forward(self, x):
        n = x.shape[0]
        x = self.bn(self.conv(x))
        a, b = x.chunk(2, 1)
        x = torch.cat([b, a], 1)  # as in ShuffleNet
        x = x.view(n, 2, 4, 8, 8).transpose(1, 2).reshape(n, 8, 8, 8)
        x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="bilinear")
        tokens = torch.cat([self.token.expand(n, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + torch.zeros(n, 1, 8) + torch.ones_like(tokens).cumsum(1)
        return self.norm(tokens.reshape(-1, 8)).view(n, -1, 8)[:, 0] * n / x.numel()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.bn = nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.bn(self.embed(x)).flatten(2).mT
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def imported(module_class):
    torch.manual_seed(0)
    return interop.from_torch(module_class(), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("module_class", [Grouped, Shapes, Attention])
def test_a_symbolic_batch(module_class, mode):
    model = imported(module_class)
    getattr(model, mode)()
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    exported = jax.export.export(run)(shapes, jax.ShapeDtypeStruct((b, 3, 8, 8), jnp.float64))
    for n in (2, 5):
        x = np.random.default_rng(n).normal(size=(n, 3, 8, 8))
        for found, expected in zip(
            jax.tree.leaves(exported.call(state, x)), jax.tree.leaves(run(state, x)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def groups_of(text):
    """The number of groups of each convolution of a StableHLO text: of features forward, of the batch in gradients."""
    counts = re.findall(r"batch_group_count = (\d+) : i64, feature_group_count = (\d+) : i64", text)
    return sorted(max(int(a), int(b)) for a, b in counts)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_a_convolution_has_the_form_for_the_machine_that_it_is_lowered_for(platform):
    model = imported(Grouped)
    graph, state = nnx.split(model, ...)

    def loss(state, x):
        return (nnx.merge(graph, state)(x) ** 2).sum()

    x = jnp.zeros((4, 3, 8, 8))
    params = jax.tree.map(jnp.asarray, state)
    traced = jax.jit(jax.grad(loss, allow_int=True)).trace(params, x)
    found = groups_of(traced.lower(lowering_platforms=(platform,)).as_text())
    # Three ungrouped ones, of which the first needs no gradient of its input; depthwise and grouped ones have three.
    expected = [1] * 5 + ([4] * 3 + [12] * 3 if platform != "cpu" else [])
    assert found == expected
