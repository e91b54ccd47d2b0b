"""What a run is watched by: a table that grows on a terminal, lines elsewhere, a CSV file, curves, and TensorBoard.

    with Report(out, resumed_at=taken, tensorboard=True) as report:
        report.add(step, {"loss": ..., "rate": ...})

`out/metrics.csv` has a row for each `add`; a run that is taken up loses those that it will write again.
`out/curves.png` is drawn anew at each.
"""

import csv
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Self

from rich.live import Live
from rich.table import Table


class Report:
    """Rows of figures by step. To be opened by one process alone."""

    def __init__(self, out: pathlib.Path, resumed_at: int = 0, tensorboard: bool = False) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in _read(out / "metrics.csv") if row["step"] <= resumed_at]
        self._live = Live(self._table(), auto_refresh=False) if sys.stdout.isatty() else None
        self._writer = _tensorboard(out, resumed_at) if tensorboard else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._writer is not None:
            self._writer.close()

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """One row more, everywhere."""
        self.rows.append({"step": step, **figures})
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            print(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        with open(self.out / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, self._names())
            writer.writeheader()
            writer.writerows(self.rows)
        draw(self.rows, self.out / "curves.png")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _table(self) -> Table:
        table = Table(*self._names())
        for row in self.rows[-20:]:
            table.add_row(*(f"{row[name]:.6g}" if name in row else "" for name in self._names()))
        return table


def draw(rows: list[dict[str, float]], path: pathlib.Path) -> None:
    """Each figure by step, losses together and shares of one together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(name.split()[-1].split("-")[0], []).append(name)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, (title, members) in zip(axes[0], panels.items(), strict=True):
        for name in members:
            there = [row for row in rows if name in row]
            axis.plot([row["step"] for row in there], [row[name] for row in there], marker=".", label=name)
        axis.set(xlabel="step", title=title)
        axis.legend()
    figure.savefig(path)
    pyplot.close(figure)


def _read(path: pathlib.Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _tensorboard(out: pathlib.Path, resumed_at: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise SystemExit("--tensorboard writes by tensorboardX: pip install tensorboardX") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=resumed_at + 1)
