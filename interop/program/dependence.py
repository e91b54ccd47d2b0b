"""What in a program depends on what it is called with."""

from __future__ import annotations

from collections.abc import Iterator

from interop.program.nodes import Program, value_names


def moved_by_inputs(program: Program) -> Iterator[str]:
    """The entries of the state that a call moves by what it is called with; a counter of calls is none of them."""
    reached = {given.name for given in program.inputs}
    for node in program.nodes:
        if any(name in reached for name in value_names((node.args, node.kwargs))):
            reached.add(node.name)
    for name, value in program.updates.items():
        if any(part in reached for part in value_names(value)):
            yield name
