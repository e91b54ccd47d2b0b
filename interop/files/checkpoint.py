"""Checkpoint files in and out: any file that PyTorch users have becomes a state dict of arrays, and goes back."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from interop.files import distributed, hub, safetensors_file, shards, state_dicts, wrappings
from interop.files import torch_reader as torch_file
from interop.files.budget import Budget
from interop.files.disk import CheckpointError, Data, files_in, kind, path_of
from interop.files.replacing import target
from interop.variables import check

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint"]


class Checkpoint(Mapping[str, np.ndarray]):
    """A state dict read from a file: PyTorch's names, and arrays that are read-only views of the mapped file.

    `load_checkpoint` makes it. An array is made when it is asked for and costs no memory beyond the pages that are
    read. Going through `items()` and letting each array go after use streams a file of any size. While arrays are in
    use the file must not be written in place, as torch.save does: they would change, or the process would end (SIGBUS)
    where the file became shorter. `save_checkpoint` puts a new file in its place, which does no harm; `to_device` and
    NumPy's `array.copy()` copy.

    **Attributes:**

    - `path`: the file (or folder).
    - `format`: "safetensors", "torch zip", "torch legacy", ...
    - `metadata`: what else the file says (epoch, arch, optimizer, ... under the file's own names), and `which`: the
      name of the state dict that was taken (empty if the file is one), `choices`: all that the file has, `unwrapped`:
      what was taken off to get to the model's own names, in order, `not_arrays`: entries of the state dict that are no
      arrays, if there are any.
    - `versions`: the versions of the modules that the state dict came from, by their names, if the file has them: what
      torch keeps as `state_dict._metadata`, and some modules want to see again (torchvision's MNASNet).
    - `batch_norms`: eps, momentum and the other flags of each BatchNorm layer, where whole modules are pickled.
    - `prefix`: the `module.` that was taken off all names, as often as it was. DistributedDataParallel adds it, but a
      model may have a child of that name: `load_state_dict` knows it by the model's own names.
    - `entries`: where each array lies.
    """

    def __init__(
        self, state: wrappings.StateDict, metadata: Mapping[str, Any], path: pathlib.Path, format: str
    ) -> None:
        self.entries = state.entries
        self.metadata = dict(metadata)
        self.versions = state.versions
        self.batch_norms = state.batch_norms
        self.prefix = state.prefix
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

    def to_device(self, device: jax.Device | jax.sharding.Sharding | None = None) -> dict[str, jax.Array]:
        """The arrays on a device, one after the other.

        Each is a copy, and its pages leave memory when it has arrived, so that no more than the largest array is in
        memory besides what is on the device.

        ```python
        variables = interop.load_checkpoint("resnet50.safetensors").to_device()
        ```

        **Arguments:**

        - `device`: a device or a sharding, as `jax.device_put` takes it; None for JAX's default device.

        **Returns:** a dict from PyTorch's names to JAX's arrays.

        **Raises:** `ValueError` for arrays that JAX, as configured, cannot hold (float64 without jax_enable_x64).
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

    ```python
    >>> checkpoint = interop.load_checkpoint("model_best.pth.tar", which="ema")
    >>> checkpoint["conv1.weight"].shape, checkpoint.metadata["epoch"], checkpoint.metadata["unwrapped"]
    ((64, 3, 7, 7), 87, ['state_dict_ema', 'module.'])
    ```

    Of a model that is pickled whole there are the parameters and buffers that its `state_dict()` has; what a class's
    own code adds (`get_extra_state`, hooks) is not known without running it.

    A file of n bytes is read, or refused, within about 1 s + n / (20 MB/s) and 64 MB + 4 n of memory, whatever it says.

    **Arguments:**

    - `path`: a file of torch.save (zip or legacy) or safetensors, told by the content; an index of several files
      (`*.index.json`); a folder of torch.distributed.checkpoint or of Hugging Face's cache; or a name of Hugging Face's
      hub, `hf_hub:owner/model[@revision][/file]`.
    - `which`: which of several state dicts to take: "model", the trained weights; "ema", their average; or a name from
      `metadata["choices"]`, as it is. By default the model, as torchvision does; in a file with pickled modules the
      average, as Ultralytics does; an error where the file's names suggest the opposite of what it holds (MMEngine,
      Lightning). The formats are in docs/checkpoints.md.

    **Returns:** a `Checkpoint`: a mapping from PyTorch's names to arrays, with `.metadata`.

    **Raises:**

    - `interop.CheckpointError`: for a file that is missing, truncated, damaged or no checkpoint, that describes more
      than its size allows, or if the choice is unclear.
    - `TypeError`: for a path or `which` that is none.
    """
    source = path_of(path)
    if which is not None and not isinstance(which, str):
        raise TypeError(f"expected the name of a state dict or None for which=, found {type(which).__name__}")
    if hub.is_name(name := os.fspath(path)):
        source = hub.fetch(name)
    found = kind(source)
    if found == "a folder":
        source = _in_folder(source)
    elif found == "nothing" and source.name:
        places = [place.with_name(place.name + shards.SUFFIX) for place in (source, target(source))]
        source = next(filter(_is_there, places), source)  # save_checkpoint wrote it in several files
    said: dict[str, Any] = {}
    if source.name == distributed.METADATA:
        value, budget = distributed.read(source.parent)
        format = "torch.distributed.checkpoint"
    elif source.name.endswith(shards.SUFFIX):
        value, said = shards.read(source, lambda data: _read(data)[0])
        budget, format = Budget(source, sum(files_in(source.parent).values())), "sharded"
    else:
        data = Data.map(source)
        budget = data.budget
        value, said, format = _read(data)
    state = state_dicts.unwrap(value, which, source, budget, said.pop(state_dicts.PREFIX, None))
    return Checkpoint(state, {**said, **state.metadata}, source, format)


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


def _is_there(path: pathlib.Path) -> bool:
    try:
        return kind(path) == "file"
    except CheckpointError:  # the name with the ending is too long
        return False


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    """The one checkpoint in a folder."""
    files = files_in(folder)
    if distributed.METADATA in files:
        return folder / distributed.METADATA
    for ending in (shards.SUFFIX, ".safetensors", ".bin", ".pt", ".pth"):
        found = [file for file in files if file.endswith(ending)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            names = ", ".join(map(repr, found[:8]))
            raise CheckpointError(folder, f"is a folder with several checkpoints; choose one: {names}")
    if steps := _steps_of_a_run(folder):
        raise CheckpointError(
            folder,
            f"is a run of jaxnorm.Checkpoints (steps {', '.join(map(str, steps))}), whose checkpoints hold arrays "
            "alone: jaxnorm.restore_model gives them to a model, `jaxnorm export` makes a file for PyTorch of them",
        )
    raise CheckpointError(folder, "is a folder without a checkpoint (.metadata, *.index.json, *.safetensors, *.pth)")


def _steps_of_a_run(folder: pathlib.Path) -> list[int]:
    """The last steps that orbax has written there, each a folder with a file of this name (orbax 0.12)."""
    names = [path.name for path in folder.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(int(name) for name in names if _is_there(folder / name / "_CHECKPOINT_METADATA"))[-8:]


def _hint(data: Data) -> str:
    start = data.read(0, 64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if start.lower().startswith((b"<!doctype", b"<html")):
        return "a web page: the download gave an error message instead of the file"
    return ""
