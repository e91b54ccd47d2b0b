"""Update rules of torch.optim that optax has not, or not so: Adamax, Adadelta, ASGD, Rprop.

Each follows the single-tensor function of the torch file named. Weight decay is in the gradient already, where the
optimizer has any.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from interop.optimizers.arithmetic import correction, floating, like, number
from interop.optimizers.by_entries import Entries, Now, by_entries, zeros
from interop.optimizers.schedules import Schedule
from jaxnorm._typing import Array


def adamax(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """torch/optim/adamax.py: eps is added to |g| before the maximum. `optax.scale_by_adamax`: to the old maximum."""
    b1, b2 = (number(b) for b in group["betas"])
    eps = float(group["eps"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        mean = b1 * state["exp_avg"] + (1 - b1) * g
        largest = jnp.maximum(b2 * state["exp_inf"], jnp.abs(g) + eps)
        step = like(now.rate / correction(b1, now.step), p)
        return -step * mean / largest, {"exp_avg": mean, "exp_inf": largest}

    return by_entries(rule, {"exp_avg": zeros, "exp_inf": zeros}, rate)


def adadelta(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """torch/optim/adadelta.py."""
    rho, eps = float(group["rho"]), float(group["eps"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        squares = rho * state["square_avg"] + (1 - rho) * g * g
        delta = jnp.sqrt(state["acc_delta"] + eps) / jnp.sqrt(squares + eps) * g
        deltas = rho * state["acc_delta"] + (1 - rho) * delta * delta
        return -like(now.rate, p) * delta, {"square_avg": squares, "acc_delta": deltas}

    return by_entries(rule, {"square_avg": zeros, "acc_delta": zeros}, rate)


def asgd(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """torch/optim/asgd.py, the average `ax` included. The rate of a step (`eta`) was computed at the one before.

    `eta` and `mu` are numbers of torch's default dtype, whatever the parameters are.
    """
    scalars = default_dtype()
    lambd, alpha, t0 = float(group["lambd"]), float(group["alpha"]), float(group["t0"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        eta, mu = like(state["eta"], p), like(state["mu"], p)
        u = -lambd * eta * p - eta * g
        average = jnp.where(mu == 1, p + u, state["ax"] + (p + u - state["ax"]) * mu)
        t = floating(now.step)
        lr = now.rate.astype(t.dtype)
        eta = lr / (1 + lambd * lr * t) ** alpha
        mu = 1 / jnp.maximum(1, t - t0)
        return u, {"ax": average, "eta": eta, "mu": mu}

    first = {
        "ax": zeros,
        "eta": lambda p, lr: lr.astype(scalars),
        "mu": lambda p, lr: jnp.ones((), scalars),
    }
    return by_entries(rule, first, rate)


def rprop(group: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """torch/optim/rprop.py. The rate is what the sizes of the steps begin with."""
    less, more = (float(eta) for eta in group["etas"])
    least, most = (float(size) for size in group["step_sizes"])

    def rule(g: Array, p: Array, state: Entries, now: Now) -> tuple[Array, Entries]:
        sign = jnp.sign(g * state["prev"])
        factor = jnp.where(sign > 0, more, jnp.where(sign < 0, less, 1))
        size = jnp.clip(state["step_size"] * factor, least, most)
        g = jnp.where(sign < 0, 0, g)
        return -jnp.sign(g) * size, {"prev": g, "step_size": size}

    return by_entries(rule, {"prev": zeros, "step_size": lambda p, lr: jnp.full_like(p, lr)}, rate)


def default_dtype() -> Any:
    """That of the scalars in torch's optimizer states: float64 only where it is torch's default."""
    import torch

    wide = torch.get_default_dtype() == torch.float64
    return jnp.result_type(float) if wide else jnp.float32
