"""Which versions jaxnorm was tried with; docs/versions.md, written by the lanes of noxfile.py, has the whole table."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings

TABLE = "docs/versions.md"
# The lowest and the highest of each that a lane passed with. A test holds them against the table.
TRIED = {
    "torch": ("2.10.0", "2.15.0"),
    "jax": ("0.10.0", "0.12.0.1"),
    "flax": ("0.12.7", "0.12.12"),
}


def first(package: str) -> str:
    """The lowest version that was tried."""
    return TRIED[package][0]


def last(package: str) -> str:
    """The highest version that was tried."""
    return TRIED[package][1]


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: `2.14.0a0+git1` is (2, 14, 0).

    Raises:
        ValueError: for a text that begins with no number.
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    if numbers is None:
        raise ValueError(f"expected a version (2.13.0, say), found {version!r}")
    return tuple(int(n) for n in numbers[0].split("."))


def _minor(version: str) -> tuple[int, ...]:
    return (*release(version), 0)[:2]


def where_torch_stands() -> str:
    """`torch 2.16.0 is newer than this jaxnorm knows`, or older, or known."""
    found = importlib.metadata.version("torch")
    if _minor(found) > _minor(last("torch")):
        return f"torch {found} is newer than this jaxnorm knows"
    if _minor(found) < _minor(first("torch")):
        return f"torch {found} is older than this jaxnorm knows"
    return f"torch {found} is not as this jaxnorm knows it"


@functools.cache
def warn_untried() -> None:
    """Warns, once a process, of a torch, jax or flax whose minor version (2.15, say) lies outside what was tried."""
    found = {package: importlib.metadata.version(package) for package in TRIED}
    outside = [
        f"{package} {version} (tried: {' to '.join(TRIED[package])})"
        for package, version in found.items()
        if not _minor(first(package)) <= _minor(version) <= _minor(last(package))
    ]
    if outside:
        warnings.warn(
            f"jaxnorm was not tried with {', '.join(outside)}; {TABLE} has the versions that its tests pass with. "
            "Compare a result with PyTorch's before you rely on it (jaxnorm verify)",
            UserWarning,
            stacklevel=3,
        )
