"""YOLOv8's detection loss in JAX: task-aligned assignment, complete IoU, distribution focal loss, cross-entropy.

The numbers are those of `v8DetectionLoss` (ultralytics/utils/loss.py, Ultralytics 8.4) on the same batch. Targets are
padded to a fixed number of objects an image, with a mask, so that a training step compiles once whatever is in it.

The parts, and where they come from:

- assignment: Feng et al., TOOD: Task-aligned One-stage Object Detection, ICCV 2021 (https://arxiv.org/abs/2108.07755),
  with what `TaskAlignedAssigner` (ultralytics/utils/tal.py) adds to it;
- complete IoU: Zheng et al., Distance-IoU Loss, AAAI 2020 (https://arxiv.org/abs/1911.08287);
- distribution focal loss: Li et al., Generalized Focal Loss, NeurIPS 2020 (https://arxiv.org/abs/2006.04388).

Boxes are corners (x1, y1, x2, y2), in pixels unless a comment says in cells: pixels divided by their level's stride.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

TOPK = 10  # anchors that an object may choose
ALPHA, BETA = 0.5, 6.0  # of the alignment: score ** ALPHA * IoU ** BETA
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}  # ultralytics/cfg/default.yaml


class Assignment(NamedTuple):
    """What each anchor is to learn."""

    foreground: jax.Array  # (batch, anchors), bool
    object: jax.Array  # (batch, anchors), index into the image's objects; 0 where there is none
    boxes: jax.Array  # (batch, anchors, 4)
    scores: jax.Array  # (batch, anchors, classes); 0 but for the object's class


def detection_loss(
    predictions: Mapping[str, Any],
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """The three losses, with their gains: {"box": ..., "cls": ..., "dfl": ...}.

        box = 7.5 sum_i w_i (1 - CIoU(b_i, t_i)) / W        w_i: sum of the target scores of foreground anchor i
        cls = 0.5 sum_ic BCE(s_ic, y_ic) / W                y_ic: target scores
        dfl = 1.5 sum_i w_i DFL_i / W                       W = max(1, sum of all target scores)

    Their sum times the number of images is the loss that Ultralytics differentiates; they are the `loss_items` that it
    shows.

    **Arguments:**

    - `predictions`: a Detect head's in training: `boxes` (batch, 4 * bins, anchors), `scores` (batch, classes, anchors)
      and `feats`, one feature map (batch, ..., height, width) for each level.
    - `targets`: `boxes` (batch, objects, 4), `labels` (batch, objects), integers, and `mask` (batch, objects), which is
      true where there is an object.
    - `strides`: pixels a cell, by level.
    - `axis_name`: replicas' axis. W is then the sum over all replicas and the losses are multiplied by their number, so
      that the mean over replicas is the loss of one device with the whole batch. Without it each replica divides by its
      own W, as Ultralytics' DDP does.
    """
    logits = jnp.swapaxes(predictions["scores"], 1, 2)
    batch, anchors, _ = logits.shape
    bins = jnp.moveaxis(predictions["boxes"].reshape(batch, 4, -1, anchors), 3, 1)  # (batch, anchors, 4, bins)
    points, stride = anchor_points([feature.shape[2:] for feature in predictions["feats"]], strides, logits.dtype)
    boxes = decode(bins, points)  # in cells

    assigned = assign(
        jax.nn.sigmoid(logits), boxes * stride[:, None], points * stride[:, None], targets, smallest_side(strides)
    )
    weight = assigned.scores.sum(-1)
    total, replicas = weight.sum(), 1
    if axis_name is not None:
        total, replicas = jax.lax.psum(total, axis_name), jax.lax.axis_size(axis_name)
    scale = replicas / jnp.maximum(total, 1)

    # A background anchor has weight 0. It gets a box like any other, so that no derivative on the way is infinite.
    wanted = jnp.where(assigned.foreground[..., None], assigned.boxes / stride[:, None], jnp.asarray([0, 0, 1, 1]))
    classes = optax.sigmoid_binary_cross_entropy(logits, assigned.scores)
    return {
        "box": GAINS["box"] * scale * jnp.sum(weight * (1 - complete_iou(boxes, wanted))),
        "cls": GAINS["cls"] * scale * jnp.sum(classes),
        "dfl": GAINS["dfl"] * scale * jnp.sum(weight * distribution_focal_loss(bins, points, wanted)),
    }


def smallest_side(strides: Sequence[int]) -> int:
    """Objects are assigned as if no side were shorter than this: the second level's stride."""
    return strides[min(1, len(strides) - 1)]


