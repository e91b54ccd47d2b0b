"""Checks of values in a module's code: `assert`, and an `if` that raises or warns.

    if not torch.isfinite(x).all():
        raise ValueError("x is not finite")

A graph has one branch, and of such code there is only one to record: that which goes on. What was checked is in the
graph too, as `jaxnorm.check(condition, expected, message)`, and is checked where the user asks for it.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import logging
import os
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from interop.tracing import private

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")
_TELLING = frozenset({"print", "warn", "warning", "warn_once", "info", "debug", "error", "log"})
_HERE = os.path.dirname(__file__)
# What stands between the code that asks and what answers: parts of torch, and checkers of types.
_BETWEEN = (
    "jaxtyping" + os.sep,
    *(
        os.path.join("torch", name)
        for name in ("fx" + os.sep, "export" + os.sep, "_export" + os.sep, "__init__.py", "overrides.py", "_tensor.py")
    ),
)


class Question(NamedTuple):
    """A check that asks for the truth of a value: the answer with which the code goes on, and its line."""

    answer: bool
    line: str


def asked() -> Question | None:
    """The check that asks now; None where the code does something else by the value."""
    frame = asking_frame()
    place = None if frame is None else _position(frame)
    if frame is None or place is None:
        return None
    statement = _statement(frame.f_code.co_filename, place)
    if statement is None:
        return None
    wanted = _goes_on(statement)
    answer = None if wanted is None else _of_operand(statement.test, place, wanted)
    return None if answer is None else Question(answer, line_of(frame))


def asking_frame() -> FrameType | None:
    """Where the innermost code stands that is not of this package, nor of what torch calls it by."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        between = any(part in file for part in _BETWEEN) or file.startswith("<@beartype")
        if os.path.dirname(file) != _HERE and not between:
            return frame
        frame = frame.f_back
    return None


def line_of(frame: FrameType | None) -> str:
    """`models/net.py:12: code`, without the machine's folders."""
    if frame is None:
        return "forward"
    file = frame.f_code.co_filename
    code = linecache.getline(file, frame.f_lineno).strip()
    return f"{'/'.join(file.replace(os.sep, '/').split('/')[-2:])}:{frame.f_lineno}: {code}"


Place = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of beginning and end


def _position(frame: FrameType) -> Place | None:
    """Of the expression whose value the frame is at."""
    here = frame.f_lasti // 2
    operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    if "JUMP" in operation or operation in ("TO_BOOL", "UNARY_NOT"):
        here -= 1  # what computes the value; Python 3.11 gives a jump the whole statement's place
    line, end, column, end_column = list(frame.f_code.co_positions())[here]
    if line is None or end is None or column is None or end_column is None:
        return None
    return (line, column), (end, end_column)


@functools.lru_cache(maxsize=32)
def _tree(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError, RecursionError):
        return None


def _encloses(node: ast.expr, place: Place) -> bool:
    begin, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return begin <= place[0] and place[1] <= end


def _statement(file: str, place: Place) -> ast.If | ast.Assert | None:
    """The innermost one whose test has the place in it."""
    tree = _tree(file)
    nodes = list(ast.walk(tree)) if tree else []
    around = [node for node in nodes if isinstance(node, (ast.If, ast.Assert)) and _encloses(node.test, place)]
    caught = any(
        part is around[-1]
        for node in nodes
        if around and isinstance(node, ast.Try) and not all(_stops(handler.body) for handler in node.handlers)
        for statement in node.body
        for part in ast.walk(statement)
    )
    return around[-1] if around and not caught else None


def _goes_on(statement: ast.If | ast.Assert) -> bool | None:
    """The truth of the test with which the code goes on; None if it does so with both."""
    if isinstance(statement, ast.Assert):
        return True
    if _stops(statement.body) or (_only_tells(statement.body) and not statement.orelse):
        return False
    return True if _stops(statement.orelse) else None


def _stops(body: list[ast.stmt]) -> bool:
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _stops(last.body) and _stops(last.orelse)
    return isinstance(last, ast.Raise)


def _only_tells(body: list[ast.stmt]) -> bool:
    """Whether all it does is to print, to warn or to log."""

    def tells(statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            function = statement.value.func
            return _name(function) in _TELLING
        return isinstance(statement, ast.Pass)

    return all(tells(statement) for statement in body)


def _name(function: ast.expr) -> str:
    """The last part of the name that a function is called by."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _of_operand(test: ast.expr, place: Place, wanted: bool) -> bool | None:
    """What the operand at the place has to be for the whole test to be `wanted`, whatever its other operands are."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _of_operand(test.operand, place, not wanted)
    if isinstance(test, ast.BoolOp):
        operand = next((value for value in test.values if _encloses(value, place)), None)
        return None if operand is None else _of_operand(operand, place, wanted)
    if isinstance(test, ast.NamedExpr):
        return _of_operand(test.value, place, wanted)
    called = _name(test.func) if isinstance(test, ast.Call) else ""
    exact = (test.lineno, test.col_offset) == place[0] and (test.end_lineno, test.end_col_offset) == place[1]
    return wanted if exact or called == "bool" else None


@functools.cache
def _operation() -> Callable[[torch.Tensor, bool, str], torch.Tensor]:
    import torch

    def check(condition: torch.Tensor, expected: bool, message: str) -> torch.Tensor:
        raise RuntimeError("jaxnorm::check stands for a check of values in a traced graph, and cannot run in PyTorch")

    schema = "(Tensor condition, bool expected, str message) -> Tensor"  # one with no result counts as one with effects
    custom = torch.library.custom_op("jaxnorm::check", check, mutates_args=(), schema=schema)
    custom.register_fake(lambda condition, expected, message: torch.empty_like(condition))
    private.keep(torch.ops.jaxnorm.check.default)
    return custom


class Checks:
    """The checks of one trace."""

    def __init__(self) -> None:
        self._lines: dict[str, bool] = {}  # and whether they are in the graph

    def record(self, condition: torch.Tensor, expected: bool, message: str) -> None:
        """A check of a tensor with one element."""

        self._lines[message] = True
        _operation()(condition, expected, message)

    def drop(self, message: str) -> None:
        """A check that no graph can have."""
        self._lines.setdefault(message, False)

    def report(self, mode: str) -> None:
        """Says what became of them."""
        for kept, fate in (
            (True, "does so under jax.experimental.checkify.checkify alone"),
            (False, "does not"),
        ):
            # Code that PyTorch writes, as for sizes that depend on values, has no file.
            lines = [line for line, recorded in self._lines.items() if recorded is kept and not line.startswith("<")]
            if lines:
                shown = "; ".join(lines)
                logger.warning("forward in %s mode checks values; the imported model %s: %s", mode, fate, shown)
