"""Optimizers cross both ways: the optax chain takes torch's steps, and its state is torch's state."""

from collections import OrderedDict

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.optim
import torch
from flax import nnx
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import interop
import jaxnorm
from jaxnorm import TrainState, train_step

SHAPE = (6, 5)


def _module():
    torch.manual_seed(0)
    layers = {"a": torch.nn.Linear(5, 4), "tanh": torch.nn.Tanh(), "b": torch.nn.Linear(4, 3)}
    return torch.nn.Sequential(OrderedDict(layers)).double()


class _Linear(nnx.Module):
    """As in an imported model: PyTorch's names and layouts."""

    def __init__(self, inputs, outputs):
        self.weight = nnx.Param(jnp.zeros((outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x):
        return x @ self.weight[...].T + self.bias[...]


class _Model(nnx.Module):
    def __init__(self):
        self.a, self.b = _Linear(5, 4), _Linear(4, 3)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def _groups(module, **other):
    """Two groups, as usual: decay for the kernels, none for the biases."""
    kernels = [p for p in module.parameters() if p.ndim > 1]
    return [{"params": kernels}, {"params": [p for p in module.parameters() if p.ndim <= 1], **other}]


CASES = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "sgd maximize": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=True),
    "adam eps": lambda p: torch.optim.Adam(p, 0.01, eps=0.1, betas=(0.8, 0.9), fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
    "nadam decoupled": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1, eps=1e-3, betas=(0.9, 0.9)),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.2, eps=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, eps=0.01, weight_decay=0.1),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, eps=0.01),
    "rmsprop tf": lambda p: timm.optim.RMSpropTF(p, 0.01, momentum=0.9, weight_decay=0.1, eps=0.01),
    "rmsprop tf centered": lambda p: timm.optim.RMSpropTF(p, 0.01, momentum=0.9, centered=True, lr_in_momentum=False),
    "rmsprop tf decoupled": lambda p: timm.optim.RMSpropTF(p, 0.1, momentum=0.9, weight_decay=1, decoupled_decay=True),
    "lion": lambda p: timm.optim.Lion(p, 0.001, weight_decay=0.1),
    "adan": lambda p: timm.optim.Adan(p, 0.01, weight_decay=0.1),
    "adan no prox": lambda p: timm.optim.Adan(p, 0.01, weight_decay=0.1, no_prox=True),
    "lamb": lambda p: timm.optim.Lamb(p, 0.01, weight_decay=0.1),
    "lamb no decay": lambda p: timm.optim.Lamb(p, 0.01, always_adapt=True, max_grad_norm=None),
    "two groups": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}  # fmt: skip

BATCH = np.random.default_rng(0).normal(size=SHAPE)
TARGET = np.random.default_rng(1).normal(size=(6, 3))


def _torch_steps(module, optimizer, n, scheduler=None):
    for _ in range(n):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(torch.from_numpy(BATCH)), torch.from_numpy(TARGET)).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def _loss(model, batch):
    return jnp.mean(jnp.square(model(batch["x"]) - batch["y"])), {}


STEP = jax.jit(train_step(_loss))


def _jax_steps(state, n):
    for _ in range(n):
        state, _ = STEP(state, {"x": jnp.asarray(BATCH), "y": jnp.asarray(TARGET)})
    return state


def _to_torch(state):
    return {name: torch.tensor(x) for name, x in interop.state_dict(state.model()).items()}


@pytest.fixture
def model():
    return _Model()


