"""Optimizers of timm, by the names its factory knows, and torch's rarer ones: the same steps, and state both ways."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.optim
import timm.scheduler
import torch
from flax import nnx
from page_reader import ROOT, programs

import interop
from interop.optimizers import chains, muon
from jaxnorm import TrainState

SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (5, 4, 2, 3), "b.bias": (5,), "scale": ()}


def _values(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def _gradient(step):
    return {name: x * 0.3 for name, x in _values(100 + step).items()}


class _Layer(nnx.Module):
    def __init__(self, name):
        self.weight = nnx.Param(jnp.zeros(SHAPES[f"{name}.weight"]))
        self.bias = nnx.Param(jnp.zeros(SHAPES[f"{name}.bias"]))


class _Model(nnx.Module):
    def __init__(self):
        self.a, self.b, self.scale = _Layer("a"), _Layer("b"), nnx.Param(jnp.zeros(()))


def _module():
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Linear(5, 6), torch.nn.Conv2d(4, 5, (2, 3))
    module.scale = torch.nn.Parameter(torch.zeros(()))
    module.double().load_state_dict({name: torch.tensor(x) for name, x in _values(0).items()})
    return module


def _in_torch(module, optimizer, steps):
    for step in steps:
        for name, p in module.named_parameters():
            p.grad = torch.tensor(_gradient(step)[name])
        optimizer.step()


@functools.cache
def _gradient_here(step):
    return TrainState.create(interop.load_state_dict(_Model(), _gradient(step)), optax.identity()).params


def _in_jax(state, steps):
    update = jax.jit(state.tx.update)
    for step in steps:
        updates, opt_state = update(_gradient_here(step), state.opt_state, state.params)
        state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return state


def _assert_equal(found, module, **tolerance):
    for name, x in module.state_dict().items():
        np.testing.assert_allclose(found[name], x, err_msg=name, **tolerance)


def _there_and_back(make, **tolerance):
    """Four steps from the start on each side; four more here with PyTorch's state; four at home with ours."""
    module = _module()
    optimizer = make(module)
    tx = interop.optax_from_torch(optimizer, names=module, model=_Model())
    start = TrainState.create(interop.load_state_dict(_Model(), module.state_dict()), tx)
    _in_torch(module, optimizer, range(4))
    _assert_equal(interop.state_dict(_in_jax(start, range(4))), module, **tolerance)

    state = TrainState.create(interop.load_state_dict(_Model(), module.state_dict()), tx)
    source = optimizer.state_dict()
    state = interop.load_optimizer_state(state, optimizer, names=module, step=4)
    same = interop.optimizer_state_dict(state, optimizer, names=module)
    assert same["param_groups"] == source["param_groups"]
    for index, entries in source["state"].items():
        held = {key: x for key, x in entries.items() if x is not None}
        mine = same["state"].get(index, {})
        assert mine.keys() == held.keys()
        for key, x in held.items():
            assert type(mine[key]) is type(x), key
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(x)), key

    state = _in_jax(state, range(4, 8))
    _in_torch(module, optimizer, range(4, 8))
    _assert_equal(interop.state_dict(state), module, **tolerance)

    home = _module()
    home.load_state_dict({name: torch.tensor(x) for name, x in interop.state_dict(state).items()})
    fresh = make(home)
    fresh.load_state_dict(interop.optimizer_state_dict(state, fresh, names=home))
    _in_torch(home, fresh, range(8, 12))
    _in_torch(module, optimizer, range(8, 12))
    _assert_equal(home.state_dict(), module, **tolerance)


# fmt: off
BY_NAME = [
    "adabelief", "radabelief", "adamwlegacy", "adamc", "cadamw", "nadamw", "cnadamw", "nadamc", "adopt", "adoptw",
    "adoptc", "cadoptw", "laprop", "lapropc", "claprop", "madgrad", "madgradw", "mars", "cmars", "sgdw", "csgdw",
    "sgdc", "lars", "larc", "nlars", "nlarc", "lamb", "lambc", "lambw", "lambcd", "clamb", "clambw", "lion",
    "clion", "lionc", "adan", "cadan", "cadanw", "rmsproptf", "crmsproptf", "rmsproptfw", "rmsproptfc", "adamax",
    "adadelta", "radamw",
]
# fmt: on


@pytest.mark.parametrize("name", BY_NAME)
def test_timms_optimizers_by_name(name):
    """With weight decay for the kernels alone, as timm's factory groups them."""
    _there_and_back(
        lambda module: timm.optim.create_optimizer_v2(module, name, lr=0.01, weight_decay=0.1), rtol=1e-12, atol=1e-14
    )


