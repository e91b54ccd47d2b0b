"""Libraries that a command needs: imported when it runs, or one sentence about what to install."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

EXTRAS = {"torch": "torch", "matplotlib": "cli", "rich": "cli", "huggingface_hub": "hub"}
"""The extra of this package that brings a library."""

_WANTED = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def require(name: str) -> ModuleType:
    """The library `name`. Raises ImportError with what to install, or with why it cannot be imported.

    A torchvision that was built for another PyTorch (PyPI's CUDA build beside a CPU build, say) comes without its
    compiled operators, and torchvision/_meta_registrations.py then fails at the import of the whole library (and of
    timm) over two that only detection models call. They are declared here, so that all other models can be built; what
    calls one gets torchvision's own error (`torchvision.extension._assert_has_ops`).
    """
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise ImportError(f"{name} cannot be imported: {error}") from error
            extra = EXTRAS.get(error.name)
            install = f"'jaxnorm[{extra}]'" if extra else error.name
            raise ImportError(f"this needs {error.name}: pip install {install}") from error
        except (ImportError, OSError, RuntimeError) as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or not _declared(missing[1]):
                hint = "" if missing is None else _advice()
                raise ImportError(f"{name} is installed but cannot be imported: {error}{hint}") from error


def _declared(operator: str) -> bool:
    """Whether the operator has been declared just now; one that is there, or is not known, is not."""
    import torch

    if operator not in _WANTED or hasattr(torch.ops.torchvision, operator):
        return False
    torch.library.define(f"torchvision::{operator}", _SCHEMA)
    return True


def _advice() -> str:
    """What to install where torchvision has no operators."""
    found = []
    for package in ("torchvision", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(package)
    return (
        f". {found[0]} was not built for {found[1]}: install both from one place, for a CPU with pip install "
        "--force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    )
