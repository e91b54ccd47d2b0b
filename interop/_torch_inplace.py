"""In-place operations of an exported graph made functional, where it is plain to see how.

`ExportedProgram.run_decompositions({})` does this for every graph, and takes twice as long as the export itself: it
runs the graph three times over. Most graphs have nothing to it but `relu_` and `add_` on results that nothing else
refers to. Those are renamed here (`aten.relu_` to `aten.relu`); a graph with anything else is left to PyTorch.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import interop.ops
from interop._torch_batch_norm import OPERATION as BATCH_NORM
from interop._torch_graph import DROPPED, operation_name

# Functions that write running statistics though their schemas do not say so.
_WRITE_UNSEEN = frozenset({"aten.batch_norm.default", "aten.instance_norm.default", "aten.cudnn_batch_norm.default"})


def make_functional(exported: Any) -> bool:
    """Makes the graph functional in place, and says so; False, with nothing changed, if that is not simple.

    Simple means: every operation has a JAX function (an in-place one: its functional form), and once a tensor has been
    written to, it is read as the result of the writing, and whatever else shares its memory is not read at all.
    """
    forms: dict[Any, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "call_function":
            form = _functional_form(node)
            if form is None:
                return False
            if form is not node.target:
                forms[node] = form
    replaced = _replacements(exported.graph.nodes, forms)
    if replaced is None:
        return False
    for node, (old, new) in replaced:
        node.replace_input_with(old, new)
    for node, form in forms.items():
        node.target = form
    return True


def _functional_form(node: Any) -> Any:
    """The operation that computes what the node's does and writes nothing: its own if it is such, None if there is
    none with a JAX function."""
    import torch

    name, schema = operation_name(node.target), getattr(node.target, "_schema", None)
    if name in DROPPED or name == BATCH_NORM:
        return node.target
    if schema is None or not schema.is_mutable:
        return node.target if interop.ops.lookup(name) and name not in _WRITE_UNSEEN else None
    library, base, overload = name.split(".")
    packet = getattr(getattr(torch.ops, library), base.removesuffix("_"), None)
    form = getattr(packet, overload, None) if base.endswith("_") else None
    if form is None or form._schema.is_mutable or not interop.ops.lookup(str(form)):
        return None
    # An in-place operation keeps its tensor's type and shape, a functional one promotes and broadcasts.
    tensors = [item.meta.get("val") for item in node.all_input_nodes]
    written, result = node.args[0].meta.get("val"), node.meta.get("val")
    masks = (written.dtype, torch.bool) if base == "masked_fill_" else (written.dtype,)
    typed = all(x.dtype in masks for x in tensors if isinstance(x, torch.Tensor))
    shaped = all(x.ndim <= written.ndim for x in tensors if isinstance(x, torch.Tensor))
    return form if typed and shaped and result.shape == written.shape else None


def _replacements(nodes: Any, forms: dict[Any, Any]) -> list[tuple[Any, tuple[Any, Any]]] | None:
    """(node, (argument, what it is after it was written to)); None if something else that shares memory is read."""
    sharing: dict[int, list[Any]] = collections.defaultdict(list)
    latest: dict[Any, Any] = {}
    stale: set[Any] = set()
    found = []
    for node in nodes if forms else ():
        if any(item in stale for item in node.all_input_nodes):
            return None
        found += [(node, (item, latest[item])) for item in node.all_input_nodes if item in latest]
        if node in forms:
            written = latest.get(node.args[0], node.args[0])
            storages = list(_storages(written))
            sure = len(storages) == 1 and list(_storages(node)) == storages
            if not sure or any(other.op != "call_function" for other in sharing[storages[0]]):
                return None  # the record does not say what shares memory, or the caller's memory is written to
            for other in sharing[storages[0]]:
                if other is written or latest.get(other) is written:
                    latest[other] = node
                else:
                    stale.add(other)
        for storage in set(_storages(node)):
            sharing[storage].append(node)
    return found


def _storages(node: Any) -> Iterator[int]:
    """What tells the memory of the node's tensors apart."""
    import torch

    values = node.meta.get("val")
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()._cdata
