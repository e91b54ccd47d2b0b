"""Hooks that only observe (a logger, a collector of activations) are left out where they cannot be recorded.

`torch.export` runs a module's hooks on stand-ins without values. A hook that prints a mean or keeps an array fails
there, though it has no part in what the module computes. Which hooks have none is seen from one call outside.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from interop.tracing import private

if TYPE_CHECKING:
    import torch

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
    record: Callable[[], Result], module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Result:
    """What `record` gives; where it fails, once more without the hooks that only observe."""
    try:
        return record()
    except ValueError:
        hooks = observers(module, args, kwargs)
        if not hooks:
            raise
    with left_out(hooks):
        result = record()
    places = sorted({hook.path or "the model itself" for hook in hooks})
    logger.warning("left out at import: %d hooks that only observe (%s)", len(hooks), ", ".join(places))
    return result


def observers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Hook]:
    """The hooks that return nothing, write to no tensor and set nothing on their layer, in one call of the module.

    None where the module has no hooks, or cannot be called. Its buffers are put back.
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
    originals = [hook.table[hook.key] for hook in hooks]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        for index, hook in enumerate(hooks):
            hook.table[hook.key] = _watched(originals[index], functools.partial(verdicts.__setitem__, index))
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception:
        return []
    finally:
        for hook, original in zip(hooks, originals, strict=True):
            hook.table[hook.key] = original
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
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


@contextlib.contextmanager
def left_out(hooks: list[Hook]) -> Iterator[None]:
    """For the time of a trace."""
    tables = {id(hook.table): hook.table for hook in hooks}
    kept = {number: table.copy() for number, table in tables.items()}
    try:
        for hook in hooks:
            del hook.table[hook.key]
        yield
    finally:
        for number, table in tables.items():
            table.clear()
            table.update(kept[number])
