"""Flax models by name: `package.module:callable`, or what `jaxnorm import` wrote."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from flax import nnx

from interop.cli.models import found_in
from interop.running import artifact

FLAX_HELP = (
    "package.module:callable that gives an NNX model, or Linen's (module, variables); or what `jaxnorm import` wrote."
)
RENAME_HELP = "PATTERN=REPLACEMENT, from PyTorch's names to the Flax model's; may be repeated."


def flax_model(name: str, title: str = "FLAX") -> Any:
    """The NNX model, or Linen's (module, variables), of that name.

    Raises:
        ImportError, ValueError: for a name that leads to none; `title` is the argument that it was given as.
    """
    if pathlib.Path(name).is_dir():
        return artifact.load(name)
    package, colon, path = name.partition(":")
    if not colon:
        raise ValueError(f"{title} is package.module:callable, or a directory of `jaxnorm import`; found {name}")
    found = found_in(package, path)
    return found if isinstance(found, nnx.Module | tuple) else found()


def parse_rename(texts: Sequence[str]) -> list[tuple[str, str]] | None:
    """`^fc=head` and the like; None for none."""
    pairs = []
    for text in texts:
        pattern, equals, replacement = text.partition("=")
        if not equals:
            raise ValueError(f"--rename {text}: expected PATTERN=REPLACEMENT")
        pairs.append((pattern, replacement))
    return pairs or None
