"""BatchNorm with everything fixed, for Flax NNX: no array of it trains or moves."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxnorm import _checks as check
from jaxnorm._batch_norm import Activation
from jaxnorm._typing import Array, Bool, Shaped
from jaxnorm.nnx_batch_norm import BatchNorm


class Frozen(nnx.Variable[Any]):
    """A parameter that does not train: `requires_grad=False` in PyTorch. What `interop.freeze` makes of one."""


class FrozenBatchNorm(BatchNorm):
    """BatchNorm whose scale, bias and statistics are fixed: the same in training and eval, in every batch.

        y = activation(x * s + (bias - mean * s)),   s = scale / sqrt(var + epsilon)

    as `torchvision.ops.FrozenBatchNorm2d` and detectron2's class of that name compute it. `scale` and `bias` are
    `interop.Frozen` variables, `mean` and `var` are `nnx.BatchStat`: an
    optimizer of `nnx.Param` sees none of them, and no call moves them. `model.train()`, `model.eval()` and
    `use_running_average` make no difference. State dicts have `weight`, `bias`, `running_mean` and `running_var`, and
    no `num_batches_tracked`.

    A layer that `jaxnorm.convert_frozen_batchnorm` made of another keeps that one's counter, which stands still, so
    that the model's state dict has the same entries as before.

    **Arguments:**

    - `num_features`: the number of channels.
    - `axis`: the channels' axis; PyTorch's is 1.
    - `epsilon`: added to the variance.
    - `dtype`, `param_dtype`, `use_bias`, `use_scale`, `promote_dtype`, `activation`: as in `jaxnorm.nnx.BatchNorm`.
    - `rngs`: not needed; taken so that the layer can stand where another is built.

    **Raises:** `TypeError` and `ValueError` for options that are none, and shapes that do not fit.
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        activation: Activation | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        if rngs is not None:
            check.instance("rngs", rngs, nnx.Rngs | nnx.RngStream, "a flax.nnx.Rngs")
        super().__init__(
            num_features,
            use_running_average=True,
            axis=axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            promote_dtype=promote_dtype,
            activation=activation,
            rngs=nnx.Rngs(0),
        )
        for name in ("scale", "bias"):
            if (variable := getattr(self, name)) is not None:
                setattr(self, name, Frozen(variable.get_value(), **variable.get_metadata()))
        # Set by convert_frozen_batchnorm: what revert_frozen_batchnorm goes back to.
        self.before_freeze: tuple[type, tuple[tuple[str, type], ...]] | None = None

    @property
    def use_running_average(self) -> bool:
        """True. What is set is the mode that the layer has once it is no longer frozen."""
        return True

    @use_running_average.setter
    def use_running_average(self, value: bool | None) -> None:
        vars(self)["use_running_average"] = value

    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        axis: int | Sequence[int] | None = None,
    ) -> Shaped[Array, "..."]:
        """Normalises `x` with the layer's own statistics.

        **Arguments:**

        - `x`: the input, channels along `axis`.
        - `use_running_average`: True or False, which makes no difference.
        - `mask`: as for `jaxnorm.nnx.BatchNorm`: values that do not count may be infinite or no numbers.
        - `axis`: takes precedence over the layer's own.

        **Returns:** an array of the shape of `x`, in the layer's `dtype`.

        **Raises:** `TypeError`, `ValueError` for what is no array or flag, and for shapes that do not fit.
        """
        if use_running_average is not None:
            check.flag("use_running_average", use_running_average)
        return self._called(x, True, mask, axis)
