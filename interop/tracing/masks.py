"""Sizes that depend on values, where a mask does as well: `z[m] = f(y[m])` is a `where`.

torch.export gives what a mask chooses (`y[m]`, `m.nonzero()`) a size that no input determines. Such rows are put into
a graph with all rows there (`interop/ops/masks.py`) if each operation on them treats them one by one, is a reduction
that can leave rows out, or puts them back where they came from. One operation of another kind, and the graph stays as
it is, with the size that XLA does not have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from interop.program.operations import BATCH_NORM, DROPPED
from interop.tracing import private
from interop.tracing.graph import module_path, operation_name, source_line
from interop.tracing.row_wise import argument, row_wise, same, values_of

if TYPE_CHECKING:
    import sympy
    import torch

# Reductions of which rows are left out by a value that changes nothing.
_NEUTRAL: dict[str, float] = {
    **dict.fromkeys(("sum", "nansum", "any", "count_nonzero", "cumsum", "linalg_vector_norm", "norm"), 0),
    **dict.fromkeys(("prod", "all", "cumprod"), 1),
    **dict.fromkeys(("max", "amax", "logsumexp", "logcumsumexp"), -math.inf),
    **dict.fromkeys(("min", "amin"), math.inf),
}
_MOMENTS = frozenset(("mean", "var", "std"))
_SHAPED = frozenset(
    f"aten.{name}.default" for name in (
        "view", "reshape", "_unsafe_view", "expand", "flatten", "new_zeros", "new_ones", "new_full", "zeros", "ones",
        "full", "rand", "randn", "repeat",
    )
) | {"aten.flatten.using_ints", "aten.empty.memory_format", "aten.new_empty.default"}  # fmt: skip


class Refused(Exception):
    """An operation that needs the size itself."""


class Rows(NamedTuple):
    """What one mask chooses: the mask, and which of all rows that are, (N,)."""

    mask: torch.fx.Node
    valid: torch.fx.Node


def without_unknown_sizes(exported: torch.export.ExportedProgram) -> str:
    """Puts all rows in the place of those that masks choose, in the exported graph; where that cannot be, leaves the
    graph and says what is in the way."""
    nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
    if not any(_symbols(value) for node in nodes for value in values_of(node)) and not any(map(_puts_by_mask, nodes)):
        return ""
    try:
        graph = _Masking(exported.graph).graph()
    except Refused as refused:
        return str(refused)
    exported.graph_module.graph = graph
    return ""


def _symbols(value: Any) -> set[sympy.Symbol]:
    """Those of a tensor's shape, or of a number, that depend on values."""
    import torch

    numbers = value.shape if isinstance(value, torch.Tensor) else [value]
    return {
        symbol
        for n in numbers
        if isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool))
        for symbol in private.unknown(n)
    }


def _puts_by_mask(node: torch.fx.Node) -> bool:
    return operation_name(node.target) == "aten.index_put.default" and any(map(_is_mask, node.args[1]))


def _is_mask(index: Any) -> bool:
    import torch

    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _stand_for(name: str) -> Callable[..., Any]:
    """A function that a graph calls by the name of an operation of ours."""

    def function(*_: object) -> None: ...

    function.__module__, function.__name__ = f"jaxnorm.{name}", "default"
    return function


_rows, _places, _valid, _put, _put_at, _moment, _fill, _count, _size = (
    _stand_for(f"masked_{name}")
    for name in ("rows", "places", "valid", "put", "put_at", "moment", "fill", "count", "size")
)


