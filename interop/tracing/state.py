"""The state of a PyTorch module: its arrays, its BatchNorm layers' flags, and the constants of its graphs."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.arrays import dtype_name, to_numpy
from interop.program.nodes import BatchNormLayer, Entry
from interop.tracing import private

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")
_NUMBERS = (bool, int, float, complex)


def read_state(module: torch.nn.Module) -> tuple[list[Entry], dict[str, np.ndarray]]:
    """Every parameter and buffer by its name, in the order of `state_dict()`; those outside the state dict come last.

    A tensor with several names is one array: its later names say which is the first.
    """
    import torch

    uninitialised = [name for name, value in _named(module) if private.is_uninitialised(value)]
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


def _named(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def read_batch_norms(module: torch.nn.Module) -> tuple[BatchNormLayer, ...]:
    """The BatchNorm layers with their flags as they are now."""
    batch_norm = private.batch_norm_class()
    first: dict[int, str] = {}
    layers = []
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, batch_norm):
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


class Changes:
    """What one run of a module's code changes in Python, where a graph does not see it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._attributes: dict[tuple[str, str], tuple[object, object]] = {}
        self._draws: set[str] = set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """The time of a call."""
        attributes, drawn = self._held(), _random_states()
        yield
        for key, value in self._held().items():
            if value is not attributes.get(key):
                self._attributes[key] = attributes.get(key), value
        self._draws |= {name for name, state in _random_states().items() if state != drawn[name]}

    def _held(self) -> dict[tuple[str, str], object]:
        """The attributes, parameters and buffers of every layer by their kind and name."""
        return {
            (kind, f"{path}.{name}".removeprefix(".")): value
            for path, layer in self._module.named_modules()
            for kind, table in (
                ("attribute", vars(layer)),
                ("parameter", private.parameters(layer)),
                ("buffer", private.buffers(layer)),
            )
            for name, value in table.items()
        }

    def report(self, exported: torch.export.ExportedProgram, mode: str) -> None:
        """Warns of what the exported program may lack.

        Raises:
            ValueError: for tensors that the program reads, and the code replaced.
        """
        import torch

        read, written = exported.constants, set(exported.graph_signature.buffers_to_mutate.values())
        lost, frozen = [], []
        for (kind, name), (old, new) in self._attributes.items():
            if kind != "attribute":
                lost += [name] if name not in written else []
            elif isinstance(old, torch.Tensor):  # one that is not read is a cache
                lost += [name] if name in read else []
            elif isinstance(new, torch.Tensor) or (isinstance(old, _NUMBERS) and isinstance(new, _NUMBERS)):
                frozen += [name] if isinstance(new, torch.Tensor) or old != new else []
        if lost:
            raise ValueError(
                f"forward replaces tensors that it reads: {', '.join(sorted(lost))}. The next call would not see it. "
                "Make them buffers (register_buffer), and write to them (self.x.copy_(y), or self.x = y)"
            )
        if frozen:
            logger.warning(
                "forward in %s mode sets %s, which the imported model does not: each of its calls is like the first "
                "one after import. A buffer (register_buffer) would change from call to call",
                mode,
                ", ".join(sorted(frozen)),
            )
        if self._draws:
            logger.warning(
                "forward in %s mode draws from %s, and what it drew at import is used in every call of the imported "
                "model; torch.rand would draw anew",
                mode,
                " and ".join(sorted(self._draws)),
            )


def _random_states() -> dict[str, tuple[Any, ...]]:
    numpy: Any = np.random.get_state()
    return {"random": random.getstate(), "numpy.random": (numpy[1].tobytes(), numpy[2])}
