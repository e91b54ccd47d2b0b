"""The share of an average that an update replaces, `1 - decay`, as a function of the updates so far.

Shares are computed as such, and not as 1 - decay from a decay near 1: that difference has few digits in float32.

| | share of update n = 1, 2, ... |
|---|---|
| `torch.optim.swa_utils.AveragedModel` | `after(0, equal)`, or with a decay `after(0, decaying(decay))` |
| timm, `ModelEmaV3.get_decay` | `after(update_after_step, warming(decaying(decay), ...))`, or without `warming` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

Schedule = Callable[[Any], Any]


def equal_decay(s: Any) -> Any:
    """The decay that averages all updates alike: s / (s + 1)."""
    return s / (s + 1)


def decaying(decay: float | Schedule) -> Schedule:
    """`1 - decay`, of a number or of a schedule of s."""
    if decay is equal_decay:
        return lambda s: 1 / (s.astype(jnp.result_type(float)) + 1)
    return lambda s: 1 - decay(s) if callable(decay) else 1 - decay


def warming(share: Schedule, gamma: float, power: float, min_decay: float) -> Schedule:
    """`(1 + s / gamma) ** -power` as long as that is more than `share`, and at most `1 - min_decay`."""

    def warmed(s: Any) -> Any:
        warmup = (1 + s.astype(jnp.result_type(float)) / gamma) ** -power
        return jnp.minimum(jnp.maximum(warmup, share(s)), 1 - min_decay)

    return warmed


def after(start: int, share: Schedule) -> Schedule:
    """1, a copy, up to update `start + 1`; from then on `share` of the updates since."""

    def begun(n: Any) -> Any:
        s = jnp.maximum(0, jnp.asarray(n) - start - 1)
        return jnp.where(s == 0, 1, share(s)).astype(jnp.result_type(float))

    return begun
