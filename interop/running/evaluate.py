"""One node of a program: its operation, applied to values that know their layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import interop.ops
import jaxnorm
from interop.ops.dtypes import is_float
from interop.ops.layout import Tensor, arranged, array_of, axis_of, elementwise, is_tensor, laid, order_of, plain
from interop.program.nodes import (
    Backward,
    Node,
    Program,
    State,
    Value,
    every_node,
    map_leaves,
    state_names,
    value_names,
)
from interop.program.operations import BATCH_NORM, CUSTOM_GRADIENT, MODULE, RUN
from interop.running.batch_norm import TracedBatchNorm
from interop.running.foreign import call_module
from interop.running.values import parts
from jaxnorm.nnx_batch_norm import write


def place(node: Node) -> str:
    return (node.module or "the model itself") + (f" ({node.source})" if node.source else "")


class Context(NamedTuple):
    """Where nodes find what is not computed by other nodes."""

    program: Program
    state: Callable[[str], jax.Array]  # the value of an entry, in the type computed in
    layer: Callable[[str], jaxnorm.nnx.BatchNorm]  # the BatchNorm layer at a path
    key: Callable[[], jax.Array]  # a key to draw from
    dtype: np.dtype | None  # the type computed in; None for the arrays' own
    torch: str  # the version of PyTorch whose rules hold
    masks: Mapping[str, jax.Array]  # for nodes that are BatchNorm layers, which values count; none: all


def resolved(leaf: Any, values: Mapping[str, Any], context: Context) -> Any:
    """What a leaf of a node's arguments stands for."""
    if isinstance(leaf, Value):
        return values[leaf.name]
    return context.state(leaf.name) if isinstance(leaf, State) else leaf


def evaluate(node: Node, values: Mapping[str, Any], context: Context) -> Any:
    """The node's result."""
    args, kwargs = (map_leaves(lambda x: resolved(x, values, context), tree) for tree in (node.args, node.kwargs))
    try:
        with jax.named_scope(node.module.replace(".", "/") or "forward"):  # profiles show layer4/1/conv2
            result = _evaluated(node, args, kwargs, values, context)
    except Exception as error:
        error.add_note(f"in the operation {node.operation} of {place(node)}")
        raise
    own = node.operation in RUN
    return result if own or context.dtype is None else _narrowed(result, node, values, context)


def _evaluated(
    node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[str, Any], context: Context
) -> Any:
    if node.operation == BATCH_NORM:
        return _batch_norm(context.layer(args[1]), args[0], context.masks.get(node.name), *args[2:])
    if node.operation == CUSTOM_GRADIENT:
        return custom_gradient(args[0], args[1], args[2], values, context)
    if node.operation == MODULE:
        y = call_module(context.layer(args[1]), args[0])
        return laid(computing(array_of(y), context.dtype), order_of(y))
    return _apply(node.operation, args, kwargs, context)


def computing(x: jax.Array, dtype: np.dtype | None) -> jax.Array:
    return x if dtype is None or not is_float(x.dtype) else x.astype(dtype)


def _narrowed(result: Any, node: Node, values: Mapping[str, Any], context: Context) -> Any:
    """The result in the type computed in, if a tensor made of sizes and numbers alone is what widened it.

    The code that makes it (`torch.zeros(n, dtype=x.dtype)`, say) was recorded with the type of the example.
    """
    made = context.program.made_of_sizes
    given: dict[bool, set[np.dtype]] = {True: set(), False: set()}

    def look(leaf: Any) -> None:
        if isinstance(leaf, (Value, State)):
            for x in jax.tree.leaves(resolved(leaf, values, context), is_leaf=is_tensor):
                if is_tensor(x) and is_float(x.dtype):
                    given[isinstance(leaf, Value) and leaf.name in made].add(x.dtype)

    map_leaves(look, (node.args, node.kwargs))
    if node.name in made or not given[True] or given[False] != {context.dtype}:
        return result

    def narrow(x: Any) -> Any:
        wide = is_tensor(x) and is_float(x.dtype)
        return laid(array_of(x).astype(context.dtype), order_of(x)) if wide else x

    return jax.tree.map(narrow, result, is_leaf=is_tensor)


