"""From the steps of both modes to classes: members made, modes joined, instances merged, innermost modules first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from interop.porting.bodies import (
    CLASS,
    LIST,
    SEQUENTIAL,
    Bodies,
    Body,
    Statement,
    Tree,
    kinds_of,
    parent,
    prefixes,
    relative,
)
from interop.porting.classes import Chooser, Definition, Instance, merged
from interop.porting.lowering import Lowered
from interop.porting.printers.elementwise import jnp_type
from interop.porting.series import each, grown
from interop.porting.tables import shortest, table
from interop.porting.terms import Term, at, call, local, name, rewritten, terms_in
from interop.porting.unify import fit, of_two_modes
from interop.porting.values import Unprintable
from interop.program.nodes import Model
from interop.program.regions import is_below

RNGS = Term("argument", ("rngs",))


class Assembly:
    """The classes of a model."""

    def __init__(self, model: Model, tree: Tree, arrays: Mapping[str, Any], title: str = "model") -> None:
        self.model, self.tree, self.arrays, self.title = model, tree, arrays, title
        leaves = frozenset(path for path in tree.classes if not any(parent(o) == path for o in tree.classes if o))
        self.modes = {m: Lowered(model, getattr(model, m), arrays, leaves) for m in ("train", "eval")}
        self.problems = {text: places for m in self.modes.values() for text, places in m.problems.items()}
        self.definitions: list[Definition] = []
        if self.problems:
            return
        self._layers: dict[str, Term] = {**self.modes["eval"].members, **self.modes["train"].members}
        read = {t.parts[0] for m in self.modes.values() for s in m.steps for t in terms_in(s.term) if t.kind == "self"}
        self._raw = self._raw_members(read)
        self._made: dict[str, Term] = {}  # of each module that is an instance of a class
        self._kinds = kinds_of(tree, [*self._layers, *self._raw], frozenset(self._layers))
        lengths: dict[str, int] = {}
        for path in tree.classes:
            if path:
                lengths[parent(path)] = lengths.get(parent(path), 0) + 1
        while True:
            self.bodies = {mode: Bodies(lowered, self._kinds, lengths) for mode, lowered in self.modes.items()}
            broken = set().union(*(bodies.broken for bodies in self.bodies.values())) | self._unfit()
            if not broken:
                break
            self._kinds |= dict.fromkeys(broken, LIST)
        self._assemble()

    def _raw_members(self, read: set[str]) -> dict[str, Term]:
        """Arrays that are no layer's: parameters and buffers of the module itself. Also those that nothing reads."""
        found = {}
        for entry in self.model.entries:
            if entry.same_as is not None:
                if entry.persistent and entry.kind in ("parameter", "frozen"):
                    raise Unprintable(f"{entry.name} and {entry.same_as} are one array")
                continue
            owner, _, last = entry.name.rpartition(".")
            if owner in self._layers or (not owner and last in self._layers):
                continue
            if entry.name not in read and not entry.persistent:
                continue
            found[entry.name] = self._variable(entry)
        return found

    def _variable(self, entry: Any) -> Term:
        learned = entry.kind in ("parameter", "frozen")
        made = _initial(entry, self.arrays[entry.name], learned)
        if learned:
            return call("nnx.Param", made)
        # interop.state_dict leaves out what says so of itself, as PyTorch leaves out a buffer that is not persistent.
        return call("nnx.Variable", made, **({} if entry.persistent else {"persistent": False}))

    def _unfit(self) -> set[str]:
        """Sequentials with a layer that no constructor stands for."""
        found = set()
        for bodies in self.bodies.values():
            for (path, _), chain in bodies.chains.items():
                for key, function in chain:
                    if _element(function, f"{path}.{key}".lstrip("."), self._layers) is None:
                        found.add(path)
        return found

    def _assemble(self) -> None:
        depth = sorted((p for p, kind in self._kinds.items() if kind == CLASS), key=lambda p: -len(prefixes(p)))
        by_class: dict[type, list[str]] = {}
        order: list[type] = []
        for path in depth:
            by_class.setdefault(self.tree.classes[path], []).append(path)
        # A class comes after all that its instances have in them.
        done: set[str] = set()
        waiting = dict(by_class)
        while waiting:
            for cls, paths in waiting.items():  # noqa: B007
                inside = {p for p in depth for path in paths if p != path and is_below(p, path) and p not in paths}
                if inside <= done:
                    break
            else:
                raise Unprintable("classes that hold one another")
            order.append(cls)
            done |= set(paths)
            del waiting[cls]
            self._define(cls, sorted(paths, key=lambda p: (-len(prefixes(p)), list(self.tree.classes).index(p))))

    def _define(self, cls: type, paths: list[str]) -> None:
        instances: list[Instance] = []
        nested = [path for path in paths if any(is_below(other, path) and other != path for other in paths)]
        if nested:  # a class with instances of itself inside: those first
            inner = [path for path in paths if path not in nested]
            self._define(cls, inner)
            self._define(cls, nested)
            return
        for path in paths:
            instances.append(self._instance(path))
        if len({len(instance.body.inputs) for instance in instances}) > 1:
            instances = [_with_any_number(instance) for instance in instances]
        taken = {definition.name for definition in self.definitions}
        instances = [grown(instance) for instance in instances]
        # What has the most in it comes first: the others have a part of it.
        for kind in merged(sorted(instances, key=lambda one: -len(one.body.statements))):
            title = _unused(self._title(cls, kind.instances[0].path), taken)
            taken.add(title)
            definition = Chooser(kind, title).definition()
            self.definitions.append(definition)
            for number, instance in enumerate(kind.instances):
                values = tuple((argument.name, argument.column[number]) for argument in definition.arguments)
                self._made[instance.path] = Term("new", (title, values))

    def _title(self, cls: type, path: str) -> str:
        """A class's name: PyTorch's, but for one of its containers that of its place."""
        if not cls.__module__.startswith("torch.nn.modules.container"):
            return cls.__name__.lstrip("_")
        words = path.rpartition(".")[2] or self.title
        return "".join(word.capitalize() for word in words.split("_") if word) or "Model"

    def _instance(self, path: str) -> Instance:
        calls: dict[str, list[Body]] = {mode: [] for mode in self.modes}
        for mode, bodies in self.bodies.items():
            calls[mode] = [self._within(body, path) for (p, _), body in bodies.found.items() if p == path]
        members = self._members(path)
        dropouts = {relative(p, path) for p, made in self._layers.items() if made.parts[0] == name("nnx.Dropout")}
        joined = [of_two_modes(a, b, dropouts) for a, b in zip(calls["train"], calls["eval"], strict=False)]
        if not calls["train"] or not calls["eval"]:
            one = calls["train"] or calls["eval"]
            if not one:
                return Instance(path, members, Body((), [], None))
            return Instance(path, members, _same(one, path))
        if any(body is None for body in joined):
            return Instance(path, members, _same(calls["train"], path), _same(calls["eval"], path))
        return Instance(path, members, _same([body for body in joined if body is not None], path))

    def _within(self, body: Body, path: str) -> Body:
        """The body with the paths that the module itself has."""

        def to(term: Term) -> Any:
            return at(relative(term.parts[0], path)) if term.kind == "self" else term

        statements = [Statement(s.targets, rewritten(s.value, to), s.when, s.source, s.hint) for s in body.statements]
        return Body(body.inputs, statements, rewritten(body.output, to))

    def _members(self, path: str) -> dict[str, Any]:
        """{name: constructor} of what hangs under a module, in PyTorch's order."""
        found: dict[str, Any] = {}
        everything = [*self._layers, *self._raw, *self._kinds]
        ranks = {p: i for i, p in enumerate(self.tree.classes)}
        for other in everything:
            if other and other != path and is_below(other, path):
                first = relative(other, path).split(".")[0]
                found.setdefault(first, None)
        prefix = f"{path}." if path else ""
        names = sorted(found, key=lambda key: ranks.get(prefix + key, -1))
        return {key: self._constructor(prefix + key) for key in names}

    def _constructor(self, path: str) -> Any:
        if path in self._layers:
            return self._layers[path]
        if path in self._raw:
            return self._raw[path]
        kind = self._kinds.get(path)
        if kind == CLASS:
            return self._made[path]
        if kind == SEQUENTIAL:
            return self._sequential(path)
        if kind == LIST:
            elements = self._elements(path)
            return call("nnx.List", Term("list", tuple(each(elements) or _runs(elements))))
        raise Unprintable(f"the module at {path}")

    def _elements(self, path: str) -> list[Any]:
        """The constructors of a list; a place without a layer holds the identity."""
        children = [p for p in self.tree.classes if p and parent(p) == path]
        count = len(children)
        names = [relative(p, path) for p in children]
        if names != [str(i) for i in range(count)]:
            raise Unprintable(f"a list with other names than numbers ({path})")
        found = []
        for child in children:
            held = child in self._layers or child in self._kinds
            found.append(self._constructor(child) if held else name("nnx.identity"))
        return found

    def _sequential(self, path: str) -> Any:
        functions: dict[str, Any] = {}
        for mode in ("eval", "train"):
            for (p, _), chain in self.bodies[mode].chains.items():
                if p == path:
                    for key, function in chain:
                        functions[key] = _element(function, f"{path}.{key}", self._layers)
        children = [relative(p, path) for p in self.tree.classes if p and parent(p) == path]
        elements = []
        for key in children:
            function = functions.get(key, name("nnx.identity"))
            child = f"{path}.{key}"
            if function == at(child):
                function = self._constructor(child)
            elements.append(function)
        return call("nnx.Sequential", *_runs(elements))


