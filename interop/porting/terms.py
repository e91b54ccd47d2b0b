"""Expressions of the source that is written, as data: made by `printers`, compared by `unify.py`, printed by `ast`.

A term is a kind and parts, which are terms or constants. Constants are what instances of one class may differ in.

| kind | parts | source |
|---|---|---|
| local | name | a value of the forward pass, under a name that is unique in the program |
| self | path | what the module has at PyTorch's path |
| name | dotted | `nnx.relu` |
| argument | name | an argument of `__init__` |
| call | function, arguments, keywords | `f(a, k=b)` |
| attribute | object, name | `a.name` |
| index | object, items | `a[i, j]` |
| slice | start, stop, step | `i:j:k` |
| binary, compare | operator, a, b | `a + b` |
| unary | operator, a | `-a` |
| tuple, list | items | `(a, b)` |
| dict | keys and values | `{"a": b}` |
| function | local's name, body | `lambda x: ...` |
| run | element, count | `*(element for _ in range(count))` |
| each | element, names, rows | `element for names in rows` |
| affine | start, step | `start + step * i` |
| series | element, count, first number | layers named by numbers: `series.py` |
| grow | layers, list, count, first number | a loop in which each layer is given what all before it gave |
| hole | number | where instances of a class differ |
"""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Constant = int | float | str | bool | None


@dataclass(frozen=True)
class Term:
    """An expression."""

    kind: str
    parts: tuple[Any, ...]


def local(name: str) -> Term:
    """A value of the forward pass."""
    return Term("local", (name,))


def name(dotted: str) -> Term:
    """A name of a module that the source imports."""
    return Term("name", (dotted,))


def at(path: str) -> Term:
    """What the module has at a path of PyTorch's."""
    return Term("self", (path,))


def call(function: Term | str, *arguments: Any, **keywords: Any) -> Term:
    """`function(*arguments, **keywords)`."""
    made = name(function) if isinstance(function, str) else function
    return Term("call", (made, arguments, tuple(keywords.items())))


def method(of: Any, called: str, *arguments: Any, **keywords: Any) -> Term:
    """`of.called(*arguments)`."""
    return call(Term("attribute", (of, called)), *arguments, **keywords)


def index(of: Any, *items: Any) -> Term:
    """`of[items]`."""
    return Term("index", (of, items))


def slice_of(start: Any = None, stop: Any = None, step: Any = None) -> Term:
    """`start:stop:step`."""
    return Term("slice", (start, stop, step))


def binary(operator: str, a: Any, b: Any) -> Term:
    """`a operator b`."""
    return Term("binary", (operator, a, b))


def compare(operator: str, a: Any, b: Any) -> Term:
    """`a operator b`, of a comparison."""
    return Term("compare", (operator, a, b))


def unary(operator: str, a: Any) -> Term:
    """`operator a`."""
    return Term("unary", (operator, a))


def tuple_of(items: Any) -> Term:
    """`(a, b)`."""
    return Term("tuple", tuple(items))


def list_of(items: Any) -> Term:
    """`[a, b]`."""
    return Term("list", tuple(items))


def rewritten(tree: Any, function: Callable[[Term], Any]) -> Any:
    """The tree with `function` applied to each term, innermost first."""
    if isinstance(tree, tuple):
        return tuple(rewritten(item, function) for item in tree)
    if isinstance(tree, Term):
        return function(Term(tree.kind, rewritten(tree.parts, function)))
    return tree


def terms_in(tree: Any) -> Iterator[Term]:
    """Every term of a tree, outermost first."""
    if isinstance(tree, tuple):
        for item in tree:
            yield from terms_in(item)
    elif isinstance(tree, Term):
        yield tree
        yield from terms_in(tree.parts)


def locals_in(tree: Any) -> list[str]:
    """The locals that a tree reads, each once, in order."""
    bound = {term.parts[0] for term in terms_in(tree) if term.kind == "function"}
    found = dict.fromkeys(term.parts[0] for term in terms_in(tree) if term.kind == "local")
    return [one for one in found if one not in bound]


def substituted(tree: Any, values: dict[str, Any]) -> Any:
    """The tree with locals replaced."""
    return rewritten(tree, lambda t: values.get(t.parts[0], t) if t.kind == "local" else t)


