"""Folders of torch.distributed.checkpoint: `.metadata`, a pickle, and `*.distcp`, where each tensor's parts lie.

Sources: torch/distributed/checkpoint/metadata.py (what the pickle holds) and filesystem.py (`_StorageInfo`: file,
offset, length; at that place is what torch.save wrote).
"""

import collections
import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np

from interop.files import rebuild
from interop.files import torch_reader as torch_file
from interop.files.budget import Budget
from interop.files.disk import CheckpointError, Data, files_in
from interop.files.shards import beside
from interop.files.stand_ins import Instance, UnpickleError, name_of
from interop.files.tensors import SLACK, Tensor
from interop.files.unpickle import unpickle

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Chunks(Tensor):
    """A tensor in parts, each with its place in the whole."""

    parts: tuple[tuple[tuple[int, ...], Tensor], ...] = ()

    def problem(self) -> str | None:
        """What is wrong with any of the parts, or with all of them: they may be one place of the file."""
        wrong = next((problem for _, part in self.parts if (problem := part.problem())), None)
        data = self.storage.data
        needed = sum(math.prod(part.shape) * part.dtype.itemsize for _, part in self.parts)
        if wrong is None and data is not None and needed > 4 * data.budget.size + SLACK:
            wrong = f"its parts repeat what is there to {needed} bytes"
        return wrong

    def copied(self) -> int:
        """The whole is put together in memory."""
        return sum(math.prod(part.shape) * part.dtype.itemsize + part.copied() for _, part in self.parts)

    def array(self) -> np.ndarray:
        """The whole; the file's own bytes where there is one part only, otherwise put together in memory."""
        if len(self.parts) == 1:
            return self.parts[0][1].array()
        whole: np.ndarray = np.empty(self.shape, self.dtype)
        for place, part in self.parts:
            if 0 in part.shape:  # which may lie outside
                continue
            whole[tuple(slice(low, low + n) for low, n in zip(place, part.shape, strict=True))] = part.array()
        whole.flags.writeable = False
        return whole


def read(folder: pathlib.Path) -> tuple[Any, Budget]:
    """What was saved: the nested mapping that dcp.save got, or names as they are where its structure was not kept; and
    what is left of the budget that the folder's size gives."""
    path = folder / METADATA
    budget = Budget(path, sum(files_in(folder).values()))
    data = Data.map(path, budget)
    try:
        metadata, _ = unpickle(data.buffer, 0, budget=budget, call=rebuild.call, build=rebuild.build)
    except UnpickleError as error:
        raise CheckpointError(path, str(error)) from error
    described = _field(path, metadata, "state_dict_metadata", dict)
    files = _Files(path, _field(path, metadata, "storage_data", dict), budget)
    structure = metadata.attributes.get("planner_data")
    result: dict[str, Any] = {}
    for name, description in described.items():
        if not isinstance(name, str) or not isinstance(description, Instance):
            raise CheckpointError(path, f"entry {name_of(name)} is not described as tensors and objects are")
        budget.spend(memory=200, steps=20)
        if str(description.cls) == f"{_MODULE}.metadata.TensorStorageMetadata":
            value = _tensor(path, name, description, files)
        else:
            value = files.stored(name, None)
        _put(path, result, structure.get(name) if isinstance(structure, dict) else None, name, value, budget)
    return result, budget


class _Files:
    """What torch.save wrote at each place of the folder's files. A place is read once, however many entries name it."""

    def __init__(self, path: pathlib.Path, storage_data: dict[Any, Any], budget: Budget) -> None:
        self.path, self.budget = path, budget
        self.places: dict[tuple[str, tuple[int, ...] | None], Any] = {}  # by name and offset, what the pickle says
        self.files: dict[str, Data] = {}
        self.found: dict[tuple[str, int, int], Any] = {}
        for index, info in storage_data.items():
            name, offset = _field(path, index, "fqn", str), index.attributes.get("offset")
            if offset is not None and not _sizes(offset):
                raise CheckpointError(path, f"entry {name_of(name)}: its offset is no offset")
            budget.spend(memory=300, steps=10 + len(offset or ()))
            self.places[name, offset] = info

    def stored(self, name: str, at: tuple[int, ...] | None) -> Any:
        """The part of an entry that begins at an offset; an object, which has no parts, for None."""
        path, info = self.path, self.places.get((name, at))
        if not isinstance(info, Instance):
            raise CheckpointError(path, f"entry {name_of(name)} has no place in any file")
        file = _field(path, info, "relative_path", str)
        offset, length = _field(path, info, "offset", int), _field(path, info, "length", int)
        if changes := info.attributes.get("transform_descriptors"):
            raise CheckpointError(path, f"entry {name_of(name)} was transformed ({name_of(changes)})")
        self.budget.spend(memory=100, steps=10)
        if (file, offset, length) not in self.found:
            self.found[file, offset, length] = self._read(name, file, offset, length)
        return self.found[file, offset, length]

    def _read(self, name: str, file: str, offset: int, length: int) -> Any:
        path = self.path
        if not file or file in (".", "..") or set(file) & {"/", "\\", "\0", ":"}:
            raise CheckpointError(
                path, f"entry {name_of(name)}: {name_of(file)} is not the name of a file in the folder"
            )
        if file not in self.files:
            self.files[file] = Data.map(beside(path, file), self.budget)
        data = self.files[file]
        if offset < 0 or length < 0 or offset + length > data.size:
            raise CheckpointError(
                data.path, f"is truncated: entry {name_of(name)} at {name_of(offset)} has {name_of(length)} bytes, "
                f"the file {data.size}"
            )  # fmt: skip
        return torch_file.read_zip(data, offset, length)


