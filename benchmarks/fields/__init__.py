"""Models with BatchNorm from fields other than vision's classification, a file a field.

A model is a function that gives the module and its example inputs, registered by `model`:

    @model("speech", source="https://github.com/lordmartian/deep_avsr, audio_only/models")
    def quartznet():
        return QuartzNet(...), (normal(4, 64, 200),)

`source` says whose architecture it is: a package (then the module comes from it, imported inside the function), or the
code or paper that the module follows, written as people write it. Inputs are tensors; floating ones in float64, the
first dimension the batch. Modules are small: seconds to import and to compile.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Listed:
    """One model: its field, its name, where it is from, and the function that builds it."""

    field: str
    name: str
    source: str
    build: Callable[[], tuple[torch.nn.Module, tuple[Any, ...]]]


MODELS: dict[str, Listed] = {}


def model(field: str, source: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a function under `field:its_name`."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        name = f"{field}:{build.__name__}"
        if name in MODELS:
            raise ValueError(f"{name} is registered twice")
        MODELS[name] = Listed(field, build.__name__, source, build)
        return build

    return register


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Integers from 0 to `high` - 1, as tokens and categories are."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def listed() -> dict[str, Listed]:
    """All models, by `field:name`."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    return MODELS