class _Masking:
    """One graph written anew."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        import torch

        self._old, self._new = graph, torch.fx.Graph()
        self._env: dict[torch.fx.Node, torch.fx.Node] = {}
        self._counts: dict[torch.fx.Node, torch.fx.Node] = {}  # of nodes that are sizes: the number of rows
        self._known: dict[sympy.Symbol, Rows] = {}
        self._node: torch.fx.Node = next(iter(graph.nodes))

    def graph(self) -> torch.fx.Graph:
        for node in self._old.nodes:
            self._node = node
            if node.op != "call_function" or not self._touches(node):
                if node.op == "output" and self._touches(node):
                    raise self._refused("what the model returns has as many rows as a mask chooses")
                self._env[node] = self._new.node_copy(node, self._env.__getitem__)
            elif operation_name(node.target) not in DROPPED:
                self._env[node] = self._rewritten(node)
        return self._new

    def _touches(self, node: torch.fx.Node) -> bool:
        values = [value for item in (node, *node.all_input_nodes) for value in values_of(item)]
        return any(map(_symbols, values)) or (node.op == "call_function" and _puts_by_mask(node))

    def _refused(self, why: str) -> Refused:
        node = self._node
        place = f"{module_path(node) or 'the module itself'} ({source_line(node)})"
        return Refused(f"{node.target}, in {place}: {why}")

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = self._new.call_function(target, args, kwargs)
        node.meta = {key: item for key, item in self._node.meta.items() if key != "val"}
        return node

    def _copied(self, node: torch.fx.Node) -> torch.fx.Node:
        """The node with arguments of the new graph. A size is the room for rows in a shape, else the number of rows."""
        import torch

        def number(item: torch.fx.Node) -> torch.fx.Node:
            return self._counts.get(item, self._env[item])

        def size(item: torch.fx.Node) -> torch.fx.Node:
            if item in self._counts and operation_name(item.target) != "aten.sym_size.int":
                raise self._refused("a size that is computed of the number of rows")
            return self._env[item]

        shaped = operation_name(node.target) in _SHAPED
        copy = self._new.node_copy(node, number)
        copy.args = tuple(
            torch.fx.node.map_arg(item, size if shaped and isinstance(item, (list, tuple)) else number)
            for item in node.args
        )
        if any(map(_symbols, values_of(node))):
            copy.meta = {key: item for key, item in node.meta.items() if key != "val"}
        return copy

    # What is known of a node's rows

    def _row_dim(self, node: torch.fx.Node) -> int | None:
        """The dimension of a tensor that holds rows."""
        import torch

        shapes = [value.shape for value in values_of(node) if isinstance(value, torch.Tensor)]
        found = {
            dim for shape in shapes for dim, n in enumerate(shape) if isinstance(n, torch.SymInt) and private.unknown(n)
        }
        if len(found) > 1 or any(self._rows_of_size(shape[dim]) is None for shape in shapes for dim in found):
            raise self._refused("no dimension is that of the rows which a mask chooses")
        return next(iter(found), None)

    def _rows_of_size(self, size: Any) -> Rows | None:
        expression = private.expression(size)
        return self._known.get(expression) if expression.is_symbol else None

    def _rows_of(self, node: torch.fx.Node) -> Rows | None:
        dim = self._row_dim(node)
        if dim is None:
            return None
        return self._rows_of_size(values_of(node)[0].shape[dim])

    def _learn(self, value: torch.Tensor, dim: int, mask: torch.fx.Node) -> Rows:
        """That the rows of the dimension are what the mask chooses."""
        symbol = private.expression(value.shape[dim])
        found = next((rows for rows in self._known.values() if same(rows.mask, mask)), None)
        rows = found or Rows(mask, self._call(_valid, mask))
        if not symbol.is_symbol or not same(self._known.setdefault(symbol, rows).mask, mask):
            raise self._refused("two masks choose the same number of rows")
        return rows

    # Operations

    def _rewritten(self, node: torch.fx.Node) -> torch.fx.Node:
        name = operation_name(node.target)
        own: dict[str, Callable[[torch.fx.Node], torch.fx.Node]] = {
            "aten.sym_size.int": self._size_of,
            "torch.sym_float": self._number,
            "aten.index.Tensor": self._index,
            "aten.nonzero.default": self._nonzero,
            "aten.nonzero_numpy.default": self._nonzero,
            "aten.masked_select.default": self._select,
            "aten.index_put.default": self._index_put,
            "aten.index_copy.default": self._index_copy,
            "aten.index_add.default": self._index_copy,
            "aten.masked_scatter.default": self._masked_scatter,
            BATCH_NORM: self._batch_norm,
        }
        if name in own:
            return own[name](node)
        if name.startswith("operator.") and name != "operator.getitem":
            self._counts[node] = self._copied(node)
            return self._counts[node]
        chosen = {item: rows for item in node.all_input_nodes if (rows := self._rows_of(item)) is not None}
        if len(set(chosen.values())) > 1:
            raise self._refused("what two masks choose meets there")
        unknown = any(map(_symbols, values_of(node)))
        if not chosen and unknown and name not in _SHAPED:
            raise self._refused("its size depends on values")
        if not chosen or row_wise(node, chosen, self._row_dim):
            return self._copied(node)
        return self._reduced(node, name, next(iter(chosen.values())))

    def _size_of(self, node: torch.fx.Node) -> torch.fx.Node:
        rows = self._rows_of(node.args[0]) if _symbols(node.meta["val"]) else None
        if rows is None:
            return self._copied(node)
        self._counts[node] = self._call(_count, rows.valid)
        return self._call(_size, rows.mask)

    def _number(self, node: torch.fx.Node) -> torch.fx.Node:
        """The size as a float: arrays are promoted by what is computed of them."""
        self._counts[node] = self._counts[node.args[0]]
        return self._counts[node]

    def _index(self, node: torch.fx.Node) -> torch.fx.Node:
        x, indices = node.args
        dim = self._row_dim(x)
        masks = [index for index in indices if index is not None]
        if dim is None and len(masks) == 1 and _is_mask(masks[0]) and not any(map(_symbols, values_of(masks[0]))):
            mask, place = self._env[masks[0]], indices.index(masks[0])
            self._learn(node.meta["val"], place, mask)
            return self._call(_rows, self._env[x], mask, place)
        if any(map(_is_mask, masks)) or (dim is not None and (dim >= len(indices) or indices[dim] is not None)):
            raise self._refused("a mask together with other indices, or of what a mask has chosen")
        return self._copied(node)

    def _nonzero(self, node: torch.fx.Node) -> torch.fx.Node:
        import torch

        mask = self._env[node.args[0]]
        self._learn(values_of(node)[0], 0, mask)
        places = self._call(_places, mask)
        if isinstance(node.meta["val"], (tuple, list)):
            return places
        columns = [self._call(operator.getitem, places, dim) for dim in range(node.args[0].meta["val"].ndim)]
        return self._call(torch.ops.aten.stack.default, columns, 1)

    def _select(self, node: torch.fx.Node) -> torch.fx.Node:
        import torch

        both = self._call(torch.ops.aten.broadcast_tensors.default, [self._env[item] for item in node.args])
        x, mask = (self._call(operator.getitem, both, index) for index in range(2))
        self._learn(node.meta["val"], 0, mask)
        return self._call(_rows, x, mask, 0)

    def _index_put(self, node: torch.fx.Node) -> torch.fx.Node:
        x, indices, values, *rest = node.args
        rows = self._rows_of(values)
        given = [index for index in indices if index is not None]
        if self._rows_of(x) is not None:
            raise self._refused("writes to what a mask has chosen")
        if len(given) == 1 and _is_mask(given[0]):
            mask, dim = self._env[given[0]], indices.index(given[0])
            value, after = values.meta["val"], x.meta["val"].ndim - dim - given[0].meta["val"].ndim
            place = value.ndim - 1 - after  # of the rows among the dimensions of the values, which may be fewer
            if rows is None and place >= 0 and not (isinstance(value.shape[place], int) and value.shape[place] == 1):
                raise self._refused("writes a number of rows that depends on values")
            if rows is not None and not (same(rows.mask, mask) and place == self._row_dim(values)):
                raise self._refused("writes what another mask has chosen")
            return self._call(_put, self._env[x], mask, self._env[values], dim, *rest)
        chosen = {rows for index in given if (rows := self._rows_of(index)) is not None} | ({rows} if rows else set())
        if any(map(_is_mask, given)) or len(chosen) != 1:
            raise self._refused("a mask together with other indices")
        places = [None if index is None else self._env[index] for index in indices]
        return self._call(_put_at, self._env[x], places, self._env[values], chosen.pop().valid, *rest)

    def _index_copy(self, node: torch.fx.Node) -> torch.fx.Node:
        x, dim, index, source = node.args
        rows = self._rows_of(index)
        if rows is None or self._rows_of(x) is not None or self._rows_of(source) not in (rows, None) or node.kwargs:
            raise self._refused("writes what a mask has chosen to other places")
        places = [*[None] * (dim % x.meta["val"].ndim), self._env[index]]
        adds = "index_add" in operation_name(node.target)
        return self._call(_put_at, self._env[x], places, self._env[source], rows.valid, adds)

    def _batch_norm(self, node: torch.fx.Node) -> torch.fx.Node:
        x, path = node.args
        rows, dim = self._rows_of(x), self._row_dim(x)
        if rows is None or dim == 1:
            raise self._refused("its channels depend on values")
        return self._call(node.target, self._env[x], path, rows.valid, dim)

    def _masked_scatter(self, node: torch.fx.Node) -> torch.fx.Node:
        x, mask, source = node.args
        rows, shapes = self._rows_of(source), [item.meta["val"].shape for item in (x, mask)]
        if rows is None or shapes[0] != shapes[1] or not same(rows.mask, self._env[mask]):
            raise self._refused("writes what another mask has chosen")
        return self._call(_put, self._env[x], self._env[mask], self._env[source], 0)

    def _reduced(self, node: torch.fx.Node, name: str, rows: Rows) -> torch.fx.Node:
        """A reduction over rows, those left out that do not count."""
        import torch

        x: Any = node.args[0]
        _, base, overload = name.split(".")
        dim = self._row_dim(x) if hasattr(x, "meta") else None
        if dim is not None and base == "binary_cross_entropy":
            reduction, each = argument(node, "reduction"), self._copied(node)
            each.args, each.kwargs = (*each.args[:2], argument(each, "weight"), 0), {}
            if reduction == 1:
                return self._call(_moment, each, rows.valid, dim, "mean")
            return self._call(torch.ops.aten.sum.default, self._call(_fill, each, rows.valid, dim, 0))
        if dim is not None and base in _MOMENTS and argument(node, "dtype") is None:
            dims, keepdim = argument(node, "dim"), argument(node, "keepdim")
            correction = argument(node, "correction")
            if argument(node, "unbiased") is False:
                correction = 0
            dims = [dims] if isinstance(dims, int) else dims
            return self._call(_moment, self._env[x], rows.valid, dim, base, dims, bool(keepdim), correction)
        order = argument(node, "ord" if base == "linalg_vector_norm" else "p")
        by_value = (base in ("max", "min") and overload == "dim") or (
            "norm" in base and order is not None and order < 0
        )
        if dim is None or base not in _NEUTRAL or by_value:
            raise self._refused("it does not treat the rows that a mask chooses one by one")
        filled = self._call(_fill, self._env[x], rows.valid, dim, _NEUTRAL[base])
        result = self._copied(node)
        result.args = (filled, *result.args[1:])
        return result
