"""Batch renormalisation: a batch's statistics, corrected towards the running statistics that eval will use.

    xhat = (x - mu_B) / sigma_B * r + d
    r = clip(sigma_B / sigma, 1 / r_max, r_max),   d = clip((mu_B - mu) / sigma, -d_max, d_max)

mu_B and sigma_B = sqrt(var_B + epsilon) are the batch's, with the biased variance; mu and sigma = sqrt(var + epsilon)
are the running statistics as they are before this batch. r and d have no derivative (Ioffe, "Batch Renormalization:
Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017, https://arxiv.org/abs/1702.03275, algorithm 1).
Without limits xhat is (x - mu) / sigma, what eval computes; with `r_max=1, d_max=0` it is BatchNorm's.

Keras 2's `BatchNormalization(renorm=True)` has the same formula for xhat (`_renorm_correction_and_moments` in
tensorflow/python/keras/layers/normalization/batch_normalization.py), and differs in what it tracks: it averages
standard deviations sqrt(var_B + epsilon) where the layers here average variances (unbiased ones, as PyTorch), its mu
and sigma are a second pair of averages with a momentum of their own (`renorm_momentum`), and it clips only what
`renorm_clipping` names. The paper averages standard deviations too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Float, Inexact, Shaped
from jaxnorm.moments import Statistics

R_MAX, D_MAX = 3.0, 5.0  # what section 4 of the paper ends with

Limit = Any  # a number, or a scalar of real numbers, which may be traced


class Renorm(NamedTuple):
    """The running statistics that a batch is corrected towards, and how far."""

    mean: Float[Array, "..."]
    var: Float[Array, "..."]
    r_max: Float[Array, "..."]
    d_max: Float[Array, "..."]

    def as_wide(self, shape: Sequence[int]) -> "Renorm":
        """Each array as wide as the input, its reduced axes 1 wide: that is `shape`."""
        ones = [1] * len(shape)
        return Renorm(
            self.mean.reshape(shape), self.var.reshape(shape), self.r_max.reshape(ones), self.d_max.reshape(ones)
        )

    def corrected(
        self, found: Statistics, scale: Float[Array, "..."] | None, bias: Float[Array, "..."] | None, epsilon: float
    ) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
        """The scale and bias to apply to (x - mu_B) / sigma_B: scale r, and bias + scale d."""
        inverse = lax.rsqrt(self.var + epsilon)
        r = jnp.clip(inverse / found.inverse, 1 / self.r_max, self.r_max)
        d = jnp.clip(((found.shift - self.mean) + found.delta) * inverse, -self.d_max, self.d_max)
        r, d = lax.stop_gradient((r, d))
        if scale is not None:
            r, d = r * scale, d * scale
        return r, d if bias is None else bias + d


def limit(name: str, value: Limit, least: int | float) -> Limit:
    """`value` as it is: a number from `least` on, or a scalar array, whose value is looked at where it is known.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, jax.Array | np.ndarray):
        if value.shape != () or not (jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.kind in "iu"):
            raise ValueError(
                f"{name} is a number, or a scalar of real numbers; got one of shape {value.shape} and {value.dtype}"
            )
        if isinstance(value, jax.core.Tracer):
            return value
        check.number(name, value.item(), least=least)
        return value
    return check.number(name, value, least=least)


def renorm(
    x: Shaped[Array, "..."],
    mean: Float[Array, "*channels"],
    var: Float[Array, "*channels"],
    r_max: Limit,
    d_max: Limit,
) -> Renorm:
    """What corrects the statistics of a batch `x`.

    Raises:
        ValueError: for limits that are none, and complex input.
    """
    if jnp.iscomplexobj(x):
        raise ValueError(f"x is {x.dtype}: batch renormalisation clips d, and complex numbers have no order")
    limits = limit("r_max", r_max, 1), limit("d_max", d_max, 0)
    return Renorm(mean, var, *(jnp.asarray(value, mean.dtype) for value in limits))
