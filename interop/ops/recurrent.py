"""Recurrent layers: torch.nn.LSTM, GRU and RNN over padded sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from interop.ops.random import native_dropout
from interop.ops.registry import register

Cell = Callable[[Array, tuple[Array, ...], Sequence[Array]], tuple[Array, ...]]


def _gates(x: Array, h: Array, weights: Sequence[Array]) -> tuple[Array, Array]:
    """The input's and the state's share of all gates; weights are (w_ih, w_hh) and perhaps (b_ih, b_hh)."""
    a, b = x @ weights[0].T, h @ weights[1].T
    return (a + weights[2], b + weights[3]) if len(weights) >= 4 else (a, b)


def _lstm_cell(x: Array, state: tuple[Array, ...], weights: Sequence[Array]) -> tuple[Array, ...]:
    a, b = _gates(x, state[0], weights)
    i, f, g, o = jnp.split(a + b, 4, -1)
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (hidden @ weights[-1].T if len(weights) in (3, 5) else hidden), cell


def _gru_cell(x: Array, state: tuple[Array, ...], weights: Sequence[Array]) -> tuple[Array, ...]:
    a, b = _gates(x, state[0], weights)
    (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
    r, z = jax.nn.sigmoid(ar + br), jax.nn.sigmoid(az + bz)
    n = jnp.tanh(an + r * bn)
    return ((1 - z) * n + z * state[0],)


def _plain_cell(function: Callable[[Array], Array]) -> Cell:
    def cell(x: Array, state: tuple[Array, ...], weights: Sequence[Array]) -> tuple[Array, ...]:
        a, b = _gates(x, state[0], weights)
        return (function(a + b),)

    return cell


def _run(
    cell: Cell,
    x: Array,
    states: Sequence[Array],
    params: Sequence[Array],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    key: Array,
) -> tuple[Array, ...]:
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
    ends: list[tuple[Array, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * count : (index + 1) * count]

            def step(
                carry: tuple[Array, ...], item: Array, weights: Sequence[Array] = weights
            ) -> tuple[tuple[Array, ...], Array]:
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
def lstm(x: Array, hx: Sequence[Array], params: Sequence[Array], *flags: Any, key: Array) -> tuple[Array, ...]:
    """(output, last hidden, last cell); gates in the order input, forget, cell, output."""
    return _run(_lstm_cell, x, hx, params, *flags, key=key)


@register("aten.gru.input", random=True)
def gru(x: Array, hx: Array, params: Sequence[Array], *flags: Any, key: Array) -> tuple[Array, ...]:
    """(output, last hidden); gates in the order reset, update, new."""
    return _run(_gru_cell, x, [hx], params, *flags, key=key)


@register("aten.rnn_tanh.input", random=True)
def rnn_tanh(x: Array, hx: Array, params: Sequence[Array], *flags: Any, key: Array) -> tuple[Array, ...]:
    return _run(_plain_cell(jnp.tanh), x, [hx], params, *flags, key=key)


@register("aten.rnn_relu.input", random=True)
def rnn_relu(x: Array, hx: Array, params: Sequence[Array], *flags: Any, key: Array) -> tuple[Array, ...]:
    return _run(_plain_cell(jax.nn.relu), x, [hx], params, *flags, key=key)
