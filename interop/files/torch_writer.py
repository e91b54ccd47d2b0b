"""Files of torch.save, written without torch: `torch.load(path, weights_only=True)` gives the tensors back.

Their structure is that of torch/serialization.py, `_save`: a zip archive, uncompressed, with a pickle of protocol 2
and one member for each storage, each beginning at a multiple of 64 bytes so that it can be mapped.
"""

import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from interop import dtypes
from interop.errors import shown
from interop.files.disk import CheckpointError, progress, span
from interop.files.replacing import replacing

_ALIGNMENT = 64
_LONGEST = 255 * 8 - 1  # bits of an integer that torch/_weights_only_unpickler.py reads (LONG1)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip file: the same content gives the same file


def write(
    path: pathlib.Path, value: Any, notes: Iterable[tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]] = ()
) -> None:
    """Writes `value`, atomically: mappings, lists, tuples, strings, numbers, None and arrays, which become tensors.

    `notes` holds pairs of a mapping in `value` and what is known of the modules that it came from (`{"bn": {"version":
    2}}`), which is written as its `_metadata`, the attribute that torch.nn.Module.state_dict gives and load_state_dict
    looks for.

    Arrays that look at the same memory share a storage in the file, as torch.save does, and an array that is dense in
    another order than C (channels last, a transposed matrix) keeps its strides.

    Raises CheckpointError for values of another kind and for dtypes that torch does not have, with their place.
    """
    arrays: list[np.ndarray] = []
    _find(path, value, "", arrays, 0)
    storages, places = _storages(arrays)
    pickled = _Pickle(
        places, [storage.nbytes for storage in storages], {id(mapping): kept for mapping, kept in notes if kept}
    )
    pickled.dump(value)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {
            "data.pkl": pickled.stream.getvalue(),
            ".format_version": b"1",
            ".storage_alignment": str(_ALIGNMENT).encode(),
            "byteorder": b"little",
        }.items():
            _member(archive, f"archive/{name}", memoryview(content))
        with progress(f"Writing {path.name}", sum(storage.nbytes for storage in storages)) as advance:
            for key, storage in enumerate(storages):
                _member(archive, f"archive/data/{key}", storage.data)
                advance(storage.nbytes)
        _member(archive, "archive/version", memoryview(b"3\n"))


