"""What a mask chooses, without sizes that depend on values: the numbers and derivatives are PyTorch's, for any mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from parity_tools import FAST, assert_same_step, jax_step, normal, randomised, relative, to_jax, torch_step
from torch import nn

import interop


class Masked(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def elementwise(self, x):
    y, z, m = self.norm(x), x.clone(), x > 0
    z[m] = torch.log(x[m]) + 2 * y[m] ** 2  # which is NaN where the mask leaves out
    return z


def computed_twice(self, x):
    y, z = self.norm(x), torch.zeros_like(x)
    z[x > 0] = y[x > 0]
    z[~(x > 0)] += y[~(x > 0)] * 3
    return z


def scalar_and_row(self, x):
    y = self.norm(x).clone()
    y[x > 0.3] = 0.5
    y[x[:, 0] < 0] = self.linear.bias
    return y


def rows(self, x):
    h, m = self.linear(x), x[:, 0] > -0.8
    out = h.clone()
    out[m] = self.norm(h[m]) @ self.linear.weight + h[m].softmax(-1)
    return out


def two_dimensions(self, x):
    y, m = self.norm(x).view(-1, 2, 2), x.view(-1, 2, 2)[:, :, 0] > 0
    z = torch.zeros_like(y)
    z[m] = torch.cat([y[m].tanh(), y[m][:, :1]], 1)[:, 1:]
    return z.flatten(1)


def second_dimension(self, x):
    y, m = self.norm(x), x.sum(0) > 0
    z = y.clone()
    z[:, m] = y[:, m] * 3
    return z


def reductions(self, x):
    y, m = self.norm(x), x[:, 0] > -0.8
    moments = y[m].mean(0) + y[m].var(0) + y[m].std(0, unbiased=False) + y[m].max()
    return moments * x + torch.masked_select(y, x > 0).sum() + y[x > 0].sum() / y[x > 0].numel() + y[m].shape[0]


def losses(self, x):
    y, m = self.linear(self.norm(x)), x[:, 0] > -0.8
    classes = (x[:, 1] > 0).long()
    return F.cross_entropy(y[m], classes[m]) * x + F.mse_loss(y[m], x[m]) + F.l1_loss(y[m], x[m], reduction="sum")


def where_indices(self, x):
    h, (i,) = self.norm(x), torch.where(x[:, 0] > 0)
    out = h.clone()
    out[i] = self.linear(h[i])
    i, j = torch.where(x > 0)
    out[i, j] = out[i, j] * 2
    return out


def nonzero_indices(self, x):
    h, i = self.norm(x), (x[:, 0] > 0).nonzero().squeeze(1)
    out = torch.zeros_like(h).index_add(0, i, self.linear(h.index_select(0, i)))
    return out.index_copy(0, i, out[i] + h[i]).masked_scatter(x > 0, x[x > 0])


def given_sizes(self, x):
    h, count = self.norm(x), torch.bincount((x > 0).sum(1), minlength=5)
    i = torch.nonzero_static(x[:, 0] > 0, size=8, fill_value=0)[:, 0]
    sums = torch.zeros(4).double().index_put((torch.tensor([0, 1, 0, -1]),), h.sum(0), accumulate=True)
    return h[i] * count[:4] + sums


def none_chosen(self, x):
    y, z, m = self.norm(x), x.clone(), x > 100
    z[m] = y[m].log()
    return z


FORMS = (
    elementwise, computed_twice, scalar_and_row, rows, two_dimensions, second_dimension, reductions, losses,
    where_indices, nonzero_indices, given_sizes, none_chosen,
)  # fmt: skip


@pytest.mark.parametrize("function", FORMS)
def test_what_a_mask_chooses_is_computed_as_in_pytorch_for_other_masks_too(function):
    module = randomised(Masked(function)).train()
    model = interop.from_torch(module, normal(8, 4, seed=3))
    x = normal(8, 4)
    found, expected = jax_step(model, x.numpy()), torch_step(module, x)
    assert_same_step(found, expected, 1e-9)
    module.eval()
    model.eval()
    x.requires_grad_()
    weights = normal(8, 4, seed=5)
    (module(x) * weights).sum().backward()
    graph, state = nnx.split(model)

    def loss(x, state):
        return (nnx.merge(graph, state, copy=True)(x) * weights.numpy()).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=FAST)(jnp.asarray(x.detach().numpy()), state)
    assert relative(gradient, x.grad) < 1e-10


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda self, x: self.norm(x)[x > 0], "returns"),
        (lambda self, x: self.norm(x)[x > 0].sort()[0][:2].sum() * x, "aten.sort"),
        (lambda self, x: torch.unique(self.norm(x)).sum() * x, "unique"),
        (lambda self, x: torch.bincount((x > 0).sum(1)).sum() * self.norm(x), "bincount"),
        (lambda self, x: x.index_put((x > 0,), self.norm(x)[x < 0]), "another mask"),
    ],
)
def test_what_needs_the_size_itself_is_refused_with_its_line(function, why):
    with pytest.raises(interop.TraceError, match=rf"(?s)test_masks\.py:\d+: .*No mask does in their place.*{why}"):
        interop.from_torch(Masked(function).double().train(), normal(8, 4))


def test_a_mask_that_is_a_constant_of_the_module_chooses_places():
    class Adjacency(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = torch.eye(3) > 0
            self.weights = torch.nn.Parameter(torch.arange(3.0) + 1)
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, x):
            adjacency = -9.0 * torch.ones(3, 3).to(x)
            adjacency[self.mask] = self.weights
            return self.norm(x @ torch.softmax(adjacency, dim=1))

    module, x = Adjacency().double().train(), normal(6, 3)
    assert_same_step(jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x), 1e-10)


def test_values_for_another_number_of_places_are_no_numbers():
    """An error in PyTorch; `jax.jit` has none for values."""
    put = jax.jit(lambda x, mask, values: interop.ops.lookup("aten.index_put.default", torch.__version__).function(
        x, [mask], values))  # fmt: skip
    x, mask = jnp.zeros((2, 2)), jnp.asarray([[True, False], [True, True]])
    np.testing.assert_array_equal(put(x, mask, jnp.asarray([1.0, 2.0, 3.0])), [[1, 0], [2, 3]])
    assert np.isnan(put(x, mask, jnp.asarray([1.0, 2.0]))).all()
    row, rows = jnp.asarray([[1.0, 2.0]]), jnp.asarray([True, True])
    np.testing.assert_array_equal(put(x, rows, row), [[1, 2], [1, 2]])  # one for every place
