"""Checkpoint files in and out: any file that PyTorch users have becomes a state dict of arrays, and goes back."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from interop import dtypes
from interop.files import distributed, hub, safetensors_file, shards, torch_writer, wrappings
from interop.files import torch_reader as torch_file
from interop.files.disk import CheckpointError, Data
from interop.variables import check

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"]


class Checkpoint(Mapping[str, np.ndarray]):
    """A state dict read from a file: PyTorch's names, and arrays that are read-only views of the mapped file.

    Attributes:
        path: the file (or folder).
        format: "safetensors", "torch zip", "torch legacy", ...
        metadata: what else the file says (epoch, arch, optimizer, ... under the file's own names), and
            `which`: the name of the state dict that was taken (empty if the file is one),
            `choices`: all that the file has,
            `unwrapped`: what was taken off to get to the model's own names, in order,
            `not_arrays`: entries of the state dict that are no arrays, if there are any.
        versions: the versions of the modules that the state dict came from, by their names, if the file has them:
            what torch keeps as `state_dict._metadata`, and some modules want to see again (torchvision's MNASNet).
        batch_norms: eps, momentum and the other flags of each BatchNorm layer, where whole modules are pickled.
        entries: where each array lies (`interop.tensors.Tensor`).

    An array is made when it is asked for and costs no memory beyond the pages that are read. Going through `items()`
    and letting each array go after use streams a file of any size. While arrays are in use the file must not be written
    in place, as torch.save does: they would change, or the process would end (SIGBUS) where the file became shorter.
    `save_checkpoint` puts a new file in its place, which does no harm; `to_device` and NumPy's `array.copy()` copy.
    """

    def __init__(
        self, state: wrappings.StateDict, metadata: Mapping[str, Any], path: pathlib.Path, format: str
    ) -> None:
        self.entries = state.entries
        self.metadata = dict(metadata)
        self.versions = state.versions
        self.batch_norms = state.batch_norms
        self.path = path
        self.format = format

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].array()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def to_device(self, device: Any = None) -> dict[str, jax.Array]:
        """The arrays on a device (or with a sharding, as `jax.device_put` takes it), one after the other.

        Each is a copy, and its pages leave memory when it has arrived, so that no more than the largest array is in
        memory besides what is on the device.

            variables = interop.load_checkpoint("resnet50.safetensors").to_device()

        Raises:
            ValueError: for arrays that JAX, as configured, cannot hold (float64 without jax_enable_x64).
        """
        check(self)
        arrays = {}
        for name, array in self.items():
            # a CPU device may keep the memory that it is given, also with may_alias=False, and a file may change
            arrays[name] = jax.device_put(array.copy(), device).block_until_ready()
            del array
        return arrays

    def __repr__(self) -> str:
        return f"Checkpoint({os.fspath(self.path)!r}, {self.format}, {len(self)} arrays)"


def load_checkpoint(path: "str | os.PathLike[str]", which: str | None = None) -> Checkpoint:
    """Reads a checkpoint without torch and without running anything that is in it.

        >>> checkpoint = interop.load_checkpoint("model_best.pth.tar", which="ema")
        >>> checkpoint["conv1.weight"].shape, checkpoint.metadata["epoch"], checkpoint.metadata["unwrapped"]
        ((64, 3, 7, 7), 87, ['state_dict_ema', 'module.'])

    Args:
        path: a file of torch.save (zip or legacy) or safetensors, told by the content; an index of several files
            (`*.index.json`); a folder of torch.distributed.checkpoint or of Hugging Face's cache; or a name of
            Hugging Face's hub, `hf_hub:owner/model[@revision][/file]`.
        which: which of several state dicts to take: "model", "ema", or a name from `metadata["choices"]`. By default
            the model, as torchvision does; in a file with pickled modules the average (EMA), as Ultralytics does.

    Returns:
        A mapping from PyTorch's names to arrays, with `.metadata`. See `Checkpoint`.

    Of a model that is pickled whole there are the parameters and buffers that its `state_dict()` has; what a class's
    own code adds (`get_extra_state`, hooks) is not known without running it.

    Raises:
        CheckpointError: for a file that is missing, truncated, damaged or no checkpoint, or if the choice is unclear.
    """
    name = os.fspath(path)
    source = hub.fetch(name) if hub.is_name(name) else pathlib.Path(name)
    if source.is_dir():
        source = _in_folder(source)
    elif not source.exists() and source.with_name(source.name + shards.SUFFIX).exists():
        source = source.with_name(source.name + shards.SUFFIX)  # save_checkpoint wrote it in several files
    said: dict[str, Any] = {}
    if source.name == distributed.METADATA:
        value, format = distributed.read(source.parent), "torch.distributed.checkpoint"
    elif source.name.endswith(shards.SUFFIX):
        value, said = shards.read(source, lambda data: _read(data)[0])
        format = "sharded"
    else:
        value, said, format = _read(Data.map(source))
    state = wrappings.unwrap(value, which, source)
    return Checkpoint(state, {**said, **state.metadata}, source, format)


def save_checkpoint(
    path: "str | os.PathLike[str]",
    target: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    ema: Any = None,
    layout: str | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Writes a file that PyTorch loads, atomically: after a crash or on a full disk the old file is still there.

        >>> interop.save_checkpoint("model.safetensors", model)
        >>> interop.save_checkpoint("last.pth", model, {"epoch": 3, "arch": "resnet50"}, ema=average, layout="timm")

    Args:
        path: ends in `.safetensors` (safetensors.torch.load_file, load_model) or `.pt`, `.pth`, `.bin`, `.tar`
            (`torch.load(path, weights_only=True)` gives an OrderedDict of tensors). The folder must exist.
        target: a mapping from names to arrays (NumPy, JAX or torch), a `Checkpoint`, or a model or state, which goes
            through `interop.state_dict`. dtypes are kept, and names that share memory share it in the file. The
            modules' versions that a `Checkpoint` or torch's own state dict knows go along into a `.pth` file.
        metadata: what else the file is to say. safetensors holds text, so that other values are written as JSON.
        ema: the average of `target`, of the same kinds. Not for safetensors, which holds one state dict.
        layout: None, the state dict itself, or "timm" if there are metadata or an average; "timm" (`state_dict`,
            `state_dict_ema` and the metadata beside them); "torchvision" (`model`, `model_ema` as an AveragedModel with
            `n_averaged`, which is taken from the metadata or 1).
        max_shard_size: bytes of arrays above which a safetensors file is split into several, with an index
            `<path>.index.json`; `load_checkpoint` takes the same path.

    Raises:
        CheckpointError: for an unknown ending or layout, a dtype that the format lacks, and where the disk refuses.
    """
    target_path = pathlib.Path(path)
    notes = dict(metadata or {})
    if layout not in (None, "timm", "torchvision"):
        raise CheckpointError(target_path, f"layout {layout!r} is neither None, 'timm' nor 'torchvision'")
    if target_path.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".tar"):
        raise CheckpointError(target_path, "the ending says the format: .safetensors, .pt, .pth, .bin or .pth.tar")
    arrays = _arrays(target_path, target)
    if target_path.suffix == ".safetensors":
        if ema is not None or layout is not None:
            raise CheckpointError(
                target_path, "safetensors holds one state dict: no ema and no layout; .pth holds them"
            )
        text = {"format": "pt", **{str(key): _text(target_path, key, value) for key, value in notes.items()}}
        if max_shard_size is not None and sum(array.nbytes for array in arrays.values()) > max_shard_size:
            shards.write(target_path, arrays, text, max_shard_size)
        else:
            safetensors_file.write(target_path, arrays, text)
            shards.forget(target_path)
        return
    if max_shard_size is not None:
        raise CheckpointError(target_path, "only safetensors are split into several files")
    averages = None if ema is None else _arrays(target_path, ema)
    value = _layout(target_path, arrays, averages, notes, layout) if layout or notes or averages is not None else arrays
    versions: list[tuple[Any, dict[str, int]]] = [(arrays, _versions(target))]
    if averages is not None:
        averaged = layout == "torchvision"  # an AveragedModel, which has the model at `module`
        kept = {f"module.{name}".rstrip(".") if averaged else name: v for name, v in _versions(ema).items()}
        versions.append((value["model_ema"] if averaged else averages, kept))
    torch_writer.write(target_path, value, versions)


def _read(data: Data) -> tuple[Any, dict[str, Any], str]:
    """What one file holds, what it says besides, and its format."""
    if hint := _hint(data):
        raise CheckpointError(data.path, f"is no checkpoint but {hint}")
    if data.path.suffix == ".safetensors" or data.read(8, 1) == b"{":
        return *safetensors_file.read(data), "safetensors"
    if data.read(0, 4) == b"PK\3\4" or data.read(0, 1) == b"\x80" or data.read(257, 5) == b"ustar":
        value, format = torch_file.read(data)
        return value, {}, format
    raise CheckpointError(data.path, f"is no checkpoint: it begins with {data.read(0, 16)!r}")


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    """The one checkpoint in a folder."""
    if (folder / distributed.METADATA).is_file():
        return folder / distributed.METADATA
    for ending in (shards.SUFFIX, ".safetensors", ".bin", ".pt", ".pth"):
        found = sorted(file for file in folder.iterdir() if file.name.endswith(ending) and file.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(repr(file.name) for file in found[:8])
            raise CheckpointError(folder, f"is a folder with several checkpoints; choose one: {names}")
    raise CheckpointError(folder, "is a folder without a checkpoint (.metadata, *.index.json, *.safetensors, *.pth)")


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
        count = np.array(notes.pop("n_averaged", 1), np.int64)
        value["model_ema"] = {"n_averaged": count, **{f"module.{name}": array for name, array in averages.items()}}
    elif averages is not None:
        value["state_dict_ema"] = averages
    if taken := value.keys() & notes.keys():
        raise CheckpointError(path, f"metadata: {', '.join(sorted(taken))} is where the state dict goes")
    return {**value, **notes}


def _arrays(path: pathlib.Path, target: Any) -> dict[str, np.ndarray]:
    """The target as a state dict of NumPy arrays."""
    nested = isinstance(target, Mapping) and target and all(isinstance(value, Mapping) for value in target.values())
    if nested or not isinstance(target, Mapping):
        from interop.weights._state_dict import state_dict

        target = state_dict(target)
    bad = [name for name in target if not isinstance(name, str)]
    if bad:
        raise CheckpointError(path, f"names {bad[:8]} are not text")
    arrays, bad = {}, []
    for name, value in target.items():
        try:
            arrays[name] = as_numpy(value)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's, of tensors without strides or data
            bad.append(f"{name!r} ({str(error).partition(chr(10))[0]})")
    if bad:
        raise CheckpointError(path, f"entries that are no arrays: {', '.join(bad)}")
    bad = [f"{name!r} ({array.dtype})" for name, array in arrays.items() if array.dtype.name not in dtypes.TORCH]
    if bad:
        raise CheckpointError(path, f"entries of dtypes that torch does not have: {', '.join(bad)}")
    return arrays


def as_numpy(value: Any) -> np.ndarray:
    """An array of any of the three libraries as NumPy's. Raises TypeError for anything else, torch's errors for its."""
    if not hasattr(value, "dtype"):
        raise TypeError(f"of type {type(value).__module__}.{type(value).__qualname__}")
    if hasattr(value, "detach"):  # torch's, of any class
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        name = str(tensor.dtype).removeprefix("torch.")
        if name in dtypes.TORCH and dtypes.TORCH[name].isbuiltin != 1:  # ml_dtypes', which torch hands to no one
            import torch

            bits = tensor.view({1: torch.uint8, 2: torch.int16}[tensor.element_size()]).numpy()
            return bits.view(dtypes.TORCH[name])
        value = tensor.numpy()
    return dtypes.native(np.asarray(value))


def _versions(target: Any) -> dict[str, int]:
    """The modules' versions, of a `Checkpoint` or of what `torch.nn.Module.state_dict` gave."""
    if isinstance(target, Checkpoint):
        return target.versions
    kept = getattr(target, "_metadata", None)
    return wrappings.versions(kept) if isinstance(target, Mapping) else {}


def _text(path: pathlib.Path, key: Any, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, f"metadata {key!r} cannot be written as text: {error}") from None


def _hint(data: Data) -> str:
    start = data.read(0, 64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if start.lower().startswith((b"<!doctype", b"<html")):
        return "a web page: the download gave an error message instead of the file"
    return ""
