"""A checkpoint in several files with an index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`).

The index is `{"metadata": {...}, "weight_map": {name: file}}`, as Hugging Face's libraries write it.
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from interop.files import safetensors_file, strict_json
from interop.files.disk import CheckpointError, Data
from interop.files.replacing import (
    Temporary,
    clear,
    exclusive,
    others,
    put,
    settle,
    steady,
    sync_folder,
    target,
    temporary,
)
from interop.files.stand_ins import name_of

_MAX_INDEX = 100_000_000
SUFFIX = ".index.json"


def read(path: pathlib.Path, read_file: Callable[[Data], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of all files that the index names, in the index's order, and its metadata.

    Raises CheckpointError for a file that is not beside the index (also by a link), and for names that only one of the
    two, index and files, has. Where another process replaces the checkpoint meanwhile, it is read again.
    """
    return steady(path, lambda: _read(path, read_file))


def _read(path: pathlib.Path, read_file: Callable[[Data], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    index = read_index(path)
    weight_map = index["weight_map"]
    shards: dict[str, Any] = {}
    for file in dict.fromkeys(weight_map.values()):
        shards[file] = read_file(Data.map(beside(path, file)))
        if not isinstance(shards[file], dict):
            raise CheckpointError(path.parent / file, "holds no state dict")
    missing = [f"{name_of(name)} ({file})" for name, file in weight_map.items() if name not in shards[file]]
    extra = [f"{name_of(name)} ({f})" for f, shard in shards.items() for name in shard if weight_map.get(name) != f]
    for problem, names in (("named but not in their files", missing), ("in files but not named", extra)):
        if names:
            raise CheckpointError(path, f"entries {problem}: {', '.join(names[:8])}" + " ..." * (len(names) > 8))
    return {name: shards[file][name] for name, file in weight_map.items()}, index.get("metadata") or {}


def read_index(path: pathlib.Path) -> dict[str, Any]:
    """The index, checked: `weight_map` is a mapping from names to file names, `metadata` one or none."""
    data = Data.map(path)
    if data.size > _MAX_INDEX:
        raise CheckpointError(path, f"is too large for an index: {data.size} bytes")
    try:
        index = strict_json.loads(data.read(0, data.size), "the index", data.budget)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(path, str(error)) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(path, "has no 'weight_map' from names to files")
    if not isinstance(index.get("metadata"), dict | None):
        raise CheckpointError(path, "'metadata' is not a mapping")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file in (".", "..") or set(file) & {"/", "\\", "\0", ":"}:
            problem = f"{name_of(file)} is not the name of a file beside the index"
            raise CheckpointError(path, f"entry {name_of(name)}: {problem}")
    return index


def beside(path: pathlib.Path, file: str) -> pathlib.Path:
    """The file of that name in the folder of `path`, which links must not leave.

    A snapshot in Hugging Face's cache is a folder of links into `blobs` of the same repository; those are followed.
    """
    folder = path.parent
    try:
        real = (folder / file).resolve(strict=True)
        allowed = {folder.resolve()}
        if folder.absolute().parent.name == "snapshots":
            allowed.add((folder.absolute().parent.parent / "blobs").resolve())
    except FileNotFoundError:
        raise CheckpointError(path, f"names {name_of(file)}, which is not there") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(path, f"names {name_of(file)}, which cannot be read: {error}") from None
    if real.parent not in allowed:
        raise CheckpointError(path, f"names {name_of(file)}, which is a link out of the folder")
    return folder / file


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], limit: int) -> None:
    """Writes `arrays` as safetensors files of at most `limit` bytes of data each, and their index.

    An array above the limit has a file of its own. No file is ever overwritten: the rename of the index exchanges the
    whole checkpoint, and the files of the older one go after it. The files have the names that PyTorch's and Hugging
    Face's tools give (`model-00001-of-00003.safetensors`) where these are free, and a token in them where not; every
    reader takes the names from the index. While they are written the temporary index names them, so that the next
    writer knows what belongs to one that was ended.
    """
    path = target(path)
    index_path = path.with_name(path.name + SUFFIX)
    groups = _groups(arrays, limit)
    with temporary(index_path) as index:
        names: list[str] = []
        try:
            names = _reserve(index, path, groups, metadata)
            for name, group in zip(names, groups, strict=True):
                safetensors_file.write(path.parent / name, group, metadata, path.parent / name, share=False)
                settle(path.parent / name)
            sync_folder(path.parent)
            with exclusive(path.parent) as held:
                old = _files(index_path)
                put(index, index_path)
                _sweep(path, set(names), old | {path.name}, held)
        except BaseException:
            if index.path.exists():  # and so is not in its place
                _remove(path.parent, *names)
            raise


def write_one(path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes `arrays` as one safetensors file. An older index of `path` goes after it, with the files that it names."""
    path = target(path)
    index_path = path.with_name(path.name + SUFFIX)
    with temporary(path) as file:
        safetensors_file.write(file.path, arrays, metadata, path)
        settle(file.path)
        with exclusive(path.parent) as held:
            old = _files(index_path)
            put(file, path)
            _sweep(path, {path.name}, old | {index_path.name}, held)


def _groups(arrays: Mapping[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    groups: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if groups[-1] and size + array.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = array
        size += array.nbytes
    return groups


def _reserve(
    index: Temporary, path: pathlib.Path, groups: list[dict[str, np.ndarray]], metadata: Mapping[str, str]
) -> list[str]:
    """The names of the files, which are there now and empty; the index says so."""
    size = sum(array.nbytes for group in groups for array in group.values())
    with exclusive(path.parent) as held:
        for stem in (path.stem, f"{path.stem}-{index.token}")[0 if held else 1 :]:
            names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
            if any(os.path.lexists(path.parent / name) for name in names):
                continue
            weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
            content = {"metadata": {"total_size": size, **metadata}, "weight_map": weight_map}
            index.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            settle(index.path)
            for name in names:
                (path.parent / name).touch(exist_ok=False)
            return names
    raise CheckpointError(path, "cannot be written: its files are there already")


def _sweep(path: pathlib.Path, new: set[str], old: set[str], held: bool) -> None:
    """Removes the files of the checkpoint that was replaced, and what writers have left that were ended.

    An index may name anything: what is removed for its sake is called as such files are.
    """
    ours = re.compile(rf"{re.escape(path.stem)}(-[0-9a-f]{{16}})?-\d{{5}}-of-\d{{5}}\.safetensors")
    kept = {name for name in old if not name.endswith((".safetensors", SUFFIX))}
    index_path = path.with_name(path.name + SUFFIX)
    ended, alive = others(index_path) if held else ([], [])
    claimed = new.union(*map(_files, alive))
    for journal in ended:
        old |= set(filter(ours.fullmatch, _files(journal)))
    _remove(path.parent, *old - claimed - kept)
    for file in (index_path, path):
        clear(file)


def _files(index_path: pathlib.Path) -> set[str]:
    """The files that an index names; none where there is no index, or a broken one."""
    try:
        return set(read_index(index_path)["weight_map"].values())
    except CheckpointError:
        return set()


def _remove(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # also where the name with its ending is too long for a file
            (folder / name).unlink()
