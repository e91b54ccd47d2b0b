"""save_checkpoint: a model, a state or a state dict as a file that PyTorch loads."""

from __future__ import annotations

import json
import operator
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from interop import dtypes
from interop.arrays import to_numpy
from interop.errors import shown
from interop.files import shards, state_dicts, torch_writer, wrappings
from interop.files.checkpoint import Checkpoint
from interop.files.disk import CheckpointError, path_of
from interop.files.stand_ins import name_of
from interop.weights._state_dict import state_dict
from interop.weights.rename import Rename, Renaming


def save_checkpoint(
    path: str | os.PathLike[str],
    target: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    ema: Any = None,
    rename: Rename | None = None,
    layout: str | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Writes a file that PyTorch loads, atomically: after a crash or on a full disk the old file is still there.

    ```python
    interop.save_checkpoint("model.safetensors", model)
    interop.save_checkpoint("last.pth", model, {"epoch": 3, "arch": "resnet50"}, ema=average, layout="timm")
    ```

    **Arguments:**

    - `path`: ends in `.safetensors` (safetensors.torch.load_file, load_model) or `.pt`, `.pth`, `.bin`, `.tar`
      (`torch.load(path, weights_only=True)` gives an OrderedDict of tensors). The folder must exist.
    - `target`: a mapping from names to arrays (NumPy, JAX or torch), a `Checkpoint`, or a model or state, which goes
      through `interop.state_dict`. dtypes are kept, and names that share memory share it in the file. The modules'
      versions that a `Checkpoint` or torch's own state dict knows go along into a `.pth` file.
    - `metadata`: what else the file is to say, tensors and NumPy's numbers too (`interop.optimizer_state_dict`).
      safetensors holds text, so that other values are written as JSON.
    - `ema`: the average of `target`, of the same kinds. Not for safetensors, which holds one state dict.
    - `rename`: as for `load_state_dict`, from PyTorch's names to the target's, and used backwards here.
    - `layout`: None, the state dict itself, or "timm" if there are metadata or an average; "timm" (`state_dict`,
      `state_dict_ema` and the metadata beside them, and `version` 2 where there is an `epoch`, which is the last one
      done); "torchvision" (`model`, `model_ema` as an AveragedModel with `n_averaged`, which is taken from the metadata
      or 1).
    - `max_shard_size`: bytes of arrays above which a safetensors file is split into several, with an index
      `<path>.index.json`; `load_checkpoint` takes the same path.

    **Raises:**

    - `interop.CheckpointError`: for an unknown ending or layout, a state dict without arrays, a dtype that the format
      lacks, masked values, and where the disk refuses.
    - `TypeError`: for a target that is neither, and for a path, a `rename` or metadata that are none.
    - `ValueError`: for layers that cannot be told, as `interop.state_dict`, and for names that do not invert.
    """
    target_path = path_of(path)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata are a mapping, found {type(metadata).__name__}")
    notes = {key: _plain(target_path, value, str(key)) for key, value in (metadata or {}).items()}
    if not isinstance(layout, str | None) or layout not in (None, "timm", "torchvision"):
        raise CheckpointError(target_path, f"layout {shown(layout)} is neither None, 'timm' nor 'torchvision'")
    if max_shard_size is not None and (
        isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int | np.integer) or max_shard_size < 1
    ):
        raise CheckpointError(target_path, f"max_shard_size is a number of bytes, found {shown(max_shard_size)}")
    if target_path.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".tar"):
        raise CheckpointError(target_path, "the ending says the format: .safetensors, .pt, .pth, .bin or .pth.tar")
    arrays = _renamed(_arrays(target_path, target), rename)
    if target_path.suffix == ".safetensors":
        if ema is not None or layout is not None:
            raise CheckpointError(
                target_path, "safetensors holds one state dict: no ema and no layout; .pth holds them"
            )
        text = {"format": "pt", **{str(key): _text(target_path, key, value) for key, value in notes.items()}}
        if state_dicts.looks_wrapped(arrays):
            text[state_dicts.PREFIX] = ""
        if max_shard_size is not None and sum(array.nbytes for array in arrays.values()) > max_shard_size:
            shards.write(target_path, arrays, text, max_shard_size)
        else:
            shards.write_one(target_path, arrays, text)
        return
    if max_shard_size is not None:
        raise CheckpointError(target_path, "only safetensors are split into several files")
    averages = None if ema is None else _renamed(_arrays(target_path, ema), rename)
    value: dict[str, Any] = arrays
    if layout or notes or averages is not None:
        value = _layout(target_path, arrays, averages, notes, layout)
    kept = [(arrays, _notes(arrays, _versions(target)))]
    if averages is not None:
        prefix = "module." if layout == "torchvision" else ""  # an AveragedModel has the model at `module`
        kept.append((value["model_ema"] if prefix else averages, _notes(averages, _versions(ema), prefix)))
    torch_writer.write(target_path, value, kept)


def _plain(path: pathlib.Path, value: Any, place: str, depth: int = 0) -> Any:
    """Tensors and JAX's arrays as NumPy's, and NumPy's numbers as Python's; all else as it is, for the writer to say
    what it cannot write (what contains itself, say)."""
    if depth > 100:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "detach") or isinstance(value, jax.Array):
        try:
            return to_numpy(value)
        except (TypeError, ValueError, RuntimeError) as error:  # of keys, and of tensors without strides or data
            first = str(error).partition("\n")[0]
            raise CheckpointError(path, f"entry {place!r} of the metadata is no array: {first}") from error
    if isinstance(value, Mapping):
        keys = {key: key.item() if isinstance(key, np.generic) else key for key in value}
        return {keys[key]: _plain(path, item, f"{place}/{key}", depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(path, item, f"{place}/{i}", depth + 1) for i, item in enumerate(value))
    return value


def _renamed(arrays: dict[str, np.ndarray], rename: Rename | None) -> dict[str, np.ndarray]:
    if rename is None:
        return arrays
    names = Renaming(rename).to_torch(arrays)
    return {names[name]: array for name, array in arrays.items()}


def _layout(
    path: pathlib.Path,
    arrays: dict[str, np.ndarray],
    averages: dict[str, np.ndarray] | None,
    notes: dict[str, Any],
    layout: str | None,
) -> dict[str, Any]:
    """The top level of a training checkpoint: timm.utils.CheckpointSaver, torchvision's references/classification."""
    value: dict[str, Any] = {"model" if layout == "torchvision" else "state_dict": arrays}
    if averages is not None and layout == "torchvision":
        count = _count(path, notes.pop("n_averaged", 1))
        value["model_ema"] = {"n_averaged": count, **{f"module.{name}": array for name, array in averages.items()}}
    elif averages is not None:
        value["state_dict_ema"] = averages
    if layout == "timm" and "epoch" in notes:
        notes.setdefault("version", 2)  # `epoch` is the last one done (timm/utils/checkpoint_saver.py)
    if taken := value.keys() & notes.keys():
        raise CheckpointError(path, f"metadata: {', '.join(sorted(taken))} is where the state dict goes")
    return {**value, **notes}


def _count(path: pathlib.Path, value: Any) -> np.ndarray:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise CheckpointError(path, f"metadata 'n_averaged' is the number of averaged models, found {shown(value)}")
    return np.array(number, np.int64)


def _arrays(path: pathlib.Path, target: Any) -> dict[str, np.ndarray]:
    """The target as a state dict of NumPy arrays."""
    nested = isinstance(target, Mapping) and target and all(isinstance(value, Mapping) for value in target.values())
    if nested or not isinstance(target, Mapping):
        target = state_dict(target)
    bad = [name for name in target if not isinstance(name, str)]
    if bad:
        raise CheckpointError(path, f"names {', '.join(map(name_of, bad[:8]))} are not text")
    if not target:
        raise CheckpointError(path, "there are no arrays to write, and a file without any is no checkpoint")
    arrays, bad = {}, []
    for name, value in target.items():
        try:
            arrays[name] = to_numpy(value)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's, of tensors without strides or data
            bad.append(f"{name!r} ({str(error).partition(chr(10))[0]})")
    if bad:
        raise CheckpointError(path, f"entries that are no arrays: {', '.join(bad)}")
    bad = [f"{name!r} ({array.dtype})" for name, array in arrays.items() if array.dtype.name not in dtypes.TORCH]
    if bad:
        raise CheckpointError(path, f"entries of dtypes that torch does not have: {', '.join(bad)}")
    return arrays


def _versions(target: Any) -> dict[str, int]:
    """The modules' versions, of a `Checkpoint` or of what `torch.nn.Module.state_dict` gave."""
    if isinstance(target, Checkpoint):
        return target.versions
    kept = getattr(target, "_metadata", None)
    return wrappings.versions(kept) if isinstance(target, Mapping) else {}


def _notes(arrays: Mapping[str, Any], versions: Mapping[str, int], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The modules' versions as torch keeps them; and what the names begin with, where a reader would take off more."""
    found: dict[str, dict[str, Any]] = {
        f"{prefix}{name}".rstrip("."): {"version": version} for name, version in versions.items()
    }
    if state_dicts.looks_wrapped(arrays):
        found.setdefault("", {})[state_dicts.PREFIX] = prefix
    return found


def _text(path: pathlib.Path, key: object, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"metadata {shown(key)} cannot be written as text: {error}") from None
