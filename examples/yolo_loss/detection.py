"""The loss of a Detect head (YOLOv3u, v5u, v6, v8, v9, 11, 12), and what all heads with boxes have in common.

`v8DetectionLoss` of ultralytics/utils/loss.py: task-aligned assignment, complete IoU, distribution focal loss,
cross-entropy.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .assignment import CANDIDATES, Assignment, assign, smallest_side
from .boxes import UPRIGHT, Geometry, anchor_points, distance_loss, distribution_focal_loss, expected_distances

# ultralytics/cfg/default.yaml
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5, "pose": 12.0, "kobj": 1.0, "angle": 1.0}


def detection_loss(
    predictions: Any,
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None = None,
    *,
    gains: Mapping[str, float] = GAINS,
    class_weights: jax.Array | None = None,
    candidates: tuple[int, int] = CANDIDATES,
) -> dict[str, jax.Array]:
    """The three losses, with their gains: {"box": ..., "cls": ..., "dfl": ...}.

        box = 7.5 sum_i w_i (1 - CIoU(b_i, t_i)) / W        w_i: sum of the target scores of foreground anchor i
        cls = 0.5 sum_ic BCE(s_ic, y_ic) / W                y_ic: target scores
        dfl = 1.5 sum_i w_i DFL_i / W                       W = max(1, sum of all target scores)

    Their sum times the number of images is the loss that Ultralytics differentiates; they are the `loss_items` that it
    shows. A head whose sides are one number each (`reg_max: 1`, YOLO26) has "l1" in place of "dfl".

    **Arguments:**

    - `predictions`: a Detect head's in training: `boxes` (batch, 4 * bins, anchors), `scores` (batch, classes, anchors)
      and `feats`, one feature map (batch, ..., height, width) for each level. Or what the model gives in evaluation: a
      pair with these second.
    - `targets`: `boxes` (batch, objects, 4) in pixels, `labels` (batch, objects), integers, and `mask`
      (batch, objects), which is true where there is an object.
    - `strides`: pixels a cell, by level.
    - `axis_name`: replicas' axis. W is then the sum over all replicas and the losses are multiplied by their number, so
      that the mean over replicas is the loss of one device with the whole batch. Without it each replica divides by its
      own W, as Ultralytics' DDP does.
    - `gains`: the factors 7.5, 0.5 and 1.5.
    - `class_weights`: (classes,), a factor of each class's cross-entropy: Ultralytics' `model.class_weights`.
    - `candidates`: anchors that an object takes and keeps, as in `assign`.

    **Returns:** the losses by name. **Raises:** `ValueError` where predictions or targets are those of another head.
    """
    said = head_says(predictions, "Detect")
    return detect(said, targets, strides, axis_name, gains, class_weights, candidates).losses


class Detected(NamedTuple):
    """The losses of boxes and classes, and what the losses of masks, keypoints and angles go on from."""

    losses: dict[str, jax.Array]
    assigned: Assignment
    boxes: jax.Array  # (batch, anchors, 4), in cells: what the head says
    wanted: jax.Array  # (batch, anchors, 4), in cells: what it is to say; the geometry's placeholder in the background
    weight: jax.Array  # (batch, anchors): w_i
    scale: jax.Array  # replicas / W
    points: jax.Array  # (anchors, 2), in cells
    stride: jax.Array  # (anchors,)
    size: tuple[int, int]  # height and width of the images, in pixels


def detect(
    predictions: Mapping[str, Any],
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None,
    gains: Mapping[str, float],
    class_weights: jax.Array | None = None,
    candidates: tuple[int, int] = CANDIDATES,
    geometry: Geometry = UPRIGHT,
    angle: jax.Array | None = None,
) -> Detected:
    """`detection_loss` of any kind of box."""
    logits = in_full(jnp.swapaxes(predictions["scores"], 1, 2))
    batch, anchors, _ = logits.shape
    shapes = [feature.shape[2:] for feature in predictions["feats"]]
    if len(shapes) != len(strides) or sum(height * width for height, width in shapes) != anchors:
        raise ValueError(
            f"{anchors} anchors and {len(shapes)} levels of {shapes} cells do not go with strides {tuple(strides)}: "
            "pass the model's own, one for each level (`model.stride` in PyTorch)"
        )
    _check_targets(targets, batch, len(geometry.placeholder))
    bins = jnp.moveaxis(in_full(predictions["boxes"]).reshape(batch, 4, -1, anchors), 3, 1)  # (batch, anchors, 4, bins)
    points, stride = anchor_points(shapes, strides, logits.dtype)
    boxes = geometry.decode(expected_distances(bins), points, angle)
    size = (shapes[0][0] * strides[0], shapes[0][1] * strides[0])

    assigned = assign(
        jax.nn.sigmoid(logits),
        _scaled(boxes, stride),
        points * stride[:, None],
        targets,
        smallest_side(strides),
        geometry,
        candidates,
    )
    weight = assigned.scores.sum(-1)
    scale = one_over(weight.sum(), axis_name)

    placeholder = jnp.asarray(geometry.placeholder, boxes.dtype)
    wanted = jnp.where(assigned.foreground[..., None], _scaled(assigned.boxes, 1 / stride), placeholder)
    distances = geometry.sides(points, wanted)
    classes = optax.sigmoid_binary_cross_entropy(logits, assigned.scores)
    if class_weights is not None:
        classes = classes * class_weights
    if bins.shape[-1] > 1:
        name, of_sides = "dfl", distribution_focal_loss(bins, distances)
    else:
        name, of_sides = "l1", distance_loss(bins, distances, stride, size)
    losses = {
        "box": gains["box"] * scale * jnp.sum(weight * (1 - geometry.similarity(boxes, wanted))),
        "cls": gains["cls"] * scale * jnp.sum(classes),
        name: gains["dfl"] * scale * jnp.sum(weight * of_sides),
    }
    return Detected(losses, assigned, boxes, wanted, weight, scale, points, stride, size)


def one_over(total: jax.Array, axis_name: str | None) -> jax.Array:
    """1 / max(total, 1); over replicas their number / max(sum of the totals, 1)."""
    replicas = 1
    if axis_name is not None:
        total, replicas = jax.lax.psum(total, axis_name), jax.lax.axis_size(axis_name)
    return replicas / jnp.maximum(total, 1)


def in_full(x: jax.Array) -> jax.Array:
    """At least float32, whatever the model computes in: what Ultralytics' autocast does to a loss."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def head_says(predictions: Any, head: str, *names: str) -> Mapping[str, Any]:
    """The head's own numbers, out of what a model gives in training, or (second of a pair) in evaluation."""
    said = predictions[1] if isinstance(predictions, tuple | list) and len(predictions) == 2 else predictions
    if not isinstance(said, Mapping):
        raise ValueError(f"{head} predictions are a dictionary, or a pair with it second: {type(predictions).__name__}")
    if "one2many" in said:
        raise ValueError("the model has a one-to-one branch beside the other: its loss is `end_to_end_loss`")
    missing = [name for name in ("boxes", "scores", "feats", *names) if name not in said]
    if missing:
        raise ValueError(
            f"a {head} head says {', '.join(missing)}, and this one only {', '.join(said)}: another task's?"
        )
    return said


