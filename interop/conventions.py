"""Every difference in meaning between PyTorch's BatchNorm and Flax's. The only place that knows both sides.

| | PyTorch | Flax |
|---|---|---|
| momentum | share of the new batch, 0.1 | share of the running statistics that is kept, 0.9 |
| `momentum=None` | cumulative average | none; in jaxnorm the same |
| added to the variance | `eps` | `epsilon` |
| scale, shift | `weight`, `bias` | `scale`, `bias` |
| running statistics | `running_mean`, `running_var` | `mean`, `var` |
| tracked variance | unbiased | biased; in jaxnorm unbiased unless `correction=0` |
| batches seen | `num_batches_tracked` | none; in jaxnorm the same |
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from interop.errors import shown

TORCH_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    }
)
"""PyTorch's name for each variable of a BatchNorm layer."""

FLAX_NAMES: Mapping[str, str] = MappingProxyType({torch: flax for flax, torch in TORCH_NAMES.items()})
"""The inverse of `TORCH_NAMES`."""


class Momentum(float):
    """A momentum that remembers the number of the other convention that it was made from.

    1 - m in floating point has no inverse (all of 1e-17, 1e-18, ... give 1.0), so a converted momentum carries its
    source. It is the plain number in arithmetic, comparison and printing.
    """

    source: float

    def __new__(cls, value: float, source: float) -> Momentum:
        self = super().__new__(cls, value)
        self.source = source
        return self

    def __reduce__(self) -> tuple[type[Momentum], tuple[float, float]]:
        return Momentum, (float(self), self.source)


def flax_momentum(torch_momentum: float | None) -> float | None:
    """The share that is kept, from the share of the new batch: 0.1 -> 0.9. None, the cumulative average, is None on
    both sides.

    The inverse of `torch_momentum`, bit for bit, for every number from 0 to 1.
    """
    return _complement(torch_momentum)


def torch_momentum(flax_momentum: float | None) -> float | None:
    """The share of the new batch, from the share that is kept.

    0.9 -> 0.1. The inverse of `flax_momentum`, bit for bit.
    """
    return _complement(flax_momentum)


def _complement(momentum: float | None) -> float | None:
    """1 - momentum, of the decimal numbers that are written.

    0.1 gives 0.9, where 1 - 0.1 of floats in turn gives 0.09999999999999998.
    """
    if momentum is None:
        return None
    if isinstance(momentum, Momentum):
        return momentum.source
    try:
        number = momentum if isinstance(momentum, str | bytes) else float(momentum)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = momentum
    if not isinstance(number, float):
        raise TypeError(f"a momentum is a number from 0 to 1 or None, found {shown(momentum)}")
    momentum = number
    if not 0 <= momentum <= 1:
        raise ValueError(f"a momentum is a number from 0 to 1, found {momentum!r}")
    return Momentum(float(1 - Fraction(repr(momentum))), momentum)
