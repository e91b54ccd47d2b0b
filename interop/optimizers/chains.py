"""The optax chain of a torch optimizer's parameter group: which parts, in which order, with which hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from interop.optimizers import muon, rules, rules_timm, rules_torch
from interop.optimizers.arithmetic import number, on
from interop.optimizers.plateau import Plateau
from interop.optimizers.rates import HeldRate, scale_by_rate
from interop.optimizers.schedules import Schedule, TorchSchedule
from jaxnorm._typing import Array, Int, PyTree

_SHARED = {
    "params",
    "param_names",
    "lr",
    "initial_lr",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
    "weight_decay",
    "decoupled_weight_decay",
    "decoupled_decay",
    "step",
    "max_lr_snapshot",
    # What schedulers leave with the groups: OneCycleLR and SWALR. (One that leaves base_momentum moves momentum too.)
    "max_lr",
    "min_lr",
    "swa_lr",
    "lr_scale",  # timm's layer decay, which its schedulers and factories have multiplied the rate by
    "initial_weight_decay",
}
# What OneCycleLR and CyclicLR leave where they move momentum.
_MOVING = {"base_momentum", "max_momentum"}
_TIMM = {"caution", "corrected_weight_decay"}
_ADAM = {"betas", "eps", "amsgrad"}
_TIMMS_MUON = {
    "momentum",
    "nesterov",
    "ns_steps",
    "ns_coefficients",
    "eps",
    "safety_factor",
    "adjust_lr_fn",
    "conv_mode",
}
_TIMMS_MUON |= {"normalize_spatial", "fallback_lr_scale", "betas", "algo", "scale_eps", "verbose", "use_fallback"}
# The options that are known; those with a value are fine with that value alone.
_KNOWN: dict[str, tuple[set[str], dict[str, bool]]] = {
    "SGD": ({"momentum", "dampening", "nesterov"}, {}),
    "Adam": (_ADAM, {}),
    "AdamW": (_ADAM, {}),
    "NAdam": ({"betas", "eps", "momentum_decay"}, {}),
    "RAdam": ({"betas", "eps"}, {}),
    "Adagrad": ({"lr_decay", "eps", "initial_accumulator_value"}, {}),
    "RMSprop": ({"alpha", "eps", "momentum", "centered"}, {}),
    "Adamax": ({"betas", "eps"}, {}),
    "Adadelta": ({"rho", "eps"}, {}),
    "ASGD": ({"lambd", "alpha", "t0"}, {}),
    "Rprop": ({"etas", "step_sizes"}, {}),
    "Muon": ({"momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}, {}),
    "RMSpropTF": ({"alpha", "eps", "momentum", "centered", "lr_in_momentum"} | _TIMM, {}),
    "Lion": ({"betas"} | _TIMM, {}),
    "Adan": ({"betas", "eps", "no_prox", "caution"}, {"corrected_weight_decay": False}),
    "Lamb": ({"betas", "eps", "always_adapt", "max_grad_norm", "bias_correction", "grad_averaging", "trust_clip"}
             | _TIMM, {}),
    "Lars": ({"momentum", "dampening", "nesterov", "trust_coeff", "eps", "trust_clip", "always_adapt"}, {}),
    "SGDW": ({"momentum", "dampening", "nesterov"} | _TIMM, {}),
    "AdamWLegacy": (_ADAM | _TIMM | {"clipping_threshold"}, {}),
    "NAdamW": ({"betas", "eps", "clipping_threshold"} | _TIMM, {}),
    "AdaBelief": (_ADAM | {"degenerated_to_sgd", "rectify", "fixed_decay"}, {}),
    "Adopt": ({"betas", "eps", "clip_exp", "decoupled"} | _TIMM, {}),
    "LaProp": ({"betas", "eps"} | _TIMM, {}),
    "MADGRAD": ({"momentum", "eps"}, {}),
    "Mars": ({"betas", "eps", "gamma", "mars_type", "optimize_1d", "lr_1d_factor", "betas_1d", "caution"}, {}),
    "timm Muon": (_TIMMS_MUON | {"use_muon", "use_fallback"}, {}),
}  # fmt: skip
# Rules that are one piece: `by_entries.py`.
_RULES = {
    "Adamax": rules_torch.adamax,
    "Adadelta": rules_torch.adadelta,
    "ASGD": rules_torch.asgd,
    "Rprop": rules_torch.rprop,
    "Lamb": rules_timm.lamb,
    "AdamWLegacy": rules_timm.adamw,
    "NAdamW": rules_timm.nadamw,
    "AdaBelief": rules_timm.adabelief,
    "Adopt": rules_timm.adopt,
    "LaProp": rules_timm.laprop,
    "MADGRAD": rules_timm.madgrad,
}
# Rules that go by the shape of a parameter in PyTorch's layout.
BY_SHAPE = ("Muon", "timm Muon", "Mars")


def kind_of(optimizer: Any) -> str:
    """The name of an optimizer's rule: its class's; of the two that both torch and timm have, timm's says so."""
    name = type(optimizer).__name__
    timms = type(optimizer).__module__.startswith("timm.") and name in ("Muon", "Adafactor")
    return f"timm {name}" if timms else name


