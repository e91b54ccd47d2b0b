"""Values that know their order of dimensions, so that a traced NCHW model runs with NHWC activations.

`Laid(array, order)` stands for a tensor whose dimension `order[i]` lies on axis `i` of `array`: with `order = (0, 2,
3, 1)` the tensor is (N, C, H, W) to the program and (N, H, W, C) in memory. A convolution yields such values, most
operations pass them on, and `plain` gives the array in the program's order where one is needed: one transpose there,
none between layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from interop.program.guards import Size


@dataclasses.dataclass(frozen=True)
class Laid:
    """An array whose axis i holds the tensor's dimension order[i]."""

    array: jax.Array
    order: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(self.array.shape[axis] for axis in inverse(self.order))

    @property
    def size(self) -> Size:
        """The number of elements: an int, or with a symbolic batch (`jax.export`) an expression of it."""
        return math.prod(self.array.shape)


Tensor = jax.Array | Laid


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The axis of each dimension."""
    axes = [0] * len(order)
    for axis, dim in enumerate(order):
        axes[dim] = axis
    return tuple(axes)


def channels_last(ndim: int) -> tuple[int, ...]:
    """(N, C, spatial...) kept as (N, spatial..., C)."""
    return (0, *range(2, ndim), 1)


def is_tensor(x: object) -> bool:
    """Whether x is a tensor of the program, in whatever order."""
    return isinstance(x, (jax.Array, Laid)) or hasattr(x, "__jax_array__") or type(x).__module__ == "numpy"


def order_of(x: Tensor) -> tuple[int, ...]:
    """The order of x; a plain array has 0, 1, 2, ..."""
    return x.order if isinstance(x, Laid) else tuple(range(x.ndim))


def array_of(x: Tensor) -> jax.Array:
    """The array as it lies in memory."""
    return x.array if isinstance(x, Laid) else x


def laid(array: jax.Array, order: Sequence[int]) -> Tensor:
    """The tensor whose dimension order[i] is axis i of `array`."""
    order = tuple(order)
    return array if order == tuple(range(len(order))) else Laid(array, order)


@overload
def plain(x: Tensor) -> jax.Array: ...
@overload
def plain(x: Any) -> Any: ...
def plain(x: Any) -> Any:
    """x in the program's order; whatever is no tensor as it is, containers item by item."""
    if isinstance(x, Laid):
        return jnp.transpose(x.array, inverse(x.order))
    if isinstance(x, (list, tuple)):
        return type(x)(plain(item) for item in x)
    return x


def arranged(x: Tensor, order: Sequence[int]) -> jax.Array:
    """The array of x with its dimensions in `order`."""
    if order_of(x) == tuple(order):
        return array_of(x)
    axes = inverse(order_of(x))
    return jnp.transpose(array_of(x), tuple(axes[dim] for dim in order))


def axis_of(x: Tensor, dim: int) -> int:
    """The axis of `x`'s array that holds dimension `dim` (negative counts from the end)."""
    return inverse(order_of(x))[normal_dim(dim, x.ndim)]


def normal_dim(dim: int, ndim: int) -> int:
    """`dim` counted from 0; a scalar has one dimension for this purpose, as in PyTorch."""
    count = max(ndim, 1)
    if not -count <= dim < count:
        raise IndexError(f"dimension {dim} of a tensor with {ndim} dimensions")
    return dim % count


def common_order(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The order in which tensors that broadcast together are best combined; None for the program's own."""
    ndim = max((x.ndim for x in tensors), default=0)
    found = [x for x in tensors if isinstance(x, Laid) and x.ndim == ndim]
    # A symbolic dimension, the batch, is the same in all and cannot be compared.
    return max(found, key=lambda x: math.prod(n for n in x.array.shape if isinstance(n, int))).order if found else None


def expanded(x: Tensor, order: Sequence[int]) -> jax.Array:
    """The array of x, broadcast from the left to len(order) dimensions, in `order`. A scalar stays one."""
    if x.ndim == 0:
        return array_of(x)
    if x.ndim < len(order):
        array = plain(x)
        x = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
    return arranged(x, order)


def _counted(x: Any) -> Any:
    """A size with a symbolic batch in it is a number only when the program runs."""
    return jnp.asarray(x) if jax.export.is_symbolic_dim(x) else x


def elementwise(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Calls a function that treats all dimensions alike, with its tensors in one common order."""
    args, kwargs = [_counted(x) for x in args], {key: _counted(x) for key, x in kwargs.items()}
    tensors = [x for x in (*args, *kwargs.values()) if is_tensor(x)]
    order = common_order(tensors)
    if order is None:
        return function(*map(plain, args), **{key: plain(x) for key, x in kwargs.items()})

    def prepare(x: Any) -> Any:
        return expanded(x, order) if is_tensor(x) else x

    result = function(*map(prepare, args), **{key: prepare(x) for key, x in kwargs.items()})
    if isinstance(result, tuple):
        return tuple(laid(x, order) for x in result)
    return laid(result, order)
