"""A picture of a model's BatchNorm statistics, layer by layer."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from interop.cli.libraries import require
from interop.files.replacing import replacing
from interop.linting.rules import Finding
from interop.linting.subject import NormLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RANGE, _MOST, _MEDIAN = "#cfdeea", "#7da6c8", "#17324d"
_COLOURS = {"error": "#c62828", "warning": "#ef6c00", "info": "#7e57c2"}


def plot_statistics(path: pathlib.Path, title: str, layers: Sequence[NormLayer], findings: Sequence[Finding]) -> None:
    """Writes a PNG: running mean, running variance and |scale| of every layer, with its findings marked.

    A bar reaches from the smallest to the largest channel, its darker part from the 5th to the 95th percentile, and the
    line is the median. On the logarithmic axes zeros are left out, and their number is at the bottom.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not layers:
        raise ValueError(f"{title}: no layer has running statistics, so there is nothing to plot")
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a picture is written as .png")
    figure = Figure(figsize=(min(max(8.0, 0.16 * len(layers)), 40.0), 9.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels: np.ndarray = figure.subplots(3, 1, sharex=True)
    figure.suptitle(f"{pathlib.Path(title).name}: {len(layers)} BatchNorm layers", x=0.01, ha="left", fontsize=11)
    for panel, key, label, logarithmic in (
        (panels[0], "running_mean", "running mean", False),
        (panels[1], "running_var", "running variance", True),
        (panels[2], "weight", "|scale|", True),
    ):
        arrays = [layer.array(key) for layer in layers]
        _panel(panel, [np.abs(x) if x is not None and key == "weight" else x for x in arrays], logarithmic)
        panel.set_ylabel(label)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    _mark(panels, layers, findings)
    every = max(1, -(-len(layers) // 80))
    panels[2].set_xticks(
        range(0, len(layers), every), [layer.name for layer in layers][::every], rotation=90, fontsize=7
    )
    panels[2].set_xlim(-0.7, len(layers) - 0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _panel(panel: Axes, values: list[np.ndarray | None], logarithmic: bool) -> None:
    """The ranges of one statistic; layers without it leave a gap."""
    rows = []
    zeros = []
    for array in values:
        finite = np.empty(0) if array is None else array[np.isfinite(array)]
        zeros.append(int(np.count_nonzero(finite == 0)) if logarithmic else 0)
        used = finite[finite > 0] if logarithmic else finite
        rows.append(np.percentile(used, (0, 5, 50, 95, 100)) if used.size else np.full(5, np.nan))
    low, fifth, middle, most, high = np.array(rows).T
    x = np.arange(len(rows))
    panel.bar(x, high - low, 0.86, bottom=low, color=_RANGE)
    panel.bar(x, most - fifth, 0.86, bottom=fifth, color=_MOST)
    panel.hlines(middle, x - 0.43, x + 0.43, color=_MEDIAN, linewidth=1.4)
    shown = np.concatenate([low, high])[np.isfinite(np.concatenate([low, high]))]
    if not logarithmic:
        reach = 1.1 * max(np.abs(shown).max(initial=0.0), 1e-6)
        panel.set_ylim(-reach, reach)
        return
    panel.set_yscale("log")
    if shown.size:
        panel.set_ylim(shown.min() / 6, shown.max() * 3)
    for place, count in enumerate(zeros):
        if count:
            panel.annotate(
                str(count), (place, 0.015), xycoords=("data", "axes fraction"), ha="center", fontsize=6, color="#555555"
            )
    if any(zeros):
        panel.text(1, 1.01, "at the bottom: channels at 0", transform=panel.transAxes, ha="right", fontsize=7)


def _mark(panels: np.ndarray, layers: Sequence[NormLayer], findings: Sequence[Finding]) -> None:
    """A stripe behind every layer with a finding, in the colour of its worst."""
    worst: dict[str, str] = {}
    for finding in findings:  # the worst come first
        worst.setdefault(finding.layer, finding.severity)
    shown = set()
    for place, layer in enumerate(layers):
        severity = worst.get(layer.name)
        if severity is not None:
            for panel in panels:
                panel.axvspan(place - 0.5, place + 0.5, color=_COLOURS[severity], alpha=0.3, linewidth=0, zorder=0)
            shown.add(severity)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_MEDIAN, linewidth=1.4, label="median of the channels"),
        Patch(color=_MOST, label="5% to 95%"),
        Patch(color=_RANGE, label="all"),
        *(Patch(color=_COLOURS[name], alpha=0.3, label=f"finding: {name}") for name in _COLOURS if name in shown),
    ]
    panels[0].legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), fontsize=7, frameon=False
    )
