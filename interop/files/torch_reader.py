"""Files of torch.save, read without torch: the zip archives of PyTorch 1.6 and later, and the pickle streams before.

Sources: torch/serialization.py, `_load` and `_legacy_load`. A zip archive holds `data.pkl` and one member for each
storage, `data/<key>`. A legacy file is five pickles (magic number, protocol version, machine, object, storage keys) and
then, for each key, eight bytes of length and the storage's bytes.
"""

import mmap
import posixpath
from collections.abc import Callable
from typing import Any

import numpy as np

from interop import dtypes
from interop.files import rebuild
from interop.files.budget import CHECKED
from interop.files.disk import CheckpointError, Data, progress
from interop.files.stand_ins import Global, UnpickleError, name_of
from interop.files.tensors import Storage
from interop.files.unpickle import unpickle
from interop.files.zip_archive import Archive

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_PROTOCOL = 1001
_LONGEST_KEY = 200  # of a storage; torch's are numbers


def read(data: Data) -> tuple[Any, str]:
    """What the file holds, with `Tensor` and `Instance` in place of tensors and objects, and the name of its format."""
    if data.read(0, 4) == b"PK\3\4":
        return read_zip(data), "torch zip"
    if data.read(257, 5) == b"ustar":
        raise CheckpointError(
            data.path, "is a tar file, as PyTorch wrote before 0.2: torch.load and torch.save renew it"
        )
    return read_pickle(data)


