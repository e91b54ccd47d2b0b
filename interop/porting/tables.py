"""Arrays that are in no state dict (tables of indices, masks, fixed filters), as expressions that make them.

The first that gives the same numbers: a literal, one that is repeated along axes, one of `helpers`' tables of
positions, which are tried for all sizes that the shape leaves open; else the numbers themselves, compressed.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np

from interop.porting import helpers
from interop.porting.terms import Term, call, list_of, method

_LINE = 90  # characters of a literal
_LONGEST = 2500  # characters of a compressed table


def table(array: np.ndarray, dtype: Term) -> Term | None:
    """An expression for an array of that element type; None where there is none of a bearable length."""
    if _short(array):
        return call("jnp.array", _nested(array), dtype)
    return _repeated(array, dtype) or _of_positions(array, dtype) or _compressed(array, dtype)


def _bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _short(array: Any) -> bool:
    return array.size <= _LINE and len(str(array.tolist())) <= _LINE


def shortest(number: Any) -> Any:
    """A number as Python's; of single precision the shortest that rounds to it: 1e-06."""
    return float(str(number)) if isinstance(number, np.float32) else number.item()


def _nested(array: Any) -> Any:
    return list_of(map(_nested, array)) if array.ndim else shortest(array[()])


def _repeated(array: np.ndarray, dtype: Term) -> Term | None:
    """One that is the same all along some of its axes."""
    small = array
    for axis in range(array.ndim):
        first = small.take([0], axis)
        if _bits(np.broadcast_to(first, small.shape)) == _bits(small):
            small = first
    while small.ndim and small.shape[0] == 1:
        small = small[0]
    if not _short(small):
        return None
    return call("jnp.broadcast_to", call("jnp.array", _nested(small), dtype), array.shape)


def _of_positions(array: np.ndarray, dtype: Term) -> Term | None:
    for name, arguments in _candidates(array):
        found = np.asarray(getattr(helpers, name)(*arguments))
        if found.size == array.size and _bits(found.astype(array.dtype)) == _bits(array):
            made = call(name, *arguments)
            return call("jnp.asarray", made if found.shape == array.shape else method(made, "reshape", -1), dtype)
    return None


def _candidates(array: np.ndarray) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if array.dtype.kind == "i":
        for rows, columns in _areas(array):
            for h, w in _factors(columns):
                if rows == columns:
                    yield "relative_positions", (h, w)
                stride = isqrt(-(-columns // rows))
                yield "distances", (h, w) if stride == 1 else (h, w, stride)
            for h, w in _factors(columns - 1) if rows == columns else ():
                yield "relative_positions", (h, w, True)
    elif array.ndim == 3 and array.shape[1] == array.shape[2]:
        away = float(array[array != 0][0])
        for a, b in _factors(array.shape[1]):
            for rows, columns in _factors(array.shape[0]):
                for shift in range(1, max(a, b)):
                    yield (
                        "shifted_windows",
                        (a * rows, b * columns, (a, b), (min(shift, a - 1), min(shift, b - 1)), away),
                    )


def _areas(array: np.ndarray) -> list[tuple[int, int]]:
    """How many positions a table is between."""
    if array.ndim == 2:
        return [(array.shape[0], array.shape[1])]
    side = isqrt(array.size)
    return [(side, side)] if array.ndim == 1 and side * side == array.size else []


def _factors(n: int) -> list[tuple[int, int]]:
    """Pairs with the product n, the squarest first."""
    found = [(a, n // a) for a in range(1, n + 1) if n % a == 0]
    return sorted(found, key=lambda pair: abs(pair[0] - pair[1]))


def _compressed(array: np.ndarray, dtype: Term) -> Term | None:
    narrow = array
    if array.dtype.kind in "iu":
        kinds = (np.uint8, np.uint16, np.int32, np.int64)
        kind = next(k for k in kinds if np.iinfo(k).min <= array.min() and array.max() <= np.iinfo(k).max)
        narrow = array.astype(kind)
    text = base64.b85encode(zlib.compress(np.ascontiguousarray(narrow).tobytes(), 9)).decode()
    if len(text) > _LONGEST:
        return None
    return call("jnp.asarray", call("unpacked", text, narrow.dtype.str, array.shape), dtype)
