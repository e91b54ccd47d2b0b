"""The sizes that a layer's code was recorded with, found again from what the layer is called with alone.

torch.export writes each size once, as that of an input of the whole model: in `x.view(x.shape[0], -1)` deep inside, the
batch is `sym_size(images, 0)`. A layer that is called alone has no images. Which of its own input's dimensions that
size is, is found by following shapes through the program with two different choices of sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from interop.ops.dtypes import jax_dtype
from interop.ops.layout import is_tensor, plain
from interop.program import guards
from interop.program.nodes import DType, Entry, Model, Node, Program, value_names
from interop.program.operations import BATCH_NORM, CUSTOM_GRADIENT
from interop.program.regions import Region
from interop.running.evaluate import Context, evaluate, resolved

# Sizes that differ from those in models, and from one another, in most cases; multiples where strides must divide.
_CHOICES = (*((a + 32 * n, a + 32 * (n + 3)) for a in (160, 67, 34) for n in range(4)), (6, 10), (4, 6), (2, 3))
Shape = tuple[int, ...]


def sizes_from(model: Model, mode: str, call: Region, given: Mapping[str, Shape]) -> dict[str, Any]:
    """The values that the call reads from around it and that are made of sizes, where its inputs have these shapes.

    Raises:
        ValueError: for sizes that no dimension of the inputs has.
    """
    if not call.sizes:
        return {}
    program: Program = getattr(model, mode)
    nodes = {node.name: node for node in program.nodes}
    order = _cone(nodes, call.sizes)
    values: dict[str, Any] = {}
    context = _context(model, program)
    for node in order:
        if not _asks_for_size(node):
            values[node.name] = evaluate(node, values, context)
            continue
        source, dim = node.args[0].name, node.args[1]
        if source in given:
            values[node.name] = given[source][dim]
            continue
        name, axis = _dimension(model, mode, call, node.name)
        values[node.name] = given[name][axis]
    return {name: values[name] for name in call.sizes}


def _cone(nodes: Mapping[str, Node], names: tuple[str, ...]) -> list[Node]:
    """The nodes that these values are computed by, in order, down to those that ask for a size."""
    found: dict[str, Node] = {}

    def visit(name: str) -> None:
        if name in found or name not in nodes:
            return
        node = nodes[name]
        if not _asks_for_size(node):
            for read in value_names((node.args, node.kwargs)):
                visit(read)
        found[name] = node

    for name in names:
        visit(name)
    return list(found.values())


def _asks_for_size(node: Node) -> bool:
    return node.operation == "aten.sym_size.int"


class _Seen(NamedTuple):
    inputs: Mapping[str, Shape]
    sizes: Mapping[str, int]


def _dimension(model: Model, mode: str, call: Region, size: str) -> tuple[str, int]:
    """Which dimension of which of the call's inputs is this size, whatever the sizes are."""
    first, second = _two_looks(model, mode, call)
    for name, shape in first.inputs.items():
        for axis, n in enumerate(shape):
            if n == first.sizes[size] and second.inputs[name][axis] == second.sizes[size]:
                return name, axis
    raise ValueError(
        f"{call.path!r} reads a size of the model's inputs ({size}) that none of its own input's dimensions has: call "
        "the model"
    )


@functools.lru_cache(maxsize=64)
def _two_looks(model: Model, mode: str, call: Region) -> tuple[_Seen, _Seen]:
    """The shapes of the call's inputs, and the sizes, for two choices of the sizes that may vary."""
    program: Program = getattr(model, mode)
    names = sorted({n for item in program.inputs for n in item.shape if isinstance(n, str) and n.isidentifier()})
    looks: list[_Seen] = []
    for choice in _CHOICES:
        pair = []
        for start in choice:
            sizes = {name: start + 2 * index for index, name in enumerate(names)}
            if not all(guards.holds(guard, sizes) for guard in program.guards):
                break
            try:
                pair.append(_look(model, program, call, sizes))
            except Exception:  # of operations that sizes do not fit
                break
        if len(pair) == 2:
            looks = pair
            break
    if not looks:
        raise ValueError(f"{call.path!r} reads sizes of the model's inputs, and those are not free: call the model")
    return looks[0], looks[1]


def _look(model: Model, program: Program, call: Region, sizes: Mapping[str, int]) -> _Seen:
    inputs = {
        item.name: jax.ShapeDtypeStruct(
            tuple(sizes[n] if isinstance(n, str) else n for n in item.shape), jax_dtype(DType(item.dtype))
        )
        for item in program.inputs
    }
    asked = {node.name for node in program.nodes if _asks_for_size(node)}
    seen: dict[str, int] = {}
    context = _context(model, program)

    def compute(arrays: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = dict(arrays)
        for index, node in enumerate(program.nodes):
            if index > call.nodes[0]:
                break
            if node.operation == BATCH_NORM:
                values[node.name] = resolved(node.args[0], values, context)
            elif node.operation == CUSTOM_GRADIENT:
                values[node.name] = [resolved(leaf, values, context) for leaf in node.args[1]]
            else:
                values[node.name] = evaluate(node, values, context)
            if node.name in asked:
                seen[node.name] = int(values[node.name])
        return {name: plain(values[name]) for name in call.inputs if is_tensor(values[name])}

    shapes = jax.eval_shape(compute, inputs)
    return _Seen({name: tuple(x.shape) for name, x in shapes.items()}, seen)


def _context(model: Model, program: Program) -> Context:
    """In which all entries of the state are zeros: for shapes."""
    entries: dict[str, Entry] = {entry.name: entry for entry in model.entries}

    def state(name: str) -> jax.Array:
        return jnp.zeros(entries[name].shape, jax_dtype(DType(entries[name].dtype)))

    def layer(path: str) -> Any:
        raise ValueError(f"the BatchNorm layer {path} has no part in shapes")

    return Context(program, state, layer, lambda: jax.random.key(0), None, model.torch, masks={})
