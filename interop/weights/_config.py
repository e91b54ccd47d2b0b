"""What goes along with a model's arrays and is none: eps, momentum, affine, track_running_stats, modes.

A config is a plain dict that JSON can hold, from a layer's name in PyTorch to its settings in PyTorch's words:

    {"bn1": {"kind": "BatchNorm", "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true}, ...}

`num_batches_tracked` is an array and goes with the state dict.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from flax import linen, nnx

from interop.conventions import Momentum, flax_momentum
from interop.errors import shown
from interop.files.checkpoint import Checkpoint
from interop.program.recorded import model_of
from interop.weights._state_dict import opened
from interop.weights.kinds import Settings, settings_of
from interop.weights.linen_observe import Inputs
from interop.weights.linen_tree import settings as linen_settings
from interop.weights.names import nodes
from interop.weights.nnx_tree import Path, parts
from interop.weights.rename import Rename, Renaming
from jaxnorm import TrainState

if TYPE_CHECKING:
    import torch

Target = TypeVar("Target")
Module = TypeVar("Module", bound="torch.nn.Module")
Config = dict[str, Settings]

_FIXED = ("kind", "affine", "num_groups")  # what a layer was built with
_NUMBER = (float, int)
_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "eps": _NUMBER,
    "momentum": (*_NUMBER, type(None)),
    "flax_momentum": _NUMBER,
    "p": _NUMBER,
    "num_groups": (int, type(None)),
    "affine": (bool,),
    "track_running_stats": (bool,),
    "training": (bool,),
}
_LIMITS = {"eps": sys.float_info.max, "momentum": 1, "flax_momentum": 1, "p": 1}  # and none is below 0


def config(source: Any, rename: Rename | None = None, *, inputs: Inputs = None) -> Config:
    """The settings of a model's layers, by their names in PyTorch: BatchNorm, the other norms, Dropout.

    ```python
    interop.save_checkpoint("model.safetensors", model, {"config": interop.config(model)})
    config = interop.config(interop.load_checkpoint("model.safetensors"))
    ```

    A layer's "training" is there where the layer knows it. In Linen, and in NNX where `use_running_average` is None,
    the call does. An imported model and a PyTorch module have an entry "" with the mode of the whole.

    **Arguments:**

    - `source`: a `torch.nn.Module`; an NNX model; Linen's `(module, variables)`; a `jaxnorm.TrainState`; a config; or a
      `Checkpoint`, for the config in its metadata or the flags of the BatchNorm layers of a pickled module.
    - `rename`, `inputs`: as for `interop.state_dict`; of Flax models.

    **Returns:** a dict that JSON can hold, from each layer's name to its settings in PyTorch's words and conventions:
    `{"bn1": {"kind": "BatchNorm", "eps": 1e-05, "momentum": 0.1, "affine": True, ...}}`.

    **Raises:**

    - `TypeError`: for other sources, and for Linen's variables without the module.
    - `ValueError`: if the source has no config, or one that is not valid.
    """
    if _is_torch(source):
        return _of_torch(source)
    if isinstance(source, Checkpoint):
        return _of_checkpoint(source)
    if isinstance(source, Mapping) and all(isinstance(entry, Mapping) and "kind" in entry for entry in source.values()):
        return _checked(source)
    source = source.model() if isinstance(source, TrainState) else source
    layers = _layers(source, inputs)
    names = _torch_names(source, layers, rename, inputs)
    return {names[path]: settings for path, (_, settings) in layers.items()}


def load_config(target: Target, source: Any, rename: Rename | None = None, *, inputs: Inputs = None) -> Target:
    """Gives a Flax model the settings of a config: epsilon, momentum, modes, dropout's rate.

    An NNX model's layers are changed in place, momentum by Flax's convention. The settings of Linen's layers are in the
    module's code: there a difference is an error that says what to write. Layers that the config does not name stay as
    they are.

    **Arguments:**

    - `target`: an NNX model, or Linen's `(module, variables)`.
    - `source`: a config, or whatever else `interop.config` takes.
    - `rename`, `inputs`: as for `interop.state_dict`.

    **Returns:** the target.

    **Raises:**

    - `TypeError`: for other targets (a `jaxnorm.TrainState`, whose settings are part of its compiled steps) and
      sources.
    - `ValueError`: with all layers that the model lacks or has of another kind, and all settings that it cannot take.
      Nothing is changed then.
    """
    given = _checked(config(source))
    if isinstance(target, TrainState):
        raise TypeError(
            "a TrainState's settings are part of its compiled steps: set those of the model it is made from"
        )
    layers = _layers(target, inputs)
    names = _torch_names(target, layers, rename, inputs)
    by_name = {names[path]: layer for path, layer in layers.items()}
    by_name.setdefault("", (target, {"kind": "Module"}))
    problems = _unfit(given, {name: settings for name, (_, settings) in by_name.items()})
    fitting = {name: settings for name, settings in given.items() if name in by_name}
    in_code = not isinstance(target, nnx.Module)
    for name, settings in fitting.items():
        layer, has = by_name[name]
        for problem in _other_in_code(settings, has) if in_code else _refused(layer, settings):
            problems.append(f"  {name!r}: {problem}")
    if problems:
        raise ValueError("\n".join(["the config does not fit the model:", *problems]))
    for name, settings in sorted(fitting.items()) if not in_code else ():  # the whole model's mode first
        _set(by_name[name][0], settings)
    return target


def apply_config(module: Module, config: Mapping[str, Any]) -> Module:
    """Puts the settings of a config on a PyTorch module's layers.

    ```python
    module.load_state_dict(interop.to_torch(interop.state_dict(model)))
    interop.apply_config(module, interop.config(model))
    ```

    Layers that the config does not name stay as they are.

    **Arguments:**

    - `module`: the `torch.nn.Module`, changed in place.
    - `config`: what `interop.config` gave.

    **Returns:** the module.

    **Raises:**

    - `ValueError`: with all layers that the module lacks or has of another kind, and all settings that a layer was
      built with otherwise (affine, num_groups). Nothing is changed then.
    - `TypeError`: for what is no torch module, or no config.
    """
    if not _is_torch(module):
        raise TypeError(f"expected a torch.nn.Module, found {type(module).__module__}.{type(module).__qualname__}")
    given = _checked(config)
    layers = dict(module.named_modules(remove_duplicate=False))
    has = {name: _torch_settings(layer) for name, layer in layers.items()}
    has[""] = has[""] or {"kind": "Module"}
    problems = _unfit(
        given, {name: settings or {"kind": type(layers[name]).__name__} for name, settings in has.items()}
    )
    for name, settings in given.items():
        if settings.get("track_running_stats") and getattr(layers.get(name), "running_mean", 0) is None:
            problems.append(f"  {name!r} has no running statistics: build it with track_running_stats=True")
    if problems:
        raise ValueError("\n".join(["the config does not fit the module:", *problems]))
    for name, settings in sorted(given.items()):  # the whole module's mode first
        layer = layers[name]
        if "training" in settings:
            layer.train(settings["training"])
        for key in ("eps", "momentum", "track_running_stats", "p"):
            # RMSNorm's eps=None stands for a number that depends on the dtype; equal ones stay as they are.
            if key in settings and settings[key] != (has[name] or {}).get(key, ...):
                setattr(layer, key, settings[key])
    return module


# Reading.


def _layers(model: Any, inputs: Inputs) -> dict[Path, tuple[Any, Settings]]:
    """The layers that have settings, by their paths, and NNX's layers themselves."""
    if isinstance(model, nnx.Module):
        found = {path: (node, settings_of(node)) for path, node in nodes(model)}
        if found[()][1] is None and model_of(model) is not None:
            found[()] = (model, {"kind": "Module", "training": not getattr(model, "deterministic", True)})
        return {path: (node, settings) for path, (node, settings) in found.items() if settings is not None}
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module):
        return {path: (None, settings) for path, settings in linen_settings(*model, inputs).items()}
    raise TypeError(
        "expected an NNX module, Linen's (module, variables), a jaxnorm.TrainState, a torch.nn.Module, a Checkpoint or "
        f"a config; found {type(model).__module__}.{type(model).__qualname__}"
    )


