"""Where a learning rate stands: the state of whatever goes by one."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from interop.optimizers.arithmetic import like, mapped
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


def advanced(state: RateState) -> RateState:
    """One step on."""
    return state if isinstance(state, HeldRateState) else type(state)(optax.safe_increment(state[0]))


def scale_by_rate(rate: Schedule, sign: float = -1.0) -> optax.GradientTransformation:
    """`optax.scale_by_schedule` of sign * rate."""

    def init(params: PyTree) -> RateState:
        return start(rate)

    def update(updates: PyTree, state: RateState, params: PyTree = None) -> tuple[PyTree, RateState]:
        factor = sign * jnp.asarray(rate(state[0]))
        return mapped(lambda u: like(factor, u) * u, updates), advanced(state)

    return optax.GradientTransformation(init, update)
