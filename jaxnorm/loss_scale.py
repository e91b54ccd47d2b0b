"""Loss scaling for float16: the factor that keeps small gradients from vanishing, and how it moves."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxnorm._typing import Array, Bool, Float, Int


class LossScale(NamedTuple):
    """State of dynamic loss scaling, by the rule of `torch.amp.GradScaler`."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]  # since the scale last changed

    @classmethod
    def dynamic(cls, initial: float = 2.0**16) -> "LossScale":
        """Halved at every overflow, doubled after 2000 steps without one."""
        return cls(jnp.asarray(initial, jnp.float32), jnp.zeros((), jnp.int32))

    def update(self, finite: Bool[Array, ""], interval: int = 2000) -> "LossScale":
        """The scale for the next step."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        scale = jnp.where(finite, jnp.where(good >= interval, self.scale * 2, self.scale), self.scale * 0.5)
        return LossScale(scale, jnp.where(good >= interval, 0, good))
