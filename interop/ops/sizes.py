"""Arithmetic on sizes: Python numbers at the time the program is traced by JAX."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TypeVar

from interop.ops.dtypes import Number
from interop.ops.layout import Tensor
from interop.ops.registry import register
from interop.program.guards import Size

Item = TypeVar("Item")

for _name in (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge",
    "and_", "or_", "not_", "xor", "lshift", "rshift", "index",
):  # fmt: skip
    register(f"operator.{_name}", layout="aware")(getattr(operator, _name))

for _name in ("floor", "ceil", "sqrt", "trunc", "log2", "log", "exp"):
    register(f"math.{_name}", f"torch._sym_{_name}", layout="aware")(getattr(math, _name))

_PYTHON: dict[str, Callable[..., Number]] = {
    "max": max,
    "min": min,
    "int": int,
    "float": float,
    "not": operator.not_,
    "round": round,
}
for _name, _function in _PYTHON.items():
    register(f"torch.sym_{_name}", f"builtins.{_name}", layout="aware")(_function)


@register("torch.sym_ite", layout="aware")
def sym_ite(condition: bool, yes: Number, no: Number) -> Number:
    return yes if condition else no


@register("torch.sym_sum", layout="aware")
def sym_sum(items: Sequence[Number]) -> Number:
    return sum(items)


@register("operator.getitem", layout="aware")
def getitem(items: Sequence[Item], index: int) -> Item:
    return items[index]


@register("aten.sym_size.int", layout="aware")
def sym_size(x: Tensor, dim: int) -> Size:
    return x.shape[dim]


@register("aten.sym_numel.default", "aten.numel.default", layout="aware")
def sym_numel(x: Tensor) -> Size:
    return x.size
