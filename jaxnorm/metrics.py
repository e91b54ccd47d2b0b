"""Metrics of a classifier, one value an example, for `eval_step`."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Integer, Shaped


def in_top_k(logits: Shaped[Array, "..."], labels: Shaped[Array, "..."], k: int = 1) -> Bool[Array, " examples"]:
    """Whether the label is among the `k` classes of the largest logits: timm's and torchvision's accuracy, by example.

        rank = #(logits > logits[label]) + #(logits == logits[label], of a lower class);    rank < k

    Of equal logits the lower class comes first, as in `jax.lax.top_k`. A logit that is no number has no rank.

    **Arguments:**

    - `logits`: (examples, classes), of any numeric dtype.
    - `labels`: (examples,), the classes' numbers from 0; a label that is no class is in no top k.
    - `k`: from 1 to the number of classes.

    **Returns:** (examples,), bool: one value an example, a metric for `eval_step`.

    **Raises:**

    - `TypeError`: for what are no arrays.
    - `ValueError`: for arrays of other shapes, labels that are no integers (one-hot ones among them), and a `k` that is
      not between 1 and the number of classes.
    """
    logits, labels = _classified(logits, labels)
    k = check.whole("k", k, least=1)
    classes = logits.shape[1]
    if k > classes:
        raise ValueError(f"k is {k}, of {classes} classes")
    own = jnp.take_along_axis(logits, jnp.clip(labels, 0, classes - 1)[:, None], 1)
    lower = jnp.arange(classes) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & lower), 1)
    return (rank < k) & ~jnp.isnan(logits).any(1) & (labels >= 0) & (labels < classes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Confusion:
    """Labels and predictions, one an example; `evaluate` counts them up to a matrix.

    ```python
    {"confusion": jaxnorm.Confusion.of(logits, labels)}
    ```

    Element (i, j) of the matrix, int64, is the number of examples of class i that were taken for class j, as in
    scikit-learn's `confusion_matrix`.

    **Attributes:**

    - `labels`: (examples,), integers: the classes' numbers.
    - `predictions`: (examples,), integers: the classes that the examples were taken for.
    - `classes`: the number of classes.
    """

    labels: Integer[Array, " examples"]
    predictions: Integer[Array, " examples"]
    classes: int = field(metadata={"static": True})

    @classmethod
    def of(cls, logits: Shaped[Array, "..."], labels: Shaped[Array, "..."]) -> "Confusion":
        """The labels, and the class with the largest logit of each example; the lowest of equal ones.

        **Arguments:**

        - `logits`: (examples, classes), of any numeric dtype.
        - `labels`: (examples,), the classes' numbers from 0.

        **Returns:** the `Confusion`, a metric for `eval_step`.

        **Raises:** `TypeError`, `ValueError` as `in_top_k`.
        """
        logits, labels = _classified(logits, labels)
        return cls(labels, jnp.argmax(logits, 1), logits.shape[1])

    def counts(self, mask: Bool[Array, " examples"]) -> Integer[Array, "classes classes"]:
        """The confusion matrix of the examples where `mask` holds.

        **Arguments:**

        - `mask`: (examples,), bool: which examples count.

        **Returns:** (classes, classes), int32: row i, column j the number of examples of class i that were taken for
        class j. Labels that are no class count nowhere.

        **Raises:** `TypeError` for a mask that is no array of bools; `ValueError` for one of another shape.
        """
        n = self.classes
        mask = check.array("mask", mask, shape=self.labels.shape)
        if mask.dtype != bool:
            raise TypeError(f"mask is an array of bools; its dtype is {mask.dtype}")
        known = mask & (self.labels >= 0) & (self.labels < n)
        cell = jnp.where(known, self.labels * n + self.predictions, n * n)
        return jnp.zeros(n * n, jnp.int32).at[cell].add(1, mode="drop").reshape(n, n)


def _classified(logits: Shaped[Array, "..."], labels: Shaped[Array, "..."]) -> tuple[Array, Array]:
    logits, labels = check.array("logits", logits), check.array("labels", labels)
    if logits.ndim != 2:
        raise ValueError(f"logits are (examples, classes); got shape {logits.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:1]:
        hint = " (one-hot labels: labels.argmax(-1))" if labels.shape == logits.shape else ""
        raise ValueError(
            f"labels are the classes' numbers, one for each row of logits {logits.shape}; got {labels.dtype} of shape "
            f"{labels.shape}{hint}"
        )
    return lax.stop_gradient(logits), labels
