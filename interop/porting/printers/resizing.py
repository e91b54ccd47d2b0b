"""Interpolation of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interop.porting.looking import Dim
from interop.porting.printers.registry import prints
from interop.porting.terms import binary, call, name, tuple_of
from interop.porting.values import Tensor, Unprintable, Writer, images, numbers


def _sizes(w: Writer, x: Tensor) -> tuple[Sequence[Dim], Sequence[Dim]]:
    return x.shape[2:], w.seen_here().shape[2:]


@prints("aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default", "aten.upsample_nearest1d.vec",
        "aten._upsample_nearest_exact2d.vec", "aten.upsample_nearest3d.vec")  # fmt: skip
def nearest(w: Writer, x: Tensor, *_: Any) -> Tensor:
    """Each output's element is the one at floor(i * old / new), exactly: `floor((i + 1/2) * old / new)`."""
    old, new = _sizes(w, x)
    order = images(x.ndim)
    term = w.arranged(x, order)
    if list(old) == list(new):
        return x
    exact = "exact" in w.node.operation
    for axis, (a, b) in enumerate(zip(numbers(old), numbers(new), strict=True), 1):
        if b % a == 0:
            term = term if a == b else call("jnp.repeat", term, b // a, axis=axis)
            continue
        place: Any = call("jnp.arange", b)
        if exact:
            place = binary("//", binary("*", binary("+", binary("*", 2, place), 1), a), 2 * b)
        else:
            place = binary("//", binary("*", place, a), b)
        term = call("jnp.take", term, place, axis=axis)
    return w.tensor(term, order)


@prints("aten.upsample_bilinear2d.vec", "aten.upsample_bilinear2d.default", "aten.upsample_linear1d.vec",
        "aten.upsample_trilinear3d.vec")  # fmt: skip
def linear(w: Writer, x: Tensor, size: Any, align_corners: bool, *scales: Any) -> Tensor:
    old, new = _sizes(w, x)
    if list(old) == list(new):
        return x
    if align_corners:
        return _resampled(w, x, "edge_to_edge")
    _check_ratios(x, new, scales)
    return _resized(w, x, "linear", antialias=False)


@prints("aten.upsample_bicubic2d.vec", "aten.upsample_bicubic2d.default")
def cubic(w: Writer, x: Tensor, size: Any, align_corners: bool, *scales: Any) -> Tensor:
    old, new = _sizes(w, x)
    if list(old) == list(new):
        return x
    if align_corners:
        raise Unprintable("bicubic interpolation with align_corners")
    _check_ratios(x, new, scales)
    return _resampled(w, x, "bicubic")


@prints("aten._upsample_bicubic2d_aa.vec", "aten._upsample_bicubic2d_aa.default", "aten._upsample_bilinear2d_aa.vec",
        "aten._upsample_bilinear2d_aa.default")  # fmt: skip
def antialiased(w: Writer, x: Tensor, size: Any, align_corners: bool, *scales: Any) -> Tensor:
    """Both sides widen the kernel where they shrink; the cubic one is Keys' with a = -0.5 in both."""
    old, new = _sizes(w, x)
    if list(old) == list(new):
        return x
    if align_corners:
        raise Unprintable("antialiased interpolation with align_corners")
    _check_ratios(x, new, scales)
    return _resized(w, x, "cubic" if "bicubic" in w.node.operation else "linear")


def _resized(w: Writer, x: Tensor, kind: str, **options: Any) -> Tensor:
    order = images(x.ndim)
    shape = tuple_of(w.size(w.seen_here().shape[dim], x) for dim in order)
    return w.tensor(call("jax.image.resize", w.arranged(x, order), shape, kind, **options), order)


def _resampled(w: Writer, x: Tensor, weights: str) -> Tensor:
    order = images(x.ndim)
    sizes = tuple_of(numbers(w.seen_here().shape[2:]))
    return w.tensor(call("resampled", w.arranged(x, order), sizes, name(weights)), order)


def _check_ratios(x: Tensor, new: Sequence[Dim], scales: Sequence[Any]) -> None:
    """PyTorch goes by the scale that it is given, also where the sizes have another ratio."""
    given = scales[0] if scales and isinstance(scales[0], (list, tuple)) else scales
    for a, b, scale in zip(numbers(x.shape[2:]), numbers(new), given or (), strict=False):
        if scale and a * scale != b:
            raise Unprintable(f"interpolation from {a} to {b} by a factor of {scale}")
