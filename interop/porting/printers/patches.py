"""Windows of images and of sequences, and images out of channels."""

from __future__ import annotations

from typing import Any

from interop.ops.convolution import per_dim
from interop.porting.looking import Seen
from interop.porting.printers.registry import prints
from interop.porting.terms import Term, call, index, method, slice_of
from interop.porting.values import Tensor, Unprintable, Writer, images, numbers, plain_order


@prints("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default")
def pixel_shuffle(w: Writer, x: Tensor, r: int) -> Tensor:
    n, (c, h, width) = x.shape[0], numbers(x.shape[1:])
    array = Tensor(w.arranged(x, images(4)), Seen((n, h, width, c), x.seen.dtype), plain_order(4))
    up = "unshuffle" not in w.node.operation
    shape = (n, h, width, c // r**2, r, r) if up else (n, h // r, r, width // r, r, c)
    cut = w.reshaped(array, shape)
    axes = (0, 1, 4, 2, 5, 3) if up else (0, 1, 3, 5, 2, 4)
    turned = Tensor(method(cut, "transpose", *axes), Seen(tuple(shape[a] for a in axes), x.seen.dtype), plain_order(6))
    return w.tensor(w.reshaped(turned, [w.seen_here().shape[dim] for dim in images(4)]), images(4))


@prints("aten.channel_shuffle.default")
def channel_shuffle(w: Writer, x: Tensor, groups: int) -> Tensor:
    laid = [x.shape[dim] for dim in images(x.ndim)]
    (channels,) = numbers(laid[-1:])
    array = Tensor(w.arranged(x, images(x.ndim)), Seen(tuple(laid), x.seen.dtype), plain_order(x.ndim))
    cut = method(w.reshaped(array, [*laid[:-1], groups, channels // groups]), "swapaxes", -1, -2)
    again = Tensor(cut, Seen((*laid[:-1], channels // groups, groups), x.seen.dtype), plain_order(x.ndim + 1))
    return w.tensor(w.reshaped(again, laid), images(x.ndim))


@prints("aten.unfold.default")
def unfold(w: Writer, x: Tensor, dim: int, size: int, step: int) -> Tensor:
    length = x.shape[dim % x.ndim]
    if not isinstance(length, int):
        raise Unprintable("unfold of the batch")
    starts = call("jnp.arange", 0, length - size + 1, step)
    places = Term("binary", ("+", index(starts, slice_of(), None), call("jnp.arange", size)))
    found = call("jnp.take", w.plain(x), places, axis=dim % x.ndim)
    return w.tensor(call("jnp.moveaxis", found, dim % x.ndim + 1, -1))


@prints("aten.im2col.default")
def im2col(w: Writer, x: Tensor, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    kernel, dilation, padding, stride = (tuple(per_dim(v, 2)) for v in (kernel, dilation, padding, stride))
    if x.ndim != 4:
        raise Unprintable("unfold of one image")
    rest = () if dilation == (1, 1) else (dilation,)
    return w.tensor(call("unfolded", w.arranged(x, images(4)), kernel, stride, padding, *rest), (0, 2, 1))


@prints("aten.col2im.default")
def col2im(w: Writer, x: Tensor, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    size, kernel, dilation, padding, stride = (tuple(per_dim(v, 2)) for v in (size, kernel, dilation, padding, stride))
    if dilation != (1, 1) or x.ndim != 3:
        raise Unprintable("a dilated fold, or one of one image")
    return w.tensor(call("folded", w.arranged(x, (0, 2, 1)), size, kernel, stride, padding), images(4))
