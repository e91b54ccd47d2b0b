"""Muon: the momentum of a matrix, made orthogonal by Newton and Schulz's iteration; torch.optim's and timm's.

The iteration runs in bfloat16, as in PyTorch, each product rounded once. Other machines add in another order: the
steps are PyTorch's to what bfloat16 tells apart.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from interop.optimizers.arithmetic import correction, like, norm, number
from interop.optimizers.by_entries import Entries, Now, by_entries, zeros
from interop.optimizers.rules_timm import adamw
from interop.optimizers.schedules import Schedule
from jaxnorm._typing import Array

DTYPE: Any = jnp.bfloat16  # of the iteration

Coefficients = Sequence[tuple[float, float, float]]


def torchs(group: Mapping[str, Any], rate: Schedule, axes: tuple[int, ...] | None) -> optax.GradientTransformation:
    """torch/optim/_muon.py."""
    momentum, decay = number(group["momentum"]), number(group["weight_decay"])
    coefficients = [tuple(group["ns_coefficients"])] * int(group["ns_steps"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        buffer = momentum * state["momentum_buffer"] + (1 - momentum) * g
        update = g + momentum * (buffer - g) if group["nesterov"] else buffer
        x = update.astype(DTYPE)
        x = iterated(x / jnp.maximum(_norm(x), float(group["eps"])), coefficients)
        a, b = p.shape[:2]
        kind = group["adjust_lr_fn"] or "original"
        scales = {"original": math.sqrt(max(1, a / b)), "match_rms_adamw": 0.2 * math.sqrt(max(a, b))}
        scale = (scales | {"spectral_unclamped": math.sqrt(a / b)})[kind]
        lr = like(now.rate, p)
        return -lr * decay * p - lr * scale * x.astype(p.dtype), {"momentum_buffer": buffer}

    return by_entries(rule, {"momentum_buffer": zeros}, rate, axes)


def timms(
    group: Mapping[str, Any], rate: Schedule, axes: tuple[int, ...] | None, fallback: bool
) -> optax.GradientTransformation:
    """timm/optim/muon.py: Muon or AdaMuon, and for parameters that it does not suit AdamW, or NAdamW with nesterov."""
    if fallback:
        options = {"caution": False, "amsgrad": False, "corrected_weight_decay": False}
        scale = float(group["fallback_lr_scale"])
        return adamw({**group, **options}, rate, nesterov=bool(group["nesterov"]), scale=scale)
    momentum, decay, eps = number(group["momentum"]), number(group["weight_decay"]), float(group["eps"])
    adaptive, batched = group["algo"] == "adamuon", group["conv_mode"] == "batched"
    coefficients = timms_coefficients(group["ns_coefficients"], int(group["ns_steps"]))

    def orthogonal(update: Array) -> Array:
        x = update
        if x.ndim > 2:  # a kernel: one matrix, or one for each of its places
            x = x.reshape(*x.shape[:2], -1)
            x = x.transpose(2, 0, 1) if batched else x.reshape(len(x), -1)
        damping = eps * (x.shape[-1] / x.shape[-2]) ** 0.5
        x = x.astype(DTYPE)
        size = _norm(x) * jnp.asarray(float(group["safety_factor"]), DTYPE)
        size = size + jnp.asarray(damping, DTYPE) if group["scale_eps"] else jnp.maximum(size, eps)
        return iterated(x / size.astype(DTYPE), coefficients)

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        buffer = momentum * state["momentum_buffer"] + (1 - momentum) * g
        after = {"momentum_buffer": buffer}
        x = orthogonal(g + momentum * (buffer - g) if group["nesterov"] else buffer)
        scale, by_norm = _scale(group["adjust_lr_fn"], x.shape, adaptive)
        if batched and p.ndim > 2 and group["normalize_spatial"]:
            scale *= math.prod(p.shape[2:]) ** -0.5
        x = (x.transpose(1, 2, 0) if batched and p.ndim > 2 else x).reshape(p.shape).astype(p.dtype)
        if adaptive:
            b2 = number(group["betas"][1])
            squares = after["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * x * x
            x = x / (jnp.sqrt(squares if by_norm else squares / like(correction(b2, now.step), p)) + eps)
            x = x / (norm(x) + eps) if by_norm else x
        lr = like(now.rate, p)
        return -lr * decay * p - lr * scale * x, after

    return by_entries(rule, {"momentum_buffer": zeros, **({"exp_avg_sq": zeros} if adaptive else {})}, rate, axes)


def suited(shape: Sequence[int], group: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Whether timm's Muon takes a parameter of this shape, or leaves it to AdamW (`_is_suitable_for_muon`).

    `kept`: the parameter's state, in which timm keeps what it once decided.
    """
    if "use_muon" in kept:
        return bool(kept["use_muon"])
    if group.get("use_fallback", False):
        return False
    if "use_muon" in group:
        return bool(group["use_muon"])
    if sum(size > 1 for size in shape) < 2 or 1 in shape[:2]:
        return False
    sides = (shape[0], math.prod(shape[1:]))
    return min(sides) >= 4 and max(sides) / min(sides) <= 128


def iterated(x: Array, coefficients: Coefficients) -> Array:
    """`x <- a x + (b A + c A A) x` with `A = x x^T`, of matrices that lie, or of each of a batch of them."""
    stands = x.shape[-2] > x.shape[-1]
    x = x.mT if stands else x
    for a, b, c in coefficients:
        gram = _sum(0.0, x, 1.0, x, x.mT)
        x = _sum(a, x, 1.0, _sum(b, gram, c, gram, gram), x)
    return x.mT if stands else x


def timms_coefficients(value: Any, steps: int) -> list[tuple[float, float, float]]:
    """As many as there are steps: those of a preset or the user's, the last one repeated."""
    muon = importlib.import_module("timm.optim.muon")  # a live optimizer of timm's is at hand
    found = muon.resolve_ns_coefficients(value, muon._COEFFICIENTS)
    return [found[min(i, len(found) - 1)] for i in range(steps)]


def _sum(a: float, x: Array, b: float, left: Array, right: Array) -> Array:
    """`a x + b left right`, rounded once."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = b * jnp.matmul(left, right, preferred_element_type=wide)
    return (product + a * x.astype(wide) if a else product).astype(x.dtype)


def _norm(x: Array) -> Array:
    """That of each matrix, rounded once."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True)).astype(x.dtype)


def _scale(kind: str | None, shape: Sequence[int], adaptive: bool) -> tuple[float, bool]:
    """What the rate is multiplied by, and whether AdaMuon divides by the norm (timm's `get_lr_scale` and its like)."""
    rows, columns = shape[-2], shape[-1]
    if not kind:
        return 1.0, False
    if kind == "rms_to_rms":
        return (rows / columns) ** 0.5, False
    if adaptive:
        if kind == "match_rms_adamw":
            return 0.2 * math.prod(shape) ** 0.5, True
        return {"rsqrt_in": columns**-0.5}[kind], False
    return {"original": max(1, rows / columns) ** 0.5, "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5}[kind], False
