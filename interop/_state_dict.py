"""state_dict and load_state_dict: a Flax model as PyTorch's mapping from names to arrays, and back."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax import linen, nnx

from interop import layers
from interop.layers import Layouts, Part, Tree
from interop.linen_layers import linen_tree
from interop.linen_observe import Inputs
from interop.names import nnx_tree
from interop.rename import Rename, Renaming
from jaxnorm import TrainState

Target = TypeVar("Target")
_COUNTER = "num_batches_tracked"


def state_dict(
    target: Any, rename: Rename | None = None, *, layouts: Layouts | None = None, inputs: Inputs = None
) -> dict[str, np.ndarray]:
    """PyTorch's state dict of a model: its names, layouts and dtypes.

        torch_module.load_state_dict({k: torch.from_numpy(v) for k, v in interop.state_dict(model).items()})

    An imported model gives `module.state_dict()`'s entries in its order; arrays that have not changed since the import
    come back bit for bit, and `num_batches_tracked` is int64 again. Of a hand-written model the layers' kinds say what
    their arrays are in PyTorch (`interop/layouts.py` has the table), and the names are the paths in the model with
    PyTorch's name for the array: `layer1.0.conv1.weight`. Variables of other layers go as they are. A BatchNorm layer
    without a counter gives none: PyTorch's `load_state_dict(strict=True)` takes that, and its own stays as it is.

    Args:
        target: an NNX model; Linen's `(module, variables)`, or variables alone where their names leave no doubt; or a
            `jaxnorm.TrainState` of any (replicas that differ are refused).
        rename: as for `load_state_dict`, and used backwards here.
        layouts: for layers that need another layout than their kind's, by patterns (`re.fullmatch`) of their paths in
            the model: `{r"classifier\\.0": interop.layouts.Linear(flattened=(512, 7, 7))}`.
        inputs: what a Linen module is called with, to see its layers; found by trial for modules of one array.

    Raises:
        TypeError, ValueError: for other targets, layers that cannot be told, and names that do not invert.
    """
    tree = opened(target, layouts, inputs)
    parts = layers.parts(tree, layouts)
    names = Renaming(rename).to_torch(_unique(parts))
    found: dict[str, np.ndarray] = {}
    for part in parts:
        found |= {names[entry]: value for entry, value in zip(part.entries, part.read(), strict=True)}
    traced = getattr(target.model() if isinstance(target, TrainState) else target, "_interop_model", None)
    if traced is None:
        return found
    order = {entry.name: index for index, entry in enumerate(traced.entries)}
    back = {new: old for old, new in names.items()}
    return dict(sorted(found.items(), key=lambda item: order.get(back[item[0]], len(order))))


def load_state_dict(
    target: Target,
    state_dict: Mapping[str, Any],
    rename: Rename | None = None,
    strict: bool = True,
    *,
    layouts: Layouts | None = None,
    inputs: Inputs = None,
) -> Target:
    """Gives a model the values of a state dict: the inverse of `interop.state_dict`. Nothing changes if anything is
    wrong.

    An NNX model is changed in place and returned. Linen's variables and `jaxnorm.TrainState` are not changed; new ones
    are returned: for `(module, variables)` a tuple of the same kind.

    Args:
        target: as for `interop.state_dict`. Variables may be abstract (`jax.eval_shape(module.init, ...)`).
        state_dict: arrays or tensors by PyTorch's names; values take the dtypes of the target's variables.
        rename: from the names of `state_dict` to those of the target: a mapping, a list of pairs of patterns, a
            function, or a pair of functions; see `interop/rename.py`.
        strict: whether missing and unexpected keys are errors. Shapes that differ always are.
        layouts, inputs: as for `interop.state_dict`.

    A BatchNorm layer's `num_batches_tracked` may be missing, as in checkpoints before PyTorch 0.4.1
    (torch/nn/modules/batchnorm.py, `_NormBase._load_from_state_dict`).

    Raises:
        ValueError: with all missing, unexpected and misshapen keys.

    Warns:
        UserWarning: if the state dict has counters that the model's layers have no place for (Flax's own BatchNorm, or
            jaxnorm's without `count_batches=True`): they are left out.
    """
    tree = opened(target, layouts, inputs)
    parts = layers.parts(tree, layouts)
    expected = _unique(parts)
    names = Renaming(rename).to_model(state_dict)
    given = {names[name]: _array(value) for name, value in state_dict.items()}
    missing = [name for name in expected if name not in given and not _optional(name, expected)]
    unexpected = [name for name in given if name not in expected]
    counters = [name for name in unexpected if _optional(name, expected)]
    problems = []
    if strict and missing:
        problems.append(f"missing keys: {_listed(missing)}")
    if strict and len(unexpected) > len(counters):
        problems.append(f"unexpected keys: {_listed([name for name in unexpected if name not in counters])}")
    misshapen = [
        f"  {name}: {given[name].shape} in the state dict, {shape} in the model"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if misshapen:
        problems.append("\n".join(["shapes that differ:", *misshapen]))
    else:
        values = _values(parts, given)
        problems += values.problems
    if problems:
        raise ValueError(f"the state dict does not fit {tree.title}:\n" + "\n".join(problems))
    if counters:
        warnings.warn(
            f"{tree.title} has no place for {len(counters)} counters of batches ({counters[0]!r}, ...), which are left "
            "out; jaxnorm's BatchNorm layers with count_batches=True keep them",
            stacklevel=2,
        )
    return _returned(target, tree.write(values.by_key))


def opened(target: Any, layouts: Layouts | None = None, inputs: Inputs = None) -> Tree:
    """The variables and layers of any target of this file."""
    if isinstance(target, TrainState):
        target = target.model()
    if isinstance(target, nnx.Module):
        return nnx_tree(target)
    if isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], linen.Module):
        return linen_tree(target[0], target[1], inputs, layouts)
    if isinstance(target, Mapping) and all(isinstance(tree, Mapping) for tree in target.values()):
        return linen_tree(None, target, None, layouts)
    raise TypeError(
        "expected an NNX module, Linen's (module, variables) or variables, or a jaxnorm.TrainState; found "
        f"{type(target).__module__}.{type(target).__qualname__}"
    )


def _returned(target: Any, written: Any) -> Any:
    if isinstance(target, TrainState):
        if target.step.ndim:
            raise ValueError("the state is replicated: load into jaxnorm.unreplicate(state), then replicate it")
        model = written if isinstance(written, nnx.Module) else (target.model()[0], written)
        new = TrainState.create(model, target.tx, opt_state=target.opt_state)
        return target.replace(params=new.params, batch_stats=new.batch_stats, variables=new.variables)
    return (target[0], written) if isinstance(target, tuple) else written


def _unique(parts: list[Part]) -> dict[str, tuple[int, ...]]:
    """The shape of each entry by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    twice = []
    for part in parts:
        for entry, shape in zip(part.entries, part.shapes, strict=True):
            if entry in shapes:
                twice.append(entry)
            shapes[entry] = shape
    if twice:
        raise ValueError(f"several variables of the model have the same name in a state dict: {_listed(twice)}")
    return shapes


