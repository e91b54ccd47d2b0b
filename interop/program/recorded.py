"""What an imported model has besides its tree: its description, and how it is to be run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from interop.program.nodes import Model

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The attribute `_interop` of an imported model."""

    model: Model
    compute_dtype: np.dtype | None = None  # None: that of each array
    recompute: tuple[str, ...] = ()  # patterns of the layers that the backward pass computes again
    policy: Callable[..., Any] | None = None  # what is kept of them all the same


def model_of(module: object) -> Model | None:
    """The description of an imported model; None for any other module."""
    recorded = getattr(module, "_interop", None)
    return recorded.model if isinstance(recorded, Recorded) else None