@pytest.mark.parametrize("case", CASES)
def test_handed_over_and_back_equals_pytorch_throughout(case, model):
    """6 steps in PyTorch, 6 in JAX, 6 in PyTorch: 18 in PyTorch, and the first 6 in JAX are PyTorch's too."""
    grouped = "two groups" in case

    def make():
        module = _module()
        parameters = _groups(module, weight_decay=0.0, lr=0.02) if grouped else module.parameters()
        return module, CASES[case](parameters)

    expected, optimizer = make()
    _torch_steps(expected, optimizer, 18)

    module, optimizer = make()
    tx = interop.optax_from_torch(optimizer, names=module, model=model)
    fresh = interop.load_state_dict(model, module.state_dict())
    from_the_start = _jax_steps(TrainState.create(fresh, tx), 6)
    _torch_steps(module, optimizer, 6)
    for name, x in interop.state_dict(from_the_start.model()).items():
        np.testing.assert_allclose(x, module.state_dict()[name], rtol=1e-9, atol=1e-12, err_msg=name)

    state = TrainState.create(interop.load_state_dict(model, module.state_dict()), tx)
    state = interop.load_optimizer_state(state, optimizer, names=module, step=6)
    assert int(state.step) == 6
    state = _jax_steps(state, 6)

    module, optimizer = make()
    module.load_state_dict(_to_torch(state))
    optimizer.load_state_dict(interop.optimizer_state_dict(state, optimizer, names=module))
    _torch_steps(module, optimizer, 6)
    for name, x in expected.state_dict().items():
        np.testing.assert_allclose(module.state_dict()[name], x, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", ["sgd momentum", "adam amsgrad", "nadam", "rmsprop tf", "adan", "lamb", "two groups"])
def test_torch_state_comes_back_bit_for_bit(case, model):
    module = _module()
    optimizer = CASES[case](_groups(module, lr=0.02) if case == "two groups" else module.parameters())
    _torch_steps(module, optimizer, 3)
    before = optimizer.state_dict()
    tx = interop.optax_from_torch(optimizer, names=module, model=model)
    state = interop.load_optimizer_state(TrainState.create(model, tx), optimizer, names=module, step=3)
    after = interop.optimizer_state_dict(state, optimizer, names=module)
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, entries in before["state"].items():
        assert after["state"][index].keys() == entries.keys()
        for entry, x in entries.items():
            assert torch.equal(torch.as_tensor(x), after["state"][index][entry]), (index, entry)
            if isinstance(x, torch.Tensor):
                assert x.dtype == after["state"][index][entry].dtype or entry in ("step", "mu_product")


def test_state_dicts_of_numpy_arrays_and_names_do_without_torch_objects(model):
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    _torch_steps(module, optimizer, 3)
    plain = optimizer.state_dict()
    plain["state"] = {i: {k: np.asarray(x) for k, x in e.items()} for i, e in plain["state"].items()}
    state = TrainState.create(model, optax.adam(0.01))  # optax's own chain has the same fields
    loaded = interop.load_optimizer_state(state, plain, names=[name for name, _ in module.named_parameters()])
    adam = loaded.opt_state[0]
    assert int(adam.count) == 3
    np.testing.assert_array_equal(adam.mu["a"]["weight"], plain["state"][0]["exp_avg"])
    with pytest.raises(ValueError, match="Give names="):  # a Flax model's order is not PyTorch's
        interop.load_optimizer_state(state, plain)


def test_names_of_the_optimizer_are_used(model):
    module = _module()
    named = list(module.named_parameters())
    optimizer = torch.optim.SGD(named[::-1], 0.01, momentum=0.9)
    _torch_steps(module, optimizer, 2)
    tx = interop.optax_from_torch(optimizer)
    state = interop.load_optimizer_state(TrainState.create(model, tx), optimizer.state_dict(), step=2)
    expected = optimizer.state[module.a.weight]["momentum_buffer"]
    np.testing.assert_array_equal(state.opt_state[0].trace["a"]["weight"], expected)


@pytest.mark.parametrize("every", [1, 3])
def test_schedules_are_torchs(every):
    module = _module()
    optimizer = torch.optim.SGD(_groups(module, lr=0.5), 0.1)
    scheduler = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 8)],
        [4],
    )
    expected = []
    schedules = None
    for step in range(24):
        if step == 6:
            schedules = interop.schedule_from_torch(scheduler, 18, every=every)
        expected.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    for step in range(6, 24):
        assert [float(s(jnp.asarray(step))) for s in schedules] == pytest.approx(expected[step], rel=1e-15)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        interop.schedule_from_torch(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 3)


def test_what_has_no_counterpart_is_named():
    parameters = list(_module().parameters())
    with pytest.raises(ValueError, match=r"no optax counterpart of LBFGS.*SGD, Adam"):
        interop.optax_from_torch(torch.optim.LBFGS(parameters))
    unknown = torch.optim.Adam(parameters)
    unknown.param_groups[0] |= {"lookahead_k": 6, "clip": True}
    with pytest.raises(ValueError, match=r"group 0: lookahead_k=6\n  group 0: clip=True"):
        interop.optax_from_torch(unknown)
    with pytest.raises(ValueError, match=r"give model="):
        interop.optax_from_torch(
            torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1.0}], 0.1)
        )


