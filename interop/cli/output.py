"""What commands print: tables and lines, plain text in a pipe, rich's tables on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def shown(text: str) -> str:
    """Text of a file in printable ASCII: a terminal obeys escape sequences, and not every pipe takes other letters."""
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Prints rows under a header; the first `left` columns to the left, the others, numbers, to the right."""
    lines = [[shown(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(header, lines, left)
        return
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _rich_table(header: Sequence[str], lines: list[list[str]], left: int) -> None:
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for line in lines:
        drawn.add_row(*map(rich.text.Text, line))  # as it is: names may have brackets, rich's markup
    rich.console.Console(highlight=False).print(drawn)


def print_json(value: Any) -> None:
    """Prints a value as JSON; numbers that JSON lacks as text ("nan", "inf"), anything else that it lacks too."""
    print(json.dumps(_jsonable(value), indent=2, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return f"{value}" if getattr(value, "shape", ()) == () else f"array {tuple(value.shape)} {value.dtype}"


def size(count: int) -> str:
    """Bytes as people read them: 18.8 MB."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
