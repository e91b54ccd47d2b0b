"""Values that Python asks for while a module is recorded: `int(self.width)`, `self.flag.item()`, `self.sizes.tolist()`.

A recorded tensor has no value, unless it is made of what no training changes: buffers, parameters that are frozen, and
constants of the code. Its value is then a constant of the program, and so are the entries of the state that it was
made of: the program holds for these values alone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from interop.errors import TraceError
from interop.program.nodes import Entry
from interop.tracing import private
from interop.tracing.graph import written_by

if TYPE_CHECKING:
    import numpy as np
    import torch


class Known:
    """The known values of one recorded call of a module.

    Attributes:
        read: the names of the entries whose values were asked for, and the line that asked first.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """To be made before the module is recorded, whose tensors have no values by then."""
        self.read: dict[str, str] = {}
        self._module = module
        self._state = {name: tensor.detach() for name, tensor in _untrained(module)}
        self._graph: torch.fx.Graph | None = None
        self._last: torch.fx.Node | None = None
        self._entries: dict[torch.fx.Node, str] = {}
        self._values: dict[torch.fx.Node, Any] = {}
        self._origins: dict[torch.fx.Node, frozenset[str]] = {}

    def value(self, tensor: torch.Tensor, line: str) -> torch.Tensor | None:
        """The tensor's value, if it is known; `line` is the code that asks."""
        node = private.recorded_as(tensor)
        if node is None:
            return None
        if node.graph is not self._graph:
            self._begin(node.graph)
        with private.outside_the_trace():
            self._compute(node.graph)
            found = self._of(node)
        if found is None:
            return None
        for name in self._origins[node]:
            self.read.setdefault(name, line)
        value: torch.Tensor = found
        return value

    def _begin(self, graph: torch.fx.Graph) -> None:
        self._graph, self._last, self._values = graph, None, {}
        self._root = private.recording_root()
        nodes = ((private.recorded_as(tensor), name) for name, tensor in _untrained(self._module))
        self._entries = {node: name for node, name in nodes if node is not None and node.op == "placeholder"}

    def _compute(self, graph: torch.fx.Graph) -> None:
        """Computes what can be computed of the nodes that were recorded since the last time."""
        for node in self._new(graph):
            self._last = node
            if node.op == "get_attr":
                self._values[node], self._origins[node] = _held(self._root, node), frozenset()
            elif node.op == "call_function":
                self._call(node)

    def _new(self, graph: torch.fx.Graph) -> Iterator[torch.fx.Node]:
        node = next(iter(graph.nodes), None) if self._last is None else self._last.next
        while node is not None and node.op != "root":
            yield node
            node = node.next

    def _of(self, node: torch.fx.Node) -> Any:
        """The node's value, None if it is not known. That of an entry is a copy, to be written to."""
        name = self._entries.get(node)
        if node not in self._values and name in self._state:
            self._values[node], self._origins[node] = self._state[name].clone(), frozenset({name})
        return self._values.get(node)

    def _call(self, node: torch.fx.Node) -> None:
        import torch

        given = [self._of(item) for item in node.all_input_nodes]
        target: Any = node.target
        drawn = private.is_operation(target) and torch.Tag.nondeterministic_seeded in target.tags
        computes = target is operator.getitem or (private.is_operation(target) and not drawn)
        known = computes and all(value is not None for value in given)
        if known:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._of)
            try:
                with torch.no_grad():
                    self._values[node] = target(*args, **kwargs)
                self._origins[node] = frozenset().union(*(self._origins[item] for item in node.all_input_nodes))
            except Exception:
                known = False
        if not known:
            self._forget(written_by(node))

    def _forget(self, written: list[torch.fx.Node]) -> None:
        """What shares memory with tensors that something unknown was written to is not known any more."""
        import torch

        gone = {private.storage(value) for item in written if isinstance(value := self._of(item), torch.Tensor)}
        for node, value in list(self._values.items()):
            if gone and isinstance(value, torch.Tensor) and private.storage(value) in gone:
                self._values[node] = None


def fixed(
    entries: list[Entry], arrays: Mapping[str, np.ndarray], read: Mapping[str, str], written: Collection[str]
) -> list[Entry]:
    """The entries, with their values where the code has read them (`Known.read`).

    Raises:
        TraceError: for values that were read and that a call of the model, or training, replaces.
    """
    first = {entry.name: entry.same_as or entry.name for entry in entries}
    lines = {first[name]: line for name, line in read.items()}
    moving = sorted(lines.keys() & {first[name] for name in written if name in first})
    if moving:
        raise TraceError(
            "forward reads values as numbers that it also writes, or that training moves; a record holds for one value "
            "alone: " + "; ".join(f"{name} ({lines[name]})" for name in moving) + ". Compute with the tensor itself "
            "(torch.where for a choice), or import the module once it does not write it any more"
        )
    return [
        dataclasses.replace(entry, fixed=arrays[first[entry.name]].tolist()) if first[entry.name] in lines else entry
        for entry in entries
    ]


def _held(root: torch.nn.Module, node: torch.fx.Node) -> torch.Tensor:
    tensor: torch.Tensor = operator.attrgetter(str(node.target))(root)
    return tensor.detach().clone()


def _untrained(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_buffers(remove_duplicate=False)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            yield name, parameter