def test_states_that_do_not_match_are_refused(model):
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    _torch_steps(module, optimizer, 1)
    with pytest.raises(ValueError, match=r"\['trace'\] have no counterpart.*exp_avg"):
        interop.load_optimizer_state(TrainState.create(model, optax.sgd(0.1, momentum=0.9)), optimizer, names=module)
    with pytest.raises(ValueError, match="step=7, but the optimizer has taken 1"):
        interop.load_optimizer_state(TrainState.create(model, optax.adam(0.1)), optimizer, names=module, step=7)
    sgd = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    _torch_steps(module, sgd, 1)
    with pytest.raises(ValueError, match="keeps no count of its steps: give step="):
        interop.load_optimizer_state(TrainState.create(model, optax.sgd(0.1, momentum=0.9)), sgd, names=module)
    with pytest.raises(ValueError, match="3 names for the optimizer's 4 parameters"):
        interop.load_optimizer_state(TrainState.create(model, optax.adam(0.1)), optimizer, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="not in the model's state dict: d"):
        names = ["a.weight", "a.bias", "b.weight", "d"]
        interop.load_optimizer_state(TrainState.create(model, optax.adam(0.1)), optimizer, names=names)
    other = torch.optim.Adam(_module().parameters(), 0.01)
    with pytest.raises(ValueError, match="4 of the optimizer's parameters are not the given module's"):
        interop.load_optimizer_state(TrainState.create(model, optax.adam(0.1)), other, names=module)


class _Written(flax.linen.Module):
    """By hand, channels last, a Dense layer after the flatten, names of its own."""

    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.Conv(4, (3, 3), padding=1, param_dtype=jnp.float64, name="stem")(x)
        x = jaxnorm.linen.BatchNorm(False, momentum=0.9, param_dtype=jnp.float64, count_batches=True, name="norm")(x)
        return flax.linen.Dense(3, param_dtype=jnp.float64, name="head")(jnp.tanh(x).reshape(len(x), -1))


RENAME = [(r"^0\.", "stem."), (r"^1\.", "norm."), (r"^4\.", "head.")]
WRITTEN = {
    "rename": RENAME,
    "layouts": {"head": interop.layouts.Linear(flattened=(4, 5, 6))},
    "inputs": jax.ShapeDtypeStruct((1, 5, 6, 2), jnp.float64),
}


def _written():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(conv, norm, torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(120, 3)).double()


def test_hand_written_models_take_optimizers_over_and_back():
    images = np.random.default_rng(2).normal(size=(6, 2, 5, 6))

    def in_torch(module, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(module(torch.from_numpy(images)), torch.from_numpy(TARGET)).backward()
            optimizer.step()

    def adam(module):  # the kernels decay, the others do not
        return torch.optim.AdamW(_groups(module, weight_decay=0.0), 0.01, weight_decay=0.1)

    expected = _written()
    in_torch(expected, adam(expected), 12)

    module = _written()
    optimizer = adam(module)
    in_torch(module, optimizer, 4)
    linen = _Written()
    variables = jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 5, 6, 2)))
    model = interop.load_state_dict((linen, variables), module.state_dict(), **WRITTEN)
    tx = interop.optax_from_torch(optimizer, names=module, model=model, **WRITTEN)
    state = interop.load_optimizer_state(TrainState.create(model, tx), optimizer, names=module, **WRITTEN)
    step = jax.jit(train_step(_loss))
    for _ in range(4):
        state, _ = step(state, {"x": jnp.asarray(images.transpose(0, 2, 3, 1)), "y": jnp.asarray(TARGET)})
    after = interop.state_dict(state, **WRITTEN)
    module.load_state_dict({name: torch.tensor(x) for name, x in after.items()})
    optimizer.load_state_dict(interop.optimizer_state_dict(state, optimizer, names=module, **WRITTEN))
    in_torch(module, optimizer, 4)
    for name, x in expected.state_dict().items():
        np.testing.assert_allclose(module.state_dict()[name], x, rtol=1e-9, atol=1e-12, err_msg=name)


def test_momenta_wider_than_their_parameters_are_not_rounded(model):
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    _torch_steps(module, optimizer, 1)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model))
    nnx.update(model, narrow)
    state = TrainState.create(model, optax.adam(0.01, mu_dtype=jnp.float32))
    loaded = interop.load_optimizer_state(state, optimizer, names=module)
    expected = optimizer.state[module.a.weight]["exp_avg"]
    np.testing.assert_array_equal(loaded.opt_state[0].mu["a"]["weight"], expected.float())


def test_parameters_that_are_sums_of_pytorchs_are_refused():
    cell = nnx.OptimizedLSTMCell(2, 3, rngs=nnx.Rngs(0))
    optimizer = torch.optim.Adam(torch.nn.LSTMCell(2, 3).named_parameters(), 0.01)
    with pytest.raises(ValueError, match=r"fewer parameters than in PyTorch.*\n.*bias_ih, bias_hh"):
        interop.load_optimizer_state(TrainState.create(cell, optax.adam(0.01)), optimizer)


def _one_layer_steps(module, optimizer, n):
    """Steps of a loss that the second layer has no part in."""
    for _ in range(n):
        optimizer.zero_grad()
        module.a(torch.from_numpy(BATCH)).square().mean().backward()
        optimizer.step()


BY_PARAMETER = ["sgd dampening", "adam", "adam amsgrad", "adamw", "nadam", "radam", "adan"]


