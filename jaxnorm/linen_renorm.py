"""Batch renormalisation for Flax Linen. The mathematics is in `renorm.py`."""

from flax import linen as nn

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Shaped
from jaxnorm.linen_batch_norm import BatchNorm
from jaxnorm.renorm import D_MAX, R_MAX, Limit, limit, renorm


class BatchRenorm(BatchNorm):
    """`jaxnorm.linen.BatchNorm` whose training is corrected towards what eval computes: batch renormalisation.

        y = activation(((x - mu_B) / sigma_B * r + d) * scale + bias)
        r = clip(sigma_B / sigma, 1 / r_max, r_max),   d = clip((mu_B - mu) / sigma, -d_max, d_max)

    as `jaxnorm.nnx.BatchRenorm`, whose docstring says what the letters are (Ioffe, 2017,
    https://arxiv.org/abs/1702.03275). Variables are those of `jaxnorm.linen.BatchNorm`.

    **Arguments:**

    - `r_max`: the largest r, and 1 over the smallest; 1 or more.
    - `d_max`: the largest |d|; 0 or more.
    - `track_running_stats`: True.
    - `use_running_average`, `axis`, `momentum`, `epsilon`, `dtype`, `param_dtype`: as in `jaxnorm.linen.BatchNorm`.
    - `use_bias`, `use_scale`, `bias_init`, `scale_init`, `axis_name`, `axis_index_groups`: likewise.
    - `use_fast_variance`, `force_float32_reductions`, `correction`, `count_batches`, `activation`: likewise.
    - `parent`, `name`: Flax's own.

    **Raises:** when called, `TypeError` and `ValueError` for attributes that are none, complex input, one value per
    channel in training, or shapes that do not fit; `NameError` if `axis_name` is not bound where the layer is called.
    """

    r_max: int | float = R_MAX
    d_max: int | float = D_MAX

    @nn.compact
    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        r_max: Limit | None = None,
        d_max: Limit | None = None,
    ) -> Shaped[Array, "..."]:
        """Normalises `x`, and in training updates the running statistics (not during `init`, as in Flax).

        **Arguments:**

        - `x`, `use_running_average`, `mask`: as for `jaxnorm.linen.BatchNorm`.
        - `r_max`, `d_max`: take precedence over the layer's own: numbers, or scalars that may be traced.

        **Returns:** an array of the shape of `x`, in the layer's `dtype`.

        **Raises:** as the class says.
        """
        check.number("r_max", self.r_max, least=1)
        check.number("d_max", self.d_max, least=0)
        if not check.flag("track_running_stats", self.track_running_stats):
            raise ValueError("track_running_stats is True: batch renormalisation corrects towards running statistics")
        r_max = limit("r_max", self.r_max if r_max is None else r_max, 1)
        d_max = limit("d_max", self.d_max if d_max is None else d_max, 0)
        return self._called(x, use_running_average, mask, lambda x, mean, var: renorm(x, mean, var, r_max, d_max))
