"""state_dict and load_state_dict: a Flax model as PyTorch's mapping from names to arrays, and back."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from interop.arrays import to_numpy
from interop.dtypes import TORCH
from interop.errors import shown
from interop.files.checkpoint import Checkpoint
from interop.files.wrappings import bare_names
from interop.program.recorded import model_of, other_values
from interop.weights import nnx_tree as layers
from interop.weights.linen_observe import Inputs
from interop.weights.linen_tree import linen_tree
from interop.weights.names import nnx_tree
from interop.weights.nnx_tree import Layouts, Part, Tree
from interop.weights.rename import Rename, Renaming
from jaxnorm import TrainState

Target = TypeVar("Target")
_COUNTER = "num_batches_tracked"


def state_dict(
    target: Any, rename: Rename | None = None, *, layouts: Layouts | None = None, inputs: Inputs = None
) -> dict[str, np.ndarray]:
    r"""PyTorch's state dict of a model: its names, layouts and dtypes.

    ```python
    torch_module.load_state_dict(interop.to_torch(interop.state_dict(model)))
    ```

    An imported model gives `module.state_dict()`'s entries in its order; arrays that have not changed since the import
    come back bit for bit, and `num_batches_tracked` is int64 again. Of a hand-written model the layers' kinds say what
    their arrays are in PyTorch (the table is in interop/weights/layouts.py), and the names are the paths in the model
    with PyTorch's name for the array: `layer1.0.conv1.weight`. Variables of other layers go as they are. A BatchNorm
    layer without a counter gives none: PyTorch's `load_state_dict(strict=True)` takes that, and its own stays as it is.

    **Arguments:**

    - `target`: an NNX model; Linen's `(module, variables)`, or variables alone where their names leave no doubt; or a
      `jaxnorm.TrainState` of any (replicas that differ are refused).
    - `rename`: as for `load_state_dict`, and used backwards here.
    - `layouts`: for layers that need another layout than their kind's, by patterns (`re.fullmatch`) of their paths in
      the model: `{r"classifier\.0": interop.layouts.Linear(flattened=(512, 7, 7))}`.
    - `inputs`: what a Linen module is called with, to see its layers: an array (or `jax.ShapeDtypeStruct`), a sequence
      of arguments, or a mapping of keyword arguments. Found by trial for modules of one array.

    **Returns:** a dict from PyTorch's names to NumPy arrays.

    **Raises:**

    - `TypeError`: for other targets, and for a `rename` or `layouts` that are none.
    - `ValueError`: for layers that cannot be told, layouts that do not fit, replicas that differ, and names that do not
      invert.
    """
    tree = opened(target, layouts, inputs)
    parts = layers.parts(tree, layouts)
    names = Renaming(rename).to_torch(_unique(parts))
    found: dict[str, np.ndarray] = {}
    for part in parts:
        found |= {names[entry]: value for entry, value in zip(part.entries, part.read(), strict=True)}
    imported = model_of(target.model() if isinstance(target, TrainState) else target)
    if imported is None:
        return found
    order = {entry.name: index for index, entry in enumerate(imported.entries)}
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

    Where none of the names is the model's, those of its wrappers are left out of these: a model whose only child is
    called `module`, or that `torch.compile` wrapped, takes what `load_checkpoint` reads.

    A BatchNorm layer's `num_batches_tracked` may be missing, as in checkpoints before PyTorch 0.4.1
    (torch/nn/modules/batchnorm.py, `_NormBase._load_from_state_dict`).

    **Arguments:**

    - `target`: as for `interop.state_dict`. Variables may be abstract (`jax.eval_shape(module.init, ...)`).
    - `state_dict`: arrays or tensors by PyTorch's names; values take the dtypes of the target's variables, rounded
      where these are narrower.
    - `rename`: from the names of `state_dict` to those of the target: a mapping, a list of pairs of patterns, a
      function, or a pair of functions; see `interop/weights/rename.py`.
    - `strict`: whether missing and unexpected keys are errors. Shapes that differ always are. Where several entries
      make one variable (the biases of an LSTM), those that are missing are taken as the model has them.
    - `layouts`, `inputs`: as for `interop.state_dict`.

    **Returns:** an NNX model, changed in place. Linen's variables and `jaxnorm.TrainState` are not changed; new ones
    are returned: for `(module, variables)` a tuple of the same kind.

    **Raises:**

    - `TypeError`: for what is no mapping from names, and as `interop.state_dict`.
    - `ValueError`: with all missing, unexpected and misshapen keys, all values that the model's dtypes cannot hold, and
      values other than those that an imported model's code has read as numbers; for a replicated state; and as
      `interop.state_dict`.

    **Warns:** `UserWarning` if the state dict has counters that the model's layers have no place for (Flax's own
    BatchNorm, or jaxnorm's without `count_batches=True`): they are left out.
    """
    if not isinstance(strict, bool | np.bool_ | int):
        raise TypeError(f"strict is True or False, found {type(strict).__name__}")
    tree = opened(target, layouts, inputs)
    parts = layers.parts(tree, layouts)
    expected = _unique(parts)
    entries = {new: state_dict[old] for old, new in _names(state_dict, rename).items()}
    if isinstance(state_dict, Checkpoint) and rename is None:
        entries = _with_prefix(entries, state_dict.prefix, expected)
    if not any(name in expected for name in entries):  # a model that was imported in a wrapper, and a file's bare names
        wrapped = dict(zip(bare_names(expected), expected, strict=True))
        entries = {wrapped.get(name, name): value for name, value in entries.items()}
    missing = [name for name in expected if name not in entries and not _optional(name, expected)]
    unexpected = [name for name in entries if name not in expected]
    counters = [name for name in unexpected if _optional(name, expected)]
    given, problems = _arrays({name: value for name, value in entries.items() if name in expected})
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
        values = _values(parts, given if strict else given | _complements(parts, given))
        problems += values.problems + _other_values(target, given)
    if problems:
        if strict and missing and len(unexpected) > len(counters):
            problems.append(_about_names(unexpected))
        raise ValueError(f"the state dict does not fit {tree.title}:\n" + "\n".join(problems))
    if counters:
        warnings.warn(
            f"{tree.title} has no place for {len(counters)} counters of batches ({counters[0]!r}, ...), which are left "
            "out; jaxnorm's BatchNorm layers with count_batches=True keep them",
            stacklevel=2,
        )
    return _returned(target, tree.write(values.by_key))


