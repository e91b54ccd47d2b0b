"""Products of matrices, and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from interop.porting.printers.registry import prints
from interop.porting.terms import binary, call, method
from interop.porting.values import Tensor, Writer, plain_order


@prints("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default")
def matmul(w: Writer, a: Tensor, b: Tensor) -> Tensor:
    return w.tensor(binary("@", w.plain(a), w.plain(b)))


@prints("aten.addmm.default")
def addmm(w: Writer, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = binary("@", w.plain(a), w.plain(b))
    product = product if alpha == 1 else binary("*", alpha, product)
    more = w.expanded(bias, plain_order(2))
    return w.tensor(binary("+", product, more if beta == 1 else binary("*", beta, more)))


@prints("aten.baddbmm.default")
def baddbmm(w: Writer, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return addmm(w, bias, a, b, beta=beta, alpha=alpha)


@prints("aten.einsum.default")
def einsum(w: Writer, equation: str, operands: Sequence[Tensor], **_: Any) -> Tensor:
    return w.tensor(call("jnp.einsum", equation, *(w.plain(x) for x in operands)))


@prints("aten.outer.default")
def outer(w: Writer, a: Tensor, b: Tensor) -> Tensor:
    return w.tensor(call("jnp.outer", w.plain(a), w.plain(b)))


@prints("aten.scaled_dot_product_attention.default")
def attention(
    w: Writer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: Any = 0.0,
    causal: bool = False, *, scale: Any = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v, written out: `nnx.dot_product_attention` has heads elsewhere."""
    from interop.porting.values import Unprintable

    if causal or dropout or enable_gqa:
        raise Unprintable("scaled_dot_product_attention with dropout, a causal mask or grouped queries")
    size = q.shape[-1]
    assert isinstance(size, int)
    factor = 1 / math.sqrt(size) if scale is None else scale
    scores: Any = binary("@", binary("*", w.plain(q), factor), method(w.plain(k), "swapaxes", -1, -2))
    if mask is not None:
        if mask.seen.dtype == "bool":
            scores = call("jnp.where", w.expanded(mask, plain_order(q.ndim)), scores, -math.inf)
        else:
            scores = binary("+", scores, w.expanded(mask, plain_order(q.ndim)))
    weights = w.kept(call("nnx.softmax", scores), q)
    return w.tensor(binary("@", weights.term, w.plain(v)))
