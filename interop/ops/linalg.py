"""Factorisations and solutions of linear systems. Batches of matrices in the last two dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from interop.ops.registry import register


def _info(a: Array) -> Array:
    """LAPACK's report, 0: success. What fails gives nan here."""
    return jnp.zeros(a.shape[:-2], jnp.int32)


def _lu(a: Array) -> tuple[Array, Array]:
    lu, pivots, _ = lax.linalg.lu(a)
    return lu, pivots + 1  # LAPACK counts rows from 1


@register("aten._linalg_det.default")
def det(a: Array) -> tuple[Array, Array, Array]:
    return jnp.linalg.det(a), *_lu(a)


@register("aten._linalg_slogdet.default")
def slogdet(a: Array) -> tuple[Array, Array, Array, Array]:
    return *jnp.linalg.slogdet(a), *_lu(a)


@register("aten.linalg_inv_ex.default")
def inv_ex(a: Array, *, check_errors: bool = False) -> tuple[Array, Array]:
    return jnp.linalg.inv(a), _info(a)


@register("aten._linalg_solve_ex.default")
def solve_ex(a: Array, b: Array, *, left: bool = True, check_errors: bool = False) -> tuple[Array, Array, Array, Array]:
    """a x = b, or x a = b. b holds vectors if it has a dimension less than a, or the shape of a batch of vectors."""
    vectors = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    columns = b[..., None] if vectors else b
    x = jnp.linalg.solve(a, columns) if left else jnp.linalg.solve(a.mT, columns.mT).mT
    return x[..., 0] if vectors else x, *_lu(a), _info(a)


@register("aten.linalg_cholesky_ex.default")
def cholesky_ex(a: Array, *, upper: bool = False, check_errors: bool = False) -> tuple[Array, Array]:
    return cholesky(a, upper), _info(a)


@register("aten.cholesky.default")
def cholesky(a: Array, upper: bool = False) -> Array:
    lower = jnp.linalg.cholesky(a)
    return lower.mT.conj() if upper else lower


@register("aten.linalg_solve_triangular.default")
def solve_triangular(a: Array, b: Array, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Array:
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))
    return lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@register("aten.linalg_householder_product.default")
def householder_product(x: Array, tau: Array) -> Array:
    """The first columns of H_1 H_2 ... H_k, H_i = 1 - tau_i v_i v_i^H; v_i is 1 at i, and below x's column i.

    Written out, since LAPACK's has no derivative in JAX.
    """
    rows, columns = x.shape[-2:]
    vectors = jnp.tril(x, -1) + jnp.eye(rows, columns, dtype=x.dtype)
    reflectors = jnp.moveaxis(vectors[..., : tau.shape[-1]], -1, 0), jnp.moveaxis(tau, -1, 0)

    def reflect(q: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        v, scale = one
        projected = jnp.einsum("...r,...rc->...c", v.conj(), q)
        return q - scale[..., None, None] * v[..., :, None] * projected[..., None, :], None

    start = jnp.broadcast_to(jnp.eye(rows, columns, dtype=x.dtype), x.shape)
    return lax.scan(reflect, start, reflectors, reverse=True)[0]


@register("aten.linalg_qr.default")
def qr(a: Array, mode: str = "reduced") -> tuple[Array, Array]:
    if mode == "r":
        return jnp.zeros((0,), a.dtype), jnp.linalg.qr(a, mode="r")
    return tuple(jnp.linalg.qr(a, mode=mode))


@register("aten._linalg_eigh.default")
def eigh(a: Array, uplo: str = "L", compute_v: bool = True) -> tuple[Array, Array]:
    """Of the triangle that `uplo` names. The derivative is symmetric, as PyTorch's is."""
    triangle = jnp.tril(a) if uplo == "L" else jnp.triu(a)
    diagonal = jnp.eye(a.shape[-1], dtype=bool)
    whole = a + lax.stop_gradient(jnp.where(diagonal, a, triangle + triangle.mT.conj()) - a)
    if not compute_v:
        return jnp.linalg.eigvalsh(whole), jnp.zeros((0,), a.dtype)
    return tuple(jnp.linalg.eigh(whole))


@register("aten._linalg_svd.default")
def svd(
    a: Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Array, Array, Array]:
    if compute_uv:
        return tuple(jnp.linalg.svd(a, full_matrices=full_matrices))
    nothing = jnp.zeros((0,), a.dtype)
    return nothing, jnp.linalg.svd(a, compute_uv=False), nothing


@register("aten.linalg_matrix_exp.default")
def matrix_exp(a: Array) -> Array:
    return jax.scipy.linalg.expm(a)
