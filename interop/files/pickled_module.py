"""A torch.nn.Module that was pickled whole: its state dict, and the flags of its BatchNorm layers."""

import pathlib
from collections.abc import Iterator
from typing import Any, Final

from interop.files.disk import CheckpointError
from interop.files.rebuild import finish
from interop.files.stand_ins import Instance, name_of

_DEEPEST: Final = 100
_MOST: Final = 200_000  # modules and tensors; shared ones count each time, as in a state dict

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


def collect(module: Instance, path: pathlib.Path) -> dict[str, Any]:
    """The state dict of a pickled module: torch.nn.Module.state_dict on the stand-in, in the same order.

    A pickle names a class and does not hold its code, so that what `get_extra_state` or a hook would add is not known.
    """
    found: dict[str, Any] = {}
    for name, layer in _layers(module, path):
        prefix = f"{name}." if name else ""
        hidden = layer.attributes.get("_non_persistent_buffers_set") or ()
        if not isinstance(hidden, set | frozenset | list | tuple):
            raise CheckpointError(path, f"module {name or 'model'!r}: its non-persistent buffers are no set")
        for field in ("_parameters", "_buffers"):
            for key, item in layer.attributes[field].items():
                if item is not None and not (field == "_buffers" and key in hidden):
                    found[f"{prefix}{key}"] = finish(item)
        if len(found) > _MOST:
            raise CheckpointError(path, f"module {prefix[:80]!r}: tensors without end")
    return found


def batch_norms(module: Instance, path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The flags of every BatchNorm layer by its name: those of `FLAGS` that the pickle gives."""
    return {
        name: {flag: layer.attributes[flag] for flag, kinds in FLAGS.items() if _is(layer.attributes.get(flag), kinds)}
        for name, layer in _layers(module, path)
        # InstanceNorm has all that BatchNorm has.
        if "running_mean" in layer.attributes["_buffers"] and not str(layer.cls).startswith(_INSTANCE_NORM)
    }


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds


def _layers(module: Instance, path: pathlib.Path) -> Iterator[tuple[str, Instance]]:
    """Every module with its name, in the order of `torch.nn.Module.named_modules`, shared ones at each place."""
    todo: list[tuple[str, Instance, int]] = [("", module, 0)]
    seen = 0
    while todo:
        name, current, depth = todo.pop()
        yield name, current
        prefix = f"{name}." if name else ""
        children = [(key, child) for key, child in current.attributes["_modules"].items() if child is not None]
        for key, child in reversed(children):
            if not is_module(child):
                raise CheckpointError(path, f"module '{prefix}{key}' is {name_of(child)}, not a module")
            todo.append((f"{prefix}{key}", child, depth + 1))
        seen += 1
        if depth > _DEEPEST or seen + len(todo) > _MOST:
            raise CheckpointError(path, f"module {name[:80]!r}: modules without end")
