"""Rotated boxes (x, y, width, height, angle) and the loss of an OBB head: `v8OBBLoss` of ultralytics/utils/loss.py.

The angle is in radians, from the x axis to the side of length `width`, towards y.

Probabilistic IoU: Llerena et al., Gaussian Bounding Boxes and Probabilistic Intersection-over-Union for Object
Detection, 2021 (https://arxiv.org/abs/2106.06072).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .assignment import CANDIDATES
from .boxes import Geometry
from .detection import GAINS, detect, head_says, in_full, target

SHORTEST = 2  # pixels: boxes with a shorter side are left out
FLOOR = 0.01  # added to the variances of boxes that learn, in cells: bounds the derivative of small ones
ASPECT = 3  # how long a box may be, as exp(ASPECT), before its angle matters little


def rotated_loss(
    predictions: Any,
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None = None,
    *,
    gains: Mapping[str, float] = GAINS,
    class_weights: jax.Array | None = None,
    candidates: tuple[int, int] = CANDIDATES,
) -> dict[str, jax.Array]:
    """The four losses, with their gains: those of `detection_loss`, with probabilistic IoU, and "angle".

        angle = sum_i w_i exp(-log(w / h)^2 / 9) sin(2 (a_i - a))^2 / W        w, h, a: the object's

    **Arguments:** as for `detection_loss`. `predictions` have `angle` (batch, 1, anchors) too, in radians; `boxes` of
    the targets are (batch, objects, 5): centre, width and height in pixels, and the angle. Objects with a side
    shorter than two pixels are left out, as Ultralytics leaves them out.

    **Returns:** the losses by name. **Raises:** `ValueError` where predictions or targets are those of another head.
    """
    said = head_says(predictions, "OBB", "angle")
    boxes = target(targets, "boxes", "(batch, objects, 5): centre, width, height, angle")
    large = jnp.all(boxes[..., 2:4] >= SHORTEST, axis=-1)
    targets = {**targets, "mask": target(targets, "mask", "(batch, objects), true where there is an object") & large}
    angle = in_full(jnp.swapaxes(said["angle"], 1, 2))
    found = detect(said, targets, strides, axis_name, gains, class_weights, candidates, ROTATED, angle)
    width, height, wanted = (found.wanted[..., i] for i in (2, 3, 4))
    log_aspect = jnp.log((width + 1e-9) / (height + 1e-9))
    off = jnp.sin(2 * (found.boxes[..., 4] - wanted)) ** 2
    of_angles = jnp.sum(found.weight * jnp.exp(-(log_aspect**2) / ASPECT**2) * off)
    return {**found.losses, "angle": gains["angle"] * found.scale * of_angles}


def decode(distances: jax.Array, points: jax.Array, angle: jax.Array) -> jax.Array:
    """Boxes (..., anchors, 5) in cells. The distances are along the box's own axes, which `angle` (..., 1) turns."""
    before, after = jnp.split(distances, 2, axis=-1)
    centre = points + _turned((after - before) / 2, angle[..., 0])
    return jnp.concatenate([centre, before + after, angle], axis=-1)


def sides(points: jax.Array, boxes: jax.Array) -> jax.Array:
    offset = _turned(boxes[..., :2] - points, -boxes[..., 4])
    half = boxes[..., 2:4] / 2
    return jnp.concatenate([half - offset, half + offset], axis=-1)


def inside(points: jax.Array, boxes: jax.Array, smallest: int) -> jax.Array:
    """Whether points (anchors, 2) are in boxes (batch, objects, 5), the border included: (batch, objects, anchors).

    As Ultralytics decides it, from the corners: a point on the border falls on the same side by the same rounding.
    """
    size = jnp.where(boxes[..., 2:4] < smallest, smallest, boxes[..., 2:4])
    cos, sin = jnp.cos(boxes[..., 4]), jnp.sin(boxes[..., 4])
    along = jnp.stack([size[..., 0] / 2 * cos, size[..., 0] / 2 * sin], -1)
    across = jnp.stack([-size[..., 1] / 2 * sin, size[..., 1] / 2 * cos], -1)
    centre = boxes[..., :2]
    corner, next_one, before = centre + along + across, centre + along - across, centre - along + across
    found = True
    for edge in (next_one - corner, before - corner):
        at = points[:, 0] - corner[..., :1], points[:, 1] - corner[..., 1:]  # (batch, objects, anchors)
        along_edge = at[0] * edge[..., :1] + at[1] * edge[..., 1:]
        found &= (along_edge >= 0) & (along_edge <= jnp.sum(edge * edge, axis=-1, keepdims=True))
    return found


def probabilistic_iou(box: jax.Array, other: jax.Array, floor: float = 0, epsilon: float = 1e-7) -> jax.Array:
    """1 less the Hellinger distance of the Gaussians that have the boxes' centres and covariances.

        H^2 = 1 - exp(-B)        B = d' S^-1 d / 8 + log(|S| / sqrt(|S1| |S2|)) / 2        S = (S1 + S2) / 2

    up to Ultralytics' epsilons (`probiou`, ultralytics/utils/metrics.py). A side of length l has the variance l^2 / 12.
    """
    (a1, b1, c1), (a2, b2, c2) = _covariance(box, floor), _covariance(other, floor)
    a, b, c = a1 + a2, b1 + b2, c1 + c2
    x, y = box[..., 0] - other[..., 0], box[..., 1] - other[..., 1]
    determinant = a * b - c**2
    near = (a * y**2 + b * x**2) / (determinant + epsilon) / 4 - c * x * y / (determinant + epsilon) / 2
    each = _within(a1 * b1 - c1**2, 0, math.inf) * _within(a2 * b2 - c2**2, 0, math.inf)
    alike = jnp.log(determinant / (4 * jnp.sqrt(each) + epsilon) + epsilon) / 2
    distance = _within(near + alike, epsilon, 100)
    return 1 - jnp.sqrt(1 - jnp.exp(-distance) + epsilon)


ROTATED = Geometry(
    decode,
    inside,
    probabilistic_iou,
    functools.partial(probabilistic_iou, floor=FLOOR),
    sides,
    placeholder=(0.5, 0.5, 1, 1, 0),
)


def _turned(vector: jax.Array, angle: jax.Array) -> jax.Array:
    x, y, cos, sin = vector[..., 0], vector[..., 1], jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([x * cos - y * sin, x * sin + y * cos], axis=-1)


def _covariance(boxes: jax.Array, floor: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[[a, c], [c, b]] of each box."""
    along, across = boxes[..., 2] ** 2 / 12 + floor, boxes[..., 3] ** 2 / 12 + floor
    cos, sin = jnp.cos(boxes[..., 4]), jnp.sin(boxes[..., 4])
    return along * cos**2 + across * sin**2, along * sin**2 + across * cos**2, (along - across) * cos * sin


def _within(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clipped. At a limit the derivative is torch.clamp's, 1."""
    return jnp.where((x >= low) & (x <= high), x, jnp.clip(jax.lax.stop_gradient(x), low, high))
