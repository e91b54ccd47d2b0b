"""Shapes, orders of dimensions, parts and wholes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interop.porting.looking import Dim, Seen, Size
from interop.porting.printers.elementwise import jnp_type
from interop.porting.printers.registry import prints
from interop.porting.terms import Term, call, index, list_of, method, name, slice_of, tuple_of
from interop.porting.values import Tensor, Unprintable, Writer, common_order, images, plain_order


@prints("aten.permute.default")
def permute(w: Writer, x: Tensor, dims: Sequence[int]) -> Tensor:
    return _moved(w, x, [dim % x.ndim for dim in dims])


@prints("aten.transpose.int")
def transpose(w: Writer, x: Tensor, a: int, b: int) -> Tensor:
    dims = list(range(x.ndim))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return _moved(w, x, dims)


@prints("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def t(w: Writer, x: Tensor) -> Tensor:
    return _moved(w, x, [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2] if x.ndim >= 2 else list(range(x.ndim)))


@prints("aten.movedim.int", "aten.movedim.intlist")
def movedim(w: Writer, x: Tensor, source: Any, destination: Any) -> Tensor:
    sources = [source] if isinstance(source, int) else list(source)
    targets = [destination] if isinstance(destination, int) else list(destination)
    sources, targets = [s % x.ndim for s in sources], [d % x.ndim for d in targets]
    rest = iter(dim for dim in range(x.ndim) if dim not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return _moved(w, x, [placed[i] if i in placed else next(rest) for i in range(x.ndim)])


def _moved(w: Writer, x: Tensor, dims: list[int]) -> Tensor:
    """A transposition, which costs nothing where the array has that order already, or is that of an image. One of many
    dimensions waits for what comes after it, but for another module, which is given what PyTorch's code gives it."""
    seen = w.seen_here()
    if x.vector is not None:
        return Tensor(x.term, seen, plain_order(x.ndim), dims.index(x.vector))
    order = tuple(dims.index(dim) for dim in x.order)  # the same array
    if order == plain_order(x.ndim) or (order == images(x.ndim) and x.ndim >= 3 and x.plain) or not x.plain:
        return Tensor(x.term, seen, order, state=None)
    elsewhere = w.node.module not in w.readers.get(w.node.name, ())
    if x.state is not None or (x.ndim > 4 and not elsewhere):
        return Tensor(x.term, seen, order)
    moved = Tensor(x.term, seen, order)
    return w.tensor(w.arranged(moved, plain_order(x.ndim)))


@prints("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
        "aten.unflatten.int", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default",
        "aten.view_as.default", "aten.reshape_as.default")  # fmt: skip
