"""The loss of a Pose head: `v8PoseLoss` of ultralytics/utils/loss.py.

Object keypoint similarity is COCO's (https://cocodataset.org/#keypoints-eval): exp(-d^2 / (2 a (2 sigma)^2)) of a
keypoint d away from its place in an object of area a.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .detection import GAINS, detect, head_says, in_full, one_over, target

# How far COCO's annotators disagree about each keypoint of a person, from the nose to the ankles.
COCO_SIGMAS = np.divide(
    [0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89],
    10,
    dtype=np.float32,
)


def pose_loss(
    predictions: Any,
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None = None,
    *,
    gains: Mapping[str, float] = GAINS,
    class_weights: jax.Array | None = None,
    sigmas: Any = None,
) -> dict[str, jax.Array]:
    """The five losses, with their gains: those of `detection_loss`, "pose" and "kobj".

        pose = 12 / (N K) sum_ik v_ik (K / V_i) (1 - exp(-d_ik^2 / (2 a_i (2 sigma_k)^2)))
        kobj = 1 / (N K) sum_ik BCE(s_ik, v_ik)

    over the N foreground anchors and K keypoints: v_ik is 1 where anchor i's object has keypoint k, V_i its sum over
    k, d_ik the distance between what the anchor says and the truth, a_i the area of the object's box, s_ik the logit
    of the keypoint's being there. A head that says only where keypoints are has no `kobj`: it is 0.

    **Arguments:** as for `detection_loss`.

    - `predictions` have `kpts` (batch, K * 2 or 3, anchors) too.
    - `targets` have `keypoints` (batch, objects, K, 2 or 3): x and y in pixels, and visibility, which is 0 where an
      object has no such keypoint. Without visibility all count.
    - `sigmas`: (K,); COCO's for 17 keypoints with visibility, otherwise 1 / K, as in Ultralytics.

    **Returns:** the losses by name. **Raises:** `ValueError` where predictions or targets are those of another head.
    """
    said = head_says(predictions, "Pose", "kpts")
    if "kpts_sigma" in said:
        raise ValueError("YOLO26's pose estimation (Pose26: a flow of residuals, another assigner) is not covered")
    keypoints = target(targets, "keypoints", "(batch, objects, keypoints, 2 or 3)")
    mask = target(targets, "mask", "(batch, objects), true where there is an object")
    count = keypoints.shape[2] if keypoints.ndim == 4 else 0
    numbers = said["kpts"].shape[1] / max(count, 1)
    if keypoints.shape[:2] != mask.shape or keypoints.shape[-1] not in (2, 3) or numbers not in (2, 3):
        raise ValueError(
            f"targets['keypoints'] is {keypoints.shape}, expected {(*mask.shape, 'K', '2 or 3')} with the K "
            f"keypoints of 2 or 3 numbers that are {said['kpts'].shape[1]} channels of the head"
        )
    if sigmas is None:
        sigmas = COCO_SIGMAS if (count, numbers) == (17, 3) else np.full(count, 1 / count)
    sigmas = np.asarray(sigmas)
    if sigmas.shape != (count,) or not (sigmas > 0).all():
        raise ValueError(f"sigmas are {count} positive numbers, one for each keypoint: {sigmas}")

    found = detect(said, targets, strides, axis_name, gains, class_weights)
    batch, anchors = found.weight.shape
    kpts = jnp.moveaxis(in_full(said["kpts"]).reshape(batch, count, -1, anchors), 3, 1)  # (batch, anchors, K, 2 or 3)
    where = kpts[..., :2] * 2 + (found.points - 0.5)[:, None]  # in cells
    wanted = jnp.take_along_axis(keypoints.astype(where.dtype), found.assigned.object[..., None, None], axis=1)
    seen = wanted[..., 2] != 0 if wanted.shape[-1] == 3 else jnp.ones(wanted.shape[:-1], bool)
    foreground = found.assigned.foreground[..., None]
    seen &= foreground

    away = jnp.sum((where - wanted[..., :2] / found.stride[:, None, None]) ** 2, axis=-1)
    area = jnp.prod(found.wanted[..., 2:] - found.wanted[..., :2], axis=-1, keepdims=True)
    error = away / ((2 * sigmas) ** 2 * (area + 1e-9) * 2)
    factor = count / (jnp.sum(seen, axis=-1, keepdims=True) + 1e-9)
    # Where nothing is to learn the error is of no meaning, and may be so large that its derivative is none either.
    of_places = jnp.where(seen, factor * -jnp.expm1(-jnp.where(seen, error, 0)), 0)
    of_being = jnp.zeros_like(of_places)
    if numbers == 3:
        of_being = jnp.where(foreground, optax.sigmoid_binary_cross_entropy(kpts[..., 2], seen.astype(kpts.dtype)), 0)
    scale = one_over(jnp.sum(foreground).astype(kpts.dtype), axis_name) / count
    return {
        **found.losses,
        "pose": gains["pose"] * scale * jnp.sum(of_places),
        "kobj": gains["kobj"] * scale * jnp.sum(of_being),
    }
