"""The layouts of recurrent cells: Flax's gates one by one, PyTorch's stacked; Flax's one bias, PyTorch's two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interop.weights.layouts import Arrays, Piece, Shapes


@dataclass(frozen=True)
class Cell:
    """LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell <-> `nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`.

    Both sides have the gates in the same order: i, f, g, o, and r, z, n. The weights are exact in both directions.

    PyTorch adds two biases to each gate, `bias_ih + bias_hh`; Flax has one, since one says as much. On the way in it is
    their sum. In the export it is in the entry of the side where Flax has it (LSTM: `bias_hh`; GRU and simple cells:
    `bias_ih`) and the other one is 0: how a sum was split before is nowhere kept, and nothing depends on it. So Flax ->
    PyTorch -> Flax is exact bit for bit, and PyTorch -> Flax -> PyTorch for biases that have been to Flax once.

    The n gate of a GRU is different: `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))` in PyTorch, and Linen's cell has
    both biases. NNX's has no b_hn: there anything but 0 is refused.

    Args:
        inputs: the Dense layers of the input, in the order of the gates; a single one holds all gates.
        hidden: those of the hidden state.
        gates: how many gates there are.
        apart: the gate whose two biases cannot be added, if there is one.
    """

    inputs: tuple[str, ...]
    hidden: tuple[str, ...]
    gates: int
    apart: int | None = None

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight_ih`, `weight_hh`, and `bias_ih` with `bias_hh` if there are biases."""
        missing = [name for name in (*self.inputs, *self.hidden) if len(shapes.get(f"{name}.kernel", ())) != 2]
        if missing:
            raise ValueError(f"a recurrent cell has Dense layers {missing}, this one has {sorted(shapes)}")
        found = [_stacked(names, entry) for names, entry in ((self.inputs, "weight_ih"), (self.hidden, "weight_hh"))]
        biases = tuple(f"{name}.bias" for name in (*self.inputs, *self.hidden) if f"{name}.bias" in shapes)
        if not biases:
            return found
        size = shapes[f"{self.hidden[0]}.kernel"][0]
        sides = [_gates_with_bias(names, self.gates, shapes) for names in (self.inputs, self.hidden)]
        if not all(map(any, zip(*sides, strict=True))):
            raise ValueError(f"some gates have no bias; found {list(biases)}")
        stored = [shapes[name][0] for name in biases]

        def to_torch(*arrays: np.ndarray) -> Arrays:
            parts = [part for array in arrays for part in np.split(array, array.size // size)]
            zero = np.zeros_like(parts[0])
            given = iter(parts)
            # Variables come in the order of the sides, and of the gates in each.
            stacked = [np.concatenate([next(given) if has else zero for has in side]) for side in sides]
            return tuple(stacked)

        def to_flax(bias_ih: np.ndarray, bias_hh: np.ndarray) -> Arrays:
            both = [np.split(bias_ih, self.gates), np.split(bias_hh, self.gates)]
            for gate in range(self.gates):
                has = [side[gate] for side in sides]
                if all(has):
                    continue
                kept, other = (0, 1) if has[0] else (1, 0)
                if gate == self.apart and np.any(both[other][gate] != 0):
                    raise ValueError(
                        "bias_hh of the n gate (inside the reset gate) is not 0, and flax.nnx.GRUCell has no such "
                        "bias; flax.linen.GRUCell has"
                    )
                both[kept][gate] = _sum(both[kept][gate], both[other][gate])
            flat = [part for side, parts in zip(sides, both, strict=True) for has, part in zip(side, parts) if has]  # noqa: B905
            starts = np.cumsum([length // size for length in stored])[:-1]
            return tuple(np.concatenate(flat[a:b]) for a, b in zip([0, *starts], [*starts, len(flat)], strict=True))

        return [*found, Piece(biases, ("bias_ih", "bias_hh"), to_torch, to_flax)]


def _stacked(names: Sequence[str], entry: str) -> Piece:
    return Piece(
        tuple(f"{name}.kernel" for name in names),
        (entry,),
        lambda *kernels: (np.concatenate(kernels, axis=1).T,),
        lambda weight: tuple(part.T for part in np.split(weight, len(names))),
    )


def _gates_with_bias(names: Sequence[str], gates: int, shapes: Shapes) -> list[bool]:
    return [f"{name}.bias" in shapes for name in names for _ in range(gates // len(names))]


def _sum(kept: np.ndarray, other: np.ndarray) -> np.ndarray:
    """kept + other, where nothing was added bit for bit (-0 + 0 is +0)."""
    return np.where(other == 0, kept, kept + other)


def _split(cell: str, gates: str, last: str = "") -> Cell:
    inputs = tuple(f"i{gate}" + (last if gate == "f" else "") for gate in gates)
    return Cell(inputs, tuple(f"h{gate}" for gate in gates), len(gates), 2 if cell == "gru" else None)


LINEN_LSTM = _split("lstm", "ifgo")
NNX_LSTM = _split("lstm", "ifgo", "_")  # "if" is a word of Python
LINEN_GRU = _split("gru", "rzn")
LINEN_SIMPLE = Cell(("i",), ("h",), 1)
NNX_JOINED_LSTM = Cell(("dense_i",), ("dense_h",), 4)
NNX_GRU = Cell(("dense_i",), ("dense_h",), 3, 2)
NNX_SIMPLE = Cell(("dense_i",), ("dense_h",), 1)
