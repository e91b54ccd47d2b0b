"""Means over true examples: a mean in two parts, and a last batch filled up so that its true examples are marked."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Float, PyTree, Shaped


class Mean(NamedTuple):
    """A mean kept as its two parts, so that means over unequal parts add up: total / count.

    A loss function gives its loss and its metrics as `Mean`s where parts of the batch may hold unequal numbers of true
    examples. `train_step` adds totals and counts over microbatches and replicas, and divides once.

    **Attributes:**

    - `total`: the sum of the values, a floating scalar.
    - `count`: how many they are, a floating scalar.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]  # type: ignore[assignment]

    @classmethod
    def of(cls, values: Shaped[Array, "..."], mask: Bool[Array, "..."] | None = None) -> "Mean":
        """The mean of the values where `mask` holds; of all without one.

        **Arguments:**

        - `values`: an array; it is summed in at least float32.
        - `mask`: which values count. Its axes are the leading axes of `values`, each as long or 1. What stands
          elsewhere may be infinite or no number: it has no part in any derivative.

        **Returns:** the `Mean`, of shapes ().

        **Raises:**

        - `TypeError`: for what are no arrays.
        - `ValueError`: for a mask that does not fit.
        """
        values = check.array("values", values)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if mask is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))
        mask = check.array("mask", mask).astype(bool)
        leading = values.shape[: mask.ndim]
        if mask.ndim > values.ndim or any(m not in (1, n) for m, n in zip(mask.shape, leading, strict=True)):
            raise ValueError(f"mask of shape {mask.shape} has not the leading axes of the values, {values.shape}")
        mask = jnp.broadcast_to(jnp.reshape(mask, mask.shape + (1,) * (values.ndim - mask.ndim)), values.shape)
        # Not values * mask: what stands in padded entries may be inf or nan, and so may its derivative.
        return cls(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask.astype(values.dtype)))

    @classmethod
    def taken(cls, name: str, value: Any, size: int) -> "Mean":
        """What a loss function gave, as a `Mean` in at least float32: what `train_step` adds up.

        **Arguments:**

        - `name`: what a message calls the value.
        - `value`: a `Mean`, or a scalar: the mean over `size` examples.
        - `size`: the number of examples of the batch.

        **Returns:** the `Mean`; no derivative flows through the count of one that was given.

        **Raises:**

        - `TypeError`: for what is no array of numbers (JAX's own).
        - `ValueError`: for an array that is no scalar.
        """
        if isinstance(value, Mean):
            dtype = jnp.promote_types(value.total.dtype, jnp.float32)
            return Mean(value.total.astype(dtype), jax.lax.stop_gradient(jnp.asarray(value.count, dtype)))
        value = jnp.asarray(value)
        if value.ndim:
            raise ValueError(f"{name!r} is a scalar, the mean over the batch, or a Mean; got shape {value.shape}")
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        return Mean(value * size, jnp.asarray(size, value.dtype))


def pad_batch(batch: Mapping[str, Any], size: int, mask: str = "mask") -> dict[str, Any]:
    """The batch repeated up to `size` examples, with an entry that marks the true ones.

    Padding is made of true examples, not zeros, so that what is computed for it stays ordinary numbers. Feed the mask
    to `Mean.of` and to the BatchNorm layers.

    **Arguments:**

    - `batch`: a mapping of names to arrays, examples along the first axes.
    - `size`: the number of examples to come to.
    - `mask`: the name of the entry that marks the true examples.

    **Returns:** a dict of NumPy arrays: the entries of the batch, `size` examples long, and the mask, bool of shape
    (size,).

    **Raises:**

    - `TypeError`: for what is no mapping of names to arrays.
    - `ValueError`: where the batch is empty or larger, its entries differ in length, or have the mask's name; for a
      size that is no whole number.
    """
    check.instance("batch", batch, Mapping, "a mapping of names to arrays")
    check.arrays("batch", dict(batch))
    check.instance("mask", mask, str, "the name of an entry")
    size = check.whole("size", size, least=1)
    if mask in batch:
        raise ValueError(f"the batch has an entry {mask!r} already; name another with mask=")
    count = batch_size(batch)
    if not 0 < count <= size:
        raise ValueError(f"a batch of {count} examples cannot be padded to {size}")
    padded = {name: np.resize(np.asarray(x), (size, *np.shape(x)[1:])) for name, x in batch.items()}
    return {**padded, mask: np.arange(size) < count}


def batch_size(batch: PyTree) -> int:
    """The number of examples; every entry of a batch has them along its first axis."""
    sizes = {int(x.shape[0]) if getattr(x, "ndim", 0) else -1 for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(
            "the entries of a batch have the examples along their first axis; got the first lengths "
            f"{jax.tree.map(lambda x: x.shape[0] if getattr(x, 'ndim', 0) else 'scalar', batch)}"
        )
    return sizes.pop()