def by_array(kind: str, group: Mapping[str, Any]) -> bool:
    """Whether a step goes by the whole of a parameter: by its norm, or caution by a mean over it."""
    stable = group.get("clipping_threshold") is not None
    return kind in (*BY_SHAPE, "Lamb", "Lars") or bool(group.get("caution")) or stable


class Route(NamedTuple):
    """What makes the chain of a parameter another than its group's others, where the rule goes by shape."""

    axes: tuple[int, ...] | None = None  # PyTorch's, of the model's array
    fallback: bool = False  # timm's Muon: left to AdamW


GROUPS_OWN = Route()


def refuse_unknown(kind: str, groups: Sequence[Mapping[str, Any]], moving: bool = False) -> None:
    """Raises `ValueError` for an optimizer, or options of it (all at once), without a counterpart here."""
    if kind not in _KNOWN:
        raise ValueError(f"no optax counterpart of {kind} here; there are: {', '.join(_KNOWN)}")
    options, required = _KNOWN[kind]
    wrong = [
        f"  group {i}: {key}={value!r}"
        for i, group in enumerate(groups)
        for key, value in group.items()
        if (key in required and value != required[key])
        or key not in options | _SHARED | required.keys() | (_MOVING if moving else set())
    ]
    if wrong:
        moved = any("base_momentum" in group for group in groups)
        hint = (
            "\nmomentum that a scheduler moves: give learning_rate=schedule_from_torch(scheduler, steps, moving=True), "
            "or OneCycleLR and CyclicLR cycle_momentum=False"
            if moved
            else ""
        )
        raise ValueError(f"{kind} options without a counterpart here:\n" + "\n".join(wrong) + hint)


def chain(
    kind: str, group: Mapping[str, Any], rate: Schedule, route: Route = GROUPS_OWN
) -> optax.GradientTransformation:
    """The chain of a parameter group of an optimizer of class `kind`."""
    decay, momentum = number(group.get("weight_decay", 0)), number(group.get("momentum", 0))
    parts = [optax.scale(-1.0)] if group.get("maximize") else []
    if kind in BY_SHAPE:
        return optax.chain(*parts, _by_shape(kind, group, rate, route))
    if kind in _RULES:
        in_gradient = on(decay) and kind in ("Adamax", "Adadelta", "ASGD")
        coupled = [optax.add_decayed_weights(decay)] if in_gradient else []
        return optax.chain(*parts, *coupled, _RULES[kind](group, rate))
    decoupled = kind in ("AdamW", "Lion", "SGDW")
    decoupled = decoupled or bool(group.get("decoupled_weight_decay") or group.get("decoupled_decay"))
    if on(decay) and not decoupled and kind not in ("Adan", "Lars"):
        parts.append(optax.add_decayed_weights(decay))
    if kind == "Lars" and (on(decay) or group["always_adapt"]):
        parts.append(rules.lars_ratio(rate, decay, group["trust_coeff"], group["eps"], group["trust_clip"]))
    direction = [_direction(kind, group)]
    signed = kind == "RMSpropTF" and on(momentum) and group["lr_in_momentum"]
    if signed:
        direction.append(scale_by_rate(rate, 1.0))
    if kind in ("RMSprop", "RMSpropTF") and on(momentum):
        direction.append(optax.trace(momentum))
    # Without momentum there is nothing that could disagree with the gradient.
    careful = group.get("caution") and kind != "Adan" and (kind == "Lion" or on(momentum))
    parts += [rules.with_caution(optax.chain(*direction))] if careful else direction
    apart = signed or bool(group.get("corrected_weight_decay"))  # decay that is not multiplied as the direction is
    if on(decay) and ((decoupled and not apart) or (kind == "Adan" and group["no_prox"])):
        parts.append(optax.add_decayed_weights(decay))
    parts.append(optax.scale(-1.0) if signed else scale_by_rate(rate))
    if on(decay) and decoupled and apart:
        parts.append(rules.added_decay(rate, decay, group))
    if kind == "Adan" and on(decay) and not group["no_prox"]:
        parts.append(rules.proximal_decay(rate, decay))
    return optax.chain(*parts)