def _about_names(unexpected: Collection[str]) -> str:
    if {"state", "param_groups"} <= set(unexpected):
        return "this is an optimizer's state: interop.load_optimizer_state takes it"
    return "if the names are another model's: rename=, which interop.suggest_rename(model, state_dict) proposes"


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


def _returned(target: Any, written: nnx.Module | Mapping[str, Any]) -> Any:
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


def _names(state_dict: Any, rename: Rename | None) -> dict[str, str]:
    """The model's name for each name of the state dict."""
    check_names(state_dict)
    names = Renaming(rename).to_model(state_dict)
    _refuse_other_than_text(names.values(), "names that rename gives")
    return names


def check_names(state_dict: Any) -> None:
    """Raises TypeError for what is no mapping from names."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "expected a mapping from PyTorch's names to arrays (interop.load_checkpoint reads one from a file), found "
            f"{type(state_dict).__name__}"
        )
    _refuse_other_than_text(state_dict, "keys of the state dict")


def _with_prefix(entries: dict[str, Any], prefix: str, expected: Collection[str]) -> dict[str, Any]:
    """The entries under the model's names, where what was taken for a wrapper's prefix is a child called `module`."""
    if any(name in expected for name in entries):
        return entries
    for own in (prefix[start:] for start in range(0, len(prefix), len("module."))):
        named = {own + name: value for name, value in entries.items()}
        if any(name in expected for name in named):
            return named
    return entries


def _refuse_other_than_text(names: Iterable[object], what: str) -> None:
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{what} have to be strings, found {', '.join(map(shown, wrong[:8]))}")


def _complements(parts: list[Part], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's own values of entries that are missing beside given ones that make a variable together with them."""
    found: dict[str, np.ndarray] = {}
    for part in parts:
        absent = [entry for entry in part.entries if entry not in given]
        if 0 < len(absent) < len(part.entries):
            try:
                own = dict(zip(part.entries, part.read(), strict=True))
            except (TypeError, ValueError) as error:  # of variables that are abstract
                raise ValueError(
                    f"{part.layer}: {_listed(absent)} missing, and the model has no values to put in their place"
                ) from error
            found |= {entry: own[entry] for entry in absent}
    return found


