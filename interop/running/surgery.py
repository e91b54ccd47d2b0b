"""Layers of an imported model that the user put another module in the place of: `model.fc = nnx.Linear(512, 10)`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from flax import nnx

from interop.program.nodes import Model, Program
from interop.program.regions import replaced
from interop.running.layer import Layer, Place


def program_of(root: Layer, model: Model) -> Program:
    """The program of the root's mode, which calls the user's modules where these took the place of recorded ones.

    Raises:
        ValueError: where the record does not say how to call one.
    """
    paths = tuple(replaced_paths(root, model))
    if not paths:
        return model.eval if root.deterministic else model.train
    return _with_modules(model, root.deterministic, paths)


@functools.lru_cache(maxsize=64)
def _with_modules(model: Model, deterministic: bool, paths: tuple[str, ...]) -> Program:
    return replaced(model.eval if deterministic else model.train, paths)


def replaced_paths(root: Layer, model: Model) -> Iterator[str]:
    """The outermost places of recorded layers at which other modules are now."""
    norms = {layer.path for layer in model.batch_norms}

    def look(holder: Layer, prefix: str) -> Iterator[str]:
        for name, child in vars(holder).items():
            path = f"{prefix}{name}"
            if not isinstance(child, nnx.Module) or path not in model.modules:
                continue
            if path in norms and isinstance(child, nnx.BatchNorm):
                continue
            if type(child) is Layer and _belongs(child._interop_place, model, path):
                yield from look(child, f"{path}.")
            else:
                yield path

    yield from look(root, "")


def _belongs(place: Place | None, model: Model, path: str) -> bool:
    return place is not None and place.path == path and place.recorded.model == model