def _torch_names(model: Any, layers: Iterable[Path], rename: Rename | None, inputs: Inputs) -> dict[Path, str]:
    """The layers' names in PyTorch: those of their entries in the state dict, without the last part."""
    own: dict[str, str] = {}
    if rename is not None:
        entries = [entry for part in parts(opened(model, inputs=inputs)) for entry in part.entries]
        for entry, new in Renaming(rename).to_torch(entries).items():
            own.setdefault(entry.rpartition(".")[0], new.rpartition(".")[0])
    renaming = Renaming(rename)
    names = {}
    for path in layers:
        name = ".".join(path)
        if name and name not in own:  # a layer without arrays
            probe = f"{name}.weight"
            own[name] = renaming.to_torch([probe])[probe].rpartition(".")[0]
        names[path] = own.get(name, name)
    return names


def _is_torch(source: object) -> bool:
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "torch.nn.modules.module.Module" for kind in type(source).__mro__
    )


def _of_torch(module: torch.nn.Module) -> Config:
    found = {name: _torch_settings(layer) for name, layer in module.named_modules(remove_duplicate=False)}
    found[""] = found[""] or {"kind": "Module", "training": module.training}
    return {name: settings for name, settings in found.items() if settings is not None}


def _torch_settings(layer: torch.nn.Module) -> Settings | None:
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd
    from torch.nn.modules.instancenorm import _InstanceNorm

    if isinstance(layer, (_BatchNorm, _InstanceNorm)):
        settings: Settings = {"kind": "BatchNorm" if isinstance(layer, _BatchNorm) else "InstanceNorm"}
        settings |= {"eps": float(layer.eps), "affine": layer.affine}
        if isinstance(layer, _BatchNorm) or layer.track_running_stats:
            momentum = None if layer.momentum is None else float(layer.momentum)
            settings |= {"momentum": momentum, "track_running_stats": layer.track_running_stats}
            settings["training"] = layer.training
        return settings
    if isinstance(layer, torch.nn.GroupNorm):
        return {"kind": "GroupNorm", "eps": float(layer.eps), "affine": layer.affine, "num_groups": layer.num_groups}
    if isinstance(layer, torch.nn.LayerNorm):
        return {"kind": "LayerNorm", "eps": float(layer.eps), "affine": layer.elementwise_affine}
    if isinstance(layer, torch.nn.RMSNorm):
        dtype = torch.get_default_dtype() if layer.weight is None else layer.weight.dtype
        eps = torch.finfo(dtype).eps if layer.eps is None else layer.eps
        return {"kind": "RMSNorm", "eps": float(eps), "affine": layer.elementwise_affine}
    if isinstance(layer, _DropoutNd):
        return {"kind": "Dropout", "p": float(layer.p), "training": layer.training}
    return None


