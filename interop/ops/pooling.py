"""Pooling, channels last inside."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from interop.ops.convolution import PerDim, cut_windows, per_dim
from interop.ops.dtypes import jax_dtype, lowest
from interop.ops.layout import Tensor, arranged, channels_last, laid, plain
from interop.ops.registry import register

AdaptiveSize = int | list[int | None] | tuple[int | None, ...]  # None: as many as there are


def _out_size(n: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    """How many windows fit.

    In ceil mode the last may hang over, but starts inside the input or its left padding (ATen Pool.h).
    """
    room = n + 2 * p - d * (k - 1) - 1
    count = -(-room // s) + 1 if ceil_mode else room // s + 1
    if ceil_mode and (count - 1) * s >= n + p:
        count -= 1
    return count


class _Windows:
    """The windows of one pooling call: kernel, stride, padding and dilation for each spatial dimension."""

    def __init__(
        self,
        sizes: Sequence[int],
        kernel: PerDim,
        stride: PerDim | None,
        padding: PerDim,
        dilation: PerDim,
        ceil_mode: bool,
    ):
        count = len(sizes)
        self.sizes = tuple(sizes)
        self.kernel = per_dim(kernel, count)
        self.stride = self.kernel if stride is None or stride == [] else per_dim(stride, count)
        self.padding, self.dilation = per_dim(padding, count), per_dim(dilation, count)
        each = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        self.out = tuple(_out_size(*numbers, ceil_mode) for numbers in each)
        self.pads = []
        for n, k, s, p, d, out in zip(
            sizes, self.kernel, self.stride, self.padding, self.dilation, self.out, strict=True
        ):
            self.pads.append((p, max((out - 1) * s + d * (k - 1) + 1 - n - p, 0)))

    def reduce(self, x: Array, start: np.ndarray, function: Callable[[Array, Array], Array]) -> Array:
        """lax.reduce_window of an array (N, spatial..., C)."""
        y = lax.reduce_window(
            x, start, function, (1, *self.kernel, 1), (1, *self.stride, 1), [(0, 0), *self.pads, (0, 0)],
            window_dilation=(1, *self.dilation, 1),
        )  # fmt: skip
        return y[(slice(None), *(slice(0, n) for n in self.out), slice(None))]


def _batched(x: Tensor, spatial: int, function: Callable[[Array], Array]) -> Tensor:
    """Applies `function` to the array (N, spatial..., C) of x, and lays the result like it.

    A batch dimension is made where none is.
    """
    if x.ndim == spatial + 1:
        result = _batched(plain(x)[None], spatial, function)
        return plain(result)[0]
    order = channels_last(x.ndim)
    return laid(function(arranged(x, order)), order)


def _max_pool(spatial: int) -> Callable[..., Tensor]:
    def apply(
        x: Tensor,
        kernel_size: PerDim,
        stride: PerDim | None = None,
        padding: PerDim = 0,
        dilation: PerDim = 1,
        ceil_mode: bool = False,
    ) -> Tensor:
        def pool(a: Array) -> Array:
            windows = _Windows(a.shape[1:-1], kernel_size, stride, padding, dilation, ceil_mode)
            if any(d > 1 for d in windows.dilation):
                return _dilated_max(a, windows)
            return windows.reduce(a, lowest(a.dtype), lax.max)

        return _batched(x, spatial, pool)

    return apply


def _dilated_max(a: Array, windows: _Windows) -> Array:
    """The first largest element of each window; lax.reduce_window with dilation has no derivative."""
    a = lax.pad(
        a, jnp.asarray(lowest(a.dtype)), [(0, 0, 0), *((low, high, 0) for low, high in windows.pads), (0, 0, 0)]
    )
    none = ((0, 0),) * len(windows.kernel)
    seen = [w[..., 0, :] for _, w in cut_windows(a, windows.kernel, windows.stride, none, windows.dilation, 1)]
    stacked = jnp.stack(seen)
    best = jnp.argmax(lax.stop_gradient(stacked), 0, keepdims=True)
    return jnp.take_along_axis(stacked, best, 0)[0][(slice(None), *(slice(0, n) for n in windows.out))]


def _max_pool_indices(spatial: int) -> Callable[..., tuple[Tensor, Array]]:
    values = _max_pool(spatial)

    def apply(
        x: Tensor,
        kernel_size: PerDim,
        stride: PerDim | None = None,
        padding: PerDim = 0,
        dilation: PerDim = 1,
        ceil_mode: bool = False,
    ) -> tuple[Tensor, Array]:
        sizes = x.shape[-spatial:]
        windows = _Windows(sizes, kernel_size, stride, padding, dilation, ceil_mode)
        flat = lax.stop_gradient(plain(x))
        position = jnp.broadcast_to(jnp.arange(math.prod(sizes)).reshape(sizes), flat.shape)

        def first_largest(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
            take = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
            return jnp.where(take, b[0], a[0]), jnp.where(take, b[1], a[1])

        lead = (1,) * (flat.ndim - spatial)
        _, index = lax.reduce_window(
            (flat, position), (lowest(flat.dtype), np.asarray(math.prod(sizes), position.dtype)), first_largest,
            (*lead, *windows.kernel), (*lead, *windows.stride), [(0, 0)] * len(lead) + windows.pads,
            window_dilation=(*lead, *windows.dilation),
        )  # fmt: skip
        index = index[(..., *(slice(0, n) for n in windows.out))]
        return values(x, kernel_size, stride, padding, dilation, ceil_mode), index.astype(jax_dtype(jnp.int64))

    return apply


for _n in (1, 2, 3):
    register(f"aten.max_pool{_n}d.default", layout="aware")(_max_pool(_n))
    register(f"aten.max_pool{_n}d_with_indices.default", layout="aware")(_max_pool_indices(_n))


def _avg_pool(spatial: int) -> Callable[..., Tensor]:
    def apply(
        x: Tensor, kernel_size: PerDim, stride: PerDim | None = None, padding: PerDim = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Tensor:  # fmt: skip
        def pool(a: Array) -> Array:
            windows = _Windows(a.shape[1:-1], kernel_size, stride, padding, 1, ceil_mode)
            total = windows.reduce(a, np.zeros((), a.dtype), lax.add)
            return total / _divisors(windows, count_include_pad, divisor_override).astype(a.dtype)

        return _batched(x, spatial, pool)

    return apply


def _divisors(windows: _Windows, count_include_pad: bool, override: int | None) -> np.ndarray:
    """How many elements each window averages, (out..., 1).

    With padding counted as far as it was asked for, or without.
    """
    if override is not None:
        return np.asarray(override)
    total = np.ones((), int)
    each = zip(windows.sizes, windows.kernel, windows.stride, windows.padding, windows.out, strict=True)
    for n, k, s, p, out in each:
        start = np.arange(out) * s - p
        stop = np.minimum(start + k, n + p)
        if not count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, n)
        total = total[..., None] * (stop - start)
    return np.asarray(total[..., None])


for _n in (1, 2, 3):
    register(f"aten.avg_pool{_n}d.default", layout="aware")(_avg_pool(_n))


def _cells(n: int, out: int) -> list[tuple[int, int]]:
    """Adaptive pooling's cells: from floor(i n / out) to ceil((i + 1) n / out)."""
    return [(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]


def _adaptive_avg_pool(spatial: int) -> Callable[..., Tensor]:
    def apply(x: Tensor, output_size: AdaptiveSize) -> Tensor:
        def pool(a: Array) -> Array:
            for axis, out in enumerate(_adaptive_sizes(output_size, a.shape[1:-1]), start=1):
                a = _averaged(a, axis, out)
            return a

        return _batched(x, spatial, pool)

    return apply


def _adaptive_sizes(output_size: AdaptiveSize, sizes: Sequence[int]) -> list[int]:
    wanted = output_size if isinstance(output_size, (list, tuple)) else [output_size] * len(sizes)
    return [n if out is None else out for out, n in zip(wanted, sizes, strict=True)]


def _averaged(a: Array, axis: int, out: int) -> Array:
    n = a.shape[axis]
    if out == n:
        return a
    if n % out == 0:
        return jnp.mean(a.reshape(*a.shape[:axis], out, n // out, *a.shape[axis + 1 :]), axis + 1)
    weights = np.zeros((n, out))
    for i, (start, stop) in enumerate(_cells(n, out)):
        weights[start:stop, i] = 1 / (stop - start)
    return jnp.moveaxis(jnp.tensordot(a, jnp.asarray(weights, a.dtype), (axis, 0)), -1, axis)


def _adaptive_max_pool(spatial: int) -> Callable[..., tuple[Array, Array]]:
    def apply(x: Tensor, output_size: AdaptiveSize) -> tuple[Array, Array]:
        a = plain(x)
        sizes = a.shape[-spatial:]
        out = _adaptive_sizes(output_size, sizes)
        position = np.arange(math.prod(sizes)).reshape(sizes)
        values, indices = [], []
        for cell in itertools.product(*(_cells(n, m) for n, m in zip(sizes, out, strict=True))):
            part = tuple(slice(start, stop) for start, stop in cell)
            seen = a[(..., *part)].reshape(*a.shape[:-spatial], -1)
            best = jnp.argmax(lax.stop_gradient(seen), -1, keepdims=True)
            values.append(jnp.take_along_axis(seen, best, -1)[..., 0])
            indices.append(jnp.asarray(position[part].reshape(-1))[best[..., 0]])
        shape = (*a.shape[:-spatial], *out)
        return jnp.stack(values, -1).reshape(shape), jnp.stack(indices, -1).reshape(shape).astype(jax_dtype(jnp.int64))

    return apply


for _n in (1, 2, 3):
    _names = [f"aten.adaptive_avg_pool{_n}d.default"] + ([f"aten._adaptive_avg_pool{_n}d.default"] if _n > 1 else [])
    register(*_names, layout="aware")(_adaptive_avg_pool(_n))
    register(f"aten.adaptive_max_pool{_n}d.default", layout="aware")(_adaptive_max_pool(_n))


@register("aten.im2col.default")
def im2col(x: Array, kernel_size: PerDim, dilation: PerDim, padding: PerDim, stride: PerDim) -> Array:
    """torch.nn.functional.unfold: (N, C kh kw, windows), channels outermost."""
    if x.ndim == 3:
        return im2col(x[None], kernel_size, dilation, padding, stride)[0]
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = (per_dim(v, 2) for v in (kernel_size, dilation, padding, stride))
    x = jnp.pad(x, [(0, 0), (0, 0), (ph, ph), (pw, pw)])
    oh, ow = (
        (n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], (dh, dw), (kh, kw), (sh, sw), strict=True)
    )
    pieces = [
        x[:, :, i * dh : i * dh + (oh - 1) * sh + 1 : sh, j * dw : j * dw + (ow - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.stack(pieces, 2).reshape(x.shape[0], x.shape[1] * kh * kw, oh * ow)


@register("aten.col2im.default")
def col2im(
    x: Array, output_size: Sequence[int], kernel_size: PerDim, dilation: PerDim, padding: PerDim, stride: PerDim
) -> Array:
    """torch.nn.functional.fold: the sum of the windows at their places."""
    if x.ndim == 2:
        return col2im(x[None], output_size, kernel_size, dilation, padding, stride)[0]
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = (per_dim(v, 2) for v in (kernel_size, dilation, padding, stride))
    h, w = output_size[0] + 2 * ph, output_size[1] + 2 * pw
    oh, ow = (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1
    x = x.reshape(x.shape[0], -1, kh, kw, oh, ow)
    total = jnp.zeros((*x.shape[:2], h, w), x.dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        rows = slice(i * dh, i * dh + (oh - 1) * sh + 1, sh)
        columns = slice(j * dw, j * dw + (ow - 1) * sw + 1, sw)
        total = total.at[:, :, rows, columns].add(x[:, :, i, j])
    return total[:, :, ph : h - ph, pw : w - pw]
