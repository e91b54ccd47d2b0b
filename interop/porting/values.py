"""Values of a program while its source is written: terms that know shapes, and in which order their axes are.

As in `interop.ops.layout`, axis `i` of the array holds PyTorch's dimension `order[i]`: images are channels last in the
source, whatever PyTorch's code says, and a `permute` that only makes up for the difference leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from interop.ops.layout import inverse
from interop.porting.looking import Dim, Seen, Size
from interop.porting.terms import Term, at, index, local, method
from interop.program.nodes import Entry, Model, Node, Program


class Unprintable(Exception):
    """An operation has no plain expression; the text says which and why."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the program.

    Attributes:
        term: what computes its array.
        seen: shape and element type, PyTorch's.
        order: axis i of the array holds dimension order[i].
        vector: the one dimension that the array has, where all others have size 1 and are left out.
        state: the entry of the state that it is, where it is one.
    """

    term: Any
    seen: Seen
    order: tuple[int, ...]
    vector: int | None = None
    state: str | None = None

    @property
    def shape(self) -> tuple[Dim, ...]:
        """PyTorch's."""
        return self.seen.shape

    @property
    def ndim(self) -> int:
        """PyTorch's."""
        return len(self.seen.shape)

    @property
    def laid(self) -> tuple[Dim, ...]:
        """The shape of the array."""
        dims = self.order if self.vector is None else (self.vector,)
        return tuple(self.shape[dim] for dim in dims)

    def axis(self, dim: int) -> int:
        """The axis of a dimension, which may count from the end."""
        return inverse(self.order)[dim % self.ndim]

    @property
    def plain(self) -> bool:
        """Whether the array has PyTorch's order."""
        return self.vector is None and self.order == tuple(range(self.ndim))


def numbers(shape: Sequence[Dim]) -> list[int]:
    """The sizes, none of which goes with the batch.

    Raises:
        Unprintable: for one that does.
    """
    found = [n for n in shape if isinstance(n, int)]
    if len(found) < len(shape):
        raise Unprintable("a size that goes with the batch, where a number is needed")
    return found


def plain_order(ndim: int) -> tuple[int, ...]:
    """PyTorch's."""
    return tuple(range(ndim))


def images(ndim: int) -> tuple[int, ...]:
    """(N, C, spatial...) as (N, spatial..., C)."""
    return (0, *range(2, ndim), 1)


@dataclass
class Step:
    """A statement: a local, and what it is."""

    local: str
    term: Any
    node: Node


