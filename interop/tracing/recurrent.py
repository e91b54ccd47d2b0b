"""Recurrent layers are one node each, whose shapes are known without running it.

PyTorch's own LSTM, GRU and RNN run a step at a time also where only shapes are asked for, which takes seconds and ties
the record to one length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interop.tracing import private
from interop.tracing.caught import UnrecordedError
from interop.tracing.checks import Checks, asking_frame, line_of

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


class _Packed(NamedTuple):
    """What a PackedSequence was made of, time first."""

    batch_sizes: torch.Tensor  # kept, so that its identity stays its own
    mask: torch.Tensor  # (steps, batch): where there is an item
    lengths: torch.Tensor


class Recurrent:
    """The recurrent layers of one trace.

    A PackedSequence is what it is in PyTorch: its data are the padded items that a mask chooses, step by step, and
    `masks.py` keeps them in their places. How long the longest sequence is depends on values: `pad_packed_sequence`
    without `total_length` gives as many steps as there were before, which `checks` hears of.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._packed: dict[int, _Packed] = {}

    def stand_ins(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What is called in place of PyTorch's functions."""
        import torch

        pack, pad = private.packing()
        layers = {getattr(torch, kind): functools.partial(self._layer, kind) for kind in _KINDS}
        return {**layers, pack: self._pack, pad: self._pad, torch.Tensor.__getitem__: self._item}

    def _layer(self, kind: str, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        """`args` are (state or states, params, flags..., batch_first); with a PackedSequence's data, they are (batch
        sizes, state or states, params, flags...)."""
        if isinstance(args[2], bool):
            hx, params, *flags = args
            return tuple(_operation()(x, _listed(hx), list(params), kind, *flags))
        batch_sizes, hx, params, *flags = args
        packed = self._known(batch_sizes)
        padded = _padded(x, packed.mask, 0)
        output, *states = _operation()(padded, _listed(hx), list(params), kind, *flags, False, packed.lengths)
        return output[packed.mask], *states

    def _pack(self, input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        x = input.transpose(0, 1) if batch_first else input
        mask = torch.arange(x.shape[0]).unsqueeze(1) < lengths
        batch_sizes = mask.sum(1)
        self._packed[id(batch_sizes)] = _Packed(batch_sizes, mask, lengths)
        return x[mask], batch_sizes

    def _pad(
        self,
        data: torch.Tensor,
        batch_sizes: torch.Tensor,
        batch_first: bool,
        value: int | float,
        total_length: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        packed = self._known(batch_sizes)
        frame = asking_frame()
        steps = packed.mask.shape[0]
        if frame is not None and frame.f_locals.get("total_length", 0) is None:  # of pad_packed_sequence
            place = f"{line_of(frame.f_back)} (without total_length, PyTorch cuts after the longest sequence)"
            self._checks.record((packed.lengths == steps).any(), True, place)
        padded = _padded(data, packed.mask, value)
        if total_length != steps:
            more = padded.new_full((total_length - steps, *padded.shape[1:]), value)
            padded = torch.cat([padded, more])
        return padded.transpose(0, 1) if batch_first else padded, packed.lengths

    def _item(self, tensor: torch.Tensor, index: Any) -> Any:
        """The first of the batch sizes is the number of sequences, none of which is empty."""
        packed = self._packed.get(id(tensor))
        return packed.mask.shape[1] if packed is not None and index == 0 else tensor[index]

    def _known(self, batch_sizes: torch.Tensor) -> _Packed:
        packed = self._packed.get(id(batch_sizes))
        if packed is None:
            raise UnrecordedError(
                "a PackedSequence that pack_padded_sequence did not make in forward: its shape depends on values. Give "
                "the module padded sequences and their lengths, and pack them there"
            )
        return packed


def _listed(hx: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(hx) if isinstance(hx, (list, tuple)) else [hx]


def _padded(data: torch.Tensor, mask: torch.Tensor, value: int | float) -> torch.Tensor:
    return data.new_full((*mask.shape, *data.shape[1:]), value).index_put((mask,), data)
