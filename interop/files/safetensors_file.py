"""safetensors files: the header is read and checked as a whole, the arrays are views of the mapped file.

The format: eight bytes of header length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}` with an optional
`__metadata__` of strings, then the data, without holes (https://huggingface.co/docs/safetensors).
"""

import json
import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from interop import dtypes
from interop.files import strict_json
from interop.files.disk import CheckpointError, Data, progress
from interop.files.stand_ins import name_of
from interop.files.tensors import MAX_DIMENSIONS, Storage, Tensor

_MAX_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 24  # bytes between two moves of the progress bar
_FIELDS = ("dtype", "shape", "data_offsets")
_TIED = "jaxnorm.tied"  # the metadata that hold the names left out where the usual notes could be a user's metadata


def read(data: Data) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file in the order of their data, and its metadata.

    Names that safetensors.torch.save_model left out because they share memory with another (it notes `{left out: kept}`
    in the metadata) are there again, as the same tensor, and not in the metadata.

    Raises CheckpointError for a header that is longer than the file or no JSON, for duplicate names, unknown dtypes,
    shapes that do not match the offsets, and offsets that overlap, leave holes or do not end with the file.
    """
    start, header = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(data.path, "entry '__metadata__' of the header is not a mapping from strings to strings")
    data.budget.spend(memory=400 * len(header), steps=40 * len(header))
    found = sorted((_entry(data, start, name, entry) for name, entry in header.items()), key=lambda t: t[1:3])
    end = start
    for name, low, high, _ in found:
        if low != end:
            kind = "overlap those of the entry before" if low < end else "leave a hole after the entry before"
            raise CheckpointError(data.path, f"entry {name_of(name)}: its offsets {[low - start, high - start]} {kind}")
        end = high
    if end != data.size:
        raise CheckpointError(
            data.path, f"is {'truncated' if end > data.size else 'too long'}: the header describes {end} bytes, "
            f"the file has {data.size}" + (f" (entry {name_of(found[-1][0])} is cut)" if end > data.size else "")
        )  # fmt: skip
    tensors = {name: tensor for name, _, _, tensor in found}
    if _TIED in metadata:
        left_out = _noted(data, metadata.pop(_TIED), tensors)
    else:
        left_out = _left_out(metadata, tensors)
        metadata = {key: text for key, text in metadata.items() if key not in left_out}
    return tensors | {name: tensors[kept] for name, kept in left_out.items()}, metadata


def write(
    file_path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    path: pathlib.Path,
    share: bool = True,
) -> None:
    """Writes a safetensors file, array by array, to `file_path`, which becomes `path` when it is whole.

    Names of the very same memory are stored once, the others noted in the metadata as `{left out: kept}`, which is what
    safetensors.torch.save_model does and `read` understands; with share=False each has its own copy. Where the metadata
    could be taken for such notes, or name what is left out, the notes are one entry of their own.
    """
    kept: dict[tuple[int, tuple[int, ...], tuple[int, ...], str], str] = {}
    whole: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for name, array in arrays.items():
        key = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.name)
        if share and array.nbytes and (first := kept.setdefault(key, name)) != name:
            left_out[name] = first
        else:
            whole[name] = array
    tags = dtypes.SAFETENSORS_TAGS
    bad = [f"{name!r} ({array.dtype})" for name, array in whole.items() if array.dtype.name not in tags]
    if bad:
        raise CheckpointError(path, f"safetensors has no such dtype: {', '.join(bad)}; a .pth file may hold it")
    if "__metadata__" in whole:
        raise CheckpointError(path, "entry '__metadata__': safetensors keeps this name for itself")
    # The largest items first, as the safetensors library does: every array begins at a multiple of its item's size.
    order = sorted(whole, key=lambda name: (-whole[name].dtype.itemsize, name))
    notes = {**metadata, **left_out}
    if metadata.keys() & left_out.keys() or _left_out(notes, whole) != left_out:  # another would not understand it so
        notes = {**metadata, _TIED: json.dumps(left_out)}
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    end = 0
    for name in order:
        array = whole[name]
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": tags[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(path, f"{error.object!r:.200} is no UTF-8") from None
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(path, f"its header would have {len(text)} bytes, safetensors allows {_MAX_HEADER}")
    with progress(f"Writing {path.name}", end) as advance, file_path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = np.ascontiguousarray(whole[name]).reshape(-1).view(np.uint8)
            for low in range(0, content.size, _CHUNK):
                file.write(content[low : low + _CHUNK].data)
                advance(min(_CHUNK, content.size - low))


def _left_out(metadata: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """The metadata that are `{left out: kept}`.

    Nothing marks them, and a file may well say `{"best": "fc.weight"}`. So the left out must be called as tensors are:
    its last part (`weight`) is the last part of some tensor's name, and it has a dot if the kept one does.
    """
    if all(kept not in names for kept in metadata.values()):
        return {}
    parts = {name.rpartition(".")[2] for name in names}
    return {
        name: kept
        for name, kept in metadata.items()
        if name not in names and kept in names and name.rpartition(".")[2] in parts and ("." in name or "." not in kept)
    }


def _short(value: object) -> str:
    """A value of JSON in a message: its beginning, also of a number that has no end."""
    return name_of(value) if not isinstance(value, list) else f"[{', '.join(map(name_of, value[:8]))}, ...]"


def _noted(data: Data, text: str, names: Collection[str]) -> dict[str, str]:
    try:
        notes = strict_json.loads(text.encode("utf-8", "surrogatepass"), f"the metadata {_TIED!r}", data.budget)
    except ValueError as error:
        raise CheckpointError(data.path, str(error)) from None
    for name, kept in notes.items():
        if name in names or not isinstance(kept, str) or kept not in names:
            raise CheckpointError(
                data.path, f"the metadata {_TIED!r}: {name_of(name)} cannot be the same as {name_of(kept)}"
            )
    return notes


def _header(data: Data) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header."""
    if data.size < 8:
        raise CheckpointError(data.path, f"is truncated: {data.size} bytes are no safetensors file")
    length = int.from_bytes(data.read(0, 8), "little")
    if length > min(data.size - 8, _MAX_HEADER):
        raise CheckpointError(
            data.path, f"is truncated or no safetensors file: its header would have {length} bytes, "
            f"the file has {data.size} and safetensors allows {_MAX_HEADER}"
        )  # fmt: skip
    try:
        return 8 + length, strict_json.loads(data.read(8, length), "the header", data.budget)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(data.path, str(error)) from None


def _entry(data: Data, start: int, name: str, entry: Any) -> tuple[str, int, int, Tensor]:
    def fail(problem: str) -> NoReturn:
        raise CheckpointError(data.path, f"entry {name_of(name)}: {problem}")

    if not isinstance(entry, dict) or sorted(entry) != sorted(_FIELDS):
        fail(f"is not an object of {', '.join(_FIELDS)}")
    tag, shape, offsets = (entry[field] for field in _FIELDS)
    dtype = dtypes.SAFETENSORS.get(tag) if isinstance(tag, str) else None
    if dtype is None:
        fail(f"dtype {_short(tag)} is not one that NumPy can hold ({', '.join(dtypes.SAFETENSORS)})")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
            fail(f"{field} {_short(value)} is not a list of sizes")
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        fail(f"has {len(offsets)} offsets and {len(shape)} dimensions")
    low, high = offsets
    needed = math.prod(shape) * dtype.itemsize
    if high - low != needed:
        fail(f"shape {shape} of {tag} needs {needed} bytes, its offsets {offsets} give {high - low}")
    storage = Storage(needed, dtype, name, data, start + low)
    return name, start + low, start + high, Tensor(storage, dtype, tuple(shape))
