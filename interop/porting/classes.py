"""Classes: instances of one PyTorch class as one Flax class, whose arguments are what they differ in."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interop.porting.bodies import Body, Statement
from interop.porting.terms import Term, rewritten, terms_in
from interop.porting.unify import Different, Holes, fit, holes_in, matched, renamed

_MOST_CONDITIONS = 6  # statements of a class that depend on its arguments; beyond that two classes are easier to read


class Missing(enum.Enum):
    """No value."""

    MISSING = enum.auto()


MISSING = Missing.MISSING


@dataclass
class Instance:
    """One module: what it has, by name, and what its call does (a second body where modes differ in more than
    statements)."""

    path: str
    members: dict[str, Any]
    body: Body
    evaluation: Body | None = None


@dataclass
class Kind:
    """Instances that are one class, before its arguments are chosen."""

    holes: Holes
    members: dict[str, Any]
    body: Body
    instances: list[Instance] = field(default_factory=list)
    values: list[dict[int, Any]] = field(default_factory=list)  # of each instance, in the holes
    has: list[set[str]] = field(default_factory=list)  # of each instance: the members that it has
    runs: list[list[bool]] = field(default_factory=list)  # of each instance: which statements it runs

    @classmethod
    def of(cls, instance: Instance) -> Kind:
        """The class of one instance."""
        holes = Holes()
        body = _opened(instance.body, holes)
        members = {key: holes.opened(term) for key, term in instance.members.items()}
        this = cls(holes, members, body)
        this._add(instance, dict(enumerate(holes.values)), [True] * len(body.statements))
        return this

    def _add(self, instance: Instance, values: dict[int, Any], runs: list[bool]) -> None:
        self.instances.append(instance)
        self.values.append(values)
        self.has.append(set(instance.members))
        self.runs.append(runs)

    def take(self, instance: Instance) -> bool:
        """Whether the instance is of this class; it is added if so."""
        if instance.evaluation is not None or any(one.evaluation is not None for one in self.instances):
            return False
        kept = list(self.holes.values)
        values: dict[int, Any] = {}
        new: dict[str, Any] = {}
        try:
            for key, term in instance.members.items():
                if key in self.members:
                    matched(self.members[key], term, lambda a, b: a == b, values)
                else:
                    before = len(self.holes.values)
                    new[key] = self.holes.opened(term)
                    values |= {n: self.holes.values[n] for n in range(before, len(self.holes.values))}
        except Different:
            self.holes.values[:] = kept
            return False
        found = fit(self.body, renamed(instance.body, "_"), self.holes)
        if found is None or sum(not (a and b) for a, b in found.present) > _MOST_CONDITIONS:
            self.holes.values[:] = kept
            return False
        self.members |= new
        old = iter(range(len(self.body.statements)))
        places = [next(old) if first else None for first, _ in found.present]
        self.runs = [[False if place is None else runs[place] for place in places] for runs in self.runs]
        self.body = found.body
        self._add(instance, {**values, **found.values}, [second for _, second in found.present])
        return True


def _opened(body: Body, holes: Holes) -> Body:
    statements = [replace(s, value=holes.opened(s.value)) for s in body.statements]
    return Body(body.inputs, statements, holes.opened(body.output))


@dataclass
class Argument:
    """An argument of `__init__`."""

    name: str
    column: list[Any]  # of each instance
    role: str
    default: Any = MISSING


@dataclass
class Definition:
    """A class that is written.

    Attributes:
        members: constructors, in which arguments stand.
        conditions: {member: condition under which there is one}.
        body: with `Statement.when` a term, where it depends on arguments.
        kept: {attribute: term} of what the body reads of the arguments.
    """

    name: str
    arguments: list[Argument]
    members: dict[str, Any]
    conditions: dict[str, Any]
    body: Body
    kept: dict[str, Any]
    paths: list[str]
    evaluation: Body | None = None


_ROLES = {
    "nnx.Conv": ("in_features", "out_features", "kernel_size"),
    "nnx.ConvTranspose": ("in_features", "out_features", "kernel_size"),
    "nnx.Linear": ("in_features", "out_features"),
    "BatchNorm": ("num_features",),
    "nnx.LayerNorm": ("num_features",),
    "nnx.GroupNorm": ("num_features",),
    "nnx.RMSNorm": ("num_features",),
    "nnx.Embed": ("num_embeddings", "out_features"),
    "nnx.Dropout": ("rate",),
    "jnp.zeros": ("num_features",),
    "jnp.ones": ("num_features",),
    "jnp.full": ("num_features", "initial"),
}
_WIDTHS = ("in_features", "out_features", "num_features", "feature_group_count")


def _roles(key: str, term: Any, found: dict[int, tuple[str, str]]) -> None:
    """What each hole of a constructor means, and whose it is."""
    if isinstance(term, tuple):
        for item in term:
            _roles(key, item, found)
        return
    if not isinstance(term, Term):
        return
    if term.kind == "call":
        function = term.parts[0].parts[0] if term.parts[0].kind == "name" else ""
        named = [*zip(_ROLES.get(function, ()), term.parts[1], strict=False), *term.parts[2]]
        for role, value in named:
            for hole in holes_in(value):
                found.setdefault(hole, (role, key))
    elif term.kind == "new":
        for role, value in term.parts[1]:
            for hole in holes_in(value):
                found.setdefault(hole, (role, key))
    elif term.kind in ("run", "series"):
        for hole in holes_in(term.parts[1]):
            found.setdefault(hole, ("depth", key))
    for part in term.parts:
        _roles(key, part, found)


class Chooser:
    """Chooses the arguments of a class."""

    def __init__(self, kind: Kind, title: str) -> None:
        self.kind, self.title = kind, title
        self.count = len(kind.instances)
        self.arguments: list[Argument] = []
        self.roles: dict[int, tuple[str, str]] = {}
        for key, term in kind.members.items():
            _roles(key, term, self.roles)
        self.kept: dict[str, Any] = {}

    def definition(self) -> Definition:
        """The class."""
        kind = self.kind
        fills: dict[int, Any] = {}
        order = list(dict.fromkeys([*(h for term in kind.members.values() for h in holes_in(term)),
                                    *(h for s in kind.body.statements for h in holes_in(s.value)),
                                    *holes_in(kind.body.output)]))  # fmt: skip
        in_body = {h for s in kind.body.statements for h in holes_in(s.value)} | set(holes_in(kind.body.output))
        for hole in order:
            column = [values.get(hole, MISSING) for values in kind.values]
            fills[hole] = self._filled(hole, column)
        self._times = {1} | {
            term.parts[1]
            for term in terms_in((*fills.values(),))
            if term.kind == "binary" and term.parts[0] == "*" and isinstance(term.parts[1], int)
        }
        self._conditions: dict[tuple[bool, ...], Any] = {}
        conditions = {}
        for key in kind.members:
            there = tuple(key in has for has in kind.has)
            if not all(there):
                conditions[key] = self._condition(there, key)
        members = {key: _fill(term, fills) for key, term in kind.members.items()}
        statements = []
        for number, statement in enumerate(kind.body.statements):
            runs = tuple(one[number] for one in kind.runs)
            when = statement.when
            if not all(runs):
                condition = self._statement_condition(statement, runs, conditions)
                when = condition if when is None else (when, condition)
            value = self._in_body(_fill(statement.value, {h: fills[h] for h in fills if h in in_body}))
            statements.append(replace(statement, value=value, when=when))
        output = self._in_body(_fill(kind.body.output, fills))
        body = Body(kind.body.inputs, statements, output)
        self._defaults()
        return Definition(self.title, self.arguments, members, conditions, body, self.kept,
                          [one.path for one in kind.instances], kind.instances[0].evaluation)  # fmt: skip

    def _in_body(self, tree: Any) -> Any:
        """The forward pass reads arguments that the class has kept."""

        def to(term: Term) -> Any:
            if term.kind != "argument" or term.parts[0] == "rngs":
                return term
            self.kept[term.parts[0]] = term
            return Term("self", (term.parts[0],))

        return rewritten(tree, to)

    def _filled(self, hole: int, column: list[Any]) -> Any:
        known = [value for value in column if value is not MISSING]
        if all(_same(value, known[0]) for value in known):
            return known[0]
        role, key = self.roles.get(hole, ("value", ""))
        if all(isinstance(value, Term) for value in known):
            role = "activation"
        return self._expressed(column, role, key)

    def _expressed(self, column: list[Any], role: str, key: str) -> Any:
        """The column as an argument, or as what follows from one."""
        for argument in self.arguments:
            if _agree(column, argument.column):
                argument.column = [b if a is MISSING else a for a, b in zip(column, argument.column, strict=True)]
                return Term("argument", (argument.name,))
        tuples = [value for value in column if value is not MISSING]
        if all(isinstance(value, tuple) and len(set(value)) == 1 for value in tuples):
            one = self._expressed([v if v is MISSING else v[0] for v in column], role, key)
            return Term("tuple", (one,) * len(tuples[0]))
        for argument in self.arguments:
            found = _derived(column, argument, role)
            if found is not None:
                term, argument.column = found
                return term
        made = Argument(self._name(role, key), list(column), role)
        self.arguments.append(made)
        return Term("argument", (made.name,))

    def _name(self, role: str, key: str) -> str:
        taken = (
            {argument.name for argument in self.arguments} | set(self.kind.members) | set(self.kept) | {"rngs", "self"}
        )
        base = {"num_features": "features", "feature_group_count": "groups", "kernel_dilation": "dilation"}.get(
            role, role
        )
        stem = key.replace(".", "_")
        widths = role in _WIDTHS
        for candidate in (base, f"{stem}_features" if widths else f"{stem}_{base}", f"{stem}_{base}"):
            if candidate.isidentifier() and candidate not in taken:
                return candidate
        number = 2
        while f"{base}{number}" in taken:
            number += 1
        return f"{base}{number}"

    def _condition(self, column: tuple[bool, ...], word: str) -> Any:
        """A condition on arguments that holds for the instances in the column."""
        if column in self._conditions:
            return self._conditions[column]
        opposite = tuple(not one for one in column)
        found = self._predicate(column)
        if found is None and opposite in self._conditions:
            found = Term("unary", ("not", self._conditions[opposite]))
        if found is None:
            flag = Argument(self._name(word.replace(".", "_") if word not in self.kind.members else f"with_{word}", ""),
                            list(column), "flag")  # fmt: skip
            self.arguments.append(flag)
            found = Term("argument", (flag.name,))
        self._conditions[column] = found
        return found

    def _predicate(self, column: tuple[bool, ...]) -> Any:
        """Strides of 1 and as many features out as in (or as many as the class has elsewhere), or the contrary."""
        strides = next((argument for argument in self.arguments if argument.name == "strides"), None)
        options: list[tuple[list[bool], Any]] = []
        for a, b, times in itertools.product(self.arguments, self.arguments, sorted(self._times)):
            if a.role != "in_features" or b.role not in ("out_features", "num_features"):
                continue
            same = [type(y) is int and x == times * y for x, y in zip(a.column, b.column, strict=True)]
            wide: Any = Term("argument", (b.name,))
            wide = wide if times == 1 else Term("binary", ("*", times, wide))
            term = Term("compare", ("==", Term("argument", (a.name,)), wide))
            options.append((same, term))
            if strides is not None:
                both = [one and stride == 1 for one, stride in zip(same, strides.column, strict=True)]
                of_one = Term("compare", ("==", Term("argument", ("strides",)), 1))
                options.append((both, Term("and", (of_one, term))))
        for argument in self.arguments:
            numbers = [x for x in argument.column if isinstance(x, int) and not isinstance(x, bool)]
            if len(numbers) == len(argument.column) and argument.role in ("strides", "out_features", "in_features"):
                options.append(
                    ([x == 1 for x in numbers], Term("compare", ("==", Term("argument", (argument.name,)), 1)))
                )
        for values, term in options:
            if tuple(values) == column:
                return term
            if tuple(not value for value in values) == column:
                return _negated(term)
        return None

    def _statement_condition(
        self, statement: Statement, column: tuple[bool, ...], conditions: Mapping[str, Any]
    ) -> Any:
        for term in terms_in(statement.value):
            if term.kind == "self":
                member = _member_of(term.parts[0], conditions)
                if member is not None and tuple(member in has for has in self.kind.has) == column:
                    return Term("compare", ("is not", Term("self", (member,)), None))
        condition = self._condition(column, _word(statement))
        word = _word(statement)
        if condition.kind == "argument":
            self.kept[condition.parts[0]] = condition
            return Term("self", (condition.parts[0],))
        taken = [key for key, value in self.kept.items() if value == condition]
        if taken:
            return Term("self", (taken[0],))
        while word in self.kept or word in self.kind.members or any(a.name == word for a in self.arguments):
            word += "_"
        self.kept[word] = condition
        return Term("self", (word,))

    def _defaults(self) -> None:
        """What most instances have is the default of an argument that is no width."""
        for argument in self.arguments:
            known = [value for value in argument.column if value is not MISSING]
            argument.column = [known[0] if value is MISSING else value for value in argument.column]
            if argument.role in _WIDTHS or argument.role == "num_embeddings":
                continue
            if argument.role == "flag":
                argument.default = False
            elif argument.role == "activation":
                argument.default = max(known, key=known.count)
            elif argument.role in ("strides", "kernel_dilation", "feature_group_count") and 1 in known:
                argument.default = 1
        self.arguments.sort(key=lambda argument: argument.default is not MISSING)


def _member_of(path: str, members: Mapping[str, Any]) -> str | None:
    first = path.split(".")[0]
    return path if path in members else first if first in members else None


def _word(statement: Statement) -> str:
    value = statement.value
    if isinstance(value, Term) and value.kind == "call" and not statement.hint:
        function = value.parts[0]
        if function.kind == "hole":
            return "with_activation"
        if function.kind in ("name", "self") and (word := function.parts[0].rpartition(".")[2]).isidentifier():
            return f"with_{word}"
    if isinstance(value, Term) and value.kind == "binary" and value.parts[0] == "+":
        return "residual"
    return f"with_{statement.hint}" if statement.hint else "with_this"


def _negated(term: Term) -> Term:
    if term.kind == "compare":
        return Term("compare", ({"==": "!=", "!=": "=="}[term.parts[0]], *term.parts[1:]))
    if term.kind == "and":
        return Term("or", tuple(map(_negated, term.parts)))
    return Term("unary", ("not", term))


def _fill(tree: Any, fills: Mapping[int, Any]) -> Any:
    return rewritten(tree, lambda t: fills.get(t.parts[0], t) if t.kind == "hole" else t)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _agree(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(x is MISSING or y is MISSING or _same(x, y) for x, y in zip(a, b, strict=True))


def _derived(column: Sequence[Any], argument: Argument, role: str) -> tuple[Any, list[Any]] | None:
    """The column as a number of times an argument, a part of it, or the padding that goes with a kernel; and the
    argument's column, with what follows for instances of which only this one is known."""
    pairs = [(v, p) for v, p in zip(column, argument.column, strict=True) if v is not MISSING and p is not MISSING]
    if not pairs or not all(type(v) is int and type(p) is int and p > 0 for v, p in pairs):
        return None
    if len({p for _, p in pairs}) < 2:
        return None
    this = Term("argument", (argument.name,))
    alone = [v for v, p in zip(column, argument.column, strict=True) if v is not MISSING and p is MISSING]

    def filled(of: Callable[[int], int]) -> list[Any]:
        values = zip(column, argument.column, strict=True)
        return [of(v) if p is MISSING and v is not MISSING else p for v, p in values]

    if role in _WIDTHS and argument.role in _WIDTHS:
        times = pairs[0][0] // pairs[0][1]
        if times > 1 and all(v == p * times for v, p in pairs) and not any(v % times for v in alone):
            return Term("binary", ("*", times, this)), filled(lambda v: v // times)
        if pairs[0][0] > 0:
            part = pairs[0][1] // pairs[0][0]
            if part > 1 and all(v == p // part for v, p in pairs):
                return Term("binary", ("//", this, part)), filled(lambda v: v * part)
    if role == "padding" and argument.role == "kernel_size" and not alone and all(v == p // 2 for v, p in pairs):
        return Term("binary", ("//", this, 2)), argument.column
    if role == "padding" and argument.role == "kernel_dilation" and all(v == p for v, p in pairs):
        return this, filled(lambda v: v)
    return None


def merged(instances: Sequence[Instance]) -> list[Kind]:
    """The classes of instances of one PyTorch class: one where they can be one."""
    kinds: list[Kind] = []
    for instance in instances:
        if not any(kind.take(instance) for kind in kinds):
            kinds.append(Kind.of(instance))
    return kinds
