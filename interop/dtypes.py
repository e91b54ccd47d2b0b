"""The names that file formats have for dtypes, and NumPy's dtype for each."""

from typing import Final

import ml_dtypes
import numpy as np

# torch name: (safetensors tag or None, legacy storage class or None). torch names are NumPy's and ml_dtypes' but for
# none of those below. torch.storage._dtype_to_storage_type_map; newer dtypes travel as UntypedStorage.
_NAMES: Final[dict[str, tuple[str | None, str | None]]] = {
    "float64": ("F64", "DoubleStorage"),
    "float32": ("F32", "FloatStorage"),
    "float16": ("F16", "HalfStorage"),
    "bfloat16": ("BF16", "BFloat16Storage"),
    "int64": ("I64", "LongStorage"),
    "int32": ("I32", "IntStorage"),
    "int16": ("I16", "ShortStorage"),
    "int8": ("I8", "CharStorage"),
    "uint8": ("U8", "ByteStorage"),
    "uint16": ("U16", None),
    "uint32": ("U32", None),
    "uint64": ("U64", None),
    "bool": ("BOOL", "BoolStorage"),
    "complex64": ("C64", "ComplexFloatStorage"),
    "complex128": (None, "ComplexDoubleStorage"),
    "float8_e4m3fn": ("F8_E4M3", None),
    "float8_e5m2": ("F8_E5M2", None),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", None),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", None),
    "float8_e8m0fnu": ("F8_E8M0", None),
}


def _dtype(name: str) -> "np.dtype[np.generic]":
    return np.dtype(getattr(ml_dtypes, name, name))


TORCH: Final = {name: _dtype(name) for name in _NAMES}
"""torch.<name> -> dtype. The keys are also the dtypes' own names."""

TORCH_ALIASES: Final = {
    **TORCH,
    **{"double": TORCH["float64"], "float": TORCH["float32"], "half": TORCH["float16"], "long": TORCH["int64"]},
    **{"int": TORCH["int32"], "short": TORCH["int16"], "cdouble": TORCH["complex128"], "cfloat": TORCH["complex64"]},
}
"""torch.<name or alias> -> dtype."""

SAFETENSORS: Final = {tag: TORCH[name] for name, (tag, _) in _NAMES.items() if tag}
"""safetensors tag -> dtype."""

STORAGES: Final = {
    **{storage: TORCH[name] for name, (_, storage) in _NAMES.items() if storage},
    "UntypedStorage": TORCH["uint8"],  # its size is counted in bytes
}
"""torch.<storage class> -> dtype of its elements."""

STORAGE_OF: Final = {name: storage for name, (_, storage) in _NAMES.items() if storage}
"""dtype name -> torch's storage class, for the dtypes that have one."""

SAFETENSORS_TAGS: Final = {name: tag for name, (tag, _) in _NAMES.items() if tag}
"""dtype name -> safetensors tag, for the dtypes that such a file can hold."""


def native(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
