"""Mean and variance of a batch as `Moments`: of one array, merged, over the replicas of an axis name.

**One pass, no cancellation.** The sums are taken about a shift that lies inside the data, one for each channel:

    d = x - shift,   S1 = sum(d),   S2 = sum(d^2),   mean = shift + S1/n,   m2 = S2 - S1^2/n

E[x^2] - E[x]^2 loses (mean/std)^2 of the precision (Chan, Golub & LeVeque, "Algorithms for Computing the Sample
Variance", 1983, section 3); here that is (shift - mean)^2/var, a number near 0. The shift is the mean of about 1/512 of
the batch, taken evenly from all of it, and in a constant channel exactly the constant, so that d = 0.

**Merged, not averaged.** Two samples give (Chan et al., 1979)

    mean = (n_a mean_a + n_b mean_b) / n,   m2 = m2_a + m2_b + n_a (mean_a - mean)^2 + n_b (mean_b - mean)^2

so that uneven, masked and empty parts are exact. Replicas gather one another's moments in one collective and merge them
by the same formula.

**Derivatives** are written out once (`_shifted_moments_jvp`), in a form whose transpose is one collective too:

    d mean = sum(dx) / n,   d m2 = 2 sum((x - mean) dx)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxnorm._typing import Array, Bool, Float, Inexact, Shaped
from jaxnorm.collectives import AxisName, Groups, gather_replicas, sum_replicas
from jaxnorm.packing import pack, unpack
from jaxnorm.sums import two_sums

# One value in so many places the shift. That also bounds (shift - mean)^2/var, whatever the data.
_SHIFT_PART = 512


SAVED = "jaxnorm statistics"


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations: `m2 = sum((x - mean)^2)`, for each channel.

    `variance()` is `m2 / count` (biased, what BatchNorm normalises with); `variance(correction=1)` is
    `m2 / (count - 1)` (unbiased, what PyTorch tracks; `correction` as in `torch.var`).
    """

    # Real, and one for all channels unless a mask tells them apart.
    count: Float[Array, "*channels"] | Float[Array, ""]  # type: ignore[assignment]  # not tuple.count
    mean: Inexact[Array, "*channels"]
    m2: Float[Array, "*channels"]

    def variance(self, correction: int | float = 0) -> Float[Array, "*channels"]:
        """`m2 / (count - correction)`; NaN where no more than `correction` values were counted."""
        freedom = self.count - correction
        return jnp.where(freedom > 0, self.m2 / jnp.where(freedom > 0, freedom, 1), jnp.nan)


def moments(
    x: Shaped[Array, "..."],
    axis: int | Sequence[int] = -1,
    *,
    mask: Bool[Array, "..."] | None = None,
) -> Moments:
    """The moments of `x` for each channel, over all axes but `axis`, in at least float32.

    Args:
        x: the values, of any numeric dtype.
        axis: the channels' axis or axes.
        mask: which values count, broadcastable to `x`; None counts all.
    """
    reduced = reduced_axes(x.ndim, axis)
    found = batch_moments(x, mask, reduced, None, None)
    shape = tuple(x.shape[a] for a in range(x.ndim) if a not in reduced)
    return Moments(_counts(found.count, shape), found.mean.reshape(shape), found.m2.reshape(shape))


def merge(first: Moments, *others: Moments) -> Moments:
    """The moments of all samples together, by Chan's formula. Exact for uneven and empty samples.

    >>> merge(moments(a), moments(b))  # equals moments(jnp.concatenate([a, b]))
    """
    if not others:
        return first
    counts, means, m2s = (jnp.stack(jnp.broadcast_arrays(*field)) for field in zip(first, *others, strict=True))
    counts = counts.reshape(*counts.shape, *[1] * (means.ndim - counts.ndim))
    merged = merge_stacked(counts, means, m2s)
    return Moments(_counts(merged.count, means.shape[1:]), merged.mean, merged.m2)


