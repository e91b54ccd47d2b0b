"""schedule_from_torch: a torch scheduler's rates as an optax schedule that knows where the scheduler stands."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    pass

Schedule = Callable[[ArrayLike], ArrayLike]  # number of steps so far -> rate

_NOT_WATCHED = ("lr", "initial_lr", "params", "param_names", "step", "lr_scale")
_Groups = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class TorchSchedule:
    """The rates of one parameter group from the scheduler's position on: an optax schedule.

    `optax_from_torch`'s chains begin to count at `position`, whatever their optimizer counts. Any other chain counts
    from 0: give it `lambda count: schedule(schedule.position + count)`. Of positions before the hand-over nothing is
    known; their rate is NaN. What the scheduler moves besides the rate is in `moved`, by the group's keys.
    """

    position: int  # optimizer steps up to the hand-over: the scheduler's last_epoch, times `every`
    every: int
    rates: np.ndarray  # of the scheduler's steps from there on
    moved: Mapping[str, np.ndarray] = field(default_factory=dict)  # momentum, betas, weight_decay: likewise

    def __call__(self, count: ArrayLike) -> jax.Array:
        return self._at(self.rates, count)

    def moved_at(self, count: ArrayLike) -> dict[str, jax.Array]:
        """What else the scheduler has set by then."""
        return {key: self._at(table, count) for key, table in self.moved.items()}

    def _at(self, table: np.ndarray, count: ArrayLike) -> jax.Array:
        since = jnp.asarray(count) - self.position
        values = jnp.asarray(table)
        known = values[jnp.clip(since // self.every, 0, len(table) - 1)]
        return jnp.where(since < 0, jnp.nan, known)


def schedule_from_torch(
    scheduler: Any, steps: int, *, every: int = 1, position: int | None = None, moving: bool = False
) -> TorchSchedule | list[TorchSchedule]:
    """The learning rates of a torch or timm scheduler as an optax schedule, a list of them for several groups.

    ```python
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=1000)
    rates = interop.schedule_from_torch(scheduler, steps=1000, moving=True)       # momentum too
    tx = interop.optax_from_torch(optimizer, names=module, model=model, learning_rate=rates)
    ```

    A copy of the scheduler is stepped and what it sets is written down: exact for every scheduler whose rates do not
    depend on what is measured (those of ReduceLROnPlateau do: `plateau_from_torch`). The schedule is a function of the
    scheduler's position, which is its `last_epoch`, not the number of steps that its optimizer has taken: mixed
    precision leaves some of those out while the scheduler steps on. `optax_from_torch` begins there.

    **Arguments:**

    - `scheduler`: of torch.optim.lr_scheduler, at the point of the hand-over, or one of timm.scheduler, which are
      functions of the epoch or of the number of updates (warm-up, cycles and noise included); it is left as it is.
    - `steps`: for how many further optimizer steps. Later ones keep the last rate.
    - `every`: optimizer steps for each step of the scheduler (those of an epoch, say, after which the hand-over is).
    - `position`: of timm's schedulers, which do not know where they are: optimizer steps up to the hand-over, 0 by
      default. Torch's know it themselves.
    - `moving`: follow the scheduler also where it moves momentum, betas or weight decay (OneCycleLR, CyclicLR, timm's
      with `param_group_field="weight_decay"`). `optax_from_torch`'s chains do; a chain of your own sees the rate alone.

    **Returns:** a function (number of steps so far) -> rate with its `position`, or a list of one for each parameter
    group.

    **Raises:**

    - `ValueError`: for ReduceLROnPlateau, for a scheduler that moves more than the rate, unless `moving`, for more
      steps than the scheduler has, and for `steps`, `every` and `position` that are no numbers of steps.
    - `TypeError`: for what is no scheduler.
    """
    for name, value, least in (("steps", steps, 0), ("every", every, 1), ("position", position or 0, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**31:
            raise ValueError(f"{name} is a number of optimizer steps, {least} or more; got {value!r}")
    timms = _is_timms(scheduler)
    if not timms and position is not None:
        raise ValueError("a scheduler of torch knows its position (last_epoch): leave position= out")
    first = (position or 0) if timms else _position(scheduler) * every
    if timms and not scheduler.t_in_epochs and every != 1:
        raise ValueError("this scheduler goes by updates (t_in_epochs=False): every=1")
    if timms and first % every:
        raise ValueError(f"position={first} is in the middle of an epoch of {every} steps")
    count = 1 + -(-steps // every)
    visited = _timms(scheduler, first // every, count) if timms else _torchs(scheduler, count)
    tables: list[dict[str, list[Any]]] = []
    before: list[dict[str, Any]] = []
    for groups in visited:
        if not tables:
            tables, before = [{} for _ in groups], [_others(group) for group in groups]
        for table, group in zip(tables, groups, strict=True):
            for key, value in {"lr": float(group["lr"]), **_others(group)}.items():
                table.setdefault(key, []).append(value)
        moved = {key for old, group in zip(before, groups, strict=True) for key in _moved(old, _others(group))}
        if moved and not moving:
            raise ValueError(
                f"{type(scheduler).__name__} moves {', '.join(sorted(moved))} besides the learning rate, which a "
                "schedule of rates cannot follow. moving=True does, in optax_from_torch's chains; OneCycleLR and "
                "CyclicLR leave it with cycle_momentum=False"
            )
    schedules = [
        TorchSchedule(int(first), int(every), np.asarray(table.pop("lr")), _changing(table)) for table in tables
    ]
    return schedules[0] if len(schedules) == 1 else schedules


def _torchs(scheduler: Any, count: int) -> Iterator[_Groups]:
    """The groups as they are, and after each further step of a copy."""
    scheduler = copy.deepcopy(scheduler)
    groups: _Groups = scheduler.optimizer.param_groups
    yield groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the copy's optimizer takes no steps
        for _ in range(count - 1):
            scheduler.step()
            yield groups


def _is_timms(scheduler: Any) -> bool:
    """timm/scheduler/scheduler.py, `Scheduler`."""
    return hasattr(scheduler, "step_update") and hasattr(scheduler, "param_group_field")


def _timms(scheduler: Any, first: int, count: int) -> Iterator[_Groups]:
    """The groups at each epoch, or before each update, as timm's train.py asks for them."""
    if type(scheduler).__name__ == "PlateauLRScheduler":
        raise ValueError(
            "PlateauLRScheduler's rates depend on what is measured: plateau_from_torch(scheduler.lr_scheduler)"
        )
    scheduler = copy.deepcopy(scheduler)
    groups: _Groups = scheduler.optimizer.param_groups
    step = scheduler.step if scheduler.t_in_epochs else scheduler.step_update
    for t in range(first, first + count):
        step(t)
        yield groups


def _changing(table: Mapping[str, list[Any]]) -> dict[str, np.ndarray]:
    """Those that are not the same all the time."""
    return {key: np.asarray(values) for key, values in table.items() if any(bool(v != values[0]) for v in values)}


def _position(scheduler: Any) -> int:
    """`last_epoch`; a ChainedScheduler's is that of its parts. (SequentialLR has its own, and its parts begin anew.)"""
    parts = getattr(scheduler, "_schedulers", ())
    if type(scheduler).__name__ == "ReduceLROnPlateau":
        raise ValueError("ReduceLROnPlateau's rates depend on what is measured: plateau_from_torch(scheduler)")
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