def read_zip(data: Data, start: int = 0, size: int | None = None) -> Any:
    """The object in a zip archive of torch.save. Every storage's checksum is compared."""
    archive = Archive(data, start, size)
    records = [name for name in archive.members if posixpath.basename(name) == "data.pkl"]
    if len(records) != 1 or records[0].count("/") > 1:
        raise CheckpointError(data.path, f"is a zip archive but not one of torch.save: {len(records)} entries data.pkl")
    folder = records[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in archive.members:
        raise CheckpointError(data.path, "is a TorchScript archive: save the state_dict() of torch.jit.load(...)")
    member = archive.members.get(f"{folder}byteorder")
    order = archive.read(member) if member else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(data.path, f"entry {folder + 'byteorder'!r} is {order[:20]!r}, neither little nor big")
    total = sum(member.size for member in archive.members.values())
    with progress(f"Checking {data.path.name}", total) as advance:
        for member in archive.members.values():
            data.budget.spend(steps=2 + member.size // CHECKED)  # once for each place of the file, if all is well
            archive.verify(member)
            advance(member.size)
    storages: dict[str, Storage] = {}

    def load(dtype: np.dtype | None, key: str, numel: int) -> Storage:
        if key not in storages:
            member = archive.members.get(f"{folder}data/{key}")
            if member is None:
                raise UnpickleError(f"refers to storage {key!r}, which is not in the archive")
            data.budget.spend(memory=150, steps=5)
            content, offset = archive.open(member)
            storages[key] = Storage(member.size, dtype, member.name, content, offset, swapped=order == b"big")
        return _typed(storages[key], dtype, numel)

    pickled, offset = archive.open(archive.members[records[0]])
    size = archive.members[records[0]].size
    data.budget.spend(memory=0 if pickled is not data else size)
    whole = pickled.buffer if pickled is not data else pickled.read(offset, size)
    value, _ = _unpickle(data, whole, 0, load, f"entry {name_of(records[0])}")
    return value


def read_pickle(data: Data) -> tuple[Any, str]:
    """The object in a file of torch.save before PyTorch 1.6 (or with _use_new_zipfile_serialization=False), or in one
    of `pickle.dump` alone, as detectron2's models are: NumPy's arrays by names."""
    magic, position = _unpickle(data, data.buffer, 0, None, "magic number")
    if magic == _MAGIC and type(magic) is int:
        return _legacy(data, position), "torch legacy"
    if position != data.size:
        raise CheckpointError(
            data.path, f"is a pickle, but not one of torch.save: it has no magic number, and is no single pickle as "
            f"{data.size - position} bytes follow its end"
        )  # fmt: skip
    return magic, "pickle"


def _legacy(data: Data, position: int) -> Any:
    """What follows the magic number at `position`."""
    storages: dict[str, Storage] = {}

    def load(dtype: np.dtype | None, key: str, numel: int) -> Storage:
        if dtype is None:  # the length of what follows in the file would not be known
            raise UnpickleError(f"has storage {key!r} of a dtype that NumPy cannot hold")
        return _typed(storages.setdefault(key, Storage(numel * dtype.itemsize, dtype, key)), dtype, numel)

    version, position = _unpickle(data, data.buffer, position, None, "protocol version")
    if version != _PROTOCOL or type(version) is not int:
        raise CheckpointError(data.path, f"is a file of torch.save with the unknown protocol {name_of(version)}")
    _, position = _unpickle(data, data.buffer, position, None, "machine")
    value, position = _unpickle(data, data.buffer, position, load, "object")
    keys, position = _unpickle(data, data.buffer, position, None, "storage keys")
    named = isinstance(keys, list) and len(keys) == len(storages) and all(isinstance(key, str) for key in keys)
    if not named or set(keys) != storages.keys():
        raise CheckpointError(data.path, "its list of storages is not the one that its tensors use")
    for key in keys:
        storage = storages[key]
        assert storage.dtype is not None, "load takes no storage without one"
        size = int.from_bytes(data.read(position, 8), "little") * storage.dtype.itemsize
        position += 8
        if position + size > data.size:
            raise CheckpointError(data.path, f"is truncated: storage {key!r} of {size} bytes ends after the file")
        if size != storage.size:
            raise CheckpointError(data.path, f"storage {key!r} has {size} bytes, its tensors expect {storage.size}")
        storage.data, storage.offset = data, position
        position += size
    if position != data.size:
        raise CheckpointError(data.path, f"is too long: {data.size - position} bytes follow the last storage")
    return value


def _typed(storage: Storage, dtype: np.dtype | None, numel: int) -> Storage:
    """The storage, if its persistent id describes it as those before did; torch.save writes each as one dtype."""
    if dtype != storage.dtype:
        raise UnpickleError(f"has storage {storage.key!r} as {storage.dtype} and as {dtype}")
    if dtype is not None and numel * dtype.itemsize > storage.size:
        raise UnpickleError(f"expects {numel} x {dtype} of storage {storage.key!r}, which has {storage.size} bytes")
    return storage


def _unpickle(
    data: Data, source: mmap.mmap | bytes, start: int, load: Callable[[Any, str, int], Storage] | None, what: str
) -> tuple[Any, int]:
    def persistent(key: Any) -> Any:
        if load is None or not isinstance(key, tuple) or not key:
            raise UnpickleError(f"refers to {name_of(key)}, which is no storage")
        kind = key[0].decode("latin-1") if isinstance(key[0], bytes) else key[0]
        if kind == "module" and len(key) > 1:  # ("module", class, file, source): a class, as old files write it
            return key[1]
        if kind != "storage" or len(key) < 5:
            raise UnpickleError(f"refers to {name_of(kind)}, which is no storage")
        cls, name, _, numel = key[1:5]
        if not isinstance(cls, Global) or not isinstance(name, str) or type(numel) is not int or not 0 <= numel < 2**62:
            raise UnpickleError("refers to a storage without class, key and size")
        if len(key) > 5 and key[5] is not None:
            raise UnpickleError("refers to a view of a storage, which PyTorch has not written since 0.4")
        if "/" in name or "\\" in name or len(name) > _LONGEST_KEY:
            raise UnpickleError(f"refers to storage {name_of(name)}, which is no key")
        return load(dtypes.STORAGES.get(cls.name), name, numel)

    try:
        value, end = unpickle(
            source, start, budget=data.budget, call=rebuild.call, build=rebuild.build, persistent=persistent
        )
    except UnpickleError as error:
        raise CheckpointError(data.path, f"{what}: {error}") from error
    return value, end