@dataclass
class Writer:
    """The source of one program, node by node."""

    model: Model
    program: Program
    seen: dict[str, Any]
    entries: dict[str, Entry]
    arrays: dict[str, Any]  # the state's values, by PyTorch's names
    values: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    members: dict[str, Term] = field(default_factory=dict)  # what makes the layers and variables, by path
    leaves: frozenset[str] = frozenset()  # paths of modules without modules below
    readers: dict[str, set[str]] = field(default_factory=dict)  # of a value: the modules whose code reads it
    node: Node = field(default=None)  # type: ignore[assignment]  # the one being written

    def alone(self, path: str, own: set[str]) -> bool:
        """Whether a module has no other arrays of its own than these."""
        prefix = f"{path}."
        direct = {name for name in self.entries if name.startswith(prefix) and "." not in name[len(prefix) :]}
        return direct <= own

    def free_path(self, word: str) -> str:
        """Where a layer without arrays is: at the module's place, or in the module that calls it as a function."""
        module = self.node.module
        return module if module in self.leaves else f"{module}.{word}".lstrip(".")

    def tensor(self, term: Any, order: Sequence[int] | None = None, result: int | None = None) -> Tensor:
        """The current node's result (or one of its results): a statement of its own."""
        seen = self.seen[self.node.name] if result is None else self.seen[self.node.name][result]
        name = self.node.name if result is None else f"{self.node.name}_{result}"
        self.steps.append(Step(name, term, self.node))
        return Tensor(local(name), seen, tuple(order) if order is not None else plain_order(seen.ndim))

    def kept(self, term: Any, like: Tensor) -> Tensor:
        """A value on the way to the current node's result: a statement too, of the shape given by `like`."""
        name = f"{self.node.name}_{sum(step.node is self.node for step in self.steps)}_"
        self.steps.append(Step(name, term, self.node))
        return Tensor(local(name), like.seen, like.order, like.vector)

    def seen_here(self) -> Seen:
        """The current node's result."""
        found = self.seen[self.node.name]
        assert isinstance(found, Seen)
        return found

    def member(self, path: str, constructor: Term) -> Term:
        """What the module has at a path; made by the constructor."""
        known = self.members.setdefault(path, constructor)
        if known != constructor:
            raise Unprintable(f"{path} is used in two ways")
        return at(path)

    def size(self, dim: Any, *near: Any) -> Any:
        """A size as a term: a number (any other constant stays too), or the length of an axis of a tensor near."""
        if not isinstance(dim, Size):
            return dim
        inputs = (self.values[item.name] for item in self.program.inputs)
        for tensor in (*near, *inputs):
            if isinstance(tensor, Tensor) and dim in tensor.laid and tensor.state is None:
                return index(Term("attribute", (tensor.term, "shape")), tensor.laid.index(dim))
        for tensor in (*near, *(self.values[item.name] for item in self.program.inputs)):
            if not isinstance(tensor, Tensor) or tensor.state is not None:
                continue
            for axis, other in enumerate(tensor.laid):
                if isinstance(other, Size) and other.more == dim.more == 0 and dim.times % other.times == 0:
                    length = index(Term("attribute", (tensor.term, "shape")), axis)
                    return Term("binary", ("*", length, dim.times // other.times))
        raise Unprintable(f"a size that goes with the batch ({dim.times} x batch + {dim.more})")

    def reshaped(self, tensor: Tensor, laid: Sequence[Dim], near: Tensor | None = None) -> Any:
        """The term of the tensor's array with another shape; sizes are those of a tensor near."""
        if tuple(laid) == tensor.laid:
            return tensor.term
        inserted = _inserted(tensor.laid, tuple(laid))
        if inserted is not None and tensor.laid:
            while inserted and inserted[-1] is not None:
                inserted.pop()
            return index(tensor.term, *inserted)
        sizes: list[Any] = []
        free = sum(isinstance(n, Size) and n not in tensor.laid for n in laid) == 0
        for n in laid:
            if isinstance(n, Size) and n in tensor.laid:
                sizes.append(self.size(n, near or tensor))
            elif isinstance(n, Size):
                sizes.append(-1 if sizes.count(-1) == 0 else self.size(n, near or tensor))
            else:
                sizes.append(n)
        if free and len(sizes) == 2 and isinstance(laid[0], Size) and not isinstance(laid[1], Size):
            sizes[1] = -1
        return method(tensor.term, "reshape", *sizes)

    def arranged(self, tensor: Tensor, order: Sequence[int]) -> Any:
        """The term of the tensor's array with its dimensions in `order`."""
        order = tuple(order)
        if tensor.vector is not None:
            return self.reshaped(tensor, [tensor.shape[dim] for dim in order])
        if order == tensor.order:
            return tensor.term
        solid = [dim for dim in order if tensor.shape[dim] != 1]
        if solid == [dim for dim in tensor.order if tensor.shape[dim] != 1]:
            return self.reshaped(tensor, [tensor.shape[dim] for dim in order])
        axes = [tensor.axis(dim) for dim in order]
        moved = [i for i, axis in enumerate(axes) if i != axis]
        if len(moved) == 2:
            a, b = (i - len(axes) if moved[0] >= len(axes) - 2 else i for i in moved)
            return method(tensor.term, "swapaxes", a, b)
        return method(tensor.term, "transpose", *axes)

    def plain(self, tensor: Tensor) -> Any:
        """The term of the tensor's array in PyTorch's order."""
        return self.arranged(tensor, plain_order(tensor.ndim))

    def expanded(self, tensor: Tensor, order: Sequence[int], alone: bool = False) -> Any:
        """The term of an array that broadcasts to len(order) dimensions in that order."""
        extra = len(order) - tensor.ndim
        if math.prod(n if isinstance(n, int) else 2 for n in tensor.shape) == 1:
            return tensor.term if not tensor.laid else self.reshaped(tensor, [1] * len(order) if alone else ())
        if extra == 0 and tuple(order) == tensor.order and tensor.vector is None:
            return tensor.term
        if tuple(order) == plain_order(len(order)) and tensor.plain:
            return tensor.term
        shape = (1,) * extra + tensor.shape
        wanted = [shape[dim] for dim in order]
        source = [dim + extra for dim in (tensor.order if tensor.vector is None else (tensor.vector,))]
        if [d for d in order if shape[d] != 1] != [d for d in source if shape[d] != 1]:
            grown = Tensor(self.plain(tensor), Seen(tensor.shape, tensor.seen.dtype), plain_order(tensor.ndim))
            wide = Tensor(self.reshaped(grown, shape), Seen(shape, tensor.seen.dtype), plain_order(len(shape)))
            return self.arranged(wide, order)
        while wanted and wanted[0] == 1 and len(wanted) > 1:
            wanted = wanted[1:]
        return self.reshaped(tensor, wanted)

    def elementwise(self, build: Callable[..., Any], *arguments: Any) -> Tensor:
        """A statement of an operation that treats all dimensions alike. Arguments are tensors and constants."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        order = common_order(tensors, self.seen_here().ndim)
        only = len(tensors) == 1
        near = [x for x in tensors if x.state is None]
        terms = [
            (x.term if only and x.vector is None else self.expanded(x, order))
            if isinstance(x, Tensor)
            else self.size(x, *near)
            for x in arguments
        ]
        if only and tensors[0].vector is None:
            order = tensors[0].order
        return self.tensor(build(*terms), order)


def common_order(tensors: Sequence[Tensor], ndim: int) -> tuple[int, ...]:
    """In which order tensors that broadcast together are best combined."""
    found = [x for x in tensors if x.ndim == ndim and x.vector is None and x.order != plain_order(ndim)]
    if not found:
        return plain_order(ndim)
    return max(found, key=lambda x: math.prod(n for n in x.shape if isinstance(n, int))).order


def _inserted(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> list[Any] | None:
    """The index that gives an array of shape `old` the shape `new`, where that only puts in axes of size 1."""
    if len(new) <= len(old) or not old:
        return None
    items: list[Any] = []
    rest = list(old)
    for i, n in enumerate(new):
        if rest and n == rest[0] and (n != 1 or len(new) - i <= len(rest)):
            rest.pop(0)
            items.append(Term("slice", (None, None, None)))
        elif n == 1:
            items.append(None)
        else:
            return None
    if rest:
        return None
    while items and isinstance(items[-1], Term):
        items.pop()
    return items
