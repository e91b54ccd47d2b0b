"""Which examples of a batch count: the mask that `model(x, mask=...)` is given, at each BatchNorm layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend import core

from interop.ops.layout import array_of, laid, order_of, plain
from interop.program import structure
from interop.program.nodes import Program
from interop.program.operations import BATCH_NORM
from interop.running.evaluate import Context, evaluate, place, resolved
from interop.running.rows import BATCH_NORM_INPUT, Mixed, Of, Rows, broadcastable, follow, shape_of

if TYPE_CHECKING:
    from jax.typing import ArrayLike


def of_examples(program: Program, inputs: Mapping[str, jax.Array], mask: ArrayLike) -> jax.Array:
    """The mask as one bool an example.

    Raises:
        ValueError: for a mask of another shape or dtype than that.
    """
    array = jnp.asarray(mask)
    flat = array.reshape(array.shape[:1]) if array.ndim and array.size == array.shape[0] else array
    if flat.ndim != 1 or flat.dtype != jnp.bool_:
        raise ValueError(
            f"mask: expected one bool an example, of the shape (B,), found {array.dtype} of the shape {array.shape}"
        )
    if not any(_has_examples(program, name, x, flat.shape[0]) for name, x in inputs.items()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in inputs.items())
        raise ValueError(f"mask: {flat.shape[0]} examples, which no input has along its first axis: {shapes}")
    return flat


def _has_examples(program: Program, name: str, x: jax.Array, size: int) -> bool:
    """Whether the input's first axis is the batch: one that may vary, where any input has such."""
    first = {item.name: item.shape[0] for item in program.inputs if item.shape}
    varies = any(isinstance(n, str) for n in first.values())
    return bool(x.ndim and x.shape[0] == size and (isinstance(first[name], str) or not varies))


def masks(program: Program, inputs: Mapping[str, jax.Array], context: Context, mask: jax.Array) -> dict[str, jax.Array]:
    """For each node that is a BatchNorm layer, which of its input's values count, broadcastable to the input.

    The program is traced once more, with BatchNorm taken out, and the examples are followed through what JAX made of
    it (`rows.py`).

    Raises:
        ValueError: where the mask cannot be followed: values that several examples have gone into, padding among them,
            reach a BatchNorm layer, an output or a buffer. Names each.
    """
    size = mask.shape[0]
    names = list(inputs)
    probed = context._replace(key=lambda: jax.random.key(0))

    def probe(arrays: list[jax.Array]) -> dict[str, list[Any]]:
        values: dict[str, Any] = dict(zip(names, arrays, strict=True))
        for index, node in enumerate(program.nodes):
            with jax.named_scope(f"node {index}"):
                if node.operation == BATCH_NORM:
                    x = resolved(node.args[0], values, probed)
                    y = BATCH_NORM_INPUT.bind(array_of(x), node=node.name, path=node.args[1], order=order_of(x))
                    values[node.name] = laid(y, order_of(x))
                else:
                    values[node.name] = evaluate(node, values, probed)

        def found(leaf: Any) -> Any:
            return plain(resolved(leaf, values, probed))

        outputs = jax.tree.leaves(structure.build(program.output, found))
        return {"an output": outputs, **{f"the buffer {name}": [found(x)] for name, x in program.updates.items()}}

    jaxpr, shapes = jax.make_jaxpr(probe, return_shape=True)([inputs[name] for name in names])
    rows: dict[str, tuple[Rows, tuple[int, ...]]] = {}
    faults: dict[str, None] = {}

    def at(eqn: core.JaxprEqn) -> str:
        scope = str(eqn.source_info.name_stack).partition("node ")[2]
        digits = scope.partition("/")[0]
        if not digits.isdecimal():
            return eqn.primitive.name
        node = program.nodes[int(digits)]
        return f"{node.operation} in {place(node)}"

    def see(eqn: core.JaxprEqn, found: Of) -> None:
        shape = shape_of(eqn.invars[0])
        if isinstance(found, Rows) and found.axis != list(eqn.params["order"]).index(1):
            rows[eqn.params["node"]] = found, shape
        else:
            why = found.why if isinstance(found, Mixed) else "it normalises each example's channels, or no example"
            faults[f"  the BatchNorm layer {eqn.params['path']}: {why}"] = None

    given: list[Of] = [Rows(0) if _has_examples(program, name, inputs[name], size) else None for name in names]
    results = follow(jaxpr.jaxpr, given, size, see, at)
    places = [name for name, leaves in shapes.items() for _ in leaves]
    faults |= {
        f"  {name}: {one.why}": None for name, one in zip(places, results, strict=True) if isinstance(one, Mixed)
    }
    if faults:
        raise ValueError(
            "mask: several examples have gone into one value, those that do not count among them, and it reaches\n"
            + "\n".join(faults)
        )
    return {name: broadcastable(found, shape, mask) for name, (found, shape) in rows.items()}