@pytest.mark.parametrize("case", BY_PARAMETER)
def test_parameters_that_pytorch_would_start_anew_are_refused_by_name(case, model):
    module = _module()
    optimizer = CASES[case](module.parameters())
    _one_layer_steps(module, optimizer, 3)
    state = TrainState.create(model, interop.optax_from_torch(optimizer))
    with pytest.raises(ValueError, match=r"different numbers of times.*3.*not at all: b.weight, b.bias"):
        interop.load_optimizer_state(state, optimizer, names=module, step=3)


@pytest.mark.parametrize("case", ["sgd momentum", "sgd nesterov", "rmsprop", "rmsprop tf", "lion", "lamb"])
def test_where_no_count_of_their_own_matters_they_start_as_in_pytorch(case, model):
    module = _module()
    optimizer = CASES[case](module.parameters())
    _one_layer_steps(module, optimizer, 3)
    state = TrainState.create(interop.load_state_dict(model, module.state_dict()), interop.optax_from_torch(optimizer))
    used = _jax_steps(state, 2)  # momenta of which nothing may remain
    state = used.replace(params=state.params)
    state = _jax_steps(interop.load_optimizer_state(state, optimizer, names=module, step=3), 2)
    _torch_steps(module, optimizer, 2)
    for name, x in interop.state_dict(state.model()).items():
        np.testing.assert_allclose(x, module.state_dict()[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("how", ["optimizer", "state dict", "no place in the optax state"])
def test_frozen_parameters_have_no_state_on_either_side(how, model):
    module = _module()
    module.b.requires_grad_(how == "no place in the optax state")
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    _one_layer_steps(module, optimizer, 3)
    if how != "no place in the optax state":
        tx = interop.optax_from_torch(optimizer, names=module, model=model)
    else:
        tx = interop.optax_from_torch(optimizer)
        labels = {k: jax.tree.map(lambda _, k=k: k, v) for k, v in TrainState.create(model, tx).params.items()}
        tx = optax.partition({"a": tx, "b": optax.set_to_zero()}, labels)
    source = optimizer.state_dict() if how == "state dict" else optimizer
    state = interop.load_optimizer_state(TrainState.create(model, tx), source, names=module)
    after = interop.optimizer_state_dict(state, source, names=module)["state"]
    assert after.keys() == {0, 1}
    assert torch.equal(after[0]["exp_avg"], optimizer.state[module.a.weight]["exp_avg"])


def test_an_optimizer_that_has_taken_no_step_starts_at_0(model):
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    state = TrainState.create(model, interop.optax_from_torch(optimizer))
    assert int(interop.load_optimizer_state(state, optimizer, names=module).opt_state[0].count) == 0
    with pytest.raises(ValueError, match="step=3, but the optimizer has taken 0 steps"):
        interop.load_optimizer_state(state, optimizer, names=module, step=3)


def _changed(change):
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    _torch_steps(module, optimizer, 3)
    source = optimizer.state_dict()
    change(source)
    return source


BROKEN = {
    "number": (lambda s: s["state"].update({99: s["state"][0]}), r"state of parameters in no group: 99"),
    "twice": (lambda s: s["param_groups"][0].update(params=[0, 1, 1, 3]), r"parameters more than once: 1"),
    "no state": (lambda s: s.pop("state"), r"no 'state'.*it has param_groups"),
    "bare group": (lambda s: s["param_groups"][0].pop("params"), r"groups without .*'params'.*: 0\. Give what"),
    "no groups": (lambda s: s.pop("param_groups"), r"no 'param_groups'.*it has state"),
    "nan": (lambda s: s["state"][1].update(step=float("nan")), r"step of a.bias .*nan"),
    "large": (lambda s: s["state"][1].update(step=2**40), r"step of a.bias .*1099511627776"),
    "part": (lambda s: s["state"][1].update(step=2.5), r"step of a.bias .*2.5"),
    "negative": (lambda s: s["state"][1].update(step=torch.tensor(-2.0)), r"step of a.bias .*-2"),
    "group": (lambda s: s["param_groups"][0].update(step=2.5), r"step of group 0 .*2.5"),
    "complex": (lambda s: s["state"][1].update(exp_avg=torch.ones(4) * 1j), r"complex.* real.*: a.bias"),
    "one without": (lambda s: s["state"][1].pop("step"), r"3.*not at all: a.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_state_dicts_are_refused_by_what_is_wrong(case, model):
    change, message = BROKEN[case]
    names = [name for name, _ in _module().named_parameters()]
    state = TrainState.create(model, optax.adam(0.01))
    with pytest.raises(ValueError, match=message):
        interop.load_optimizer_state(state, _changed(change), names=names)
