"""Pooling: images are channels last."""

from __future__ import annotations

from typing import Any

from interop.ops.convolution import per_dim
from interop.porting.printers.registry import prints
from interop.porting.terms import call, list_of, method, tuple_of
from interop.porting.terms import name as named
from interop.porting.values import Tensor, Unprintable, Writer, images, numbers


def _hanging(n: int, k: int, s: int, p: int, d: int, ceil: bool) -> int:
    """How far the last window hangs over behind the padding."""
    room = n + 2 * p - d * (k - 1) - 1
    count = -(-room // s) + 1 if ceil else room // s + 1
    if ceil and (count - 1) * s >= n + p:
        count -= 1
    return max((count - 1) * s + d * (k - 1) + 1 - n - 2 * p, 0)


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, ceil: bool) -> tuple[Any, Any, Any, bool]:
    spatial = x.ndim - 2
    kernel = per_dim(kernel, spatial)
    stride = kernel if stride in (None, [], ()) else per_dim(stride, spatial)
    padding = per_dim(padding, spatial)
    sizes = numbers(x.shape[2:])
    over = [_hanging(n, k, s, p, 1, ceil) for n, k, s, p in zip(sizes, kernel, stride, padding, strict=True)]
    pads = [(p, p + o) for p, o in zip(padding, over, strict=True)]
    return kernel, stride, pads, any(over)


def _options(stride: Any, pads: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"strides": tuple_of(stride)}
    if any(map(any, pads)):
        found["padding"] = list_of(tuple_of(pair) for pair in pads)
    return found


@prints("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
        "aten.max_pool2d_with_indices.default")  # fmt: skip
def max_pool(
    w: Writer, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Tensor | tuple[Tensor]:
    if any(d != 1 for d in per_dim(dilation, x.ndim - 2)):
        raise Unprintable("a dilated max_pool")
    kernel, stride, pads, _ = _windows(x, kernel, stride, padding, ceil)
    array = w.arranged(x, images(x.ndim))
    made = call("nnx.max_pool", array, window_shape=tuple_of(kernel), **_options(stride, pads))
    if w.node.operation.endswith("with_indices.default"):
        return (w.tensor(made, images(x.ndim), 0),)
    return w.tensor(made, images(x.ndim))


@prints("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def avg_pool(
    w: Writer, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False,
    count_padding: bool = True, divisor: Any = None,
) -> Tensor:  # fmt: skip
    kernel, stride, pads, over = _windows(x, kernel, stride, padding, ceil)
    padded = any(per_dim(padding, x.ndim - 2))
    if divisor is not None or (over and padded and count_padding):
        raise Unprintable("avg_pool that counts some of what hangs over")
    rest = {} if count_padding and not over else {"count_include_pad": False}
    rest = rest if any(map(any, pads)) else {}
    array = w.arranged(x, images(x.ndim))
    return w.tensor(
        call("nnx.avg_pool", array, window_shape=tuple_of(kernel), **_options(stride, pads), **rest), images(x.ndim)
    )


@prints("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default",
        "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool1d.default")  # fmt: skip
def adaptive(w: Writer, x: Tensor, size: Any) -> Tensor:
    most = "max" in w.node.operation
    spatial = x.ndim - 2
    wanted = [n if m is None else m for m, n in zip(per_dim(size, spatial), x.shape[2:], strict=True)]
    order = x.order if x.vector is None else images(x.ndim)
    if all(n == 1 for n in wanted):
        axes = tuple_of(sorted(order.index(dim) for dim in range(2, x.ndim)))
        return w.tensor(method(w.arranged(x, order), "max" if most else "mean", axes, keepdims=True), order)
    if list(x.shape[2:]) == wanted:
        return x
    sizes = list(zip(numbers(x.shape[2:]), numbers(wanted), strict=True))
    if any(n % m for n, m in sizes):
        if most:
            raise Unprintable("adaptive max pooling to sizes that do not divide the input's")
        array = w.arranged(x, images(x.ndim))
        return w.tensor(call("resampled", array, tuple_of(numbers(wanted)), named("windows")), images(x.ndim))
    windows = [n // m for n, m in sizes]
    array = w.arranged(x, images(x.ndim))
    pool = "nnx.max_pool" if most else "nnx.avg_pool"
    return w.tensor(call(pool, array, window_shape=tuple_of(windows), strides=tuple_of(windows)), images(x.ndim))
