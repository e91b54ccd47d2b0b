"""What a file says beside its weights, shown: it may be anything, of any size, and shared or in itself many times."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

_ITEMS: Final = 20  # of a list or dict that are shown as text,
_LISTED: Final = 10_000  # and of all lists in one another as JSON
_BITS: Final = 4096  # of a number that is shown with its digits


def brief(value: object, levels: int = 2) -> str:
    """A value as short text: arrays by shape and dtype, dicts by their keys, lists by their first items."""
    if isinstance(value, np.ndarray | np.generic):
        if value.ndim == 0 and value.dtype.kind in "biufc":
            return str(value.item())
        return f"array {value.shape} {value.dtype}"
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return str(value) if isinstance(value, str) else repr(value)[:200]
    if levels == 0 or isinstance(value, set | frozenset):
        return f"{type(value).__name__} of {len(value)}"
    shown = [brief(item, levels - 1) for _, item in zip(range(_ITEMS), value, strict=False)]
    text = ", ".join(shown) + ", ..." * (len(value) > _ITEMS)
    return f"{{{text}}}" if isinstance(value, dict) else text


def as_json(value: object) -> Any:
    """A value as JSON can hold it: text, numbers and lists as they are, anything else as `brief` shows it."""
    return _listed(value, [_LISTED], 8)


def _listed(value: object, room: list[int], levels: int) -> Any:
    room[0] -= 1
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 and value.dtype.kind in "biuf":
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and value.bit_length() <= _BITS:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, list | tuple) and levels and len(value) <= room[0]:
        return [_listed(item, room, levels - 1) for item in value]
    room[0] -= _ITEMS
    return brief(value, 1 if room[0] > 0 else 0)
