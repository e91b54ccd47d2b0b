"""The operation: statistics, normalisation, derivatives. Written once, for every way to be parallel.

With an axis name (`pmap`, `shard_map`, `vmap`) each replica sees its own part of the batch and `moments.py` merges.
Under `jit` with sharded arrays one program sees the whole batch: there the batch is cut into as many parts as the mesh
has devices, and the same per-replica program runs under `vmap` over the parts. XLA keeps each part on its device, so
the global view too is one collective and is shifted part by part.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._typing import Array, Bool, Float, Inexact, Shaped
from jaxnorm.collectives import (
    GLOBAL_VIEW,
    AxisName,
    Groups,
    axis_size,
    canonical_groups,
    global_view_replicas,
    under_automatic_sharding,
)
from jaxnorm.moments import SAVED, Moments, accumulable, batch_moments, merge_stacked, reduced_axes, saved

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
) -> tuple[Shaped[Array, "..."], Moments]:
    """Normalises `x` with the statistics of its batch, taken over all replicas.

        y = activation((x - mean) / sqrt(m2 / count + epsilon) * scale + bias)

    as `torch.nn.functional.batch_norm(..., training=True)` and SyncBatchNorm do (Ioffe & Szegedy, 2015, algorithm 1).
    The statistics and the arithmetic are in at least float32, whatever the input's dtype. All derivatives exist, of
    any order, forward and reverse; the backward pass sends one sum over the replicas, of two numbers for each channel.

    Args:
        x: the input, channels along `axis`, all other axes reduced over.
        scale, bias: one value for each channel, in the order of the axes; None for 1 and 0.
        axis: the channels' axis, or axes.
        epsilon: added to the variance.
        axis_name: the axis (or tuple of axes) of `pmap`, `shard_map` or `vmap` over which replicas share statistics.
            None for this replica alone or, under `jit` with sharded arrays, for the whole batch.
        axis_index_groups: groups of replicas that share statistics, `[[0, 1], [2, 3]]`. Without an axis name (under
            `jit`) the batch is cut into as many equal parts as indices are given, in order, and the groups are groups
            of parts.
        mask: which values count, broadcastable to `x`; all values are normalised.
        activation: applied to the result. The backward pass recomputes its input from `x` instead of keeping it.
        dtype: of the output; by default that of `x`.

    Returns:
        `y`, and the `Moments` that it was normalised with: one value for each channel. (Under `jit` with groups, the
        moments of all groups together.)

    Raises:
        ValueError: if one value for each channel is all there is (its variance is 0 whatever the value), if groups do
            not fit the replicas, or a parameter does not fit the channels.
        NameError: if the axis name is not bound.

    >>> y, moments = batch_norm(x, scale, bias)
    >>> running_var = momentum * running_var + (1 - momentum) * moments.variance(correction=1)
    """
    reduced = reduced_axes(x.ndim, axis)
    channels = tuple(x.shape[a] for a in range(x.ndim) if a not in reduced)
    keep = tuple(1 if a in reduced else n for a, n in enumerate(x.shape))
    params = {"scale": scale, "bias": bias}
    for name, value in params.items():
        if value is not None and value.shape != channels:
            raise ValueError(f"{name} has shape {value.shape}, expected {channels}: input {x.shape} with axis={axis!r}")
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*[1] * (x.ndim - mask.ndim), *mask.shape)).astype(bool)
        if any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)):
            raise ValueError(f"mask of shape {mask.shape} does not broadcast to the input's {x.shape}")
    arrays = {name: None if value is None else value.reshape(keep) for name, value in params.items()}
    options: dict[str, Any] = {
        "reduced": reduced,
        "epsilon": epsilon,
        "activation": activation,
        "dtype": dtype or x.dtype,
    }
    if axis_name is None and reduced:
        whole = partial(_global_view, axis_index_groups=axis_index_groups, options=options)
        y, found = under_automatic_sharding(whole, x)(x, mask, arrays)
    else:
        groups = canonical_groups(axis_index_groups, axis_size(axis_name)) if axis_name is not None else None
        y, found = _replica(x, mask, arrays, axis_name=axis_name, groups=groups, **options)
    count = found.count.reshape(()) if found.count.size == 1 else found.count.reshape(channels)
    return y, Moments(count, found.mean.reshape(channels), found.m2.reshape(channels))


def normalize(
    x: Shaped[Array, "..."],
    mean: Inexact[Array, "*channels"],
    var: Float[Array, "*channels"],
    scale: Float[Array, "*channels"] | None = None,
    bias: Float[Array, "*channels"] | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    dtype: Any = None,
) -> Shaped[Array, "..."]:
    """Normalises with given statistics, as BatchNorm does in eval: `(x - mean) / sqrt(var + epsilon) * scale + bias`.

    Arguments as for `batch_norm`. `mean` and `var` keep their dtype: a bfloat16 input does not round them.
    """
    reduced = reduced_axes(x.ndim, axis)
    keep = tuple(1 if a in reduced else n for a, n in enumerate(x.shape))
    scale, bias = (None if v is None else v.reshape(keep) for v in (scale, bias))
    variance = var.reshape(keep) + epsilon
    return _affine(accumulable(x), mean.reshape(keep), None, variance, scale, bias, activation, dtype or x.dtype)


def _replica(
    x: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | None,
    arrays: dict[str, Array | None],
    *,
    reduced: tuple[int, ...],
    epsilon: float,
    activation: Activation | None,
    dtype: Any,
    axis_name: AxisName | None,
    groups: Groups | None,
) -> tuple[Shaped[Array, "..."], Moments]:
    """One replica's program; reduced axes are kept, 1 wide."""
    replicas = 1 if axis_name is None else len(groups[0]) if groups else axis_size(axis_name)
    if groups and replicas == 1:  # each for itself
        axis_name = groups = None
    values = replicas * math.prod(x.shape[a] for a in reduced)
    if values == 1 and mask is None:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {x.shape}"
            + (f" on each of {replicas} replicas" if axis_name is not None else "")
        )

    def normalised(
        x: Shaped[Array, "..."], scale: Float[Array, "..."] | None, bias: Float[Array, "..."] | None
    ) -> tuple[Shaped[Array, "..."], Moments]:
        found = saved(batch_moments(x, mask, reduced, axis_name, groups))
        variance = found.m2 / jnp.maximum(found.count, 1) + epsilon
        y = _affine(accumulable(x), found.shift, found.offset, variance, scale, bias, activation, dtype)
        return y, Moments(found.count, found.mean, found.m2)

    # The backward pass keeps the input as it came and the statistics; all else it computes again, element by element.
    keep = jax.checkpoint_policies.save_only_these_names(SAVED)
    return jax.checkpoint(normalised, policy=keep)(x, arrays["scale"], arrays["bias"])


