"""Functions that a file is given where its classes call them: what neither jnp nor nnx has a function for.

They are copied as they are, so each stands alone but for jax, jnp, lax and numpy.
"""

from __future__ import annotations

import base64
import inspect
import sys
import zlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def resampled(x: jax.Array, sizes: tuple[int, ...], weights: Callable[[int, int], np.ndarray]) -> jax.Array:
    """(N, spatial..., C) with other sizes, one axis after another: `weights` gives a matrix for two sizes."""
    for axis, size in enumerate(sizes, start=1):
        if size != x.shape[axis]:
            matrix = jnp.asarray(weights(x.shape[axis], size), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1)), -1, axis)
    return x


def bicubic(old: int, new: int) -> np.ndarray:
    """Keys' kernel with a = -0.75, as PyTorch has it; the border is repeated."""
    place = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    taps = np.floor(place).astype(int) + np.arange(-1, 3)
    d = np.abs(place - taps)
    near = (1.25 * d - 2.25) * d * d + 1
    far = ((-0.75 * d + 3.75) * d - 6) * d + 3
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), np.where(d <= 1, near, far))
    return matrix


def windows(old: int, new: int) -> np.ndarray:
    """The means of windows that cover an axis, as those of PyTorch's adaptive average pooling: they may overlap."""
    i = np.arange(new)[:, None]
    start, stop = i * old // new, -(-(i + 1) * old // new)
    inside = (np.arange(old) >= start) & (np.arange(old) < stop)
    return inside / (stop - start)


def edge_to_edge(old: int, new: int) -> np.ndarray:
    """Linear, the first and the last of the old and of the new on one another (PyTorch's align_corners)."""
    place = np.arange(new)[:, None] * ((old - 1) / max(new - 1, 1))
    return np.maximum(1 - np.abs(place - np.arange(old)), 0)


def unfolded(
    x: jax.Array,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    """Windows of images (N, H, W, C) as (N, windows, C kernel), channels outermost (PyTorch's unfold)."""
    x = jnp.pad(x, ((0, 0), (padding[0], padding[0]), (padding[1], padding[1]), (0, 0)))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    rows, columns = ((n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:3], reach, stride, strict=True))
    starts = [(i * dilation[0], j * dilation[1]) for i, j in np.ndindex(*kernel)]
    down, right = (rows - 1) * stride[0] + 1, (columns - 1) * stride[1] + 1
    parts = [x[:, i : i + down : stride[0], j : j + right : stride[1]] for i, j in starts]
    return jnp.stack(parts, axis=-1).reshape(x.shape[0], rows * columns, -1)


def folded(
    x: jax.Array, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> jax.Array:
    """(N, windows, C kernel) as images (N, H, W, C): each window is added at its place (PyTorch's fold)."""
    height, width = (n + 2 * p for n, p in zip(size, padding, strict=True))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip((height, width), kernel, stride, strict=True))
    x = x.reshape(x.shape[0], rows, columns, -1, *kernel)
    total = jnp.zeros((x.shape[0], height, width, x.shape[3]), x.dtype)
    for i, j in np.ndindex(*kernel):
        place = np.s_[:, i : i + rows * stride[0] : stride[0], j : j + columns * stride[1] : stride[1]]
        total = total.at[place].add(x[..., i, j])
    return total[:, padding[0] : height - padding[0], padding[1] : width - padding[1]]


