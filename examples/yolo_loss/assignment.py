"""Which anchors learn which object, and how sure of it they are to be.

Feng et al., TOOD: Task-aligned One-stage Object Detection, ICCV 2021 (https://arxiv.org/abs/2108.07755), with what
`TaskAlignedAssigner` (ultralytics/utils/tal.py) adds to it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .boxes import UPRIGHT, Geometry

ALPHA, BETA = 0.5, 6.0  # of the alignment: score ** ALPHA * overlap ** BETA
CANDIDATES = (10, 10)  # anchors that an object may choose, and how many of them it may keep


class Assignment(NamedTuple):
    """What each anchor is to learn."""

    foreground: jax.Array  # (batch, anchors), bool
    object: jax.Array  # (batch, anchors), index into the image's objects; 0 where there is none
    boxes: jax.Array  # (batch, anchors, 4), or 5 numbers where boxes are rotated
    scores: jax.Array  # (batch, anchors, classes); 0 but for the object's class


def smallest_side(strides: Sequence[int]) -> int:
    """Objects are assigned as if no side were shorter than this: the second level's stride."""
    return strides[min(1, len(strides) - 1)]


def assign(
    scores: jax.Array,
    boxes: jax.Array,
    points: jax.Array,
    targets: Mapping[str, jax.Array],
    smallest: int,
    geometry: Geometry = UPRIGHT,
    candidates: tuple[int, int] = CANDIDATES,
) -> Assignment:
    """Gives anchors to objects by how well the score and the box that they predict agree with the object's.

    An object's candidates are the anchors whose centre is inside its box (sides shorter than `smallest` pixels count as
    that). The alignment of a candidate is score ** 0.5 * overlap ** 6, with the score of the object's class and CIoU
    (rotated: probabilistic IoU), at least 0. The object takes its ten best candidates; an anchor that several objects
    take goes to the one that it overlaps most. Its target score is its alignment, scaled so that an object's best is
    the object's best overlap. With other `candidates` (a one-to-one branch has (7, 1)) an object takes so many, and
    keeps so many of those that it did not lose to another.

    Nothing here is differentiated. Among candidates of equal alignment the first are taken; PyTorch's topk leaves that
    open. It matters where alignments are exactly 0, and those anchors have target score 0.

    **Arguments:** `scores` (batch, anchors, classes), probabilities; `boxes` (batch, anchors, 4); `points`
    (anchors, 2); `targets` as for `detection_loss`. All in pixels.
    """
    scores, boxes = jax.lax.stop_gradient((scores, boxes))
    labels, mask, given = targets["labels"], targets["mask"], targets["boxes"].astype(boxes.dtype)
    candidate = geometry.inside(points, given, smallest) & mask[..., None]  # (batch, objects, anchors)

    of_class = jnp.take_along_axis(jnp.swapaxes(scores, 1, 2), labels[..., None], axis=1)  # (batch, objects, anchors)
    overlap = jnp.maximum(geometry.overlap(given[:, :, None], boxes[:, None]), 0)
    overlap = jnp.where(candidate, overlap, 0)
    alignment = jnp.where(candidate, of_class**ALPHA * overlap**BETA, 0)

    taken = _best(alignment, candidates[0]) & candidate
    # Several objects: the one of highest overlap, whether or not the anchor was among its best.
    highest = jnp.arange(labels.shape[1])[:, None] == jnp.argmax(overlap, axis=1)[:, None]
    taken = jnp.where(jnp.sum(taken, axis=1, keepdims=True) > 1, highest, taken)
    if candidates[1] != candidates[0]:
        taken &= _best(jnp.where(taken, alignment, 0), candidates[1])

    alignment, overlap = jnp.where(taken, alignment, 0), jnp.where(taken, overlap, 0)
    most, largest = (jnp.max(x, axis=-1, keepdims=True) for x in (alignment, overlap))
    certainty = jnp.max(alignment * largest / (most + 1e-9), axis=1)

    foreground, chosen = jnp.any(taken, axis=1), jnp.argmax(taken, axis=1)
    label = jnp.take_along_axis(labels, chosen, axis=1)
    one_hot = jax.nn.one_hot(label, scores.shape[-1], dtype=scores.dtype)
    return Assignment(
        foreground,
        chosen,
        jnp.take_along_axis(given, chosen[..., None], axis=1),
        jnp.where(foreground, certainty, 0)[..., None] * one_hot,
    )


def _best(alignment: jax.Array, count: int) -> jax.Array:
    """Whether an anchor is among the `count` best of an object, (batch, objects, anchors)."""
    _, best = jax.lax.top_k(alignment, count)
    return jnp.put_along_axis(jnp.zeros(alignment.shape, bool), best, True, axis=-1, inplace=False)