def _element(function: Any, path: str, layers: Mapping[str, Term]) -> Any:
    """What stands in an `nnx.Sequential` for a function; None where nothing does."""
    if not any(term.kind == "self" for term in terms_in(function)):
        return function
    if function == at(path):
        return function
    if isinstance(function, Term) and function.kind == "function" and path in layers:
        value = function.parts[1]
        inner = call(at(path), Term("local", ("x",)))
        layer = layers[path]
        if value.kind == "call" and value.parts[1] == (inner,) and not value.parts[2] and value.parts[0].kind == "name":
            made, arguments, keywords = layer.parts
            if made == name("BatchNorm"):
                return Term("call", (made, arguments, (*keywords[:-1], ("activation", value.parts[0]), keywords[-1])))
    return None


def _runs(elements: list[Any]) -> list[Any]:
    """Elements that are the same one after another as one, with their number."""
    found: list[Any] = []
    for element in elements:
        if found and found[-1].parts[0] == element and _repeats(element):
            found[-1] = Term("run", (element, found[-1].parts[1] + 1))
        else:
            found.append(Term("run", (element, 1)))
    return [one if _repeats(one.parts[0]) else one.parts[0] for one in found]


def _repeats(element: Any) -> bool:
    return isinstance(element, Term) and element.kind in ("new", "call")


