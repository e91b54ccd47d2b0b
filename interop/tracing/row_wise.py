"""Which operations treat rows one by one, so that rows which do not count do no harm (`masks.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import interop.ops
from interop.tracing import private
from interop.tracing.graph import operation_name

if TYPE_CHECKING:
    import torch

# What treats elements one by one, besides the operations that are registered as elementwise.
_EACH = frozenset(
    f"aten.{name}" for name in (
        "copy.default", "type_as.default", "expand_as.default", "zeros_like.default", "ones_like.default",
        "full_like.default", "broadcast_tensors.default", "igamma.default", "nextafter.default", "logaddexp2.default",
    )
)  # fmt: skip
# What works along `dim`, or over it.
_ALONG = frozenset((
    "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default", "select.int", "unbind.int",
    "split.Tensor", "split_with_sizes.default", "chunk.default", "argmax.default", "argmin.default", "sort.default",
    "sort.stable", "topk.default", "max.dim", "min.dim", "median.dim", "squeeze.dim", "squeeze.dims", "cumsum.default",
    "cumprod.default", "logcumsumexp.default", "glu.default", "diff.default", "unflatten.int", "sum.dim_IntList",
    "mean.dim", "amax.default", "amin.default", "any.dim", "any.dims", "all.dim", "all.dims", "prod.dim_int",
    "logsumexp.default", "var.correction", "var.dim", "std.correction", "std.dim", "var_mean.correction",
    "std_mean.correction", "linalg_vector_norm.default", "norm.ScalarOpt_dim", "count_nonzero.dim_IntList",
    "cosine_similarity.default", "gather.default", "slice.Tensor", "narrow.default", "flip.default",
))  # fmt: skip
_MOVES = frozenset(
    ("transpose.int", "swapaxes.default", "unsqueeze.default", "permute.default", "movedim.int", "movedim.intlist",
     "t.default", "expand.default", "squeeze.default")
)  # fmt: skip
_VIEWS = frozenset(("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints"))
# Rows are examples, dimension 0 of the first argument, and nothing else has any.
_EXAMPLES = frozenset(
    f"aten.{name}.default" for name in (
        *(f"conv{n}d" for n in (1, 2, 3)), "convolution", *(f"{k}_pool{n}d" for k in ("avg", "max", "adaptive_avg")
        for n in (1, 2, 3)), "group_norm", "instance_norm", "prelu", "pixel_shuffle", "bilinear",
    )
)  # fmt: skip


def row_wise(
    node: torch.fx.Node, chosen: Collection[torch.fx.Node], row_dim: Callable[[torch.fx.Node], int | None]
) -> bool:
    """Whether each row of the node's result is made of that row of its arguments alone.

    Arguments:
        chosen: the arguments that have rows.
        row_dim: the dimension in which a tensor has them.
    """
    import torch

    name = operation_name(node.target)
    base = name.removeprefix("aten.")
    first = next((item for item in node.args if isinstance(item, torch.fx.Node)), None)
    dim = None if first is None or first not in chosen else row_dim(first)
    ndim = 0 if first is None else getattr(first.meta["val"], "ndim", 0)
    operation = interop.ops.lookup(name, torch.__version__)
    if name == "operator.getitem" or name in _EACH or (operation is not None and operation.layout == "elementwise"):
        ends = {value.ndim - (row_dim(item) or 0) for item in chosen for value in values_of(item)[:1]}
        return len(ends) == 1
    if base in _ALONG and dim is not None:
        along = argument(node, "dims" if base == "flip.default" else "dim")
        along = along if isinstance(along, (tuple, list)) else [along]
        return along not in ([], [None]) and dim not in [d % ndim for d in along]
    if base in _MOVES or base.startswith("new_"):  # the latter take the type alone
        return True
    if base in _VIEWS and dim is not None:
        shape, new, to = node.args[0].meta["val"].shape, node.meta["val"].shape, row_dim(node)
        return to is not None and math.prod(shape[:dim]) == math.prod(new[:to])
    if base in ("cat.default", "stack.default"):
        every = all(item in chosen for item in node.args[0])
        along = argument(node, "dim") % node.meta["val"].ndim
        return every and (base == "stack.default" or along != row_dim(node))
    if base in ("linear.default", "mm.default", "matmul.default", "mv.default"):
        return len(chosen) == 1 and dim is not None and dim < ndim - 1
    if name == "aten.binary_cross_entropy.default":
        return argument(node, "reduction") == 0
    if base == "addmm.default":
        return list(chosen) == [node.args[1]] and row_dim(node.args[1]) == 0
    if base in ("embedding.default", "index_select.default") and not argument(node, "scale_grad_by_freq"):
        return list(chosen) == [node.args[-1 if base.startswith("index") else 1]]
    if base in ("layer_norm.default", "native_layer_norm.default", "rms_norm.default", "_fused_rms_norm.default"):
        return dim is not None and dim < ndim - len(node.args[1])
    return name in _EXAMPLES and list(chosen) == [first] and dim == 0


def values_of(node: torch.fx.Node) -> list[Any]:
    """The tensors or numbers that the node gives, without values."""
    value = node.meta.get("val")
    return list(value) if isinstance(value, (tuple, list)) else [value]


def argument(node: torch.fx.Node, name: str) -> Any:
    """What the operation is given by that name of its schema; None if it has none."""
    schema = private.schema(node.target) if private.is_operation(node.target) else None
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(name, argument.default_value)
            return given
    return None


def same(a: Any, b: Any) -> bool:
    """Whether two nodes of a functional graph compute the same."""
    import torch

    if a is b or not (isinstance(a, torch.fx.Node) and isinstance(b, torch.fx.Node)):
        return a is b or (type(a) is type(b) and not isinstance(a, torch.fx.Node) and a == b)
    target: Any = a.target
    if a.op != "call_function" or target is not b.target or a.kwargs.keys() != b.kwargs.keys():
        return False
    if private.is_operation(target) and torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return _all_same([*a.args, *a.kwargs.values()], [*b.args, *b.kwargs.values()])


def _all_same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_all_same, a, b))
    return same(a, b)