def _of_checkpoint(checkpoint: Checkpoint) -> Config:
    written = checkpoint.metadata.get("config")
    if isinstance(written, str):
        try:
            written = json.loads(written)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: the metadata's config is no JSON: {error}") from None
    if isinstance(written, Mapping):
        return _checked(written)
    if checkpoint.batch_norms:
        return _checked(
            {
                name: {"kind": "BatchNorm", **{key: value for key, value in flags.items() if key in _TYPES}}
                for name, flags in checkpoint.batch_norms.items()
            }
        )
    raise ValueError(
        f"{checkpoint.path} says nothing of its layers' settings. They are in checkpoints of whole modules, and in "
        'those written with save_checkpoint(path, model, {"config": interop.config(model)})'
    )


def _checked(given: Mapping[Any, Any]) -> Config:
    if not isinstance(given, Mapping):
        raise TypeError(f"a config is a mapping from layers' names to settings, found {type(given).__name__}")
    problems = []
    for name, settings in given.items():
        if not isinstance(name, str) or not isinstance(settings, Mapping) or "kind" not in settings:
            problems.append(f"  {shown(name)}: not a name with settings, one of which is the kind")
            continue
        for key, value in settings.items():
            # bool is a kind of int in Python.
            if key not in _TYPES or type(value) not in _TYPES[key]:
                problems.append(f"  {name!r}: {shown(key)} = {shown(value)}")
            elif key in _LIMITS and value is not None and not 0 <= value <= _LIMITS[key]:
                problems.append(f"  {name!r}: {key} = {shown(value)} is not between 0 and {_LIMITS[key]}")
    if problems:
        raise ValueError("\n".join(["not a config of interop.config:", *problems]))
    return {name: dict(settings) for name, settings in given.items()}


