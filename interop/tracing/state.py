"""The state of a PyTorch module: its arrays, its BatchNorm layers' flags, and the constants of its graphs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from interop.arrays import dtype_name, to_numpy
from interop.errors import TraceError
from interop.program.nodes import BatchNormLayer, Entry
from interop.tracing import private
from interop.tracing.synchronised import is_batch_norm

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")


def read_state(module: torch.nn.Module) -> tuple[list[Entry], dict[str, np.ndarray], list[str]]:
    """Every parameter and buffer by its name, in the order of `state_dict()`; those outside the state dict come last.

    A tensor with several names is one array: its later names say which is the first. The names in the state dict of
    what is neither are returned besides.
    """
    import torch

    uninitialised = [name for name, value in _named(module) if private.is_uninitialised(value)]
    if uninitialised:
        raise ValueError(
            f"parameters of lazy layers have no shape yet: {uninitialised}; call the module once before importing it"
        )
    try:
        order = {name: index for index, name in enumerate(module.state_dict())}
    except Exception as error:
        raise TraceError(f"{type(module).__name__}.state_dict() fails: {type(error).__name__}: {error}") from error
    first: dict[int, str] = {}
    entries, arrays = [], {}
    for name, value in sorted(_named(module), key=lambda item: order.get(item[0], len(order))):
        kind = "buffer"
        if isinstance(value, torch.nn.Parameter):
            kind = "parameter" if value.requires_grad else "frozen"
        same_as = first.setdefault(id(value), name)
        entry = Entry(
            name=name,
            kind=kind,
            shape=tuple(value.shape),
            dtype=dtype_name(value.dtype),
            persistent=name in order,
            same_as=None if same_as == name else same_as,
        )
        entries.append(entry)
        if entry.same_as is None:
            arrays[name] = to_numpy(value)
    _report_shared(module)
    return entries, arrays, [name for name in order if name not in {entry.name for entry in entries}]


def _report_shared(module: torch.nn.Module) -> None:
    """Warns of parameters in memory that other tensors have too: an optimizer of PyTorch's moves them all at once."""
    spans: dict[int, tuple[int, int, int, str, bool]] = {}
    for name, value in _named(module):
        if value.numel() and id(value) not in spans:
            start = value.storage_offset() * value.element_size()
            reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            end = start + (reach + 1) * value.element_size()
            spans[id(value)] = (private.storage(value), start, end, name, value.requires_grad)
    shared, last = [], None
    for span in sorted(spans.values()):
        if last is not None and span[0] == last[0] and span[1] < last[2] and (span[4] or last[4]):
            shared += [last[3], span[3]]
        if last is None or span[0] != last[0] or span[2] > last[2]:
            last = span
    if shared:
        logger.warning(
            "parameters that share memory with other tensors are apart from them in the imported model: %s",
            ", ".join(dict.fromkeys(shared)),
        )


def _named(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def read_batch_norms(module: torch.nn.Module) -> tuple[BatchNormLayer, ...]:
    """The BatchNorm layers with their flags as they are now."""
    first: dict[int, str] = {}
    layers = []
    for path, layer in module.named_modules(remove_duplicate=False):
        if is_batch_norm(layer):
            same_as = first.setdefault(id(layer), path)
            layers.append(
                BatchNormLayer(
                    path=path,
                    num_features=layer.num_features,
                    eps=layer.eps,
                    momentum=layer.momentum,
                    affine=layer.affine,
                    track_running_stats=layer.track_running_stats,
                    training=layer.training,
                    same_as=None if same_as == path else same_as,
                )
            )
    return tuple(layers)


class Constants:
    """Tensors that the module's code makes while it is traced; equal ones are kept once.

    Attributes:
        entries, arrays: the tensors.
        read: entries of the state whose values the code has read as numbers, and the first line that did.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.read: dict[str, str] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, tensor: torch.Tensor) -> str:
        """The name of the entry that holds the tensor's values."""
        array = to_numpy(tensor).copy()
        dtype = dtype_name(tensor.dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._names:
            name = f"_interop_constants.c{len(self.entries)}"
            self._names[key] = name
            self.entries.append(Entry(name=name, kind="constant", shape=array.shape, dtype=dtype, persistent=False))
            self.arrays[name] = array
        return self._names[key]
