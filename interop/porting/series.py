"""Layers named by numbers, each given what all before it gave (`denselayer1`, `denselayer2`, ...), as a loop."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

from interop.porting.bodies import Body, Statement
from interop.porting.classes import Instance
from interop.porting.terms import Term, at, local, locals_in, rewritten
from interop.porting.unify import Different, Holes, matched

_FEWEST = 3
_LOOP = ("n", "m", "k")  # names of what a loop runs over


def grown(instance: Instance) -> Instance:
    """The instance, with such layers as one member (its name has "{}" for the number) and one statement."""
    if instance.evaluation is not None:
        return instance
    statements = instance.body.statements
    for start in range(len(statements)):
        run = _run(statements, start)
        if len(run) < _FEWEST:
            continue
        made = _replaced(instance, start, run)
        if made is not None:
            return grown(made)
    return instance


def _numbered(statement: Statement) -> tuple[str, int] | None:
    value = statement.value
    if len(statement.targets) != 1 or statement.when is not None or not isinstance(value, Term) or value.kind != "call":
        return None
    function, arguments, keywords = value.parts
    if function.kind != "self" or keywords or any(not isinstance(a, Term) or a.kind != "local" for a in arguments):
        return None
    found = re.fullmatch(r"([A-Za-z_]+?)(\d+)", function.parts[0])
    return (found[1], int(found[2])) if found else None


def _run(statements: list[Statement], start: int) -> list[Statement]:
    """Statements from `start` on, each the next layer's call with what all before it gave."""
    first = _numbered(statements[start])
    if first is None:
        return []
    run = [statements[start]]
    given = list(statements[start].value.parts[1])
    for statement in statements[start + 1 :]:
        given.append(local(run[-1].targets[0]))
        if _numbered(statement) != (first[0], first[1] + len(run)) or list(statement.value.parts[1]) != given:
            break
        run.append(statement)
    return run


def _replaced(instance: Instance, start: int, run: list[Statement]) -> Instance | None:
    body = instance.body
    found = _numbered(run[0])
    assert found is not None
    prefix, number = found
    keys = [f"{prefix}{number + i}" for i in range(len(run))]
    member = _series([instance.members[key] for key in keys], number)
    if member is None:
        return None
    initial = run[0].value.parts[1]
    everything = Term("list", (*initial, *(local(s.targets[0]) for s in run)))
    name = f"{run[0].targets[0]}_all"
    own = {s.targets[0] for s in run}

    def to(term: Term) -> Any:
        return local(name) if term == everything else term

    after = [replace(s, value=rewritten(s.value, to)) for s in body.statements[start + len(run) :]]
    output = rewritten(body.output, to)
    if any(one in own for tree in (*(s.value for s in after), output) for one in locals_in(tree)):
        return None  # one of them is read by itself
    key = f"{prefix}{{}}"
    loop = Statement((name,), Term("grow", (at(key), Term("list", initial), len(run), number)), hint="features")
    members = {k: v for k, v in instance.members.items() if k not in keys}
    order = [k if k not in keys else key for k in instance.members]
    members[key] = member
    members = {k: members[k] for k in dict.fromkeys(order)}
    statements = [*body.statements[:start], loop, *after]
    return replace(instance, members=members, body=Body(body.inputs, statements, output))


def _series(constructors: list[Any], number: int) -> Term | None:
    """Instances of one class whose arguments are the same, or grow by the same number."""
    first = constructors[0]
    if any(not isinstance(c, Term) or c.kind != "new" or c.parts[0] != first.parts[0] for c in constructors):
        return None
    values: list[tuple[str, Any]] = []
    for key, value in first.parts[1]:
        column = [dict(c.parts[1])[key] for c in constructors]
        if all(type(v) is type(value) and v == value for v in column):
            values.append((key, value))
            continue
        if any(type(v) is not int for v in column) or len({b - a for a, b in itertools.pairwise(column)}) > 1:
            return None
        values.append((key, Term("affine", (value, column[1] - value))))
    return Term("series", (Term("new", (first.parts[0], tuple(values))), len(constructors), number))


def each(elements: list[Any]) -> list[Any] | None:
    """Elements that differ in a few numbers, as one in a loop over these; None where they are no such thing."""
    if len(elements) < _FEWEST or all(element == elements[0] for element in elements):
        return None
    holes = Holes()
    whole = [_unrolled(element) for element in elements]
    skeleton = holes.opened(whole[0])
    columns: list[dict[int, Any]] = []
    for element in whole:
        values: dict[int, Any] = {}
        try:
            matched(skeleton, element, lambda a, b: a == b, values)
        except Different:
            return None
        columns.append(values)
    varying: dict[tuple[Any, ...], str] = {}
    fills: dict[int, Any] = {}
    for hole in sorted(columns[0]):
        column = tuple(values[hole] for values in columns)
        if all(type(value) is type(column[0]) and value == column[0] for value in column):
            fills[hole] = column[0]
        elif all(type(value) is int for value in column):
            name = varying.setdefault(column, _LOOP[len(varying) % len(_LOOP)])
            fills[hole] = Term("argument", (name,))
        else:
            return None
    if not 0 < len(varying) <= len(_LOOP):
        return None
    rows = tuple(zip(*varying, strict=True)) if len(varying) > 1 else next(iter(varying))
    element = rewritten(skeleton, lambda t: fills[t.parts[0]] if t.kind == "hole" else t)
    return [Term("each", (element, tuple(varying.values()), rows))]


def _unrolled(tree: Any) -> Any:
    """The tree with each of an element's repetitions written out."""

    def to(term: Term) -> Any:
        if term.kind != "call":
            return term
        function, arguments, keywords = term.parts
        found: list[Any] = []
        for item in arguments:
            repeated = isinstance(item, Term) and item.kind == "run" and isinstance(item.parts[1], int)
            found += [item.parts[0]] * item.parts[1] if repeated else [item]
        return Term("call", (function, tuple(found), keywords))

    return rewritten(tree, to)
