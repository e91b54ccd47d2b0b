"""The loss of models with a one-to-one branch beside the usual one (YOLOv10, YOLO26): `E2ELoss` of Ultralytics.

Wang et al., YOLOv10: Real-Time End-to-End Object Detection, NeurIPS 2024 (https://arxiv.org/abs/2405.14458).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .assignment import CANDIDATES

ONE = (7, 1)  # anchors that an object of the one-to-one branch chooses, and how many of them it keeps
FIRST, LAST = 0.8, 0.1  # the one-to-many branch's share of the loss, in the first and the last epoch


def end_to_end_loss(
    loss: Callable[..., dict[str, jax.Array]],
    predictions: Any,
    targets: Mapping[str, jax.Array],
    strides: Sequence[int],
    axis_name: str | None = None,
    *,
    many: float | jax.Array = FIRST,
    **options: Any,
) -> dict[str, jax.Array]:
    """many * loss(one-to-many branch) + (1 - many) * loss(one-to-one branch), by name.

    Their sum times the number of images is the loss that Ultralytics differentiates. (Those that it shows are the
    one-to-one branch's alone.)

    **Arguments:**

    - `loss`: `detection_loss` or `rotated_loss`; `options` are its.
    - `predictions`: {"one2many": ..., "one2one": ...}, or what the model gives in evaluation: a pair with it second.
    - `many`: `share_of_many(epoch, epochs)`.

    **Returns:** the losses by name. **Raises:** `ValueError` where the model has no one-to-one branch.
    """
    said = predictions[1] if isinstance(predictions, tuple | list) and len(predictions) == 2 else predictions
    if not isinstance(said, Mapping) or not {"one2many", "one2one"} <= said.keys():
        raise ValueError("the model has no one-to-one branch (predictions one2many and one2one): use its task's loss")
    of_many = loss(said["one2many"], targets, strides, axis_name, candidates=CANDIDATES, **options)
    of_one = loss(said["one2one"], targets, strides, axis_name, candidates=ONE, **options)
    return {name: many * of_many[name] + (1 - many) * of_one[name] for name in of_many}


def share_of_many(epoch: int, epochs: int) -> float:
    """From 0.8 in epoch 0 to 0.1 in the last, in equal steps: `E2ELoss.decay`."""
    return max(1 - epoch / max(epochs - 1, 1), 0) * (FIRST - LAST) + LAST
