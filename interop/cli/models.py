"""PyTorch models by name: `timm:resnet18`, `torchvision:resnet18`, `ultralytics:yolov8n`, `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import pathlib
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.arrays import to_torch
from interop.cli.libraries import require
from interop.files.checkpoint import Checkpoint, load_checkpoint

if TYPE_CHECKING:
    import torch

LIBRARIES = ("timm", "torchvision", "ultralytics")
_TASKS = {"-seg": "SegmentationModel", "-pose": "PoseModel", "-cls": "ClassificationModel", "-obb": "OBBModel"}


def build(name: str, options: Mapping[str, Any]) -> torch.nn.Module:
    """The module of that name, with its initial weights; nothing is downloaded.

    Args:
        name: `library:model`, `package.module:callable` (or a module object there), or a model's name alone where just
            one of the libraries has it.
        options: keyword arguments for its constructor.

    Raises:
        ImportError: for a library that is not installed or cannot be imported.
        ValueError: for an unknown or ambiguous name.
    """
    torch = require("torch")
    library, colon, model = name.partition(":")
    if not colon:
        library, model = _library_of(name), name
    try:
        if library == "timm":
            module = _known(require("timm"), model, library).create_model(model, **options)
        elif library == "torchvision":
            module = _torchvision(model, options)
        elif library == "ultralytics":
            module = _ultralytics(model, options)
        else:
            module = _imported(library, model, options)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"{name} gives {type(module).__name__}, not a torch.nn.Module")
    return module


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """`num_classes=10` and the like: values are JSON, or text where they are none."""
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--option {text}: expected name=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def input_shapes(module: torch.nn.Module, given: Sequence[str]) -> list[tuple[int, ...]]:
    """The shapes of the model's inputs: as given (`2,3,224,224` or `2x3x224x224`), or two images of the usual size.

    The usual size is what timm says of the model, 640 pixels for Ultralytics, 16 frames of 112 for torchvision's video
    models, 299 for its Inception, and 224 else.
    """
    if given:
        try:
            shapes = [tuple(map(int, text.lower().replace("x", ",").split(","))) for text in given]
        except ValueError:
            raise ValueError(f"--input {' '.join(given)}: expected sizes such as 2,3,224,224") from None
        if any(size < 1 for shape in shapes for size in shape):
            raise ValueError(f"--input {' '.join(given)}: sizes are positive")
        return shapes
    for config in (getattr(module, "pretrained_cfg", None), getattr(module, "default_cfg", None)):
        if isinstance(config, Mapping) and config.get("input_size"):
            return [(2, *config["input_size"])]
    origin = type(module).__module__
    if origin.startswith("ultralytics."):
        return [(2, 3, 224, 224) if type(module).__name__ == "ClassificationModel" else (2, 3, 640, 640)]
    if origin.startswith("torchvision.models.video."):
        return [
            (2, 3, 16, 224, 224) if "mvit" in origin or "swin" in origin or "s3d" in origin else (2, 3, 16, 112, 112)
        ]
    return [(2, 3, 299, 299) if origin.startswith("torchvision.models.inception") else (2, 3, 224, 224)]


def dimensions(text: str) -> tuple[int, ...]:
    """`0,2,3`: the dimensions that may vary."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"--dynamic {text}: expected dimensions such as 0 or 0,2,3") from None


def checkpoint_of(weights: str | None, which: str | None) -> Checkpoint | None:
    """The checkpoint that `--weights` and `--which` name."""
    if weights is None and which is not None:
        raise ValueError(f"--which {which} chooses among the state dicts of a checkpoint: give --weights FILE too")
    return None if weights is None else load_checkpoint(weights, which)


def load(module: torch.nn.Module, state: Mapping[str, np.ndarray], origin: str) -> None:
    """Gives a module the arrays of a checkpoint or of a saved model, strictly.

    Raises:
        ValueError: with all missing, unexpected and misshapen keys.
    """
    tensors: Any = OrderedDict((name, to_torch(array)) for name, array in state.items())
    versions = dict(state.versions) if isinstance(state, Checkpoint) else {}
    if not versions:  # those of now, but that layers without a counter are older than it
        own = module.state_dict()._metadata
        versions = {path: entry["version"] for path, entry in own.items() if "version" in entry}
        for path in versions:
            if f"{path}.running_mean" in tensors and f"{path}.num_batches_tracked" not in tensors:
                versions[path] = 1
    tensors._metadata = OrderedDict((path, {"version": version}) for path, version in versions.items())
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{origin}: {error}") from error


def _library_of(name: str) -> str:
    """The one library that has a model of this name."""
    having = []
    problems = []
    for library in LIBRARIES:
        try:
            if _has(library, name):
                having.append(library)
        except ImportError as error:
            problems.append(str(error))
    if len(having) > 1:
        raise ValueError(f"several libraries have {name!r}: say {' or '.join(f'{one}:{name}' for one in having)}")
    if not having:
        raise ValueError(
            f"no model {name!r} was found: say library:model ({', '.join(LIBRARIES)}) or package.module:callable"
            + "".join(f"; {problem}" for problem in problems)
        )
    return having[0]


def _has(library: str, name: str) -> bool:
    if library == "ultralytics":
        return _is_ultralytics(name)
    models = require("timm") if library == "timm" else require("torchvision.models")
    return name in models.list_models()


def _is_ultralytics(name: str) -> bool:
    """Whether Ultralytics describes such a model: `yolov8n-seg` is a scale of `yolov8-seg.yaml`."""
    found = importlib.util.find_spec("ultralytics")
    if found is None or found.origin is None:
        return False
    known = {path.stem for path in (pathlib.Path(found.origin).parent / "cfg" / "models").rglob("*.yaml")}
    return bool({name, re.sub(r"(\d)[a-z]((-.+)?)$", r"\1\2", name)} & known)


def _known(library: ModuleType, name: str, title: str) -> ModuleType:
    """The library, if it has the model; else ValueError with the names that are close."""
    names = library.list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names, 4)
        raise ValueError(f"{title} has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))
    return library


def _torchvision(name: str, options: Mapping[str, Any]) -> torch.nn.Module:
    models = _known(require("torchvision.models"), name, "torchvision")
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    defaults: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        defaults["weights_backbone"] = None
    return models.get_model(name, **{**defaults, **options})


def _ultralytics(name: str, options: Mapping[str, Any]) -> torch.nn.Module:
    tasks = require("ultralytics.nn.tasks")
    if not _is_ultralytics(name):
        raise ValueError(f"ultralytics has no model {name!r}")
    task = next((cls for ending, cls in _TASKS.items() if name.endswith(ending)), "DetectionModel")
    return getattr(tasks, task)(f"{name}.yaml", **{"verbose": False, **options})


def _imported(package: str, name: str, options: Mapping[str, Any]) -> Any:
    """What `package.module:callable` gives."""
    found = found_in(package, name)
    is_module = hasattr(found, "state_dict") and not isinstance(found, type)
    return found if is_module and not options else found(**options)


def found_in(package: str, name: str) -> Any:
    """What a module of Python's has under a name; the current directory counts, as for `python -m`.

    Raises:
        ImportError, ValueError: where there is no such module, or no such name.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f"{package}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{package} has no {name!r}")
        found = getattr(found, part)
    return found
