"""Running statistics: the moving average of batch statistics that eval normalises with. PyTorch's and Flax's in one
formula.

    mean <- momentum * mean + (1 - momentum) * batch mean
    var  <- momentum * var  + (1 - momentum) * m2 / (count - correction)

`momentum` is Flax's: the share that is kept (PyTorch's is 1 - momentum). `momentum=None` averages all batches alike, as
PyTorch's does: the share kept is 1 - 1/n after n batches (`torch/nn/modules/batchnorm.py`, `_BatchNorm.forward`).
`correction=1` tracks the unbiased variance as PyTorch does, `correction=0` the biased one as Flax does.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._typing import Array, Float, Inexact, Integer
from jaxnorm.moments import Moments


def one_more(num_batches: Integer[Array, ""]) -> Integer[Array, ""]:
    """The number of batches tracked, this one included. It ends at the largest that its dtype holds.

    That is 2^31 - 1 unless jax_enable_x64 is set; PyTorch's int64 goes on. Where `momentum=None`, all further batches
    weigh as that one: less than float32 resolves.
    """
    return jnp.where(num_batches < jnp.iinfo(num_batches.dtype).max, num_batches + 1, num_batches)


@partial(jax.jit, static_argnames=("momentum", "correction"))
def update_running(
    mean: Inexact[Array, "*channels"],
    var: Float[Array, "*channels"],
    batch: Moments,
    momentum: int | float | None,
    correction: int | float,
    num_batches: Integer[Array, ""] | None,
) -> tuple[Inexact[Array, "*channels"], Float[Array, "*channels"]]:
    """The running mean and variance after one more batch, in at least float32.

    A batch in which nothing counts leaves both as they were, and one with no more values than `correction` has no
    variance to add. Derivatives do not flow into running statistics, as in PyTorch.

    Args:
        mean, var: the running statistics before this batch.
        batch: the moments of this batch.
        momentum: the share kept, or None for the average over all batches.
        correction: subtracted from the count in the variance's denominator.
        num_batches: the number of batches tracked, this one included. Only needed if `momentum` is None.
    """
    taken: Any = 1 / num_batches if momentum is None and num_batches is not None else 1 - (momentum or 0.0)
    kept: Any = 1 - taken if momentum is None else momentum
    count, batch_mean, batch_var = lax.stop_gradient((batch.count, batch.mean, batch.variance(correction)))
    return (
        jnp.where(count > 0, kept * mean + taken * batch_mean, mean),
        jnp.where(count > correction, kept * var + taken * batch_var, var),
    )