def _affine(
    x: Inexact[Array, "..."],
    shift: Inexact[Array, "..."],
    offset: Inexact[Array, "..."] | None,
    variance: Float[Array, "..."],
    scale: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
    activation: Activation | None,
    dtype: Any,
) -> Shaped[Array, "..."]:
    """`activation(((x - shift) - offset) / sqrt(variance) * scale + bias)`, in two operations for each element."""
    mul = lax.rsqrt(variance)
    if scale is not None:
        mul = mul * scale
    y = (x - shift) * mul
    if offset is not None:  # of the deviation's size, so that nothing cancels
        bias = -offset * mul if bias is None else bias - offset * mul
    if bias is not None:
        y = y + bias
    return (y if activation is None else activation(y)).astype(dtype)


def _global_view(
    x: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | None,
    arrays: dict[str, Array | None],
    *,
    axis_index_groups: Sequence[Sequence[int]] | None,
    options: dict[str, Any],
) -> tuple[Shaped[Array, "..."], Moments]:
    """The whole batch in one program: cut into parts along the first reduced axis, then `_replica` under vmap."""
    batch = options["reduced"][0]
    parts = sum(map(len, axis_index_groups)) if axis_index_groups else global_view_replicas(x, batch)
    if x.shape[batch] % parts:
        raise ValueError(
            f"axis_index_groups names {parts} replicas, which do not divide the batch of {x.shape[batch]} "
            f"(input of shape {x.shape})"
        )
    groups = canonical_groups(axis_index_groups, parts)
    if parts == 1:
        return _replica(x, mask, arrays, axis_name=None, groups=None, **options)

    def cut(a: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return a.reshape(*a.shape[:batch], parts, -1, *a.shape[batch + 1 :])

    masks_differ = mask is not None and mask.shape[batch] > 1
    replica: Callable[..., Any] = partial(_replica, axis_name=GLOBAL_VIEW, groups=groups, **options)
    per_part = jax.vmap(
        replica,
        in_axes=(batch, batch if masks_differ else None, None),
        out_axes=(batch, None if groups is None else 0),
        axis_name=GLOBAL_VIEW,
    )
    y, found = per_part(cut(x), cut(mask) if mask is not None and masks_differ else mask, arrays)
    y = y.reshape(x.shape)
    if groups is not None:  # one part of each group speaks for it
        first = jnp.asarray([group[0] for group in groups])
        merged = merge_stacked(*(jnp.broadcast_to(field, found.mean.shape)[first] for field in found))
        found = Moments(merged.count, merged.mean, merged.m2)
    return y, found
