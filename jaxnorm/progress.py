"""A progress bar where there is tqdm."""

from collections.abc import Iterable
from typing import Any


def shown(items: Iterable[Any], described: str, progress: bool) -> Iterable[Any]:
    """The items, with a bar if `progress` and tqdm is installed."""
    if not progress:
        return items
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return items
    bar: Iterable[Any] = tqdm(items, desc=described, unit="batch")
    return bar
