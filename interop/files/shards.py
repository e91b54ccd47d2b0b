"""A checkpoint in several files with an index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`).

The index is `{"metadata": {...}, "weight_map": {name: file}}`, as Hugging Face's libraries write it.
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from interop.files import safetensors_file, strict_json
from interop.files.disk import CheckpointError, Data, replacing
from interop.files.stand_ins import name_of

_MAX_INDEX = 100_000_000
SUFFIX = ".index.json"


def read(path: pathlib.Path, read_file: Callable[[Data], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of all files that the index names, in the index's order, and its metadata.

    Raises CheckpointError for a file that is not beside the index (also by a link), and for names that only one of the
    two, index and files, has.
    """
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

    The index comes last and the files of an older one go after it, so that at each moment there is a whole checkpoint.
    An array above the limit has a file of its own.
    """
    groups: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if groups[-1] and size + array.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = array
        size += array.nbytes
    index_path = path.with_name(path.name + SUFFIX)
    old = _files(index_path)
    names = [f"{path.stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if any((path.parent / name).exists() for name in names):
        token = secrets.token_hex(4)
        names = [name.replace(f"{path.stem}-", f"{path.stem}-{token}-", 1) for name in names]
    done: list[pathlib.Path] = []
    try:
        for name, group in zip(names, groups, strict=True):
            safetensors_file.write(path.parent / name, group, metadata, share=False)
            done.append(path.parent / name)
        weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {
            "metadata": {"total_size": sum(a.nbytes for a in arrays.values()), **metadata},
            "weight_map": weight_map,
        }
        with replacing(index_path) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        for file in done:
            with contextlib.suppress(OSError):
                os.unlink(file)
        raise
    _remove(path.parent, path.name, *old - set(names))


def forget(path: pathlib.Path) -> None:
    """Removes an older index of `path`, which is one file now, and the files that only the index names."""
    index_path = path.with_name(path.name + SUFFIX)
    old = _files(index_path)
    _remove(path.parent, index_path.name, *old - {path.name})


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
