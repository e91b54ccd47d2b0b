"""Hooks that only observe (a logger, a collector of activations) are left out where they cannot be recorded.

`torch.export` runs a module's hooks on stand-ins without values. A hook that prints a mean or keeps an array fails
there, though it has no part in what the module computes. Which hooks have none is seen from one call outside.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from interop.tracing import private

if TYPE_CHECKING:
    import torch

    from interop.tracing.modes import Modes

logger = logging.getLogger("interop")
Result = TypeVar("Result")


class Hook(NamedTuple):
    """A hook, where it is kept."""

    path: str
    table: dict[int, Callable[..., Any]]
    key: int


def report_gradient_hooks(module: torch.nn.Module) -> None:
    """Warns of hooks on gradients, which no graph of a forward has: they may observe, or change what is learnt."""
    places = [path or "the model itself" for path, layer in module.named_modules() if private.has_gradient_hooks(layer)]
    places += [name for name, parameter in module.named_parameters() if private.has_tensor_hooks(parameter)]
    if places:
        logger.warning(
            "hooks on gradients are no part of the imported model (%s): where they change gradients, do so to those of "
            "jax.grad",
            ", ".join(places),
        )


def beyond_observers(
    record: Callable[[], Result],
    modes: Modes,
    mode: str,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Result:
    """What `record` gives in this mode; where it fails, once more without the hooks that only observe."""
    modes.enter(mode)
    try:
        return record()
    except ValueError:
        modes.enter(mode)
        hooks = observers(module, args, kwargs)
        if not hooks:
            raise
    modes.left_out = hooks
    modes.enter(mode)
    result = record()
    modes.left_out = []
    places = sorted({hook.path or "the model itself" for hook in hooks})
    logger.warning("left out at import: %d hooks that only observe (%s)", len(hooks), ", ".join(places))
    return result


def observers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Hook]:
    """The hooks that return nothing, write to no tensor and set nothing on their layer, in one call of the module.

    None where the module has no hooks, or cannot be called. What the call changes is for the caller to put back.
    """
    import torch

    hooks = [
        Hook(path, table, key)
        for path, layer in module.named_modules()
        for table in private.forward_hooks(layer)
        for key in table
    ]
    if not hooks:
        return []
    verdicts = dict.fromkeys(range(len(hooks)), True)
    for index, hook in enumerate(hooks):
        hook.table[hook.key] = _watched(hook.table[hook.key], functools.partial(verdicts.__setitem__, index))
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception:
        return []
    return [hook for index, hook in enumerate(hooks) if verdicts[index]]


def _watched(hook: Callable[..., Any], verdict: Callable[[bool], None]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def called(layer: torch.nn.Module, *args: Any) -> Any:
        before = _fingerprint(layer, args)
        result = hook(layer, *args)
        if result is not None or _fingerprint(layer, args) != before:
            verdict(False)
        return result

    return called


def _fingerprint(layer: torch.nn.Module, args: Any) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Which tensors the hook sees, in which version, and what its layer holds."""
    import torch

    seen = [leaf for leaf in private.flatten(args)[0] if isinstance(leaf, torch.Tensor)]
    held = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    tables = private.forward_hooks(layer)
    attributes = {name: id(value) for name, value in vars(layer).items() if not any(value is table for table in tables)}
    return [(id(tensor), private.version(tensor)) for tensor in (*seen, *held)], attributes
