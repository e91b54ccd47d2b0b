"""The operation: statistics, normalisation, derivatives. Written once, for every way to be parallel.

With an axis name (`pmap`, `shard_map`, `vmap`) each replica sees its own part of the batch, and the sums of
`moments.py` are added up over the replicas. Under `jit` one program sees the whole batch: the same sums are global.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Float, Inexact, Shaped
from jaxnorm.collectives import AxisName, Replicas, axis_size, canonical_groups, under_automatic_sharding
from jaxnorm.moments import (
    SAVED,
    Moments,
    accumulable,
    batch_statistics,
    broadcastable,
    merge_stacked,
    reduced_axes,
    saved,
)
from jaxnorm.renorm import Renorm

SCOPE = "batch_norm"  # the name of a layer's operations in a compiled program, in training
Activation = Callable[[Any], Any]


def batch_norm(
    x: Shaped[Array, "..."],
    scale: Float[Array, "*channels"] | None = None,
    bias: Float[Array, "*channels"] | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: Bool[Array, "..."] | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    shift: Inexact[Array, "*channels"] | None = None,
) -> tuple[Shaped[Array, "..."], Moments]:
    """Normalises `x` with the statistics of its batch, taken over all replicas.

        y = activation((x - mean) / sqrt(m2 / count + epsilon) * scale + bias)

    as `torch.nn.functional.batch_norm(..., training=True)` and `torch.nn.SyncBatchNorm` do (Ioffe & Szegedy, 2015,
    algorithm 1). The statistics and the arithmetic are in at least float32, whatever the input's dtype. All derivatives
    exist, of any order, forward and reverse; the backward pass sends one sum over the replicas, of two numbers for each
    channel.

    ```python
    y, moments = jaxnorm.batch_norm(x, scale, bias)
    running_var = momentum * running_var + (1 - momentum) * moments.variance(correction=1)
    ```

    **Arguments:**

    - `x`: the input, floating or complex, channels along `axis`; all other axes are reduced over. Integers too, where
      `dtype` says what they become.
    - `scale`: one value for each channel, in the order of the axes; None for 1.
    - `bias`: one value for each channel; None for 0.
    - `axis`: the channels' axis, or axes.
    - `epsilon`: added to the variance; a finite number from 0.
    - `axis_name`: the axis (or tuple of axes) of `pmap`, `shard_map` or `vmap` over which replicas share statistics.
      None for this replica alone or, under `jit` with sharded arrays, for the whole batch.
    - `axis_index_groups`: groups of replicas that share statistics, `[[0, 1], [2, 3]]`. Without an axis name (under
      `jit`) the batch is cut into as many equal parts as indices are given, in order, and the groups are groups of
      parts.
    - `mask`: which values count, broadcastable to `x`; all values are normalised.
    - `activation`: applied to the result. The backward pass recomputes its input from `x` instead of keeping it.
    - `dtype`: of the output, floating or complex; by default that of `x`.
    - `shift`: a guess of each channel's mean, about which float32 and float64 input is summed; a layer gives its
      running mean. It changes no result, whatever it is: one that is far off costs a second look
      (`jaxnorm/moments.py`). Where replicas might each have another (`pmap`, `vmap`, check_vma=False) it is not used.

    **Returns:** `(y, moments)`: `y` in the shape of `x`, and the `Moments` that it was normalised with, one value for
    each channel. (Under `jit` with groups, the moments of all groups together.)

    **Raises:**

    - `TypeError`: for arguments that are no arrays, dtypes, functions or names of axes.
    - `ValueError`: if one value for each channel is all there is (its variance is 0 whatever the value), if groups do
      not fit the replicas or the batch, a parameter does not fit the channels, a mask does not broadcast, or a number
      is not finite or out of range.
    - `NameError`: if the axis name is not bound.
    """
    options: dict[str, Any] = {"axis": axis, "epsilon": epsilon, "mask": mask, "activation": activation, "dtype": dtype}
    options |= {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    return with_batch_statistics(x, scale, bias, shift, **options)


def with_batch_statistics(
    x: Shaped[Array, "..."],
    scale: Float[Array, "*channels"] | None,
    bias: Float[Array, "*channels"] | None,
    shift: Inexact[Array, "*channels"] | None,
    *,
    axis: int | Sequence[int],
    epsilon: float,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    mask: Bool[Array, "..."] | None,
    activation: Activation | None,
    dtype: Any,
    renorm: Renorm | None = None,
) -> tuple[Shaped[Array, "..."], Moments]:
    """`batch_norm`, or with `renorm` batch renormalisation; the running statistics in it have one value a channel."""
    named = {"scale": scale, "bias": bias, "shift": shift}
    x, mask, reduced, parameters = _arguments(x, mask, axis, activation, dtype, named)
    epsilon = check.number("epsilon", epsilon, least=0)
    channels = tuple(x.shape[a] for a in range(x.ndim) if a not in reduced)
    if renorm is not None:
        renorm = renorm.as_wide([1 if a in reduced else n for a, n in enumerate(x.shape)])
    arrays = (x, mask, *parameters, renorm)
    axis_index_groups = check.groups(axis_index_groups)
    options: dict[str, Any] = {"epsilon": epsilon, "activation": activation, "dtype": dtype or x.dtype}
    if axis_name is None and axis_index_groups is not None and reduced:
        y, found = _groups_of_parts(arrays, reduced, axis_index_groups, options)
    else:
        groups = canonical_groups(axis_index_groups, axis_size(axis_name)) if axis_name is not None else None
        replicas = Replicas(axis_name, groups)
        y, found = _normalised(arrays, reduced, Replicas() if groups and replicas.size == 1 else replicas, **options)
    count = found.count.reshape(()) if found.count.size == 1 else found.count.reshape(channels)
    return y, Moments(count, found.mean.reshape(channels), found.m2.reshape(channels))


def _normalised(
    arrays: tuple[Any, ...],
    reduced: tuple[int, ...],
    replicas: Replicas,
    *,
    activation: Activation | None,
    **options: Any,
) -> tuple[Shaped[Array, "..."], Moments]:
    """`arrays` are x, mask, scale, bias, shift and renorm, reduced axes 1 wide; so are the moments."""
    if activation is None:
        return _traced_once(arrays, reduced, replicas, activation=None, **options)
    # An activation may read what changes from call to call, an `nnx.PReLU`'s slope for instance.
    return _computed(arrays, reduced, replicas, activation=activation, **options)


def _computed(
    arrays: tuple[Any, ...],
    reduced: tuple[int, ...],
    replicas: Replicas,
    *,
    epsilon: float,
    activation: Activation | None,
    dtype: Any,
) -> tuple[Shaped[Array, "..."], Moments]:
    x, mask, scale, bias, shift, renorm = arrays
    if mask is None and replicas.size * math.prod(x.shape[a] for a in reduced) == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {x.shape}"
            + (f" on each of {replicas.size} replicas" if replicas.axis_name is not None else "")
        )
    if shift is not None and not replicas.know(shift):
        shift = None

    @jax.named_scope(SCOPE)
    def normalised(
        x: Shaped[Array, "..."], scale: Float[Array, "..."] | None, bias: Float[Array, "..."] | None
    ) -> tuple[Shaped[Array, "..."], Moments]:
        found = saved(batch_statistics(x, shift, mask, reduced, epsilon, replicas))
        if renorm is not None:
            scale, bias = renorm.corrected(found, scale, bias, epsilon)
        y = _affine(accumulable(x), found.shift, found.delta, found.inverse, scale, bias, mask, activation, dtype)
        return y, Moments(found.count, found.mean, found.m2)

    # The backward pass keeps the input as it came and the statistics; all else it computes again, element by element.
    # XLA may do otherwise (prevent_cse): a barrier would keep it from joining BatchNorm to what is computed before.
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    return jax.checkpoint(normalised, policy=policy, prevent_cse=False)(x, scale, bias)


# Layers of one shape are traced, differentiated and lowered once.
_traced_once = partial(jax.jit, static_argnums=(1, 2), static_argnames=("epsilon", "activation", "dtype"))(_computed)


def _groups_of_parts(
    arrays: tuple[Any, ...],
    reduced: tuple[int, ...],
    axis_index_groups: Sequence[Sequence[int]],
    options: dict[str, Any],
) -> tuple[Shaped[Array, "..."], Moments]:
    """As `_normalised`, the parts of the batch in groups: the first reduced axis is cut into (parts, rest)."""
    x = arrays[0]
    batch, parts = reduced[0], sum(map(len, axis_index_groups))
    groups = canonical_groups(axis_index_groups, parts)
    if x.shape[batch] % parts:
        raise ValueError(
            f"axis_index_groups names {parts} replicas, which do not divide the batch of {x.shape[batch]} "
            f"(input of shape {x.shape})"
        )
    if groups is None:
        return _normalised(arrays, reduced, Replicas(), **options)

    def cut(a: Any) -> Any:
        ways = (1, 1) if a.shape[batch] == 1 else (parts, a.shape[batch] // parts)
        return a.reshape(*a.shape[:batch], *ways, *a.shape[batch + 1 :])

    def run(*arrays: Any) -> tuple[Shaped[Array, "..."], Moments]:
        cuts = jax.tree.map(cut, arrays)
        y, found = _normalised(
            cuts, tuple(a + 1 for a in reduced), Replicas(groups=groups, parts_axis=batch), **options
        )
        first = jnp.asarray([group[0] for group in groups])  # one part of each group speaks for it
        fields = (jnp.moveaxis(jnp.broadcast_to(field, found.mean.shape), batch, 0)[first] for field in found)
        return y.reshape(x.shape), merge_stacked(*fields)

    return under_automatic_sharding(run, x)(*arrays)


def normalize(
    x: Shaped[Array, "..."],
    mean: Inexact[Array, "*channels"],
    var: Float[Array, "*channels"],
    scale: Float[Array, "*channels"] | None = None,
    bias: Float[Array, "*channels"] | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: Bool[Array, "..."] | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
) -> Shaped[Array, "..."]:
    """Normalises `x` with statistics that are given, as BatchNorm does in eval.

        y = activation((x - mean) / sqrt(var + epsilon) * scale + bias)

    as `torch.nn.functional.batch_norm(..., training=False)` does. The arithmetic is in at least float32, and `mean` and
    `var` keep their dtype: a bfloat16 input does not round them.

    **Arguments:**

    - `x`: the input, floating or complex, channels along `axis`. Integers too, where `dtype` says what they become.
    - `mean`: one value for each channel, in the order of the axes.
    - `var`: the variance of each channel, likewise.
    - `scale`: one value for each channel; None for 1.
    - `bias`: one value for each channel; None for 0.
    - `axis`: the channels' axis, or axes.
    - `epsilon`: added to the variance; a finite number from 0.
    - `mask`: which values count, broadcastable to `x`. All are normalised; those that do not count may be infinite or
      no numbers: they have no part in any derivative.
    - `activation`: applied to the result.
    - `dtype`: of the output, floating or complex; by default that of `x`.

    **Returns:** `y`, in the shape of `x`.

    **Raises:**

    - `TypeError`: for arguments that are no arrays, dtypes or functions.
    - `ValueError`: for statistics or parameters that do not fit the channels, a mask that does not broadcast, axes that
      are none of the input's, and an `epsilon` that is not finite or below 0.
    """
    named = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    for name in ("mean", "var"):
        named[name] = check.array(name, named[name])
    x, mask, _, (mean, var, scale, bias) = _arguments(x, mask, axis, activation, dtype, named)
    epsilon = check.number("epsilon", epsilon, least=0)
    inverse = _inverse_deviation(var, epsilon)
    return _affine(accumulable(x), mean, None, inverse, scale, bias, mask, activation, dtype or x.dtype)


def _arguments(
    x: Any,
    mask: Any,
    axis: Any,
    activation: Any,
    dtype: Any,
    named: dict[str, Any],
) -> tuple[Any, Any, tuple[int, ...], tuple[Any, ...]]:
    """The input, the mask, the axes reduced over, and what is given for each channel, all as wide as the input."""
    x = check.array("x", x)
    reduced = reduced_axes(x.ndim, axis)
    channels = tuple(x.shape[a] for a in range(x.ndim) if a not in reduced)
    keep = tuple(1 if a in reduced else n for a, n in enumerate(x.shape))
    check.dtype("dtype", dtype, inexact=True)
    if dtype is None and not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x holds {x.dtype}, in which normalised values would be rounded: give dtype=jnp.float32")
    if activation is not None:
        check.function("activation", activation)
    wide = []
    for name, value in named.items():
        found = None if value is None else check.array(name, value)
        if found is not None and found.shape != channels:
            raise ValueError(f"{name} has shape {found.shape}, expected {channels}: input {x.shape} with axis={axis!r}")
        wide.append(None if found is None else found.reshape(keep))
    return x, broadcastable("mask", mask, x), reduced, tuple(wide)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse_deviation(var: Float[Array, "..."], epsilon: float) -> Float[Array, "..."]:
    """`rsqrt(var + epsilon)`, whose derivative in JAX divides by the variance and vanishes in float32 from 1e13 on."""
    return lax.rsqrt(var + epsilon)


@_inverse_deviation.defjvp
def _inverse_deviation_jvp(epsilon, primals, tangents):  # type: ignore[no-untyped-def]
    inverse = _inverse_deviation(*primals, epsilon)
    return inverse, -0.5 * inverse * (inverse * (inverse * tangents[0]))


def _affine(
    x: Inexact[Array, "..."],
    shift: Inexact[Array, "..."],
    delta: Inexact[Array, "..."] | None,
    inverse: Float[Array, "..."],
    scale: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    activation: Activation | None,
    dtype: Any,
) -> Shaped[Array, "..."]:
    """`activation(((x - shift) - delta) * inverse * scale + bias)`, in two operations for each element."""
    mul = inverse if scale is None else inverse * scale
    if delta is not None:  # of the deviation's size, so that nothing cancels
        bias = -delta * mul if bias is None else bias - delta * mul
    d = x - shift

    def result(d: Any) -> Any:
        y = d * mul if bias is None else d * mul + bias
        return (y if activation is None else check.array("what activation gives", activation(y))).astype(dtype)

    if mask is None:
        return result(d)
    # What does not count and is no number comes out as it is, and has no part in any derivative: 0 * nan is nan.
    y = lax.stop_gradient(result(d))
    bad = ~(mask | (jnp.isfinite(d * mul) & jnp.isfinite(y)))
    return jnp.where(bad, y, result(jnp.where(bad, 0, d)))
