"""What a comparison found, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerDifference:
    """One layer in one mode, of a `Comparison`.

    **Attributes:**

    - `path`: of the PyTorch layer.
    - `counterpart`: the path of the Flax layer.
    - `kind`: the class of the PyTorch layer.
    - `mode`: "eval" or "train".
    - `shape`: of what the PyTorch layer gives.
    - `relative`: norm(Flax's output - PyTorch's) / norm(PyTorch's), where the whole models run; None where that cannot
      be seen.
    - `alone`: the same of the layer by itself, given PyTorch's own input, statistics that it moves included; None where
      it cannot be called alone.
    - `agrees`: whether the first of these that there is lies below the tolerance.
    """

    path: str
    counterpart: str
    kind: str
    mode: str
    shape: tuple[int, ...]
    relative: float | None
    alone: float | None
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A Flax model against its PyTorch origin: what `compare` found. `str(...)` is a table.

    **Attributes:**

    - `layers`: a `LayerDifference` for each that has parameters or statistics, in the order in which PyTorch calls
      them, mode by mode.
    - `outputs`: relative difference of the models' outputs, by mode.
    - `first`: the path of the first layer that differs, or the one that what differs comes before; None if none does.
    - `cause`: why, in words; None if nothing differs.
    - `proved`: whether the cause was shown by numbers: with it taken away, the layer agrees.
    - `tolerance`: what agreement means here.
    - `missing`, `unexpected`: entries of the state dict that only PyTorch has, and that only the Flax model has.
    - `notes`: what could not be compared.
    """

    layers: tuple[LayerDifference, ...]
    outputs: dict[str, float]
    first: str | None
    cause: str | None
    proved: bool
    tolerance: float
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether outputs and layers agree in all modes."""
        return self.first is None and all(value <= self.tolerance for value in self.outputs.values())

    def __str__(self) -> str:
        rows = [("mode", "layer", "class", "shape", "relative", "alone", "")]
        for layer in self.layers:
            path = layer.path if layer.path == layer.counterpart else f"{layer.path} = {layer.counterpart}"
            shape = "x".join(map(str, layer.shape))
            mark = "" if layer.agrees else ("first" if layer.path == self.first else "differs")
            rows.append((layer.mode, path, layer.kind, shape, _number(layer.relative), _number(layer.alone), mark))
        for mode, value in self.outputs.items():
            rows.append((mode, "output", "", "", _number(value), "", "" if value <= self.tolerance else "differs"))
        lines = _table(rows)
        if self.missing:
            lines.append(f"only PyTorch has {', '.join(self.missing[:8])}{' ...' if len(self.missing) > 8 else ''}")
        if self.unexpected:
            shown = ", ".join(self.unexpected[:8])
            lines.append(f"only the Flax model has {shown}{' ...' if len(self.unexpected) > 8 else ''}")
        lines += [f"not compared: {note}" for note in self.notes]
        if self.agrees:
            lines.append(f"They agree to {self.tolerance:g}.")
        elif self.cause:
            lines.append(f"{'Because' if self.proved else 'Perhaps because'}: {self.cause}")
            others = [layer.path for layer in self.layers if layer.alone is not None and layer.alone > self.tolerance]
            if others := [path for path in dict.fromkeys(others) if path != self.first]:
                shown = f"{', '.join(others[:8])}{' ...' if len(others) > 8 else ''}"
                lines.append(f"By themselves, given PyTorch's input, these differ too: {shown}")
        return "\n".join(lines)


def relative(found: np.ndarray, expected: np.ndarray) -> float | None:
    """norm(found - expected) / norm(expected), `found` in PyTorch's order of dimensions or with its channels last,
    whichever is nearer; None where the shapes are no such pair."""
    found, expected = np.asarray(found), np.asarray(expected)
    candidates = [found]
    if found.ndim >= 3:
        candidates.append(np.moveaxis(found, -1, 1))
    fitting = [_relative(candidate, expected) for candidate in candidates if candidate.shape == expected.shape]
    return min(fitting, default=None)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    found, expected = found.astype(wide), expected.astype(wide)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, found - expected)
    norm = float(np.linalg.norm(np.where(np.isfinite(expected), expected, 0)))
    size = float(np.linalg.norm(difference))
    return size / norm if norm else size


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
