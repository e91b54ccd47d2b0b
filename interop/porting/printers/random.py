"""Dropout, and what else is drawn."""

from __future__ import annotations

from typing import Any

from interop.porting.printers.elementwise import jnp_type
from interop.porting.printers.registry import prints
from interop.porting.terms import Term, call, method, tuple_of
from interop.porting.values import Tensor, Writer

RNGS = Term("argument", ("rngs",))


@prints("aten.dropout.default", "aten.feature_dropout.default")
def dropout(w: Writer, x: Tensor, p: float, train: bool) -> Tensor:
    """An `nnx.Dropout` at the module's place; one that a class calls as a function is a member of the class."""
    if not train or p == 0:
        return x
    rest: dict[str, Any] = {}
    if "feature" in w.node.operation:
        rest["broadcast_dims"] = tuple_of(x.axis(dim) for dim in range(2, x.ndim))
    path = w.free_path("dropout")
    layer = w.member(path, call("nnx.Dropout", p, **rest, rngs=RNGS))
    return w.tensor(call(layer, x.term), x.order)


def drawn(w: Writer) -> Any:
    """A key of the module's own stream."""
    path = f"{w.node.module}.rngs".lstrip(".")
    return call(w.member(path, method(Term("attribute", (RNGS, "dropout")), "fork")))


@prints("aten.bernoulli.p", "aten.bernoulli.default")
def bernoulli(w: Writer, x: Tensor, p: Any = None, **_: Any) -> Tensor:
    shape = tuple_of(w.size(n, x) for n in x.laid)
    chance = x.term if p is None else p
    mask = call("jax.random.bernoulli", drawn(w), chance, shape)
    return w.tensor(method(mask, "astype", jnp_type(w.seen_here().dtype)), x.order)


@prints("aten.rand.default", "aten.rand_like.default", "aten.randn.default", "aten.randn_like.default")
def rand(w: Writer, x: Any, *_: Any, **__: Any) -> Tensor:
    seen = w.seen_here()
    shape = tuple_of(w.size(n, x) for n in seen.shape)
    what = "normal" if "randn" in w.node.operation else "uniform"
    return w.tensor(call(f"jax.random.{what}", drawn(w), shape, jnp_type(seen.dtype)))
