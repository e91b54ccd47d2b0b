"""Dropout, and what else is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interop.porting.looking import Dim
from interop.porting.printers.elementwise import type_like
from interop.porting.printers.registry import prints
from interop.porting.terms import Term, call, method, tuple_of
from interop.porting.values import Tensor, Writer, plain_order

RNGS = Term("argument", ("rngs",))


@prints("aten.dropout.default", "aten.feature_dropout.default")
def dropout(w: Writer, x: Tensor, p: Any, train: bool) -> Tensor:
    """An `nnx.Dropout` at the module's place; one that a class calls as a function is a member of the class."""
    if not train or p == 0:
        return x
    rest: dict[str, Any] = {}
    if "feature" in w.node.operation:
        rest["broadcast_dims"] = tuple_of(x.axis(dim) for dim in range(2, x.ndim))
    path = w.free_path("dropout")
    layer = w.member(path, call("nnx.Dropout", p, **rest, rngs=RNGS))
    return w.tensor(call(layer, x.term), x.order)


def shape_like(w: Writer, x: Any, laid: Sequence[Dim]) -> Any:
    """A shape as a term: that of the tensor at hand, where it has it."""
    if isinstance(x, Tensor) and tuple(laid) == x.laid:
        return Term("attribute", (x.term, "shape"))
    return tuple_of(w.size(n, x) for n in laid)


def drawn(w: Writer) -> Any:
    """A key of the module's own stream."""
    path = f"{w.node.module}.rngs".lstrip(".")
    return call(w.member(path, method(Term("attribute", (RNGS, "dropout")), "fork")))


@prints("aten.bernoulli.p", "aten.bernoulli.default")
def bernoulli(w: Writer, x: Tensor, p: Any = None, **_: Any) -> Tensor:
    shape = shape_like(w, x, x.laid)
    chance = x.term if p is None else p
    mask = call("jax.random.bernoulli", drawn(w), chance, shape)
    return w.tensor(method(mask, "astype", type_like(x, w.seen_here().dtype)), x.order)


@prints("aten.rand.default", "aten.rand_like.default", "aten.randn.default", "aten.randn_like.default")
def rand(w: Writer, x: Any, *_: Any, **__: Any) -> Tensor:
    seen = w.seen_here()
    order = x.order if isinstance(x, Tensor) and x.shape == seen.shape and x.vector is None else plain_order(seen.ndim)
    shape = shape_like(w, x, [seen.shape[dim] for dim in order])
    what = "normal" if "randn" in w.node.operation else "uniform"
    return w.tensor(call(f"jax.random.{what}", drawn(w), shape, type_like(x, seen.dtype)), order)
