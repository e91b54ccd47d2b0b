"""Mean and variance of a batch as `Moments`: of one array, merged, over replicas.

**Two sums about a shift that every replica knows.** With one shift for each channel,

    d = x - shift,   S1 = sum(d),   S2 = sum(|d|^2),   mean = shift + S1 / n,   m2 = S2 - |S1|^2 / n

S1 and S2 are plain sums: an accelerator takes them while it computes x, and replicas add theirs up in one collective of
two numbers for each channel. The relative error of the variance is about 2^-24 (1 + ((mean - shift) / std)^2) in
float32 (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983, section 3), so the shift has to be
near the mean, not exact. In training it is the running mean, which is near it from the first few steps on.

**Looked at again where that was too far.** For float32 and float64 input, `lax.cond` takes the sums once more, about a
mean found from the batch itself, if |mean - shift| is more than one deviation in some channel. So a shift that is
stale, infinite or not a number costs a second look, not a digit.

**16-bit input** is summed about 0, once. With r = |mean| / std, rounding x to bfloat16 or float16 (u = 2^-9 or 2^-12)
has moved it by up to u r deviations, and the sums change the output by about 2^-25 r^2 of its value. The second is the
smaller one for every mean at which these dtypes still resolve a deviation (r < 1 / u).

**Merged, not averaged.** Two samples give (Chan et al., 1979)

    mean = (n_a mean_a + n_b mean_b) / n,   m2 = m2_a + m2_b + n_a (mean_a - mean)^2 + n_b (mean_b - mean)^2

so that uneven, masked and empty parts are exact.

**Derivatives** are written out once (`_statistics_jvp`), with the deviations divided by the standard deviation, so that
they neither overflow nor vanish. The transpose is one collective of two numbers for each channel too:

    d mean = sum(dx) / n,   d m2 = 2 sum(conj(x - mean) dx),   d inverse = -inverse^2 sum(conj(xhat) dx) / n

**Limits.** Counts are integers on each replica, and are rounded to the statistics' dtype when they are added up. A sum
of squares beyond the largest float makes m2 infinite and the output NaN.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Float, Inexact, Shaped
from jaxnorm.collectives import Replicas
from jaxnorm.sums import two_sums

SAVED = "jaxnorm statistics"
SCOPE = "batch_statistics"  # the name of these operations in a compiled program
# Squared deviations between shift and mean up to which the sums are as good as about the mean itself.
_NEAR = 1.0


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a sample, for each channel: what `batch_norm` normalises with.

        m2 = sum(|x - mean|^2)

    `variance()` is `m2 / count` (biased, what BatchNorm normalises with); `variance(correction=1)` is
    `m2 / (count - 1)` (unbiased, what PyTorch tracks; `correction` as in `torch.var`). All are in at least float32; of
    complex input the mean is complex, and count and m2 are real.

    **Attributes:**

    - `count`: the number of values: one for all channels, of shape (), unless a mask tells the channels apart.
    - `mean`: of each channel, in the shape of the channels' axes.
    - `m2`: the sum of squared deviations from the mean, in that shape.
    """

    # Real, and one for all channels unless a mask tells them apart.
    count: Float[Array, "*channels"] | Float[Array, ""]  # type: ignore[assignment]  # not tuple.count
    mean: Inexact[Array, "*channels"]
    m2: Float[Array, "*channels"]

    def variance(self, correction: int | float = 0) -> Float[Array, "*channels"]:
        """The variance of each channel, `m2 / (count - correction)`.

        **Arguments:**

        - `correction`: subtracted from the count: 0 for the biased variance, 1 for the unbiased one.

        **Returns:** one value for each channel; NaN where no more than `correction` values were counted.

        **Raises:** `ValueError` for a correction that is no finite number.
        """
        freedom = self.count - check.number("correction", correction)
        return jnp.where(freedom > 0, self.m2 / jnp.where(freedom > 0, freedom, 1), jnp.nan)


def moments(
    x: Shaped[Array, "..."],
    axis: int | Sequence[int] = -1,
    *,
    mask: Bool[Array, "..."] | None = None,
) -> Moments:
    """The moments of `x` for each channel, over all axes but `axis`: count, mean and sum of squared deviations.

    They are computed in at least float32, and exact at any mean (`jaxnorm/moments.py` has the method and its error).

    **Arguments:**

    - `x`: the values, of any numeric dtype.
    - `axis`: the channels' axis or axes.
    - `mask`: which values count, broadcastable to `x`; None counts all.

    **Returns:** the `Moments`, one value for each channel.

    **Raises:**

    - `TypeError`: for what is no array.
    - `ValueError`: for axes that are none of its, and a mask that does not fit.
    """
    x = check.array("x", x)
    reduced = reduced_axes(x.ndim, axis)
    mask = broadcastable("mask", mask, x)
    found = batch_statistics(x, None, mask, reduced, 0.0, Replicas())
    shape = tuple(x.shape[a] for a in range(x.ndim) if a not in reduced)
    return Moments(_counts(found.count, shape), found.mean.reshape(shape), found.m2.reshape(shape))


