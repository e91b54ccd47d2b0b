"""Checkpoint files in and out: any file that PyTorch users have becomes a state dict of arrays, and goes back."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from interop import dtypes, safetensors_file, torch_file, torch_writer, wrappings
from interop.files import CheckpointError, Data

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

    An array is made when it is asked for and costs no memory beyond the pages that are read. Going through `items()`
    and letting each array go after use streams a file of any size.
    """

    def __init__(
        self, entries: Mapping[str, wrappings.Entry], metadata: Mapping[str, Any], path: pathlib.Path, format: str
    ) -> None:
        self._entries = dict(entries)
        self.metadata = dict(metadata)
        self.path = path
        self.format = format

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].array()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Checkpoint({os.fspath(self.path)!r}, {self.format}, {len(self)} arrays)"


def load_checkpoint(path: "str | os.PathLike[str]", which: str | None = None) -> Checkpoint:
    """Reads a checkpoint without torch and without running anything that is in it.

        >>> checkpoint = interop.load_checkpoint("model_best.pth.tar", which="ema")
        >>> checkpoint["conv1.weight"].shape, checkpoint.metadata["epoch"], checkpoint.metadata["unwrapped"]
        ((64, 3, 7, 7), 87, ['state_dict_ema', 'module.'])

    Args:
        path: a file of torch.save (zip or legacy) or safetensors. The format is told by the content.
        which: which of several state dicts to take: "model", "ema", or a name from `metadata["choices"]`. By default
            the model, as torchvision does; in a file with pickled modules the average (EMA), as Ultralytics does.

    Returns:
        A mapping from PyTorch's names to arrays, with `.metadata`. See `Checkpoint`.

    Raises:
        CheckpointError: for a file that is missing, truncated, damaged or no checkpoint, or if the choice is unclear.
    """
    target = pathlib.Path(path)
    data = Data.map(target)
    if _is_safetensors(data):
        entries, metadata = safetensors_file.read(data)
        state = wrappings.unwrap(entries, which, target)
        return Checkpoint(state.entries, {**metadata, **state.metadata}, target, "safetensors")
    if data.read(0, 4) == b"PK\3\4" or data.read(0, 1) == b"\x80" or data.read(257, 5) == b"ustar":
        value, format = torch_file.read(data)
        state = wrappings.unwrap(value, which, target)
        return Checkpoint(state.entries, state.metadata, target, format)
    raise CheckpointError(target, f"is no checkpoint: it begins with {data.read(0, 16)!r}{_hint(data)}")


def save_checkpoint(path: "str | os.PathLike[str]", target: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a file that PyTorch loads, atomically: after a crash or on a full disk the old file is still there.

    Args:
        path: ends in `.safetensors` (safetensors.torch.load_file, load_model) or `.pt`, `.pth`, `.bin`
            (`torch.load(path, weights_only=True)` gives an OrderedDict of tensors). The folder must exist.
        target: a mapping from names to arrays (NumPy, JAX or torch), a `Checkpoint`, or a model or state, which goes
            through `interop.state_dict`. dtypes are kept, and names that share memory share it in the file.
        metadata: what else the file is to say. safetensors holds text, so that other values are written as JSON. In a
            `.pth` file with metadata the state dict is the entry "state_dict", the metadata are its siblings.

    Raises:
        CheckpointError: for an unknown ending, a dtype that the format does not have, and where the disk refuses.
    """
    target_path = pathlib.Path(path)
    arrays = _arrays(target_path, target)
    notes = dict(metadata or {})
    if target_path.suffix == ".safetensors":
        text = {str(key): _text(target_path, key, value) for key, value in notes.items()}
        safetensors_file.write(target_path, arrays, {"format": "pt", **text})
    elif target_path.suffix in (".pt", ".pth", ".bin"):
        if "state_dict" in notes:
            raise CheckpointError(target_path, "metadata: 'state_dict' is the name of the state dict itself")
        torch_writer.write(target_path, {"state_dict": arrays, **notes} if notes else arrays)
    else:
        raise CheckpointError(target_path, "the ending says the format: .safetensors, .pt, .pth or .bin")


def _arrays(path: pathlib.Path, target: Any) -> dict[str, np.ndarray]:
    """The target as a state dict of NumPy arrays."""
    is_state = isinstance(target, Mapping) and all(hasattr(v, "dtype") and hasattr(v, "shape") for v in target.values())
    if not is_state:
        from interop._state_dict import state_dict

        target = state_dict(target)
    bad = [name for name in target if not isinstance(name, str)]
    if bad:
        raise CheckpointError(path, f"names {bad[:8]} are not text")
    arrays = {name: _numpy(value) for name, value in target.items()}
    bad = [f"{name!r} ({array.dtype})" for name, array in arrays.items() if array.dtype.name not in dtypes.TORCH]
    if bad:
        raise CheckpointError(path, f"entries of dtypes that torch does not have: {', '.join(bad)}")
    return arrays


def _numpy(value: Any) -> np.ndarray:
    """An array of any of the three libraries as NumPy's."""
    if type(value).__module__.partition(".")[0] == "torch":
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        name = str(tensor.dtype).removeprefix("torch.")
        if name in dtypes.TORCH and dtypes.TORCH[name].isbuiltin != 1:  # ml_dtypes', which torch hands to no one
            import torch

            bits = tensor.view({1: torch.uint8, 2: torch.int16}[tensor.element_size()]).numpy()
            return bits.view(dtypes.TORCH[name])  # type: ignore[no-any-return]
        value = tensor.numpy()
    return dtypes.native(np.asarray(value))


def _text(path: pathlib.Path, key: Any, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, f"metadata {key!r} cannot be written as text: {error}") from None


def _is_safetensors(data: Data) -> bool:
    return data.path.suffix == ".safetensors" or data.read(8, 1) == b"{"


def _hint(data: Data) -> str:
    start = data.read(0, 64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return ", a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if start.lower().startswith((b"<!doctype", b"<html")):
        return ", a web page: the download gave an error message instead of the file"
    return ""
