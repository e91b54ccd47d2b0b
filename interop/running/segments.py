"""Parts of a program whose insides are computed again for the backward pass instead of being kept: jax.checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

import interop.ops
from interop.ops.layout import array_of, is_tensor, laid, order_of
from interop.program.nodes import Program, State, map_leaves, value_names
from interop.program.operations import BATCH_NORM
from interop.running.evaluate import Context, evaluate


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
    entries: dict[str, jax.Array] = {}

    def read(leaf: Any) -> None:
        if isinstance(leaf, State):
            entries[leaf.name] = context.state(leaf.name)

    for node in nodes:
        map_leaves(read, (node.args, node.kwargs))
    norms = {node.args[1]: context.layer(node.args[1]) for node in nodes if node.operation == BATCH_NORM}
    split = {path: nnx.split(layer) for path, layer in norms.items()}
    operations = [interop.ops.lookup(node.operation, context.torch) for node in nodes]
    keys = [context.key() for operation in operations if operation is not None and operation.random]
    given, taken_of = _parts(taken)
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
        arrays, join = _parts({name: here[name] for name in inside - gone})
        result_of[:] = [join]
        return arrays, {path: nnx.state(copy, nnx.BatchStat) for path, copy in copies.items()}

    states = {path: state for path, (_, state) in split.items()}
    arrays, moved = jax.checkpoint(compute, policy=policy)(given, entries, states, keys)
    values.update(result_of[0](arrays))
    for path, state in moved.items():
        nnx.update(norms[path], state)


def _parts(values: dict[str, Any]) -> tuple[list[jax.Array], Callable[[list[jax.Array]], dict[str, Any]]]:
    """The arrays among nested values, and what puts others in their place; sizes are no arrays and stay."""
    leaves, tree = jax.tree.flatten(values, is_leaf=is_tensor)
    orders = [order_of(x) if is_tensor(x) else None for x in leaves]
    others = [None if is_tensor(x) else x for x in leaves]

    def join(arrays: list[jax.Array]) -> dict[str, Any]:
        left = iter(arrays)
        filled = [x if order is None else laid(next(left), order) for x, order in zip(others, orders, strict=True)]
        joined: dict[str, Any] = jax.tree.unflatten(tree, filled)
        return joined

    return [array_of(x) for x in leaves if is_tensor(x)], join
