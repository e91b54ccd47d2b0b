"""What a model's siblings differ in, as arguments with defaults: how many blocks a stage has, how many classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interop.porting.classes import Argument, Definition
from interop.porting.terms import Term, index, rewritten

_LISTS = ("nnx.Sequential", "nnx.List")


def with_arguments(root: Definition, definitions: Mapping[str, Definition], classes: int | None) -> None:
    """Gives the model's own class its arguments."""
    depths: list[int] = []

    def to(term: Term) -> Any:
        if term.kind == "call" and term.parts[0].kind == "name" and term.parts[0].parts[0] in _LISTS:
            return _counted(term, depths)
        if term.kind == "new":
            return _passed_on(term, definitions, depths)
        return term

    members = {key: rewritten(term, to) for key, term in root.members.items()}
    if depths:
        root.members = members
        root.arguments.append(Argument("layers", [tuple(depths)], "layers", tuple(depths)))
    if classes is not None:
        _classes(root, classes)


def _counted(term: Term, depths: list[int]) -> Term:
    """A stage: the last of its blocks as often as the argument says."""
    function, arguments, keywords = term.parts
    inner = arguments[0].parts if function.parts[0] == "nnx.List" else arguments
    blocks = [item for item in inner if isinstance(item, Term) and item.kind == "run" and item.parts[0].kind == "new"]
    if len(blocks) != len(inner) or not blocks or len({block.parts[0].parts[0] for block in blocks}) > 1:
        return term
    counts = [block.parts[1] for block in blocks]
    if not all(isinstance(count, int) for count in counts) or len(blocks) > 2 or (len(blocks) == 1 and counts[0] == 1):
        return term
    before = sum(counts[:-1])
    depths.append(sum(counts))
    here: Any = index(Term("argument", ("layers",)), len(depths) - 1)
    last = Term("run", (blocks[-1].parts[0], Term("binary", ("-", here, before)) if before else here))
    made = (*blocks[:-1], last)
    new = (Term("list", made),) if function.parts[0] == "nnx.List" else made
    return Term("call", (function, new, keywords))


def _passed_on(term: Term, definitions: Mapping[str, Definition], depths: list[int]) -> Term:
    """A stage that is a class, and has its number of blocks from an argument."""
    title, values = term.parts
    roles = {argument.name: argument.role for argument in definitions[title].arguments}
    new = []
    for key, value in values:
        if roles.get(key) == "depth" and isinstance(value, int):
            depths.append(value)
            value = index(Term("argument", ("layers",)), len(depths) - 1)
        new.append((key, value))
    return Term("new", (title, tuple(new)))


def _classes(root: Definition, classes: int) -> None:
    """The last layer's outputs, if they are the model's."""
    for key in reversed(list(root.members)):
        found = root.members[key]
        if not isinstance(found, Term) or found.kind != "call":
            continue
        function, arguments, keywords = found.parts
        if function == Term("name", ("nnx.Linear",)) and len(arguments) == 2 and arguments[1] == classes:
            argument = Term("argument", ("num_classes",))
            root.members[key] = Term("call", (function, (arguments[0], argument), keywords))
            root.arguments.append(Argument("num_classes", [classes], "classes", classes))
            return
