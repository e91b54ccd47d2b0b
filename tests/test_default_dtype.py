"""What Python's floats are among integers is the default type of the torch that recorded the module."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity_tools import normal

import interop

FUNCTIONS = {
    "an integer times a number": lambda x, n: n * (1 / 3),
    "a quotient of integers": lambda x, n: n / 3,
    "two integer tensors": lambda x, n: torch.atan2(n, n + 1) + n / n.sum(),
    "functions of integers": lambda x, n: torch.exp(n) + torch.sigmoid(n) + torch.sqrt(n) + n**0.5,
    "a boolean times a number": lambda x, n: (n > 2) * 0.1,
    "a choice of numbers": lambda x, n: torch.where(n > 2, 1 / 3, n * 0.1),
    "new tensors": lambda x, n: torch.full((2,), 1 / 3).sum() + torch.eye(2) / 3 + torch.linspace(0, 1, 2),
    "a range": lambda x, n: torch.arange(0.0, 1.0, 0.1) * 1.0,
    "a size": lambda x, n: x.shape[0] * 0.1 * torch.ones(1),
    "a complex number": lambda x, n: (n * (1 / 3 + 1j)).abs(),
}


class Net(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.norm = function, torch.nn.BatchNorm1d(3)

    def forward(self, x, n):
        return self.norm(x), self.function(x, n)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def default(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_among_integers_have_the_default_type(default, name):
    module, x, n = Net(FUNCTIONS[name]).eval(), normal(4, 3).to(default), torch.tensor([1, 2, 3, 4])
    model = interop.from_torch(module, x, n)
    other = {torch.float64: torch.float32, torch.float32: torch.float64}[default]
    expected = module(x, n)[1]
    torch.set_default_dtype(other)  # what it is later makes no difference
    found = model(jnp.asarray(x.numpy()), jnp.asarray(n.numpy()))[1]
    assert f"torch.{found.dtype.name}" == str(expected.dtype)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-14 if default == torch.float64 else 1e-6)


def test_an_artifact_keeps_it(default, tmp_path):
    module, x, n = Net(FUNCTIONS["a quotient of integers"]).eval(), normal(4, 3).to(default), torch.tensor([1, 2, 3, 4])
    interop.save(interop.from_torch(module, x, n), tmp_path / "model")
    found = interop.load(tmp_path / "model")(jnp.asarray(x.numpy()), jnp.asarray(n.numpy()))[1]
    np.testing.assert_array_equal(np.asarray(found), module(x, n)[1].numpy())
