"""Resampling of images: up- and downsampling, grid sampling, pixel shuffles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from interop.ops.activations import hardtanh
from interop.ops.layout import Tensor, arranged, channels_last, laid
from interop.ops.registry import register
from interop.program.guards import Size


def _source(out: int, n: int, scale: float | None, align_corners: bool) -> np.ndarray:
    """Where each output lies on the input (ATen UpSample.h, area_pixel_compute_source_index)."""
    position = np.arange(out, dtype=np.float64)
    if align_corners:
        return position * ((n - 1) / (out - 1) if out > 1 else 0.0)
    return (position + 0.5) * _ratio(out, n, scale) - 0.5


def _ratio(out: int, n: int, scale: float | None) -> float:
    return 1 / scale if scale is not None and scale > 0 else n / out


def _linear_weights(out: int, n: int, scale: float | None, align_corners: bool) -> np.ndarray:
    source = np.maximum(_source(out, n, scale, align_corners), 0)
    low = np.minimum(source.astype(int), n - 1)
    high = np.minimum(low + 1, n - 1)
    share = np.clip(source - low, 0, 1)
    weights = np.zeros((out, n))
    np.add.at(weights, (np.arange(out), low), 1 - share)
    np.add.at(weights, (np.arange(out), high), share)
    return weights


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel; PyTorch takes a = -0.75, and -0.5 with antialiasing."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _cubic_weights(out: int, n: int, scale: float | None, align_corners: bool) -> np.ndarray:
    source = _source(out, n, scale, align_corners)
    low = np.floor(source).astype(int)
    weights = np.zeros((out, n))
    for tap in range(-1, 3):
        place = np.clip(low + tap, 0, n - 1)
        np.add.at(weights, (np.arange(out), place), _cubic(source - (low + tap), -0.75))
    return weights


def _antialiased_weights(kernel: Callable[[np.ndarray], np.ndarray], reach: float) -> Callable[..., np.ndarray]:
    """Weights whose kernel widens when shrinking (ATen UpSampleKernel.cpp, _compute_indices_min_size_weights_aa)."""

    def weights(out: int, n: int, scale: float | None, align_corners: bool) -> np.ndarray:
        ratio = (n - 1) / (out - 1) if align_corners and out > 1 else 0.0 if align_corners else _ratio(out, n, scale)
        stretch = max(ratio, 1.0)
        support = reach * stretch
        table = np.zeros((out, n))
        for i in range(out):
            center = ratio * (i + 0.5)
            first = max(int(center - support + 0.5), 0)
            last = min(int(center + support + 0.5), n)
            taps = kernel((np.arange(first, last) - center + 0.5) / stretch)
            table[i, first:last] = taps / taps.sum()
        return table

    return weights


def _nearest_index(
    out: int, n: int, scale: float | None, exact: bool, real: type[np.float32 | np.float64], generic: bool
) -> np.ndarray:
    """Which element each output is, rounded as ATen does.

    In its general kernel (aten/src/ATen/native/cpu/UpSampleKernel.cpp, HelperInterpNearest) positions are of type
    `real`; in the other, for small images (UpSample.h, nearest_idx and nearest_exact_idx), in single precision.
    """
    if not (exact or generic) and out in (n, 2 * n):
        return np.arange(out) * n // out
    real = real if generic else np.float32
    position = (np.arange(out) + (0.5 if exact else 0.0)) * float(real(_ratio(out, n, scale)))
    if exact and generic:
        position = np.maximum(position - 0.5, 0).astype(real) + 0.5
    return np.minimum(np.floor(position.astype(np.float32)).astype(int), n - 1)


Weights = Callable[[int, int, "float | None", bool], np.ndarray]
_tables: dict[str, Weights] = {
    "linear": _linear_weights,
    "cubic": _cubic_weights,
    "linear_aa": _antialiased_weights(lambda d: np.maximum(1 - np.abs(d), 0), 1.0),
    "cubic_aa": _antialiased_weights(lambda d: _cubic(d, -0.5), 2.0),
}


@functools.lru_cache(maxsize=256)
def _table(kind: str, out: int, n: int, scale: float | None, align_corners: bool) -> np.ndarray:
    return _tables[kind](out, n, scale, align_corners)


def _resized(x: Tensor, kind: str, sizes: Sequence[int], scales: Sequence[float | None], align_corners: bool) -> Tensor:
    """One axis at a time: a choice of elements (nearest), or a matrix of weights."""
    order = channels_last(x.ndim)
    array = arranged(x, order)
    real = np.float64 if array.dtype == jnp.float64 else np.float32
    generic = len(sizes) != 2 or sum(sizes) > 128  # which of ATen's kernels (_use_vectorized_kernel_cond_2d)
    for axis, (out, scale) in enumerate(zip(sizes, scales, strict=True), start=1):
        n = array.shape[axis]
        if kind.startswith("nearest"):
            array = _picked(array, axis, _nearest_index(out, n, scale, kind == "nearest_exact", real, generic))
        elif out != n or (scale not in (None, 1.0)):
            weights = jnp.asarray(_table(kind, out, n, scale, align_corners), array.dtype)
            array = jnp.moveaxis(jnp.tensordot(array, weights, (axis, 1)), -1, axis)
    return laid(array, order)


def _picked(array: Array, axis: int, index: np.ndarray) -> Array:
    n = array.shape[axis]
    if len(index) == n and (index == np.arange(n)).all():
        return array
    times = len(index) // n if n else 0
    if times and len(index) == n * times and (index == np.repeat(np.arange(n), times)).all():
        return jnp.repeat(array, times, axis)
    return jnp.take(array, jnp.asarray(index), axis=axis)


def _wanted(x: Tensor, output_size: Sequence[Size] | None, scale_factors: Any) -> tuple[list[int], list[float | None]]:
    sizes = x.shape[2:]
    if output_size is not None:
        return [int(n) for n in output_size], [None] * len(sizes)
    return [math.floor(float(n) * s) for n, s in zip(sizes, scale_factors, strict=True)], list(scale_factors)


def _register(name: str, kind: str, spatial: int, corners: bool) -> None:
    def sized(x: Tensor, output_size: Sequence[Size], *rest: bool | float | None) -> Tensor:
        """aten::upsample_*(x, output_size, [align_corners,] scale for each dimension)."""
        align = bool(rest[0]) if corners and rest else False
        scales = list(rest[1 if corners else 0 :]) or [None] * spatial
        return _resized(x, kind, [int(n) for n in output_size], scales + [None] * (spatial - len(scales)), align)

    def vec(x: Tensor, output_size: Sequence[Size] | None, *rest: Any) -> Tensor:
        """aten::upsample_*.vec(x, output_size, [align_corners,] scale_factors)."""
        align = bool(rest[0]) if corners and rest else False
        scale_factors = rest[1 if corners else 0] if len(rest) > (1 if corners else 0) else None
        return _resized(x, kind, *_wanted(x, output_size, scale_factors), align)

    def named_sized(
        x: Tensor, output_size: Sequence[Size], *rest: bool | float | None, **keywords: bool | float | None
    ) -> Tensor:
        return sized(x, output_size, *rest, *keywords.values())

    register(f"aten.{name}.default", layout="aware")(named_sized)
    register(f"aten.{name}.vec", layout="aware")(vec)


for _n in (1, 2, 3):
    _register(f"upsample_nearest{_n}d", "nearest", _n, False)
    _register(f"_upsample_nearest_exact{_n}d", "nearest_exact", _n, False)
_register("upsample_linear1d", "linear", 1, True)
_register("upsample_bilinear2d", "linear", 2, True)
_register("upsample_trilinear3d", "linear", 3, True)
_register("upsample_bicubic2d", "cubic", 2, True)
_register("_upsample_bilinear2d_aa", "linear_aa", 2, True)
_register("_upsample_bicubic2d_aa", "cubic_aa", 2, True)


@register("aten.pixel_shuffle.default", layout="aware")
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """(N, C r r, H, W) to (N, C, H r, W r)."""
    r, order = upscale_factor, channels_last(x.ndim)
    n, h, w, c = (array := arranged(x, order)).shape
    array = array.reshape(n, h, w, c // (r * r), r, r).transpose(0, 1, 4, 2, 5, 3)
    return laid(array.reshape(n, h * r, w * r, c // (r * r)), order)


@register("aten.pixel_unshuffle.default", layout="aware")
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    r, order = downscale_factor, channels_last(x.ndim)
    n, h, w, c = (array := arranged(x, order)).shape
    array = array.reshape(n, h // r, r, w // r, r, c).transpose(0, 1, 3, 5, 2, 4)
    return laid(array.reshape(n, h // r, w // r, c * r * r), order)


@register("aten.affine_grid_generator.default")
def affine_grid(theta: Array, size: Sequence[Size], align_corners: bool) -> Array:
    """The grid of an affine map (N, 2, 3) or (N, 3, 4), for grid_sampler; coordinates x first."""

    def line(n: int) -> Array:
        points = jnp.linspace(-1, 1, n, dtype=theta.dtype) if n > 1 else jnp.zeros(1, theta.dtype)
        return points if align_corners else points * ((n - 1) / n)

    axes = jnp.meshgrid(*(line(n) for n in size[2:]), indexing="ij")
    base = jnp.stack([*reversed(axes), jnp.ones_like(axes[0])], -1)
    return jnp.einsum("...j,nij->n...i", base, theta)


def _unnormalised(grid: Array, n: int, align_corners: bool) -> Array:
    return (grid + 1) / 2 * (n - 1) if align_corners else ((grid + 1) * n - 1) / 2


def _clipped(x: Array, n: int) -> Array:
    """x between 0 and n - 1; the derivative is 0 at both (GridSampler.h, clip_coordinates_set_grad)."""
    return hardtanh(x, 0, n - 1)


def _reflected(x: Array, n: int, align_corners: bool) -> Array:
    low, span = (0.0, n - 1) if align_corners else (-0.5, n)
    if span == 0:
        return jnp.zeros_like(x)
    distance = jnp.abs(x - low)
    turns = jnp.floor(distance / span)
    rest = distance - turns * span
    return _clipped(jnp.where(turns % 2 == 0, rest + low, span - rest + low), n)


@register("aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def grid_sampler(x: Array, grid: Array, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Array:
    """torch.nn.functional.grid_sample of images and of volumes.

    Modes 0 linear, 1 nearest, 2 cubic (images only, as in PyTorch); padding 0 zeros, 1 border, 2 reflection.
    """
    sizes = x.shape[2:]

    def placed(position: Array, n: int) -> Array:
        if padding_mode == 1:
            return _clipped(position, n)
        return _reflected(position, n, align_corners) if padding_mode == 2 else position

    def pick(place: Sequence[Array]) -> Array:
        """x at whole positions, (N, out..., C); zero outside."""
        inside = functools.reduce(jnp.logical_and, [(p >= 0) & (p < n) for p, n in zip(place, sizes, strict=True)])
        index = [jnp.clip(p, 0, n - 1).astype(int) for p, n in zip(place, sizes, strict=True)]
        batch = jnp.arange(x.shape[0]).reshape(-1, *[1] * len(sizes))
        return jnp.where(inside[..., None], channels[(batch, *index)], 0)

    channels = jnp.moveaxis(x, 1, -1)
    # The grid's coordinates are x first, the tensor's last dimension.
    position = [_unnormalised(grid[..., -1 - axis], n, align_corners) for axis, n in enumerate(sizes)]
    if interpolation_mode != 2:
        position = [placed(p, n) for p, n in zip(position, sizes, strict=True)]
    if interpolation_mode == 1:
        return jnp.moveaxis(pick([jnp.round(p) for p in position]), -1, 1)
    first = [jnp.floor(p) for p in position]
    total: Array | int = 0
    if interpolation_mode == 0:
        for corner in itertools.product((0, 1), repeat=len(sizes)):
            shares: list[Any] = [
                p - f if far else 1 - (p - f) for p, f, far in zip(position, first, corner, strict=True)
            ]
            picked = pick([f + far for f, far in zip(first, corner, strict=True)])
            total = total + picked * math.prod(shares)[..., None]
        return jnp.moveaxis(total, -1, 1)
    for corner in itertools.product(range(-1, 3), repeat=len(sizes)):
        weights: list[Any] = [_cubic_at(p - f - tap) for p, f, tap in zip(position, first, corner, strict=True)]
        taps = [placed(f + tap, n) for f, tap, n in zip(first, corner, sizes, strict=True)]
        total = total + pick(taps) * math.prod(weights)[..., None]
    return jnp.moveaxis(total, -1, 1)


def _cubic_at(distance: Array, a: float = -0.75) -> Array:
    d = jnp.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))
