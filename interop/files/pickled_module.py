"""A torch.nn.Module that was pickled whole: its state dict, and the flags of its BatchNorm layers."""

import pathlib
from collections.abc import Iterator
from typing import Any, Final

from interop.files.budget import Budget
from interop.files.disk import CheckpointError
from interop.files.rebuild import finish
from interop.files.stand_ins import Instance, name_of

_DEEPEST: Final = 100
_INSTANCE_NORM: Final = "torch.nn.modules.instancenorm."

FLAGS: Final[dict[str, tuple[type, ...]]] = {
    "num_features": (int,),
    "eps": (float, int),
    "momentum": (float, int, type(None)),
    "affine": (bool,),
    "track_running_stats": (bool,),
    "training": (bool,),
}
"""What PyTorch's BatchNorm layers know besides their arrays, and the types that it has."""


def is_module(value: Any) -> bool:
    """Whether this stands for a torch.nn.Module."""
    return isinstance(value, Instance) and all(
        isinstance(value.attributes.get(field), dict) for field in ("_parameters", "_buffers", "_modules")
    )


def collect(module: Instance, path: pathlib.Path, budget: Budget) -> dict[str, Any]:
    """The state dict of a pickled module: torch.nn.Module.state_dict on the stand-in, in the same order.

    A pickle names a class and does not hold its code, so that what `get_extra_state` or a hook would add is not known.
    """
    found: dict[str, Any] = {}
    for name, layer in _layers(module, path, budget):
        prefix = f"{name}." if name else ""
        hidden = layer.attributes.get("_non_persistent_buffers_set") or ()
        if not isinstance(hidden, set | frozenset | list | tuple):
            raise CheckpointError(path, f"module {name_of(name) if name else 'model'}: its hidden buffers are no set")
        if not isinstance(hidden, set | frozenset):  # its elements, where the pickle made it of its class
            budget.spend(steps=len(hidden))
            hidden = {key for key in hidden if isinstance(key, str)}
        for field in ("_parameters", "_buffers"):
            for key, item in layer.attributes[field].items():
                if item is not None and not (field == "_buffers" and key in hidden):
                    budget.spend(memory=200 + len(prefix) + len(_text(key, path)), steps=5)
                    found[f"{prefix}{key}"] = finish(item)
    return found


def _text(key: Any, path: pathlib.Path) -> str:
    if isinstance(key, str):
        return key
    raise CheckpointError(path, f"a module or tensor of the pickled model is called {name_of(key)}, which is no name")


def batch_norms(module: Instance, path: pathlib.Path, budget: Budget) -> dict[str, dict[str, Any]]:
    """The flags of every BatchNorm layer by its name: those of `FLAGS` that the pickle gives."""
    return {
        name: {flag: layer.attributes[flag] for flag, kinds in FLAGS.items() if _is(layer.attributes.get(flag), kinds)}
        for name, layer in _layers(module, path, budget)
        # InstanceNorm has all that BatchNorm has.
        if "running_mean" in layer.attributes["_buffers"] and not str(layer.cls).startswith(_INSTANCE_NORM)
    }


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds


def _layers(module: Instance, path: pathlib.Path, budget: Budget) -> Iterator[tuple[str, Instance]]:
    """Every module with its name, in the order of `torch.nn.Module.named_modules`, shared ones at each place."""
    todo: list[tuple[str, Instance, int]] = [("", module, 0)]
    while todo:
        name, current, depth = todo.pop()
        if depth > _DEEPEST:
            raise CheckpointError(path, f"module {name_of(name)}: modules without end")
        yield name, current
        prefix = f"{name}." if name else ""
        children = [(key, child) for key, child in current.attributes["_modules"].items() if child is not None]
        for key, child in reversed(children):
            if not is_module(child):
                raise CheckpointError(
                    path, f"module {name_of(prefix + _text(key, path))} is no module but {name_of(child)}"
                )
            budget.spend(memory=200 + len(prefix) + len(_text(key, path)), steps=10)
            todo.append((f"{prefix}{key}", child, depth + 1))
