"""Files replaced as a whole: a reader finds the old one or the new one, however many write, and whenever one is ended.

What is written has a name of its own, `.NAME.TOKEN.tmp`, until one rename puts it in its place. A writer holds a lock
(flock) on its temporary file, which the system lets go when the process ends, however it ends: so the next writer of
the same path knows which of these files nobody will finish, and removes them.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from interop.files.disk import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is known of other writers, and nothing of theirs is removed
    fcntl = None  # type: ignore[assignment]

Value = TypeVar("Value")
_PATIENCE = 10.0  # seconds to wait for another writer's renames; one that holds a folder longer is no writer of ours
_TRIES = 100


@dataclasses.dataclass
class Temporary:
    """A file that is being written beside the one that it is to replace."""

    path: pathlib.Path
    kept: bool = False  # whether it stays when its writer is done with it

    @property
    def token(self) -> str:
        """What no other temporary file has in its name."""
        return self.path.name.split(".")[-2]


def target(path: pathlib.Path) -> pathlib.Path:
    """The file to write: where the path is a link, what it links to."""
    return pathlib.Path(os.path.realpath(path)) if os.path.islink(path) else path


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and is removed when it does not.

    The data reach the disk before the name does (fsync, rename, fsync of the folder), so that after a crash there is
    either the old file or the new one. Raises CheckpointError where the folder or the disk refuses.
    """
    path = target(path)
    with temporary(path) as file:
        yield file.path
        put(file, path)
    clear(path)


@contextlib.contextmanager
def temporary(path: pathlib.Path) -> Iterator[Temporary]:
    """A new file beside `path`, removed at the end unless it was renamed or is `kept`.

    Raises CheckpointError for every OSError of the block.
    """
    file = None
    try:
        file, handle = _made(path)
        try:
            yield file
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(path, f"cannot be written: {error}") from error
    finally:
        if file is not None and not file.kept:
            with contextlib.suppress(OSError):
                file.path.unlink()


def put(file: Temporary, path: pathlib.Path) -> None:
    """Gives a temporary file the name `path`, once its data are on the disk."""
    settle(file.path)
    with contextlib.suppress(FileNotFoundError):  # a new file has the permissions that the system gives
        os.chmod(file.path, stat.S_IMODE(path.stat().st_mode))
    os.replace(file.path, path)
    sync_folder(path.parent)


def settle(path: pathlib.Path) -> None:
    """Brings a file's data to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """Brings the folder's names to the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(folder: pathlib.Path) -> Iterator[bool]:
    """Keeps other writers from renaming files in the folder; whether that could be had.

    For renames only, which take no time: one who writes large files waits for nobody. No lock is to be had on some
    network file systems, nor where someone else holds it for long; what a reader finds is whole even so.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + _PATIENCE
        while (held := _lock(handle)) is False and time.monotonic() < end:
            time.sleep(0.005)
        yield bool(held)
    finally:
        os.close(handle)


def others(path: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The temporary files for `path`: those whose writers have ended, and those whose writers are at work."""
    pattern = re.compile(rf"\.{re.escape(_short(path.name))}\.[0-9a-f]{{16}}\.tmp")
    ended: list[pathlib.Path] = []
    alive: list[pathlib.Path] = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                (ended if _is_free(entry.path) else alive).append(pathlib.Path(entry.path))
    return ended, alive


def clear(path: pathlib.Path) -> None:
    """Removes what writers of `path` have left that were ended before they could."""
    for file in others(path)[0]:
        with contextlib.suppress(OSError):
            file.unlink()


def steady(path: pathlib.Path, read: Callable[[], Value]) -> Value:
    """What `read` gives, again where `path`, which names other files, was replaced in the meantime."""
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            value = read()
        except CheckpointError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return value
    raise CheckpointError(path, "is replaced again and again while it is read")


def _made(path: pathlib.Path) -> tuple[Temporary, int]:
    """A new temporary file, and the open handle that holds its lock."""
    for _ in range(_TRIES):
        file = path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.tmp")
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Another writer may have looked at it before it was locked, and have taken it for one that was left behind.
        if _lock(handle) is not False and os.fstat(handle).st_nlink:
            return Temporary(file), handle
        os.close(handle)
    raise CheckpointError(path, "cannot be written: others remove what is written")


def _short(name: str) -> str:
    """A name that leaves room for more: file systems take 255 bytes."""
    return name.encode("utf-8", "surrogateescape")[:100].decode("utf-8", "ignore")


def _lock(handle: int) -> bool | None:
    """Takes the lock of an open file: whether it is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_free(path: str) -> bool:
    """Whether nobody holds the lock of a file."""
    try:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        return _lock(handle) is True
    finally:
        os.close(handle)


def _identity(path: pathlib.Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