class _Values(NamedTuple):
    by_key: dict[Hashable, np.ndarray]
    problems: list[str]


def _values(parts: list[Part], given: Mapping[str, np.ndarray]) -> _Values:
    """The values of the variables, and what is wrong with them."""
    values: dict[Hashable, np.ndarray] = {}
    sources: dict[Hashable, str] = {}
    problems, too_large = [], []
    for part in parts:
        if not all(entry in given for entry in part.entries):
            continue
        try:
            arrays = part.piece.to_flax(*(given[entry] for entry in part.entries))
        except ValueError as error:
            problems.append(f"{part.layer}: {error}")
            continue
        name = ", ".join(part.entries)
        for slot, array in zip(part.slots, arrays, strict=True):
            if not _fits(array, slot.dtype):
                too_large.append(f"  {name}")
            if slot.key in values and not _identical(values[slot.key], array):
                problems.append(f"{sources[slot.key]} and {name} are one variable of the model, and differ")
            values[slot.key], sources[slot.key] = array, name
    if too_large:
        problems.append("\n".join(["integers too large for JAX as configured (set jax_enable_x64):", *too_large]))
    return _Values(values, problems)


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.dtype == b.dtype and a.tobytes() == b.tobytes())


def _optional(name: str, expected: Mapping[str, Any]) -> bool:
    """Whether an entry is the counter of a BatchNorm layer of the model."""
    layer, _, last = name.rpartition(".")
    return last == _COUNTER and f"{layer}.running_mean".lstrip(".") in expected


def _array(value: Any) -> np.ndarray:
    if type(value).__module__.split(".")[0] == "torch" or hasattr(value, "detach"):
        from interop._torch_state import to_numpy as from_tensor

        return from_tensor(value)
    return np.asarray(value)


def _fits(value: np.ndarray, dtype: Any) -> bool:
    if not (np.issubdtype(dtype, np.integer) and np.issubdtype(value.dtype, np.integer) and value.size):
        return True
    limits = np.iinfo(dtype)
    return bool(value.min() >= limits.min and value.max() <= limits.max)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
