"""Whose state an optimizer's state is: parameters by PyTorch's names and layouts, and arrays like the parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from interop.program.recorded import model_of
from interop.weights import nnx_tree as layers
from interop.weights._state_dict import load_state_dict, opened, state_dict
from interop.weights.linen_observe import Inputs
from interop.weights.nnx_tree import Layouts
from interop.weights.rename import Rename, Renaming
from jaxnorm import TrainState
from jaxnorm._typing import PyTree

if TYPE_CHECKING:
    import torch

    Optimizer: TypeAlias = torch.optim.Optimizer | Mapping[str, Any]  # or its state dict
    Names: TypeAlias = (
        torch.nn.Module | Iterable[str] | None
    )  # which parameter is which: the module, or the names in order

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
        self.names = [name for name, x in entries.items() if x.size and np.isnan(x.astype(np.float64)).all()]
        unlike = [
            f"  {part.layer}: {', '.join(part.entries)}"
            for part in layers.parts(opened(blank, layouts, inputs), layouts)
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
        full = {**full, **values}
        model = load_state_dict(blank.model(), full, **self._options)
        return TrainState.create(model, optax.identity()).params

    def to_torch(self, leaves: Mapping[Path, ArrayLike]) -> dict[str, np.ndarray]:
        """The inverse: leaves by the paths of parameters, as arrays by PyTorch's names."""
        full = state_dict(self._with(self._filled(leaves)), **self._options)
        return {name: full[name] for name in self.at(leaves)}

    def at(self, paths: Collection[Path]) -> list[str]:
        """PyTorch's names of the parameters at these paths, in whole or in part."""
        marked = state_dict(self._with(self._filled(dict.fromkeys(paths, np.nan))), **self._options)
        return [name for name in self.names if np.isnan(marked[name]).any()]

    def frozen(self, optimizer: Optimizer, names: Any, order: Mapping[int, str]) -> set[str]:
        """Those of `by_number` that are known not to require gradients."""
        if not isinstance(optimizer, Mapping):
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
        else:
            tensors = list(names.parameters()) if hasattr(names, "named_parameters") else []
        return {name for name, p in zip(order.values(), tensors, strict=False) if not p.requires_grad}

    def by_number(self, optimizer: Optimizer, names: Names, rename: Rename | None) -> dict[int, str]:
        """The model's name of each parameter by its number in the optimizer's state dict."""
        order = self._torch_names(optimizer, names)
        model_names = Renaming(rename).to_model(order.values())
        return {number: model_names[name] for number, name in order.items()}

    def _filled(self, leaves: Mapping[Path, ArrayLike]) -> PyTree:
        """A tree like the parameters, of leaves by their paths; zeros where there is none."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: _wide(x, leaves.get(tuple(path), 0)), self._state.params
        )

    def _with(self, params: PyTree) -> TrainState:
        return self._state.replace(params=params)

    def _torch_names(self, optimizer: Any, names: Any) -> dict[int, str]:
        live = not isinstance(optimizer, Mapping)
        groups = optimizer.param_groups if live else optimizer["param_groups"]
        numbers = [list(range(len(g["params"]))) for g in groups] if live else [list(g["params"]) for g in groups]
        if live:  # state_dict() numbers parameters one group after the other
            start = 0
            for group in numbers:
                group[:] = [start + i for i in group]
                start += len(group)
        flat = [i for group in numbers for i in group]
        if live and hasattr(names, "named_parameters"):
            by_identity = {id(p): name for name, p in names.named_parameters()}
            parameters = [p for group in groups for p in group["params"]]
            unknown = sum(id(p) not in by_identity for p in parameters)
            if unknown:
                raise ValueError(f"{unknown} of the optimizer's parameters are not the given module's")
            return dict(zip(flat, (by_identity[id(p)] for p in parameters), strict=True))
        names = self._names_in_order(groups) if names is None else names
        names = [name for name, _ in names.named_parameters()] if hasattr(names, "named_parameters") else list(names)
        if len(names) != len(flat):
            raise ValueError(f"{len(names)} names for the optimizer's {len(flat)} parameters")
        return dict(zip(flat, names, strict=True))

    def _names_in_order(self, groups: Sequence[Mapping[str, Any]]) -> list[str]:
        if all(g.get("param_names") for g in groups):
            return [name for g in groups for name in g["param_names"]]
        if len(groups) == 1 and model_of(self._state.model()) is not None:  # its order is PyTorch's
            return self.names
        raise ValueError(
            "whose parameters are these? Give names=: the torch module, or their names in the order in which the "
            "optimizer was given them"
        )


def _wide(like: jax.Array | np.ndarray, value: ArrayLike) -> np.ndarray:
    # At least as wide as the values are: momenta of bfloat16 parameters may be float32.
    floating = jnp.issubdtype(like.dtype, jnp.inexact)
    dtype = jnp.result_type(like.dtype, jnp.float32, value) if floating else like.dtype
    return np.broadcast_to(np.asarray(value, dtype), like.shape)
