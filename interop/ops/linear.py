"""Matrix products and linear algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from interop.ops.dtypes import Number, promoted
from interop.ops.layout import Tensor
from interop.ops.norms import vector_norm
from interop.ops.registry import register


@register("aten.linear.default")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x weight^T + bias, weight (out, in)."""
    x, weight = promoted(x, weight)
    y = lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))
    return y if bias is None else y + bias


@register(
    "aten.matmul.default",
    "aten.mm.default",
    "aten.bmm.default",
    "aten.mv.default",
    "aten.dot.default",
)
def matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b)


@register("aten.vdot.default")
def vdot(a: Array, b: Array) -> Array:
    """The sum of conj(a) b."""
    return jnp.vdot(a, b)


@register("aten.addmm.default", "aten.addmv.default", "aten.baddbmm.default")
def addmm(x: Array, a: Array, b: Array, *, beta: Number = 1, alpha: Number = 1) -> Array:
    """beta x + alpha a b; with beta = 0, x does not count at all."""
    product = jnp.matmul(a, b)
    product = product if alpha == 1 else alpha * product
    if beta == 0:
        return product
    return product + (x if beta == 1 else beta * x)


@register("aten.addbmm.default")
def addbmm(x: Array, a: Array, b: Array, *, beta: Number = 1, alpha: Number = 1) -> Array:
    return beta * x + alpha * jnp.sum(jnp.matmul(a, b), 0)


@register("aten.outer.default", "aten.ger.default")
def outer(a: Array, b: Array) -> Array:
    return jnp.outer(a, b)


@register("aten.einsum.default")
def einsum(equation: str, tensors: Sequence[Array], *, path: Sequence[int] | None = None) -> Array:
    return jnp.einsum(equation.replace(" ", ""), *promoted(*tensors))


@register("aten.tensordot.default")
def tensordot(a: Array, b: Array, dims_self: Sequence[int], dims_other: Sequence[int]) -> Array:
    return jnp.tensordot(a, b, (tuple(dims_self), tuple(dims_other)))


@register("aten.bilinear.default")
def bilinear(a: Array, b: Array, weight: Array, bias: Array | None = None) -> Array:
    y = jnp.einsum("...i,oij,...j->...o", a, weight, b)
    return y if bias is None else y + bias


@register("aten.kron.default")
def kron(a: Array, b: Array) -> Array:
    return jnp.kron(a, b)


@register("aten.linalg_inv.default", "aten.inverse.default")
def inv(a: Array) -> Array:
    return jnp.linalg.inv(a)


@register("aten.linalg_cross.default")
def linalg_cross(a: Array, b: Array, *, dim: int = -1) -> Array:
    a, b = jnp.broadcast_arrays(*promoted(a, b))
    return jnp.cross(a, b, axis=dim)


@register("aten.cross.default")
def cross(a: Array, b: Array, dim: int | None = None) -> Array:
    """Along the first dimension of size 3, if none is given."""
    return linalg_cross(a, b, dim=a.shape.index(3) if dim is None else dim)


@register("aten.trace.default")
def trace(x: Array) -> Array:
    return jnp.trace(x)


@register("aten.cdist.default", "aten._cdist_forward.default")
def cdist(a: Array, b: Array, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Distances between the rows of a and those of b; derivative 0 where the distance is 0."""
    return _distance(a[..., :, None, :] - b[..., None, :, :], p)


def _distance(difference: Array, p: float) -> Tensor:
    """The norm along the last dimension. For p = inf each of the largest has the whole derivative, not its share
    (aten/src/ATen/native/cpu/DistanceOpsKernel.cpp, idist_calc)."""
    if p != math.inf:
        return vector_norm(difference, p, [-1])
    fixed = lax.stop_gradient(difference)
    largest, index = jnp.abs(fixed).max(-1), jnp.abs(fixed).argmax(-1, keepdims=True)
    # Computed twice, what is largest may round differently: its place counts too (`reductions.shared`).
    equal = (jnp.abs(fixed) == largest[..., None]) | (jnp.arange(fixed.shape[-1]) == index)
    slopes = jnp.where(equal, jnp.sign(fixed), 0)
    sloped = jnp.sum(slopes * difference, -1)
    return largest + jnp.where(jnp.isfinite(sloped), sloped - lax.stop_gradient(sloped), 0)


@register("aten.pdist.default", "aten._pdist_forward.default")
def pdist(x: Array, p: float = 2.0) -> Tensor:
    """Distances between every two rows, as `cdist` has them above its diagonal."""
    first, second = jnp.triu_indices(len(x), 1)
    return _distance(x[first] - x[second], p)


@register("aten.dist.default")
def dist(a: Array, b: Array, p: float = 2.0) -> Tensor:
    """The norm of the difference, derivative 0 where it is 0."""
    return vector_norm(a - b, p)
