"""schedule_from_torch: a torch scheduler's rates as an optax schedule that knows where the scheduler stands."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    import torch

Schedule = Callable[[ArrayLike], ArrayLike]  # number of steps so far -> rate

_NOT_WATCHED = ("lr", "initial_lr", "params", "param_names", "step")


@dataclass(frozen=True, eq=False)
class TorchSchedule:
    """The rates of one parameter group from the scheduler's position on: an optax schedule.

    `optax_from_torch`'s chains begin to count at `position`, whatever their optimizer counts. Any other chain counts
    from 0: give it `lambda count: schedule(schedule.position + count)`. Of positions before the hand-over nothing is
    known; their rate is NaN.
    """

    position: int  # optimizer steps up to the hand-over: the scheduler's last_epoch, times `every`
    every: int
    rates: np.ndarray  # of the scheduler's steps from there on

    def __call__(self, count: ArrayLike) -> jax.Array:
        since = jnp.asarray(count) - self.position
        rates = jnp.asarray(self.rates)
        known = rates[jnp.clip(since // self.every, 0, len(self.rates) - 1)]
        return jnp.where(since < 0, jnp.nan, known)


def schedule_from_torch(
    scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int, *, every: int = 1
) -> TorchSchedule | list[TorchSchedule]:
    """The learning rates of a torch scheduler as an optax schedule, a list of them for several parameter groups.

    A copy of the scheduler is stepped and its rates are written down: exact for every scheduler whose rates do not
    depend on what is measured (ReduceLROnPlateau's do). The schedule is a function of the scheduler's position, which
    is its `last_epoch`, not the number of steps that its optimizer has taken: mixed precision leaves some of those out
    while the scheduler steps on. `optax_from_torch` begins there.

    **Arguments:**

    - `scheduler`: at the point of the hand-over; it is left as it is.
    - `steps`: for how many further optimizer steps. Later ones keep the last rate.
    - `every`: optimizer steps for each step of the scheduler (those of an epoch, say, after which the hand-over is).

    **Raises:** `ValueError` for ReduceLROnPlateau, for a scheduler that moves momentum or another hyperparameter too
    (OneCycleLR and CyclicLR, unless `cycle_momentum=False`), for more steps than the scheduler has, and for `steps`
    and `every` that are no numbers of steps; `TypeError` for what is no scheduler of torch.optim.
    """
    for name, value, least in (("steps", steps, 0), ("every", every, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**31:
            raise ValueError(f"{name} is a number of optimizer steps, {least} or more; got {value!r}")
    position = _position(scheduler) * every
    scheduler = copy.deepcopy(scheduler)
    groups = scheduler.optimizer.param_groups
    before = [_others(group) for group in groups]
    rates = [[float(group["lr"]) for group in groups]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the copy's optimizer takes no steps
        for _ in range(-(-steps // every)):
            scheduler.step()
            rates.append([float(group["lr"]) for group in groups])
            moved = {key for old, group in zip(before, groups, strict=True) for key in _moved(old, _others(group))}
            if moved:
                raise ValueError(
                    f"{type(scheduler).__name__} moves {', '.join(sorted(moved))} besides the learning rate, which a "
                    "schedule of rates cannot follow. OneCycleLR and CyclicLR leave it with cycle_momentum=False"
                )
    schedules = [TorchSchedule(int(position), int(every), table) for table in np.asarray(rates).T]
    return schedules[0] if len(schedules) == 1 else schedules


def _position(scheduler: Any) -> int:
    """`last_epoch`; a ChainedScheduler's is that of its parts. (SequentialLR has its own, and its parts begin anew.)"""
    parts = getattr(scheduler, "_schedulers", ())
    if type(scheduler).__name__ == "ReduceLROnPlateau":
        raise ValueError("ReduceLROnPlateau's rates depend on what is measured; there is no schedule to be had from it")
    if not hasattr(getattr(scheduler, "optimizer", None), "param_groups"):
        raise TypeError(f"scheduler is one of torch.optim.lr_scheduler; got {type(scheduler).__name__}")
    found = {_position(part) for part in parts}
    if hasattr(scheduler, "last_epoch"):
        found = {scheduler.last_epoch}
    if len(found) != 1 or not all(isinstance(at, int) for at in found):
        raise ValueError(
            f"{type(scheduler).__name__} does not say where it stands: as its last_epoch it has "
            f"{sorted(found) or 'none'}"
        )
    return int(found.pop())


def _others(group: Mapping[str, Any]) -> dict[str, Any]:
    """All but the rate. Copies: a scheduler writes into hyperparameters that are tensors."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in _NOT_WATCHED}


def _moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in now if key not in before or bool(before[key] != now[key])]
