"""One JAX function for each operation name, a file for each family. Importing the package registers them all."""

from interop.ops import (
    activations,
    attention,
    comparison,
    convolution,
    elementwise,
    factories,
    indexing,
    linear,
    normalization,
    pooling,
    random,
    recurrent,
    reductions,
    resize,
    shapes,
    sizes,
)
from interop.ops.registry import Operation, lookup, names, register

__all__ = [
    "Operation",
    "activations",
    "attention",
    "comparison",
    "convolution",
    "elementwise",
    "factories",
    "indexing",
    "linear",
    "lookup",
    "names",
    "normalization",
    "pooling",
    "random",
    "recurrent",
    "reductions",
    "register",
    "resize",
    "shapes",
    "sizes",
]
