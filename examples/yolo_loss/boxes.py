"""Upright boxes: anchors, decoding, complete IoU, and the losses of a box's four sides.

Boxes are corners (x1, y1, x2, y2), in pixels unless a comment says in cells: pixels divided by their level's stride.

- complete IoU: Zheng et al., Distance-IoU Loss, AAAI 2020 (https://arxiv.org/abs/1911.08287);
- distribution focal loss: Li et al., Generalized Focal Loss, NeurIPS 2020 (https://arxiv.org/abs/2006.04388).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Geometry(NamedTuple):
    """What a kind of box is to a loss. Boxes have `len(placeholder)` numbers."""

    decode: Callable[..., jax.Array]  # (distances, points, angle or None) -> boxes in cells
    inside: Callable[..., jax.Array]  # (points, boxes, smallest side) -> bool (batch, objects, anchors)
    overlap: Callable[..., jax.Array]  # (objects' boxes, predicted ones) -> what candidates compete by
    similarity: Callable[..., jax.Array]  # (predicted boxes, wanted ones) in cells -> 1 less the loss
    sides: Callable[..., jax.Array]  # (points, boxes) -> distances: decode's inverse
    # A background anchor has weight 0. It learns this box, so that no derivative on the way is infinite.
    placeholder: tuple[float, ...]


def anchor_points(shapes: Sequence[tuple[int, ...]], strides: Sequence[int], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The cells' centres (anchors, 2), in cells, and their levels' strides (anchors,). Level by level, row by row."""
    points, stride = [], []
    for (height, width), pixels in zip(shapes, strides, strict=True):
        y, x = jnp.meshgrid(jnp.arange(height, dtype=dtype), jnp.arange(width, dtype=dtype), indexing="ij")
        points.append(jnp.stack([x, y], -1).reshape(-1, 2) + 0.5)
        stride.append(jnp.full(height * width, pixels, dtype))
    return jnp.concatenate(points), jnp.concatenate(stride)


def expected_distances(bins: jax.Array) -> jax.Array:
    """A side's distance from the anchor is its distribution's mean over 0, 1, ...; of one bin (YOLO26), the number."""
    if bins.shape[-1] == 1:
        return bins[..., 0]
    return jax.nn.softmax(bins, axis=-1) @ jnp.arange(bins.shape[-1], dtype=bins.dtype)


def decode(distances: jax.Array, points: jax.Array, angle: None = None) -> jax.Array:
    """Boxes (..., anchors, 4) in cells, from the distances (..., anchors, 4) of the left, top, right and lower side."""
    before, after = jnp.split(distances, 2, axis=-1)
    return jnp.concatenate([points - before, points + after], axis=-1)


def sides(points: jax.Array, boxes: jax.Array) -> jax.Array:
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def inside(points: jax.Array, boxes: jax.Array, smallest: int) -> jax.Array:
    """Whether points (anchors, 2) are inside boxes (batch, objects, 4), by over 1e-9: (batch, objects, anchors)."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    half = jnp.where(size < smallest, smallest, size) / 2
    first, last = (centre - half)[:, :, None], (centre + half)[:, :, None]
    return jnp.all((points - first > 1e-9) & (last - points > 1e-9), axis=-1)


def complete_iou(box: jax.Array, target: jax.Array, epsilon: float = 1e-7) -> jax.Array:
    """CIoU = IoU - d^2 / c^2 - a v, of corresponding boxes (..., 4), up to Ultralytics' epsilons (`bbox_iou`).

    d is the distance of the centres, c the diagonal of the box around both, v = 4 / pi^2 (atan(w'/h') - atan(w/h))^2
    and a = v / (1 - IoU + v), a constant to differentiation.
    """
    size, of_target = (b[..., 2:] - b[..., :2] + jnp.asarray([0, epsilon], b.dtype) for b in (box, target))
    overlap = jnp.minimum(box[..., 2:], target[..., 2:]) - jnp.maximum(box[..., :2], target[..., :2])
    # where and not maximum: at 0 its derivative is that of torch.clamp.
    intersection = jnp.prod(jnp.where(overlap >= 0, overlap, 0), axis=-1)
    iou = intersection / (jnp.prod(size, axis=-1) + jnp.prod(of_target, axis=-1) - intersection + epsilon)

    around = jnp.maximum(box[..., 2:], target[..., 2:]) - jnp.minimum(box[..., :2], target[..., :2])
    diagonal = jnp.sum(around**2, axis=-1) + epsilon
    distance = jnp.sum((target[..., :2] + target[..., 2:] - box[..., :2] - box[..., 2:]) ** 2, axis=-1) / 4
    angles = [jnp.arctan(wh[..., 0] / wh[..., 1]) for wh in (of_target, size)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    a = jax.lax.stop_gradient(v / (1 - iou + v + epsilon))
    return iou - distance / diagonal - a * v


UPRIGHT = Geometry(decode, inside, complete_iou, complete_iou, sides, placeholder=(0, 0, 1, 1))


def distribution_focal_loss(bins: jax.Array, distances: jax.Array) -> jax.Array:
    """Cross-entropy between a side's distribution and its true distance, shared by the two integers next to it.

    Mean over the four sides, (batch, anchors). The distance t puts the weight max(0, 1 - |k - t|) on the integer k.
    """
    last = bins.shape[-1] - 1
    distances = jnp.clip(distances, 0, last - 0.01)[..., None]
    share = jnp.maximum(0, 1 - jnp.abs(jnp.arange(last + 1, dtype=bins.dtype) - distances))
    return -jnp.mean(jnp.sum(share * jax.nn.log_softmax(bins, axis=-1), axis=-1), axis=-1)


def distance_loss(bins: jax.Array, distances: jax.Array, stride: jax.Array, size: tuple[float, float]) -> jax.Array:
    """Where a side has one number and no distribution (YOLO26): mean of |difference|, in shares of the image.

    `stride` (anchors,) is pixels a cell, `size` the image's height and width in pixels.
    """
    height, width = size
    share = stride[:, None] / jnp.asarray([width, height, width, height], bins.dtype)
    return jnp.mean(jnp.abs((bins[..., 0] - distances) * share), axis=-1)
