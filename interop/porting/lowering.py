"""A program as steps: each node written by its printer, on what the nodes before it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import interop.porting.printers  # noqa: F401  # registers them
from interop.porting.looking import Dim, Seen, look
from interop.porting.printers.elementwise import jnp_type
from interop.porting.printers.registry import printer
from interop.porting.tables import shortest, table
from interop.porting.terms import Term, at, index, local, substituted, terms_in
from interop.porting.values import Step, Tensor, Unprintable, Writer, plain_order
from interop.program.nodes import Model, Node, Program, State, Value, map_leaves, value_names
from interop.program.operations import CHECK, DROPPED


class Lowered:
    """One mode's steps, members by path, and result.

    Attributes:
        steps: in order; those that nothing reads are left out.
        members: constructors of layers by path.
        output: the program's output structure with terms for leaves.
        problems: {what cannot be written: where}.
    """

    def __init__(self, model: Model, program: Program, arrays: Mapping[str, Any], leaves: frozenset[str]) -> None:
        self.program = program
        entries = {entry.name: entry for entry in model.entries}
        self.writer = writer = Writer(model, program, look(model, program), entries, dict(arrays), leaves=leaves)
        self.problems: dict[str, list[str]] = {}
        for node in program.nodes:
            for one in value_names((node.args, node.kwargs)):
                writer.readers.setdefault(one, set()).add(node.module)
        for given in program.inputs:
            seen = writer.seen[given.name]
            order = (0, 2, 3, 1) if seen.ndim == 4 else plain_order(seen.ndim)
            writer.values[given.name] = Tensor(local(given.name), seen, order)
        for node in program.nodes:
            self._write(node)
        self.output = None if self.problems else map_leaves(self._result, program.output)
        self.updates = [name for name in program.updates if not name.endswith("num_batches_tracked")]
        self.steps, same = _once(self._live())
        self.output = self.output and map_leaves(lambda leaf: substituted(leaf, same), self.output)
        self.members = writer.members

    @property
    def shapes(self) -> dict[str, tuple[Dim, ...]]:
        """Of each local that is one array, as it lies there: images with channels last."""
        values = [v for v in self.writer.values.values() if isinstance(v, Tensor) and v.vector is None]
        return {v.term.parts[0]: v.laid for v in values if isinstance(v.term, Term) and v.term.kind == "local"}

    def _write(self, node: Node) -> None:
        w = self.writer
        w.node = node
        if node.operation in (CHECK, *DROPPED):
            return
        try:
            write = printer(node.operation)
            if write is None:
                raise Unprintable("no expression for it yet")
            args, kwargs = (map_leaves(self._resolved, tree) for tree in (node.args, node.kwargs))
            w.values[node.name] = write(w, *args, **kwargs)
        except Exception as error:
            w.values[node.name] = _blank(w, node)
            if isinstance(error, Unprintable) or not self.problems:
                text = (
                    f"{node.operation} ({error})" if isinstance(error, Unprintable) else f"{node.operation}: {error!r}"
                )
                self.problems.setdefault(text, []).append(node.module)
                if not isinstance(error, Unprintable):
                    raise

    def _resolved(self, leaf: Any) -> Any:
        w = self.writer
        if isinstance(leaf, Value):
            return w.values[leaf.name]
        if isinstance(leaf, State):
            entry = w.entries[leaf.name]
            name = entry.same_as or entry.name
            seen = Seen(entry.shape, entry.dtype)
            if entry.kind == "constant":
                return Tensor(self._constant(name, entry.dtype), seen, plain_order(seen.ndim))
            return Tensor(index(at(name), ...), seen, plain_order(len(entry.shape)), state=name)
        return leaf

    def _constant(self, name: str, dtype: str) -> Any:
        """A tensor of PyTorch's code itself, as what makes it."""
        value = np.asarray(self.writer.arrays[name])
        if not value.ndim:
            return shortest(value[()])
        made = table(value, jnp_type(dtype))
        if made is None:
            raise Unprintable(f"a constant of {value.size} numbers")
        return made

    def _result(self, leaf: Any) -> Any:
        found = self._resolved(leaf)
        return (
            self.writer.plain(found)
            if isinstance(found, Tensor) and found.ndim != 4
            else (self.writer.arranged(found, (0, 2, 3, 1)) if isinstance(found, Tensor) else found)
        )

    def _live(self) -> list[Step]:
        wanted = {t.parts[0] for t in terms_in(_terms(self.output)) if t.kind == "local"}
        kept = []
        for step in reversed(self.writer.steps):
            if step.local in wanted or step.node.operation == "jaxnorm.batch_norm.default":
                kept.append(step)
                wanted |= {t.parts[0] for t in terms_in(step.term) if t.kind == "local"}
        return kept[::-1]


def _once(steps: list[Step]) -> tuple[list[Step], dict[str, Term]]:
    """The steps, those aside that compute what one before them in the same call of the same module does; and what
    stands for the results of these."""
    found: list[Step] = []
    first: dict[Any, str] = {}
    same: dict[str, Term] = {}
    for step in steps:
        term = substituted(step.term, same)
        key = (step.node.module, step.node.repeats, term)
        if all(t.kind != "self" for t in terms_in(term)):
            if key in first:
                same[step.local] = local(first[key])
                continue
            first[key] = step.local
        found.append(replace(step, term=term))
    return found, same


def _terms(tree: Any) -> tuple[Any, ...]:
    found: list[Any] = []
    map_leaves(found.append, tree)
    return tuple(found)


def _blank(w: Writer, node: Node) -> Any:
    """A result of the right shapes, for what cannot be written."""

    def of(seen: Any, number: int | None) -> Any:
        if isinstance(seen, tuple):
            return tuple(of(one, i) for i, one in enumerate(seen))
        return Tensor(local(node.name), seen, plain_order(seen.ndim)) if isinstance(seen, Seen) else seen

    return of(w.seen[node.name], None)
