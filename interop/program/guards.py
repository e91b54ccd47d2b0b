"""What a program assumes of the sizes of its inputs: `s77 <= 4`, where the model's code asks for the batch size.

torch.export records one branch of such code, and with it the condition under which it was taken. A condition is the
text of a Python expression over the sizes, read by `ast` and computed by the operators named here: nothing else runs.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from interop.errors import ProgramError

if TYPE_CHECKING:
    Size = int
else:  # with the symbolic batch of `jax.export` an expression that counts as one
    Size = Any

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.And: all, ast.Or: any,
}  # fmt: skip
_LONGEST = 100_000  # characters of a condition
_FUNCTIONS: dict[str, Any] = {"max": max, "min": min, "float": float, "int": int, "round": round, "abs": abs} | {
    f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "trunc", "sqrt")
}


def holds(condition: str, sizes: Mapping[str, Size]) -> bool:
    """Whether the condition holds for these sizes.

    >>> holds("s77 % 2 == 0", {"s77": 6})
    True

    Raises:
        ProgramError: if it is no expression of sizes, numbers and the operators known here.
        KeyError: for a size that is not given.
    """
    try:
        return bool(_value(_parsed(condition), sizes))
    except ArithmeticError:  # a division by a size of 0
        return False
    except ProgramError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ProgramError(f"not a condition on sizes: {condition[:200]!r}: {error}") from None


def sizes_in(condition: str) -> frozenset[str]:
    """The names of the sizes that a condition is about. Raises ProgramError as `holds` does."""
    names = _names(_parsed(condition))
    holds(condition, dict.fromkeys(names, 2))
    return names


@functools.lru_cache(maxsize=1024)
def _parsed(condition: str) -> ast.expr:
    if len(condition) > _LONGEST:
        raise ProgramError(f"not a condition on sizes: {condition[:200]!r}... has {len(condition)} characters")
    try:
        return ast.parse(condition, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"not a condition on sizes: {condition[:200]!r}") from error


def _names(tree: ast.expr) -> frozenset[str]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    called |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called)


def _value(node: ast.expr, sizes: Mapping[str, Size]) -> Any:
    def of(*parts: ast.expr) -> list[Any]:
        return [_value(part, sizes) for part in parts]

    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = of(node.left, node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 64 or (isinstance(left, int) and left.bit_length() > 64)):
            raise ProgramError(f"not a condition on sizes: the power {right}")
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](*of(node.operand))
    if isinstance(node, ast.BoolOp):
        return _OPERATORS[type(node.op)](of(*node.values))
    if isinstance(node, ast.Compare) and all(type(op) in _OPERATORS for op in node.ops):
        values = of(node.left, *node.comparators)
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(_OPERATORS[type(op)](left, right) for op, left, right in pairs)
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, sizes) else node.orelse, sizes)
    if isinstance(node, ast.Call) and not node.keywords and (function := _FUNCTIONS.get(ast.unparse(node.func))):
        return function(*of(*node.args))
    raise ProgramError(f"not a condition on sizes: {ast.unparse(node)[:200]!r}")
