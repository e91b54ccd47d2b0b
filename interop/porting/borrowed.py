"""Arrays of one module that another reads: given to its call, as PyTorch's code gives them.

`self.mlp(self.coordinates)` records operations in `mlp` that read `coordinates`, which is none of its members. So the
module that has it reads it into a local, which is then an input of the other like any value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from interop.porting.terms import Term, at, index, local, rewritten, terms_in
from interop.porting.values import Step
from interop.program.regions import is_below

Call = tuple[str, int]  # of the module at a path, which of its calls


def lent(steps: Sequence[Step], chain: Callable[[Step], list[Call]]) -> list[Step]:
    """The steps, with one that reads such an array before the first that needs it."""
    found: list[Step] = []
    known: dict[tuple[str, Call], str] = {}
    for step in steps:
        calls = chain(step)
        names: dict[Term, Term] = {}
        for path in dict.fromkeys(t.parts[0].parts[0] for t in terms_in(step.term) if _array(t)):
            owner = next(call for call in reversed(calls) if is_below(path, call[0]))
            if owner == calls[-1]:
                continue
            if (path, owner) not in known:
                name = known[path, owner] = f"{step.local}_{len(known)}_lent"
                node = dataclasses.replace(
                    step.node,
                    module=owner[0],
                    repeats=tuple(r for r in step.node.repeats if is_below(owner[0], r.rpartition("@")[0])),
                )
                found.append(Step(name, index(at(path), ...), node))
            names[index(at(path), ...)] = local(known[path, owner])
        found.append(dataclasses.replace(step, term=_renamed(step.term, names)) if names else step)
    return found


def _array(term: Term) -> bool:
    """Whether a term is an array of a module's own."""
    return (
        term.kind == "index"
        and term.parts[1] == (...,)
        and isinstance(term.parts[0], Term)
        and term.parts[0].kind == "self"
    )


def _renamed(tree: Any, names: dict[Term, Term]) -> Any:
    return rewritten(tree, lambda term: names.get(term, term))