def anchor_points(shapes: Sequence[tuple[int, ...]], strides: Sequence[int], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The cells' centres (anchors, 2), in cells, and their levels' strides (anchors,). Level by level, row by row."""
    points, stride = [], []
    for (height, width), pixels in zip(shapes, strides, strict=True):
        y, x = jnp.meshgrid(jnp.arange(height, dtype=dtype), jnp.arange(width, dtype=dtype), indexing="ij")
        points.append(jnp.stack([x, y], -1).reshape(-1, 2) + 0.5)
        stride.append(jnp.full(height * width, pixels, dtype))
    return jnp.concatenate(points), jnp.concatenate(stride)


def decode(bins: jax.Array, points: jax.Array) -> jax.Array:
    """Boxes (..., anchors, 4) in cells. A side's distance from the anchor is a distribution's mean, over 0, 1, ..."""
    distances = jax.nn.softmax(bins, axis=-1) @ jnp.arange(bins.shape[-1], dtype=bins.dtype)
    before, after = jnp.split(distances, 2, axis=-1)
    return jnp.concatenate([points - before, points + after], axis=-1)


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


def distribution_focal_loss(bins: jax.Array, points: jax.Array, boxes: jax.Array) -> jax.Array:
    """Cross-entropy between a side's distribution and its true distance, shared by the two integers next to it.

    Mean over the four sides, (batch, anchors). The distance t puts the weight max(0, 1 - |k - t|) on the integer k.
    """
    last = bins.shape[-1] - 1
    distance = jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)
    distance = jnp.clip(distance, 0, last - 0.01)[..., None]
    share = jnp.maximum(0, 1 - jnp.abs(jnp.arange(last + 1, dtype=bins.dtype) - distance))
    return -jnp.mean(jnp.sum(share * jax.nn.log_softmax(bins, axis=-1), axis=-1), axis=-1)


def assign(
    scores: jax.Array, boxes: jax.Array, points: jax.Array, targets: Mapping[str, jax.Array], smallest: int
) -> Assignment:
    """Which anchors learn which object, and how sure of it they are to be.

    An object's candidates are the anchors whose centre is inside its box (sides shorter than `smallest` pixels count as
    that). The alignment of a candidate is score ** 0.5 * IoU ** 6, with the score of the object's class and CIoU, at
    least 0. The object takes its ten best candidates; an anchor that several objects take goes to the one that it
    overlaps most. Its target score is its alignment, scaled so that an object's best is the object's best CIoU.

    Nothing here is differentiated. Among candidates of equal alignment the first are taken; PyTorch's topk leaves that
    open. It matters where alignments are exactly 0, and those anchors have target score 0.

    **Arguments:** `scores` (batch, anchors, classes), probabilities; `boxes` (batch, anchors, 4); `points`
    (anchors, 2); `targets` as for `detection_loss`. All in pixels.
    """
    scores, boxes = jax.lax.stop_gradient((scores, boxes))
    labels, mask, given = targets["labels"], targets["mask"], targets["boxes"].astype(boxes.dtype)
    candidate = _inside(points, given, smallest) & mask[..., None]  # (batch, objects, anchors)

    of_class = jnp.take_along_axis(jnp.swapaxes(scores, 1, 2), labels[..., None], axis=1)  # (batch, objects, anchors)
    overlap = jnp.maximum(complete_iou(given[:, :, None], boxes[:, None]), 0)
    overlap = jnp.where(candidate, overlap, 0)
    alignment = jnp.where(candidate, of_class**ALPHA * overlap**BETA, 0)

    _, best = jax.lax.top_k(alignment, TOPK)
    taken = jnp.zeros(candidate.shape, bool)
    taken = jnp.put_along_axis(taken, best, True, axis=-1, inplace=False) & candidate
    # Several objects: the one of highest overlap, whether or not the anchor was among its best.
    highest = jnp.arange(labels.shape[1])[:, None] == jnp.argmax(overlap, axis=1)[:, None]
    taken = jnp.where(jnp.sum(taken, axis=1, keepdims=True) > 1, highest, taken)

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


def _inside(points: jax.Array, boxes: jax.Array, smallest: int) -> jax.Array:
    """Whether points (anchors, 2) are inside boxes (batch, objects, 4), by over 1e-9: (batch, objects, anchors)."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    half = jnp.where(size < smallest, smallest, size) / 2
    first, last = (centre - half)[:, :, None], (centre + half)[:, :, None]
    return jnp.all((points - first > 1e-9) & (last - points > 1e-9), axis=-1)
