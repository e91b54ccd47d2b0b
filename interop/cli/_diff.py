"""jaxnorm diff: two checkpoints compared, bit by bit and as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated

import numpy as np
import typer

from interop.cli.output import print_json, shown, table
from interop.cli.sources import Source, open_source


@dataclasses.dataclass
class Layer:
    """What differs in the arrays of one layer.

    `values` counts the numbers whose bits differ. `absolute` is the largest difference, and `relative` the largest of
    the arrays' differences, each over the largest magnitude in the array of A.
    """

    name: str
    arrays: int = 0
    values: int = 0
    of: int = 0
    absolute: float = 0.0
    relative: float = 0.0


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, or the directory of a saved model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    which: Annotated[str | None, typer.Option(help="Which of several state dicts: model, ema, or its name.")] = None,
    which_b: Annotated[str | None, typer.Option(help="The same for B, if it is another one than for A.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="The relative difference of an array up to which it counts as equal.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Two checkpoints compared, bit by bit.

    Names, shapes, dtypes, values and how far these are from each other, by layer; the formats may be two. The exit code
    is 1 if they differ: in names, shapes, dtypes or any bit, or, with a --tolerance, in names, shapes or by more.

    \b
    Examples:
      jaxnorm diff model.pth model.safetensors
      jaxnorm diff last.pth.tar last.pth.tar --which model --which-b ema
      jaxnorm diff before.safetensors after.safetensors --tolerance 1e-5
    """
    first, second = open_source(a, which), open_source(b, which if which_b is None else which_b)
    missing = [name for name in first.state if name not in second.state]
    extra = [name for name in second.state if name not in first.state]
    kinds, layers, equal = _compare(first.state, second.state)
    beyond = [layer for layer in layers if not layer.relative <= tolerance or (tolerance == 0 and layer.values)]
    different = bool(missing or extra or beyond or (kinds and tolerance == 0) or any(_shapes_differ(first, second)))
    if as_json:
        print_json({
            "different": different, "only_in_a": missing, "only_in_b": extra, "kinds": kinds,
            "identical_arrays": equal, "layers": [dataclasses.asdict(layer) for layer in layers],
        })  # fmt: skip
        return int(different)
    for title, source in (("A", first), ("B", second)):
        print(f"{title}: {source.name} ({source.format}, {len(source.state)} arrays)")
    for title, names in (("only in A", missing), ("only in B", extra)):
        if names:
            print(shown(f"{title}: {len(names)} arrays: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"))
    if kinds:
        print()
        table(("array", "A", "B"), [(name, *both) for name, both in kinds.items()], left=3)
    if layers:
        print()
        rows = [
            (
                layer.name,
                str(layer.arrays),
                f"{layer.values:,} of {layer.of:,}",
                f"{layer.absolute:.3g}",
                f"{layer.relative:.3g}",
            )
            for layer in sorted(layers, key=lambda layer: -layer.relative)
        ]
        table(("layer", "arrays", "values that differ", "largest", "relative"), rows)
    print()
    print(f"{equal} arrays are identical in every bit" + ("" if layers or different else "; so are the checkpoints"))
    if layers and not different:
        print(f"the others differ by {max(layer.relative for layer in layers):.3g} at most, within {tolerance:g}")
    return int(different)


def _shapes_differ(a: Source, b: Source) -> Iterator[bool]:
    return (a.state[name].shape != b.state[name].shape for name in a.state if name in b.state)


def _compare(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> tuple[dict[str, tuple[str, str]], list[Layer], int]:
    """Arrays of several shapes or dtypes, layers whose values differ, and the number of identical arrays."""
    kinds: dict[str, tuple[str, str]] = {}
    layers: dict[str, Layer] = {}
    equal = 0
    for name in a:
        if name not in b:
            continue
        first, second = a[name], b[name]
        if first.shape != second.shape or first.dtype != second.dtype:
            kinds[name] = (f"{first.dtype.name} {first.shape}", f"{second.dtype.name} {second.shape}")
        if first.shape != second.shape:
            continue
        values, absolute, relative = _difference(first, second)
        if values == 0:
            equal += first.dtype == second.dtype
            continue
        layer = layers.setdefault(name.rpartition(".")[0] or name, Layer(name.rpartition(".")[0] or name))
        layer.arrays += 1
        layer.values += values
        layer.of += first.size
        layer.absolute = _larger(layer.absolute, absolute)
        layer.relative = _larger(layer.relative, relative)
    return kinds, list(layers.values()), equal


def _larger(a: float, b: float) -> float:
    return float(np.maximum(a, b))  # NaN is larger than anything


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[int, float, float]:
    """How many values differ (in their bits, if the dtypes are the same), by how much, and relative to the largest."""
    if a.dtype == b.dtype:
        pair = (np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(x.size, -1) for x in (a, b))
        unequal = np.not_equal(*pair).any(axis=1)
    else:
        unequal = (a != b).reshape(-1)
    count = int(np.count_nonzero(unequal))
    if count == 0:
        return 0, 0.0, 0.0
    exact: type[np.complex128] | type[np.float64] = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    left, right = a.reshape(-1)[unequal].astype(exact), b.reshape(-1)[unequal].astype(exact)
    with np.errstate(invalid="ignore"):
        gap = np.abs(left - right)
        gap[(left == right) | (np.isnan(left) & np.isnan(right))] = 0  # the zeros, infinities and NaNs of several bits
        largest = np.abs(a.astype(exact))
        scale = float(largest[np.isfinite(largest)].max(initial=0.0))
    absolute = float(gap.max())
    return count, absolute, absolute / scale if scale else (0.0 if absolute == 0 else float("inf"))
