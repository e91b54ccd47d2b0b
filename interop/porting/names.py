"""Names of local variables: what PyTorch's code calls them, and a name again where what had it is read no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from interop.porting import helpers
from interop.porting.bodies import Body, Statement
from interop.porting.terms import Term, index, is_attribute, local, locals_in, rewritten, substituted, terms_in

_LONGEST = 70  # characters of a statement that takes another into it
_FURTHEST = 12  # statements that one is taken over
_SPARE = ("x", "y", "z", "u", "v", "w")


class Names:
    """The names of a body's locals."""

    def __init__(self, body: Body, inputs: Sequence[str]) -> None:
        self.body = Body(body.inputs, _nested(body), body.output)
        self.of: dict[str, str] = {}
        self._last: dict[str, int] = {}
        end = len(self.body.statements)
        for i, statement in enumerate(self.body.statements):
            for one in locals_in(statement.value):
                self._last[one] = i
            if statement.source is not None and statement.when is not None:
                self._last[statement.source] = max(i, self._last.get(statement.source, i))
        for one in locals_in(self.body.output):
            self._last[one] = end
        self._inputs(inputs)
        self._made: list[tuple[Statement, Any, str | None]] = []
        for i, statement in enumerate(self.body.statements):
            value = self.renamed(statement.value)
            conditional = self._name(i, statement)
            self._made.append((statement, value, conditional))

    def statements(self) -> Iterator[tuple[Statement, Any, str | None]]:
        """The statements, their values by name, and where a statement is an expression with a condition, what it is
        otherwise."""
        yield from self._made

    def renamed(self, tree: Any) -> Any:
        """A term with the names that there are now."""
        return rewritten(
            tree, lambda t: local(self.of[t.parts[0]]) if t.kind == "local" and t.parts[0] in self.of else t
        )

    def _inputs(self, names: Sequence[str]) -> None:
        taken: set[str] = set()
        for i, one in enumerate(self.body.inputs):
            wanted = names[i] if i < len(names) else _SPARE[i] if i < len(_SPARE) else f"x{i}"
            wanted = "inputs" if one.endswith("*") else wanted
            wanted = {"input": "x", "self": "x", **({} if one.endswith("*") else {"inputs": "x"})}.get(wanted, wanted)
            while wanted in taken or not is_attribute(wanted):
                wanted += "_"
            taken.add(wanted)
            self.of[one] = wanted

    def _name(self, i: int, statement: Statement) -> str | None:
        alive = {self.of[one] for one, last in self._last.items() if last > i and one in self.of}
        if statement.when is not None and statement.source is not None:
            source = self.of[statement.source]
            if self._last.get(statement.source, -1) <= i:
                self.of[statement.targets[0]] = source
                return None
            self._fresh(statement.targets[0], statement.hint, [], alive)
            return statement.source
        dying = [self.of[one] for one in locals_in(statement.value) if self._last.get(one, -1) <= i and one in self.of]
        for target in statement.targets:
            self._fresh(target, statement.hint if len(statement.targets) == 1 else "", dying, alive)
            alive.add(self.of[target])
        return None

    def _fresh(self, target: str, hint: str, dying: list[str], alive: set[str]) -> None:
        for candidate in (hint, *dying, *_SPARE):
            if candidate and candidate not in alive and is_attribute(candidate) and candidate not in _RESERVED:
                self.of[target] = candidate
                return
        number = 1
        while f"x{number}" in alive:
            number += 1
        self.of[target] = f"x{number}"


_RESERVED = {"self", "nnx", "jnp", "jax", "lax", "np", "partial", "rngs", "int", *helpers.NAMES}


def _nested(body: Body) -> list[Statement]:
    """Statements in one another, where one is read by the next alone and a line has room."""
    reads: dict[str, int] = {}
    for statement in body.statements:
        for term in terms_in((statement.value, statement.when)):
            if term.kind == "local":
                reads[term.parts[0]] = reads.get(term.parts[0], 0) + 1
        if statement.source is not None and statement.when is not None:
            reads[statement.source] = reads.get(statement.source, 0) + 1
    for term in terms_in((body.output,)):
        if term.kind == "local":
            reads[term.parts[0]] = reads.get(term.parts[0], 0) + 1
    found: list[Statement] = []
    for statement in body.statements:
        statement = _with_free_batch(found, statement, reads)
        while (before := _to_take_in(found, statement, reads)) is not None:
            found = [one for one in found if one is not before]
            value = substituted(statement.value, {before.targets[0]: before.value})
            statement = replace(statement, value=value, hint=statement.hint or before.hint)
        found.append(statement)
    return found


def _with_free_batch(found: list[Statement], statement: Statement, reads: dict[str, int]) -> Statement:
    """The statement with `x.reshape(-1, 64)` for `x.reshape(x.shape[0], 64)`, if only so it can take in what x is."""
    for term in terms_in(statement.value):
        if term.kind != "call" or term.parts[0].kind != "attribute" or term.parts[0].parts[1] != "reshape":
            continue
        (array, _), sizes = term.parts[0].parts, term.parts[1]
        own = index(Term("attribute", (array, "shape")), 0)
        known = all(type(size) is int and size > 0 for size in sizes[1:])
        if not (known and sizes[:1] == (own,) and array.kind == "local" and reads.get(array.parts[0]) == 2):
            continue
        free = Term("call", (term.parts[0], (-1, *sizes[1:]), ()))
        changed = replace(statement, value=_put(statement.value, term, free))
        if _to_take_in(found, changed, {**reads, array.parts[0]: 1}) is not None:
            reads[array.parts[0]] = 1
            return changed
    return statement


def _put(tree: Any, old: Term, new: Term) -> Any:
    return rewritten(tree, lambda term: new if term == old else term)


def _to_take_in(found: list[Statement], statement: Statement, reads: dict[str, int]) -> Statement | None:
    """The statement before, or one further up that calls no layer, if it has room in this one."""
    for distance, before in enumerate(reversed(found[-_FURTHEST:])):
        if before.when is not None or not before.targets:
            return None
        still = distance == 0 or not any(t.kind == "self" for t in terms_in(before.value))
        if still and _fits(before, statement, reads):
            return before
    return None


def _fits(before: Statement, statement: Statement, reads: dict[str, int]) -> bool:
    if len(before.targets) != 1 or before.when is not None or reads.get(before.targets[0]) != 1:
        return False
    if statement.when is not None or before.targets[0] not in locals_in(statement.value):
        return False
    if any(t.kind in ("function", "loop", "grow") for t in terms_in((before.value, statement.value))):
        return False
    return _size(before.value) + _size(statement.value) <= _LONGEST


def _size(tree: Any) -> int:
    """About as many characters as its source has."""
    if isinstance(tree, tuple):
        return sum(map(_size, tree)) + 2 * max(len(tree) - 1, 0)
    if not isinstance(tree, Term):
        return len(str(tree))
    if tree.kind == "local":
        return 3
    if tree.kind == "name":
        return len(tree.parts[0])
    if tree.kind == "self":
        return 5 + len(tree.parts[0])
    return 3 + _size(tree.parts)