CASES = {
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.1, maximize=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5, rho=0.8, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, lambd=0.1, alpha=0.6, t0=3, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01, step_sizes=(0.006, 0.02)),
    "belief, all of it": lambda p: timm.optim.AdaBelief(p, 0.01, weight_decay=0.1, amsgrad=True, decoupled_decay=False),
    "belief, fixed": lambda p: timm.optim.AdaBelief(
        p, 0.01, weight_decay=0.1, amsgrad=True, fixed_decay=True, rectify=False),
    "belief that waits": lambda p: timm.optim.AdaBelief(p, 0.01, degenerated_to_sgd=False, betas=(0.9, 0.99)),
    "adamw amsgrad": lambda p: timm.optim.adamw.AdamWLegacy(p, 0.01, amsgrad=True, clipping_threshold=0.5),
    "nadamw stable": lambda p: timm.optim.NAdamW(p, 0.01, clipping_threshold=0.5, maximize=True),
    "adopt unclipped": lambda p: timm.optim.Adopt(p, 0.01, clip_exp=None, weight_decay=0.1, maximize=True),
    "madgrad without momentum": lambda p: timm.optim.MADGRAD(p, 0.01, momentum=0, weight_decay=0.1),
    "mars lion": lambda p: timm.optim.Mars(p, 0.01, mars_type="lion", weight_decay=0.1, lr_1d_factor=0.5),
    "mars everywhere": lambda p: timm.optim.Mars(p, 0.01, optimize_1d=True, betas=(0.9, 0.95)),
    "sgdw dampened": lambda p: timm.optim.SGDW(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgdw plain": lambda p: timm.optim.SGDW(p, 0.1, caution=True, weight_decay=0.1),
    "lars dampened": lambda p: timm.optim.Lars(p, 0.1, momentum=0.9, dampening=0.3, always_adapt=True),
    "lamb, bare": lambda p: timm.optim.Lamb(
        p, 0.01, bias_correction=False, grad_averaging=False, always_adapt=True, weight_decay=0, max_grad_norm=None),
    "rmsprop tf, careful": lambda p: timm.optim.RMSpropTF(
        p, 0.01, momentum=0.9, lr_in_momentum=False, caution=True, weight_decay=0.1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_options_and_torchs_rarer_optimizers(case):
    _there_and_back(lambda module: CASES[case](module.parameters()), rtol=1e-12, atol=1e-14)


def _of_matrices(module):
    """torch.optim.Muon for the one matrix; the others are in no group, and stay."""
    return torch.optim.Muon([module.a.weight], 0.02, adjust_lr_fn="match_rms_adamw")


MUONS = {
    "torch": _of_matrices,
    **{
        name: lambda module, name=name: timm.optim.create_optimizer_v2(module, name, lr=0.02, weight_decay=0.1)
        for name in ("muon", "nmuon", "adamuon", "nadamuon")
    },
    "each place of a kernel": lambda module: timm.optim.Muon(
        module.parameters(), conv_mode="batched", adjust_lr_fn="rms_to_rms", scale_eps=True, fallback_lr_scale=0.5
    ),
    "adamuon by the input": lambda module: timm.optim.Muon(
        module.parameters(), algo="adamuon", adjust_lr_fn="rsqrt_in", conv_mode="batched", ns_coefficients="original"
    ),
    "left to AdamW": lambda module: timm.optim.Muon(
        [{"params": [module.a.weight], "use_fallback": True}, {"params": [module.b.weight, module.b.bias]}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MUONS)
def test_muon_in_float64_is_the_same_arithmetic(case, monkeypatch):
    """The iteration of both sides in float64, in which rounding hides nothing."""
    monkeypatch.setattr(muon, "DTYPE", jnp.float64)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    to = torch.Tensor.to  # by which torch 2.15 narrows

    def kept(self, *args, **options):
        return to(self, *args, **options | ({"dtype": self.dtype} if options.get("dtype") == torch.bfloat16 else {}))

    monkeypatch.setattr(torch.Tensor, "to", kept)
    iteration = timm.optim.muon.zeropower_via_newtonschulz
    wide = lambda *args, **options: iteration(*args, **options, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", wide)
    _there_and_back(MUONS[case], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", ["torch", "nmuon"])
def test_muon_in_bfloat16_is_no_further_from_float64_than_pytorchs(case, monkeypatch):
    def moved(of_torch):
        module = _module()
        optimizer = MUONS[case](module)
        if of_torch:
            _in_torch(module, optimizer, range(1))
            return module.a.weight.detach().numpy() - _values(0)["a.weight"]
        tx = interop.optax_from_torch(optimizer, names=module, model=_Model())
        state = _in_jax(TrainState.create(interop.load_state_dict(_Model(), module.state_dict()), tx), range(1))
        return interop.state_dict(state)["a.weight"] - _values(0)["a.weight"]

    theirs, ours = moved(True), moved(False)
    monkeypatch.setattr(muon, "DTYPE", jnp.float64)  # which is theirs in float64: the test before
    exact = moved(False)
    error = np.linalg.norm(theirs - exact)
    assert 0 < np.linalg.norm(ours - exact) < 2 * error < 0.1 * np.linalg.norm(exact)


class _Turned(nnx.Module):
    """A hand-written model: kernels as Flax has them."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(5, 6, rngs=rngs, param_dtype=jnp.float64)
        self.b = nnx.Conv(4, 5, (2, 3), rngs=rngs, param_dtype=jnp.float64)


@pytest.mark.parametrize("name", ["muon", "mars", "lamb"])
def test_rules_that_go_by_shapes_see_pytorchs_in_models_of_turned_kernels(name, monkeypatch):
    monkeypatch.setattr(muon, "DTYPE", jnp.float64)
    iteration = timm.optim.muon.zeropower_via_newtonschulz
    wide = lambda *args, **options: iteration(*args, **options, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", wide)
    module = _module()
    del module.scale
    optimizer = timm.optim.create_optimizer_v2(module, name, lr=0.02, weight_decay=0.1)
    model = interop.load_state_dict(_Turned(), module.state_dict())
    tx = interop.optax_from_torch(optimizer, names=module, model=model)
    state = TrainState.create(model, tx)
    for step in range(3):
        _in_torch(module, optimizer, [step])
        gradient = {name: x for name, x in _gradient(step).items() if name != "scale"}
        gradient = TrainState.create(interop.load_state_dict(_Turned(), gradient), optax.identity()).params
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    _assert_equal(interop.state_dict(state), module, rtol=1e-11, atol=1e-13)


class _Deep(torch.nn.Sequential):
    """With what timm's factory asks a model."""

    def group_matcher(self, coarse=False):
        return {"blocks": r"^(\d+)"}

    def no_weight_decay(self):
        return {"0.bias"}


def test_layer_decay_of_timms_factory_with_its_scheduler():
    """`lr_scale` is in the groups; timm's scheduler, not the optimizer, multiplies by it."""

    module = _Deep(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)).double()
    optimizer = timm.optim.create_optimizer_v2(module, "nadamw", lr=0.1, weight_decay=0.05, layer_decay=0.5)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, 10, warmup_t=2, t_in_epochs=False)
    model = interop.from_torch(module, torch.zeros(2, 3).double())
    rates = interop.schedule_from_torch(scheduler, 6)
    assert len({float(rate(jnp.asarray(3))) for rate in rates}) > 1
    state = TrainState.create(
        model, interop.optax_from_torch(optimizer, names=module, model=model, learning_rate=rates)
    )
    x = np.random.default_rng(0).normal(size=(4, 3))
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(jnp.square(state.replace(params=params).model()(x)))))
    for step in range(6):
        updates, opt_state = state.tx.update(gradient(state.params), state.opt_state, state.params)
        state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        optimizer.zero_grad()
        module(torch.tensor(x)).square().mean().backward()
        optimizer.step()
        scheduler.step_update(step + 1)
    _assert_equal(interop.state_dict(state), module, rtol=1e-11)


def test_what_these_rules_are_not_for_is_refused():
    module = _module()
    with pytest.raises(ValueError, match="Muon goes by the shape that each parameter has in PyTorch: give model="):
        interop.optax_from_torch(_of_matrices(module))
    with pytest.raises(ValueError, match="norm or mean of each parameter, and some arrays of this model are other"):
        joined = {"all": jnp.zeros(sum(p.numel() for p in module.parameters()))}
        interop.optax_from_torch(timm.optim.Lamb(module.parameters())).init(joined)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("kron", "adahessian", "adafactor", "lookahead_adam"):
            optimizer = timm.optim.create_optimizer_v2(module, name, lr=0.1)
            with pytest.raises(ValueError, match="no optax counterpart of"):
                interop.optax_from_torch(optimizer)
    tx = interop.optax_from_torch(torch.optim.Rprop(module.parameters()))
    params = TrainState.create(_Model(), optax.identity()).params
    with pytest.raises(ValueError, match=r"this rule goes by the parameters: tx.update\(gradients, state, params\)"):
        tx.update(params, tx.init(params))


def test_the_page_about_timms_optimizers():
    """Its program runs, and its table has every name of timm's."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (program,) = programs("docs/training.md", "optimizers-of-timm")
    module = _Deep(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    names = {"timm": timm, "interop": interop, "module": module}
    names["model"] = interop.from_torch(module, torch.zeros(2, 3))
    program.run(names)
    assert isinstance(names["tx"], optax.GradientTransformation)
    refused = re.findall(r"[a-z_]+", re.search(r"\| (adafactor, .*?) \| refused", page)[1])
    for name in timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"]):
        optimizer = timm.optim.create_optimizer_v2(_module(), name, lr=0.1)
        try:
            chains.refuse_unknown(chains.kind_of(optimizer), optimizer.param_groups)
        except ValueError:
            # Cautious and corrected ones of a refused name are refused with it.
            assert any(name in (x, f"c{x}", f"{x}c", f"{x}w", f"c{x}c") for x in refused), name
        else:
            assert name not in refused
