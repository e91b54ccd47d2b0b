"""An optimizer of some of the parameters, or of all in an order of its own: each gets what PyTorch gives it."""

import copy
import itertools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.optim
import torch
from flax import nnx
from torch import nn

import interop
import jaxnorm
from jaxnorm import TrainState, train_step

X = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 6)))


def _net(width=4):
    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, width), "norm": nn.BatchNorm1d(width), "b": nn.Linear(width, width), "head": nn.Linear(width, 3)}  # fmt: skip  # noqa: E501
    return nn.Sequential(OrderedDict(parts)).double()


def _in_torch(module, optimizer, n, every=1):
    for _ in range(n):
        optimizer.zero_grad()
        for _ in range(every):
            (module(X).square().mean() / every).backward()
        optimizer.step()


def _loss(model, batch):
    return jnp.mean(model(batch["x"]) ** 2), {}


STEP = jax.jit(train_step(_loss))


def _in_jax(state, n):
    for _ in range(n):
        state, _ = STEP(state, {"x": X.numpy()})
    return state


def _assert_equal(state, module, left_alone=()):
    found = interop.state_dict(state)
    for name, x in module.state_dict().items():
        np.testing.assert_allclose(found[name], x, rtol=1e-9, atol=1e-12, err_msg=name)
    for name, before in dict(left_alone).items():
        np.testing.assert_array_equal(found[name], before, err_msg=name)


RULES = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "lamb, which clips": lambda p: timm.optim.Lamb(p, 0.01, weight_decay=0.1, max_grad_norm=0.01),
    "adan": lambda p: timm.optim.Adan(p, 0.01, weight_decay=0.1),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_what_the_optimizer_does_not_have_stays_alone(rule):
    module = _net()
    optimizer = RULES[rule](itertools.chain(module.norm.parameters(), module.head.parameters()))
    alone = {f"{n}.{k}": x.clone() for n in ("a", "b") for k, x in module.get_submodule(n).state_dict().items()}
    _in_torch(module, optimizer, 2)
    model = interop.from_torch(copy.deepcopy(module), X)
    tx = interop.optax_from_torch(optimizer, names=module, model=model)
    state = interop.load_optimizer_state(TrainState.create(model, tx), optimizer, names=module, step=2)
    state = _in_jax(state, 2)
    _in_torch(module, optimizer, 2)
    _assert_equal(state, module, alone)
    back = interop.optimizer_state_dict(state, optimizer, names=module)
    assert back["state"].keys() == optimizer.state_dict()["state"].keys()


def _group(module):
    kernels = [module.head.weight, module.b.weight]
    return [{"params": kernels, "weight_decay": 0.2}, {"params": [module.norm.bias], "lr": 0.3}]


SOME = {
    "groups that leave some out": (_group, ()),
    "requires_grad=False after the import": (lambda module: module.parameters(), ("a.weight", "b.bias")),
    "requires_grad=False in a group": (_group, ("b.weight",)),
}


@pytest.mark.parametrize("case", SOME)
def test_groups_and_parameters_without_gradients(case):
    choose, frozen = SOME[case]
    module = _net()
    model = interop.from_torch(copy.deepcopy(module), X)
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(choose(module), 0.1, momentum=0.9, weight_decay=0.1)
    state = TrainState.create(model, interop.optax_from_torch(optimizer, names=module, model=model))
    state = _in_jax(state, 3)
    _in_torch(module, optimizer, 3)
    _assert_equal(state, module, {name: before[name] for name in frozen})


def test_under_multi_steps_and_in_the_average_they_stay_alone():
    module = _net()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.head.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model = interop.from_torch(copy.deepcopy(module), X)
    tx = interop.optax_from_torch(optimizer, names=module, model=model)
    tx = optax.MultiSteps(tx, 2, accumulator_dtype=jnp.float64)
    state = TrainState.create(model, tx, ema=jaxnorm.Ema(0.5))
    state = _in_jax(state, 4)
    _in_torch(module, optimizer, 2, every=2)
    _assert_equal(state, module)
    averaged = interop.state_dict(state.ema_model())
    for name in ("a.weight", "b.bias", "norm.weight"):
        np.testing.assert_array_equal(averaged[name], before[name])
    assert abs(averaged["head.weight"] - before["head.weight"].numpy()).max() > 1e-3


def test_without_a_model_a_part_is_refused_when_the_state_is_made():
    module = _net()
    model = interop.from_torch(copy.deepcopy(module), X)
    part = interop.optax_from_torch(torch.optim.SGD(module.head.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"trains 15 numbers .* of 71.*give model=.*names="):
        TrainState.create(model, part)
    whole = interop.optax_from_torch(torch.optim.SGD(module.parameters(), 0.1))
    TrainState.create(model, whole)
    module.a.requires_grad_(False)
    with pytest.raises(ValueError, match="trains 43 numbers"):
        TrainState.create(model, interop.optax_from_torch(torch.optim.SGD(module.parameters(), 0.1)))


def test_a_chain_of_all_is_not_given_the_state_of_some():
    module = _net()
    optimizer = torch.optim.SGD(module.head.parameters(), 0.1, momentum=0.9)
    _in_torch(module, optimizer, 1)
    state = TrainState.create(interop.from_torch(module, X), optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"in no group .*: a.bias, a.weight, b.bias, .*optax_from_torch"):
        interop.load_optimizer_state(state, optimizer, names=module, step=1)


def test_one_array_here_of_two_parameters_treated_differently_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.attention = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0))

    model = Model()
    names = [n for n in interop.state_dict(model) if "bias" in n or "weight" in n]
    parameters = [nn.Parameter(torch.zeros(x.shape)) for x in interop.state_dict(model).values()]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
    interop.optax_from_torch(torch.optim.SGD(groups, 0.1), names=names, model=model)  # one PyTorch parameter, many here


