"""The loss of a Segment head: `v8SegmentationLoss` of ultralytics/utils/loss.py.

An object's mask is a sum of prototypes, which an image has once, with coefficients, which each anchor says: Bolya et
al., YOLACT, ICCV 2019 (https://arxiv.org/abs/1904.02689).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .detection import GAINS, Detected, detect, head_says, in_full, one_over, target

MASKS = (
    "(batch, height, width), integers: i + 1 where object i is and 0 in the background; or (batch, objects, height, "
    "width), one mask for each object"
)


def segmentation_loss(
    predictions: Any,
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None = None,
    *,
    gains: Mapping[str, float] = GAINS,
    class_weights: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The four losses, with their gains: those of `detection_loss`, and "seg".

        seg = 7.5 / N sum_i mean over pixels in box i of BCE(m_i, t_i) * (pixels of the image) / (pixels of box i)

    over the N foreground anchors: m_i is the mask that anchor i says, t_i that of its object. The gain is that of
    boxes, as in Ultralytics.

    **Arguments:** as for `detection_loss`.

    - `predictions` have `mask_coefficient` (batch, prototypes, anchors) and `proto` (batch, prototypes, height, width)
      too.
    - `targets` have `masks`: (batch, height, width), integers, i + 1 where the image's object i is and 0 in the
      background (Ultralytics' `overlap_mask: True`, its default); or (batch, objects, height, width), one for each
      object. Where they are not of the prototypes' size, the prototypes are interpolated to theirs.

    **Returns:** the losses by name. **Raises:** `ValueError` where predictions or targets are those of another head.
    """
    said = head_says(predictions, "Segment", "mask_coefficient", "proto")
    if isinstance(said["proto"], tuple | list):
        raise ValueError("YOLO26's segmentation (Segment26: semantic prototypes, another assigner) is not covered")
    masks = target(targets, "masks", MASKS)
    batch, objects = target(targets, "mask", "(batch, objects), true where there is an object").shape
    if masks.ndim not in (3, 4) or masks.shape[:-2] not in ((batch,), (batch, objects)):
        raise ValueError(f"targets['masks'] is {masks.shape}, expected {MASKS}; batch {batch}, objects {objects}")

    found = detect(said, targets, strides, axis_name, gains, class_weights)
    proto = in_full(said["proto"])
    if proto.shape[2:] != masks.shape[-2:]:
        proto = jax.image.resize(proto, (*proto.shape[:2], *masks.shape[-2:]), "linear", antialias=False)
    coefficients = in_full(jnp.swapaxes(said["mask_coefficient"], 1, 2))
    of_anchors = _of_anchors(found, coefficients, proto, masks, objects)
    scale = one_over(jnp.sum(found.assigned.foreground).astype(proto.dtype), axis_name)
    return {**found.losses, "seg": gains["box"] * scale * jnp.sum(of_anchors)}


def _of_anchors(
    found: Detected, coefficients: jax.Array, proto: jax.Array, masks: jax.Array, objects: int
) -> jax.Array:
    """The losses of foreground anchors, (batch, foreground); 0 where an image has fewer.

    An object has ten anchors at most, so that many times the objects are computed, and not all anchors.
    """
    assigned = found.assigned
    room = min(assigned.foreground.shape[1], 10 * objects)
    first = jnp.argsort(~assigned.foreground, axis=1, stable=True)[:, :room]  # the foreground, in its order

    def pick(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, first.reshape(*first.shape, *[1] * (x.ndim - 2)), axis=1)

    foreground, chosen = pick(assigned.foreground), pick(assigned.object)
    height, width = masks.shape[-2:]
    # In shares of the image, and then in pixels of the mask.
    boxes = pick(assigned.boxes) / jnp.asarray([found.size[1], found.size[0]] * 2, proto.dtype)
    area = jnp.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
    x1, y1, x2, y2 = jnp.moveaxis(boxes * jnp.asarray([width, height] * 2, proto.dtype), -1, 0)[..., None]
    x, y = jnp.arange(width, dtype=proto.dtype), jnp.arange(height, dtype=proto.dtype)
    in_box = ((y >= y1) & (y < y2))[..., :, None] & ((x >= x1) & (x < x2))[..., None, :]

    if masks.ndim == 3:
        wanted = masks[:, None] == chosen[..., None, None] + 1
    else:
        wanted = jnp.take_along_axis(masks, chosen[..., None, None], axis=1)
    logits = jnp.einsum("bip,bphw->bihw", pick(coefficients), proto)
    losses = optax.sigmoid_binary_cross_entropy(logits, wanted.astype(proto.dtype))
    losses = jnp.mean(jnp.where(in_box, losses, 0), axis=(2, 3))
    return jnp.where(foreground, losses / jnp.where(foreground, area, 1), 0)