def reshape(w: Writer, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return reshaped(w, x, w.seen_here())


def reshaped(w: Writer, x: Tensor, seen: Seen) -> Tensor:
    """The tensor with another shape: in the order of the array where the new dimensions lie in it one after another."""
    if seen.shape == x.shape:
        return x
    solid = [dim for dim in range(len(seen.shape)) if seen.shape[dim] != 1]
    length = x.shape[x.vector] if x.vector is not None else x.shape[0] if x.ndim == 1 else None
    if length is not None and len(solid) == 1 and seen.shape[solid[0]] == length and len(seen.shape) > 1:
        return Tensor(x.term, seen, plain_order(len(seen.shape)), solid[0])  # an axis, the rest are left out
    order, before = order_after(x, seen.shape), x
    if order is None:
        x = Tensor(w.plain(x), x.seen, plain_order(x.ndim))
        order = plain_order(len(seen.shape))
    if x.vector is not None:
        x = Tensor(w.plain(x), x.seen, plain_order(x.ndim))
    laid = [seen.shape[dim] for dim in order]
    if tuple(laid) == x.laid:
        return Tensor(x.term, seen, order)
    return w.tensor(w.reshaped(x, laid, before), order)


def order_after(x: Tensor, shape: Sequence[Dim]) -> tuple[int, ...] | None:
    """In which order the array of x has the dimensions of its new shape; None where it would have to be moved."""
    if x.vector is not None:
        return plain_order(len(shape))
    groups = _groups(x.shape, shape)
    if groups is None:
        return None
    order: list[int] = []
    stored = [dim for dim in x.order if x.shape[dim] != 1]
    while stored:
        group = next(group for group in groups if stored[0] in group[0])
        if stored[: len(group[0])] != group[0]:
            return None
        del stored[: len(group[0])]
        order += group[1]
    ones = [dim for dim in range(len(shape)) if shape[dim] == 1]
    if not ones:
        return tuple(order)
    for wanted in (images(len(shape)) if len(shape) == 4 else (), plain_order(len(shape)), images(len(shape))):
        looks = wanted != images(4) or not x.plain or shape[2:] == (1, 1)
        if wanted and looks and [dim for dim in wanted if shape[dim] != 1] == order:
            return wanted
    for dim in ones:
        order.insert(next((i for i, other in enumerate(order) if other > dim), len(order)), dim)
    return tuple(order)


def _groups(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[list[int], list[int]]] | None:
    """Dimensions of old and new that hold the same elements, those of size 1 aside."""
    found = []
    left = [dim for dim in range(len(old)) if old[dim] != 1]
    right = [dim for dim in range(len(new)) if new[dim] != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (first := _product(old, a)) != (second := _product(new, b)):
            if _less(first, second) and left:
                a.append(left.pop(0))
            elif right:
                b.append(right.pop(0))
            elif left:
                a.append(left.pop(0))
            else:
                return None
        found.append((a, b))
    return found if not left and not right else None


def _product(shape: Sequence[Dim], dims: Sequence[int]) -> tuple[int, int]:
    """The product, as a number and how often the batch is in it."""
    number, batches = 1, 0
    for dim in dims:
        n = shape[dim]
        if isinstance(n, Size):
            if n.more:
                return (-1, dim)
            number, batches = number * n.times, batches + 1
        else:
            number *= n
    return number, batches


def _less(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return (a[1], a[0]) < (b[1], b[0])


@prints("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(w: Writer, x: Tensor, *_: Any, **__: Any) -> Tensor:
    seen = w.seen_here()
    if seen.shape == x.shape:
        return x
    order = x.order if x.ndim == len(seen.shape) and x.vector is None else plain_order(len(seen.shape))
    near = [value for value in (x,) if value.state is None]
    sizes = [w.size(seen.shape[dim], *near) for dim in order]
    return w.tensor(call("jnp.broadcast_to", w.expanded(x, order), tuple_of(sizes)), order)


@prints("aten.repeat.default", "aten.tile.default")
def repeat(w: Writer, x: Tensor, times: Sequence[int]) -> Tensor:
    return w.tensor(call("jnp.tile", w.plain(x), tuple_of(w.size(n, x) for n in times)))


@prints("aten.repeat_interleave.self_int")
def repeat_interleave(w: Writer, x: Tensor, times: int, dim: int | None = None, **_: Any) -> Tensor:
    if dim is None:
        return w.tensor(call("jnp.repeat", w.plain(x), times))
    return w.tensor(call("jnp.repeat", x.term, times, axis=x.axis(dim)), x.order)


@prints("aten.cat.default", "aten.concat.default")
def cat(w: Writer, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    ndim = max(x.ndim for x in tensors)
    tensors = [x for x in tensors if x.ndim == ndim]
    order = common_order(tensors, ndim)
    axis = order.index(dim % ndim)
    terms = [w.arranged(x, order) for x in tensors]
    return w.tensor(call("jnp.concatenate", list_of(terms), axis=axis - ndim if axis == ndim - 1 else axis), order)


@prints("aten.stack.default")
def stack(w: Writer, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    ndim = tensors[0].ndim
    return w.tensor(call("jnp.stack", list_of(w.plain(x) for x in tensors), axis=dim % (ndim + 1)))


@prints("aten.slice.Tensor")
def slice_(w: Writer, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    seen = w.seen_here()
    if seen.shape == x.shape and step == 1:
        return x
    start, end = _ends(x, dim, start, end)
    return w.tensor(index(x.term, *_at(x, dim, slice_of(start, end, None if step == 1 else step))), x.order)


def _ends(x: Tensor, dim: int, start: Any, end: Any) -> tuple[Any, Any]:
    """Where a slice starts and ends; None for the dimension's own ends."""
    length = x.shape[dim % x.ndim]
    start = None if start in (0, None) else start
    if isinstance(end, Size) or end is None or (isinstance(length, int) and end >= length) or end >= 2**62:
        end = None
    if isinstance(start, Size):
        raise Unprintable("a slice from a place that goes with the batch")
    return start, end


def _at(x: Tensor, dim: int, item: Any) -> list[Any]:
    return [slice_of()] * x.axis(dim) + [item]


@prints("aten.slice_scatter.default")
def slice_scatter(
    w: Writer, x: Tensor, y: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    start, end = _ends(x, dim, start, end)
    place = slice_of(start, end, None if step == 1 else step)
    return _set(w, x, _at(x, dim, place), w.expanded(y, x.order))


@prints("aten.select_scatter.default")
def select_scatter(w: Writer, x: Tensor, y: Tensor, dim: int, which: int) -> Tensor:
    dim %= x.ndim
    return _set(w, x, _at(x, dim, which), w.arranged(y, tuple(d - (d > dim) for d in x.order if d != dim)))


def _set(w: Writer, x: Tensor, place: list[Any], value: Any) -> Tensor:
    """`x.at[place].set(value)`: what PyTorch's code writes into a part of a tensor."""
    part = index(Term("attribute", (w.arranged(x, x.order), "at")), *place)
    return w.tensor(method(part, "set", value), x.order)


@prints("aten.copy.default")
def copy(w: Writer, x: Tensor, y: Tensor, *_: Any) -> Tensor:
    """All of x is y's, in x's shape and element type."""
    term = w.expanded(y, x.order)
    if y.shape != x.shape:
        near = [value for value in (x, y) if value.state is None]
        term = call("jnp.broadcast_to", term, tuple_of(w.size(n, *near) for n in x.laid))
    if y.seen.dtype != x.seen.dtype:
        term = method(term, "astype", jnp_type(x.seen.dtype))
    return w.tensor(term, x.order)


@prints("aten.select.int")
def select(w: Writer, x: Tensor, dim: int, which: int) -> Tensor:
    dim %= x.ndim
    order = tuple(d - (d > dim) for d in x.order if d != dim)
    return w.tensor(index(x.term, *_at(x, dim, which)), order)


@prints("aten.narrow.default")
def narrow(w: Writer, x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return slice_(w, x, dim, start, start + length)


@prints("aten.unbind.int")
def unbind(w: Writer, x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    dim %= x.ndim
    order = tuple(d - (d > dim) for d in x.order if d != dim)
    count = len(w.seen[w.node.name])
    return tuple(w.tensor(index(x.term, *_at(x, dim, i)), order, i) for i in range(count))


@prints("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.split.sizes")
def split(w: Writer, x: Tensor, sizes: Any, dim: int = 0) -> tuple[Tensor, ...]:
    axis = x.axis(dim)
    parts = [seen.shape[dim] for seen in w.seen[w.node.name]]
    if len(parts) == 1:
        return (x,)
    if any(isinstance(n, Size) for n in parts):
        raise Unprintable("a split of the batch")
    places = len(parts) if len(set(parts)) == 1 else tuple_of(sum(parts[: i + 1]) for i in range(len(parts) - 1))
    axis = axis - x.ndim if axis == x.ndim - 1 else axis
    whole = w.kept(call("jnp.split", x.term, places, axis=axis), x)
    return tuple(w.tensor(index(whole.term, i), x.order, i) for i in range(len(parts)))


@prints("aten.roll.default")
def roll(w: Writer, x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    dims = [dims] if isinstance(dims, int) else list(dims)
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    if not dims:
        raise Unprintable("a roll of all elements")
    return w.tensor(call("jnp.roll", x.term, tuple_of(shifts), tuple_of(x.axis(dim) for dim in dims)), x.order)


@prints("aten.flip.default")
def flip(w: Writer, x: Tensor, dims: Sequence[int]) -> Tensor:
    return w.tensor(call("jnp.flip", x.term, tuple_of(sorted(x.axis(dim) for dim in dims))), x.order)


@prints("aten.constant_pad_nd.default", "aten.pad.default")
def pad(w: Writer, x: Tensor, widths: Sequence[int], *more: Any, **keywords: Any) -> Tensor:
    mode, value = "constant", 0
    if w.node.operation == "aten.pad.default":
        mode, value = (*more, *("constant", None)[len(more) :])[:2]
        value = keywords.get("value", value)
    elif more:
        value = more[0]
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    return padded(w, x, {x.ndim - 1 - i: pair for i, pair in enumerate(pairs)}, mode, value or 0)


@prints("aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.replication_pad2d.default",
        "aten.replication_pad1d.default")  # fmt: skip
def pad_by_itself(w: Writer, x: Tensor, widths: Sequence[int]) -> Tensor:
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    mode = "reflect" if "reflection" in w.node.operation else "replicate"
    return padded(w, x, {x.ndim - 1 - i: pair for i, pair in enumerate(pairs)}, mode, 0)


def padded(w: Writer, x: Tensor, pairs: dict[int, tuple[int, int]], mode: str, value: Any) -> Tensor:
    """Elements before and after each dimension; fewer than none are taken away."""
    pairs = {dim: pair for dim, pair in pairs.items() if any(pair)}
    if not pairs:
        return x
    term = x.term
    if any(n < 0 for pair in pairs.values() for n in pair):
        items = [pairs.get(dim, (0, 0)) for dim in x.order]
        cuts = [slice_of(-a if a < 0 else None, b if b < 0 else None) for a, b in items]
        term = index(term, *cuts)
        pairs = {dim: (max(a, 0), max(b, 0)) for dim, (a, b) in pairs.items()}
        if not any(map(any, pairs.values())):
            return w.tensor(term, x.order)
    widths = tuple_of(tuple_of(pairs.get(dim, (0, 0))) for dim in x.order)
    how: dict[str, Any] = {"mode": {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}.get(mode)}
    if mode == "constant":
        how = {} if value == 0 else {"constant_values": value}
    return w.tensor(call("jnp.pad", term, widths, **how), x.order)


@prints("aten.index.Tensor")
def index_(w: Writer, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    items = [slice_of() if i is None else w.plain(i) for i in indices]
    return w.tensor(index(w.plain(x), *items))


@prints("aten.index_select.default")
def index_select(w: Writer, x: Tensor, dim: int, indices: Tensor) -> Tensor:
    return w.tensor(call("jnp.take", x.term, w.plain(indices), axis=x.axis(dim)), x.order)


@prints("aten.one_hot.default")
def one_hot(w: Writer, x: Tensor, classes: int = -1) -> Tensor:
    return w.tensor(call("nnx.one_hot", w.plain(x), classes, dtype=name("int")))


@prints("aten.gather.default")
def gather(w: Writer, x: Tensor, dim: int, indices: Tensor, **_: Any) -> Tensor:
    return w.tensor(call("jnp.take_along_axis", w.plain(x), w.plain(indices), axis=dim % x.ndim))
