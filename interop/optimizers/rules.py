"""Update rules of torch.optim and timm.optim that optax defines otherwise, as optax transformations.

Each follows the single-tensor function of the torch file named; state fields bear optax's names (`mu`, `nu`, `trace`).
Every rule gives the direction that is then multiplied by -learning rate.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from interop.optimizers.arithmetic import cautious, correction, decay_rate, floating, like, mapped, norm
from interop.optimizers.rates import RateState, advanced, start
from interop.optimizers.schedules import Schedule
from jaxnorm._typing import Array, Float, Int, PyTree


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
        trace = mapped(lambda g, t: share.astype(g.dtype) * g + decay * t, updates, state.trace)
        if nesterov:
            updates = mapped(lambda g, t: g + decay * t, updates, trace)
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
        updates = mapped(lambda m, n: m / like(c1, m) / (jnp.sqrt(n) / like(jnp.sqrt(c2), n) + eps), mu, nu)
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
        nu_max = mapped(jnp.maximum, state.nu_max, nu)
        c1, c2 = _corrections(b1, b2, count)
        updates = mapped(lambda m, n: m / like(c1, m) / (jnp.sqrt(n) / like(jnp.sqrt(c2), n) + eps), mu, nu_max)
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
        t = floating(count)
        now = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        following = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        kept = state.mu_product * now.astype(jnp.float32)
        product = kept.astype(now.dtype)
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        _, c2 = _corrections(b1, b2, count)
        of_gradient, of_mean = (1 - now) / (1 - product), following / (1 - product * following)

        def direction(g: Array, m: Array, n: Array) -> Array:
            return (like(of_gradient, g) * g + like(of_mean, m) * m) / (jnp.sqrt(n / like(c2, n)) + eps)

        return mapped(direction, updates, mu, nu), NadamState(count, kept, mu, nu)

    return optax.GradientTransformation(init, update)


def radam(b1: float | Array, b2: float | Array, eps: float) -> optax.GradientTransformation:
    """torch/optim/radam.py: eps beside the root of the *uncorrected* `nu`. `optax.scale_by_radam`: of the corrected."""

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count = state.count + 1
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        c1, c2 = _corrections(b1, b2, count)
        t = floating(count)
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * (1 - c2) / c2
        usable = length > 5
        safe = jnp.where(usable, length, 6)
        rectified = jnp.sqrt((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe))

        def direction(m: Array, n: Array) -> Array:
            adaptive = like(rectified * jnp.sqrt(c2), n) / (jnp.sqrt(n) + eps)
            return m / like(c1, m) * jnp.where(usable, adaptive, 1)

        return mapped(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

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
        sums = mapped(lambda g, s: s + g * g, updates, state.sum_of_squares)
        rate = 1 / (1 + floating(state.count) * lr_decay)
        updates = mapped(lambda g, s: like(rate, g) * g / (jnp.sqrt(s) + eps), updates, sums)
        return updates, AdagradState(state.count + 1, sums)

    return optax.GradientTransformation(init, update)


class AdanState(NamedTuple):
    """State of `adan`; fields as `optax.ScaleByAdanState`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    m: PyTree  # of the gradients
    v: PyTree  # of their differences
    n: PyTree  # of squares
    g: PyTree  # the gradient before


def adan(
    b1: float | Array, b2: float | Array, b3: float | Array, eps: float, caution: bool = False
) -> optax.GradientTransformation:
    """timm/optim/adan.py: `g + b2 * difference`. `optax.scale_by_adan` has `g + (1 - b2) * difference`."""

    def init(params: PyTree) -> AdanState:
        return AdanState(jnp.zeros((), jnp.int32), *(optax.tree.zeros_like(params) for _ in range(4)))

    def update(updates: PyTree, state: AdanState, params: PyTree = None) -> tuple[PyTree, AdanState]:
        count = state.count + 1
        differences = mapped(lambda g, before: jnp.where(state.count == 0, 0, g - before), updates, state.g)
        m = mapped(lambda g, m: b1 * m + (1 - b1) * g, updates, state.m)
        v = mapped(lambda d, v: b2 * v + (1 - b2) * d, differences, state.v)
        n = mapped(lambda g, d, n: b3 * n + (1 - b3) * jnp.square(g + b2 * d), updates, differences, state.n)
        c1, c2, c3 = (correction(b, count) for b in (b1, b2, b3))

        def direction(g: Array, m: Array, v: Array, n: Array) -> Array:
            m = cautious(m, g) if caution else m
            return (m / like(c1, m) + b2 * v / like(c2, v)) / (jnp.sqrt(n) / like(jnp.sqrt(c3), n) + eps)

        return mapped(direction, updates, m, v, n), AdanState(count, m, v, n, updates)

    return optax.GradientTransformation(init, update)


def proximal_decay(learning_rate: Schedule, decay: float | Array) -> optax.GradientTransformation:
    """timm/optim/adan.py: the step first, and then `p / (1 + lr * decay)`. To come after the learning rate."""

    def init(params: PyTree) -> RateState:
        return start(learning_rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        shrink = 1 + learning_rate(state[0]) * decay
        updates = mapped(lambda u, p: (p + u) / like(jnp.asarray(shrink), p) - p, updates, params)
        return updates, advanced(state)

    return optax.GradientTransformation(init, update)


def added_decay(
    learning_rate: Schedule, decay: float | Array, group: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Decoupled decay, `p - lr * decay * p` (`decay_rate`), beside updates that bear their rate already."""

    def init(params: PyTree) -> RateState:
        return start(learning_rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        share = decay_rate(jnp.asarray(learning_rate(state[0])), group) * decay
        return mapped(lambda u, p: u - like(share, p) * p, updates, params), advanced(state)

    return optax.GradientTransformation(init, update)


def with_caution(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`cautious` directions of `inner`, by the gradients that it was given."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        directions, state = inner.update(updates, state, params)
        return mapped(cautious, directions, updates), state

    return optax.GradientTransformation(inner.init, update)


def lars_ratio(
    learning_rate: Schedule, decay: float | Array, coefficient: float, eps: float, clip: bool
) -> optax.GradientTransformation:
    """timm/optim/lars.py: `(g + decay p) ratio`, the ratio `coefficient |p| / (|g| + decay |p| + eps)` of the norms.

    1 where a norm is 0; with `clip` (LARC) the ratio over the rate, 1 at most.
    """

    def init(params: PyTree) -> RateState:
        return start(learning_rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        rate = jnp.asarray(learning_rate(state[0]))

        def adapted(g: Array, p: Array) -> Array:
            of_p, of_g = norm(p), norm(g)
            ratio = coefficient * of_p / (of_g + of_p * decay + eps)
            ratio = jnp.where((of_p > 0) & (of_g > 0), ratio, 1)
            return (g + decay * p) * (jnp.minimum(ratio / like(rate, p), 1) if clip else ratio)

        return mapped(adapted, updates, params), advanced(state)

    return optax.GradientTransformation(init, update)


def _adam_init(params: PyTree) -> optax.ScaleByAdamState:
    zeros = optax.tree.zeros_like(params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, optax.tree.zeros_like(params))


def _moments(updates: PyTree, mu: PyTree, nu: PyTree, b1: float | Array, b2: float | Array) -> tuple[PyTree, PyTree]:
    return (
        mapped(lambda g, m: b1 * m + (1 - b1) * g, updates, mu),
        mapped(lambda g, n: b2 * n + (1 - b2) * g * g, updates, nu),
    )


def _corrections(b1: float | Array, b2: float | Array, count: Array) -> tuple[Array, Array]:
    return correction(b1, count), correction(b2, count)
