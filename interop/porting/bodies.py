"""Modules and what their calls do: the steps of a program, each in the class whose code it is.

A module becomes a class of its own where it holds layers or arrays; a `Sequential` whose layers follow one another, an
`nnx.Sequential`; a list, an `nnx.List`. All else (activations, pooling) is code of the class around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from interop.porting.borrowed import Call, lent
from interop.porting.lowering import Lowered
from interop.porting.terms import Term, at, call, local, locals_in, rewritten, substituted, terms_in
from interop.porting.values import Step

CLASS, SEQUENTIAL, LIST = "class", "sequential", "list"


@dataclass
class Statement:
    """`targets = value`.

    Attributes:
        when: "train" or "eval" where it is of one mode alone, or the number of a flag.
        source: what its one target is where the statement does not run.
        hint: what PyTorch's code calls the result.
    """

    targets: tuple[str, ...]
    value: Any
    when: Any = None
    source: str | None = None
    hint: str = ""


@dataclass
class Body:
    """What a call of a module does."""

    inputs: tuple[str, ...]
    statements: list[Statement]
    output: Any  # a term


@dataclass
class Tree:
    """The modules of a PyTorch model: for each path its class."""

    classes: Mapping[str, type]


def prefixes(path: str) -> list[str]:
    """Of "a.b.c": "", "a", "a.b", "a.b.c"."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def parent(path: str) -> str:
    """The path of the module around."""
    return path.rpartition(".")[0]


def relative(path: str, base: str) -> str:
    """A path as the module at `base` has it."""
    return path[len(base) + 1 :] if base else path


