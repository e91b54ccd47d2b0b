"""Runs a program on a module's state: each node's operation in turn, on values that know their layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax import lax

import interop.ops
from interop import structure
from interop._torch_batch_norm import OPERATION as BATCH_NORM
from interop.ops.dtypes import is_float
from interop.ops.layout import Tensor, array_of, axis_of, elementwise, laid, order_of, plain
from interop.program import Model, Node, Program, State, Value, map_leaves
from jaxnorm.nnx import write


def unsupported(model: Model) -> None:
    """Raises NotImplementedError with every operation of the model that has no JAX function, and the layers that use
    it.
    """
    where: dict[str, dict[str, None]] = {}
    for program in (model.train, model.eval):
        for node in program.nodes:
            if node.operation != BATCH_NORM and interop.ops.lookup(node.operation) is None:
                where.setdefault(node.operation, {})[_place(node)] = None
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


def _place(node: Node) -> str:
    return (node.module or "the model itself") + (f" ({node.source})" if node.source else "")


def run(program: Program, inputs: Mapping[str, jax.Array], root: Any) -> Any:
    """The program's result on `inputs`, with the state of `root`, whose buffers and running statistics it updates.

    `root` is a `interop.module.TracedModule`.
    """
    from interop.module import module_at, variable

    compute_dtype = root._interop_dtype
    values: dict[str, Any] = {name: _computing(x, compute_dtype) for name, x in inputs.items()}
    read: dict[str, Any] = {}

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return values[leaf.name]
        if isinstance(leaf, State):
            if leaf.name not in read:
                read[leaf.name] = _computing(variable(root, leaf.name)[...], compute_dtype)
            return read[leaf.name]
        return leaf

    keys = _keys(root)
    for index, node in enumerate(program.nodes):
        args, kwargs = map_leaves(resolve, node.args), map_leaves(resolve, node.kwargs)
        try:
            if node.operation == BATCH_NORM:
                values[node.name] = _batch_norm(module_at(root, args[1]), args[0])
            else:
                values[node.name] = _apply(node.operation, args, kwargs, keys)
        except Exception as error:
            error.add_note(f"in the operation {node.operation} of {_place(node)}")
            raise
        for name in program.last_use.get(index, ()):
            values.pop(name, None)
    for name, value in program.updates.items():
        target = variable(root, name)
        write(target, plain(resolve(value)).astype(target[...].dtype))
    return structure.build(program.output, lambda leaf: plain(resolve(leaf)))


def _computing(x: Any, dtype: Any) -> Any:
    return x if dtype is None or not is_float(x.dtype) else x.astype(dtype)


def _apply(name: str, args: Any, kwargs: dict[str, Any], keys: Callable[[], Any]) -> Any:
    operation = interop.ops.lookup(name)
    if operation is None:
        raise NotImplementedError(f"{name} has no JAX function")
    if operation.random:
        kwargs["key"] = keys()
    if operation.layout == "aware":
        return operation.function(*args, **kwargs)
    if operation.layout == "elementwise":
        key = {"key": kwargs.pop("key")} if operation.random else {}
        return elementwise(lambda *a, **k: operation.function(*a, **k, **key), args, kwargs)
    return operation.function(*map(plain, args), **{key: plain(x) for key, x in kwargs.items()})


def _batch_norm(layer: Any, x: Tensor) -> Tensor:
    counter = layer.num_batches_tracked
    count = None if counter is None or getattr(layer, "counts", True) else counter[...]
    y = layer(array_of(x), axis=axis_of(x, 1))
    if count is not None:
        write(counter, count)
    return laid(y, order_of(x))


def _keys(root: Any) -> Callable[[], Any]:
    """Draws from the model's random stream; replicas that share BatchNorm statistics draw differently."""
    rngs = root._interop_rngs

    def draw() -> Any:
        key = rngs.dropout()
        for axis in _axes(root):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        return key

    return draw


def _axes(root: Any) -> list[Any]:
    """The axis names of the model's BatchNorm layers."""
    found: dict[Any, None] = {}
    for _, node in nnx.iter_graph(root):
        axis = getattr(node, "axis_name", None) if isinstance(node, nnx.BatchNorm) else None
        for name in axis if isinstance(axis, (tuple, list)) else (axis,):
            if name is not None:
                found[name] = None
    return list(found)
