"""Recurrent layers are one node each, whose shapes are known without running it.

PyTorch's own LSTM, GRU and RNN run a step at a time also where only shapes are asked for, which takes seconds and ties
the record to one length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@functools.cache
def _operation() -> Callable[..., list[torch.Tensor]]:
    import torch

    def recurrent(x: torch.Tensor, hx: Sequence[torch.Tensor], *_: object) -> list[torch.Tensor]:
        raise RuntimeError(
            "jaxnorm::recurrent stands for a recurrent layer in a traced graph, and cannot run in PyTorch"
        )

    def shapes(
        x: torch.Tensor,
        hx: Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        kind: str,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        lengths: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        return [x.new_empty(*x.shape[:-1], hx[0].shape[-1] * (1 + bidirectional)), *map(torch.empty_like, hx)]

    schema = (
        "(Tensor x, Tensor[] hx, Tensor[] params, str kind, bool has_biases, int num_layers, float dropout, "
        "bool train, bool bidirectional, bool batch_first, Tensor? lengths=None) -> Tensor[]"
    )
    custom = torch.library.custom_op("jaxnorm::recurrent", recurrent, mutates_args=(), schema=schema)
    custom.register_fake(shapes)
    return custom


class Recurrent:
    """The recurrent layers of one trace."""

    def stand_ins(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What is called in place of PyTorch's functions."""
        import torch

        return {getattr(torch, kind): functools.partial(self._layer, kind) for kind in _KINDS}

    def _layer(
        self, kind: str, x: torch.Tensor, hx: torch.Tensor | Sequence[torch.Tensor], *rest: Any
    ) -> tuple[torch.Tensor, ...]:
        states = [hx] if not isinstance(hx, (list, tuple)) else list(hx)
        params, *flags = rest
        return tuple(_operation()(x, states, list(params), kind, *flags))