class Bodies:
    """The bodies of all calls of one program."""

    def __init__(self, lowered: Lowered, kinds: Mapping[str, str], lengths: Mapping[str, int]) -> None:
        self.lowered, self.kinds, self.lengths = lowered, kinds, lengths
        self.found: dict[Call, Body] = {}
        self.chains: dict[Call, list[tuple[str, Any]]] = {}  # of Sequentials: (key, function) one after another
        self.broken: set[str] = set()  # Sequentials that are none
        self.steps = steps = lent(lowered.steps, self._chain)
        self._defined = {step.local: i for i, step in enumerate(steps)}
        self._result = _as_term(lowered.output)
        self._of = [self._chain(step) for step in steps]
        self._readers: dict[str, list[int]] = {}
        for i, step in enumerate(steps):
            for one in locals_in(step.term):
                self._readers.setdefault(one, []).append(i)
        self._body(("", 0), list(range(len(steps))), 0)

    def _chain(self, step: Step) -> list[Call]:
        counts = {}
        for repeat in step.node.repeats:
            path, _, number = repeat.rpartition("@")
            counts[path] = int(number)
        return [
            (path, counts.get(path, 0))
            for path in prefixes(step.node.module)
            if self.kinds.get(path) in (CLASS, SEQUENTIAL)
        ]

    def _body(self, this: Call, region: list[int], depth: int) -> None:
        steps = self.steps
        items: dict[Any, list[int]] = {}
        for i in region:
            chain = self._of[i]
            items.setdefault(chain[depth + 1] if len(chain) > depth + 1 else i, []).append(i)
        inside = set(region)
        statements = []
        for key, indices in sorted(items.items(), key=lambda item: item[1][-1]):
            if isinstance(key, int):
                step = steps[key]
                statements.append(Statement((step.local,), step.term, hint=_hint(step.node.source)))
                continue
            inputs, outputs = self._border(indices)
            path = key[0]
            made = call(at(path), *map(local, inputs))
            statements.append(Statement(tuple(outputs), made))
            self._body(key, indices, depth + 1)
        if this[0] == "" and depth == 0:
            inputs = [given.name for given in self.lowered.program.inputs]
            self.found[this] = Body(tuple(inputs), statements, self._result)
        else:
            inputs, outputs = self._border(sorted(inside))
            output = local(outputs[0]) if len(outputs) == 1 else Term("tuple", tuple(map(local, outputs)))
            self.found[this] = Body(tuple(inputs), statements, output if outputs else None)
        body = self.found[this]
        body.statements = unpacked(body)
        body.statements = self._loops(body)
        if self.kinds.get(this[0]) == SEQUENTIAL:
            self._as_sequential(this)

    def _loops(self, body: Body) -> list[Statement]:
        """The statements, with the layers of a list that are called one after another as one."""
        found: list[Statement] = []
        i = 0
        while i < len(body.statements):
            chain = self._chain_from(body, i)
            if len(chain) < 2:
                found.append(body.statements[i])
                i += 1
                continue
            first, last = chain[0], chain[-1]
            layers = first.value.parts[0].parts[0].rpartition(".")[0]
            value = Term("loop", (at(layers), first.value.parts[1][0]))
            found.append(Statement(last.targets, value, hint=last.hint))
            i += len(chain)
        return found

    def _chain_from(self, body: Body, start: int) -> list[Statement]:
        """The calls of all layers of a list from a statement on, each with what the one before it gave alone."""
        layers = _called(body.statements[start])
        if layers is None or self.kinds.get(layers.rpartition(".")[0]) != LIST or not layers.endswith(".0"):
            return []
        base = layers.rpartition(".")[0]
        chain = [body.statements[start]]
        for statement in body.statements[start + 1 :]:
            before = chain[-1].targets[0]
            if _called(statement) != f"{base}.{len(chain)}" or statement.value.parts[1] != (local(before),):
                break
            reads = sum(before in locals_in((s.value,)) for s in body.statements) + (before in locals_in(body.output))
            if reads != 1:
                break
            chain.append(statement)
        return chain if len(chain) == self.lengths.get(base) else []

    def _border(self, indices: list[int]) -> tuple[list[str], list[str]]:
        """What steps read from around them, and what is read of theirs elsewhere."""
        steps, inside = self.steps, set(indices)
        own = {steps[i].local for i in indices}
        inputs = dict.fromkeys(one for i in indices for one in locals_in(steps[i].term) if one not in own)
        result = set(locals_in(self._result))
        outputs = [
            steps[i].local
            for i in indices
            if steps[i].local in result or any(reader not in inside for reader in self._readers.get(steps[i].local, ()))
        ]
        return list(inputs), outputs

    def _as_sequential(self, this: Call) -> None:
        """The functions of a Sequential, if each takes what the one before it gives."""
        body, path = self.found[this], this[0]
        if len(body.inputs) != 1 or not isinstance(body.output, Term) or body.output.kind != "local":
            self.broken.add(path)
            return
        groups: list[tuple[str, list[Statement]]] = []
        for statement in body.statements:
            key = self._key(statement, path, self.steps)
            if key is None:
                self.broken.add(path)
                return
            if groups and groups[-1][0] == key:
                groups[-1][1].append(statement)
            else:
                groups.append((key, [statement]))
        value = body.inputs[0]
        chain: list[tuple[str, Any]] = []
        for key, statements in groups:
            function = _function(statements, value)
            if function is None or any(key == other for other, _ in chain):
                self.broken.add(path)
                return
            chain.append((key, function))
            value = statements[-1].targets[0]
        if value != body.output.parts[0]:
            self.broken.add(path)
            return
        self.chains[this] = chain

    def _key(self, statement: Statement, path: str, steps: list[Step]) -> str | None:
        """Which of a Sequential's layers a statement is of."""
        if statement.targets and statement.targets[0] in self._defined:
            module = steps[self._defined[statement.targets[0]]].node.module
            below = relative(module, path) if module != path else ""
            return below.split(".")[0] or None
        return None


def unpacked(body: Body) -> list[Statement]:
    """The statements, with `parts = split(x); a = parts[0]; b = parts[1]` as `a, b = split(x)`."""
    reads: dict[str, int] = {}
    for tree in (*(s.value for s in body.statements), body.output):
        for term in terms_in((tree,)):
            if term.kind == "local":
                reads[term.parts[0]] = reads.get(term.parts[0], 0) + 1
    found: list[Statement] = []
    i = 0
    while i < len(body.statements):
        statement = body.statements[i]
        count = _results(statement.value)
        after = body.statements[i + 1 : i + 1 + count]
        (whole,) = statement.targets if len(statement.targets) == 1 else ("",)
        parts = [Term("index", (local(whole), (n,))) for n in range(count)]
        if count and [s.value for s in after] == parts and reads.get(whole) == count:
            found.append(Statement(tuple(s.targets[0] for s in after), statement.value))
            i += 1 + count
        else:
            found.append(statement)
            i += 1
    return found


