"""Two bodies as one: where they differ by constants, holes; where one does more, statements under a condition.

A statement that one of them lacks may be left out where its result stands in for one of the values that it reads:
`identity = self.downsample(x)`, which is `identity = x` in a block without. So train and eval of one module become one
body, and so do instances of one class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from interop.porting.bodies import Body, Statement
from interop.porting.terms import Term, local, locals_in, rewritten, substituted

_BUDGET = 4000  # pairs of statements that are tried
_MOST_ALONE = 12  # statements that only one of two bodies has


class Different(Exception):
    """No one term stands for both."""


def holes_in(tree: Any) -> Iterator[int]:
    """The holes of a tree, in order."""
    if isinstance(tree, tuple):
        for item in tree:
            yield from holes_in(item)
    elif isinstance(tree, Term):
        if tree.kind == "hole":
            yield tree.parts[0]
        else:
            yield from holes_in(tree.parts)


class Holes:
    """Numbers holes, and knows what the first instance has in each."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def opened(self, tree: Any) -> Any:
        """The tree with a hole for each constant."""
        if isinstance(tree, Term):
            return self._opened_term(tree)
        if isinstance(tree, tuple):
            return tuple(self.opened(item) for item in tree)
        return self._hole(tree)

    def _hole(self, value: Any) -> Term:
        self.values.append(value)
        return Term("hole", (len(self.values) - 1,))

    def _opened_term(self, term: Term) -> Any:
        parts = term.parts
        match term.kind:
            case "local" | "self" | "argument" | "hole":
                return term
            case "name":
                return self._hole(term) if is_activation(term) else term
            case "constant":
                return self._hole(parts[0])
            case "call":
                keywords = tuple((key, self.opened(value)) for key, value in parts[2])
                return Term("call", (self.opened(parts[0]), tuple(map(self.opened, parts[1])), keywords))
            case "attribute":
                return Term("attribute", (self.opened(parts[0]), parts[1]))
            case "binary" | "compare" | "unary":
                return Term(term.kind, (parts[0], *map(self.opened, parts[1:])))
            case "function":
                return Term("function", (parts[0], self.opened(parts[1])))
            case "dict":
                return Term("dict", tuple((key, self.opened(value)) for key, value in parts))
            case "each":
                return Term("each", (self.opened(parts[0]), parts[1], self.opened(parts[2])))
            case "series":
                return Term("series", (self.opened(parts[0]), self._hole(parts[1]), parts[2]))
            case "grow":
                return Term("grow", (*self.opened(parts[:2]), self._hole(parts[2]), parts[3]))
            case "new":
                return Term("new", (parts[0], tuple((key, self.opened(value)) for key, value in parts[1])))
        return Term(term.kind, self.opened(parts))


def is_activation(term: Term) -> bool:
    """Whether a name is one that instances of a class may have another in the place of."""
    return term.kind == "name" and term.parts[0] in ACTIVATIONS


ACTIVATIONS = frozenset(
    {"nnx.relu", "nnx.silu", "nnx.hard_swish", "nnx.sigmoid", "nnx.hard_sigmoid", "nnx.relu6", "jnp.tanh",
     "jax.nn.mish", "nnx.softplus"}
)  # fmt: skip


def matched(skeleton: Any, term: Any, same: Any, found: dict[int, Any]) -> None:
    """What the term has in the skeleton's holes; `same(a, b)` says whether two locals are the same value.

    Raises:
        Different: where they differ in more than constants.
    """
    if isinstance(skeleton, Term) and skeleton.kind == "hole":
        if isinstance(term, Term) and not is_activation(term) and term.kind != "hole":
            raise Different
        number = skeleton.parts[0]
        if number in found and found[number] != term:
            raise Different
        found[number] = term
        return
    if isinstance(skeleton, tuple):
        if not isinstance(term, tuple) or len(skeleton) != len(term):
            raise Different
        for a, b in zip(skeleton, term, strict=True):
            matched(a, b, same, found)
        return
    if not isinstance(skeleton, Term) or not isinstance(term, Term):
        if skeleton != term or type(skeleton) is not type(term):
            raise Different
        return
    if skeleton.kind != term.kind:
        raise Different
    if skeleton.kind == "local":
        if not same(skeleton.parts[0], term.parts[0]):
            raise Different
        return
    if skeleton.kind in ("binary", "compare", "unary", "function", "new") and skeleton.parts[0] != term.parts[0]:
        raise Different
    if skeleton.kind == "call" and [k for k, _ in skeleton.parts[2]] != [k for k, _ in term.parts[2]]:
        raise Different
    matched(skeleton.parts, term.parts, same, found)


