"""Checks of values in a model's code, for `jax.experimental.checkify`."""

from __future__ import annotations

from jax import Array
from jax.experimental import checkify

from interop.ops.registry import register


@register("jaxnorm.check.default")
def check(condition: Array, expected: bool, message: str) -> Array:
    """Checks, where the call is transformed by `checkify.checkify`, that the one element of `condition` is as expected.

    Otherwise nothing is checked, and what is computed for it alone is not computed under `jax.jit`.
    """
    text = message.replace("{", "{{").replace("}", "}}")  # it is a format string to checkify
    checkify.debug_check((condition.reshape(()) != 0) == expected, text)
    return condition
