"""ReduceLROnPlateau: rates that a metric moves, as a state of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from interop.optimizers.rates import HeldRateState
from jaxnorm import TrainState
from jaxnorm._typing import Array, Float, Int


class PlateauState(NamedTuple):
    """Where a plateau scheduler stands; PyTorch's names.

    **Attributes:**

    - `best`: the best metric so far, a floating scalar.
    - `num_bad_epochs`: metrics since then that were no better, int32.
    - `cooldown_counter`: metrics that are still not to count as bad, int32.
    - `last_epoch`: the number of metrics taken, int32.
    - `rates`: the learning rate of each parameter group, (groups,).
    """

    best: Float[Array, ""]
    num_bad_epochs: Int[Array, ""]
    cooldown_counter: Int[Array, ""]
    last_epoch: Int[Array, ""]
    rates: Float[Array, " groups"]


@dataclass(frozen=True, eq=False)
class Plateau:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` as a pure function of its state and a metric.

        better: metric < best * (1 - threshold)        (mode "min", threshold_mode "rel"; the others likewise)
        num_bad_epochs <- 0 if better or in cooldown else num_bad_epochs + 1
        if num_bad_epochs > patience:  rate <- max(rate * factor, min_lr), if that is more than eps less

    ```python
    plateau = interop.plateau_from_torch(scheduler)
    tx = interop.optax_from_torch(optimizer, names=module, model=model, learning_rate=plateau)
    state, at = jaxnorm.TrainState.create(model, tx), plateau.start
    for epoch in range(epochs):
        ...
        at = plateau.update(at, loss)
        state = plateau.apply(state, at)
    scheduler.load_state_dict(scheduler.state_dict() | plateau.state_dict(at))
    ```

    **Attributes:** PyTorch's, but the last.

    - `mode`: "min" or "max": what is better.
    - `factor`: what the rates are multiplied by.
    - `patience`: the number of metrics that may be no better.
    - `threshold`: by how much a better one is better.
    - `threshold_mode`: "rel", a share of the best, or "abs".
    - `cooldown`: the number of metrics after a reduction that do not count as bad.
    - `min_rates`: the lowest rate of each parameter group, (groups,); PyTorch's `min_lrs`.
    - `eps`: the smallest reduction that is made.
    - `start`: the state that the torch scheduler is in: `best`, `num_bad_epochs`, `cooldown_counter`, `last_epoch` and
      `rates`, one for each group.
    """

    mode: str
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    min_rates: np.ndarray
    eps: float
    start: PlateauState

    def update(self, state: PlateauState, metric: ArrayLike) -> PlateauState:
        """The state after one more metric; PyTorch's `scheduler.step(metric)`.

        **Arguments:**

        - `state`: `start`, or what the last update gave.
        - `metric`: what is measured, a scalar.

        **Returns:** the new state.

        **Raises:** nothing of its own.
        """
        metric = jnp.asarray(metric, state.best.dtype)
        sign = 1 if self.mode == "max" else -1
        relative = self.threshold_mode == "rel"
        needed = state.best * (1 + sign * self.threshold) if relative else state.best + sign * self.threshold
        better = metric > needed if self.mode == "max" else metric < needed
        bad = jnp.where(better, 0, state.num_bad_epochs + 1)
        cooling = state.cooldown_counter > 0
        cooldown = jnp.where(cooling, state.cooldown_counter - 1, state.cooldown_counter)
        bad = jnp.where(cooling, 0, bad)
        due = bad > self.patience
        lower = jnp.maximum(state.rates * self.factor, jnp.asarray(self.min_rates, state.rates.dtype))
        reduced = jnp.where(state.rates - lower > self.eps, lower, state.rates)
        return PlateauState(
            best=jnp.where(better, metric, state.best),
            num_bad_epochs=jnp.where(due, 0, bad),
            cooldown_counter=jnp.where(due, self.cooldown, cooldown),
            last_epoch=state.last_epoch + 1,
            rates=jnp.where(due, reduced, state.rates),
        )

    def apply(self, state: TrainState, at: PlateauState) -> TrainState:
        """The training state with the rates of `at` in the chains that `optax_from_torch` made with this plateau.

        **Arguments:**

        - `state`: a `jaxnorm.TrainState`, replicated or not.
        - `at`: what `update` gave.

        **Returns:** the new training state.

        **Raises:** `ValueError` for an optimizer state that holds no such rate.
        """
        found = 0

        def held(x: Any) -> Any:
            nonlocal found
            if not isinstance(x, HeldRateState):
                return x
            found += 1
            rate = at.rates[x.group.reshape(-1)[0]].astype(x.rate.dtype)
            return x._replace(rate=jnp.broadcast_to(rate, x.rate.shape))

        new = jax.tree.map(held, state.opt_state, is_leaf=lambda x: isinstance(x, HeldRateState))
        if not found:
            raise ValueError("this optimizer holds no rate of a plateau: optax_from_torch(..., learning_rate=plateau)")
        return state.replace(opt_state=new)

    def state_dict(self, at: PlateauState) -> dict[str, Any]:
        """What PyTorch's scheduler keeps of it, for its `load_state_dict`.

        **Arguments:**

        - `at`: what `update` gave.

        **Returns:** a dict of numbers: `best`, `num_bad_epochs`, `cooldown_counter`, `last_epoch`, `_last_lr`.

        **Raises:** nothing of its own.
        """
        rates = [float(rate) for rate in at.rates]
        counts = {name: int(getattr(at, name)) for name in ("num_bad_epochs", "cooldown_counter", "last_epoch")}
        return {"best": float(at.best), **counts, "_last_lr": rates}


def plateau_from_torch(scheduler: Any) -> Plateau:
    """A torch scheduler that a metric moves, from where it stands; it is left as it is.

    Of timm's PlateauLRScheduler it is `scheduler.lr_scheduler`; what timm adds, warm-up and noise, is not in it.

    **Arguments:**

    - `scheduler`: a `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    **Returns:** the `Plateau`.

    **Raises:** `TypeError` for what is no ReduceLROnPlateau.
    """
    if type(scheduler).__name__ != "ReduceLROnPlateau":
        raise TypeError(f"expected a ReduceLROnPlateau, found {type(scheduler).__name__}; see schedule_from_torch")
    groups: list[Mapping[str, Any]] = scheduler.optimizer.param_groups
    kind = jnp.result_type(float)
    start = PlateauState(
        best=jnp.asarray(float(scheduler.best), kind),
        num_bad_epochs=jnp.asarray(scheduler.num_bad_epochs, jnp.int32),
        cooldown_counter=jnp.asarray(scheduler.cooldown_counter, jnp.int32),
        last_epoch=jnp.asarray(scheduler.last_epoch, jnp.int32),
        rates=jnp.asarray([float(group["lr"]) for group in groups], kind),
    )
    return Plateau(
        mode=scheduler.mode,
        factor=float(scheduler.factor),
        patience=int(scheduler.patience),
        threshold=float(scheduler.threshold),
        threshold_mode=scheduler.threshold_mode,
        cooldown=int(scheduler.cooldown),
        min_rates=np.asarray(scheduler.min_lrs, float),
        eps=float(scheduler.eps),
        start=start,
    )