def _apply(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context) -> Any:
    operation = interop.ops.lookup(name, context.torch)
    if operation is None:
        raise NotImplementedError(f"{name} has no JAX function")
    if operation.random:
        kwargs["key"] = context.key()
    if operation.layout == "aware":
        return operation.function(*args, **kwargs)
    if operation.layout == "elementwise":
        key = {"key": kwargs.pop("key")} if operation.random else {}
        return elementwise(lambda *a, **k: operation.function(*a, **k, **key), args, kwargs)
    return operation.function(*map(plain, args), **{key: plain(x) for key, x in kwargs.items()})


def _batch_norm(
    layer: jaxnorm.nnx.BatchNorm,
    x: Tensor,
    counted: jax.Array | None,
    mask: jax.Array | None = None,
    row_dim: int = 0,
) -> Tensor:
    """The layer's output. `mask` says which rows along a dimension the model's code took, `counted` which values count
    besides (of a padded batch).
    """
    counter = layer.num_batches_tracked
    counts = layer.counts if isinstance(layer, TracedBatchNorm) else True
    count = None if counter is None or counts else counter[...]
    if mask is not None:
        dims = [1] * x.ndim
        dims[axis_of(x, row_dim)] = mask.size
        mask = mask.reshape(dims)
    if counted is not None:
        mask = counted if mask is None else mask & counted
    y = layer(array_of(x), axis=axis_of(x, 1), mask=mask)
    if count is not None:
        write(counter, count)
    return laid(y, order_of(x))


def custom_gradient(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], backward: Backward, values: Mapping[str, Any], context: Context
) -> list[Tensor]:
    """The outputs, as a function of the inputs whose derivative the user wrote: `torch.autograd.Function`.

    What `backward` reads of the values around it is kept for it, as what is saved in `ctx` is. Its gradient of a
    complex value is the conjugate of JAX's.
    """
    arrays, outputs_of = parts(outputs)
    around, around_of = parts({name: values[name] for name in value_names(backward)})
    entries = {name: context.state(name) for name in state_names(backward)}
    operations = [interop.ops.lookup(node.operation, context.torch) for node in every_node(backward.nodes)]
    keys = [context.key() for operation in operations if operation is not None and operation.random]
    Kept = tuple[list[jax.Array], dict[str, jax.Array], list[jax.Array]]

    @jax.custom_vjp
    def call(inputs: list[jax.Array], arrays: list[jax.Array], kept: Kept) -> list[jax.Array]:
        return arrays

    def forward(inputs: list[jax.Array], arrays: list[jax.Array], kept: Kept) -> tuple[list[jax.Array], Kept]:
        return call(inputs, arrays, kept), kept  # for a second derivative goes through here

    def gradients(kept: Kept, given: list[jax.Array]) -> tuple[list[jax.Array], None, None]:
        around, entries, keys = kept
        draws = iter(keys)
        here = {**around_of(around), **dict(zip(backward.gradients, outputs_of(map(jnp.conj, given)), strict=True))}
        inner = context._replace(state=entries.__getitem__, key=lambda: next(draws))
        for node in backward.nodes:
            here[node.name] = evaluate(node, here, inner)
        found = [resolved(leaf, here, inner) for leaf in backward.results]
        shaped = zip(found, inputs, strict=True)
        return [jnp.conj(arranged(g, order_of(x))).astype(x.dtype) for g, x in shaped], None, None

    call.defvjp(forward, gradients)
    result: list[Tensor] = outputs_of(call([array_of(x) for x in inputs], arrays, (around, entries, keys)))
    return result
