"""The PyTorch model's run: what each layer with parameters or statistics is given, gives, and has afterwards."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.arrays import to_numpy

if TYPE_CHECKING:
    from torch.nn import Module


@dataclasses.dataclass
class TorchLayer:
    """The first call of one layer."""

    path: str
    module: Any
    given: np.ndarray
    result: np.ndarray
    after: dict[str, np.ndarray]  # its own buffers, once it was called


@dataclasses.dataclass
class TorchRun:
    layers: list[TorchLayer]  # in the order of their first calls
    outputs: list[np.ndarray]


def run(module: Module, inputs: tuple[Any, ...], *, training: bool) -> TorchRun:
    """One call of a copy of the module, whose dropout drops nothing."""
    import torch

    copied = copy.deepcopy(module).train(training)
    for layer in copied.modules():
        if isinstance(getattr(layer, "p", None), float) and "dropout" in type(layer).__name__.lower():
            layer.p = 0.0
    found: dict[str, TorchLayer] = {}
    handles = []
    for path, layer in copied.named_modules():
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        if not own:
            continue

        def see(layer: Any, given: Any, result: Any, path: str = path) -> None:
            if path in found or not given or not isinstance(given[0], torch.Tensor):
                return
            result = result[0] if isinstance(result, (tuple, list)) else result
            if not isinstance(result, torch.Tensor):
                return
            after = {name: _array(buffer) for name, buffer in layer.named_buffers(recurse=False)}
            found[path] = TorchLayer(path, layer, before.pop(path), _array(result), after)

        def look(layer: Any, given: Any, path: str = path) -> None:
            # taken before the call: layers that work in place change what they are given
            if given and isinstance(given[0], torch.Tensor):
                before.setdefault(path, _array(given[0]))

        handles += [layer.register_forward_pre_hook(look), layer.register_forward_hook(see)]
    before: dict[str, np.ndarray] = {}
    with torch.no_grad():
        result = copied(*copy.deepcopy(inputs))
    for handle in handles:
        handle.remove()
    return TorchRun(list(found.values()), leaves(result))


def leaves(result: Any) -> list[np.ndarray]:
    """The arrays of a nested result, in order."""
    import torch

    if isinstance(result, torch.Tensor):
        return [_array(result)]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    if isinstance(result, Mapping):
        result = [result[key] for key in sorted(result, key=str)]
    return [leaf for item in result for leaf in leaves(item)] if isinstance(result, (tuple, list)) else []


def _array(tensor: Any) -> np.ndarray:
    return np.array(to_numpy(tensor.detach()), copy=True)
