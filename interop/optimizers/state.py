"""The state of a torch optimizer in mid-training as that of its optax chain, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.optimizers import counts, numbering
from interop.optimizers.parameters import Parameters, Path
from interop.weights.linen_observe import Inputs
from interop.weights.nnx_tree import Layouts
from interop.weights.rename import Rename
from jaxnorm import TrainState
from jaxnorm._typing import PyTree

if TYPE_CHECKING:
    from interop.optimizers.numbering import Names, Optimizer

_COUNTS = ("count", "t")  # numbers of steps; "t" is optax.ScaleByAdanState's
_NEGATED = "neg_pre_grad"
# Fields that begin with a case of their own, where they stand beside a count: SGD's with dampening, and Adan's.
_FIRST_APART = ("trace", "g")


def load_optimizer_state(
    state: TrainState,
    optimizer: Optimizer,
    *,
    names: Names = None,
    step: int | None = None,
    rename: Rename | None = None,
    layouts: Layouts | None = None,
    inputs: Inputs = None,
) -> TrainState:
    """The training state with the torch optimizer's momenta, squares and step count in its optimizer state.

    The optax state may be `optax_from_torch`'s or any other whose fields have optax's names (`trace`, `mu`, `nu`,
    `count`, ...). `state.step`, which the randomness of the steps goes by, becomes the number of steps taken.

    **Arguments:**

    - `state`: a `jaxnorm.TrainState`.
    - `optimizer`: a torch optimizer, or its state dict (of tensors or of NumPy arrays: no torch is needed then).
    - `names`: which parameter is which: the torch module (with a state dict: the optimizer was given its parameters in
      the module's order), or the names in the order in which the optimizer was given the parameters. Not needed where
      the optimizer was made from `named_parameters()`; nor, for an imported model, where the live optimizer's tensors
      have the values that the model has, or where no two parameters have one shape.
    - `step`: the number of steps taken; needed for SGD and Lion, which keep no count, and checked for the others.
      The position of a schedule from `schedule_from_torch` is its scheduler's, whatever this is.
    - `rename`, `layouts`, `inputs`: as in `load_state_dict`, of a hand-written model.

    **Returns:** the new training state.

    **Raises:**

    - `ValueError`: listing the optax fields that the torch state has nothing for, and entries of the torch state that
      the optax state has no field for; for parameters that are in no group of the torch optimizer, and in the optax
      state; where the order of the parameters is not known; for layers that have fewer parameters than in PyTorch; for
      parameters updated different numbers of times, or not at all (unless frozen), where their updates depend on it;
      and for a `step` that is none, missing where it is needed, or another than the optimizer's.
    - `TypeError`: for what is no training state, optimizer or list of names.
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"state is a jaxnorm.TrainState; got {type(state).__name__}")
    step = None if step is None else _whole("step", step)
    source = numbering.opened(optimizer)
    parameters = Parameters(state, layouts, inputs)
    order = parameters.by_number(optimizer, names, rename)
    entries, scalars = _by_entry(source, order)
    fields = _by_field(state.opt_state)
    chosen = {f: next((e for e in counts.names(f) if e in entries), None) for f in fields if counts.names(f)}
    taken = any(scalars.values()) or any(entries.values())
    missing = sorted(f for f, entry in chosen.items() if entry is None)
    unused = sorted(entries.keys() - set(chosen.values()))
    if taken and (missing or unused):
        raise ValueError(
            f"the optimizer states do not match: the optax state's {missing} have no counterpart among the torch "
            f"state's {sorted(entries)}, and {unused} no place in the optax state"
        )
    slots = {path for field in chosen for path in fields[field]}
    strangers = sorted(set(parameters.at(slots)) - set(order.values())) if slots else []
    if strangers:
        raise ValueError(
            f"in no group of the torch optimizer, which leaves them alone, but in the optax state: "
            f"{', '.join(strangers)}. optax_from_torch(optimizer, names=, model=) leaves them alone, too"
        )
    fresh = _by_field(state.tx.init(state.params))
    of_names = parameters.paths()
    trees: dict[str, dict[Path, Any]] = {}
    for f, entry in chosen.items():
        if entry is None:
            continue
        values = _filled(entries[entry], entry)
        if _numbers(fields[f]):
            of_path = {path: x for name, x in values.items() for path in of_names[name]}
            trees[f] = {path: of_path.get(path, leaf) for path, leaf in fresh[f].items()}
        else:
            trees[f] = _leaves_by_path(parameters.to_params(values, fresh.get(f, {})))
    # A parameter that PyTorch has not updated yet starts at its own step 1 there.
    anew: set[str] = set()
    for field, paths in _beside_a_count(state.opt_state).items():
        if field in chosen and (scalars["step"] or field in _FIRST_APART):
            updated = entries.get(chosen[field] or "", {}).keys() & (scalars["step"] or order.values())
            anew |= set(parameters.at(paths)) - updated
    anew -= parameters.frozen(optimizer, names, order)
    step = _step(source, scalars["step"], step, [name for name in order.values() if name in anew])

    def replaced(path: Path, leaf: Any) -> Any:
        field, rest = _field(path)
        if field in trees:
            return jnp.asarray(trees[field][rest], leaf.dtype).reshape(leaf.shape)
        if field in _COUNTS:
            return jnp.full(leaf.shape, step, leaf.dtype)
        if field == "mu_product" and scalars["mu_product"]:
            return jnp.full(leaf.shape, float(next(iter(scalars["mu_product"].values()))), leaf.dtype)
        return leaf

    opt_state = jax.tree_util.tree_map_with_path(replaced, state.opt_state)
    return state.replace(opt_state=opt_state, step=jnp.asarray(step, state.step.dtype))


