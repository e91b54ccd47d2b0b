"""JSON as a file's header or index has it: UTF-8, every name once, nothing that is not JSON."""

import collections
import json
import re
from typing import Any, Final, NoReturn

_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # one without an end too: nothing is read twice


def loads(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`. Raises ValueError, with `what` as its subject, for anything else."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 at byte {error.start}") from None
    # the parser would make objects of many times the text's size; no header or index has an entry this short
    bare = _STRING.sub("", text)
    if bare.count("[") + bare.count("{") > len(text) // 8 + 16:
        raise ValueError(f"{what} is nothing but brackets")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate names {[name for name, count in counts.items() if count > 1][:8]}")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
