"""Parts of a program whose insides are computed again for the backward pass instead of being kept: jax.checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

import interop.ops
from interop.program.nodes import Program, every_node, state_names, value_names
from interop.program.operations import BATCH_NORM, MODULE
from interop.running.evaluate import Context, evaluate
from interop.running.values import parts


def segments(program: Program, patterns: tuple[str, ...]) -> Iterator[tuple[range, bool]]:
    """The program's nodes by index, cut into runs of neighbours: (run, whether it is one to compute again).

    A node belongs to the outermost module above it whose path matches a pattern.
    """
    if not patterns:
        yield range(len(program.nodes)), False
        return
    owner = functools.cache(lambda path: next((above for above in _above(path) if matches(above, patterns)), None))
    start = 0
    for index, node in enumerate(program.nodes):
        following = program.nodes[index + 1].module if index + 1 < len(program.nodes) else None
        if following is None or owner(following) != owner(node.module):
            yield range(start, index + 1), owner(node.module) is not None
            start = index + 1


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the whole path of a module."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def recomputed(part: range, values: dict[str, Any], context: Context, policy: Callable[..., Any] | None) -> None:
    """Evaluates the nodes of `part` under jax.checkpoint; puts into `values` what others read of them.

    What the nodes read and write goes in and out as arguments and results: values, state, BatchNorm layers, keys.
    """
    program = context.program
    nodes = [program.nodes[index] for index in part]
    inside = {node.name for node in nodes}
    gone = {name for index in part for name in program.last_use.get(index, ())}
    taken = {n: values[n] for node in nodes for n in value_names((node.args, node.kwargs)) if n not in inside}
    entries = {name: context.state(name) for node in nodes for name in state_names((node.args, node.kwargs))}
    norms = {n.args[1]: context.layer(n.args[1]) for n in nodes if n.operation in (BATCH_NORM, MODULE)}
    split = {path: nnx.split(layer) for path, layer in norms.items()}
    operations = [interop.ops.lookup(node.operation, context.torch) for node in every_node(nodes)]
    keys = [context.key() for operation in operations if operation is not None and operation.random]
    given, taken_of = parts(taken)
    result_of: list[Callable[[list[jax.Array]], dict[str, Any]]] = []

    def compute(
        given: list[jax.Array],
        entries: dict[str, jax.Array],
        layers: dict[str, nnx.State[Any, Any]],
        keys: list[jax.Array],
    ) -> tuple[list[jax.Array], dict[str, nnx.State[Any, Any]]]:
        here, draws = taken_of(given), iter(keys)
        copies = {path: nnx.merge(split[path][0], state, copy=True) for path, state in layers.items()}
        inner = context._replace(state=entries.__getitem__, layer=copies.__getitem__, key=lambda: next(draws))
        for node in nodes:
            here[node.name] = evaluate(node, here, inner)
        arrays, join = parts({name: here[name] for name in inside - gone})
        result_of[:] = [join]
        return arrays, {path: nnx.state(copy, nnx.Not(nnx.Param)) for path, copy in copies.items()}

    states = {path: state for path, (_, state) in split.items()}
    arrays, moved = jax.checkpoint(compute, policy=policy)(given, entries, states, keys)
    values.update(result_of[0](arrays))
    for path, state in moved.items():
        nnx.update(norms[path], state)
