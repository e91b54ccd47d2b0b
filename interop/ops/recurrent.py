"""Recurrent layers: torch.nn.LSTM, GRU and RNN over padded sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from interop.ops.random import native_dropout
from interop.ops.registry import register

Cell = Callable[[Any, tuple[Any, ...], Sequence[Any]], tuple[Any, ...]]


def _gates(x: Any, h: Any, weights: Sequence[Any]) -> tuple[Any, Any]:
    """The input's and the state's share of all gates; weights are (w_ih, w_hh) and perhaps (b_ih, b_hh)."""
    a, b = x @ weights[0].T, h @ weights[1].T
    return (a + weights[2], b + weights[3]) if len(weights) >= 4 else (a, b)


def _lstm_cell(x: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[Any, ...]:
    a, b = _gates(x, state[0], weights)
    i, f, g, o = jnp.split(a + b, 4, -1)
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (hidden @ weights[-1].T if len(weights) in (3, 5) else hidden), cell


def _gru_cell(x: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[Any, ...]:
    a, b = _gates(x, state[0], weights)
    (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
    r, z = jax.nn.sigmoid(ar + br), jax.nn.sigmoid(az + bz)
    n = jnp.tanh(an + r * bn)
    return ((1 - z) * n + z * state[0],)


def _plain_cell(function: Callable[[Any], Any]) -> Cell:
    def cell(x: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[Any, ...]:
        a, b = _gates(x, state[0], weights)
        return (function(a + b),)

    return cell


def _run(
    cell: Cell,
    x: Any,
    states: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    key: Any,
) -> tuple[Any, ...]:
    """All layers.

    States are stacked (layers * directions, batch, features), params follow layer by layer, direction by direction.
    """
    batched = x.ndim == 3
    if not batched:
        x, states, batch_first = x[:, None], [s[:, None] for s in states], False
    if batch_first:
        x = jnp.swapaxes(x, 0, 1)
    directions = 2 if bidirectional else 1
    count = len(params) // (num_layers * directions)
    ends: list[tuple[Any, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * count : (index + 1) * count]

            def step(
                carry: tuple[Any, ...], item: Any, weights: Sequence[Any] = weights
            ) -> tuple[tuple[Any, ...], Any]:
                new = cell(item, carry, weights)
                return new, new[0]

            end, output = lax.scan(step, tuple(s[index] for s in states), x, reverse=direction == 1)
            ends.append(end)
            outputs.append(output)
        x = jnp.concatenate(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            x = native_dropout(x, dropout, True, key=jax.random.fold_in(key, layer))[0]
    finals = [jnp.stack([end[i] for end in ends]) for i in range(len(states))]
    if not batched:
        return (x[:, 0], *(f[:, 0] for f in finals))
    return (jnp.swapaxes(x, 0, 1) if batch_first else x, *finals)


@register("aten.lstm.input", random=True)
def lstm(x: Any, hx: Sequence[Any], params: Sequence[Any], *flags: Any, key: Any) -> tuple[Any, ...]:
    """(output, last hidden, last cell); gates in the order input, forget, cell, output."""
    return _run(_lstm_cell, x, hx, params, *flags, key=key)


@register("aten.gru.input", random=True)
def gru(x: Any, hx: Any, params: Sequence[Any], *flags: Any, key: Any) -> tuple[Any, ...]:
    """(output, last hidden); gates in the order reset, update, new."""
    return _run(_gru_cell, x, [hx], params, *flags, key=key)


@register("aten.rnn_tanh.input", random=True)
def rnn_tanh(x: Any, hx: Any, params: Sequence[Any], *flags: Any, key: Any) -> tuple[Any, ...]:
    return _run(_plain_cell(jnp.tanh), x, [hx], params, *flags, key=key)


@register("aten.rnn_relu.input", random=True)
def rnn_relu(x: Any, hx: Any, params: Sequence[Any], *flags: Any, key: Any) -> tuple[Any, ...]:
    return _run(_plain_cell(jax.nn.relu), x, [hx], params, *flags, key=key)