def _tensor(path: pathlib.Path, name: str, description: Instance, files: _Files) -> Any:
    shape = _size(path, name, description, "size")
    chunks = _field(path, description, "chunks", list)
    parts = []
    for chunk in chunks:
        offset, sizes = _size(path, name, chunk, "offsets"), _size(path, name, chunk, "sizes")
        part = files.stored(name, offset)
        if not isinstance(part, Tensor):
            return part  # a kind that is no array; the caller says so where it is wanted
        if part.shape != sizes or len(offset) != len(sizes):
            raise CheckpointError(
                path, f"entry {name_of(name)}: its part at {offset} has shape {part.shape!r:.200}, not {sizes}"
            )
        files.budget.spend(memory=200, steps=10)
        parts.append((offset, part))
    if not parts or not _tiles(shape, [(offset, part.shape) for offset, part in parts], files.budget):
        raise CheckpointError(path, f"entry {name_of(name)}: its {len(parts)} parts do not make up shape {shape}")
    if len({part.dtype for _, part in parts}) > 1:
        raise CheckpointError(path, f"entry {name_of(name)}: its parts have several dtypes")
    first = parts[0][1]
    return first if len(parts) == 1 else Chunks(first.storage, first.dtype, shape, parts=tuple(parts))


def _tiles(shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], tuple[int, ...]]], budget: Budget) -> bool:
    """Whether the parts fill the shape, each place once.

    Each part adds its corners, with the sign -1 for each coordinate that is an end. These sums are the mixed difference
    of how often each place is filled, which they determine: it is once everywhere if they are those of the whole.
    """
    if any(len(low) != len(shape) for low, _ in parts):
        return False
    split = [axis for axis, n in enumerate(shape) if any(low[axis] or size[axis] != n for low, size in parts)]
    budget.spend(
        steps=len(shape) * len(parts) + (len(parts) << len(split)) * 5, memory=(len(parts) << len(split)) * 100
    )
    corners: collections.Counter[tuple[int, ...]] = collections.Counter()
    whole = ((0,) * len(shape), shape)
    for sign, (low, size) in [(-1, whole), *((1, part) for part in parts)]:
        if 0 in size:  # no place at all
            continue
        ends = [((low[axis], 1), (low[axis] + size[axis], -1)) for axis in split]
        for corner in itertools.product(*ends):
            corners[tuple(place for place, _ in corner)] += sign * math.prod(end for _, end in corner)
    return not any(corners.values())


def _put(path: pathlib.Path, result: dict[str, Any], place: Any, name: str, value: Any, budget: Budget) -> None:
    """Puts a value where it was in the mapping that was saved; lists are mappings from their indices."""
    known = isinstance(place, tuple) and 0 < len(place) < 64 and all(map(_is_step, place))
    steps = [str(step) for step in place] if known else [name]
    budget.spend(memory=300 * len(steps), steps=3 * len(steps))
    for step in steps[:-1]:
        result = result.setdefault(step, {})
        if not isinstance(result, dict):
            raise CheckpointError(path, f"entry {name_of(name)} lies inside another entry")
    if steps[-1] in result:
        raise CheckpointError(path, f"entry {name_of(name)} is there twice")
    result[steps[-1]] = value


def _is_step(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and 0 <= value < 2**62)


def _size(path: pathlib.Path, name: str, value: Any, field: str) -> tuple[int, ...]:
    found: tuple[int, ...] = _field(path, value, field, tuple)
    if not _sizes(found):
        raise CheckpointError(path, f"entry {name_of(name)}: its {field} are no sizes")
    return found


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _field(path: pathlib.Path, value: Any, name: str, kind: type) -> Any:
    found = value.attributes.get(name) if isinstance(value, Instance) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise CheckpointError(path, f"is no metadata of torch.distributed.checkpoint: {name!r} is not there")
    return found
