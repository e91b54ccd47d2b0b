"""The user's objects, left as they were: one snapshot of all that a module reaches, put back in one place.

Recording runs the user's code, on stand-ins for tensors and here and there for real (`train()`, `eval()`, a call that
shows what hooks do). Whatever that changes, the snapshot puts back: contents, storages and versions of tensors, what
containers and attributes hold, class attributes, globals, caches of functions, random states, switches of PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from interop.tracing import private
from interop.tracing.reachable import LRU_CACHE, Generator, Holder, reachable
from interop.tracing.settings import settings


class Change(NamedTuple):
    """What a holder has under a key, before and after; None where it has nothing there."""

    name: str
    table: str
    old: Any
    new: Any


@contextlib.contextmanager
def left_as_found(module: torch.nn.Module, inputs: object) -> Iterator[Snapshot]:
    """Puts everything back in the end, also after an exception. What is done in between finds caches of functions
    (`functools.lru_cache`) empty, and leaves them as they were."""
    snapshot = Snapshot(module, inputs)
    try:
        yield snapshot
    finally:
        snapshot.restore(caches=True)


class Snapshot:
    """All that a module and its inputs reach, as it is now. Costs a copy of every tensor and array."""

    def __init__(self, module: torch.nn.Module, inputs: object = ()):
        self._settings = settings()
        found = reachable(module, inputs)
        self._caches: dict[int, Any] = {}
        self._held = [_Held(holder, holder.read()) for holder in found.holders]
        for held in self._held:
            held.isolated = {key: _with_fresh_cache(value, self._caches) for key, value in held.content.items()}
        self._tensors = [_Tensor(name, tensor) for name, tensor in found.tensors]
        self._memory = {memory.key: memory for tensor in self._tensors for memory in tensor.memory}
        self._arrays = [
            (name, item, item.copy() if isinstance(item, np.ndarray) else item[:]) for name, item in found.arrays
        ]
        self._generators = [(item, _state(item)) for _, item in found.generators]

    def restore(self, caches: bool = False) -> None:
        """Everything as it was; the caches of functions only if asked: until then empty ones stand in their places."""
        for fresh in self._caches.values():
            fresh.cache_clear()
        for held in self._held:
            content = held.content if caches else held.isolated
            if not _identical(held.holder.read(), content):
                held.holder.write(content)
        for tensor in self._tensors:
            tensor.restore()
        for memory in self._memory.values():
            memory.restore()
        for tensor in self._tensors:
            tensor.restore_version()
        for _, item, kept in self._arrays:
            if not _equal(item, kept):
                _fill(item, kept)
        for generator, state in self._generators:
            _set_state(generator, state)
        for setting in self._settings:
            setting.restore()

    def contents(self) -> list[Mapping[Any, Any]]:
        """What each holder has now."""
        return [held.holder.read() for held in self._held]

    def changes(self, before: Sequence[Mapping[Any, Any]] | None = None) -> Iterator[Change]:
        """What holders have now and had not `before` (when the snapshot was taken if not given); and all tensors and
        arrays with other contents than the snapshot has."""
        for index, held in enumerate(self._held):
            old, new = held.content if before is None else before[index], held.holder.read()
            for key in () if _identical(new, old) else {**old, **new}:
                if old.get(key) is not new.get(key):
                    yield Change(held.holder.name(key), held.holder.table, old.get(key), new.get(key))
        for name, item, kept in self._arrays:
            if not _equal(item, kept):
                yield Change(name, "array", kept, item)

    def rebind(self, names: Collection[str], before: Sequence[Mapping[Any, Any]]) -> None:
        """Puts what holders had before under these names, and leaves all else as it is."""
        for held, old in zip(self._held, before, strict=True):
            new = held.holder.read()
            content = {key: old[key] if held.holder.name(key) in names else item for key, item in new.items()}
            if not _identical(new, content):
                held.holder.write(content)

    def written(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors that hold something else than when the snapshot was taken, by name."""
        moved = {key for key, memory in self._memory.items() if memory.moved()}
        return [
            (item.name, item.tensor)
            for item in self._tensors
            if item.rebound() or any(memory.key in moved for memory in item.memory)
        ]


