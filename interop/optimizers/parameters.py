"""Whose state an optimizer's state is: parameters by PyTorch's names and layouts, and arrays like the parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from interop.optimizers import numbering
from interop.program.recorded import model_of
from interop.weights import nnx_tree as layers
from interop.weights._state_dict import load_state_dict, opened, state_dict
from interop.weights.linen_observe import Inputs
from interop.weights.nnx_tree import Layouts
from interop.weights.rename import Rename, Renaming
from jaxnorm import TrainState
from jaxnorm._typing import PyTree

if TYPE_CHECKING:
    from interop.optimizers.numbering import Names, Optimizer

Path = tuple[Any, ...]  # of a leaf, in jax.tree_util's keys


class Parameters:
    """The parameters of a training state as a state dict has them. Momenta and the like go the same way.

    Raises:
        ValueError: for layers that have fewer parameters than in PyTorch (the biases of recurrent cells): the sum of
            two has no momentum of its own there.
    """

    def __init__(self, state: TrainState, layouts: Layouts | None, inputs: Inputs) -> None:
        self._state = state
        self._options: dict[str, Any] = {"layouts": layouts, "inputs": inputs}
        # The trainable entries are those that become nan when the parameters do.
        blank = self._with(jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), state.params))
        entries = state_dict(blank, **self._options)
        self.shapes = {name: x.shape for name, x in entries.items()}
        parts = layers.parts(opened(blank, layouts, inputs), layouts)
        # Tied weights are one parameter, of the first of their names.
        first: dict[Any, tuple[str, ...]] = {}
        self._first: dict[str, str] = {}
        for part in parts:
            these = first.setdefault(tuple(slot.key for slot in part.slots), part.entries)
            self._first |= dict(zip(part.entries, these, strict=True))
        self.names = [
            name
            for name, x in entries.items()
            if self._first[name] == name and x.size and np.isnan(x.astype(np.float64)).all()
        ]
        unlike = [
            f"  {part.layer}: {', '.join(part.entries)}"
            for part in parts
            if set(part.entries) & set(self.names)
            and sum(map(math.prod, part.shapes)) != sum(math.prod(slot.shape) for slot in part.slots)
        ]
        if unlike:
            raise ValueError(
                "layers with fewer parameters than in PyTorch, whose optimizer state cannot be handed over:\n"
                + "\n".join(unlike)
            )

    def to_params(
        self, values: Mapping[str, np.ndarray], others: Mapping[Path, ArrayLike] = MappingProxyType({})
    ) -> PyTree:
        """Arrays by PyTorch's names, in its layouts, as a tree like the parameters.

        Where there is none, what `others` has at the parameter's path, or else zeros.
        """
        unknown = sorted(values.keys() - self.shapes.keys())
        if unknown:
            raise ValueError(f"not in the model's state dict: {', '.join(unknown)}")
        blank = self._with(self._filled(others))
        full = state_dict(blank, **self._options)
        wrong = sorted(name for name, x in values.items() if np.iscomplexobj(x) and not np.iscomplexobj(full[name]))
        if wrong:
            raise ValueError(f"complex values in the optimizer's state for real parameters: {', '.join(wrong)}")
        full |= values
        full |= {name: values[one] for name, one in self._first.items() if one in values}
        model = load_state_dict(blank.model(), full, **self._options)
        return TrainState.create(model, optax.identity()).params

    def everywhere(self, value: ArrayLike) -> dict[Path, ArrayLike]:
        """`others` that have this value at every parameter."""
        return {tuple(path): value for path, _ in jax.tree_util.tree_leaves_with_path(self._state.params)}

    def to_torch(self, leaves: Mapping[Path, ArrayLike]) -> dict[str, np.ndarray]:
        """The inverse: leaves by the paths of parameters, as arrays by PyTorch's names."""
        full = state_dict(self._with(self._filled(leaves)), **self._options)
        return {name: full[name] for name in self.at(leaves)}

    def at(self, paths: Collection[Path]) -> list[str]:
        """PyTorch's names of the parameters at these paths, in whole or in part."""
        marked = state_dict(self._with(self._filled(dict.fromkeys(paths, np.nan))), **self._options)
        return [name for name in self.names if np.isnan(marked[name]).any()]

    def paths(self) -> dict[str, set[Path]]:
        """By PyTorch's name of a parameter the paths of the arrays that it is in."""
        leaves = jax.tree_util.tree_leaves_with_path(self._state.params)
        numbers = {tuple(path): float(i) for i, (path, _) in enumerate(leaves)}
        marked = state_dict(self._with(self._filled(numbers)), **self._options)
        return {
            name: {tuple(leaves[int(number)][0]) for number in np.unique(np.real(marked[name]))} for name in self.names
        }

    def axes(self) -> dict[str, tuple[int, ...] | None]:
        """By a parameter's name the axes by which its array here, transposed, is PyTorch's.

        None where it is no array of its own here, or another than transposed.
        """
        shapes = {tuple(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(self._state.params)}
        of_name = self.paths()
        shared = Counter(path for paths in of_name.values() for path in paths)
        most = max((len(shape) for shape in shapes.values()), default=0)
        # Where each axis of the arrays here comes to lie, told by arrays that count along it.
        along: list[dict[str, np.ndarray]] = []
        for axis in range(most):
            counts = {path: _counting(shape, axis) for path, shape in shapes.items() if len(shape) > axis}
            along.append(state_dict(self._with(self._filled(counts)), **self._options))
        found: dict[str, tuple[int, ...] | None] = {}
        for name, paths in of_name.items():
            own = len(paths) == 1 and all(shared[path] == 1 for path in paths)
            dimensions = len(shapes[next(iter(paths))])
            counted = [entries[name] for entries in along[:dimensions]]
            found[name] = _transposition(counted, self.shapes[name]) if own else None
        return found

    def frozen(self, optimizer: Optimizer, names: Any, order: Mapping[int, str]) -> set[str]:
        """Those of `by_number` that are known not to require gradients."""
        live = numbering.tensors(optimizer)
        if live is not None:
            return {name for name, p in zip(order.values(), live, strict=True) if not p.requires_grad}
        if not hasattr(names, "named_parameters"):
            return set()
        known = dict(names.named_parameters())
        asked = numbering.given_names(optimizer, names) or []
        return {mine for mine, name in zip(order.values(), asked, strict=True) if not known[name].requires_grad}

    def by_number(self, optimizer: Optimizer, names: Names, rename: Rename | None) -> dict[int, str]:
        """The model's name of each parameter by its number in the optimizer's state dict.

        Raises:
            TypeError, ValueError: where the optimizer or the names are not what they are to be, or leave a doubt.
        """
        numbers = [number for group in numbering.opened(optimizer)["param_groups"] for number in group["params"]]
        given = numbering.given_names(optimizer, names)
        if given is None:
            return dict(zip(numbers, self._proven(optimizer, len(numbers)), strict=True))
        model_names = Renaming(rename).to_model(given)
        unknown = sorted(set(model_names.values()) - self.shapes.keys())
        if unknown:
            raise ValueError(f"not in the model's state dict: {', '.join(unknown)}")
        return {number: self._first[model_names[name]] for number, name in zip(numbers, given, strict=True)}

    def _proven(self, optimizer: Optimizer, count: int) -> list[str]:
        model = model_of(self._state.model())
        if model is None:  # names and layouts of a hand-written model are its own: shapes that agree prove nothing
            raise ValueError(f"whose parameters are these? {numbering.HOW}")
        trained = [e.name for e in model.entries if e.kind == "parameter" and e.same_as is None]
        frozen = [e.name for e in model.entries if e.kind == "frozen" and e.same_as is None]
        whole = isinstance(optimizer, Mapping) and count == len(trained)
        return numbering.proven_names(optimizer, self._values(trained if whole else trained + frozen))

    def _values(self, names: list[str]) -> dict[str, np.ndarray]:
        entries = state_dict(self._state, **self._options)
        return {name: entries[name] for name in names}

    def _filled(self, leaves: Mapping[Path, ArrayLike]) -> PyTree:
        """A tree like the parameters, of leaves by their paths; zeros where there is none."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: _wide(x, leaves.get(tuple(path), 0)), self._state.params
        )

    def _with(self, params: PyTree) -> TrainState:
        return self._state.replace(params=params)


def _wide(like: jax.Array | np.ndarray, value: ArrayLike) -> np.ndarray:
    # At least as wide as the values are: momenta of bfloat16 parameters may be float32.
    floating = jnp.issubdtype(like.dtype, jnp.inexact)
    dtype = jnp.result_type(like.dtype, jnp.float32, value) if floating else like.dtype
    return np.broadcast_to(np.asarray(value, dtype), like.shape)


def _counting(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """0, 1, 2, ... along the axis."""
    size = shape[axis]
    return np.broadcast_to(np.arange(size).reshape([size if i == axis else 1 for i in range(len(shape))]), shape)


def _transposition(along: Sequence[np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a transposition to this shape that brings arrays that count along each axis to these."""
    if len(along) != len(shape):
        return None
    found: list[int] = []
    for axis in range(len(shape)):
        fits = [i for i, x in enumerate(along) if i not in found and np.array_equal(x, _counting(shape, axis))]
        if not fits:
            return None
        found.append(fits[0])
    return tuple(found)
