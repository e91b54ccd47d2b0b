"""What the lint rules look at, the same for whatever is given: layers with running statistics, and all arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxnorm
from interop.arrays import to_numpy as as_numpy
from interop.conventions import torch_momentum
from interop.errors import shown
from interop.files.checkpoint import Checkpoint, load_checkpoint
from interop.files.disk import span
from interop.files.tensors import Tensor
from interop.variables import Frozen, to_numpy

if TYPE_CHECKING:
    import torch

Place = tuple[Hashable, int, int]
"""A storage, and the bytes from where to where an array looks at."""

_DEEPEST: Final = 100
_ARRAYS: Final = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True, eq=False)
class NormLayer:
    """A layer with running statistics.

    Attributes:
        name: its path in the model.
        arrays: those that it has, by PyTorch's names.
        flags: what is known of `eps`, `momentum` (the share of the new batch, or what was given in its place; None is
            the cumulative average), `training` (whether it uses and tracks the batch's statistics) and `trainable`
            (whether its scale is).
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    flags: Mapping[str, Any]

    def array(self, name: str) -> np.ndarray | None:
        """One of the arrays in float64, a number for each channel, or None."""
        found = self.arrays.get(name)
        return None if found is None else np.asarray(found.real, np.float64).reshape(-1)

    @property
    def count(self) -> int | None:
        """The number of batches that the layer has tracked, where it counts them."""
        found = self.arrays.get("num_batches_tracked")
        return int(found.real.item()) if found is not None and found.size == 1 and np.isfinite(found).all() else None


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model or checkpoint as the rules see it.

    Attributes:
        layers: the layers with running statistics, in order.
        arrays: iterates over every array with its name; one at a time, as files may be large.
        places: where the arrays lie, for those that may share memory.
        convention: whose momentum the model was given, "PyTorch" or "Flax".
        training: whether the model as a whole trains; None for what has no mode.
        pads_as_tensorflow: whether it has convolutions with TensorFlow's "SAME" padding.
    """

    layers: tuple[NormLayer, ...]
    arrays: Callable[[], Iterator[tuple[str, np.ndarray]]]
    places: Mapping[str, Place]
    convention: str = "PyTorch"
    training: bool | None = None
    pads_as_tensorflow: bool = False


def subject(target: Any) -> Subject:
    """The target as a `Subject`. Raises TypeError for what is neither a model nor a checkpoint."""
    if isinstance(target, jaxnorm.TrainState):
        target = target.model()
    if isinstance(target, str | os.PathLike):
        target = load_checkpoint(target)
    if isinstance(target, Checkpoint):
        return _of_checkpoint(target)
    if isinstance(target, nnx.Module):
        return _of_nnx(target)
    if isinstance(target, Mapping):
        return _of_variables(target) if "batch_stats" in target else _of_state_dict(target)
    if any(
        f"{base.__module__}.{base.__qualname__}" == "torch.nn.modules.module.Module" for base in type(target).__mro__
    ):
        return _of_torch(target)
    raise TypeError(
        "expected a torch.nn.Module, a flax.nnx.Module, Linen variables, a state dict, a checkpoint or its path, found "
        f"{type(target).__module__}.{type(target).__qualname__}"
    )


def _layers(
    state: Mapping[str, Any], get: Callable[[Any], np.ndarray], flags: Mapping[str, Mapping[str, Any]]
) -> tuple[NormLayer, ...]:
    """The layers of a state dict: wherever there are a running mean and a running variance."""
    layers = []
    for entry in state:
        name, _, last = entry.rpartition(".")
        prefix = f"{name}." if name else ""
        if last == "running_var" and f"{prefix}running_mean" in state:
            arrays = {key: get(state[f"{prefix}{key}"]) for key in _ARRAYS if f"{prefix}{key}" in state}
            if any(array.dtype.kind == "c" for array in arrays.values()):
                continue  # statistics of other libraries: no rule is about them
            layers.append(NormLayer(name, arrays, flags.get(name, {})))
    return tuple(layers)


def _of_checkpoint(checkpoint: Checkpoint) -> Subject:
    tensors = {name: entry for name, entry in checkpoint.entries.items() if isinstance(entry, Tensor)}
    places = {name: (id(tensor.storage), *tensor.extent()) for name, tensor in tensors.items()}
    return Subject(
        _layers(checkpoint, lambda array: array, checkpoint.batch_norms), lambda: iter(checkpoint.items()), places
    )


def _of_state_dict(state: Mapping[Any, Any]) -> Subject:
    bad = [key for key, value in state.items() if not (isinstance(key, str) and _has_numbers(value))]
    if bad:
        raise TypeError(
            f"entries {', '.join(map(shown, bad[:8]))} of the state dict are not arrays of numbers by names"
        )
    places = {}
    for name, value in state.items():
        if hasattr(value, "untyped_storage"):  # torch's
            last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            low, size = value.storage_offset(), last if value.numel() else 0
            item = value.element_size()
            places[name] = (value.untyped_storage().data_ptr(), low * item, (low + size) * item)
        elif isinstance(value, np.ndarray):
            address = value.__array_interface__["data"][0]
            places[name] = (0, address, address + span(value)) if min(value.strides, default=0) >= 0 else (name, 0, 0)
        else:
            places[name] = (id(value), 0, value.nbytes)
    return Subject(
        _layers(state, as_numpy, {}), lambda: ((name, as_numpy(value)) for name, value in state.items()), places
    )


def _has_numbers(value: Any) -> bool:
    """Whether it is an array of one of the three libraries that has numbers: no texts, keys, sparse or meta tensors."""
    if hasattr(value, "untyped_storage"):  # torch's
        plain = str(value.layout) == "torch.strided" and not (value.is_quantized or value.is_nested)
        return plain and value.device.type != "meta"
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        return False
    return bool(jnp.issubdtype(value.dtype, np.number) or jnp.issubdtype(value.dtype, np.bool_))


def _of_torch(module: torch.nn.Module) -> Subject:
    flags: dict[str, dict[str, Any]] = {}
    same = False
    for name, layer in module.named_modules(remove_duplicate=False):
        same = same or "same" in type(layer).__name__.lower()
        if "running_mean" in dict(layer.named_buffers(recurse=False)):
            known = {key: getattr(layer, key) for key in ("eps", "momentum") if hasattr(layer, key)}
            parameters = list(layer.parameters(recurse=False))
            if parameters:
                known["trainable"] = any(parameter.requires_grad for parameter in parameters)
            if hasattr(layer, "momentum"):  # torchvision's FrozenBatchNorm2d has none, and no mode
                known["training"] = layer.training
            flags[name] = known
    found = _of_state_dict(module.state_dict())
    layers = tuple(dataclasses.replace(layer, flags=flags.get(layer.name, {})) for layer in found.layers)
    # one tensor with several names is meant; several tensors of one memory are what the rule looks for
    first = dict([*module.named_parameters(), *module.named_buffers()])
    places = {name: place for name, place in found.places.items() if name in first}
    return dataclasses.replace(found, layers=layers, places=places, training=module.training, pads_as_tensorflow=same)


def _of_nnx(module: nnx.Module) -> Subject:
    layers = []
    arrays: dict[str, nnx.Variable[Any]] = {}
    training = []
    for path, node in nnx.iter_graph(module):
        name = ".".join(map(str, path))
        if isinstance(node, nnx.BatchNorm):
            layers.append(_nnx_layer(getattr(node, "layer_name", None) or name, node))
            training.append(not node.use_running_average)
        elif isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            arrays[name] = node
    deterministic = getattr(module, "deterministic", None)  # an imported model's own mode
    return Subject(
        tuple(layer for layer in layers if "running_var" in layer.arrays),
        lambda: ((name, to_numpy(variable)) for name, variable in arrays.items()),
        {},  # a shared variable is one variable
        convention="Flax",
        training=any(training) if deterministic is None else not deterministic,
    )


def _nnx_layer(name: str, node: nnx.BatchNorm) -> NormLayer:
    named = {
        "weight": node.scale,
        "bias": node.bias,
        "running_mean": node.mean,
        "running_var": node.var,
        "num_batches_tracked": getattr(node, "num_batches_tracked", None),
    }
    flags = {
        "eps": float(node.epsilon),
        "momentum": torch_momentum(node.momentum) if is_share(node.momentum) else 1 - node.momentum,
        "training": not node.use_running_average,
        **({} if node.scale is None else {"trainable": not isinstance(node.scale, Frozen)}),
    }
    return NormLayer(name, {key: to_numpy(variable) for key, variable in named.items() if variable is not None}, flags)


def is_share(momentum: float | None) -> bool:
    """Whether it is a momentum of either convention: a number from 0 to 1, or None."""
    return momentum is None or 0 <= momentum <= 1


def _of_variables(variables: Mapping[str, Any]) -> Subject:
    """Linen's: a tree of `batch_stats`, whose layers have their scale and bias at the same path in `params`."""
    flat = {".".join(path): value for path, value in _leaves(variables, ())}
    layers = []
    for name in flat:
        collection, _, rest = name.partition(".")
        path = rest.removesuffix(".var")
        if collection == "batch_stats" and rest != path and f"batch_stats.{path}.mean" in flat:
            names = {
                "weight": f"params.{path}.scale",
                "bias": f"params.{path}.bias",
                "running_mean": f"batch_stats.{path}.mean",
                "running_var": f"batch_stats.{path}.var",
                "num_batches_tracked": f"batch_stats.{path}.num_batches_tracked",
            }
            arrays = {key: as_numpy(flat[full]) for key, full in names.items() if full in flat}
            layers.append(NormLayer(path, arrays, {}))
    return Subject(
        tuple(layers),
        lambda: ((name.partition(".")[2], as_numpy(value)) for name, value in flat.items()),
        {},
        convention="Flax",
    )


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if len(path) > _DEEPEST:
        raise TypeError(f"Linen variables that are nested more than {_DEEPEST} deep, at {'.'.join(path[:8])!r}")
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif _has_numbers(tree):
        yield path, tree