@dataclasses.dataclass
class _Held:
    holder: Holder
    content: dict[Any, Any]
    isolated: dict[Any, Any] = dataclasses.field(default_factory=dict)  # with empty caches in the place of others


class _Memory:
    """The bytes of a storage."""

    def __init__(self, storage: torch.UntypedStorage):
        self.key = private.storage_key(storage)
        self._storage, self._size = storage, storage.nbytes()
        self._now = self._bytes()
        self._kept = self._now.numpy(force=True).copy()

    def _bytes(self) -> torch.Tensor:
        """All of it, in words of 8 bytes where it has an even number of these: such are quicker to compare."""
        dtype = torch.uint8 if self._storage.nbytes() % 8 else torch.int64
        return torch.empty(0, dtype=dtype, device=self._storage.device).set_(self._storage)

    def moved(self) -> bool:
        """Whether it holds something else now."""
        # NumPy's comparison: torch.equal waits for its threads, hundreds of times where others use the processor.
        return self._storage.nbytes() != self._size or not np.array_equal(self._now.numpy(force=True), self._kept)

    def restore(self) -> None:
        """Writes the bytes where they differ."""
        if self.moved():
            if self._storage.nbytes() != self._size:
                self._storage.resize_(self._size)
            self._now.copy_(torch.from_numpy(self._kept))


class _Tensor:
    """One tensor: its storage and view of it, its version, its gradient and whether it asks for one."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.tensor = name, tensor
        self.memory = [_Memory(tensor.untyped_storage())] if private.has_memory(tensor) else []
        self._alias = tensor.detach() if self.memory else None
        known = not private.is_uninitialised(tensor) and not tensor.is_inference()
        self._version = private.version(tensor) if known else None
        self._leaf = tensor.is_leaf
        self._requires_grad, self._grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    def rebound(self) -> bool:
        """Whether it is another view now, or one of another storage."""
        return self._alias is not None and _view(self.tensor) != _view(self._alias)

    def restore(self) -> None:
        """All but contents and version."""
        if self._alias is not None and self.rebound():
            self.tensor.data = self._alias
        if self._leaf and self.tensor.requires_grad != self._requires_grad:
            self.tensor.requires_grad_(self._requires_grad)
        if self._leaf and self.tensor.grad is not self._grad:
            self.tensor.grad = self._grad

    def restore_version(self) -> None:
        """The count of writes, by which autograd refuses the backward pass of a graph whose tensors were written to."""
        if self._version is not None and private.version(self.tensor) != self._version:
            private.set_version(self.tensor, self._version)


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    return (
        private.storage(tensor),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.storage_offset(),
    )


def _identical(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    """The same keys in the same order with the same objects, and none is asked whether it is equal to another."""
    return len(a) == len(b) and all(
        (k is l or (type(k) is type(l) and type(k) in (int, str) and k == l)) and v is w
        for (k, v), (l, w) in zip(a.items(), b.items(), strict=True)
    )


def _equal(item: Any, content: Any) -> bool:
    if not isinstance(item, np.ndarray):
        return bool(item == content)
    if item.dtype.hasobject:
        return item.shape == content.shape and all(a is b for a, b in zip(item.flat, content.flat, strict=True))
    same = (item.shape, item.dtype) == (content.shape, content.dtype)
    return same and item.tobytes() == content.tobytes()


def _fill(item: Any, kept: Any) -> None:
    item[... if isinstance(item, np.ndarray) else slice(None)] = kept


def _with_fresh_cache(value: Any, made: dict[int, Any]) -> Any:
    """A function with a cache as one with a cache of its own, also inside what decorates a method; others as they
    are."""
    if isinstance(value, LRU_CACHE):
        if id(value) not in made:
            fresh = functools.lru_cache(**value.cache_parameters())(value.__wrapped__)
            made[id(value)] = functools.update_wrapper(fresh, value)
        return made[id(value)]
    if isinstance(value, (staticmethod, classmethod)):
        inner = _with_fresh_cache(value.__func__, made)
        return value if inner is value.__func__ else type(value)(inner)
    if isinstance(value, property):
        inner = _with_fresh_cache(value.fget, made)
        return value if inner is value.fget else property(inner, value.fset, value.fdel, value.__doc__)
    return value


def _state(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
