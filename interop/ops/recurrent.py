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
"""(the input's share of all gates, state, weights) -> the next state, whose first part is the output."""


def _of_input(x: Array, weights: Sequence[Array]) -> Array:
    """The input's share of all gates; weights are (w_ih, w_hh), perhaps (b_ih, b_hh), perhaps a projection."""
    share = x @ weights[0].T
    return share + weights[2] if len(weights) >= 4 else share


def _of_state(h: Array, weights: Sequence[Array]) -> Array:
    share = h @ weights[1].T
    return share + weights[3] if len(weights) >= 4 else share


def _lstm_cell(a: Array, state: tuple[Array, ...], weights: Sequence[Array]) -> tuple[Array, ...]:
    i, f, g, o = jnp.split(a + _of_state(state[0], weights), 4, -1)
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (hidden @ weights[-1].T if len(weights) in (3, 5) else hidden), cell


def _gru_cell(a: Array, state: tuple[Array, ...], weights: Sequence[Array]) -> tuple[Array, ...]:
    (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(_of_state(state[0], weights), 3, -1)
    r, z = jax.nn.sigmoid(ar + br), jax.nn.sigmoid(az + bz)
    n = jnp.tanh(an + r * bn)
    return ((1 - z) * n + z * state[0],)


def _plain_cell(function: Callable[[Array], Array]) -> Cell:
    return lambda a, state, weights: (function(a + _of_state(state[0], weights)),)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _plain_cell(jnp.tanh),
    "rnn_relu": _plain_cell(jax.nn.relu),
}


@register("jaxnorm.recurrent.default", random=True)
def recurrent(
    x: Array,
    states: Sequence[Array],
    params: Sequence[Array],
    kind: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Array | None = None,
    *,
    key: Array,
) -> tuple[Array, ...]:
    """All layers of nn.LSTM, nn.GRU or nn.RNN: the output, and the last states. One `lax.scan` a layer and direction.

    States are stacked (layers * directions, batch, features), params follow layer by layer, direction by direction;
    gates in PyTorch's order (LSTM: input, forget, cell, output; GRU: reset, update, new). With `lengths`, sequence b
    ends after `lengths[b]` steps: its state stays as it is from there on, and its output is 0.
    """
    cell = _CELLS[kind]
    batched = x.ndim == 3
    states = [s.astype(x.dtype) for s in states]
    if not batched:
        x, states, batch_first = x[:, None], [s[:, None] for s in states], False
    if batch_first:
        x = jnp.swapaxes(x, 0, 1)
    runs = None if lengths is None else (jnp.arange(x.shape[0])[:, None] < lengths)[..., None]
    directions = 2 if bidirectional else 1
    count = len(params) // (num_layers * directions)
    ends: list[tuple[Array, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * count : (index + 1) * count]
            end, output = _scan(cell, x, [s[index] for s in states], weights, runs, direction == 1)
            ends.append(end)
            outputs.append(output)
        x = jnp.concatenate(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            x = native_dropout(x, dropout, True, key=jax.random.fold_in(key, layer))[0]
    finals = [jnp.stack([end[i] for end in ends]) for i in range(len(states))]
    if not batched:
        return (x[:, 0], *(f[:, 0] for f in finals))
    return (jnp.swapaxes(x, 0, 1) if batch_first else x, *finals)


def _scan(
    cell: Cell, x: Array, start: Sequence[Array], weights: Sequence[Array], runs: Array | None, reverse: bool
) -> tuple[tuple[Array, ...], Array]:
    """One layer in one direction: (its last state, its output at every step)."""

    def step(state: tuple[Array, ...], item: tuple[Array, Array | None]) -> tuple[tuple[Array, ...], Array]:
        a, here = item
        new = cell(a, state, weights)
        if here is None:
            return new, new[0]
        return tuple(jnp.where(here, n, s) for n, s in zip(new, state, strict=True)), jnp.where(here, new[0], 0)

    return lax.scan(step, tuple(start), (_of_input(x, weights), runs), reverse=reverse)


def _of_pytorch(kind: str) -> None:
    """PyTorch's own operation: (x, the state or states, params, flags)."""

    @register(f"aten.{kind}.input", random=True)
    def run(
        x: Array, hx: Array | Sequence[Array], params: Sequence[Array], *flags: Any, key: Array
    ) -> tuple[Array, ...]:
        return recurrent(x, [hx] if isinstance(hx, Array) else hx, params, kind, *flags, key=key)

    @register(f"aten.{kind}_cell.default")
    def one_step(x: Array, hx: Array | Sequence[Array], *params: Array | None) -> Array | tuple[Array, ...]:
        weights = [w for w in params if w is not None]
        states = (hx,) if isinstance(hx, Array) else tuple(hx)
        new = _CELLS[kind](_of_input(x, weights), states, weights)
        return new if kind == "lstm" else new[0]


for _kind in _CELLS:
    _of_pytorch(_kind)