class _Values(NamedTuple):
    by_key: dict[Hashable, np.ndarray]
    problems: list[str]


def _values(parts: list[Part], given: Mapping[str, np.ndarray]) -> _Values:
    """The values of the variables, and what is wrong with them."""
    values: dict[Hashable, np.ndarray] = {}
    sources: dict[Hashable, str] = {}
    problems = []
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
            lost = _lost(array, slot.dtype)
            if lost:
                problems.append(f"{lost}: {name}")
            if slot.key in values and not _identical(values[slot.key], array):
                problems.append(f"{sources[slot.key]} and {name} are one variable of the model, and differ")
            values[slot.key], sources[slot.key] = array, name
    return _Values(values, problems)


def _other_values(target: Any, given: Mapping[str, np.ndarray]) -> list[str]:
    """What an imported model's code has read as numbers and is another number in the state dict."""
    model = model_of(target.model() if isinstance(target, TrainState) else target)
    if model is None:
        return []
    read = {entry.name: entry for entry in model.entries if entry.fixed is not None and entry.name in given}
    return other_values(model, {name: given[name].astype(TORCH[entry.dtype]) for name, entry in read.items()})


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.dtype == b.dtype and a.tobytes() == b.tobytes())


def _optional(name: str, expected: Container[str]) -> bool:
    """Whether an entry is the counter of a BatchNorm layer of the model."""
    layer, _, last = name.rpartition(".")
    return last == _COUNTER and f"{layer}.running_mean".lstrip(".") in expected


def _arrays(entries: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The entries as arrays, and which of them are none."""
    found, problems = {}, []
    for name, value in entries.items():
        try:
            found[name] = _array(value)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's words for sparse, meta and quantised tensors
            problems.append(f"not to be read as an array: {name} ({str(error).splitlines()[0]})")
    return found, problems


def _array(value: Any) -> np.ndarray:
    return to_numpy(value) if hasattr(value, "detach") else np.asarray(value)


def _lost(value: np.ndarray, dtype: np.dtype) -> str | None:
    """What of the values a variable of `dtype` would lose, beyond rounding."""
    if value.dtype != bool and not jnp.issubdtype(value.dtype, np.number):
        return f"{value.dtype} instead of numbers"
    if np.can_cast(value.dtype, dtype) or dtype == np.bool_:  # the same dtype or a wider one; what is not 0 is true
        return None
    if jnp.issubdtype(value.dtype, np.complexfloating) and not jnp.issubdtype(dtype, np.complexfloating):
        return f"complex numbers for {dtype}"
    narrowed = jax.dtypes.canonicalize_dtype(value.dtype)
    advice = " (set jax_enable_x64)" if dtype == narrowed != value.dtype else ""
    if not jnp.issubdtype(dtype, np.integer):
        with np.errstate(over="ignore"):
            overflows = np.any(np.isfinite(value) & ~np.isfinite(value.astype(dtype)))
        return f"numbers too large for {dtype}{advice}" if overflows else None
    limits = jnp.iinfo(dtype)
    if jnp.issubdtype(value.dtype, np.integer):
        fits = np.all((value >= limits.min) & (value <= limits.max))
        return None if fits else f"integers too large for {dtype}{advice}"
    value = value.astype(np.float64)  # which has 2**63 and the like
    fits = np.all((value >= limits.min) & (value < limits.max + 1))
    return None if fits else f"numbers outside the range of {dtype}"


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(repr, names))