def _by_shape(kind: str, group: Mapping[str, Any], rate: Schedule, route: Route) -> optax.GradientTransformation:
    if kind == "Mars":
        return rules_timm.mars(group, rate, axes=route.axes)
    if kind == "Muon":
        return muon.torchs(group, rate, route.axes)
    return muon.timms(group, rate, route.axes, route.fallback)


def _direction(kind: str, group: Mapping[str, Any]) -> optax.GradientTransformation:
    if kind in ("SGD", "SGDW", "Lars"):
        momentum, dampening, nesterov = number(group["momentum"]), float(group["dampening"]), bool(group["nesterov"])
        if not on(momentum):
            return optax.identity()
        return rules.dampened_trace(momentum, dampening, nesterov) if dampening else optax.trace(momentum, nesterov)
    if kind in ("RMSprop", "RMSpropTF"):
        scale_by = optax.scale_by_stddev if group["centered"] else optax.scale_by_rms
        inside = kind == "RMSpropTF"
        return scale_by(
            decay=group["alpha"], eps=group["eps"], eps_in_sqrt=inside, initial_scale=1.0 if inside else 0.0
        )
    if kind == "Adagrad":
        return rules.adagrad(group["lr_decay"], group["eps"], group["initial_accumulator_value"])
    b1, b2, *rest = (number(b) for b in group["betas"])
    if kind == "Lion":
        return optax.scale_by_lion(b1, b2)
    eps = float(group["eps"])
    if kind == "Adan":
        return rules.adan(b1, b2, rest[0], eps, bool(group.get("caution")))
    if kind == "NAdam":
        return rules.nadam(b1, b2, eps, group["momentum_decay"])
    if kind == "RAdam":
        return rules.radam(b1, b2, eps)
    return rules.amsgrad(b1, b2, eps) if group.get("amsgrad") else rules.adam(b1, b2, eps)


class MovingState(NamedTuple):
    """State of `moving_chain`."""

    position: Int[Array, ""]
    inner: PyTree


def moving_chain(
    kind: str, group: Mapping[str, Any], schedule: TorchSchedule, route: Route = GROUPS_OWN
) -> optax.GradientTransformation:
    """`chain`, with the hyperparameters that the schedule moves as they are at its position, step by step."""
    where = {key: jnp.asarray(table[0]) for key, table in schedule.moved.items()}
    initial = chain(kind, {**group, **where}, schedule, route)

    def init(params: PyTree) -> MovingState:
        return MovingState(jnp.asarray(schedule.position, jnp.int32), initial.init(params))

    def update(updates: PyTree, state: MovingState, params: PyTree = None) -> tuple[PyTree, MovingState]:
        dtype = jnp.result_type(*jax.tree.leaves(updates))
        now = {key: value.astype(dtype) for key, value in schedule.moved_at(state.position).items()}
        updates, inner = chain(kind, {**group, **now}, schedule, route).update(updates, state.inner, params)
        return updates, MovingState(optax.safe_increment(state.position), inner)

    return optax.GradientTransformation(init, update)


def rates(groups: Sequence[Mapping[str, Any]], given: Schedule | Sequence[Schedule] | Plateau | None) -> list[Schedule]:
    """A schedule for each group; the same one for groups with the same rate."""
    if given is None:
        # Constant rates are schedules too, so that every chain counts its steps.
        constants = {float(group["lr"]): _constant(float(group["lr"])) for group in groups}
        return [constants[float(group["lr"])] for group in groups]
    if isinstance(given, Plateau):
        if len(given.start.rates) != len(groups):
            raise ValueError(
                f"the plateau is of {len(given.start.rates)} parameter groups, the optimizer has {len(groups)}"
            )
        held: list[Schedule] = [HeldRate(i, float(rate)) for i, rate in enumerate(given.start.rates)]
        return held
    if callable(given):
        return [given] * len(groups)
    if not isinstance(given, Sequence) or not all(map(callable, given)):
        raise ValueError(f"learning_rate is a schedule, or a list of one for each parameter group; got {given!r}")
    if len(given) != len(groups):
        raise ValueError(f"learning_rate has {len(given)} schedules for {len(groups)} parameter groups")
    return list(given)


def _constant(rate: float) -> Schedule:
    return lambda count: jnp.asarray(rate)