_BINARY = {"+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "//": ast.FloorDiv, "%": ast.Mod, "**": ast.Pow,
           "@": ast.MatMult, "&": ast.BitAnd, "|": ast.BitOr, "^": ast.BitXor}  # fmt: skip
_COMPARE = {"==": ast.Eq, "!=": ast.NotEq, "<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "is": ast.Is,
            "is not": ast.IsNot}  # fmt: skip
_UNARY = {"-": ast.USub, "~": ast.Invert, "not": ast.Not}


def expression(term: Any, of_self: Callable[[str], ast.expr]) -> ast.expr:
    """The expression that a term is; `of_self` says what stands for a path of the module."""

    def to(item: Any) -> ast.expr:
        return expression(item, of_self)

    if isinstance(term, tuple):
        return ast.Tuple([to(item) for item in term])
    if not isinstance(term, Term):
        return constant(term)
    parts = term.parts
    match term.kind:
        case "local" | "argument":
            return ast.Name(parts[0])
        case "self":
            return of_self(parts[0])
        case "name":
            return dotted(parts[0])
        case "call":
            keywords = [ast.keyword(key, to(value)) for key, value in parts[2]]
            return ast.Call(to(parts[0]), [to(item) for item in parts[1]], keywords)
        case "attribute":
            return ast.Attribute(to(parts[0]), parts[1])
        case "index":
            items = [to(item) for item in parts[1]]
            return ast.Subscript(to(parts[0]), items[0] if len(items) == 1 else ast.Tuple(items))
        case "slice":
            return ast.Slice(*(None if item is None else to(item) for item in parts))
        case "binary":
            return ast.BinOp(to(parts[1]), _BINARY[parts[0]](), to(parts[2]))
        case "compare":
            return ast.Compare(to(parts[1]), [_COMPARE[parts[0]]()], [to(parts[2])])
        case "unary":
            return ast.UnaryOp(_UNARY[parts[0]](), to(parts[1]))
        case "and":
            return ast.BoolOp(ast.And(), [to(item) for item in parts])
        case "or":
            return ast.BoolOp(ast.Or(), [to(item) for item in parts])
        case "tuple":
            return ast.Tuple([to(item) for item in parts])
        case "list":
            items = [to(item) for item in parts]
            if len(items) == 1 and isinstance(items[0], ast.Starred) and isinstance(items[0].value, ast.GeneratorExp):
                return ast.ListComp(items[0].value.elt, items[0].value.generators)
            return ast.List(items)
        case "dict":
            return ast.Dict([constant(key) for key, _ in parts], [to(value) for _, value in parts])
        case "function":
            arguments = ast.arguments([], [ast.arg(parts[0])], None, [], [], None, [])
            return ast.Lambda(arguments, to(parts[1]))
        case "each":
            names: ast.expr = ast.Name(parts[1][0])
            if len(parts[1]) > 1:
                names = ast.Tuple([ast.Name(one) for one in parts[1]])
            loop = ast.comprehension(names, to(parts[2]), [], 0)
            return ast.Starred(ast.GeneratorExp(to(parts[0]), [loop]))
        case "affine":
            grown = ast.BinOp(to(parts[1]), ast.Mult(), ast.Name("i"))
            return ast.BinOp(to(parts[0]), ast.Add(), grown)
        case "run":
            loop = ast.comprehension(ast.Name("_"), ast.Call(ast.Name("range"), [to(parts[1])], []), [], 0)
            return ast.Starred(ast.GeneratorExp(to(parts[0]), [loop]))
    raise AssertionError(f"a term of the kind {term.kind}")


def constant(value: Any) -> ast.expr:
    """A constant as source: tuples too, and numbers that have no literal."""
    if isinstance(value, (tuple, list)):
        items = [constant(item) for item in value]
        return ast.Tuple(items) if isinstance(value, tuple) else ast.List(items)
    if isinstance(value, float) and not math.isfinite(value):
        infinite = dotted("jnp.nan" if math.isnan(value) else "jnp.inf")
        return ast.UnaryOp(ast.USub(), infinite) if value < 0 else infinite
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def dotted(path: str) -> ast.expr:
    """`a.b.c`."""
    first, *rest = path.split(".")
    found: ast.expr = ast.Name(first)
    for part in rest:
        found = ast.Attribute(found, part)
    return found


def is_attribute(word: str) -> bool:
    """Whether a word can come after a dot."""
    return word.isidentifier() and not keyword.iskeyword(word)
