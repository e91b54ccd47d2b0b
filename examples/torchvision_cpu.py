"""Lets torchvision be imported beside a CPU build of PyTorch.

Importing torchvision registers shape functions for two of its C++ operators, nms and qnms. A torchvision wheel whose
C++ library was built for another build of PyTorch (the wheel on PyPI beside a CPU-only PyTorch, say) cannot load that
library, and the import ends with "operator torchvision::nms does not exist". Classifiers use neither operator,
so declaring the two schemas is all that is missing; calling them still gives torchvision's own error. Where the real
operators load, or there is no torchvision, nothing is done.

    import torchvision_cpu  # first; then torchvision, timm or anything else that imports torchvision
"""

import importlib.util
import pathlib

import torch

# As torchvision's C++ library declares them: torchvision/csrc/ops/nms.cpp and torchvision/csrc/ops/quantized.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _real_operators_load(package: pathlib.Path) -> bool:
    """Whether torchvision's C++ library loads into this PyTorch.

    torchvision/extension.py names it `_C`, and since torchvision 0.29 `_C_stable`. A schema must not be declared where
    that library will be loaded: PyTorch ends the process at an operator that is registered twice.
    """
    libraries = [path for path in package.glob("_C*") if path.suffix in (".so", ".pyd", ".dll", ".dylib")]
    for library in libraries:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return bool(libraries)


def _declare_missing() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _real_operators_load(pathlib.Path(spec.origin).parent):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    return library


declared = _declare_missing()
"""The library that holds the declarations, for as long as this module lives; None where nothing had to be declared."""
