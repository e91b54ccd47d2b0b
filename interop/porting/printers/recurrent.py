"""Recurrent layers: a call of a function for each layer and direction, on the module's own arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interop.porting.printers.registry import prints
from interop.porting.terms import binary, call, index, list_of, name, tuple_of
from interop.porting.values import Tensor, Unprintable, Writer, plain_order


@prints("jaxnorm.recurrent.default")
def recurrent(
    w: Writer, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], kind: str, has_biases: bool,
    layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool, lengths: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `interop.ops.recurrent`."""
    directions = 2 if bidirectional else 1
    count = len(params) // (layers * directions)
    if lengths is not None or x.ndim != 3 or count != (4 if has_biases else 2) or (dropout and layers > 1):
        raise Unprintable("a recurrent layer with lengths, projections, dropout, or of one sequence")
    value = w.arranged(x, plain_order(3) if batch_first else (1, 0, 2))
    ends: list[list[Any]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            start = [index(w.plain(state), at) for state in states]
            weights = [w.plain(one) for one in params[at * count : (at + 1) * count]]
            whole = w.kept(_called(kind, value, start, weights, direction == 1), x)
            outputs.append(index(whole.term, 0))
            last = index(whole.term, 1)
            for i, end in enumerate(ends):
                end.append(index(last, i) if len(ends) > 1 else last)
        value = outputs[0] if directions == 1 else call("jnp.concatenate", list_of(outputs), axis=-1)
        value = w.kept(value, x).term
    found = [w.tensor(value, plain_order(3) if batch_first else (1, 0, 2), 0)]
    found += [w.tensor(call("jnp.stack", list_of(end)), None, i) for i, end in enumerate(ends, 1)]
    return tuple(found)


def _called(kind: str, x: Any, start: list[Any], weights: list[Any], reverse: bool) -> Any:
    options: dict[str, Any] = {"reverse": True} if reverse else {}
    if kind == "lstm":
        return call("lstm", x, tuple_of(start), *_with_one_bias(weights), **options)
    if kind == "gru":
        return call("gru", x, *start, *weights, **options)
    if kind == "rnn_relu":
        options = {"activation": name("nnx.relu"), **options}
    return call("rnn", x, *start, *_with_one_bias(weights), **options)


def _with_one_bias(weights: list[Any]) -> list[Any]:
    """PyTorch has two, of which the sum is used."""
    return [*weights[:2], binary("+", *weights[2:])] if len(weights) == 4 else weights
