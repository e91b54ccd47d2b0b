"""The state of a PyTorch module: its arrays, its BatchNorm layers' flags, and the constants of its graphs."""

from __future__ import annotations

from typing import Any

import numpy as np

from interop.program import BatchNormLayer, Entry


def dtype_name(dtype: Any) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: Any) -> np.ndarray:
    """The tensor's values; bfloat16 through ml_dtypes. Shares memory where it can."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_state(module: Any) -> tuple[list[Entry], dict[str, np.ndarray]]:
    """Every parameter and buffer by its name, in the order of `state_dict()`; those outside the state dict come last.

    A tensor with several names is one array: its later names say which is the first.
    """
    import torch

    uninitialised = [
        name for name, value in _named(module) if isinstance(value, torch.nn.parameter.UninitializedTensorMixin)
    ]
    if uninitialised:
        raise ValueError(
            f"parameters of lazy layers have no shape yet: {uninitialised}; call the module once before importing it"
        )
    order = {name: index for index, name in enumerate(module.state_dict())}
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
    return entries, arrays


def _named(module: Any) -> list[tuple[str, Any]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def read_batch_norms(module: Any) -> tuple[BatchNormLayer, ...]:
    """The BatchNorm layers with their flags as they are now."""
    from torch.nn.modules.batchnorm import _BatchNorm

    first: dict[int, str] = {}
    layers = []
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, _BatchNorm):
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
    """Tensors that the module's code makes while it is traced; equal ones are kept once."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, tensor: Any) -> str:
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
