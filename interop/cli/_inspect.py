"""jaxnorm inspect: what is in a checkpoint, and what looks wrong."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import typer

from interop.cli.findings import print_findings
from interop.cli.output import print_json, shown, size, table
from interop.cli.said import StateDict, lines, state_dicts
from interop.cli.sources import Source, open_source
from interop.cli.values import as_json as metadata_as_json
from interop.files.checkpoint import Checkpoint
from interop.linting._lint import lint
from interop.linting.rules import Finding
from interop.linting.subject import NormLayer, subject

STATISTICS = {"mean": "running_mean", "variance": "running_var", "scale": "weight"}


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint, or the directory of a saved model.")],
    which: Annotated[str | None, typer.Option(help="Which of several state dicts: model, ema, or its name.")] = None,
    depth: Annotated[int, typer.Option(min=0, help="Levels of the tree that are shown.")] = 2,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="Write a picture of the BatchNorm statistics by layer (.png).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """What is in a checkpoint, and what looks wrong.

    Shown are what the file says besides its weights, which state dicts it has and how to ask for each, the tree with
    sizes, the BatchNorm layers (the smallest and largest value of each statistic, and eps and momentum, PyTorch's,
    where the file is a model's: a state dict has none), and the findings of interop.lint.

    \b
    Examples:
      jaxnorm inspect resnet50.safetensors
      jaxnorm inspect last.pth.tar --which ema --depth 4
      jaxnorm inspect yolov8n.pt --plot statistics.png
      jaxnorm inspect model.pth --json | jq .findings
      jaxnorm inspect hf_hub:timm/resnet50.a1_in1k
    """
    source = open_source(file, which)
    layers = subject(source.target).layers
    findings = lint(source.target)
    choices = state_dicts(source.target) if isinstance(source.target, Checkpoint) else []
    if as_json:
        print_json(_document(source, layers, findings, choices))
    else:
        _print(source, layers, findings, choices, depth)
    if plot is not None:
        from interop.cli.plot import plot_statistics

        plot_statistics(plot, source.name, layers, findings)
        if not as_json:
            print(f"\nThe picture is in {plot}")


def _print(
    source: Source,
    layers: Sequence[NormLayer],
    findings: Sequence[Finding],
    choices: Sequence[StateDict],
    depth: int,
) -> None:
    shapes = [(name, array.size, array.nbytes) for name, array in source.state.items()]
    print(source.name)
    numbers, held = sum(s[1] for s in shapes), sum(s[2] for s in shapes)
    print(f"{source.format}, {len(shapes)} arrays, {numbers:,} numbers, {size(held)}")
    for line in lines(source.metadata):
        print(line)
    if taken := source.metadata.get("unwrapped"):
        print(shown(f"unwrapped: {', '.join(taken)}"))
    print()
    if choices:
        rows = [
            (choice.name or "(the file)", "this one" if choice.taken else "", " or ".join(choice.which))
            for choice in choices
        ]
        table(("state dict", "shown", "--which"), rows, left=3)
        print()
    table(("layer", "arrays", "numbers", "size"), _tree(shapes, depth))
    if layers:
        print()
        _print_layers(layers)
    print()
    print_findings(findings, source.name)


def _tree(shapes: Iterable[tuple[str, int, int]], depth: int) -> list[tuple[str, str, str, str]]:
    """Every module down to a depth, and arrays outside of any module, with the sums of what is in them."""
    sums: dict[tuple[str, ...], list[int]] = {}
    for name, numbers, held in shapes:
        path = tuple(name.split("."))
        for level in range(1, max(min(depth + 1, len(path)), 2)):
            entry = sums.setdefault(path[:level], [0, 0, 0])
            for index, count in enumerate((1, numbers, held)):
                entry[index] += count
    return [
        ("  " * (len(path) - 1) + path[-1], str(arrays), f"{numbers:,}", size(held))
        for path, (arrays, numbers, held) in sums.items()
    ]


def _print_layers(layers: Sequence[NormLayer]) -> None:
    """A line for each layer: the smallest and largest value of its statistics, and the flags that are known."""
    flags = [key for key in ("eps", "momentum") if any(key in layer.flags for layer in layers)]
    rows = []
    for layer in layers:
        arrays = [layer.array(name) for name in STATISTICS.values()]
        ranges = ["" if x is None or not x.size else f"{x.min():.2g} .. {x.max():.2g}" for x in arrays]
        known = [_flag(layer.flags[key]) if key in layer.flags else "" for key in flags]
        count = "" if layer.count is None else str(layer.count)
        rows.append((layer.name, str(layer.arrays["running_var"].size), count, *ranges, *known))
    table(("BatchNorm", "channels", "batches", *STATISTICS, *flags), rows)
    if not flags:
        print("eps and momentum are not in a state dict: the model's code has them")


def _flag(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"


def _document(
    source: Source, layers: Sequence[NormLayer], findings: Sequence[Finding], choices: Sequence[StateDict]
) -> dict[str, Any]:
    return {
        "file": source.name,
        "format": source.format,
        "metadata": {key: metadata_as_json(value) for key, value in source.metadata.items()},
        "state_dicts": [choice._asdict() for choice in choices],
        "arrays": [
            {"name": name, "shape": array.shape, "dtype": array.dtype.name, "bytes": array.nbytes}
            for name, array in source.state.items()
        ],
        "batch_norms": [
            {
                "layer": layer.name,
                "channels": layer.arrays["running_var"].size,
                "batches": layer.count,
                **{key: layer.flags[key] for key in ("eps", "momentum") if key in layer.flags},
                **{key: _summary(layer.array(name)) for key, name in STATISTICS.items()},
            }
            for layer in layers
        ],
        "findings": [finding._asdict() for finding in findings],
    }  # fmt: skip


def _summary(values: np.ndarray | None) -> dict[str, float] | None:
    if values is None or not values.size:
        return None
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
