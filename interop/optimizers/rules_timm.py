"""Update rules of timm.optim that optax has not, or not so.

Each follows the single-tensor function of the timm file named; `caution` and `corrected_weight_decay` are in
`arithmetic.py`. Decoupled decay takes `lr * decay * p` off; other decay is added to the gradient.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from interop.optimizers.arithmetic import cautious, correction, decay_rate, floating, like, norm, number, on
from interop.optimizers.by_entries import Entries, Now, by_entries, zeros
from interop.optimizers.rules_torch import default_dtype
from interop.optimizers.schedules import Schedule
from jaxnorm._typing import Array

_MOMENTS = {"exp_avg": zeros, "exp_avg_sq": zeros}


def adamw(
    group: Mapping[str, Any], rate: Schedule, *, nesterov: bool = False, scale: float = 1.0
) -> optax.GradientTransformation:
    """timm/optim/adamw.py, and with `nesterov` nadamw.py, which takes `b1 m + (1 - b1) g` for the mean `m`.

    `clipping_threshold`: the direction is scaled so that `g / denominator` has that root mean square at most. `scale`:
    of the rate.
    """
    b1, b2 = (number(b) for b in group["betas"])
    eps, decay = float(group["eps"]), number(group["weight_decay"])
    caution, amsgrad, threshold = group.get("caution"), group.get("amsgrad"), group.get("clipping_threshold")

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        mean = b1 * state["exp_avg"] + (1 - b1) * g
        squares = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        after = {"exp_avg": mean, "exp_avg_sq": squares}
        if amsgrad:
            squares = after["max_exp_avg_sq"] = jnp.maximum(state["max_exp_avg_sq"], squares)
        below = jnp.sqrt(squares) / like(jnp.sqrt(correction(b2, now.step)), p) + eps
        if threshold is not None:
            below = below * jnp.maximum(norm(g / below) / g.size**0.5 / threshold, 1)
        mean = b1 * mean + (1 - b1) * g if nesterov else mean
        mean = cautious(mean, g) if caution else mean
        lr = now.rate * scale
        step = like(lr / correction(b1, now.step), p)
        return -step * mean / below - like(decay_rate(lr, group) * decay, p) * p, after

    return by_entries(rule, {**_MOMENTS, **({"max_exp_avg_sq": zeros} if amsgrad else {})}, rate)


def nadamw(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """timm/optim/nadamw.py."""
    return adamw(group, rate, nesterov=True)


def adabelief(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """timm/optim/adabelief.py: squares of `g - mean`, to which eps is added for good. `optax.scale_by_belief`: no decay
    of this kind, no amsgrad, not rectified."""
    b1, b2 = (number(b) for b in group["betas"])
    eps, decay = float(group["eps"]), number(group["weight_decay"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        lr, c1, c2 = like(now.rate, p), like(correction(b1, now.step), p), correction(b2, now.step)
        if group["decoupled_decay"]:
            decayed = -(decay if group["fixed_decay"] else lr * decay) * p
        else:
            g, decayed = g + decay * p, jnp.zeros_like(p)
        mean = b1 * state["exp_avg"] + (1 - b1) * g
        squares = b2 * state["exp_avg_var"] + (1 - b2) * (g - mean) ** 2 + eps
        after = {"exp_avg": mean, "exp_avg_var": squares}
        largest = squares
        if group["amsgrad"]:
            largest = after["max_exp_avg_var"] = jnp.maximum(state["max_exp_avg_var"], squares)
        if not group["rectify"]:
            return decayed - lr / c1 * mean / (jnp.sqrt(largest) / like(jnp.sqrt(c2), p) + eps), after
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * floating(now.step) * (1 - c2) / c2
        safe = jnp.where(length >= 5, length, 6)
        size = jnp.sqrt(c2 * (safe - 4) / (longest - 4) * (safe - 2) / safe * longest / (longest - 2))
        early = -lr / c1 * mean if group["degenerated_to_sgd"] else jnp.zeros_like(p)
        u = jnp.where(length >= 5, -lr * like(size, p) / c1 * mean / (jnp.sqrt(squares) + eps), early)
        return decayed + u, after

    maximum = {"max_exp_avg_var": zeros} if group["amsgrad"] else {}
    return by_entries(rule, {"exp_avg": zeros, "exp_avg_var": zeros, **maximum}, rate)


def adopt(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """timm/optim/adopt.py: the gradient over the root of the squares *before* it; the first step only takes its square.

    `optax.contrib` has no clipping by `(step - 1)**clip_exp` of this kind.
    """
    b1, b2 = (number(b) for b in group["betas"])
    eps, decay, clip = float(group["eps"]), number(group["weight_decay"]), group["clip_exp"]

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        first = now.step == 1
        if not group["decoupled"]:
            g = g + decay * p
        normed = g / jnp.maximum(jnp.sqrt(state["exp_avg_sq"]), eps)
        if clip is not None:
            most = like((floating(now.step) - 1) ** clip, p)
            normed = jnp.clip(normed, -most, most)
        mean = b1 * state["exp_avg"] + (1 - b1) * normed
        u = -like(now.rate, p) * (cautious(mean, g) if group["caution"] else mean)
        if group["decoupled"]:
            u = u - like(decay_rate(now.rate, group) * decay, p) * p
        squares = jnp.where(first, state["exp_avg_sq"] + g * g, b2 * state["exp_avg_sq"] + (1 - b2) * g * g)
        return jnp.where(first, 0, u), {"exp_avg": jnp.where(first, state["exp_avg"], mean), "exp_avg_sq": squares}

    return by_entries(rule, _MOMENTS, rate)


def laprop(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """timm/optim/laprop.py: the mean of normalised gradients, each with its own rate; decay after the step.

    `exp_avg_lr_1` is a number in double precision there, `exp_avg_lr_2` one of torch's default dtype.
    """
    scalars = default_dtype()
    b1, b2 = (number(b) for b in group["betas"])
    eps, decay = float(group["eps"]), number(group["weight_decay"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        wide = jnp.result_type(float)
        lr = now.rate.astype(wide)
        of_rate = state["exp_avg_lr_1"] * b1 + (1 - b1) * lr
        # Each rounded to the scalars' dtype, as PyTorch's two operations on such a tensor.
        shrunk = (state["exp_avg_lr_2"].astype(wide) * jnp.asarray(b2, scalars).astype(wide)).astype(scalars)
        of_one = (shrunk.astype(wide) + jnp.asarray(1 - b2, scalars).astype(wide)).astype(scalars)
        squares = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        mean = b1 * state["exp_avg"] + like(lr, p) * (1 - b1) * (g / (jnp.sqrt(squares / like(of_one, p)) + eps))
        size = jnp.where(of_rate != 0, lr / jnp.where(of_rate != 0, of_rate, 1), 0)
        u = -like(size, p) * (cautious(mean, g) if group["caution"] else mean)
        u = u - like(decay_rate(lr, group) * decay, p) * (p + u)
        return u, {"exp_avg": mean, "exp_avg_sq": squares, "exp_avg_lr_1": of_rate, "exp_avg_lr_2": of_one}

    first = {
        **_MOMENTS,
        "exp_avg_lr_1": lambda p, lr: jnp.zeros((), jnp.result_type(float)),
        "exp_avg_lr_2": lambda p, lr: jnp.zeros((), scalars),
    }
    return by_entries(rule, first, rate)


def madgrad(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """timm/optim/madgrad.py: from where training began (`x0`), dual averages over the cube root of the squares."""
    momentum, eps, decay = number(group["momentum"]), float(group["eps"]), number(group["weight_decay"])
    moving = on(momentum)

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        lr = like(now.rate, p)
        weight = (lr + eps) * jnp.sqrt(like(floating(now.step), p))
        old = p
        if group["decoupled_decay"]:
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        x0 = state["x0"] if moving else p + state["s"] / (state["grad_sum_sq"] ** (1 / 3) + eps)
        squares, s = state["grad_sum_sq"] + weight * g * g, state["s"] + weight * g
        z = x0 - s / (squares ** (1 / 3) + eps)
        new = p * momentum + z * (1 - momentum) if moving else z
        return new - old, {"grad_sum_sq": squares, "s": s, **({"x0": x0} if moving else {})}

    begin = {"x0": lambda p, lr: p} if moving else {}
    return by_entries(rule, {"grad_sum_sq": zeros, "s": zeros, **begin}, rate)


def mars(
    group: Mapping[str, Any], rate: Schedule, *, axes: tuple[int, ...] | None = None
) -> optax.GradientTransformation:
    """timm/optim/mars.py: of matrices, gradients corrected by the one before; of the others AdamW."""
    eps, decay, gamma = float(group["eps"]), number(group["weight_decay"]), float(group["gamma"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        corrected = group["optimize_1d"] or p.ndim >= 2
        b1, b2 = (number(b) for b in (group["betas"] if corrected else group["betas_1d"]))
        seen = g
        if corrected:
            later = (g - state["last_grad"]) * (gamma * (b1 / (1 - b1))) + g
            seen = jnp.where(now.step == 1, g, later)
            seen = seen / jnp.maximum(norm(seen), 1)
        mean = b1 * state["exp_avg"] + (1 - b1) * seen
        lion = corrected and group["mars_type"] == "lion"
        squares = state["exp_avg_sq"] if lion else b2 * state["exp_avg_sq"] + (1 - b2) * seen * seen
        direction = cautious(mean, g) if group["caution"] else mean
        if lion:
            direction = jnp.sign(direction)
        else:
            below = jnp.sqrt(squares) / like(jnp.sqrt(correction(b2, now.step)), p) + eps
            direction = direction / like(correction(b1, now.step), p) / below
        lr = like(now.rate, p) * (1 if corrected else float(group["lr_1d_factor"]))
        return -lr * (decay * p + direction), {"exp_avg": mean, "exp_avg_sq": squares, "last_grad": g}

    return by_entries(rule, {**_MOMENTS, "last_grad": zeros}, rate, axes)


def lamb(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """timm/optim/lamb.py after the clipping of the whole gradient: adam, decay, and the ratio of the norms."""
    b1, b2 = (number(b) for b in group["betas"])
    eps, decay = float(group["eps"]), number(group["weight_decay"])
    share = 1 - b1 if group["grad_averaging"] else 1.0

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        mean = b1 * state["exp_avg"] + share * g
        squares = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        c1, c2 = (correction(b, now.step) if group["bias_correction"] else jnp.ones(()) for b in (b1, b2))
        direction = mean / like(c1, p) / (jnp.sqrt(squares) / like(jnp.sqrt(c2), p) + eps)
        direction = cautious(direction, g) if group["caution"] else direction
        decayed = jnp.zeros_like(p)
        if group["decoupled_decay"]:
            decayed = -like(decay_rate(now.rate, group) * decay, p) * p
        else:
            direction = direction + decay * p
        of_p, of_direction = norm(p + decayed), norm(direction)
        usable = (of_p > 0) & (of_direction > 0)
        ratio = jnp.where(usable, of_p / jnp.where(usable, of_direction, 1), 1)
        ratio = jnp.minimum(ratio, 1) if group["trust_clip"] else ratio
        # Parameters without decay keep their rate, unless always_adapt.
        ratio = ratio if group["always_adapt"] else jnp.where(jnp.asarray(decay) != 0, ratio, 1)
        return decayed - like(now.rate, p) * ratio * direction, {"exp_avg": mean, "exp_avg_sq": squares}

    return by_entries(rule, _MOMENTS, rate)
