"""Folders of torch.distributed.checkpoint: `.metadata`, a pickle, and `*.distcp`, where each tensor's parts lie.

Sources: torch/distributed/checkpoint/metadata.py (what the pickle holds) and filesystem.py (`_StorageInfo`: file,
offset, length; at that place is what torch.save wrote).
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from interop.files import rebuild
from interop.files import torch_reader as torch_file
from interop.files.disk import CheckpointError, Data
from interop.files.shards import beside
from interop.files.stand_ins import Instance, UnpickleError
from interop.files.tensors import Tensor
from interop.files.unpickle import ALLOWANCE, unpickle

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"
_Places = dict[tuple[str, tuple[int, ...] | None], Any]  # by name and offset, what the pickle says of the place


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks(Tensor):
    """A tensor in parts, each with its place in the whole."""

    parts: tuple[tuple[tuple[int, ...], Tensor], ...] = ()

    def problem(self) -> str | None:
        """What is wrong with any of the parts."""
        return next((problem for _, part in self.parts if (problem := part.problem())), None)

    def array(self) -> np.ndarray:
        """The whole; the file's own bytes where there is one part only, otherwise put together in memory."""
        if len(self.parts) == 1:
            return self.parts[0][1].array()
        whole: np.ndarray = np.empty(self.shape, self.dtype)
        for place, part in self.parts:
            whole[tuple(slice(low, low + n) for low, n in zip(place, part.shape, strict=True))] = part.array()
        whole.flags.writeable = False
        return whole


def read(folder: pathlib.Path) -> Any:
    """What was saved: the nested mapping that dcp.save got, or names as they are where its structure was not kept."""
    path = folder / METADATA
    data = Data.map(path)
    try:
        allowance = max(ALLOWANCE, 3 * sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))
        metadata, _ = unpickle(data.buffer, 0, call=rebuild.call, build=rebuild.build, allowance=allowance)
    except UnpickleError as error:
        raise CheckpointError(path, str(error)) from error
    described = _field(path, metadata, "state_dict_metadata", dict)
    places = _places(path, _field(path, metadata, "storage_data", dict))
    structure = metadata.attributes.get("planner_data")
    files: dict[str, Data] = {}
    result: dict[str, Any] = {}
    for name, description in described.items():
        if not isinstance(name, str) or not isinstance(description, Instance):
            raise CheckpointError(path, f"entry {name!r:.80} is not described as tensors and objects are")
        if str(description.cls) == f"{_MODULE}.metadata.TensorStorageMetadata":
            value = _tensor(path, name, description, places, files)
        else:
            value = _stored(path, name, places.get((name, None)), files)
        _put(path, result, structure.get(name) if isinstance(structure, dict) else None, name, value)
    return result


def _places(path: pathlib.Path, storage_data: dict[Any, Any]) -> _Places:
    places: _Places = {}
    for index, info in storage_data.items():
        name = _field(path, index, "fqn", str)
        offset = index.attributes.get("offset")
        if offset is not None and not _sizes(offset):
            raise CheckpointError(path, f"entry {name!r}: its offset is no offset")
        places[name, offset] = info
    return places


def _tensor(path: pathlib.Path, name: str, description: Instance, places: _Places, files: dict[str, Data]) -> Any:
    shape = _size(path, name, description, "size")
    chunks = _field(path, description, "chunks", list)
    parts = []
    for chunk in chunks:
        offset, sizes = _size(path, name, chunk, "offsets"), _size(path, name, chunk, "sizes")
        part = _stored(path, name, places.get((name, offset)), files)
        if not isinstance(part, Tensor):
            return part  # a kind that is no array; the caller says so where it is wanted
        if part.shape != sizes or len(offset) != len(sizes):
            raise CheckpointError(path, f"entry {name!r}: its part at {offset} has shape {part.shape}, not {sizes}")
        parts.append((offset, part))
    if not parts or not _tiles(shape, [(offset, part.shape) for offset, part in parts]):
        raise CheckpointError(path, f"entry {name!r}: its {len(parts)} parts do not make up shape {shape}")
    if len({part.dtype for _, part in parts}) > 1:
        raise CheckpointError(path, f"entry {name!r}: its parts have several dtypes")
    first = parts[0][1]
    return first if len(parts) == 1 else Chunks(first.storage, first.dtype, shape, parts=tuple(parts))


def _tiles(shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether the parts fill the shape, each place once."""
    if any(len(low) != len(shape) for low, _ in parts):
        return False
    if not shape:
        return len(parts) == 1
    low = np.array([low for low, _ in parts], dtype=object)  # exact, however large
    high = low + np.array([size for _, size in parts], dtype=object)
    if (high > np.array(shape, dtype=object)).any():
        return False
    for i in range(len(parts) - 1):
        if ((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i])).all(axis=1).any():
            return False
    return sum(math.prod(size) for _, size in parts) == math.prod(shape)


def _stored(path: pathlib.Path, name: str, info: Any, files: dict[str, Data]) -> Any:
    """What torch.save wrote at a place."""
    if not isinstance(info, Instance):
        raise CheckpointError(path, f"entry {name!r} has no place in any file")
    file = _field(path, info, "relative_path", str)
    offset, length = _field(path, info, "offset", int), _field(path, info, "length", int)
    if info.attributes.get("transform_descriptors"):
        raise CheckpointError(
            path, f"entry {name!r} was transformed ({info.attributes['transform_descriptors']!r:.80})"
        )
    if not file or file in (".", "..") or set(file) & {"/", "\\", "\0", ":"}:
        raise CheckpointError(path, f"entry {name!r}: {file!r:.80} is not the name of a file in the folder")
    if file not in files:
        files[file] = Data.map(beside(path, file))
    data = files[file]
    if offset < 0 or length < 0 or offset + length > data.size:
        raise CheckpointError(
            data.path, f"is truncated: entry {name!r} at {offset} has {length} bytes, the file {data.size}"
        )
    return torch_file.read_zip(data, offset, length)


def _put(path: pathlib.Path, result: dict[str, Any], place: Any, name: str, value: Any) -> None:
    """Puts a value where it was in the mapping that was saved; lists are mappings from their indices."""
    known = isinstance(place, tuple) and 0 < len(place) < 64 and all(isinstance(step, str | int) for step in place)
    steps = [str(step) for step in place] if known else [name]
    for step in steps[:-1]:
        result = result.setdefault(step, {})
        if not isinstance(result, dict):
            raise CheckpointError(path, f"entry {name!r} lies inside another entry")
    if steps[-1] in result:
        raise CheckpointError(path, f"entry {name!r} is there twice")
    result[steps[-1]] = value


def _size(path: pathlib.Path, name: str, value: Any, field: str) -> tuple[int, ...]:
    found: tuple[int, ...] = _field(path, value, field, tuple)
    if not _sizes(found):
        raise CheckpointError(path, f"entry {name!r}: its {field} are no sizes")
    return found


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _field(path: pathlib.Path, value: Any, name: str, kind: type) -> Any:
    found = value.attributes.get(name) if isinstance(value, Instance) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise CheckpointError(path, f"is no metadata of torch.distributed.checkpoint: {name!r} is not there")
    return found
