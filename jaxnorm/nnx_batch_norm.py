"""BatchNorm for Flax NNX: parameters, running statistics and flags. The mathematics is in `_batch_norm.py`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers

from jaxnorm import _checks as check
from jaxnorm._batch_norm import Activation, normalize, with_batch_statistics
from jaxnorm._typing import Array, Bool, Shaped
from jaxnorm.collectives import AxisName
from jaxnorm.running_statistics import one_more, update_running

_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()

Args = TypeVar("Args", bound=tuple[Any, ...])


def input_dtype(args: Args, /, *, dtype: Any = None, inexact: bool = True) -> Args:
    """For `promote_dtype`: the output keeps the input's dtype (or takes `dtype`) as in PyTorch, not the parameters'.

    ```python
    jaxnorm.nnx.BatchNorm(64, promote_dtype=jaxnorm.nnx.input_dtype, rngs=rngs)
    ```

    **Arguments:** as Flax gives them (`flax.nnx.nn.dtypes.promote_dtype`):

    - `args`: the input, and after it statistics and parameters.
    - `dtype`: the layer's `dtype`; None for the input's own.
    - `inexact`: of Flax's signature; it has no effect.

    **Returns:** `args`, its first entry as an array of that dtype, the others as they are.

    **Raises:** nothing of its own.
    """
    x, *rest = args
    return (jnp.asarray(x, dtype), *rest)  # type: ignore[return-value]


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with exact statistics over replicas, and all that PyTorch's BatchNorm and SyncBatchNorm do.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias)

    In training `mean` and `var` (biased) are those of the batch over all replicas of `axis_name`; in eval they are the
    running statistics, which a call in training moves:

        mean <- momentum * mean + (1 - momentum) * batch mean
        var  <- momentum * var  + (1 - momentum) * m2 / (count - correction)

    Fields, defaults, variable names and dtype promotion are Flax's, so that it takes the place of `flax.nnx.BatchNorm`
    and loads its checkpoints. What differs:

    - the running variance is unbiased as in PyTorch; `correction=0` tracks the biased one as Flax does;
    - statistics are exact at any mean, at the cost of Flax's `use_fast_variance=True`;
    - eval with a bfloat16 input does not round the running statistics to bfloat16.

    Note on momentum: `momentum=0.9` here is `momentum=0.1` in PyTorch.

    The variables `scale` and `bias` are `nnx.Param`s; `mean`, `var` and `num_batches_tracked` are `nnx.BatchStat`s, of
    shape (num_features,) and (), the statistics in at least float32.

    **Arguments:**

    - `num_features`: the number of channels.
    - `use_running_average`: whether to normalise with the running statistics (eval) or the batch's (training).
    - `axis`: the channels' axis; PyTorch's is 1.
    - `momentum`: the share of the running statistics that is kept; None averages all batches alike, as in PyTorch.
    - `epsilon`: added to the variance.
    - `dtype`, `param_dtype`, `use_bias`, `use_scale`, `bias_init`, `scale_init`, `bias_metadata`, `scale_metadata`: as
      in `flax.nnx.BatchNorm`.
    - `promote_dtype`: as in `flax.nnx.BatchNorm`; `promote_dtype=jaxnorm.nnx.input_dtype` makes the output keep the
      input's dtype, as in PyTorch.
    - `use_fast_variance`: Flax's field; it has no effect.
    - `axis_name`: the axis of `pmap`, `shard_map` or `vmap` over which replicas share statistics. None under `jit` with
      sharded arrays: there the statistics are those of the whole batch.
    - `axis_index_groups`: groups of replicas that share statistics, `[[0, 1], [2, 3]]`; without an axis name, of equal
      parts of the batch.
    - `correction`: subtracted from the count in the running variance.
    - `track_running_stats`: False, as in PyTorch, keeps no running statistics and normalises with the batch's in eval
      too.
    - `count_batches`: whether to count the batches in `num_batches_tracked`, as PyTorch does. With `momentum=None` they
      are. The counter stops at 2^31 - 1, unless jax_enable_x64 is set.
    - `activation`: applied to the output; the backward pass recomputes its input.
    - `rngs`: for the initializers.

    **Raises:** `TypeError`, `ValueError` for options that are none, naming the option.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: int | float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = _ZEROS,
        scale_init: Any = _ONES,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        correction: int | float = 1,
        track_running_stats: bool = True,
        count_batches: bool = False,
        activation: Activation | None = None,
    ) -> None:
        flax_fields: dict[str, Any] = {
            "use_running_average": use_running_average,
            "axis": axis,
            "momentum": momentum,
            "epsilon": epsilon,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "use_bias": use_bias,
            "use_scale": use_scale,
            "bias_init": bias_init,
            "scale_init": scale_init,
            "axis_name": axis_name,
            "axis_index_groups": check.groups(axis_index_groups),
            "use_fast_variance": use_fast_variance,
            "promote_dtype": promote_dtype,
            "bias_metadata": bias_metadata,
            "scale_metadata": scale_metadata,
        }
        more = {
            "correction": correction,
            "track_running_stats": track_running_stats,
            "count_batches": count_batches,
            "activation": activation,
        }
        check.layer({**flax_fields, **more})
        check.whole("num_features", num_features)
        if use_bias or use_scale:
            check.instance("rngs", rngs, nnx.Rngs | nnx.RngStream, "a flax.nnx.Rngs")
        super().__init__(num_features, **flax_fields, rngs=rngs)
        none: Any = nnx.data(None)
        if track_running_stats:
            kept = jnp.promote_types(param_dtype, jnp.float32)
            self.mean = nnx.BatchStat(jnp.zeros(num_features, kept))
            self.var = nnx.BatchStat(jnp.ones(num_features, kept))
        else:
            self.mean, self.var = none, none
        counts = track_running_stats and (count_batches or momentum is None)
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), int)) if counts else none
        self.correction = correction
        self.track_running_stats = track_running_stats
        self.activation = activation
        # Set by convert_sync_batchnorm: the layer's path, for errors, and what revert_sync_batchnorm goes back to.
        self.layer_name: str | None = None
        self.before_sync: tuple[type, AxisName | None, Any] | None = None

    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        axis: int | Sequence[int] | None = None,
    ) -> Shaped[Array, "..."]:
        """Normalises `x`, and in training updates the running statistics.

        **Arguments:**

        - `x`: the input, channels along `axis`.
        - `use_running_average`: takes precedence over the layer's own.
        - `mask`: which values count towards the statistics, broadcastable to `x`; those that do not may be infinite or
          no numbers.
        - `axis`: takes precedence over the layer's own.

        **Returns:** the normalised input, in its shape and in the dtype that `promote_dtype` makes of input, statistics
        and parameters, or `dtype`.

        **Raises:** each with the layer in its message or notes:

        - `TypeError`: for arguments of another kind.
        - `ValueError`: for one value per channel in training, shapes that do not fit, groups that do not fit the
          replicas, and where neither the layer nor the call says which statistics to use.
        - `NameError`: if `axis_name` is not bound where the layer is called.
        """
        return self._called(x, use_running_average, mask, axis)

    def _called(self, x: Any, use_running_average: Any, mask: Any, axis: Any, renorm: Any = None) -> Any:
        """What a call gives; `renorm(x, mean, var)` is what corrects the batch's statistics in training, if any."""
        x = check.array("x", x)
        eval_mode = self.use_running_average if use_running_average is None else use_running_average
        if eval_mode is not None:
            check.flag("use_running_average", eval_mode)
        else:
            raise ValueError(
                f"{self._described()}: use_running_average is None; give it at construction, in the call, or by "
                "model.train(), model.eval() or nnx.view(model, use_running_average=...)"
            )
        axis = self.axis if axis is None else axis
        mean, var, scale, bias = (None if v is None else v[...] for v in (self.mean, self.var, self.scale, self.bias))
        dtype = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)[0].dtype
        options: dict[str, Any] = {
            "axis": axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "activation": self.activation,
            "dtype": dtype,
        }
        try:
            if eval_mode and mean is not None and var is not None:
                return normalize(x, mean, var, scale, bias, **options)
            y, moments = with_batch_statistics(
                x,
                scale,
                bias,
                mean,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                renorm=None if renorm is None else renorm(x, mean, var),
                **options,
            )
        except (NameError, TypeError, ValueError) as error:
            error.add_note(f"in {self._described()}")
            raise
        if not eval_mode and self.track_running_stats:
            self._track(moments)
        return y

    def _track(self, moments: Any) -> None:
        count = None
        if self.num_batches_tracked is not None:
            count = one_more(self.num_batches_tracked[...])
            write(self.num_batches_tracked, count)
        if self.mean is None or self.var is None or (self.momentum is None and count is None):
            return  # nothing to average by, as in PyTorch
        mean, var = update_running(self.mean[...], self.var[...], moments, self.momentum, self.correction, count)
        write(self.mean, mean.astype(self.mean.dtype))
        write(self.var, var.astype(self.var.dtype))

    def _described(self) -> str:
        name = {None: "BatchNorm layer", "": "the model itself, a BatchNorm layer"}.get(
            self.layer_name, f"BatchNorm layer {self.layer_name!r}"
        )
        return f"{name} ({self.num_features} features)"


def write(variable: Any, value: Any) -> None:
    """`variable[...] = value`, for a value of the variable's shape and dtype.

    Flax asks the value for its sharding, and where that is being traced JAX walks through all of the trace so far to
    word an error that Flax drops: the time to trace a model grew with the square of its layers.
    """
    if isinstance(value, jax.core.Tracer):
        variable.set_value(value)
    else:
        variable[...] = value