def lstm(
    x: jax.Array,
    state: tuple[jax.Array, jax.Array],
    weight_ih: jax.Array,
    weight_hh: jax.Array,
    bias: jax.Array | float = 0.0,
    reverse: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(N, T, C) to (N, T, H) and the last (h, c). PyTorch's gates: input, forget, cell, output."""

    def step(state, a):  # type: ignore[no-untyped-def]
        h, c = state
        i, f, g, o = jnp.split(a + h @ weight_hh.T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    a = jnp.swapaxes(x @ weight_ih.T + bias, 0, 1)
    h, c = state
    state, y = lax.scan(step, (h.astype(a.dtype), c.astype(a.dtype)), a, reverse=reverse)
    return jnp.swapaxes(y, 0, 1), state


def gru(
    x: jax.Array,
    h: jax.Array,
    weight_ih: jax.Array,
    weight_hh: jax.Array,
    bias_ih: jax.Array | float = 0.0,
    bias_hh: jax.Array | float = 0.0,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(N, T, C) to (N, T, H) and the last h. PyTorch's gates: reset, update, new."""

    def step(h, a):  # type: ignore[no-untyped-def]
        (ar, az, an), (br, bz, bn) = jnp.split(a, 3, axis=-1), jnp.split(h @ weight_hh.T + bias_hh, 3, axis=-1)
        z = jax.nn.sigmoid(az + bz)
        n = jnp.tanh(an + jax.nn.sigmoid(ar + br) * bn)
        h = (1 - z) * n + z * h
        return h, h

    a = jnp.swapaxes(x @ weight_ih.T + bias_ih, 0, 1)
    h, y = lax.scan(step, h.astype(a.dtype), a, reverse=reverse)
    return jnp.swapaxes(y, 0, 1), h


def rnn(
    x: jax.Array,
    h: jax.Array,
    weight_ih: jax.Array,
    weight_hh: jax.Array,
    bias: jax.Array | float = 0.0,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(N, T, C) to (N, T, H) and the last h."""

    def step(h, a):  # type: ignore[no-untyped-def]
        h = activation(a + h @ weight_hh.T)
        return h, h

    a = jnp.swapaxes(x @ weight_ih.T + bias, 0, 1)
    h, y = lax.scan(step, h.astype(a.dtype), a, reverse=reverse)
    return jnp.swapaxes(y, 0, 1), h


def relative_positions(height: int, width: int, class_token: bool = False) -> np.ndarray:
    """For each pair of positions of a window the number of their offset, rows first; a token apart has three more."""
    y, x = np.indices((height, width)).reshape(2, -1)
    rows, columns = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    table = rows * (2 * width - 1) + columns
    if class_token:
        count = (2 * height - 1) * (2 * width - 1)
        table = np.pad(table, (1, 0))
        table[0, 1:], table[1:, 0], table[0, 0] = count, count + 1, count + 2
    return table


def distances(height: int, width: int, stride: int = 1) -> np.ndarray:
    """For each pair of positions, of which the first are `stride` apart, the number of their distance, rows first."""
    y, x = np.indices((height, width))
    to_y, to_x = y[::stride, ::stride].reshape(-1, 1), x[::stride, ::stride].reshape(-1, 1)
    return np.abs(to_y - y.reshape(-1)) * width + np.abs(to_x - x.reshape(-1))


def shifted_windows(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], away: float
) -> np.ndarray:
    """(windows, positions, positions): `away` for positions that are in one window only since all were shifted."""
    (h, w), (down, right) = window, shift
    y, x = np.indices((height, width))
    part = 3 * ((y >= height - h).astype(int) + (y >= height - down)) + (x >= width - w) + (x >= width - right)
    part = part.reshape(height // h, h, width // w, w).swapaxes(1, 2).reshape(-1, h * w)
    return np.where(part[:, :, None] == part[:, None, :], 0.0, away)


def unpacked(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A table of numbers."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype).reshape(shape)


NAMES = (
    "resampled",
    "bicubic",
    "windows",
    "edge_to_edge",
    "unfolded",
    "folded",
    "lstm",
    "gru",
    "rnn",
    "relative_positions",
    "distances",
    "shifted_windows",
    "unpacked",
)


def sources(names: Iterable[str]) -> list[str]:
    """The source of the functions of these names, in this file's order."""
    wanted = set(names)
    return [inspect.getsource(getattr(sys.modules[__name__], name)) for name in NAMES if name in wanted]