def _results(value: Any) -> int:
    """How many arrays an expression gives as a list; 0 where it gives one."""
    if not isinstance(value, Term) or value.kind != "call" or value.parts[0].kind != "name":
        return 0
    called, arguments = value.parts[0].parts[0], value.parts[1]
    if called == "jnp.meshgrid":
        return len(arguments)
    if called in ("jax.lax.top_k", "lstm", "gru", "rnn"):
        return 2
    if called != "jnp.split":
        return 0
    places = arguments[1]
    return places if isinstance(places, int) else len(places.parts) + 1


def _called(statement: Statement) -> str | None:
    """The path of the one layer that a statement calls with one value."""
    value = statement.value
    if len(statement.targets) != 1 or not isinstance(value, Term) or value.kind != "call" or value.parts[2]:
        return None
    function, arguments, _ = value.parts
    plain = function.kind == "self" and len(arguments) == 1 and isinstance(arguments[0], Term)
    return function.parts[0] if plain and arguments[0].kind == "local" else None


def _function(statements: list[Statement], given: str) -> Any:
    """Statements as one function of one value: a layer, a name, or a lambda; None where they are no such thing."""
    values: dict[str, Any] = {given: local(given)}
    value: Any = None
    for statement in statements:
        if len(statement.targets) != 1 or any(one not in values for one in locals_in(statement.value)):
            return None
        value = substituted(statement.value, values)
        values[statement.targets[0]] = value
    if isinstance(value, Term) and value.kind == "call":
        function, arguments, keywords = value.parts
        alone = given not in locals_in((function, arguments[1:], keywords))
        if arguments[:1] == (local(given),) and alone and len(arguments) == 1:
            if not keywords:
                return function
            if function.kind == "name":
                return call("partial", function, **dict(keywords))
    return Term("function", ("x", _put(value, given, local("x"))))


def _put(tree: Any, name: str, value: Any) -> Any:
    return rewritten(tree, lambda t: value if t == local(name) else t)


def _as_term(output: Any) -> Any:
    """A program's output structure as a term."""
    kind, *rest = output
    if kind == "leaf":
        return rest[0]
    if kind in ("tuple", "list"):
        return Term(kind, tuple(map(_as_term, rest[0])))
    if kind == "dict":
        return Term("dict", tuple((key, _as_term(item)) for key, item in rest[0]))
    return Term("tuple", tuple(map(_as_term, rest[-1])))


def _hint(source: str) -> str:
    """The name that a line of PyTorch's code gives to its result."""
    import ast

    text = source.partition(": ")[2].strip()
    for candidate in (text, text + ")", text.rstrip("(,") + "()"):
        try:
            found = ast.parse(candidate).body
        except SyntaxError:
            continue
        if found and isinstance(found[0], ast.Assign) and isinstance(found[0].targets[0], ast.Name):
            return found[0].targets[0].id
        if found and isinstance(found[0], ast.AugAssign) and isinstance(found[0].target, ast.Name):
            return found[0].target.id
        return ""
    return ""


def kinds_of(tree: Tree, members: Iterable[str], layers: frozenset[str]) -> dict[str, str]:
    """What each module that holds something becomes."""
    import torch

    found: dict[str, str] = {"": CLASS}
    for member in members:
        for path in prefixes(member)[:-1]:
            if path in layers or path not in tree.classes:
                continue
            children = [other for other in tree.classes if other and parent(other) == path]
            numbered = all(relative(child, path).isdigit() for child in children) and children
            cls = tree.classes[path]
            if issubclass(cls, torch.nn.ModuleList):
                found[path] = LIST
            elif numbered and getattr(cls, "forward", None) is torch.nn.Sequential.forward:
                found[path] = SEQUENTIAL
            else:
                found[path] = CLASS
    found[""] = CLASS
    return found