@dataclass
class Fit:
    """How a body fits a skeleton.

    Attributes:
        body: the skeleton, with the statements that only the other body has.
        present: for each of its statements, whether the other body has it, and whether the skeleton had.
        values: what the other body has in the holes.
    """

    body: Body
    present: list[tuple[bool, bool]]
    values: dict[int, Any] = field(default_factory=dict)


def fit(skeleton: Body, other: Body, holes: Holes | None) -> Fit | None:
    """The two as one body. With `holes`, constants that only the other has become holes too; without, constants have
    to be the same."""
    if len(skeleton.inputs) != len(other.inputs):
        return None
    search = _Search(skeleton, other, holes)
    return search.run()


class _Search:
    """Pairs statements from the first to the last, going back where that leads nowhere."""

    def __init__(self, skeleton: Body, other: Body, holes: Holes | None) -> None:
        self.skeleton, self.other, self.holes = skeleton, other, holes
        self.budget, self.alone = _BUDGET, 0

    def run(self) -> Fit | None:
        """The fit in which the fewest statements are in one of the two alone."""
        pairs = {(a, b): a for a, b in zip(self.skeleton.inputs, self.other.inputs, strict=True)}
        fewest = abs(len(self.skeleton.statements) - len(self.other.statements))
        for alone in range(fewest, _MOST_ALONE + 1):
            self.budget, self.alone = _BUDGET, alone
            found = self._from(0, 0, pairs, {}, [])
            if found is not None:
                return found
        return None

    def _from(
        self,
        i: int,
        j: int,
        pairs: dict[tuple[str, str], str],
        values: dict[int, Any],
        made: list[tuple[Statement, bool, bool]],
    ) -> Fit | None:
        self.budget -= 1
        alone = sum(not (first and second) for _, first, second in made)
        if self.budget < 0 or alone > self.alone:
            return None
        left, right = self.skeleton.statements, self.other.statements
        if i == len(left) and j == len(right):
            return self._whole(pairs, values, made)
        if i < len(left) and j < len(right):
            found = self._paired(left[i], right[j], pairs, values)
            if found is not None:
                more, merged, new = found
                result = self._from(i + 1, j + 1, {**pairs, **more}, {**values, **new}, [*made, (merged, True, True)])
                if result is not None:
                    return result
        if i < len(left):
            result = self._without_left(i, j, pairs, values, made)
            if result is not None:
                return result
        if j < len(right):
            return self._without_right(i, j, pairs, values, made)
        return None

    def _paired(
        self, a: Statement, b: Statement, pairs: dict[tuple[str, str], str], values: dict[int, Any]
    ) -> tuple[dict[tuple[str, str], str], Statement, dict[int, Any]] | None:
        if len(a.targets) != len(b.targets) or a.when != b.when:
            return None
        found: dict[int, Any] = {}
        used: dict[str, str] = {}

        def same(one: str, two: str) -> bool:
            merged = pairs.get((one, two))
            return not (merged is None or used.setdefault(one, merged) != merged)

        try:
            matched(a.value, b.value, same, found)
        except Different:
            return None
        if any(number in values and values[number] != value for number, value in found.items()):
            return None
        value = substituted(a.value, {one: local(merged) for one, merged in used.items()})
        hint = a.hint or b.hint
        source = a.source
        if source is not None:
            source = next((m for (one, _), m in pairs.items() if one == source), source)
        merged = replace(a, value=value, hint=hint, source=source)
        return {(x, y): x for x, y in zip(a.targets, b.targets, strict=True)}, merged, found

    def _without_left(self, i: int, j: int, pairs: Any, values: Any, made: Any) -> Fit | None:
        """The skeleton's statement is none of the other's."""
        statement = self.skeleton.statements[i]
        if len(statement.targets) != 1:
            if statement.targets:
                return None
            return self._from(i + 1, j, pairs, values, [*made, (statement, True, False)])
        (target,) = statement.targets
        sources = [statement.source] if statement.source is not None else locals_in(statement.value)
        for source in sources:
            for (one, two), merged in list(pairs.items()):
                if one != source:
                    continue
                read = {o: m for (o, t), m in pairs.items() if o in locals_in(statement.value)}
                if one in read:
                    read[one] = merged
                value = substituted(statement.value, {o: local(m) for o, m in read.items()})
                new = replace(statement, value=value, source=merged)
                result = self._from(i + 1, j, {**pairs, (target, two): target}, values, [*made, (new, True, False)])
                if result is not None:
                    return result
        return None

    def _without_right(self, i: int, j: int, pairs: Any, values: Any, made: Any) -> Fit | None:
        """The other's statement is none of the skeleton's."""
        statement = self.other.statements[j]
        if len(statement.targets) != 1:
            if statement.targets:
                return None
            return self._from(
                i,
                j + 1,
                pairs,
                values,
                [*made, (replace(statement, value=self._renamed(statement.value, pairs)), False, True)],
            )
        (target,) = statement.targets
        new_name = f"{target}__"
        while any(new_name == merged for merged in pairs.values()):
            new_name += "_"
        before = len(self.holes.values) if self.holes is not None else 0
        for source in locals_in(statement.value):
            for (one, two), merged in list(pairs.items()):
                if two != source:
                    continue
                value = self._renamed(statement.value, {**pairs, (one, two): merged}, {two: merged})
                more: dict[int, Any] = {}
                if self.holes is not None:
                    value = self.holes.opened(value)
                    more = {n: self.holes.values[n] for n in range(before, len(self.holes.values))}
                new = replace(statement, targets=(new_name,), value=value, source=merged)
                result = self._from(
                    i, j + 1, {**pairs, (one, target): new_name}, {**values, **more}, [*made, (new, False, True)]
                )
                if result is not None:
                    return result
                if self.holes is not None:
                    del self.holes.values[before:]
        return None

    def _renamed(self, tree: Any, pairs: dict[tuple[str, str], str], first: dict[str, str] | None = None) -> Any:
        names = {two: merged for (_, two), merged in pairs.items()} | (first or {})
        return substituted(tree, {two: local(merged) for two, merged in names.items()})

    def _whole(self, pairs: Any, values: Any, made: Any) -> Fit | None:
        found: dict[int, Any] = {}
        used: dict[str, str] = {}

        def same(one: str, two: str) -> bool:
            merged = pairs.get((one, two))
            return merged is not None and used.setdefault(one, merged) == merged

        try:
            matched(self.skeleton.output, self.other.output, same, found)
        except Different:
            return None
        output = substituted(self.skeleton.output, {one: local(merged) for one, merged in used.items()})
        body = Body(self.skeleton.inputs, [statement for statement, _, _ in made], output)
        return Fit(body, [(first, second) for _, first, second in made], {**values, **found})