class ShiftedMoments(NamedTuple):
    """Moments whose mean is `base + delta`, to more digits than one float holds.

    A float32 mean of 1e5 is good to 0.004 only; `(x - shift) - offset` is good to a few parts in 1e7 of the deviation,
    since `shift` lies near this replica's data. Shapes are those of `x` with reduced axes 1.
    """

    count: Float[Array, "..."]  # type: ignore[assignment]  # not tuple.count
    shift: Inexact[Array, "..."]  # this replica's own; no derivative
    base: Inexact[Array, "..."]  # the same for all replicas; no derivative
    delta: Inexact[Array, "..."]
    m2: Float[Array, "..."]

    @property
    def mean(self) -> Inexact[Array, "..."]:
        return self.base + self.delta

    @property
    def offset(self) -> Inexact[Array, "..."]:
        """`mean - shift`."""
        return (self.base - self.shift) + self.delta


def saved(found: ShiftedMoments) -> ShiftedMoments:
    """Marks what the backward pass keeps besides the input (see `_batch_norm.py`)."""
    return ShiftedMoments(*(checkpoint_name(field, SAVED) for field in found))


def accumulable(x: Shaped[Array, "..."]) -> Inexact[Array, "..."]:
    """`x` in the dtype that statistics are computed in: at least float32 (complex64); float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def reduced_axes(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """All axes of an array of `ndim` axes but the channels' `axis`.

    Raises:
        ValueError: if `axis` names no axis of the array, or one twice.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    channels = {a + ndim if a < 0 else a for a in axes}
    if len(channels) != len(axes) or not all(0 <= a < ndim for a in channels):
        raise ValueError(f"axis must name distinct axes of the {ndim}-dimensional input, got {axis!r}")
    return tuple(a for a in range(ndim) if a not in channels)


def batch_moments(
    x: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | None,
    reduced: tuple[int, ...],
    axis_name: AxisName | None,
    groups: Groups | None,
) -> ShiftedMoments:
    """The moments of `x` over the axes `reduced` and, given an axis name, over the replicas (of this one's group).

    The m2 of complex numbers is sum(|x - mean|^2), as in Flax.
    """
    if jnp.iscomplexobj(x):
        parts, part_mask = jnp.stack([x.real, x.imag], -1), None if mask is None else mask[..., None]
        found = batch_moments(parts, part_mask, reduced, axis_name, groups)
        shift, base, delta = (lax.complex(z[..., 0], z[..., 1]) for z in (found.shift, found.base, found.delta))
        return ShiftedMoments(found.count[..., 0], shift, base, delta, found.m2.sum(-1))
    shift = _shift(lax.stop_gradient(x), mask, reduced)
    return shifted_moments(accumulable(x), shift, mask, reduced, axis_name, groups)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def shifted_moments(
    x: Float[Array, "..."],
    shift: Float[Array, "..."],
    mask: Bool[Array, "..."] | None,
    reduced: tuple[int, ...],
    axis_name: AxisName | None,
    groups: Groups | None,
) -> ShiftedMoments:
    """`batch_moments` with sums about `shift`, a constant for each channel."""
    centred = x - shift
    if mask is not None:
        centred = jnp.where(mask, centred, 0)
    s1, s2 = two_sums(centred, jnp.square(centred), reduced)
    count = _count(x, mask, reduced)
    delta = s1 / jnp.maximum(count, 1)
    m2 = jnp.maximum(s2 - s1 * delta, 0)
    if axis_name is None:
        return ShiftedMoments(count, shift, shift, delta, m2)
    high = shift + _settled(delta)
    words = pack(high, (shift - high) + delta, m2, count)
    # Without a mask every replica counts the same number of values: no need to send it.
    sent = [words] if mask is None else [words, count.view(words.dtype)]
    gathered = gather_replicas(jnp.concatenate([part.reshape(-1) for part in sent]), axis_name, groups)
    counts = jnp.broadcast_to(count, (len(gathered), *count.shape))
    if mask is not None:
        counts = gathered[:, words.size :].reshape(counts.shape).view(count.dtype)
    highs, lows, m2s = unpack(gathered[:, : words.size].reshape(-1, *words.shape), counts, axis=1)
    return merge_stacked(counts, highs, m2s, lows)._replace(shift=shift)


