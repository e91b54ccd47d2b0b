"""What each value of a program is: shapes, element types and numbers, by running it on shapes for two batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from interop.ops.dtypes import jax_dtype
from interop.ops.layout import is_tensor
from interop.program.nodes import DType, Entry, Model, Program
from interop.program.operations import BATCH_NORM, CUSTOM_GRADIENT
from interop.running.evaluate import Context, evaluate, resolved

_CHOICES = ((6, 10), (4, 6), (12, 20), (3, 5), (2, 3))


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that goes with the batch: `batch * times + more`."""

    times: int
    more: int


Dim = int | Size


@dataclasses.dataclass(frozen=True)
class Seen:
    """A tensor. PyTorch's order of dimensions."""

    shape: tuple[Dim, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        return len(self.shape)


def look(model: Model, program: Program) -> dict[str, Any]:
    """{value: what it is}: `Seen`, `Dim`, another constant, or a tuple of these for an operation of several results.

    Raises:
        ValueError: if the program runs for no two batch sizes (its code has branches for each).
    """
    problem: Exception | None = None
    for first, second in _CHOICES:
        try:
            one, other = (_look(model, program, batch) for batch in (first, second))
        except Exception as error:
            problem = error
            continue
        return {name: _joined(one[name], other[name], first, second) for name in one}
    raise ValueError(f"{model.name} was traced for one size of batch") from problem


def _look(model: Model, program: Program, batch: int) -> dict[str, Any]:
    entries: dict[str, Entry] = {entry.name: entry for entry in model.entries}

    def state(name: str) -> jax.Array:
        return jnp.zeros(entries[name].shape, jax_dtype(DType(entries[name].dtype)))

    def layer(path: str) -> Any:
        raise ValueError(f"the BatchNorm layer {path} has no part in shapes")

    context = Context(program, state, layer, lambda: jax.random.key(0), None, model.torch, masks={})
    inputs = {
        item.name: jax.ShapeDtypeStruct(
            tuple(batch if isinstance(n, str) else n for n in item.shape), jax_dtype(DType(item.dtype))
        )
        for item in program.inputs
    }
    found: dict[str, Any] = {}

    def compute(arrays: dict[str, Any]) -> int:
        values: dict[str, Any] = dict(arrays)
        for node in program.nodes:
            if node.operation == BATCH_NORM:
                values[node.name] = resolved(node.args[0], values, context)
            elif node.operation == CUSTOM_GRADIENT:
                values[node.name] = [resolved(leaf, values, context) for leaf in node.args[1]]
            else:
                values[node.name] = evaluate(node, values, context)
        found.update({name: _described(value) for name, value in values.items()})
        return 0

    jax.eval_shape(compute, inputs)
    return found


def _described(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    return Seen(tuple(value.shape), str(value.dtype)) if is_tensor(value) else value


def _joined(one: Any, other: Any, first: int, second: int) -> Any:
    """One value seen with two batches."""
    if isinstance(one, tuple):
        return tuple(_joined(a, b, first, second) for a, b in zip(one, other, strict=True))
    if isinstance(one, Seen):
        shape = tuple(
            _size(a, b, first, second)
            for a, b in zip(one.shape, other.shape, strict=True)
            if isinstance(a, int) and isinstance(b, int)
        )
        return Seen(shape, one.dtype)
    if type(one) is int:
        return _size(one, other, first, second)
    if one != other and not (one != one and other != other):
        raise ValueError(f"a number that goes with the batch: {one} and {other}")
    return one


def _size(a: int, b: int, first: int, second: int) -> Dim:
    if a == b:
        return a
    times, rest = divmod(b - a, second - first)
    if rest:
        raise ValueError(f"a size that goes with the batch: {a} and {b}")
    return Size(times, a - times * first)