# Comparing and setting.


def _unfit(given: Config, has: Mapping[str, Settings]) -> list[str]:
    """Layers that are not there or of another kind, and what they were built with otherwise."""
    problems = []
    for name, settings in given.items():
        if name not in has:
            problems.append(f"  {name!r}: no layer of this name with settings; in the config it is {settings['kind']}")
            continue
        for key in _FIXED:
            if None not in (settings.get(key), has[name].get(key)) and settings[key] != has[name][key]:
                problems.append(
                    f"  {name!r}: {key} is {settings[key]!r} in the config, {has[name].get(key)!r} in the model"
                )
                if key == "kind":
                    break
    return problems


def _other_in_code(settings: Settings, has: Settings) -> list[str]:
    """What a Linen layer would have to be built with. The mode is the call's."""
    return [
        f"{key} is {value!r} in the config, {has.get(key)!r} by the module's code"
        for key, value in settings.items()
        if key not in _FIXED and key != "training" and value != has.get(key)
    ]


def _refused(layer: Any, settings: Settings) -> list[str]:
    """What an NNX layer cannot be set to."""
    problems = []
    if settings["kind"] == "BatchNorm":
        momentum, tracks = settings.get("momentum", 0.1), settings.get("track_running_stats", True)
        if momentum is None and getattr(layer, "num_batches_tracked", None) is None:
            problems.append("momentum None averages by a counter: build the layer as jaxnorm's with count_batches=True")
        if tracks and layer.mean is None:
            problems.append("it has no running statistics: build it with track_running_stats=True")
        if not tracks and not hasattr(layer, "track_running_stats"):
            problems.append("Flax's own BatchNorm always tracks running statistics; jaxnorm's need not")
    elif settings["kind"] == "InstanceNorm" and settings.get("track_running_stats"):
        problems.append("Flax's InstanceNorm has no running statistics")
    return problems


def _set(layer: Any, settings: Settings) -> None:
    if settings["kind"] == "Module":
        layer.train() if settings["training"] else layer.eval()
    if "eps" in settings:
        layer.epsilon = settings["eps"]
    if "momentum" in settings:
        plain = settings["momentum"]
        exact = settings.get("flax_momentum")
        layer.momentum = flax_momentum(plain) if exact is None or plain is None else Momentum(exact, plain)
    if "track_running_stats" in settings and hasattr(layer, "track_running_stats"):
        layer.track_running_stats = settings["track_running_stats"]
    if "p" in settings:
        layer.rate = settings["p"]
    if "training" in settings and settings["kind"] == "BatchNorm":
        layer.use_running_average = not settings["training"]
    if "training" in settings and settings["kind"] == "Dropout":
        layer.deterministic = not settings["training"]