def of_two_modes(train: Body, evaluation: Body, dropouts: Collection[str] = ()) -> Body | None:
    """One body for both modes; None where they differ in more than statements of one mode alone.

    Dropout is a layer that does nothing in eval mode: `dropouts`, by their paths, need no condition.
    """
    found = fit(train, evaluation, None)
    if found is None:
        return None
    statements = []
    for statement, (in_train, in_eval) in zip(found.body.statements, found.present, strict=True):
        when = None if in_train and in_eval else "train" if in_train else "eval"
        if when == "train" and _is_dropout(statement.value, dropouts):
            when = None
        statements.append(replace(statement, when=when, source=statement.source if when else None))
    return Body(found.body.inputs, statements, found.body.output)


def side_by_side(train: Body, evaluation: Body) -> Body:
    """Two bodies as one: what both begin with, what eval mode does then ("begin" to "end", with its result), the rest.

    For a reader: where the two are that different, each has its own end.
    """
    evaluation = renamed(evaluation, "eval_")
    names = dict(zip(evaluation.inputs, train.inputs, strict=False))
    shared = 0
    for a, b in zip(train.statements, evaluation.statements, strict=False):
        here = substituted(b.value, {old: local(new) for old, new in names.items()})
        if here != a.value or len(a.targets) != len(b.targets) or a.when != b.when:
            break
        names |= dict(zip(b.targets, a.targets, strict=True))
        shared += 1

    def to(tree: Any) -> Any:
        return substituted(tree, {old: local(new) for old, new in names.items()})

    rest = [
        replace(s, value=to(s.value), source=names.get(s.source or "", s.source))
        for s in evaluation.statements[shared:]
    ]
    begin, end = Statement((), Term("begin", ())), Statement((), Term("end", (to(evaluation.output),)))
    return Body(train.inputs, [*train.statements[:shared], begin, *rest, end, *train.statements[shared:]], train.output)


def _is_dropout(value: Any, dropouts: Collection[str]) -> bool:
    function = value.parts[0] if isinstance(value, Term) and value.kind == "call" else None
    return isinstance(function, Term) and function.kind == "self" and function.parts[0] in dropouts


def renamed(body: Body, prefix: str) -> Body:
    """The body with locals of its own."""
    names = {one: f"{prefix}{one}" for one in body.inputs}
    for statement in body.statements:
        names |= {one: f"{prefix}{one}" for one in statement.targets}

    def to(tree: Any) -> Any:
        return rewritten(tree, lambda t: local(names[t.parts[0]]) if t.kind == "local" and t.parts[0] in names else t)

    statements = [
        replace(s, targets=tuple(names[t] for t in s.targets), value=to(s.value), source=names.get(s.source or ""))
        for s in body.statements
    ]
    return Body(tuple(names[one] for one in body.inputs), statements, to(body.output))
