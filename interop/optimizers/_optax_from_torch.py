"""optax_from_torch: a torch optimizer's rule as an optax chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from interop.optimizers import chains
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

    torch.optim: SGD, Adam, AdamW, NAdam, RAdam, Adagrad, RMSprop. timm.optim: RMSpropTF, Lion, Adan, Lamb.

    | PyTorch | optax |
    |---|---|
    | SGD | `trace`; with dampening a rule of ours, whose first value is undampened |
    | Adam, AdamW | `scale_by_adam`; with amsgrad a rule of ours (the maximum is taken before the bias correction) |
    | RMSprop | `scale_by_rms(eps_in_sqrt=False)`, or `scale_by_stddev`; then `trace`, then the rate |
    | timm RMSpropTF | `scale_by_rms(eps_in_sqrt=True, initial_scale=1)`; the rate, then `trace` |
    | timm Lion | `scale_by_lion` |
    | timm Lamb | `clip_by_global_norm`, adam, `add_decayed_weights`, `scale_by_trust_ratio` |
    | NAdam, RAdam, Adagrad, timm Adan | rules of ours: optax's momentum, place of eps, or difference is another |

    Weight decay is added to the gradient, or decoupled and multiplied by the rate, as the optimizer says.

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

    **Raises:** `ValueError` for an optimizer or an option that has no counterpart here, naming them all; where the
    order of the parameters is not known; and from the chain's `init`, for a model of more parameters than the
    optimizer trains, where no `model` was given. `TypeError` for what is no torch optimizer.
    """
    if isinstance(optimizer, Mapping) or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "optimizer is a torch optimizer, which knows its rule (a state dict does not); got "
            f"{type(optimizer).__name__}"
        )
    groups = optimizer.param_groups
    kind = type(optimizer).__name__
    rates = chains.rates(groups, learning_rate)
    moving = [rate if isinstance(rate, TorchSchedule) and rate.moved else None for rate in rates]
    chains.refuse_unknown(kind, groups, moving=any(moving))
    parts = [
        chains.chain(kind, group, rate) if moved is None else chains.moving_chain(kind, group, moved)
        for group, rate, moved in zip(groups, rates, moving, strict=True)
    ]
    largest = optimizer.defaults.get("max_grad_norm") if kind == "Lamb" else None
    clip = optax.identity() if largest is None else optax.clip_by_global_norm(largest)
    alike = all(
        _hyperparameters(g) == _hyperparameters(groups[0]) and r is rates[0] for g, r in zip(groups, rates, strict=True)
    )
    if alike:
        parts = parts[:1]
        whole = parts[0] if largest is None else optax.chain(clip, parts[0])
    elif model is None:
        raise ValueError(f"the optimizer has {len(groups)} parameter groups that differ: {_GIVE}")
    if model is None:
        size = sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)
        return optax.GradientTransformation(_refusing_more(whole.init, size), whole.update)
    parameters = Parameters(TrainState.create(model, optax.identity()), layouts, inputs)
    labels = _labels(optimizer, parameters, parameters.by_number(optimizer, names, rename), len(parts))
    trained = jax.tree.map(lambda label: label != _ALONE, labels)
    if len(parts) == 1 and all(jax.tree.leaves(trained)):
        return whole
    chain = optax.partition({str(i): c for i, c in enumerate(parts)} | {_ALONE: optax.set_to_zero()}, labels)
    return chain if largest is None else optax.chain(optax.masked(clip, trained), chain)


_ALONE = "left alone"
_GIVE = (
    "give model= (what TrainState.create takes) and names= (the torch module), so that each parameter's group is known"
)


def _refusing_more(init: Callable[[PyTree], PyTree], size: int) -> Callable[[PyTree], PyTree]:
    """`init`, for no more numbers than the optimizer trains. (Fewer are what `optax.partition` gives a part.)"""

    def checked(params: PyTree) -> PyTree:
        found = sum(x.size for x in jax.tree.leaves(params))
        if found > size:
            raise ValueError(
                f"the torch optimizer trains {size} numbers and leaves all else alone; these are the parameters of "
                f"{found}. To know which: {_GIVE}"
            )
        return init(params)

    return checked


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr", "step")}


def _labels(optimizer: torch.optim.Optimizer, parameters: Parameters, order: Mapping[int, str], parts: int) -> PyTree:
    """For each parameter the number of its chain, or that it is left alone: in no group, or without requires_grad."""
    chosen: dict[str, np.ndarray] = {}
    of_group = [g if parts > 1 else 0 for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    frozen = parameters.frozen(optimizer, None, order)
    for number, name in order.items():
        if name not in frozen:
            chosen[name] = np.full(parameters.shapes[name], float(of_group[number]))
    marked = parameters.to_params(chosen, parameters.everywhere(-1))

    def label(path: Any, x: Any) -> str:
        found = {int(mark) for mark in np.unique(np.real(np.asarray(x)))} or {-1}
        if len(found) > 1:
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} is one array here and several parameters in "
                "PyTorch, which its optimizer treats differently"
            )
        group = found.pop()
        return _ALONE if group < 0 else str(group)

    return jax.tree_util.tree_map_with_path(label, marked)
