"""Functions that PyTorch cannot record where sizes depend on values, written with others that it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.checks import Checks, asking_frame, line_of

if TYPE_CHECKING:
    import torch


class Unsized:
    """The functions of one trace, whose assumptions go to `checks`."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def stand_ins(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What is called in place of PyTorch's functions."""
        import torch

        return {
            **dict.fromkeys((torch.bincount, torch.Tensor.bincount), self._bincount),
            torch.nn.functional.cross_entropy: _cross_entropy,
            torch.nn.functional.nll_loss: _nll_loss,
        }

    def _bincount(self, input: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
        """With `minlength` bins, all there are if no value is as large, which is checked."""
        import torch

        if not minlength:
            return torch.bincount(input, weights)
        self._checks.record((input < minlength).all(), True, line_of(asking_frame()))
        ones = input.new_ones(input.shape, dtype=torch.int64) if weights is None else weights
        ones = ones if weights is None or weights.dtype == torch.float32 else ones.double()
        return ones.new_zeros(minlength).index_add(0, input, ones)


def _cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """F.cross_entropy, for rows that a mask chooses: aten/src/ATen/native/LossNLL.cpp asks whether there are any."""
    import torch

    plain = target.ndim == 1 and input.ndim == 2 and not label_smoothing and size_average is None and reduce is None
    if not plain or not private.depends_on_values(input.shape):
        return torch.nn.functional.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return _loss_of_class(input.log_softmax(1), target, weight, ignore_index, reduction)


def _nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """F.nll_loss, likewise."""
    import torch

    plain = target.ndim == 1 and input.ndim == 2 and size_average is None and reduce is None
    if not plain or not private.depends_on_values(input.shape):
        return torch.nn.functional.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    return _loss_of_class(input, target, weight, ignore_index, reduction)


def _loss_of_class(
    scores: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, reduction: str
) -> torch.Tensor:
    import torch

    counts = target != ignore_index
    classes = torch.where(counts, target, 0).unsqueeze(1)
    share = counts.to(scores.dtype) if weight is None else counts * weight[classes.squeeze(1)]
    losses = -share * scores.gather(1, classes).squeeze(1)
    return losses if reduction == "none" else losses.sum() / (share.sum() if reduction == "mean" else 1)
