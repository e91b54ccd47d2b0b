"""BatchNorm with everything fixed, for Flax Linen: no array of it trains or moves."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from jaxnorm import _checks as check
from jaxnorm._batch_norm import normalize
from jaxnorm._typing import Array, Bool, Shaped
from jaxnorm.linen_batch_norm import BatchNorm
from jaxnorm.moments import reduced_axes


class FrozenBatchNorm(BatchNorm):
    """BatchNorm whose scale, bias and statistics are fixed: the same in training and eval, in every batch.

        y = activation(x * s + (bias - mean * s)),   s = scale / sqrt(var + epsilon)

    as `jaxnorm.nnx.FrozenBatchNorm`. All its variables ('scale', 'bias', 'mean' and 'var') are in 'batch_stats', so
    that no optimizer of 'params' sees them, and no call moves them. Attributes are those of `jaxnorm.linen.BatchNorm`,
    whose place it takes.

    **Arguments:**

    - `axis`: the channels' axis; PyTorch's is 1.
    - `epsilon`: added to the variance.
    - `dtype`, `param_dtype`, `use_bias`, `use_scale`, `activation`: as in `jaxnorm.linen.BatchNorm`.
    - `use_running_average`, `momentum`, `axis_name`, `axis_index_groups`, `correction`: of training; no difference.
    - `use_fast_variance`, `force_float32_reductions`, `track_running_stats`, `count_batches`: likewise.
    - `bias_init`, `scale_init`: likewise; scale begins with 1, bias with 0.
    - `parent`, `name`: Flax's own.

    **Raises:** when called, `TypeError` and `ValueError` for attributes that are none, and shapes that do not fit.
    """

    @nn.compact
    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Shaped[Array, "..."]:
        """Normalises `x` with the layer's own statistics.

        **Arguments:**

        - `x`: the input, channels along `axis`.
        - `use_running_average`: True or False, which makes no difference.
        - `mask`: as for `jaxnorm.linen.BatchNorm`: values that do not count may be infinite or no numbers.

        **Returns:** an array of the shape of `x`, in the layer's `dtype`.

        **Raises:** `TypeError`, `ValueError` for what is no array or flag, and for shapes that do not fit.
        """
        fields = (field.name for field in dataclasses.fields(self) if field.name not in ("parent", "name"))
        check.layer({name: getattr(self, name) for name in fields})
        x = check.array("x", x)
        if use_running_average is not None:
            check.flag("use_running_average", use_running_average)
        reduced = reduced_axes(x.ndim, self.axis)
        channels = tuple(n for a, n in enumerate(x.shape) if a not in reduced)
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        wanted: dict[str, tuple[Any, Any]] = {"mean": (jnp.zeros, wide), "var": (jnp.ones, wide)}
        if self.use_scale:
            wanted["scale"] = jnp.ones, self.param_dtype
        if self.use_bias:
            wanted["bias"] = jnp.zeros, self.param_dtype
        held = {
            name: jnp.asarray(self.variable("batch_stats", name, make, channels, dtype).value)
            for name, (make, dtype) in wanted.items()
        }
        scale, bias = held.get("scale"), held.get("bias")
        dtype = dtypes.canonicalize_dtype(*(v for v in (x, scale, bias) if v is not None), dtype=self.dtype)
        try:
            return normalize(
                x,
                held["mean"],
                held["var"],
                scale,
                bias,
                axis=self.axis,
                epsilon=self.epsilon,
                mask=mask,
                activation=self.activation,
                dtype=dtype,
            )
        except (TypeError, ValueError) as error:
            error.add_note(self._described())
            raise
