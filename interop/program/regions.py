"""The parts of a program that calls of one module are, and programs made of another by cutting there.

A node knows the module that its code was called in, and which of that module's calls it was (`Node.repeats`). So the
call of a module is a set of nodes; what they read of nodes around them is what the module was given, and what nodes
around them read of theirs is what it returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from interop.program.nodes import Model, Node, Program, Value, state_names, value_names
from interop.program.operations import BATCH_NORM, CHECK, MODULE


@dataclasses.dataclass(frozen=True)
class Region:
    """One call of a module.

    Attributes:
        path: of the module.
        nodes: the indices of its nodes, in order.
        inputs: the values that it reads from around it, those aside that are made of sizes alone.
        sizes: those that are.
        outputs: its values that are read elsewhere, in order.
    """

    path: str
    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    sizes: tuple[str, ...]
    outputs: tuple[str, ...]


def regions(program: Program, path: str) -> list[Region]:
    """The calls of the module at `path`, in order; of a module that is never called itself, such as a list, that of all
    below it."""
    calls: dict[int, list[int]] = {}
    for index, node in enumerate(program.nodes):
        if is_below(node.module, path):
            calls.setdefault(dict(map(_counted, node.repeats)).get(path, 0), []).append(index)
    return [_region(program, path, indices) for _, indices in sorted(calls.items())]


def is_below(module: str, path: str) -> bool:
    """Whether a module is the one at `path`, or inside of it."""
    return not path or module == path or module.startswith(path + ".")


def _counted(call: str) -> tuple[str, int]:
    path, _, number = call.rpartition("@")
    return path, int(number)


def _region(program: Program, path: str, indices: list[int]) -> Region:
    inside = set(indices)
    own = {program.nodes[index].name for index in indices}
    read = dict.fromkeys(name for index in indices for name in _read(program.nodes[index]) if name not in own)
    elsewhere = {name for index, node in enumerate(program.nodes) if index not in inside for name in _read(node)}
    elsewhere.update(value_names((program.output, program.updates)))
    sizes = program.made_of_sizes
    return Region(
        path=path,
        nodes=tuple(indices),
        inputs=tuple(name for name in read if name not in sizes),
        sizes=tuple(name for name in read if name in sizes),
        outputs=tuple(program.nodes[i].name for i in indices if program.nodes[i].name in elsewhere - sizes),
    )


def _read(node: Node) -> Iterator[str]:
    return value_names((node.args, node.kwargs))


def value_of(program: Program, name: str) -> str:
    """The value that a name means: a node's, or what the module at that path returned, at its first call.

    Raises:
        ValueError: for a name that is neither, and for a module that returned several values.
    """
    if any(node.name == name for node in program.nodes):
        return name
    found = regions(program, name)
    if not found:
        raise ValueError(
            f"{name!r} is no module that the program calls (one that does nothing, an Identity say, leaves no "
            "trace in it), and no name of a node"
        )
    if len(found[0].outputs) != 1:
        values = ", ".join(found[0].outputs) or "none that others read"
        raise ValueError(f"{name!r} returned several values: name one of them, {values}")
    return found[0].outputs[0]


def cut(program: Program, wanted: Mapping[str, str]) -> Program:
    """The program up to the last of the wanted values, which it returns by the keys of `wanted`.

    BatchNorm layers and buffers that come after it are not moved any more; those before it are, as they were.
    """
    index = {node.name: i for i, node in enumerate(program.nodes)}
    last = max((index[value] for value in wanted.values()), default=-1)
    head = program.nodes[: last + 1]
    there = {given.name for given in program.inputs} | {node.name for node in head}
    # A buffer may be moved by nodes that come later and read only what is there.
    for node in program.nodes[last + 1 :]:
        apart = node.operation in (BATCH_NORM, CHECK)
        if not apart and all(name in there for name in _read(node)) and _moves(program, node.name):
            there.add(node.name)
            head = (*head, node)
    updates = {name: value for name, value in program.updates.items() if all(v in there for v in value_names(value))}
    output = ("dict", [[key, ("leaf", Value(value))] for key, value in wanted.items()])
    return dataclasses.replace(program, nodes=live(head, (output, updates)), output=output, updates=updates)


def _moves(program: Program, name: str) -> bool:
    return any(name in value_names(value) for value in program.updates.values())


def live(nodes: Iterable[Node], results: Any) -> tuple[Node, ...]:
    """The nodes that the results depend on, checks, and BatchNorm layers, whose statistics move whoever uses their
    output."""
    wanted, kept = set(value_names(results)), []
    for node in reversed(list(nodes)):
        if node.name in wanted or node.operation in (BATCH_NORM, CHECK, MODULE):
            wanted.update(_read(node))
            kept.append(node)
    return tuple(reversed(kept))


def replaced(program: Program, paths: Iterable[str]) -> Program:
    """The program with the calls of these modules as nodes `MODULE`, for another module to compute.

    Raises:
        ValueError: for a module that the program does not call, or not with one value for one.
    """
    for path in paths:
        found = regions(program, path)
        if not found:
            raise ValueError(
                f"the module at {path!r} was replaced, and the program does not say where it was called: it did "
                "nothing there (an Identity, or dropout in eval mode), or it is not called. Replace it in the PyTorch "
                "module, and import that"
            )
        for call in found:
            program = _with_call(program, call)
    return program


def _with_call(program: Program, call: Region) -> Program:
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        raise ValueError(
            f"the module at {call.path!r} was replaced; what takes its place takes one array and gives one, and it "
            f"took {len(call.inputs)} and gave {len(call.outputs)}. Replace the modules inside of it"
        )
    (given,), (result,) = call.inputs, call.outputs
    by_name = {node.name: node for node in program.nodes}
    node = Node(result, MODULE, (Value(given), call.path), {}, module=call.path, source=by_name[result].source)
    own = {program.nodes[index].name for index in call.nodes}
    # in the place of the first of its nodes that comes after what it is given
    nodes: list[Node] = []
    ready = given in {item.name for item in program.inputs}
    put = False
    for other in program.nodes:
        if not put and ready and other.name in own:
            nodes.append(node)
            put = True
        if other.name not in own:
            nodes.append(other)
        ready = ready or other.name == given
    updates = {n: v for n, v in program.updates.items() if not own.difference([result]).intersection(value_names(v))}
    return dataclasses.replace(program, nodes=tuple(nodes), updates=updates)


def entry_below(model: Model, name: str, path: str) -> str | None:
    """The name relative to `path` of an entry of the state, or of one tied to it; None if none lies below `path`."""
    prefix = f"{path}." if path else ""
    tied = {entry.same_as or entry.name for entry in model.entries if entry.name == name}
    names = [name, *(entry.name for entry in model.entries if {entry.name, entry.same_as} & tied)]
    return next((found.removeprefix(prefix) for found in names if found.startswith(prefix)), None)


def state_read(program: Program, call: Region) -> Iterator[str]:
    """The entries of the state that a call reads."""
    for index in call.nodes:
        node = program.nodes[index]
        yield from state_names((node.args, node.kwargs))