def target(targets: Mapping[str, jax.Array], name: str, shape: str) -> jax.Array:
    if name not in targets:
        raise ValueError(f"targets have {', '.join(targets)} and no {name!r}, which is {shape}")
    return targets[name]


def _check_targets(targets: Mapping[str, jax.Array], batch: int, numbers: int) -> None:
    boxes = target(targets, "boxes", f"(batch, objects, {numbers}), in pixels")
    if boxes.ndim != 3 or boxes.shape[0] != batch or boxes.shape[2] != numbers:
        raise ValueError(f"targets['boxes'] is {boxes.shape}, expected ({batch}, objects, {numbers}), in pixels")
    for name, what in {"labels": "integers", "mask": "true where there is an object"}.items():
        given = target(targets, name, f"(batch, objects), {what}")
        if given.shape != boxes.shape[:2]:
            raise ValueError(f"targets[{name!r}] is {given.shape}, expected {boxes.shape[:2]}, {what}")
    if not jnp.issubdtype(targets["labels"].dtype, jnp.integer) or targets["mask"].dtype != bool:
        kinds = f"{targets['labels'].dtype} and {targets['mask'].dtype}"
        raise ValueError(f"targets['labels'] are integers and targets['mask'] is bool, not {kinds}")


def _scaled(boxes: jax.Array, factor: jax.Array) -> jax.Array:
    """Boxes (..., anchors, 4) times an anchor's factor; an angle, if there is one, stays."""
    return jnp.concatenate([boxes[..., :4] * factor[:, None], boxes[..., 4:]], axis=-1)