def broadcastable(name: str, mask: Any, x: Array) -> Array | None:
    """The mask with as many axes as `x`, each as long or 1 wide.

    Raises:
        TypeError, ValueError: for what is no array, and for one that does not fit.
    """
    if mask is None:
        return None
    mask = check.array(name, mask)
    wide = mask.reshape(*[1] * (x.ndim - mask.ndim), *mask.shape) if mask.ndim <= x.ndim else mask
    if wide.ndim > x.ndim or any(m not in (1, n) for m, n in zip(wide.shape, x.shape, strict=True)):
        raise ValueError(f"{name} of shape {mask.shape} does not broadcast to the input's {x.shape}")
    return wide.astype(bool)


def merge(first: Moments, *others: Moments) -> Moments:
    """The moments of several samples taken together. Exact for uneven and empty samples.

        mean = (n_a mean_a + n_b mean_b) / n,   m2 = m2_a + m2_b + n_a (mean_a - mean)^2 + n_b (mean_b - mean)^2

    (Chan, Golub & LeVeque, 1979.)

    ```python
    merge(moments(a), moments(b))  # equals moments(jnp.concatenate([a, b]))
    ```

    **Arguments:**

    - `first`: the moments of one sample.
    - `*others`: those of further samples, with the same channels.

    **Returns:** the `Moments` of all samples.

    **Raises:**

    - `TypeError`: for what are no moments.
    - `ValueError`: for those of other channels.
    """
    for one in (first, *others):
        check.instance("every argument of merge", one, Moments, "a jaxnorm.Moments")
    if not others:
        return first
    unlike = sorted({str(jnp.shape(one.mean)) for one in (first, *others)})
    if len(unlike) > 1:
        raise ValueError(f"the moments to merge are of other numbers of channels: means of shapes {', '.join(unlike)}")
    counts, means, m2s = (jnp.stack(jnp.broadcast_arrays(*field)) for field in zip(first, *others, strict=True))
    merged = merge_stacked(counts.reshape(*counts.shape, *[1] * (means.ndim - counts.ndim)), means, m2s)
    return Moments(_counts(merged.count, means.shape[1:]), merged.mean, merged.m2)


def merge_stacked(
    counts: Float[Array, "parts ..."], means: Inexact[Array, "parts ..."], m2s: Float[Array, "parts ..."]
) -> Moments:
    """The moments of all parts, which lie along the first axis."""
    total = counts.sum(0)
    occupied = counts > 0
    # Any mean will do as the base. The largest is found in one reduction, however many parts there are.
    base = jnp.where(occupied & jnp.isfinite(means), means, -jnp.inf).max(0)
    base = jnp.where(jnp.isfinite(base), base, 0)
    apart = jnp.where(occupied, means - base, 0)
    delta = (counts * apart).sum(0) / jnp.maximum(total, 1)
    m2 = (m2s + counts * _square(apart - delta)).sum(0)
    return Moments(total, base + delta, m2)


class Statistics(NamedTuple):
    """Moments whose mean is `shift + delta`, and the inverse deviation. Shapes are those of `x`, reduced axes 1 wide.

    A float32 mean of 1e5 is good to 0.004 only; `(x - shift) - delta` is good to a few parts in 1e7 of the deviation.
    """

    count: Float[Array, "..."]  # type: ignore[assignment]  # not tuple.count
    shift: Inexact[Array, "..."]  # no derivative
    delta: Inexact[Array, "..."]
    m2: Float[Array, "..."]
    inverse: Float[Array, "..."]  # 1 / sqrt(m2 / count + epsilon)

    @property
    def mean(self) -> Inexact[Array, "..."]:
        return self.shift + self.delta


def saved(found: Statistics) -> Statistics:
    """Marks what the backward pass keeps besides the input (see `_batch_norm.py`)."""
    return Statistics(*(checkpoint_name(field, SAVED) for field in found))


