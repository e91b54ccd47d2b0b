"""Errors that forward catches: PyTorch's own are followed, those of the recording are refused."""

import contextlib

import numpy as np
import pytest
import torch
from parity_tools import assert_same_step, jax_step, normal, to_jax, torch_step

import interop


class Net(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.norm, self.other = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
        self.deep = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.Linear(7, 7)))

    def forward(self, x):
        return self.other(self.function(self, x) + x)


def other_arguments(self, x):
    try:
        return self.norm(x, None)
    except TypeError:
        return self.norm(x)


def layer_that_fails(self, x):
    try:
        return self.deep(x)  # the linear layer has other sizes
    except RuntimeError:
        return self.norm(x)


def layer_that_fails_twice(self, x):
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            x = self.deep(x)
    return self.norm(self.deep[0][0](x))


def sizes_that_do_not_fit(self, x):
    try:
        x = x.view(-1, 7)
    except RuntimeError:
        x = x + self.deep[0][0](x)
    return self.norm(x)


def attribute_that_is_not_there(self, x):
    try:
        mask = x.mask
    except AttributeError:
        mask = None
    return self.norm(x) if mask is None else x


@pytest.mark.parametrize(
    "function",
    [
        other_arguments,
        layer_that_fails,
        layer_that_fails_twice,
        sizes_that_do_not_fit,
        attribute_that_is_not_there,
    ],
)
def test_what_pytorch_raises_too_is_followed(function):
    module, x = Net(function).double().train(), normal(4, 3, 5, 5)
    assert_same_step(jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x), 1e-9)


def integer(self, x):
    try:
        return self.norm(x) * int(x.sum())
    except Exception:
        return self.norm(x)


def branch(self, x):
    with contextlib.suppress(RuntimeError):
        if x.sum() > 0:
            x = x * 2
    return self.norm(x)


def number(self, x):
    try:
        if x.mean().item() > 0.1:
            x = x * 2
    except Exception:
        return self.norm(x + 1)
    return self.norm(x)


def in_a_layer(self, x):
    class Asking(torch.nn.Module):
        def forward(self, x):
            return x * float(x.max())

    try:
        return self.norm(torch.nn.Sequential(Asking())(x))
    except (RuntimeError, ValueError, TypeError):
        return self.norm(x)


def array(self, x):
    try:
        x = x * np.asarray(x.detach()).max()
    except Exception:
        x = x * 3
    return self.norm(x)


def gradient_hook(self, x):
    with contextlib.suppress(ValueError):
        x.register_hook(lambda gradient: gradient * 2)
    return self.norm(x)


@pytest.mark.parametrize("function", [integer, branch, number, in_a_layer, array, gradient_hook])
def test_what_only_the_record_raises_is_refused(function):
    with pytest.raises(interop.TraceError, match=r"(?s)(test_caught\.py:\d+.*)"):
        interop.from_torch(Net(function).double().train(), normal(4, 3, 5, 5))
