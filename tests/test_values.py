"""What Python asks of values in forward: constants are told and checked at load, checks recorded, branches refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental import checkify
from parity_tools import assert_same_step, jax_step, normal, relative, to_jax, torch_step
from torch import nn
from unrewritten import asserted

import interop


class Reading(nn.Module):
    """A function of a BatchNorm layer, some buffers and x."""

    def __init__(self, function, **buffers):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        for name, value in buffers.items():
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, torch.as_tensor(value))
        self.function = function

    def forward(self, x):
        return self.function(self, self.norm(x))


def written(self, y):
    self.k += 1
    return y * int(self.k)


def changed(self, y):
    sizes = self.k.clone()
    sizes[0] = 2
    return y[:, int(sizes[0]) : int(sizes[1])]


CONSTANTS = {
    "int": (lambda self, y: y[:, : int(self.k)], 2),
    "item": (lambda self, y: y * self.k.item(), 0.5),
    "tolist": (lambda self, y: torch.cat(y.split(self.k.tolist(), 1)[::-1], 1), [1, 3]),
    "unpacked": (lambda self, y: y[:, slice(*self.k)], [1, 3]),
    "slice": (lambda self, y: y[:, : self.k], 2),
    "view": (lambda self, y: y.view(-1, self.k, 2).sum(1), 2),
    "range": (lambda self, y: sum(y * i for i in range(self.k)), 3),
    "truth": (lambda self, y: 2 * y if self.k else y, True),
    "any": (lambda self, y: 2 * y if self.k.any() else y, [True, False]),
    "derived": (lambda self, y: y[:, : int((self.k * 3 - 4).clamp(max=3))], 2),
    "changed copy": (changed, [1, 3]),
    "frozen parameter": (lambda self, y: y[:, : int(self.k)], nn.Parameter(torch.tensor(2), requires_grad=False)),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_the_value_of_a_constant_is_part_of_the_program_and_no_other_is_loaded(kind, tmp_path):
    function, value = CONSTANTS[kind]
    module = Reading(function, k=value).double()
    model = interop.from_torch(module, normal(6, 4))
    x = normal(8, 4, seed=1)
    expected = module(x).detach()
    interop.save(model, tmp_path / "model")
    for found in (model, interop.load(tmp_path / "model")):
        assert relative(found(x.numpy()), expected) < 1e-12
    state = interop.state_dict(model)
    interop.load_state_dict(model, state)
    other = ~state["k"] if state["k"].dtype == bool else state["k"] + 1
    with pytest.raises(ValueError, match=r"k is .*, and the code of Reading has read it as the number"):
        interop.load_state_dict(model, {**state, "k": other})
    np.testing.assert_array_equal(interop.state_dict(model)["k"], state["k"])


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda self, y: 2 * y if self.k.fill_(1) and self.k else y, "self.k.fill_"),
        (written, "int.self.k"),
        (lambda self, y: y * int(self.norm.num_batches_tracked + 1), "num_batches_tracked"),
        (lambda self, y: y if y.sum() > 0 else -y, "y.sum"),
        (lambda self, y: y * (2 if torch.rand(1) < 0.5 else 1), "torch.rand"),
    ],
)
def test_what_training_moves_or_data_decide_is_refused_with_its_line(function, line):
    with pytest.raises(interop.TraceError, match=rf"test_values\.py:\d+: .*{line}"):
        interop.from_torch(Reading(function, k=0), torch.zeros(6, 4))


def finite(self, y):
    if not torch.isfinite(y).all():
        raise ValueError("not finite")
    return y


def function_of_torch(self, y):
    torch._assert(torch.isfinite(y).all(), "not finite")
    return y


def close(self, y):
    if self.training and not torch.allclose(y, y):
        raise ValueError("not finite")
    return y


@pytest.mark.parametrize("function", [finite, asserted, function_of_torch, close])
def test_a_check_of_values_is_made_under_checkify_and_said_at_import(function, caplog):
    with caplog.at_level(logging.WARNING, "interop"):
        model = interop.from_torch(Reading(function).double().train(), normal(6, 4))
    assert "checkify" in caplog.text
    file = "unrewritten.py" if function is asserted else "test_values.py"
    assert file in caplog.text
    graph, state = nnx.split(model)
    call = jax.jit(checkify.checkify(lambda state, x: nnx.merge(graph, state, copy=True)(x)))
    good = jnp.asarray(normal(6, 4).numpy())
    call(state, good)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match=file):
        call(state, good.at[0].set(jnp.nan))[0].throw()
    jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x))(state, good.at[0].set(jnp.nan))


def caught(self, y):
    try:
        assert (y > 0).all()
    except AssertionError:
        return -y
    return y


def test_a_check_whose_failure_forward_catches_is_a_branch():
    with pytest.raises(interop.TraceError, match=r"test_values\.py"):
        interop.from_torch(Reading(caught), torch.zeros(6, 4))


@pytest.mark.parametrize("validate", [None, True])
def test_distributions_in_forward_and_their_validation_afterwards(validate):
    def function(self, y):
        d = torch.distributions.Normal(y, torch.nn.functional.softplus(y), validate_args=validate)
        c = torch.distributions.Categorical(logits=y, validate_args=validate)
        return d.log_prob(y + 1).sum(-1) + c.entropy()

    before = torch.distributions.Distribution._validate_args
    module = Reading(function).double()
    model = interop.from_torch(module, normal(6, 4))
    x = normal(8, 4, seed=1)
    assert relative(model(x.numpy()), module(x).detach()) < 1e-12
    assert torch.distributions.Distribution._validate_args == before


def divided_by_a_number(self, x):
    weight = x.abs().sum(1)
    return self.norm(x) * weight[:, None] / torch.sum(weight).item() + 0.5 * x.mean().detach().item()


def scaled_by_an_integer(self, x):
    return self.norm(x) * (x > 0).sum().item() + x.max().item() ** 2


@pytest.mark.parametrize("function", [divided_by_a_number, scaled_by_an_integer])
def test_a_number_that_the_code_computes_with_is_a_tensor(function):
    """What `.item()` gives is no part of autograd's graph, there and here."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, x):
            return function(self, x)

    module, x = Net().double().train(), normal(5, 3)
    model = interop.from_torch(module, x)
    other = normal(5, 3, seed=4)
    assert_same_step(jax_step(model, to_jax(other)), torch_step(module, other), 1e-10)
