"""optax_from_torch: a torch optimizer's rule as an optax chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from interop.optimizers import chains
from interop.optimizers.chains import Schedule
from interop.optimizers.parameters import Parameters
from interop.weights.linen_observe import Inputs
from interop.weights.nnx_tree import Layouts
from interop.weights.rename import Rename
from jaxnorm import TrainState
from jaxnorm._typing import PyTree

if TYPE_CHECKING:
    import torch

    from interop.optimizers.parameters import Names


def optax_from_torch(
    optimizer: torch.optim.Optimizer,
    *,
    names: Names = None,
    model: Any = None,
    learning_rate: Schedule | Sequence[Schedule] | None = None,
    rename: Rename | None = None,
    layouts: Layouts | None = None,
    inputs: Inputs = None,
) -> optax.GradientTransformation:
    """An optax chain that updates the parameters exactly as the torch optimizer would.

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
    - `names`, `model`: needed with several parameter groups that differ, to know which parameter of the JAX model is
      in which group. `names` as in `load_optimizer_state`; `model` is what `TrainState.create` takes.
    - `learning_rate`: instead of the groups' `lr`, a schedule (number of steps so far -> rate), or one for each group;
      see `schedule_from_torch`.
    - `rename`, `layouts`, `inputs`: as in `load_state_dict`.

    **Raises:** `ValueError` for an optimizer or an option that has no counterpart here, naming them all.
    """
    groups = optimizer.param_groups
    kind = type(optimizer).__name__
    chains.refuse_unknown(kind, groups)
    rates = chains.rates(groups, learning_rate)
    parts = [chains.chain(kind, group, rate) for group, rate in zip(groups, rates, strict=True)]
    alike = all(
        _hyperparameters(g) == _hyperparameters(groups[0]) and r == rates[0] for g, r in zip(groups, rates, strict=True)
    )
    if alike:
        chain = parts[0]
    else:
        if model is None:
            raise ValueError(
                f"the optimizer has {len(groups)} parameter groups that differ: give model= (what TrainState.create "
                "takes) and names= (the torch module), so that each parameter's group is known"
            )
        parameters = Parameters(TrainState.create(model, optax.identity()), layouts, inputs)
        labels = _group_of_each(optimizer, parameters, parameters.by_number(optimizer, names, rename))
        chain = optax.partition({str(i): c for i, c in enumerate(parts)}, labels)
    largest = optimizer.defaults.get("max_grad_norm") if kind == "Lamb" else None
    return chain if largest is None else optax.chain(optax.clip_by_global_norm(largest), chain)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr", "step")}


def _group_of_each(optimizer: torch.optim.Optimizer, parameters: Parameters, order: Mapping[int, str]) -> PyTree:
    labels, i = {}, 0
    for g, group in enumerate(optimizer.param_groups):
        for _ in group["params"]:
            labels[order[i]] = np.full(parameters.shapes[order[i]], float(g))
            i += 1
    params = parameters.to_params(labels)
    unset = [name for name in parameters.names if name not in labels]
    if unset:
        raise ValueError(f"in no parameter group of the optimizer: {', '.join(unset)}")
    return jax.tree.map(lambda x: str(int(np.asarray(x).flat[0])), params)