def accumulable(x: Shaped[Array, "..."]) -> Inexact[Array, "..."]:
    """`x` in the dtype that statistics are computed in: at least float32 (complex64); float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def reduced_axes(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """All axes of an array of `ndim` axes but the channels' `axis`.

    Raises:
        ValueError: if `axis` names no axis of the array, or one twice.
    """
    axes = check.axes("axis", axis)
    channels = {a + ndim if a < 0 else a for a in axes}
    if len(channels) != len(axes) or not all(0 <= a < ndim for a in channels):
        raise ValueError(f"axis must name distinct axes of the {ndim}-dimensional input, got {axis!r}")
    return tuple(a for a in range(ndim) if a not in channels)


def batch_statistics(
    x: Shaped[Array, "..."],
    shift: Inexact[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    reduced: tuple[int, ...],
    epsilon: float,
    replicas: Replicas,
) -> Statistics:
    """The statistics of `x` over the axes `reduced` and over the replicas.

    `shift` is a value near the mean of each channel, the same on all replicas, of which nothing else is required; None
    for 0. The m2 of complex numbers is sum(|x - mean|^2), as in Flax.
    """
    wide = accumulable(x)
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    keep = [1 if a in reduced else n for a, n in enumerate(x.shape)]
    if shift is None or narrow:
        shift = jnp.zeros(keep, wide.dtype)
    else:
        shift = lax.stop_gradient(jnp.where(jnp.isfinite(shift), shift, 0).astype(wide.dtype))
    return _statistics(wide, shift, mask, reduced, epsilon, replicas, not narrow)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _statistics(
    x: Inexact[Array, "..."],
    shift: Inexact[Array, "..."],
    mask: Bool[Array, "..."] | None,
    reduced: tuple[int, ...],
    epsilon: float,
    replicas: Replicas,
    again: bool,
) -> Statistics:
    """`again`: whether a shift that was too far is replaced."""
    with jax.named_scope(SCOPE):
        return _in_one_or_two_looks(x, shift, mask, reduced, epsilon, replicas, again)


# Outside jit, too, compiled once for each shape: the branches of a cond are new functions, and new programs, each time.
@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _in_one_or_two_looks(
    x: Inexact[Array, "..."],
    shift: Inexact[Array, "..."],
    mask: Bool[Array, "..."] | None,
    reduced: tuple[int, ...],
    epsilon: float,
    replicas: Replicas,
    again: bool,
) -> Statistics:
    about = partial(_about, x, mask=mask, reduced=reduced, replicas=replicas)
    count, delta, m2 = about(shift)
    if again:
        variance = m2 / jnp.maximum(count, 1)
        near = (_square(delta) <= _NEAR * (variance + epsilon)) & (m2 < jnp.inf)

        def closer() -> tuple[Array, ...]:
            # XLA's ConditionalSimplifier takes both branches where it thinks them cheap, and it thinks sums cheap; a
            # barrier it leaves alone. (xla/hlo/transforms/simplifiers/conditional_simplifier.cc)
            mean = lax.optimization_barrier(jnp.zeros_like(delta))
            for _ in range(2):  # the second time it is exact in a constant channel
                (total,) = replicas.sum(_counted(x - mean, mask).sum(reduced, keepdims=True))
                mean = mean + total / jnp.maximum(count, 1)
            _, *found = about(mean)
            return tuple(jnp.where(near, *pair) for pair in zip((shift, delta, m2), (mean, *found), strict=True))

        shift, delta, m2 = lax.cond(near.all(), lambda: (jnp.where(near, shift, 0), delta, m2), closer)
    variance = jnp.where(m2 < jnp.inf, m2, jnp.nan) / jnp.maximum(count, 1)
    return Statistics(count, shift, delta, m2, lax.rsqrt(variance + epsilon))


def _about(
    x: Inexact[Array, "..."],
    shift: Inexact[Array, "..."],
    *,
    mask: Bool[Array, "..."] | None,
    reduced: tuple[int, ...],
    replicas: Replicas,
) -> tuple[Float[Array, "..."], Inexact[Array, "..."], Float[Array, "..."]]:
    """Count, mean - shift, and m2."""
    d = _counted(x - shift, mask)
    s1, s2 = two_sums(d, _square(d), reduced)
    if mask is None:
        size = replicas.size * math.prod(x.shape[a] for a in reduced)
        s1, s2 = replicas.sum(s1, s2)
        count = jnp.full([1] * x.ndim, size, s2.dtype)
    else:
        # Axes along which the mask is 1 wide count each value as often as x is long there.
        repeats = math.prod(x.shape[a] // mask.shape[a] for a in reduced if mask.shape[a])
        s1, s2, count = replicas.sum(s1, s2, (repeats * mask.sum(reduced, keepdims=True)).astype(s2.dtype))
    delta = s1 / jnp.maximum(count, 1)
    return count, delta, jnp.maximum(s2 - jnp.real(jnp.conj(s1) * delta), 0)


@_statistics.defjvp
@jax.named_scope(SCOPE)
def _statistics_jvp(reduced, epsilon, replicas, again, primals, tangents):  # type: ignore[no-untyped-def]
    x, _, mask = primals
    found = saved(_statistics(*primals, reduced, epsilon, replicas, again))
    dx = _counted(tangents[0], mask)
    xhat = _counted(((x - found.shift) - found.delta) * found.inverse, mask)  # what is masked may be NaN
    d1, d2 = dx.sum(reduced, keepdims=True), jnp.real(jnp.conj(xhat) * dx).sum(reduced, keepdims=True)
    d1, d2 = replicas.sum(d1, d2)
    n = jnp.maximum(found.count, 1)
    return found, Statistics(
        count=jnp.zeros_like(found.count),
        shift=jnp.zeros_like(found.shift),
        delta=d1 / n,
        m2=2 * d2 / found.inverse,
        inverse=-found.inverse * (found.inverse * (d2 / n)),
    )


def _counted(x: Inexact[Array, "..."], mask: Bool[Array, "..."] | None) -> Inexact[Array, "..."]:
    return x if mask is None else jnp.where(mask, x, 0)


def _square(x: Inexact[Array, "..."]) -> Float[Array, "..."]:
    """|x|^2"""
    return jnp.square(x) if jnp.isrealobj(x) else jnp.square(x.real) + jnp.square(x.imag)


def _counts(count: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return count.reshape(()) if count.size == 1 else count.reshape(shape)