def _member(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """A stored member whose bytes begin at a multiple of 64, by an extra field of padding as torch writes it (FB)."""
    info = zipfile.ZipInfo(name, _EPOCH)
    info.file_size = content.nbytes
    large = content.nbytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule; its header is 20 bytes longer then
    begin = archive.fp.tell() + 30 + len(name.encode()) + (20 if large else 0) + 4  # type: ignore[union-attr]
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(content)


def _find(path: pathlib.Path, value: Any, place: str, arrays: list[np.ndarray], depth: int) -> None:
    """All arrays in `value`; CheckpointError for what cannot be written."""
    if depth > 50:
        raise CheckpointError(path, f"entry {place!r}: nested too deeply")
    if isinstance(value, np.ndarray):
        if np.ma.is_masked(value):
            raise CheckpointError(path, f"entry {place!r}: a masked array, whose mask would be lost: fill it first")
        if value.dtype.newbyteorder("=").name not in dtypes.TORCH:
            raise CheckpointError(path, f"entry {place!r}: torch has no dtype {value.dtype}")
        arrays.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise CheckpointError(path, f"entry {place!r}: key {shown(key)} is neither text nor a number")
            _find(path, key, f"{place}: a key", arrays, depth + 1)
            _find(path, item, f"{place}/{key}" if place else str(key), arrays, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _find(path, item, f"{place}/{index}", arrays, depth + 1)
    elif isinstance(value, int) and value.bit_length() > _LONGEST:
        raise CheckpointError(path, f"entry {place!r}: an integer of {value.bit_length()} bits, torch reads {_LONGEST}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise CheckpointError(
            path, f"entry {place!r}: only arrays and plain values can be written, no {type(value).__name__}"
        )


def _storages(arrays: list[np.ndarray]) -> tuple[list[np.ndarray], dict[int, tuple[int, int, np.ndarray]]]:
    """The storages (flat, uint8); by `id(array)` the storage, the offset in elements, and the array as it is there."""
    spans = sorted(
        {id(a): (_address(a), _address(a) + span(a), a) for a in arrays if a.nbytes and _as_is(a)}.values(),
        key=lambda item: item[:2],
    )
    groups: list[tuple[int, int, list[np.ndarray]]] = []
    for low, high, array in spans:
        if groups and low < groups[-1][1]:
            first, last, members = groups[-1]
            groups[-1] = (first, max(last, high), [*members, array])
        else:
            groups.append((low, high, [array]))
    shared: dict[int, tuple[int, int]] = {}
    for low, high, members in groups:
        # one storage holds one dtype, in whole elements; alone, it holds no gaps
        item = members[0].dtype.itemsize
        if all(a.dtype == members[0].dtype and (_address(a) - low) % item == 0 for a in members) and (
            len(members) > 1 or high - low == members[0].nbytes
        ):
            shared |= {id(a): (low, high) for a in members}
    storages: list[np.ndarray] = []
    numbers: dict[tuple[int, int], int] = {}
    places: dict[int, tuple[int, int, np.ndarray]] = {}
    for array in arrays:
        if id(array) in places:
            continue
        if id(array) in shared:
            low, high = shared[id(array)]
            if (low, high) not in numbers:
                numbers[low, high] = len(storages)
                storages.append(_raw(array, low, high))
            places[id(array)] = numbers[low, high], (_address(array) - low) // array.itemsize, array
        else:
            own = np.array(dtypes.native(array), order="C", copy=None)
            places[id(array)] = len(storages), 0, own
            storages.append(own.reshape(-1).view(np.uint8))
    return storages, places


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _as_is(array: np.ndarray) -> bool:
    """Whether torch can describe the array: native, strides of whole elements, forwards."""
    return array.dtype.isnative and all(s >= 0 and s % array.itemsize == 0 for s in array.strides)


def _raw(array: np.ndarray, low: int, high: int) -> np.ndarray:
    """The bytes from address `low` to `high`, which `array` and those that overlap with it look at."""
    owner = array

    class _Memory:
        __array_interface__: Final = {"data": (low, True), "shape": (high - low,), "typestr": "|u1", "version": 3}
        keep = owner  # the memory lives as long as this object

    return np.asarray(_Memory())


class _Pickle:
    """The pickle of protocol 2 that torch.save would write. Classes are names in it, so torch is not needed."""

    def __init__(
        self,
        places: Mapping[int, tuple[int, int, np.ndarray]],
        sizes: list[int],
        notes: Mapping[int, Mapping[str, Mapping[str, Any]]],
    ) -> None:
        self.places, self.sizes, self.notes = places, sizes, notes
        self.stream = io.BytesIO()

    def dump(self, value: Any) -> None:
        self.stream.write(pickle.PROTO + b"\2")
        self.save(value)
        self.stream.write(pickle.STOP)

    def save(self, value: Any) -> None:
        write = self.stream.write
        if isinstance(value, np.ndarray):
            self.tensor(*self.places[id(value)])
        elif isinstance(value, Mapping):
            self.name("collections", "OrderedDict")
            write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.MARK)
            for key, item in value.items():
                self.save(key)
                self.save(item)
            write(pickle.SETITEMS)
            if kept := self.notes.get(id(value)):
                self.save({"_metadata": kept})
                write(pickle.BUILD)
        elif isinstance(value, tuple):
            write(pickle.MARK)
            for item in value:
                self.save(item)
            write(pickle.TUPLE)
        elif isinstance(value, list):
            write(pickle.EMPTY_LIST + pickle.MARK)
            for item in value:
                self.save(item)
            write(pickle.APPENDS)
        elif value is None:
            write(pickle.NONE)
        elif isinstance(value, bool):
            write(pickle.NEWTRUE if value else pickle.NEWFALSE)
        elif isinstance(value, int):
            content = pickle.encode_long(int(value))
            small = -(2**31) <= value < 2**31
            write(pickle.BININT + struct.pack("<i", value) if small else pickle.LONG1 + bytes([len(content)]) + content)
        elif isinstance(value, float):
            write(pickle.BINFLOAT + struct.pack(">d", value))
        else:
            text = str(value).encode("utf-8", "surrogatepass")
            write(pickle.BINUNICODE + struct.pack("<I", len(text)) + text)

    def name(self, module: str, name: str) -> None:
        self.stream.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def tensor(self, key: int, offset: int, array: np.ndarray) -> None:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks), or _v3 for the newer dtypes."""
        storage = dtypes.STORAGE_OF.get(array.dtype.name)
        self.name("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
        self.stream.write(pickle.MARK + pickle.MARK)
        self.save("storage")
        self.name(*(("torch", storage) if storage else ("torch.storage", "UntypedStorage")))
        self.save(str(key))
        self.save("cpu")
        self.save(self.sizes[key] // (array.itemsize if storage else 1))
        self.stream.write(pickle.TUPLE + pickle.BINPERSID)
        self.save(offset)
        self.save(array.shape)
        self.save(tuple(stride // array.itemsize for stride in array.strides))
        self.save(False)
        self.save({})
        if not storage:
            self.name("torch", array.dtype.name)
        self.stream.write(pickle.TUPLE + pickle.REDUCE)