# The order


def _swapped(module):
    return itertools.chain(module.head.parameters(), module.b.parameters(), module.norm.parameters(), module.a.parameters())  # fmt: skip  # noqa: E501


ORDERS = {
    "swapped": _swapped,
    "reversed": lambda module: list(module.parameters())[::-1],
    "the module's": lambda module: module.parameters(),
}
NAMES = {"module": lambda module: module, "none": lambda module: None}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names", NAMES)
def test_a_live_optimizer_in_any_order_reaches_its_own_parameters(order, names):
    module = _net()
    optimizer = torch.optim.Adam(ORDERS[order](module), 0.01)
    _in_torch(module, optimizer, 3)
    model = interop.from_torch(copy.deepcopy(module), X)
    state = TrainState.create(model, interop.optax_from_torch(optimizer))
    state = interop.load_optimizer_state(state, optimizer, names=NAMES[names](module))
    back = interop.optimizer_state_dict(state, optimizer, names=module)["state"]
    for number, entries in optimizer.state_dict()["state"].items():
        assert torch.equal(back[number]["exp_avg"], entries["exp_avg"])
    _in_torch(module, optimizer, 2)
    _assert_equal(_in_jax(state, 2), module)


def test_groups_of_a_live_optimizer_without_names_are_told_by_values():
    module = _net()
    optimizer = torch.optim.SGD(_group(module), 0.1)
    _in_torch(module, optimizer, 1)
    model = interop.from_torch(copy.deepcopy(module), X)
    state = TrainState.create(model, interop.optax_from_torch(optimizer, model=model))
    state = _in_jax(state, 2)
    _in_torch(module, optimizer, 2)
    _assert_equal(state, module)


def _loaded(module, source, names=None):
    model = interop.from_torch(copy.deepcopy(_net() if module is None else module), X)
    state = TrainState.create(model, optax.adam(0.01))
    return interop.load_optimizer_state(state, source, names=names)


def test_a_state_dict_without_names_needs_shapes_that_tell():
    module = _net()
    optimizer = torch.optim.Adam(_swapped(module), 0.01)
    _in_torch(module, optimizer, 3)
    with pytest.raises(ValueError, match=r"no names, and neither values nor shapes tell them apart.*Give names="):
        _loaded(module, optimizer.state_dict())
    names = {id(p): n for n, p in module.named_parameters()}
    order = [names[id(p)] for p in _swapped(module)]
    state = _loaded(module, optimizer.state_dict(), order)
    np.testing.assert_array_equal(state.opt_state[0].mu["a"]["weight"], optimizer.state[module.a.weight]["exp_avg"])

    torch.manual_seed(0)
    telling = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.Adam(list(telling.parameters())[::-1], 0.01)
    _in_torch(telling, optimizer, 3)
    state = _loaded(telling, optimizer.state_dict())
    np.testing.assert_array_equal(state.opt_state[0].mu["2"]["bias"], optimizer.state[telling[2].bias]["exp_avg"])


def test_names_in_the_file_come_before_the_modules_order():
    module = _net()
    optimizer = torch.optim.Adam(list(module.named_parameters())[::-1], 0.01)
    _in_torch(module, optimizer, 3)
    for names in (None, module):
        state = _loaded(module, optimizer.state_dict(), names)
        np.testing.assert_array_equal(state.opt_state[0].mu["b"]["bias"], optimizer.state[module.b.bias]["exp_avg"])
    wrapped = optimizer.state_dict()
    wrapped["param_groups"][0]["param_names"] = [f"module.{n}" for n in wrapped["param_groups"][0]["param_names"]]
    with pytest.raises(ValueError, match=r"names of its parameters, and the module has none.*module.a.bias"):
        _loaded(module, wrapped, module)


def test_parameters_that_it_makes_no_difference_to_exchange_need_no_names():
    torch.manual_seed(0)
    module = _net()
    nn.init.zeros_(module.b.bias)  # as norm.bias is
    optimizer = torch.optim.Adam(_swapped(module), 0.01)
    assert int(_loaded(module, optimizer).step) == int(_loaded(module, optimizer.state_dict()).step) == 0
    for x in (module.b.bias, module.norm.bias):
        optimizer.state[x] = {"step": torch.tensor(0.0), "exp_avg": torch.full((4,), float(len(optimizer.state))), "exp_avg_sq": torch.zeros(4)}  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match="Give names="):
        _loaded(module, optimizer)


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))

    torch.manual_seed(0)
    module = Tied().double()
    optimizer = torch.optim.SGD([module.two.bias, module.one.weight], 0.1, momentum=0.9, weight_decay=0.1)
    _in_torch(module, optimizer, 1)
    for names in (module, None):
        model = interop.from_torch(copy.deepcopy(module), X)
        tx = interop.optax_from_torch(optimizer, names=names, model=model)
        state = interop.load_optimizer_state(TrainState.create(model, tx), optimizer, names=names, step=1)
        after = copy.deepcopy((module, optimizer))
        _in_torch(*after, 2)
        _assert_equal(_in_jax(state, 2), after[0])
