"""A rule for one parameter, whose state has PyTorch's own names, as an optax transformation.

Rules whose state depends on the learning rate, on the parameter, or on more than one can tell from optax's names are
written so: as a function of a parameter's gradient, value and state, in the order of PyTorch's `step()`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from interop.optimizers.rates import RateState, advanced, start
from interop.optimizers.schedules import Schedule
from jaxnorm._typing import Array, Int, PyTree


class EntriesState(NamedTuple):
    """State of `by_entries`."""

    count: Int[Array, ""]  # type: ignore[assignment]
    rate: RateState
    entries: dict[str, PyTree]  # by the names in PyTorch's state; arrays like the parameters, or one number for each


class Now(NamedTuple):
    """Which step a rule is to make."""

    step: Int[Array, ""]  # from 1
    rate: Array


Entries: TypeAlias = dict[str, Array]
# Gradient, parameter, its state, which step: what is added to the parameter, and the state after.
Rule: TypeAlias = Callable[[Array, Array, Entries, Now], tuple[Array, Entries]]
# A parameter and its first rate: what its state begins with.
Initial: TypeAlias = Callable[[Array, Array], Array]


def zeros(p: Array, rate: Array) -> Array:
    """An entry like its parameter."""
    return jnp.zeros_like(p)


def by_entries(
    rule: Rule, initial: Mapping[str, Initial], rate: Schedule, axes: tuple[int, ...] | None = None
) -> optax.GradientTransformation:
    """The transformation that makes the steps of `rule`; what it gives is added to the parameters as it is.

    **Arguments:**

    - `rule`: in PyTorch's layout.
    - `initial`: by the state's entries.
    - `axes`: where the model keeps its arrays turned, `jnp.transpose(array, axes)` is PyTorch's.
    """

    def init(params: PyTree) -> EntriesState:
        at = start(rate)
        first = jnp.asarray(rate(at[0]))
        entries = {name: jax.tree.map(lambda p, f=f: f(p, first), params) for name, f in initial.items()}
        return EntriesState(jnp.zeros((), jnp.int32), at, entries)

    def update(updates: PyTree, state: EntriesState, params: PyTree = None) -> tuple[PyTree, EntriesState]:
        if params is None:
            raise ValueError("this rule goes by the parameters: tx.update(gradients, state, params)")
        count = optax.safe_increment(state.count)
        now = Now(count, jnp.asarray(rate(state.rate[0])))
        gradients, tree = jax.tree.flatten(updates)
        values = jax.tree.leaves(params)
        kept = {name: jax.tree.leaves(of_all) for name, of_all in state.entries.items()}
        made = []
        for i, (g, p) in enumerate(zip(gradients, values, strict=True)):
            made.append(_turned(rule, g, p, {name: of_all[i] for name, of_all in kept.items()}, now, axes))
        entries = {name: jax.tree.unflatten(tree, [after[name] for _, after in made]) for name in kept}
        return jax.tree.unflatten(tree, [u for u, _ in made]), EntriesState(count, advanced(state.rate), entries)

    return optax.GradientTransformation(init, update)


def _turned(
    rule: Rule, g: Array, p: Array, entries: Entries, now: Now, axes: tuple[int, ...] | None
) -> tuple[Array, Entries]:
    """The rule on arrays in PyTorch's layout; dtypes stay as they are."""
    there = axes if axes is not None and axes != tuple(range(p.ndim)) else None
    back = None if there is None else tuple(sorted(range(len(there)), key=there.__getitem__))

    def turn(x: Array, by: tuple[int, ...] | None) -> Array:
        return x if by is None or not x.ndim else jnp.transpose(x, by)

    u, after = rule(turn(g, there), turn(p, there), {name: turn(x, there) for name, x in entries.items()}, now)
    kept = {name: turn(x, back).astype(entries[name].dtype) for name, x in after.items()}
    return turn(u, back).astype(g.dtype), kept
