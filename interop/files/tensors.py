"""Tensors of a checkpoint before they are arrays: where the bytes are and how they are to be read."""

import dataclasses
import math
from typing import Any

import numpy as np

from interop.files.disk import Data

MAX_DIMENSIONS = 64  # NumPy's
SLACK = 1 << 26  # an expanded tensor may be larger than its storage, by this and four times the file


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
    """A run of bytes that tensors look at, PyTorch's notion. `data` arrives later than the tensors in old files."""

    size: int  # bytes
    dtype: np.dtype | None = None
    key: str = ""
    data: Data | None = None
    offset: int = 0  # of its first byte in data
    swapped: bool = False  # written on a machine of the other byte order


@dataclasses.dataclass(eq=False, frozen=True, slots=True)
class Tensor:
    """A view of a storage: PyTorch's size, stride and storage offset, counted in elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    shape: tuple[Any, ...]  # as the file says: sizes only once `problem` says so
    offset: Any = 0
    strides: tuple[Any, ...] | None = None  # None: contiguous
    conjugate: bool = False
    negative: bool = False
    cast: np.dtype | None = None  # the dtype that it had before it was stored as another

    def problem(self) -> str | None:
        """What is wrong with the description, or None. To be asked before `array`."""
        numbers = (self.offset, *self.shape, *(self.strides or ()))
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            return "its shape, strides or offset are no sizes"  # and may be anything, so they are not printed
        if len(self.shape) > MAX_DIMENSIONS or (self.strides is not None and len(self.strides) != len(self.shape)):
            return f"{len(self.shape)} sizes with {len(self.strides or ())} strides"
        if (self.conjugate and self.dtype.kind != "c") or (self.negative and self.dtype.kind not in "fc"):
            return f"it is marked as {'conjugated' if self.conjugate else 'negated'}, which {self.dtype} cannot be"
        count, item = math.prod(self.shape), self.dtype.itemsize
        if math.prod(n or 1 for n in self.shape) * item >= 2**63:  # also of empty ones, for NumPy
            return f"shape {self.shape} is larger than an array can be"
        strides = self.strides or (0,) * len(self.shape)
        last = sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True)) + 1 if self.strides else count
        if (self.offset + (last if count else 0)) * item > self.storage.size:
            needed = (self.offset + last) * item
            return (
                f"shape {self.shape} with strides {self.strides} at {self.offset} needs {needed} bytes, "
                f"its storage {self.storage.key!r} has {self.storage.size}"
            )
        if self.strides is not None and any(s * item >= 2**62 for s in self.strides):
            return f"strides {self.strides} are too large"
        if self.storage.data is not None and count * item > max(
            self.storage.size, 4 * self.storage.data.budget.size + SLACK
        ):
            return f"shape {self.shape} repeats {self.storage.size} bytes to {count * item}"
        return None

    def extent(self) -> tuple[int, int]:
        """The bytes of its storage, from where to where, that it looks at."""
        low = self.storage.offset + self.offset * self.dtype.itemsize
        count = math.prod(self.shape)
        if count and self.strides is not None:
            count = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        return low, low + count * self.dtype.itemsize

    def copied(self) -> int:
        """The bytes that `array` copies: none where it is a view."""
        low, high = self.extent()
        changed = self.storage.swapped or self.conjugate or self.negative or self.cast
        return 3 * math.prod(self.shape) * self.dtype.itemsize if changed else high - low if low % 16 else 0

    def array(self) -> np.ndarray:
        """A read-only view of the file; a copy only where the bytes cannot be taken as they are."""
        data = self.storage.data
        assert data is not None, "a tensor is an array only when its storage was read"
        item = self.dtype.itemsize
        start = self.storage.offset + self.offset * item
        if 0 in self.shape:  # PyTorch lets an empty tensor look beyond its storage
            view: np.ndarray = np.empty(self.shape, self.dtype)
        else:
            view = data.array(self.dtype, self.shape, start, self.strides and tuple(s * item for s in self.strides))
        if not (self.storage.swapped or self.conjugate or self.negative or self.cast):
            view.flags.writeable = False
            return view
        if self.storage.swapped and item > 1:
            unit = item // 2 if self.dtype.kind == "c" else item  # bfloat16 knows no byte order, its bits do
            bits = np.ascontiguousarray(view).reshape(-1).view(f"u{unit}")
            view = bits.byteswap().view(self.dtype).reshape(self.shape)
        if self.conjugate:
            view = np.asarray(np.conjugate(view))
        if self.negative:
            view = np.asarray(np.negative(view))
        if self.cast is not None:
            view = view.astype(self.cast)
        view.flags.writeable = False
        return view
