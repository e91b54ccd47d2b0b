"""What an imported model has besides its tree: its description, and how it is to be run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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


def other_values(model: Model, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with the arrays of entries whose values the model's code has read as numbers."""
    return [
        f"{entry.name} is {arrays[entry.name].tolist()}, and the code of {model.name} has read it as the number "
        f"{entry.fixed}, for which alone the record holds. Load the values into the PyTorch module, and import that"
        for entry in model.entries
        if entry.fixed is not None and entry.name in arrays and not entry.holds(arrays[entry.name].tolist())
    ]


def model_of(module: object) -> Model | None:
    """The description of an imported model; None for any other module."""
    recorded = getattr(module, "_interop", None)
    return recorded.model if isinstance(recorded, Recorded) else None
