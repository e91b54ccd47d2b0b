"""jaxnorm convert: a checkpoint in another format, layout or precision."""

from __future__ import annotations

import pathlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import typer

from interop import dtypes
from interop.cli.output import shown
from interop.cli.sources import open_source
from interop.files.averages import is_average
from interop.files.checkpoint import Checkpoint, load_checkpoint
from interop.files.shards import SUFFIX
from interop.weights._save_checkpoint import save_checkpoint

FLOATS = ("float16", "bfloat16", "float32", "float64")
_OURS = ("which", "choices", "unwrapped", "not_arrays")  # what the reader adds to a file's own metadata


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A checkpoint, or the directory of a saved model.")],
    out: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="Ends in .safetensors, .pth, .pt, .bin or .tar.")],
    which: Annotated[str | None, typer.Option(help="Which of several state dicts: model, ema, or its name.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The same as --which ema.")] = False,
    dtype: Annotated[str | None, typer.Option(help=f"Cast floating-point arrays: {', '.join(FLOATS)}.")] = None,
    cast_statistics: Annotated[
        bool, typer.Option("--cast-statistics", help="Cast running statistics too; else they have at least 32 bits.")
    ] = False,
    layout: Annotated[
        str | None, typer.Option(help="timm or torchvision: a training checkpoint, average and metadata included.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Split a .safetensors file above this size (500MB, 5GB).")
    ] = None,
) -> None:
    """A checkpoint in another format, layout or precision.

    The ending of OUT says the format. What wraps the state dict (a training checkpoint, a pickled model, prefixes of
    DDP and torch.compile) is taken off; --layout puts it into timm's or torchvision's training checkpoint, together
    with its average and metadata.

    \b
    Examples:
      jaxnorm convert model_best.pth.tar model.safetensors --ema
      jaxnorm convert yolov8n.pt yolov8n.safetensors --dtype float32
      jaxnorm convert model.safetensors half.pth --dtype bfloat16
      jaxnorm convert large.safetensors small.safetensors --max-shard-size 2GB
      jaxnorm convert last.pth.tar last.pth --layout torchvision
    """
    if ema and which not in (None, "ema"):
        raise ValueError(f"--ema and --which {which} say two things")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"--dtype {dtype} is none of {', '.join(FLOATS)}")
    limit = None if max_shard_size is None else _bytes(max_shard_size)
    opened = open_source(source, "ema" if ema else which)
    state, average, metadata, left_out = opened.state, None, {}, []
    if layout is not None and isinstance(state, Checkpoint):
        notes = {key: value for key, value in state.metadata.items() if key not in _OURS}
        metadata = {key: value for key, value in notes.items() if _writable(value)}
        left_out = [key for key in notes if key not in metadata]
        averages = [name for name in state.metadata["choices"] if is_average(name)]
        if which is None and not ema and averages and len(averages) < len(state.metadata["choices"]):
            state, average = load_checkpoint(source, "model"), load_checkpoint(source, "ema")
    cast, small = _cast(state, dtype, cast_statistics)
    cast_average, small_too = (None, 0) if average is None else _cast(average, dtype, cast_statistics)
    save_checkpoint(out, cast, metadata, ema=cast_average, layout=layout, max_shard_size=limit)
    taken = state.metadata["unwrapped"] if isinstance(state, Checkpoint) else []
    print(f"{source}: {opened.format}" + (f", unwrapped {shown(', '.join(taken))}" if taken else ""))
    index = out.with_name(out.name + SUFFIX)
    print(f"{out if out.exists() else index}: {len(state)} arrays" + (" and their average" if average else ""))
    if left_out:
        print(f"left out, since a file without pickled objects cannot hold them: {shown(', '.join(left_out))}")
    if small + small_too:
        print(f"{small + small_too:,} numbers are too small for {dtype} and are 0 now")
    if dtype in ("float16", "bfloat16") and not cast_statistics and any(map(_is_statistic, state)):
        print("running statistics keep at least 32 bits; --cast-statistics casts them too")


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _cast(state: Mapping[str, np.ndarray], dtype: str | None, statistics: bool) -> tuple[Mapping[str, np.ndarray], int]:
    """The state with its floating-point arrays in another dtype, and how many numbers became 0.

    Raises ValueError where a number becomes infinite.
    """
    if dtype is None:
        return state, 0
    target = dtypes.TORCH[dtype]
    wide = np.promote_types(np.float32, target) if target.itemsize > 2 else np.dtype(np.float32)
    found: OrderedDict[str, np.ndarray] = OrderedDict()
    overflowed, small = [], 0
    for name, array in state.items():
        floating = array.dtype.name in FLOATS or array.dtype.name.startswith("float8")
        if not floating:
            found[name] = array
            continue
        with np.errstate(over="ignore"):
            found[name] = array.astype(wide if _is_statistic(name) and not statistics else target)
        if np.isinf(found[name]).sum() > np.isinf(array).sum():
            overflowed.append(repr(name))
        small += int(np.count_nonzero(array) - np.count_nonzero(found[name]))
    if overflowed:
        raise ValueError(f"{dtype} cannot hold all values of {', '.join(overflowed)}: they would become infinite")
    if isinstance(state, Checkpoint) and state.versions:
        found._metadata = {name: {"version": version} for name, version in state.versions.items()}  # type: ignore[attr-defined]
    return found, small


def _writable(value: object, depth: int = 0) -> bool:
    """Whether a file of tensors and plain values can hold it: no stand-ins of pickled objects."""
    if isinstance(value, Mapping):
        return depth < 20 and all(isinstance(k, str | int) and _writable(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return depth < 20 and all(_writable(item, depth + 1) for item in value)
    if isinstance(value, np.ndarray):
        return value.dtype.name in dtypes.TORCH
    return value is None or isinstance(value, bool | int | float | str)


def _bytes(text: str) -> int:
    """500MB, 5 GB, 100000: a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--max-shard-size {text}: expected a size such as 500MB or 5GB")
    return int(float(match[1]) * 1000 ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0))
