"""The programs of docs/batch_norm_variants.md run; ghost, split and domain-specific BatchNorm are PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from page_reader import programs
from parity_tools import Step, assert_same_step, jax_step, normal, randomised, relative, to_jax, torch_step
from timm.layers import convert_splitbn_model
from torch import nn

import interop
import jaxnorm
from interop.weights.names import named_variables


def test_the_pages_programs_run():
    names = {}
    torch.set_default_dtype(torch.float64)  # the suite has JAX's 64 bits
    try:
        for block in programs("docs/batch_norm_variants.md"):
            block.run(names)
    finally:
        torch.set_default_dtype(torch.float32)
    assert names["layer"].mean[...].any() and not names["frozen"].layers[1].mean[...].any()


class Ghost(nn.Module):
    """GBN of pytorch-tabnet (pytorch_tabnet/tab_network.py), after Hoffer et al., 2017, section 4."""

    def __init__(self, features, parts, momentum):
        super().__init__()
        self.bn, self.parts = nn.BatchNorm1d(features, momentum=momentum), parts

    def forward(self, x):
        return torch.cat([self.bn(part) for part in x.chunk(self.parts, 0)])


def test_parts_of_a_batch_are_normalised_as_a_ghost_batch_norm_does():
    parts, a = 4, 0.9
    module = randomised(Ghost(5, parts, 1 - a))
    x, weights = normal(12, 5) * 2 + 1, normal(12, 5, seed=1)
    groups = [[part] for part in range(parts)]
    layer = jaxnorm.nnx.BatchNorm(
        5, momentum=a, axis_index_groups=groups, count_batches=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    start = {name.removeprefix("bn."): value.numpy().copy() for name, value in module.state_dict().items()}
    interop.load_state_dict(layer, start)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graph, params, rest, copy=True)
        y = layer(x)
        return (y * to_jax(weights)).sum(), (y, interop_state(layer))

    (_, (y, found)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, to_jax(x))
    x.requires_grad_(True)
    expected = module(x)
    (expected * weights).sum().backward()
    assert relative(y, expected.detach()) < 1e-12 and relative(grads[1], x.grad) < 1e-12
    assert relative(grads[0]["scale"][...], module.bn.weight.grad) < 1e-12
    assert relative(grads[0]["bias"][...], module.bn.bias.grad) < 1e-12

    # Running statistics, by the page's formulas: here of all parts together, there of part after part.
    data = x.detach().numpy()
    assert relative(found["mean"], a * start["running_mean"] + (1 - a) * data.mean(0)) < 1e-12
    assert relative(found["var"], a * start["running_var"] + (1 - a) * data.var(0, ddof=1)) < 1e-12
    chunks = np.split(data, parts)
    theirs = [
        a**parts * start[name] + (1 - a) * sum(a ** (parts - 1 - i) * of(chunk) for i, chunk in enumerate(chunks))
        for name, of in (("running_mean", lambda c: c.mean(0)), ("running_var", lambda c: c.var(0, ddof=1)))
    ]
    assert relative(module.bn.running_mean, theirs[0]) < 1e-12 and relative(module.bn.running_var, theirs[1]) < 1e-12
    assert (int(found["num_batches_tracked"]), int(module.bn.num_batches_tracked)) == (1, parts)


def interop_state(layer):
    return {name: getattr(layer, name)[...] for name in ("mean", "var", "num_batches_tracked")}


@pytest.mark.once
def test_timms_split_batch_norm_comes_in_trains_evaluates_and_goes_home():
    def make():
        plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        return convert_splitbn_model(plain, num_splits=2)

    module, x = randomised(make()).train(), normal(4, 3, 7, 7)
    model = interop.from_torch(module, x)
    for training in (True, False):
        module.train(training)
        model.train() if training else model.eval()
        assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-12)
    state = {name: torch.tensor(value) for name, value in interop.state_dict(model).items()}
    assert "1.aux_bn.0.running_mean" in state
    make().double().load_state_dict(state, strict=True)


class DomainSpecificBatchNorm1d(nn.Module):
    """After wgchang/DSBN, model/dsbn.py (Chang et al., 2019): a BatchNorm layer for each domain."""

    def __init__(self, features, domains):
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm1d(features) for _ in range(domains)])

    def forward(self, x, domain):
        return self.bns[domain](x)


class TwoDomains(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), DomainSpecificBatchNorm1d(8, 2), nn.Linear(8, 2)

    def forward(self, x, domain: int):
        return self.head(torch.relu(self.norm(self.stem(x), domain)))


def step(model, x, domain):
    """As `jax_step`, for a domain that is no array."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest, copy=True)
        y = model(x, domain)
        return (y * normal(*y.shape).numpy()).sum(), nnx.state(model)

    (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
    named = dict(named_variables(nnx.merge(graph, grads, rest, copy=True)))
    grads = {name: variable[...] for name, variable in named.items() if isinstance(variable, nnx.Param)}
    return Step(float(value), grads, interop.state_dict(nnx.merge(graph, after, copy=True)))


def test_statistics_for_each_domain_are_pytorchs():
    module = randomised(TwoDomains()).train()
    batches = [normal(5, 6), normal(5, 6, seed=1) + 2]
    graphs, states = zip(*(nnx.split(interop.from_torch(module, batches[0], domain)) for domain in (0, 1)), strict=True)
    for training in (True, False):
        for domain in (0, 1):
            module.train(training)
            model = nnx.merge(graphs[domain], states[0], copy=True)
            model.train() if training else model.eval()
            found = step(model, to_jax(batches[domain]), domain)
            expected = torch_step(module, batches[domain], domain)
            other = f"norm.bns.{1 - domain}"
            unused = {f"{other}.weight", f"{other}.bias"}
            assert set(found.grads) - set(expected.grads) == unused and not any(found.grads[n].any() for n in unused)
            assert_same_step(found, expected, 1e-12)
    TwoDomains().double().load_state_dict(
        {name: torch.tensor(value) for name, value in interop.state_dict(model).items()}, strict=True
    )
    assert "norm.bns.1.running_var" in interop.state_dict(model)
