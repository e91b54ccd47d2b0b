"""JSON as a file's header or index has it: UTF-8, every name once, nothing that is not JSON."""

import collections
import json
from typing import Any, NoReturn

from interop.files.budget import Budget


def loads(content: bytes, what: str, budget: Budget | None = None) -> dict[str, Any]:
    """The JSON object in `content`. Raises ValueError, with `what` as its subject, for anything else.

    What the parser makes of it is charged to the budget before it is made: an object of two characters takes 64 bytes.
    """
    if budget is not None:
        objects, lists, keys, items = (content.count(mark) for mark in (b"{", b"[", b":", b","))  # in texts too, few
        texts = (1 if content.isascii() else 5) * len(content)
        budget.spend(memory=150 * objects + 72 * lists + 130 * keys + 40 * items + texts, steps=keys + items)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{what} is nested more deeply than one can be") from None
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [name[:80] for name, count in counts.items() if count > 1]
        raise ValueError(f"duplicate names {twice[:8]}")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
