"""Statistics that an axis name does not reach are named when a model is synchronised or recalibrated."""

import warnings

import numpy as np
import pytest
import torch
from flax import nnx
from parity_tools import normal, to_jax

import interop
import jaxnorm
from jaxnorm.sync import unshared_statistics


class Keeps(torch.nn.Module):
    """A layer with running statistics that `function` moves."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.norm = torch.nn.BatchNorm2d(3)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.function(self, x)


def by_hand(self, x):
    mean = x.mean((0, 2, 3))
    self.running_mean.lerp_(mean.detach(), 0.1)
    self.calls += 1
    return self.norm(x - mean[:, None, None])


def functional(self, x):
    return torch.nn.functional.batch_norm(self.norm(x), self.running_mean, self.running_var, training=self.training)


def by_assignment(self, x):
    self.running_var = 0.9 * self.running_var + 0.1 * x.detach().var((0, 2, 3))
    return self.norm(x) / self.running_var[:, None, None]


def read_afterwards(self, x):
    y = self.norm(x)
    return y + (x.mean((0, 2, 3)) - self.norm.running_mean).norm()


def counted_alone(self, x):
    self.calls += 1
    return self.norm(x)


NAMED = {
    by_hand: ["1.running_mean"],
    functional: ["1.running_mean", "1.running_var"],
    by_assignment: ["1.running_var"],
    read_afterwards: ["1.norm.running_mean", "1.norm.running_var"],
    counted_alone: [],
}


@pytest.mark.parametrize("function", NAMED)
def test_a_converted_model_says_what_stays_each_replicas_own(function):
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(3), Keeps(function)).double().train()
    model = interop.from_torch(module, normal(4, 3, 5, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jaxnorm.convert_sync_batchnorm(model, "batch")
    texts = [str(item.message) for item in caught if "not synchronised" in str(item.message)]
    if not NAMED[function]:
        assert texts == []
    else:
        assert len(texts) == 1
        assert f": {', '.join(NAMED[function])}. " in texts[0]
        assert unshared_statistics({"inside": [model]}) == [f"inside.0.{name}" for name in NAMED[function]]


def test_recalibrate_names_what_it_leaves_alone():
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(3), Keeps(by_hand)).double().train()
    model = interop.from_torch(module, normal(4, 3, 5, 5))
    with pytest.warns(UserWarning, match=r"left as they are.*: 1\.running_mean"):
        found = jaxnorm.recalibrate(model, [to_jax(normal(4, 3, 5, 5))])
    np.testing.assert_array_equal(interop.state_dict(found)["1.running_mean"], np.zeros(3))
    alone = interop.from_torch(torch.nn.BatchNorm2d(3).double().train(), normal(4, 3, 5, 5))
    with (
        pytest.warns(UserWarning, match="left as they are"),
        pytest.raises(ValueError, match=r"no BatchNorm layer.*its own: running_mean, running_var"),
    ):
        jaxnorm.recalibrate(alone, [to_jax(normal(4, 3, 5, 5))])


def test_modules_of_users_say_it_too():
    class Centre(nnx.Module):
        def __init__(self):
            self.mean = nnx.Variable(np.zeros(3))
            self.norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def unshared_statistics(self):
            return ("mean",)

    with pytest.warns(UserWarning, match="not synchronised.*: mean"):
        jaxnorm.convert_sync_batchnorm(Centre(), "batch")
