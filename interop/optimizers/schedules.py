"""schedule_from_torch: a torch scheduler's rates as an optax schedule."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from interop.optimizers.chains import Schedule

if TYPE_CHECKING:
    import torch


def schedule_from_torch(
    scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int, *, every: int = 1
) -> Schedule | list[Schedule]:
    """The learning rates of a torch scheduler as an optax schedule, a list of them for several parameter groups.

    A copy of the scheduler is stepped and its rates are written down: exact for every scheduler whose rates do not
    depend on what is measured (ReduceLROnPlateau's do).

    **Arguments:**

    - `scheduler`: at the point of the hand-over; it is left as it is.
    - `steps`: for how many further optimizer steps. Later ones keep the last rate.
    - `every`: optimizer steps for each step of the scheduler (those of an epoch, say).
    """
    if type(scheduler).__name__ == "ReduceLROnPlateau":
        raise ValueError("ReduceLROnPlateau's rates depend on what is measured; there is no schedule to be had from it")
    start = scheduler.last_epoch * every
    scheduler = copy.deepcopy(scheduler)
    rates = [[float(group["lr"]) for group in scheduler.optimizer.param_groups]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the copy's optimizer takes no steps
        for _ in range(-(-steps // every)):
            scheduler.step()
            rates.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
    tables = np.asarray(rates).T

    def schedule(table: np.ndarray) -> Schedule:
        return lambda count: jnp.asarray(table)[jnp.clip((count - start) // every, 0, len(table) - 1)]

    schedules = [schedule(table) for table in tables]
    return schedules[0] if len(schedules) == 1 else schedules
