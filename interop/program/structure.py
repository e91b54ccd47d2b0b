"""Nested arguments and results, written as plain data: what a call takes, and what it returns.

A structure is JSON-like: `("tuple", [...])`, `("list", [...])`, `("dict", [[key, item], ...])`, `("named", type name,
fields, [...])` or a leaf. Named tuples and dataclasses come back as named tuples with the same fields, so that
results keep their attributes and need none of the classes that PyTorch code defined.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def named_type(name: str, fields: tuple[str, ...]) -> type:
    """The named tuple that stands for a class of results.

    One class for one name and fields, as JAX's tree functions expect.
    """
    return collections.namedtuple(name, fields, rename=True)


def build(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """The Python objects that `structure` describes, with `leaf` applied to its leaves."""
    kind, *rest = structure
    if kind == "leaf":
        return leaf(rest[0])
    if kind == "tuple":
        return tuple(build(item, leaf) for item in rest[0])
    if kind == "list":
        return [build(item, leaf) for item in rest[0]]
    if kind == "dict":
        return {key: build(item, leaf) for key, item in rest[0]}
    name, fields, items = rest
    return named_type(name, tuple(fields))(*(build(item, leaf) for item in items))


def match(structure: Any, value: Any, path: str, leaf: Callable[[Any, Any, str], None], problems: list[str]) -> None:
    """Calls `leaf(described, found, path)` for each leaf of `structure` and what `value` has there.

    Collects where they differ.
    """
    kind, *rest = structure
    if kind == "leaf":
        leaf(rest[0], value, path)
        return
    if kind == "dict":
        keys = [key for key, _ in rest[0]]
        if not isinstance(value, dict) or set(value) != set(keys):
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            problems.append(f"{path}: expected a dict with the keys {keys}, found {found}")
            return
        for key, item in rest[0]:
            match(item, value[key], f"{path}[{key!r}]", leaf, problems)
        return
    items = rest[-1]
    if not isinstance(value, (tuple, list)) or len(value) != len(items):
        found = f"{len(value)} items" if isinstance(value, (tuple, list)) else type(value).__name__
        problems.append(f"{path}: expected a {kind} of {len(items)} items, found {found}")
        return
    for index, item in enumerate(items):
        match(item, value[index], f"{path}[{index}]", leaf, problems)
