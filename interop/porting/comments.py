"""Comments, which `ast` has none of: they go through it as calls, and become comments in the text.

In the class of the whole model, what an assignment gives has its shape beside it, where that is another than before:
`x = self.layer1(x)  # (N, 56, 56, 64)`. The first line says for which input.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

from interop.porting.looking import Dim, Size

_MARK = "__comment__"
_LONGEST = 120  # characters of a line


class Shapes:
    """The comments of one `__call__`: `shapes` has those of its locals."""

    def __init__(self, shapes: Mapping[str, tuple[Dim, ...]]) -> None:
        self._shapes = shapes
        self._last = ""

    def first(self, inputs: Iterable[tuple[str, str]]) -> list[ast.stmt]:
        """`# x: (N, 224, 224, 3)`, of inputs as (local, name), if a comment follows that goes by it."""
        found = [f"{name}: {text}" for one, name in inputs if self._last and (text := self._text(one))]
        return [ast.Expr(ast.Call(ast.Name(_MARK), [ast.Constant("; ".join(found))], []))] if found else []

    def beside(self, one: str, value: ast.expr) -> ast.expr:
        """The value of a local, with its shape if that is another than the last."""
        text = self._text(one)
        if not text or text == self._last:
            return value
        self._last = text
        return ast.Call(ast.Name(_MARK), [value, ast.Constant(text)], [])

    def _text(self, one: str) -> str:
        batch, *sizes = self._shapes.get(one, ()) or (0,)
        if batch != Size(1, 0) or len(sizes) < 2 or not all(isinstance(n, int) for n in sizes):
            return ""
        return f"(N, {', '.join(map(str, sizes))})"


def with_comments(line: str) -> str:
    """A line of the text with its comment, if there is room."""
    if alone := re.fullmatch(rf"(\s*){_MARK}\('(.*)'\)", line):
        return f"{alone[1]}# {alone[2]}"
    if not (found := re.fullmatch(rf"(.*?){_MARK}\((.*), '(.*)'\)", line)):
        return line
    whole = f"{found[1]}{found[2]}  # {found[3]}"
    return whole if len(whole) <= _LONGEST else found[1] + found[2]
