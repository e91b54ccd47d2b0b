"""optax_from_torch: a torch optimizer's rule as an optax chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from interop.optimizers import chains, muon
from interop.optimizers.chains import Route
from interop.optimizers.parameters import Parameters
from interop.optimizers.plateau import Plateau
from interop.optimizers.schedules import Schedule, TorchSchedule
from interop.weights.linen_observe import Inputs
from interop.weights.nnx_tree import Layouts
from interop.weights.rename import Rename
from jaxnorm import TrainState
from jaxnorm._typing import PyTree

if TYPE_CHECKING:
    import torch

    from interop.optimizers.numbering import Names


def optax_from_torch(
    optimizer: torch.optim.Optimizer,
    *,
    names: Names = None,
    model: Any = None,
    learning_rate: Schedule | Sequence[Schedule] | Plateau | None = None,
    rename: Rename | None = None,
    layouts: Layouts | None = None,
    inputs: Inputs = None,
) -> optax.GradientTransformation:
    """An optax chain that updates the parameters exactly as the torch optimizer would, and leaves alone what it would.

    ```python
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    state = jaxnorm.TrainState.create(model, interop.optax_from_torch(optimizer))
    state = interop.load_optimizer_state(state, optimizer, names=module)
    ...
    optimizer.load_state_dict(interop.optimizer_state_dict(state, optimizer, names=module))
    ```

    torch.optim: SGD, Adam, AdamW, NAdam, RAdam, Adagrad, RMSprop, Adamax, Adadelta, ASGD, Rprop, Muon. timm.optim:
    SGDW, Lars, Lamb, AdamW (its own, "adamwlegacy"), NAdamW, AdaBelief, Adopt, LaProp, MADGRAD, Mars, RMSpropTF, Lion,
    Adan, Muon, by whatever name `create_optimizer_v2` made them: cautious, corrected, rectified, with layer decay.

    | PyTorch | optax |
    |---|---|
    | SGD, timm SGDW | `trace`; with dampening a rule of ours, whose first value is undampened |
    | Adam, AdamW | `scale_by_adam`; with amsgrad a rule of ours (the maximum is taken before the bias correction) |
    | RMSprop | `scale_by_rms(eps_in_sqrt=False)`, or `scale_by_stddev`; then `trace`, then the rate |
    | timm RMSpropTF | `scale_by_rms(eps_in_sqrt=True, initial_scale=1)`; the rate, then `trace` |
    | timm Lion | `scale_by_lion` |
    | all others | rules of ours: optax's momentum, place of eps, or difference is another, or it has none |

    Weight decay is added to the gradient, or decoupled and multiplied by the rate, as the optimizer says. Muon's
    iteration runs in bfloat16, as in PyTorch, and agrees to what that tells apart.

    **Arguments:**

    - `optimizer`: the torch optimizer. Its hyperparameters as they are now; its state is not read.
    - `names`, `model`: which parameter of the JAX model is in which group, and which is in none or does not require
      gradients, and is left alone. Needed unless the optimizer trains all parameters alike. `names` as in
      `load_optimizer_state`; `model` is what `TrainState.create` takes.
    - `learning_rate`: instead of the groups' `lr`, a schedule (number of steps so far -> rate), or one for each group.
      Those of `schedule_from_torch` begin at their scheduler's position, whatever the optimizer counts, and with
      `moving=True` bring momentum, betas and weight decay, which the chain follows. A `Plateau` is one for all groups.
    - `rename`, `layouts`, `inputs`: as in `load_state_dict`.

    A parameter that the loss does not depend on has no gradient in PyTorch, which leaves it alone, and one of zero in
    JAX: weight decay moves it. Leave such parameters out of the optimizer.

    **Returns:** the chain, an `optax.GradientTransformation`, which `jaxnorm.TrainState.create` takes.

    **Raises:**

    - `ValueError`: for an optimizer or an option that has no counterpart here, naming them all; where the order of the
      parameters is not known, or groups differ and no `model` was given; and from the chain's `init`, for a model of
      more parameters than the optimizer trains, where no `model` was given.
    - `TypeError`: for what is no torch optimizer.
    """
    if isinstance(optimizer, Mapping) or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "optimizer is a torch optimizer, which knows its rule (a state dict does not); got "
            f"{type(optimizer).__name__}"
        )
    groups = optimizer.param_groups
    kind = chains.kind_of(optimizer)
    rates = chains.rates(groups, learning_rate)
    moving = [rate if isinstance(rate, TorchSchedule) and rate.moved else None for rate in rates]
    chains.refuse_unknown(kind, groups, moving=any(moving))

    def chain_of(number: int, route: Route = chains.GROUPS_OWN) -> optax.GradientTransformation:
        group, moved = groups[number], moving[number]
        if moved is not None:
            return chains.moving_chain(kind, group, moved, route)
        return chains.chain(kind, group, rates[number], route)

    largest = optimizer.defaults.get("max_grad_norm") if kind == "Lamb" else None
    clip = optax.identity() if largest is None else optax.clip_by_global_norm(largest)
    alike = all(
        _hyperparameters(g) == _hyperparameters(groups[0]) and r is rates[0] for g, r in zip(groups, rates, strict=True)
    )
    by_array = any(chains.by_array(kind, group) for group in groups)
    if model is None:
        if not alike:
            raise ValueError(f"the optimizer has {len(groups)} parameter groups that differ: {_GIVE}")
        if kind in chains.BY_SHAPE:
            raise ValueError(f"{kind} goes by the shape that each parameter has in PyTorch: {_GIVE}")
        whole = chain_of(0) if largest is None else optax.chain(clip, chain_of(0))
        sizes = [p.numel() for group in groups for p in group["params"] if p.requires_grad]
        return optax.GradientTransformation(_refusing_more(whole.init, sizes, by_array), whole.update)
    parameters = Parameters(TrainState.create(model, optax.identity()), layouts, inputs)
    order = parameters.by_number(optimizer, names, rename)
    of_group = [0 if alike else g for g, group in enumerate(groups) for _ in group["params"]]
    routes = (
        _routes(kind, optimizer, parameters, order) if by_array else dict.fromkeys(order.values(), chains.GROUPS_OWN)
    )
    trained = set(order.values()) - parameters.frozen(optimizer, None, order)
    part_of = {name: (of_group[number], routes[name]) for number, name in order.items() if name in trained}
    parts = list(dict.fromkeys(part_of.values()))
    labels = _labels(parameters, {name: parts.index(part) for name, part in part_of.items()})
    marks = jax.tree.map(lambda label: label != _ALONE, labels)
    if len(parts) == 1 and all(jax.tree.leaves(marks)):
        return chain_of(*parts[0]) if largest is None else optax.chain(clip, chain_of(*parts[0]))
    made = {str(i): chain_of(*part) for i, part in enumerate(parts)}
    chain = optax.partition(made | {_ALONE: optax.set_to_zero()}, labels)
    return chain if largest is None else optax.chain(optax.masked(clip, marks), chain)


_ALONE = "left alone"
_GIVE = (
    "give model= (what TrainState.create takes) and names= (the torch module), so that each parameter's group is known"
)


def _refusing_more(
    init: Callable[[PyTree], PyTree], sizes: Sequence[int], by_array: bool
) -> Callable[[PyTree], PyTree]:
    """`init`, for no more numbers than the optimizer trains. (Fewer are what `optax.partition` gives a part.)

    Where a step goes by whole parameters, for these, in sizes.
    """
    size = sum(sizes)

    def checked(params: PyTree) -> PyTree:
        found = [x.size for x in jax.tree.leaves(params)]
        if sum(found) > size:
            raise ValueError(
                f"the torch optimizer trains {size} numbers and leaves all else alone; these are the parameters of "
                f"{sum(found)}. To know which: {_GIVE}"
            )
        if by_array and Counter(found) - Counter(sizes):
            raise ValueError(
                "the torch optimizer's steps go by the norm or mean of each parameter, and some arrays of this model "
                f"are other than PyTorch's: {_GIVE}"
            )
        return init(params)

    return checked


def _routes(kind: str, optimizer: Any, parameters: Parameters, order: Mapping[int, str]) -> dict[str, Route]:
    """By a parameter's name what its chain goes by besides its group.

    Raises:
        ValueError: for parameters that are not arrays of their own here, or are another than turned.
    """
    found: dict[str, Route] = {}
    axes = parameters.axes()
    wrong = sorted(name for name in order.values() if axes[name] is None)
    if wrong:
        raise ValueError(
            f"{kind}'s steps go by each parameter as a whole in PyTorch's layout; parts of other arrays here, or "
            f"reshaped: {', '.join(wrong)}"
        )
    by_shape = kind in chains.BY_SHAPE
    tensors = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for name, (group, p) in zip(order.values(), tensors, strict=True):
        suited = kind != "timm Muon" or muon.suited(tuple(p.shape), group, optimizer.state.get(p, {}))
        turned = axes[name] != tuple(range(p.ndim)) and by_shape
        found[name] = Route(axes[name] if turned else None, not suited)
    return found


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr", "step")}


def _labels(parameters: Parameters, part_of: Mapping[str, int]) -> PyTree:
    """For each parameter the number of its chain, or that it is left alone: in no group, or without requires_grad."""
    chosen = {name: np.full(parameters.shapes[name], float(part)) for name, part in part_of.items()}
    marked = parameters.to_params(chosen, parameters.everywhere(-1))

    def label(path: Any, x: Any) -> str:
        found = {int(mark) for mark in np.unique(np.real(np.asarray(x)))} or {-1}
        if len(found) > 1:
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} is one array here and several parameters in "
                "PyTorch, which its optimizer treats differently"
            )
        part = found.pop()
        return _ALONE if part < 0 else str(part)

    return jax.tree_util.tree_map_with_path(label, marked)
