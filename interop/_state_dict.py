"""state_dict and load_state_dict: a Flax tree as PyTorch's mapping from names to arrays, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

import jaxnorm
from interop.names import named_variables
from interop.variables import to_numpy

Target = TypeVar("Target", bound=nnx.Module)
Rename = Callable[[str], str] | Mapping[str, str]


def state_dict(target: nnx.Module | jaxnorm.TrainState) -> dict[str, np.ndarray]:
    """PyTorch's state dict of a model: its names, layouts and dtypes, in the order of `module.state_dict()` for an
    imported model. Of a `jaxnorm.TrainState`, that of its model; replicas that differ are refused.

    Arrays that have not changed since the import come back bit for bit; `num_batches_tracked` is int64 again.

        torch_module.load_state_dict({k: torch.from_numpy(v) for k, v in interop.state_dict(model).items()})
    """
    if isinstance(target, jaxnorm.TrainState):
        target = target.model()
    found = {name: to_numpy(variable) for name, variable in _named(target).items()}
    model = getattr(target, "_interop_model", None)
    if model is None:
        return found
    order = {entry.name: index for index, entry in enumerate(model.entries)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _named(target: Any) -> dict[str, nnx.Variable[Any]]:
    if not isinstance(target, nnx.Module):
        raise TypeError(f"expected a flax.nnx.Module, found {type(target).__module__}.{type(target).__qualname__}")
    return dict(named_variables(target))


def load_state_dict(
    target: Target, state_dict: Mapping[str, Any], rename: Rename | None = None, strict: bool = True
) -> Target:
    """Gives `target` the values of a state dict, in place, and returns it. Nothing is changed if anything is wrong.

    Args:
        target: an NNX model.
        state_dict: arrays or tensors by PyTorch's names; values take the dtypes of the target's variables.
        rename: from the names of `state_dict` to those of the target, a function or a mapping.
        strict: whether missing and unexpected keys are errors. Shapes that differ always are.

    A BatchNorm layer's `num_batches_tracked` may be missing, as in checkpoints before PyTorch 0.4.1
    (torch/nn/modules/batchnorm.py, `_NormBase._load_from_state_dict`).

    Raises:
        KeyError, ValueError: with all missing, unexpected and misshapen keys.
    """
    variables = _named(target)
    given = _renamed(state_dict, rename)
    missing = [name for name in variables if name not in given and not _optional(name, variables)]
    unexpected = [name for name in given if name not in variables]
    values = {name: _array(value) for name, value in given.items() if name in variables}
    problems = []
    if strict and missing:
        problems.append(f"missing keys: {_listed(missing)}")
    if strict and unexpected:
        problems.append(f"unexpected keys: {_listed(unexpected)}")
    misshapen = [
        f"  {name}: {value.shape} in the state dict, {tuple(variables[name][...].shape)} in the model"
        for name, value in values.items()
        if tuple(value.shape) != tuple(variables[name][...].shape)
    ]
    if misshapen:
        problems.append("\n".join(["shapes that differ:", *misshapen]))
    too_large = [f"  {name}" for name, value in values.items() if not _fits(value, variables[name])]
    if too_large:
        problems.append("\n".join(["integers too large for JAX as configured (set jax_enable_x64):", *too_large]))
    if problems:
        raise ValueError(f"the state dict does not fit {_title(target)}:\n" + "\n".join(problems))
    for name, value in values.items():
        variable = variables[name]
        current = variable[...]
        variable[...] = jax.numpy.array(value.astype(current.dtype), copy=True)
    return target


def _renamed(state_dict: Mapping[str, Any], rename: Rename | None) -> dict[str, Any]:
    if rename is None:
        return dict(state_dict)
    new = (lambda name: rename.get(name, name)) if isinstance(rename, Mapping) else rename
    renamed: dict[str, Any] = {}
    twice = []
    for name, value in state_dict.items():
        if new(name) in renamed:
            twice.append(new(name))
        renamed[new(name)] = value
    if twice:
        raise ValueError(f"several keys are renamed to one: {_listed(twice)}")
    return renamed


def _optional(name: str, variables: Mapping[str, Any]) -> bool:
    return (
        name.rpartition(".")[2] == "num_batches_tracked"
        and f"{name.rpartition('.')[0]}.running_mean".lstrip(".") in variables
    )


def _array(value: Any) -> np.ndarray:
    if type(value).__module__.split(".")[0] == "torch" or hasattr(value, "detach"):
        from interop._torch_state import to_numpy as from_tensor

        return from_tensor(value)
    return np.asarray(value)


def _fits(value: np.ndarray, variable: nnx.Variable[Any]) -> bool:
    dtype = variable[...].dtype
    if not (np.issubdtype(dtype, np.integer) and np.issubdtype(value.dtype, np.integer) and value.size):
        return True
    limits = np.iinfo(dtype)
    return bool(value.min() >= limits.min and value.max() <= limits.max)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _title(target: Any) -> str:
    model = getattr(target, "_interop_model", None)
    return type(target).__name__ if model is None else model.name
