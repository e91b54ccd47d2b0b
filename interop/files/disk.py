"""Files on disk, mapped for reading."""

import contextlib
import logging
import mmap
import os
import pathlib
import stat
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from interop.errors import CheckpointError as CheckpointError
from interop.files.budget import Budget

logger = logging.getLogger("interop")

_PAGE = mmap.PAGESIZE
_CHUNK = 1 << 24  # bytes between two looks at a large file
_LARGE = 1 << 30  # bytes from which on a progress bar is shown


class Data:
    """Bytes that arrays are views of: a mapped file, or a member of an archive unpacked into memory.

    A mapped file is read only, so its arrays are too, and no byte is copied. When an array dies its pages leave memory,
    which is what makes `for name, array in checkpoint.items()` a stream: one array at a time, however large the file.
    """

    def __init__(self, buffer: "mmap.mmap | bytes", path: pathlib.Path, budget: Budget | None = None) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.budget = budget or Budget(path, self.size)  # what reading them may cost
        self._copies: weakref.WeakValueDictionary[tuple[int, int], np.ndarray] = weakref.WeakValueDictionary()

    @classmethod
    def map(cls, path: pathlib.Path, budget: Budget | None = None) -> "Data":
        """The file at `path`, mapped: the one door to the bytes of any file.

        Raises CheckpointError if there is none, if it cannot be opened, or if it is empty or no regular file.
        """
        if (found := kind(path)) == "nothing":
            raise CheckpointError(path, "no such file")
        if found != "file":  # a pipe would wait for ever, a device would never end
            raise CheckpointError(path, f"is {found}: is not a regular file")
        try:
            # not blocking, in case that a pipe has taken the file's place by now
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            try:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise CheckpointError(path, "is not a regular file")
                if status.st_size == 0:
                    raise CheckpointError(path, "is empty")
                return cls(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), path, budget)
            finally:
                os.close(handle)
        except FileNotFoundError:
            raise CheckpointError(path, "no such file") from None
        except (OSError, OverflowError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(path, f"cannot be read: {error}") from error

    def read(self, offset: int, size: int) -> bytes:
        """A copy of `size` bytes; fewer where the file ends sooner."""
        return bytes(self.buffer[offset : offset + size])

    def array(
        self, dtype: np.dtype, shape: Sequence[int], offset: int, strides: Sequence[int] | None = None
    ) -> np.ndarray:
        """A read-only view of the bytes from `offset` on. The caller has checked that they exist."""
        steps = None if strides is None else tuple(strides)
        view: np.ndarray = np.ndarray(tuple(shape), dtype, self.buffer, offset, steps)
        if not view.flags.aligned:  # old writers did not align, and not every reader of arrays copes
            view = np.ndarray(tuple(shape), dtype, self._aligned(offset, span(view)), 0, steps)
            view.flags.writeable = False
        elif view.nbytes >= _PAGE and isinstance(self.buffer, mmap.mmap):
            weakref.finalize(view, _release, self.buffer, offset, span(view)).atexit = False
        return view

    def _aligned(self, offset: int, size: int) -> np.ndarray:
        """A copy of `size` bytes, the same one for as long as an array looks at it: tied arrays stay tied."""
        copy = self._copies.get((offset, size))
        if copy is None:
            copy = self._copies[offset, size] = np.frombuffer(self.buffer, np.uint8, size, offset).copy()
        return copy

    def crc32(self, offset: int, size: int) -> int:
        """The CRC-32 of a part of the data, whose pages are let go again on the way."""
        crc = 0
        for low in range(offset, offset + size, _CHUNK):
            length = min(_CHUNK, offset + size - low)
            with memoryview(self.buffer) as view:
                crc = zlib.crc32(view[low : low + length], crc)
            if isinstance(self.buffer, mmap.mmap):
                _release(self.buffer, low, length)
        return crc


def path_of(path: "str | os.PathLike[str]") -> pathlib.Path:
    """What the caller named, as a path.

    Raises TypeError for what is no path, and CheckpointError for the empty one, which would be the current folder.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(name := os.fspath(path), bytes):
        raise TypeError(f"expected a path (a string or os.PathLike), found {type(path).__name__}")
    if not name:
        raise CheckpointError("''", "the path is empty; '.' is the current folder")
    try:
        if b"\0" in os.fsencode(name):
            raise CheckpointError(repr(name), "a path cannot hold the character 0")
    except UnicodeEncodeError:
        raise CheckpointError(repr(name), "a path cannot hold half a character") from None
    return pathlib.Path(name)


def kind(path: pathlib.Path) -> str:
    """What is at a path: "file", "a folder", "nothing", or what else ("a pipe").

    Raises CheckpointError where the system does not say (a name that is too long, a folder that may not be searched).
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    if stat.S_ISREG(mode):
        return "file"
    for test, name in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")):
        if test(mode):
            return name
    return "a device"


def files_in(folder: pathlib.Path) -> dict[str, int]:
    """The regular files in a folder, in order, with their sizes. Raises CheckpointError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=_name)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be listed: {error}") from error
    sizes = {}
    for entry in found:
        with contextlib.suppress(OSError):  # a writer beside this reader has taken it away
            if entry.is_file():
                sizes[entry.name] = entry.stat().st_size
    return sizes


def _name(entry: "os.DirEntry[str]") -> str:
    return entry.name


def _release(buffer: mmap.mmap, offset: int, size: int) -> None:
    """Lets go of the pages of a part of a mapped file, which come back from the file if someone still looks at them."""
    if size and hasattr(mmap, "MADV_DONTNEED"):
        low = offset // _PAGE * _PAGE
        buffer.madvise(mmap.MADV_DONTNEED, low, offset + size - low)


def span(array: np.ndarray) -> int:
    """The number of bytes from an array's first element to the end of its last (strides are not negative)."""
    if array.size == 0:
        return 0
    return sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) + array.itemsize


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """A function to call with each number of bytes done; above 1 GB it moves a bar on a terminal (tqdm's)."""
    if total >= _LARGE:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

            with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
                yield bar.update
                return
    yield lambda done: None
