"""Update rules of torch.optim and timm.optim that optax defines otherwise, as optax transformations.

Each follows the single-tensor function of the torch file named; state fields bear optax's names (`mu`, `nu`, `trace`).
Every rule gives the direction that is then multiplied by -learning rate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from interop.optimizers.schedules import Schedule, TorchSchedule
from jaxnorm._typing import Array, Float, Int, PyTree


class PositionState(NamedTuple):
    """The position of a torch scheduler: steps of its own, which are not the optimizer's (`load_optimizer_state`)."""

    position: Int[Array, ""]


class HeldRateState(NamedTuple):
    """A rate that is set from outside (`plateau.py`), and whose group it is."""

    rate: Float[Array, ""]
    group: Int[Array, ""]


@dataclass(frozen=True)
class HeldRate:
    """In the place of a schedule: the rate of a group that its state holds."""

    group: int
    initial: float

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """What the state holds, in the place of a count."""
        return count


RateState: TypeAlias = PositionState | optax.ScaleByScheduleState | HeldRateState


def start(rate: Schedule) -> RateState:
    """The state of whatever goes by a rate, where the rate begins."""
    if isinstance(rate, HeldRate):
        return HeldRateState(jnp.asarray(rate.initial, jnp.result_type(float)), jnp.asarray(rate.group, jnp.int32))
    if isinstance(rate, TorchSchedule):
        return PositionState(jnp.asarray(rate.position, jnp.int32))
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))


def _next(state: RateState) -> RateState:
    return state if isinstance(state, HeldRateState) else type(state)(optax.safe_increment(state[0]))


