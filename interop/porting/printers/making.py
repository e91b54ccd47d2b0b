"""Tensors made of sizes and numbers."""

from __future__ import annotations

from typing import Any

from interop.porting.printers.elementwise import jnp_type, type_like
from interop.porting.printers.registry import prints
from interop.porting.terms import call, tuple_of
from interop.porting.values import Tensor, Writer


def _filled(w: Writer, value: Any, *near: Any) -> Tensor:
    seen = w.seen_here()
    shape = tuple_of(w.size(n, *near) for n in seen.shape)
    dtype = type_like(near[0] if near else None, seen.dtype)
    if value in (0, 1) and not isinstance(value, Tensor):
        return w.tensor(call(f"jnp.{'ones' if value else 'zeros'}", shape, dtype))
    return w.tensor(call("jnp.full", shape, value.term if isinstance(value, Tensor) else value, dtype))


@prints("aten.zeros.default", "aten.empty.memory_format", "aten.new_zeros.default", "aten.new_empty.default",
        "aten.zeros_like.default", "aten.empty_like.default")  # fmt: skip
def zeros(w: Writer, x: Any, *_: Any, **__: Any) -> Tensor:
    return _filled(w, 0, x)


@prints("aten.ones.default", "aten.new_ones.default", "aten.ones_like.default")
def ones(w: Writer, x: Any, *_: Any, **__: Any) -> Tensor:
    return _filled(w, 1, x)


@prints("aten.full.default", "aten.full_like.default", "aten.scalar_tensor.default")
def full(w: Writer, x: Any, value: Any = None, *_: Any, **__: Any) -> Tensor:
    return _filled(w, x if w.node.operation.startswith("aten.scalar_tensor") else value, x)


@prints("aten.new_full.default")
def new_full(w: Writer, x: Any, size: Any, value: Any, *_: Any, **__: Any) -> Tensor:
    return _filled(w, value, x)


@prints("aten.fill.Scalar", "aten.fill.Tensor")
def fill(w: Writer, x: Any, value: Any) -> Tensor:
    return _filled(w, value, x)


@prints("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(w: Writer, *numbers: Any, **_: Any) -> Tensor:
    numbers = tuple(w.size(n) for n in numbers)
    if len(numbers) > 1 and numbers[0] == 0 and (len(numbers) < 3 or numbers[2] == 1):
        numbers = numbers[1:2]
    return w.tensor(call("jnp.arange", *numbers, dtype=jnp_type(w.seen_here().dtype)))


@prints("aten.linspace.default")
def linspace(w: Writer, start: Any, end: Any, steps: int, **_: Any) -> Tensor:
    return w.tensor(call("jnp.linspace", start, end, steps, dtype=jnp_type(w.seen_here().dtype)))


@prints("aten.meshgrid.indexing", "aten.meshgrid.default")
def meshgrid(w: Writer, tensors: Any, *, indexing: str = "ij") -> tuple[Tensor, ...]:
    from interop.porting.terms import index

    first = tensors[0]
    whole = w.kept(call("jnp.meshgrid", *(w.plain(x) for x in tensors), indexing=indexing), first)
    return tuple(w.tensor(index(whole.term, i), None, i) for i in range(len(tensors)))


@prints("aten.tril.default", "aten.triu.default")
def triangle(w: Writer, x: Tensor, diagonal: int = 0) -> Tensor:
    return w.tensor(call(f"jnp.{w.node.operation.split('.')[1]}", w.plain(x), diagonal))
