"""Graphs with in-place operations: made functional at once where that is simple, by PyTorch where it is not."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_tools import normal, to_jax
from torch.export import ExportedProgram

import interop


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(3))
        self.function = function

    def forward(self, x):
        return self.function(x * self.weight, x)


def written_then_read(y, x):
    z = F.relu_(y) * 3
    z += x
    z.mul_(2).neg_()
    return z + 1, F.dropout(z, 0.5, training=False)


def written_through_a_view(y, x):
    first = y[:, 0]
    first.mul_(3)
    return y, first


def view_is_read_later(y, x):
    flat = y.view(-1)
    y.add_(1)
    return flat * 2


def view_is_read_before(y, x):
    total = y.view(-1).sum()  # a sum keeps nothing for its derivative
    y.add_(1)
    return y * total


def view_is_made_later(y, x):
    y.add_(1)
    flat = y.reshape(-1)
    flat = flat * 1
    return flat.sin_(), y


def parts_are_written(y, x):
    z = y * 2
    left, right = z[:, :1], z[:, 1:]
    left.neg_()
    return torch.cat([left, right], 1)


def dropout_that_returns_its_input(y, x):
    z = F.dropout(y, 0.5, training=False)
    z += 1
    return z * x


def type_is_kept(y, x):
    z = y.float()
    z += x
    z[:, 1:].masked_fill_(z[:, 1:] > 1, -1.0)
    return z.double() * y


SIMPLE = [written_then_read, view_is_read_before, view_is_made_later, dropout_that_returns_its_input]
OTHERS = [
    written_through_a_view,
    view_is_read_later,
    parts_are_written,
    type_is_kept,
]


@pytest.mark.parametrize("function", SIMPLE + OTHERS)
def test_values_and_gradients_are_pytorchs(function, monkeypatch):
    if function in SIMPLE:
        monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    module, x = Function(function), normal(4, 3, seed=1)
    model = interop.from_torch(module, x)
    names = {node.operation for node in model._interop.model.train.nodes}
    assert not any(name.split(".")[1].endswith("_") for name in names)

    given = x.clone().requires_grad_()
    expected = module(given)
    expected = expected if isinstance(expected, tuple) else (expected,)
    sum((y * normal(*y.shape, seed=i)).sum() for i, y in enumerate(expected)).backward()

    def loss(x):
        found = model(x)
        found = found if isinstance(found, tuple) else (found,)
        return sum((y * normal(*y.shape, seed=i).numpy()).sum() for i, y in enumerate(found)), found

    (_, found), grad = jax.value_and_grad(loss, has_aux=True)(to_jax(x))
    for y, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-6)
        assert y.dtype.name == str(wanted.dtype).removeprefix("torch.")
    np.testing.assert_allclose(grad, given.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dropout", [torch.nn.Dropout, torch.nn.Dropout2d, torch.nn.AlphaDropout, "stochastic depth"])
def test_sampling_in_place_is_made_functional_without_a_second_record(dropout, monkeypatch):
    """Running a graph three times over is what made an EfficientNet's import take twice as long."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("a second record")

    class Depth(torch.nn.Module):
        def forward(self, x):
            noise = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(0.5)
            return x * noise.div_(0.5) if self.training else x

    layer = Depth() if dropout == "stochastic depth" else dropout(0.5, inplace=True)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), layer).double().train()
    x = normal(4, 2, 5, 5)
    model = interop.from_torch(module, x)
    model.eval()
    np.testing.assert_allclose(model(to_jax(x)), module.eval()(x).detach(), rtol=1e-12, atol=1e-13)
    model.train()
    first, second = model(to_jax(x)), model(to_jax(x))
    assert (np.asarray(first) != np.asarray(second)).any()


def test_a_call_draws_once_from_the_models_stream_and_each_node_differently():
    module = torch.nn.ModuleList([torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)])

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = module

        def forward(self, x):
            return self.layers[0](x), self.layers[1](x)

    model = interop.from_torch(Two().train(), torch.ones(2, 64))
    x = np.ones((2, 64), np.float32)
    drawn = [np.asarray(y) for _ in range(2) for y in model(x)]
    assert len({y.tobytes() for y in drawn}) == 4
    assert model._interop_rngs.default.count[...] == 2
