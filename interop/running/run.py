"""Runs a program on a module's state: each node's operation in turn, on values that know their layout."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax import lax

import interop.ops
from interop.ops.dtypes import default_float_of
from interop.ops.layout import plain
from interop.program import structure
from interop.program.nodes import Model, Program, every_node
from interop.program.operations import BATCH_NORM, RUN
from interop.running.evaluate import Context, computing, evaluate, place, resolved
from interop.running.masks import masks, of_examples
from interop.running.places import module_at, variable
from interop.running.segments import recomputed, segments
from jaxnorm.nnx_batch_norm import write

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from interop.running.module import TracedModule


def unsupported(model: Model) -> None:
    """Raises NotImplementedError with every operation of the model that has no JAX function, and the layers that use
    it.
    """
    where: dict[str, dict[str, None]] = {}
    for program in (model.train, model.eval):
        for node in every_node(program.nodes):
            if node.operation not in RUN and interop.ops.lookup(node.operation, model.torch) is None:
                where.setdefault(node.operation, {})[place(node)] = None
    if not where:
        return
    lines = [
        f"  {name}, used by {', '.join(list(places)[:8])}{' ...' if len(places) > 8 else ''}"
        for name, places in sorted(where.items())
    ]
    raise NotImplementedError(
        f"{model.name} uses operations that have no JAX function yet:\n" + "\n".join(lines) + "\n"
        'Register one: @interop.register("library::operation"), a function of arrays with the arguments that '
        "PyTorch's schema has."
    )


def run(program: Program, inputs: Mapping[str, jax.Array], root: TracedModule, mask: ArrayLike | None = None) -> Any:
    """The program's result on `inputs`, with the state of `root`, whose buffers and running statistics it updates.

    `mask` says which examples count; see `TracedModule.__call__`.
    """
    with default_float_of(root._interop.model.default_dtype):
        return _run(program, inputs, root, mask)


def _run(program: Program, inputs: Mapping[str, jax.Array], root: TracedModule, mask: ArrayLike | None) -> Any:
    recorded = root._interop
    dtype = recorded.compute_dtype
    read: dict[str, jax.Array] = {}

    def state(name: str) -> jax.Array:
        if name not in read:
            read[name] = computing(variable(root, name)[...], dtype)
        return read[name]

    layer = functools.partial(module_at, root)
    context = Context(program, state, layer, _keys(program, root), dtype, recorded.model.torch, masks={})
    values: dict[str, Any] = {name: computing(x, dtype) for name, x in inputs.items()}
    if mask is not None:
        examples = of_examples(program, inputs, mask)
        if _uses_batch_statistics(program, layer):
            context = context._replace(masks=masks(program, dict(values), context, examples))
    for part, again in segments(program, recorded.recompute):
        if again:
            recomputed(part, values, context, recorded.policy)
        for index in part:
            if not again:
                node = program.nodes[index]
                values[node.name] = evaluate(node, values, context)
            for name in program.last_use.get(index, ()):
                values.pop(name, None)

    def found(leaf: Any) -> Any:
        return plain(resolved(leaf, values, context))

    for name, value in program.updates.items():
        target = variable(root, name)
        write(target, found(value).astype(target[...].dtype))
    return structure.build(program.output, found)


def _uses_batch_statistics(program: Program, layer: Callable[[str], nnx.BatchNorm]) -> bool:
    layers = (layer(node.args[1]) for node in program.nodes if node.operation == BATCH_NORM)
    return any(not norm.use_running_average or norm.mean is None for norm in layers)


def _keys(program: Program, root: TracedModule) -> Callable[[], jax.Array]:
    """Draws from the model's random stream, once a call: the draws of a call are its parts. Replicas that share
    BatchNorm statistics draw differently."""
    if not _is_random(program, root._interop.model.torch):
        return root._interop_rngs.dropout
    key = root._interop_rngs.dropout()
    for axis in _axes(root):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    parts = itertools.count()
    return lambda: jax.random.fold_in(key, next(parts))


def _is_random(program: Program, torch: str) -> bool:
    operations = (interop.ops.lookup(node.operation, torch) for node in every_node(program.nodes))
    return any(operation is not None and operation.random for operation in operations)


def _axes(root: TracedModule) -> list[Hashable]:
    """The axis names of the model's BatchNorm layers."""
    found: dict[Hashable, None] = {}
    for _, node in nnx.iter_graph(root):
        axis = getattr(node, "axis_name", None) if isinstance(node, nnx.BatchNorm) else None
        for name in axis if isinstance(axis, (tuple, list)) else (axis,):
            if name is not None:
                found[name] = None
    return list(found)