def scale_by_rate(rate: Schedule, sign: float = -1.0) -> optax.GradientTransformation:
    """`optax.scale_by_schedule` of sign * rate."""

    def init(params: PyTree) -> RateState:
        return start(rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        factor = sign * jnp.asarray(rate(state[0]))
        return _map(lambda u: _as(factor, u) * u, updates), _next(state)

    return optax.GradientTransformation(init, update)


class DampenedTraceState(NamedTuple):
    """State of `dampened_trace`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    trace: PyTree


def dampened_trace(decay: float | Array, dampening: float, nesterov: bool = False) -> optax.GradientTransformation:
    """torch/optim/sgd.py: `buf = decay * buf + (1 - dampening) * g`, whose first value is `g` undampened.

    `optax.trace` is the same with no dampening.
    """

    def init(params: PyTree) -> DampenedTraceState:
        return DampenedTraceState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates: PyTree, state: DampenedTraceState, params: PyTree = None) -> tuple[PyTree, DampenedTraceState]:
        share = jnp.where(state.count == 0, 1, 1 - dampening)
        trace = _map(lambda g, t: share.astype(g.dtype) * g + decay * t, updates, state.trace)
        if nesterov:
            updates = _map(lambda g, t: g + decay * t, updates, trace)
        return updates if nesterov else trace, DampenedTraceState(state.count + 1, trace)

    return optax.GradientTransformation(init, update)


def adam(b1: float | Array, b2: float | Array, eps: float) -> optax.GradientTransformation:
    """torch/optim/adam.py. `optax.scale_by_adam`, with its state, and a bias correction that float32 does not round.

    There 1 - 0.999**t at t = 1 has lost four digits; PyTorch computes it in double precision.
    """

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = state.count + 1
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        c1, c2 = _corrections(b1, b2, count)
        updates = _map(lambda m, n: m / _as(c1, m) / (jnp.sqrt(n) / _as(jnp.sqrt(c2), n) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(_adam_init, update)


class AmsgradState(NamedTuple):
    """State of `amsgrad`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    nu_max: PyTree


def amsgrad(b1: float | Array, b2: float | Array, eps: float) -> optax.GradientTransformation:
    """torch/optim/adam.py with amsgrad: the largest `nu` *before* bias correction. `optax.scale_by_amsgrad`: after."""

    def init(params: PyTree) -> AmsgradState:
        return AmsgradState(jnp.zeros((), jnp.int32), *(optax.tree.zeros_like(params) for _ in range(3)))

    def update(updates: PyTree, state: AmsgradState, params: PyTree = None) -> tuple[PyTree, AmsgradState]:
        count = state.count + 1
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        nu_max = _map(jnp.maximum, state.nu_max, nu)
        c1, c2 = _corrections(b1, b2, count)
        updates = _map(lambda m, n: m / _as(c1, m) / (jnp.sqrt(n) / _as(jnp.sqrt(c2), n) + eps), mu, nu_max)
        return updates, AmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


class NadamState(NamedTuple):
    """State of `nadam`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    mu_product: Float[Array, ""]
    mu: PyTree
    nu: PyTree


def nadam(b1: float | Array, b2: float | Array, eps: float, momentum_decay: float) -> optax.GradientTransformation:
    """torch/optim/nadam.py: momentum `b1 (1 - 0.96^(t momentum_decay) / 2)`, changing over time. optax's is constant.

    `mu_product` is float32, as PyTorch's is under its default dtype, whatever the parameters are.
    """

    def init(params: PyTree) -> NadamState:
        zeros = optax.tree.zeros_like(params)
        return NadamState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), zeros, optax.tree.zeros_like(params))

    def update(updates: PyTree, state: NadamState, params: PyTree = None) -> tuple[PyTree, NadamState]:
        count = state.count + 1
        t = _float(count)
        now = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        following = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        kept = state.mu_product * now.astype(jnp.float32)
        product = kept.astype(now.dtype)
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        _, c2 = _corrections(b1, b2, count)
        of_gradient, of_mean = (1 - now) / (1 - product), following / (1 - product * following)

        def direction(g: Array, m: Array, n: Array) -> Array:
            return (_as(of_gradient, g) * g + _as(of_mean, m) * m) / (jnp.sqrt(n / _as(c2, n)) + eps)

        return _map(direction, updates, mu, nu), NadamState(count, kept, mu, nu)

    return optax.GradientTransformation(init, update)


def radam(b1: float | Array, b2: float | Array, eps: float) -> optax.GradientTransformation:
    """torch/optim/radam.py: eps beside the root of the *uncorrected* `nu`. `optax.scale_by_radam`: of the corrected."""

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = state.count + 1
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        c1, c2 = _corrections(b1, b2, count)
        t = _float(count)
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * (1 - c2) / c2
        usable = length > 5
        safe = jnp.where(usable, length, 6)
        rectified = jnp.sqrt((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe))

        def direction(m: Array, n: Array) -> Array:
            adaptive = _as(rectified * jnp.sqrt(c2), n) / (jnp.sqrt(n) + eps)
            return m / _as(c1, m) * jnp.where(usable, adaptive, 1)

        return _map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(_adam_init, update)


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    sum_of_squares: PyTree


def adagrad(lr_decay: float, eps: float, initial: float) -> optax.GradientTransformation:
    """torch/optim/adagrad.py: eps beside the root, and a falling rate. `optax.scale_by_rss`: eps inside."""

    def init(params: PyTree) -> AdagradState:
        return AdagradState(jnp.zeros((), jnp.int32), optax.tree.full_like(params, initial))

    def update(updates: PyTree, state: AdagradState, params: PyTree = None) -> tuple[PyTree, AdagradState]:
        sums = _map(lambda g, s: s + g * g, updates, state.sum_of_squares)
        rate = 1 / (1 + _float(state.count) * lr_decay)
        updates = _map(lambda g, s: _as(rate, g) * g / (jnp.sqrt(s) + eps), updates, sums)
        return updates, AdagradState(state.count + 1, sums)

    return optax.GradientTransformation(init, update)


class AdanState(NamedTuple):
    """State of `adan`; fields as `optax.ScaleByAdanState`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    m: PyTree  # of the gradients
    v: PyTree  # of their differences
    n: PyTree  # of squares
    g: PyTree  # the gradient before


def adan(b1: float | Array, b2: float | Array, b3: float | Array, eps: float) -> optax.GradientTransformation:
    """timm/optim/adan.py: `g + b2 * difference`. `optax.scale_by_adan` has `g + (1 - b2) * difference`."""

    def init(params: PyTree) -> AdanState:
        return AdanState(jnp.zeros((), jnp.int32), *(optax.tree.zeros_like(params) for _ in range(4)))

    def update(updates: PyTree, state: AdanState, params: PyTree = None) -> tuple[PyTree, AdanState]:
        count = state.count + 1
        differences = _map(lambda g, before: jnp.where(state.count == 0, 0, g - before), updates, state.g)
        m = _map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.m)
        v = _map(lambda d, v: b2 * v + (1 - b2) * d, differences, state.v)
        n = _map(lambda g, d, n: b3 * n + (1 - b3) * jnp.square(g + b2 * d), updates, differences, state.n)
        c1, c2, c3 = (_correction(b, count) for b in (b1, b2, b3))

        def direction(m: Array, v: Array, n: Array) -> Array:
            return (m / _as(c1, m) + b2 * v / _as(c2, v)) / (jnp.sqrt(n) / _as(jnp.sqrt(c3), n) + eps)

        return _map(direction, m, v, n), AdanState(count, m, v, n, updates)

    return optax.GradientTransformation(init, update)


