"""The loss of a Classify head: `v8ClassificationLoss` of ultralytics/utils/loss.py."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .detection import in_full, target


def classification_loss(predictions: Any, targets: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Mean cross-entropy over the images: {"cls": ...}. The mean over replicas is that of the whole batch.

    Ultralytics differentiates this very number, and not its product with the number of images as in other tasks.

    **Arguments:**

    - `predictions`: logits (batch, classes), a Classify head's in training; or what the model gives in evaluation: the
      pair of probabilities and logits.
    - `targets`: `label` (batch,), integers.

    **Returns:** the loss by name. **Raises:** `ValueError` where predictions or targets are those of another head.
    """
    logits = predictions[1] if isinstance(predictions, tuple | list) and len(predictions) == 2 else predictions
    if isinstance(logits, Mapping) or logits.ndim != 2:
        raise ValueError("a Classify head says logits (batch, classes), in evaluation probabilities and logits")
    label = target(targets, "label", "(batch,), integers")
    if label.shape != logits.shape[:1] or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"targets['label'] is {label.dtype}{label.shape}, expected {logits.shape[:1]}, integers")
    return {"cls": jnp.mean(optax.softmax_cross_entropy_with_integer_labels(in_full(logits), label))}