def optimizer_state_dict(
    state: TrainState,
    optimizer: Optimizer,
    *,
    names: Names = None,
    rename: Rename | None = None,
    layouts: Layouts | None = None,
    inputs: Inputs = None,
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes to go on in PyTorch: the inverse of `load_optimizer_state`.

    **Arguments:**

    - `state`: a `jaxnorm.TrainState`.
    - `optimizer`: the torch optimizer to go on with, or its state dict: for its groups, hyperparameters and layout.
    - `names`, `rename`, `layouts`, `inputs`: as in `load_optimizer_state`.

    **Returns:** a dict with `state` (torch tensors and numbers by the parameters' numbers) and `param_groups`.

    **Raises:**

    - `ValueError`: where the order of the parameters is not known, and for parts of the optax state that have counted
      different numbers of steps.
    - `TypeError`: as in `load_optimizer_state`.
    """
    import torch

    if not isinstance(state, TrainState):
        raise TypeError(f"state is a jaxnorm.TrainState; got {type(state).__name__}")
    like = copy.deepcopy(numbering.opened(optimizer))
    parameters = Parameters(state, layouts, inputs)
    order = parameters.by_number(optimizer, names, rename)
    idle = parameters.frozen(optimizer, names, order) - {order[int(index)] for index in like["state"]}
    found = _by_field(state.opt_state)
    taken = {int(x) for field in _COUNTS for x in found.get(field, {}).values()}
    if len(taken) > 1:
        raise ValueError(f"the optimizer state counts different numbers of steps: {sorted(taken)}")
    steps = taken.pop() if taken else int(state.step)

    centered = any("alpha" in group for group in like["param_groups"])
    paths = parameters.paths()
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for field, leaves in found.items():
        options = counts.names(field)
        if not options:
            continue
        entry = options[-1] if centered else options[0]
        if _numbers(leaves):
            arrays[entry] = {
                name: np.asarray(leaves[path]) for name, of_name in paths.items() for path in of_name & leaves.keys()
            }
        else:
            arrays[entry] = parameters.to_torch(leaves)
    if _NEGATED in arrays:
        arrays[_NEGATED] = {name: np.asarray(-x) for name, x in arrays[_NEGATED].items()}

    result: dict[int, dict[str, Any]] = {}
    for group in like["param_groups"]:
        kept = counts.kept(group)
        if kept == "group":
            group["step"] = torch.tensor(float(steps)) if isinstance(group.get("step"), torch.Tensor) else steps
        for index in group["params"]:
            name = order[index]
            mine = {
                entry: float(x[name]) if entry in counts.PLAIN else torch.tensor(x[name])
                for entry, x in arrays.items()
                if name in x
            }
            if not mine or name in idle:
                continue
            if "fallback_lr_scale" in group:  # timm's Muon: counted where there are squares
                mine["use_muon"] = "momentum_buffer" in mine
            if kept == "number":
                mine["step"] = steps
            elif kept == "tensor" and ("fallback_lr_scale" not in group or "exp_avg_sq" in mine):
                mine["step"] = torch.tensor(float(steps))
            if "mu_product" in found:
                mine["mu_product"] = torch.tensor(float(next(iter(found["mu_product"].values()))))
            result[index] = mine
    return {"state": result, "param_groups": like["param_groups"]}


def _by_entry(
    source: Mapping[str, Any], order: Mapping[int, str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, Any]]]:
    """{entry: {parameter: array}} of a torch state dict, and its scalars likewise: steps, and NAdam's products."""
    entries: dict[str, dict[str, np.ndarray]] = {}
    scalars: dict[str, dict[str, Any]] = {"step": {}, "mu_product": {}}
    for index, values in source["state"].items():
        for entry, value in values.items():
            if value is None or entry == "use_muon":  # which is a choice, not a number: `muon.suited`
                continue
            if entry in scalars:
                scalars[entry][order[int(index)]] = value
            else:
                entries.setdefault(entry, {})[order[int(index)]] = numbering.numpy(value)
    return entries, scalars


def _step(source: Mapping[str, Any], counted: Mapping[str, Any], given: int | None, anew: Sequence[str]) -> int:
    """The number of steps taken: the one of all parameters and groups, or the given one where none is kept."""
    groups = source["param_groups"]
    taken = {_whole(f"the step of {name}", x) for name, x in counted.items()}
    taken |= {_whole(f"the step of group {i}", g["step"]) for i, g in enumerate(groups) if g.get("step") is not None}
    if not taken and not source["state"] and all(counts.kept(g) != "none" for g in groups):
        taken = {0}
    if not taken and given is None:
        raise ValueError("this torch optimizer keeps no count of its steps: give step=")
    if len(taken) == 1 and given not in (None, *taken):
        raise ValueError(f"step={given}, but the optimizer has taken {taken.pop()} steps")
    taken = taken or {_whole("step", given)}
    if len(taken) > 1 or (anew and taken != {0}):
        never = f", and not at all: {', '.join(anew)}" if anew else ""
        raise ValueError(
            f"the parameters were updated different numbers of times ({sorted(taken)}{never}); optax taken once. "
            "Parameters that stay frozen may be left out of the chain: optax.partition, with optax.set_to_zero for them"
        )
    return taken.pop()


def _whole(name: str, value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch's, of a tensor of several
        raise ValueError(f"{name} is a number of updates; got {value!r:.80}") from None
    if not 0 <= number < 2**31 or number != int(number):
        raise ValueError(f"{name} is a number of updates, whole, from 0 to 2**31 - 1; got {number}")
    return int(number)


def _filled(values: Mapping[str, np.ndarray], entry: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(-x) for name, x in values.items()} if entry == _NEGATED else dict(values)


def _field(path: Path) -> tuple[str, Path]:
    """The optax field that a leaf of an optimizer state is in, and its path from there: its parameter's."""
    for i in range(len(path) - 1, -1, -1):
        if isinstance(path[i], jax.tree_util.GetAttrKey):
            rest = tuple(path[i + 1 :])
            if path[i].name == "entries":  # `by_entries.EntriesState`: by PyTorch's names
                return counts.ENTRIES + rest[0].key, rest[1:]
            return path[i].name, rest
    return "", tuple(path)


def _by_field(opt_state: PyTree) -> dict[str, dict[Path, Any]]:
    """{field: {path of a parameter: leaf}}."""
    found: dict[str, dict[Path, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        field, rest = _field(path)
        # Scalars of different parts of a chain have no path of their own.
        found.setdefault(field, {})[rest or tuple(path)] = leaf
    return found


def _beside_a_count(opt_state: PyTree) -> dict[str, set[Path]]:
    """{field: paths of parameters} in those parts of a chain that count steps."""
    parts: dict[Path, list[tuple[str, Path]]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(opt_state):
        field, rest = _field(path)
        parts.setdefault(path[: len(path) - len(rest) - 1], []).append((field, rest))
    found: dict[str, set[Path]] = {}
    for part in parts.values():
        if any(field in _COUNTS for field, _ in part):
            for field, rest in part:
                found.setdefault(field, set()).add(rest)
    return found


def _numbers(leaves: Mapping[Path, Any]) -> bool:
    """Whether there is one number for each parameter, or arrays like these. (Of a parameter that is one, either.)"""
    return bool(leaves) and all(np.ndim(leaf) == 0 for leaf in leaves.values())


def _leaves_by_path(tree: PyTree) -> dict[Path, Any]:
    return {tuple(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
