"""Loss scaling for float16: the factor that keeps small gradients from vanishing, and how it moves."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Float, Int


class LossScale(NamedTuple):
    """State of dynamic loss scaling, by the rule of `torch.amp.GradScaler`: for training in float16.

    The loss is multiplied by the scale before it is differentiated, and its gradients are divided by it.
    `TrainState.create` takes one, and `train_step` moves it.

    **Attributes:**

    - `scale`: the factor, a float32 scalar.
    - `good_steps`: the number of steps without an overflow since the scale last changed, an int32 scalar.
    """

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]  # since the scale last changed

    @classmethod
    def dynamic(cls, initial: int | float = 2.0**16) -> "LossScale":
        """The state before the first step. The scale is halved at every overflow, and doubled after 2000 steps without
        one, as long as that is finite.

        **Arguments:**

        - `initial`: the first scale; GradScaler's default is 2^16 too.

        **Returns:** the `LossScale`.

        **Raises:** `ValueError` for an initial scale that is not a finite number above 0 in float32.
        """
        scale = check.number("initial", initial, above=0)
        if not np.finfo(np.float32).smallest_subnormal <= scale <= np.finfo(np.float32).max:
            raise ValueError(f"initial is a number of float32's range; got {initial!r}")
        return cls(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32))

    def update(self, finite: Bool[Array, ""] | bool, interval: int = 2000) -> "LossScale":
        """The scale for the next step, by the rule of `torch._amp_update_scale_`; but a scale whose double is infinite
        stays.

        **Arguments:**

        - `finite`: whether all gradients of this step are finite, a boolean scalar.
        - `interval`: the number of steps without an overflow after which the scale is doubled.

        **Returns:** the `LossScale` after this step.

        **Raises:**

        - `TypeError`: for a `finite` that is no array of numbers or booleans.
        - `ValueError`: for one that is no scalar, and an interval that is not a number of steps.
        """
        interval = check.whole("interval", interval, least=1)
        finite = check.array("finite", finite, shape=()).astype(bool)
        good = jnp.where(finite, self.good_steps + 1, 0)
        grown = jnp.where((good >= interval) & jnp.isfinite(self.scale * 2), self.scale * 2, self.scale)
        return LossScale(jnp.where(finite, grown, self.scale * 0.5), jnp.where(good >= interval, 0, good))
