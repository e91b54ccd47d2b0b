"""freeze and unfreeze: which parameters train, by their paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from interop.conventions import TORCH_NAMES
from interop.variables import Frozen
from interop.weights.names import nodes
from jaxnorm import _checks as check


def freeze(model: nnx.Module, *patterns: str) -> None:
    """Parameters that do not train any more: `requires_grad_(False)` of PyTorch, by paths.

    ```python
    interop.freeze(model, "conv1", "bn1", r"layer[12]")     # all below these layers
    interop.freeze(model)                                   # all
    ```

    Each becomes an `interop.Frozen` in the place of its `nnx.Param`: no gradient, no optimizer, in the state dict as
    before. Make optimizers and `TrainState`s after it. As in PyTorch, running statistics go on: a BatchNorm layer whose
    statistics stay as well has `use_running_average=True`.

    **Arguments:**

    - `model`: any NNX model, changed in place.
    - `*patterns`: regular expressions that match the whole path of a parameter, or of a layer above it, by PyTorch's
      names (`layer1.0.bn1.weight`); none for all.

    **Raises:** `TypeError` for what is no NNX model, and patterns that are no text; `ValueError` for what is no regular
    expression, and for patterns that match no parameter, all at once.
    """
    _turn(model, patterns, nnx.Param, Frozen)


def unfreeze(model: nnx.Module, *patterns: str) -> None:
    """Parameters that train again: the inverse of `freeze`.

    Each `interop.Frozen` that matches becomes an `nnx.Param`.

    **Arguments:**

    - `model`: any NNX model, changed in place.
    - `*patterns`: as for `freeze`; none for all.

    **Raises:** `TypeError`, `ValueError` as `freeze`.
    """
    _turn(model, patterns, Frozen, nnx.Param)


def _turn(
    model: nnx.Module, patterns: tuple[str, ...], old: type[nnx.Variable[Any]], new: type[nnx.Variable[Any]]
) -> None:
    check.instance("model", model, nnx.Module, "an NNX model")
    found = list(_parameters(model))
    compiled = {pattern: check.pattern("patterns", pattern) for pattern in patterns}
    matched = {
        pattern: {id(variable) for path, _, _, variable in found if any(map(rule.fullmatch, _above(path)))}
        for pattern, rule in compiled.items()
    }
    if unknown := [pattern for pattern, ids in matched.items() if not ids]:
        raise ValueError(
            f"no parameter's path, or that of a layer above one, matches {', '.join(map(repr, unknown))}; the model "
            f"has {', '.join(path for path, *_ in found[:4])}, ..."
        )
    chosen = set().union(*matched.values()) if patterns else {id(variable) for *_, variable in found}
    turned: dict[int, nnx.Variable[Any]] = {}
    for _, holder, name, variable in found:
        if id(variable) in chosen and type(variable) is old:
            made = turned.setdefault(id(variable), new(variable.get_value(), **variable.get_metadata()))
            setattr(holder, name, made)


def _parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, str, nnx.Variable[Any]]]:
    """(path with PyTorch's name, holder, attribute, variable) of each parameter, at each of its places."""
    for path, node in nodes(model):
        for name, variable in vars(node).items():
            if isinstance(variable, (nnx.Param, Frozen)):
                shown = TORCH_NAMES.get(name, name) if isinstance(node, nnx.BatchNorm) else name
                yield ".".join((*path, shown)), node, name, variable


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]
