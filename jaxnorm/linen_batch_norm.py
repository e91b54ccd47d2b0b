"""BatchNorm for Flax Linen: parameters, running statistics and flags. The mathematics is in `_batch_norm.py`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from jaxnorm import _checks as check
from jaxnorm._batch_norm import Activation, normalize, with_batch_statistics
from jaxnorm._typing import Array, Bool, Shaped
from jaxnorm.moments import reduced_axes
from jaxnorm.running_statistics import one_more, update_running

_ENTRIES = (("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with exact statistics over replicas, and all that PyTorch's BatchNorm and SyncBatchNorm
    do.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias)

    Attributes, defaults, variables ('scale' and 'bias' in 'params', 'mean' and 'var' in 'batch_stats') and dtype
    promotion are those of `flax.linen.BatchNorm`, so that it takes its place and loads its checkpoints. What differs is
    what differs in `jaxnorm.nnx.BatchNorm`. With `momentum=None` or `count_batches=True` 'batch_stats' also holds
    'num_batches_tracked'.

    Note on momentum: `momentum=0.9` here is `momentum=0.1` in PyTorch.

    **Arguments:**

    - `use_running_average`: whether to normalise with the running statistics (eval) or the batch's (training); here or
      in the call.
    - `axis`: the channels' axis; PyTorch's is 1.
    - `momentum`: the share of the running statistics that is kept; None averages all batches alike, as in PyTorch.
    - `epsilon`: added to the variance.
    - `dtype`, `param_dtype`, `use_bias`, `use_scale`, `bias_init`, `scale_init`: as in `flax.linen.BatchNorm`.
    - `axis_name`, `axis_index_groups`: as in `jaxnorm.nnx.BatchNorm`.
    - `use_fast_variance`: Flax's field; it has no effect: statistics are exact at no more cost.
    - `force_float32_reductions`: False only sets the dtype that running statistics are kept in (`param_dtype`): they
      are computed in at least float32.
    - `correction`: subtracted from the count in the running variance.
    - `track_running_stats`: False, as in PyTorch, keeps no running statistics and normalises with the batch's in eval
      too.
    - `count_batches`: whether to count the batches in `num_batches_tracked`, as PyTorch does. With `momentum=None` they
      are.
    - `activation`: applied to the output; the backward pass recomputes its input.
    - `parent`, `name`: Flax's own.

    **Raises:** when called, `TypeError`, `ValueError` for attributes that are none, naming the attribute.
    """

    momentum: int | float | None = 0.99  # type: ignore[assignment]
    correction: int | float = 1
    track_running_stats: bool = True
    count_batches: bool = False
    activation: Activation | None = None

    @nn.compact
    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Shaped[Array, "..."]:
        """Normalises `x`, and in training updates the running statistics (not during `init`, as in Flax).

        **Arguments:**

        - `x`: the input, channels along `axis`.
        - `use_running_average`: as at construction; one of the two must be given.
        - `mask`: which values count towards the statistics, broadcastable to `x`; those that do not may be infinite or
          no numbers.

        **Returns:** the normalised input, in its shape and in the dtype that Flax promotes input and parameters to, or
        `dtype`.

        **Raises:** each with the layer's path in its notes, where it has one:

        - `TypeError`: for attributes and arguments of another kind.
        - `ValueError`: for one value per channel in training, shapes that do not fit, groups that do not fit the
          replicas, and where `use_running_average` is given neither at construction nor here, or in both places.
        - `NameError`: if `axis_name` is not bound where the layer is called.
        """
        return self._called(x, use_running_average, mask)

    @nn.nowrap
    def _called(self, x: Any, use_running_average: Any, mask: Any, renorm: Any = None) -> Any:
        """What a call gives; `renorm(x, mean, var)` is what corrects the batch's statistics in training, if any."""
        fields = (field.name for field in dataclasses.fields(self) if field.name not in ("parent", "name"))
        check.layer({name: getattr(self, name) for name in fields})
        x = check.array("x", x)
        if use_running_average is not None:
            check.flag("use_running_average", use_running_average)
        eval_mode = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        reduced = reduced_axes(x.ndim, self.axis)
        channels = tuple(n for a, n in enumerate(x.shape) if a not in reduced)
        for collection, name in _ENTRIES:
            shape = jnp.shape(self.get_variable(collection, name)) if self.has_variable(collection, name) else channels
            if shape != channels:
                error = ValueError(
                    f"{name} has shape {shape}, expected {channels}: input {x.shape} with axis={self.axis!r}"
                )
                error.add_note(self._described())
                raise error
        kept_dtype = self.param_dtype
        if self.force_float32_reductions:  # at least float32; float64 parameters have float64 statistics
            kept_dtype = jnp.promote_types(jnp.finfo(self.param_dtype).dtype, jnp.float32)
        running = {}
        if self.track_running_stats:
            running["mean"] = self.variable("batch_stats", "mean", jnp.zeros, channels, kept_dtype)
            running["var"] = self.variable("batch_stats", "var", jnp.ones, channels, kept_dtype)
            if self.count_batches or self.momentum is None:
                running["num_batches_tracked"] = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), int)
        # Loaded variables may be NumPy's.
        scale = (
            jnp.asarray(self.param("scale", self.scale_init, channels, self.param_dtype)) if self.use_scale else None
        )
        bias = jnp.asarray(self.param("bias", self.bias_init, channels, self.param_dtype)) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(*(v for v in (x, scale, bias) if v is not None), dtype=self.dtype)
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "activation": self.activation,
            "dtype": dtype,
        }
        starting = self.is_initializing()
        kept = {name: jnp.asarray(variable.value) for name, variable in running.items()}
        try:
            if running and (eval_mode or (starting and x.size == math.prod(channels))):
                return normalize(x, kept["mean"], kept["var"], scale, bias, **options)
            y, moments = with_batch_statistics(
                x,
                scale,
                bias,
                kept.get("mean"),
                axis_name=None if starting else self.axis_name,
                axis_index_groups=None if starting else self.axis_index_groups,
                renorm=None if renorm is None or starting else renorm(x, kept["mean"], kept["var"]),
                **options,
            )
        except (NameError, TypeError, ValueError) as error:
            error.add_note(self._described())
            raise
        if running and not eval_mode and not starting:
            count = None
            if "num_batches_tracked" in running:
                count = running["num_batches_tracked"].value = one_more(kept["num_batches_tracked"])
            mean, var = update_running(kept["mean"], kept["var"], moments, self.momentum, self.correction, count)
            if not self.force_float32_reductions:
                mean, var = mean.astype(kept_dtype), var.astype(kept_dtype)
            running["mean"].value, running["var"].value = mean, var
        return y

    def _described(self) -> str:
        path = "/".join(self.path)
        return f"in BatchNorm layer {path!r}" if path else "in the model itself, a BatchNorm layer"