def _with_any_number(instance: Instance) -> Instance:
    """The instance with `*inputs`, if all that it does with its inputs is to put them in one list."""
    body = instance.body
    listed = Term("list", tuple(map(local, body.inputs)))
    trees = [s.value for s in body.statements] + [body.output]
    count = sum(term == listed for tree in trees for term in terms_in(tree))
    reads = sum(t.kind == "local" and t.parts[0] in body.inputs for tree in trees for t in terms_in(tree))
    if count != 1 or reads != len(body.inputs) or instance.evaluation is not None:
        return instance

    def to(term: Term) -> Any:
        return local("*") if term == listed else term

    statements = [replace(s, value=rewritten(s.value, to)) for s in body.statements]
    return replace(instance, body=Body(("*",), statements, rewritten(body.output, to)))


def _same(bodies: list[Body], path: str) -> Body:
    """What all calls of one module do."""
    first = bodies[0]
    for other in bodies[1:]:
        found = fit(first, other, None)
        if found is None or not all(a and b for a, b in found.present):
            raise Unprintable(f"{path} is called in ways that differ")
    return first


def _unused(title: str, taken: set[str]) -> str:
    number, found = 1, title
    while found in taken:
        number += 1
        found = f"{title}{number}"
    return found


def _initial(entry: Any, value: Any, learned: bool) -> Any:
    """The value that a variable begins with."""
    shape = tuple(entry.shape)
    dtype = (jnp_type(entry.dtype),)
    flat = np.asarray(value).reshape(-1)
    if flat.size and (flat == flat[0]).all():
        number = shortest(flat[0])
        if number == 0:
            return call("jnp.zeros", shape, *dtype)
        if number == 1:
            return call("jnp.ones", shape, *dtype)
        return call("jnp.full", shape, number, *dtype)
    if learned:
        return call(call("nnx.initializers.normal", 0.02), call(Term("attribute", (RNGS, "params"))), shape, *dtype)
    if entry.persistent and flat.size > 64:
        return call("jnp.zeros", shape, *dtype)
    made = table(np.asarray(value), *dtype)
    if made is None:
        raise Unprintable(f"{entry.name}, {flat.size} numbers that are in no state dict")
    return made
