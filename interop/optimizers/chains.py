"""The optax chain of a torch optimizer's parameter group: which parts, in which order, with which hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from interop.optimizers import rules
from interop.optimizers.plateau import Plateau
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
# timm's optimizers have options without a counterpart here, fine where they are off.
_OFF = {"caution": False, "corrected_weight_decay": False}
_KNOWN: dict[str, tuple[set[str], dict[str, bool]]] = {
    "SGD": ({"momentum", "dampening", "nesterov"}, {}),
    "Adam": ({"betas", "eps", "amsgrad"}, {}),
    "AdamW": ({"betas", "eps", "amsgrad"}, {}),
    "NAdam": ({"betas", "eps", "momentum_decay"}, {}),
    "RAdam": ({"betas", "eps"}, {}),
    "Adagrad": ({"lr_decay", "eps", "initial_accumulator_value"}, {}),
    "RMSprop": ({"alpha", "eps", "momentum", "centered"}, {}),
    "RMSpropTF": ({"alpha", "eps", "momentum", "centered", "lr_in_momentum"}, _OFF),
    "Lion": ({"betas"}, _OFF),
    "Adan": ({"betas", "eps", "no_prox"}, _OFF),
    "Lamb": ({"betas", "eps", "always_adapt", "max_grad_norm"},
             {**_OFF, "bias_correction": True, "grad_averaging": True, "trust_clip": False, "decoupled_decay": False}),
}  # fmt: skip


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


def chain(kind: str, group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """The chain of a parameter group of an optimizer of class `kind`."""
    decay = _number(group.get("weight_decay", 0))
    decoupled = kind in ("AdamW", "Lion") or group.get("decoupled_weight_decay") or group.get("decoupled_decay")
    parts = [optax.scale(-1.0)] if group.get("maximize") else []
    if _on(decay) and not decoupled and kind not in ("Lamb", "Adan"):
        parts.append(optax.add_decayed_weights(decay))
    direction, momentum = _direction(kind, group), _number(group.get("momentum", 0))
    parts.append(direction)
    if kind == "RMSprop" and _on(momentum):
        parts.append(optax.trace(momentum))
    if kind == "RMSpropTF" and _on(momentum):
        if group["lr_in_momentum"]:
            decayed = [rules.added_decay(rate, decay)] if _on(decay) and decoupled else []
            return optax.chain(
                *parts, rules.scale_by_rate(rate, 1.0), optax.trace(momentum), optax.scale(-1.0), *decayed
            )
        parts.append(optax.trace(momentum))
    if _on(decay) and (decoupled or kind == "Lamb"):
        parts.append(optax.add_decayed_weights(decay))
    if kind == "Lamb" and (_on(decay) or group["always_adapt"]):
        parts.append(optax.scale_by_trust_ratio())
    if kind == "Adan" and _on(decay) and group["no_prox"]:
        parts.append(optax.add_decayed_weights(decay))
    parts.append(rules.scale_by_rate(rate))
    if kind == "Adan" and _on(decay) and not group["no_prox"]:
        parts.append(rules.proximal_decay(rate, decay))
    return optax.chain(*parts)


def _direction(kind: str, group: Mapping[str, Any]) -> optax.GradientTransformation:
    if kind == "SGD":
        momentum, dampening, nesterov = _number(group["momentum"]), float(group["dampening"]), bool(group["nesterov"])
        if not _on(momentum):
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
    b1, b2, *rest = (_number(b) for b in group["betas"])
    if kind == "Lion":
        return optax.scale_by_lion(b1, b2)
    eps = float(group["eps"])
    if kind == "Adan":
        return rules.adan(b1, b2, rest[0], eps)
    if kind == "NAdam":
        return rules.nadam(b1, b2, eps, group["momentum_decay"])
    if kind == "RAdam":
        return rules.radam(b1, b2, eps)
    return rules.amsgrad(b1, b2, eps) if group.get("amsgrad") else rules.adam(b1, b2, eps)


class MovingState(NamedTuple):
    """State of `moving_chain`."""

    position: Int[Array, ""]
    inner: PyTree


def moving_chain(kind: str, group: Mapping[str, Any], schedule: TorchSchedule) -> optax.GradientTransformation:
    """`chain`, with the hyperparameters that the schedule moves as they are at its position, step by step."""
    where = {key: jnp.asarray(table[0]) for key, table in schedule.moved.items()}
    initial = chain(kind, {**group, **where}, schedule)

    def init(params: PyTree) -> MovingState:
        return MovingState(jnp.asarray(schedule.position, jnp.int32), initial.init(params))

    def update(updates: PyTree, state: MovingState, params: PyTree = None) -> tuple[PyTree, MovingState]:
        dtype = jnp.result_type(*jax.tree.leaves(updates))
        now = {key: value.astype(dtype) for key, value in schedule.moved_at(state.position).items()}
        updates, inner = chain(kind, {**group, **now}, schedule).update(updates, state.inner, params)
        return updates, MovingState(optax.safe_increment(state.position), inner)

    return optax.GradientTransformation(init, update)


def _number(value: Any) -> Any:
    """A hyperparameter: a number, or an array of one that a schedule moves."""
    return value if isinstance(value, jax.Array) else float(value)


def _on(value: Any) -> bool:
    """Whether there is such a thing at all; what a schedule moves may be 0 for a while."""
    return isinstance(value, jax.Array) or bool(value)


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
        held: list[Schedule] = [rules.HeldRate(i, float(rate)) for i, rate in enumerate(given.start.rates)]
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