@shifted_moments.defjvp
def _shifted_moments_jvp(reduced, axis_name, groups, primals, tangents):  # type: ignore[no-untyped-def]
    x, _, mask = primals
    found = saved(shifted_moments(*primals, reduced, axis_name, groups))
    dx = tangents[0] if mask is None else jnp.where(mask, tangents[0], 0)
    centred = x - found.shift
    if mask is not None:
        centred = jnp.where(mask, centred, 0)  # what is masked may be NaN
    d1 = dx.sum(reduced, keepdims=True)
    d2 = (centred * dx).sum(reduced, keepdims=True) - found.offset * d1
    if axis_name is not None:
        d1, d2 = sum_replicas(jnp.stack([d1, d2]), axis_name, groups)
    return found, ShiftedMoments(
        count=jnp.zeros_like(found.count),
        shift=jnp.zeros_like(found.shift),
        base=jnp.zeros_like(found.base),
        delta=d1 / jnp.maximum(found.count, 1),
        m2=2 * d2,
    )


def _shift(x: Shaped[Array, "..."], mask: Bool[Array, "..."] | None, reduced: tuple[int, ...]) -> Float[Array, "..."]:
    """A value for each channel that lies among its values."""
    if mask is not None:  # the part may be masked altogether: take all that counts
        wide = accumulable(x)
        mean = jnp.sum(wide, reduced, where=mask, keepdims=True) / jnp.maximum(_count(wide, mask, reduced), 1)
        low = jnp.min(wide, reduced, where=mask, initial=jnp.inf, keepdims=True)
        high = jnp.max(wide, reduced, where=mask, initial=-jnp.inf, keepdims=True)
        return jnp.where(low > high, 0, jnp.clip(mean, low, high))
    keep = [1 if a in reduced else n for a, n in enumerate(x.shape)]
    if x.size == 0 or not reduced:
        return accumulable(jnp.zeros(keep, x.dtype))
    # Relative to one value, so that where all are equal their mean is exactly that value.
    # The barrier keeps XLA from converting all of x before it takes the part.
    one, part = map(accumulable, lax.optimization_barrier((lax.slice(x, [0] * x.ndim, keep), _part(x, reduced))))
    return one + _settled((part - one).mean(reduced, keepdims=True))


def _settled(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` without its last bit, so that what is added to it gives the same sum everywhere.

    XLA computes cheap values anew in each fusion that uses them. If `x` is a product, `y + x` may be a fused
    multiply-add in one of them and not in another, and where the sum lies halfway between two floats they differ: at a
    mean of 1e5, by 1/128. The last bit of `x` is far below that.
    """
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant - 1)


def _part(x: Shaped[Array, "..."], reduced: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Every 512th value or so, from as many examples as will do: positions are skipped first."""
    starts, strides, left = [0] * x.ndim, [1] * x.ndim, _SHIFT_PART
    for a in reversed(reduced):
        strides[a] = min(left, x.shape[a])
        starts[a] = strides[a] // 2  # not at the border, where padding makes positions unlike the others
        left //= strides[a]
    return lax.slice(x, starts, x.shape, strides)


def _count(x: Float[Array, "..."], mask: Bool[Array, "..."] | None, reduced: tuple[int, ...]) -> Float[Array, "..."]:
    if mask is None:
        return jnp.full([1] * x.ndim, math.prod(x.shape[a] for a in reduced), x.dtype)
    # Axes along which the mask is 1 wide count each value as often as x is long there.
    repeats = math.prod(x.shape[a] // mask.shape[a] for a in reduced if mask.shape[a])
    return repeats * mask.sum(reduced, keepdims=True, dtype=x.dtype)


def _counts(count: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return count.reshape(()) if count.size == 1 else count.reshape(shape)


def merge_stacked(
    counts: Float[Array, "parts ..."],
    means: Inexact[Array, "parts ..."],
    m2s: Float[Array, "parts ..."],
    rests: Inexact[Array, "parts ..."] | float = 0.0,
) -> ShiftedMoments:
    """The moments of all parts, whose means are `means + rests`; `base` is the mean of one of them."""
    total = counts.sum(0)
    occupied = counts > 0
    # Any mean will do. The largest is found in one reduction, however many parts there are.
    base = jnp.where(occupied & jnp.isfinite(means), means, -jnp.inf).max(0)
    base = jnp.where(jnp.isfinite(base), base, 0)
    apart = jnp.where(occupied, (means - base) + rests, 0)
    delta = (counts * apart).sum(0) / jnp.maximum(total, 1)
    from_delta = apart - delta
    m2 = (m2s + counts * jnp.real(from_delta * jnp.conj(from_delta))).sum(0)  # of complex numbers, |.|^2
    return ShiftedMoments(total, base, base, delta, m2)