def proximal_decay(learning_rate: Schedule, decay: float | Array) -> optax.GradientTransformation:
    """timm/optim/adan.py: the step first, and then `p / (1 + lr * decay)`. To come after the learning rate."""

    def init(params: PyTree) -> RateState:
        return start(learning_rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        shrink = 1 + learning_rate(state[0]) * decay
        updates = _map(lambda u, p: (p + u) / _as(jnp.asarray(shrink), p) - p, updates, params)
        return updates, _next(state)

    return optax.GradientTransformation(init, update)


def added_decay(learning_rate: Schedule, decay: float | Array) -> optax.GradientTransformation:
    """Decoupled decay, `p - lr * decay * p`, beside updates that bear their rate already."""

    def init(params: PyTree) -> RateState:
        return start(learning_rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        share = jnp.asarray(learning_rate(state[0]) * decay)
        updates = _map(lambda u, p: u - _as(share, p) * p, updates, params)
        return updates, _next(state)

    return optax.GradientTransformation(init, update)


def _adam_init(params: PyTree) -> optax.ScaleByAdamState:
    zeros = optax.tree.zeros_like(params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, optax.tree.zeros_like(params))


def _moments(updates: PyTree, mu: PyTree, nu: PyTree, b1: float | Array, b2: float | Array) -> tuple[PyTree, PyTree]:
    return (
        _map(lambda g, m: b1 * m + (1 - b1) * g, updates, mu),
        _map(lambda g, n: b2 * n + (1 - b2) * g * g, updates, nu),
    )


def _corrections(b1: float | Array, b2: float | Array, count: Array) -> tuple[Array, Array]:
    return _correction(b1, count), _correction(b2, count)


def _correction(b: float | Array, count: Array) -> Array:
    """`1 - b**count`, to all digits for b near 1."""
    t = _float(count)
    if isinstance(b, jax.Array):  # moved by a schedule
        return jnp.where(b > 0, -jnp.expm1(t * jnp.log(jnp.where(b > 0, b, 1)).astype(t.dtype)), 1)
    return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)


def _float(count: Array) -> Array:
    return count.astype(jnp.result_type(float))


def _as(scalar: Array, like: Array) -> Array:
    return scalar.astype(like.dtype)


def _map(f: Callable[..., Array], *trees: PyTree) -> PyTree:
    return jax.tree.map(f, *trees)
