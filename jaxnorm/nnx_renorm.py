"""Batch renormalisation for Flax NNX. The mathematics is in `renorm.py`."""

from collections.abc import Sequence
from typing import Any

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Shaped
from jaxnorm.nnx_batch_norm import BatchNorm
from jaxnorm.renorm import D_MAX, R_MAX, Limit, limit, renorm


class BatchRenorm(BatchNorm):
    """`jaxnorm.nnx.BatchNorm` whose training is corrected towards what eval computes: batch renormalisation.

        y = activation(((x - mu_B) / sigma_B * r + d) * scale + bias)
        r = clip(sigma_B / sigma, 1 / r_max, r_max),   d = clip((mu_B - mu) / sigma, -d_max, d_max)

    mu_B and sigma_B = sqrt(var_B + epsilon) are the batch's over all replicas, mu and sigma = sqrt(var + epsilon) the
    running statistics before this batch; r and d have no derivative (Ioffe, 2017, https://arxiv.org/abs/1702.03275). In
    eval it is BatchNorm, and so it is in training with `r_max=1, d_max=0`. Variables, running statistics, masks and
    replicas are those of `jaxnorm.nnx.BatchNorm`, and state dicts have its names.

    **Schedules.** Running statistics that start at 0 and 1 say nothing of the data: the paper trains with `r_max=1,
    d_max=0` at first (5000 steps), and then lets r_max grow to 3 in 35000 steps and d_max to 5 in 20000. Limits given
    in the call may be traced scalars, of an `optax` schedule for instance:

    >>> y = layer(x, r_max=optax.linear_schedule(1.0, 3.0, 35_000, 5_000)(step),
    ...           d_max=optax.linear_schedule(0.0, 5.0, 20_000, 5_000)(step))

    What Keras 2's `renorm=True` does otherwise is in `renorm.py`.

    **Arguments:**

    - `num_features`: the number of channels.
    - `r_max`: the largest r, and 1 over the smallest; 1 or more.
    - `d_max`: the largest |d|; 0 or more.
    - `**options`: all others of `jaxnorm.nnx.BatchNorm`, but `track_running_stats`, which is True.

    **Raises:** `TypeError` and `ValueError` for options that are none, complex input, one value per channel in
    training, or shapes that do not fit; `NameError` if `axis_name` is not bound where the layer is called.
    """

    def __init__(self, num_features: int, *, r_max: int | float = R_MAX, d_max: int | float = D_MAX, **options: Any):
        check.number("r_max", r_max, least=1)
        check.number("d_max", d_max, least=0)
        if "track_running_stats" in options and not check.flag("track_running_stats", options["track_running_stats"]):
            raise ValueError("track_running_stats is True: batch renormalisation corrects towards running statistics")
        super().__init__(num_features, **options)
        self.r_max, self.d_max = r_max, d_max

    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        axis: int | Sequence[int] | None = None,
        r_max: Limit | None = None,
        d_max: Limit | None = None,
    ) -> Shaped[Array, "..."]:
        """Normalises `x`, and in training updates the running statistics.

        **Arguments:**

        - `x`, `use_running_average`, `mask`, `axis`: as for `jaxnorm.nnx.BatchNorm`.
        - `r_max`, `d_max`: take precedence over the layer's own: numbers, or scalars that may be traced.

        **Returns:** an array of the shape of `x`, in the layer's `dtype`.

        **Raises:** as the class says.
        """
        r_max = limit("r_max", self.r_max if r_max is None else r_max, 1)
        d_max = limit("d_max", self.d_max if d_max is None else d_max, 0)
        return self._called(x, use_running_average, mask, axis, lambda x, mean, var: renorm(x, mean, var, r_max, d_max))
