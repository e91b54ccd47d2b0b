"""Interpolation of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interop.porting.looking import Dim
from interop.porting.printers.registry import prints
from interop.porting.terms import call, list_of, tuple_of
from interop.porting.values import Tensor, Unprintable, Writer, images, numbers


def _sizes(w: Writer, x: Tensor) -> tuple[Sequence[Dim], Sequence[Dim]]:
    return x.shape[2:], w.seen_here().shape[2:]


@prints("aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default", "aten.upsample_nearest1d.vec",
        "aten._upsample_nearest_exact2d.vec", "aten.upsample_nearest3d.vec")  # fmt: skip
def nearest(w: Writer, x: Tensor, *_: Any) -> Tensor:
    old, new = _sizes(w, x)
    order = images(x.ndim)
    term = w.arranged(x, order)
    if list(old) == list(new):
        return x
    pairs = list(zip(numbers(old), numbers(new), strict=True))
    if all(b % a == 0 for a, b in pairs):
        for axis, (a, b) in enumerate(pairs, 1):
            if b != a:
                term = call("jnp.repeat", term, b // a, axis=axis)
        return w.tensor(term, order)
    raise Unprintable("nearest interpolation to sizes that are no multiples")


@prints("aten.upsample_bilinear2d.vec", "aten.upsample_bilinear2d.default", "aten.upsample_linear1d.vec",
        "aten.upsample_trilinear3d.vec")  # fmt: skip
def linear(w: Writer, x: Tensor, size: Any, align_corners: bool, *_: Any) -> Tensor:
    old, new = _sizes(w, x)
    if list(old) == list(new):
        return x
    order = images(x.ndim)
    shape = tuple_of(w.size(w.seen_here().shape[dim], x) for dim in order)
    array = w.arranged(x, order)
    if not align_corners:
        return w.tensor(call("jax.image.resize", array, shape, "linear", antialias=False), order)
    # The first and the last of the old and of the new lie on one another.
    scales = [(b - 1) / (a - 1) if a > 1 else 1.0 for a, b in zip(numbers(old), numbers(new), strict=True)]
    if any(a == 1 for a in old):
        raise Unprintable("linear interpolation of one with align_corners")
    axes = tuple(range(1, x.ndim - 1))
    shifts = call("jnp.array", list_of(0.5 - 0.5 * s for s in scales))
    scaled = call("jax.image.scale_and_translate", array, shape, axes, call("jnp.array", list_of(scales)), shifts,
                  "linear", antialias=False)  # fmt: skip
    return w.tensor(scaled, order)
