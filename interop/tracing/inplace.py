"""In-place operations of an exported graph made functional, where it is plain to see how.

`ExportedProgram.run_decompositions({})` does this for every graph, and takes twice as long as the export itself: it
runs the graph three times over. Most graphs have nothing to it but `relu_` and `add_` on results that nothing else
refers to. Those are renamed here (`aten.relu_` to `aten.relu`); a graph with anything else is left to PyTorch.

That forgets what autograd was not to see: `stop_gradients` writes it into the graph first.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import interop.ops
from interop.errors import TraceError
from interop.program.operations import BATCH_NORM, DROPPED, GRADIENT_OF, RUN
from interop.tracing import private
from interop.tracing.graph import operation_name, source_line, written_by

if TYPE_CHECKING:
    import torch

# Functions that write running statistics though their schemas do not say so.
_WRITE_UNSEEN = frozenset({"aten.batch_norm.default", "aten.instance_norm.default", "aten.cudnn_batch_norm.default"})


def make_functional(exported: torch.export.ExportedProgram) -> bool:
    """Makes the graph functional in place, and says so; False, with nothing changed, if that is not simple.

    Simple means: every operation has a JAX function (an in-place one: its functional form), and once a tensor has been
    written to, it is read as the result of the writing, and whatever else shares its memory is not read at all.
    """
    forms: dict[torch.fx.Node, torch.fx.node.Target] = {}
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


def _functional_form(node: torch.fx.Node) -> torch.fx.node.Target | None:
    """The operation that computes what the node's does and writes nothing: its own if it is such, None if there is
    none with a JAX function."""
    import torch

    name = operation_name(node.target)
    schema = private.schema(node.target) if private.is_operation(node.target) else None
    if name in DROPPED | RUN | {GRADIENT_OF}:
        return node.target
    if schema is None or not schema.is_mutable:
        return node.target if interop.ops.lookup(name, torch.__version__) and name not in _WRITE_UNSEEN else None
    base = name.split(".")[1]
    form = private.out_of_place(node.target)
    if form is None or private.schema(form).is_mutable or not interop.ops.lookup(str(form), torch.__version__):
        return None
    # An in-place operation keeps its tensor's type and shape, a functional one promotes and broadcasts.
    tensors = [item.meta.get("val") for item in node.all_input_nodes]
    target, result = node.args[0].meta.get("val"), node.meta.get("val")
    masks = (target.dtype, torch.bool) if base == "masked_fill_" else (target.dtype,)
    typed = all(x.dtype in masks for x in tensors if isinstance(x, torch.Tensor))
    shaped = all(x.ndim <= target.ndim for x in tensors if isinstance(x, torch.Tensor))
    return form if typed and shaped and result.shape == target.shape else None


def _replacements(
    nodes: Iterable[torch.fx.Node], forms: Mapping[torch.fx.Node, torch.fx.node.Target]
) -> list[tuple[torch.fx.Node, tuple[torch.fx.Node, torch.fx.Node]]] | None:
    """(node, (argument, what it is after it was written to)); None if something else that shares memory is read."""
    sharing: dict[int, list[torch.fx.Node]] = collections.defaultdict(list)
    latest: dict[torch.fx.Node, torch.fx.Node] = {}
    stale: set[torch.fx.Node] = set()
    found = []
    for node in nodes if forms else ():
        if any(item in stale for item in node.all_input_nodes):
            return None
        found += [(node, (item, latest[item])) for item in node.all_input_nodes if item in latest]
        if node in forms:
            target = latest.get(node.args[0], node.args[0])
            memory = list(storages(target))
            sure = len(memory) == 1 and list(storages(node)) == memory
            if not sure or any(other.op != "call_function" for other in sharing[memory[0]]):
                return None  # the record does not say what shares memory, or the caller's memory is written to
            for other in sharing[memory[0]]:
                if other is target or latest.get(other) is target:
                    latest[other] = node
                else:
                    stale.add(other)
        for storage in set(storages(node)):
            sharing[storage].append(node)
    return found


def storages(node: torch.fx.Node) -> Iterator[int]:
    """What tells the memory of the node's tensors apart."""
    import torch

    values = node.meta.get("val")
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor):
            yield private.storage(value)


def stop_gradients(graph_module: torch.fx.GraphModule) -> None:
    """Writes into the graph what autograd does not see, which `run_decompositions` forgets.

    A `torch.no_grad()` region reads tensors without their gradients. What is written to a tensor in there, or through
    `detach()`, changes its values and nothing about its gradient.
    """
    unseen = _inlined(graph_module)
    carrying = _drop_detached(graph_module.graph, unseen)
    for node in unseen:
        targets = written_by(node)
        for item in node.all_input_nodes:
            if item not in unseen and item not in targets and _is_inexact(item):
                with node.graph.inserting_before(node):
                    node.replace_input_with(item, _detached(item, node))
        if operation_name(node.target) == BATCH_NORM:  # whose weight and bias are no inputs of the node
            with node.graph.inserting_after(node):
                detached = _detached(node, node)
            node.replace_all_uses_with(detached, lambda user, detached=detached: user is not detached)
    for node in list(graph_module.graph.nodes):
        for tensor in _inexact_written(node):
            if node not in unseen and any(item in carrying for item in node.all_input_nodes if item is not tensor):
                _refuse_two_gradients(node, tensor)
            _write_unseen(node, tensor, unseen)
    graph_module.recompile()


def _drop_detached(graph: torch.fx.Graph, unseen: Container[torch.fx.Node]) -> set[torch.fx.Node]:
    """Leaves out a `detach()` of what has no gradient, and is read by the detached name alone from there on.

    `cost = torch.autograd.Variable(torch.zeros(n))` detaches, as `.data` does. What is written to `cost` has its
    gradient in what reads `cost`, and none in what reads the tensor that it was made of: with one memory for both
    names, a graph has the one or the other. Gives the nodes that may have a gradient.
    """
    import torch

    nodes = list(graph.nodes)
    carrying: set[torch.fx.Node] = set()  # a gradient
    memories: set[int] = set()  # what carries one
    for index, node in enumerate(nodes):
        if node.op == "placeholder" and _is_inexact(node):
            carrying.add(node)
        is_detach = node.target is torch.ops.aten.detach.default
        if node.op != "call_function" or node in unseen:
            continue
        if not is_detach and any(item in carrying for item in node.all_input_nodes):
            if _is_inexact(node) or isinstance(node.meta.get("val"), (tuple, list)):
                carrying.add(node)
            memories.update(memory for target in written_by(node) for memory in storages(target))
        if not is_detach and memories.intersection(storages(node)):
            carrying.add(node)
        if is_detach and _is_inexact(node):
            _without_detach(node, nodes[index + 1 :], carrying, memories)
    return carrying


def _refuse_two_gradients(node: torch.fx.Node, tensor: torch.fx.Node) -> None:
    """A write of what has a gradient to a tensor that was detached, whose name is read afterwards.

    Raises:
        TraceError: since PyTorch's detached name then has that gradient, and the other name of the memory has not.
    """
    import torch

    names: set[torch.fx.Node] = {node}  # those that come of the detached one
    part: torch.fx.Node | None = tensor
    while part is not None and part.target is not torch.ops.aten.detach.default:
        part = _viewed(part)
    if part is None:
        return
    seen = False
    for other in node.graph.nodes:
        if other is part or (_viewed(other) in names and other is not part):
            names.add(other)
        if seen and other not in names and names.intersection(other.all_input_nodes):
            raise TraceError(
                f"forward writes something that has a gradient to a tensor that it has detached, and reads the tensor "
                f"by both names: {source_line(node)}. In PyTorch each name has a gradient of its own. Write to a copy "
                "(x.detach().clone())"
            )
        seen = seen or other is node


def _without_detach(
    node: torch.fx.Node, later: list[torch.fx.Node], carrying: Container[torch.fx.Node], memories: set[int]
) -> None:
    """Replaces one `detach()` by what it is given, if that is the same; see `_drop_detached`."""
    source = node.args[0]
    if source in carrying or memories.intersection(storages(source)) or _root(source).op == "placeholder":
        return
    of_it = {node}
    for other in later:
        shares = [item for item in other.all_input_nodes if set(storages(item)).intersection(storages(node))]
        if any(item in of_it for item in shares) and set(storages(other)).intersection(storages(node)):
            of_it.add(other)
        if any(item not in of_it for item in shares):
            return
    node.replace_all_uses_with(source)


def _inlined(graph_module: torch.fx.GraphModule) -> dict[torch.fx.Node, None]:
    """Puts the regions without gradients into the graph around them, and returns their nodes."""
    found: dict[torch.fx.Node, None] = {}
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not private.is_gradient_region(node):
            continue
        enabled, body, *given = node.args
        inner = getattr(graph_module, body.target)
        for item in inner.graph.nodes:
            if item.op == "get_attr":
                name = f"{body.target}_{item.target}"
                setattr(graph_module, name, getattr(inner, item.target))
                item.target = name
        copies = dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True))
        placeholders = set(copies)
        with graph.inserting_before(node):
            results = graph.graph_copy(inner.graph, copies)
        if not enabled:
            found.update((copy, None) for item, copy in copies.items() if item not in placeholders)
        for user in list(node.users):  # picks one result
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    return found


def _inexact_written(node: torch.fx.Node) -> list[torch.fx.Node]:
    return [tensor for tensor in written_by(node) if _is_inexact(tensor)]


def _write_unseen(node: torch.fx.Node, tensor: torch.fx.Node, unseen: Container[torch.fx.Node]) -> None:
    """Where autograd does not see the node write to the tensor: it writes to a copy, whose values the tensor is then
    given."""
    import torch

    graph = node.graph
    if _root(tensor) in unseen:  # which has no gradient
        return
    with graph.inserting_before(node):
        attached = _attached(tensor)
        if attached is tensor and node not in unseen:
            return
        copy = graph.call_function(torch.ops.aten.clone.default, (_detached(tensor, node),))
    with graph.inserting_after(node):
        write = graph.call_function(_overwrite, (attached, copy))
    copy.meta = write.meta = _place(node)
    if len(private.schema(node.target).returns) == 1:
        node.replace_all_uses_with(tensor)
    node.replace_input_with(tensor, copy)


def _detached(tensor: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
    """`tensor.detach()`, as the node sees it."""
    import torch

    detached = node.graph.call_function(torch.ops.aten.detach.default, (tensor,))
    detached.meta = _place(node) | {"val": tensor.meta["val"]}
    return detached


def _place(node: torch.fx.Node) -> dict[str, Any]:
    return {key: item for key, item in node.meta.items() if key != "val"}


def _overwrite(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Gives the tensor other values and leaves its gradient: `value + 0`, where that 0 has the tensor's derivative."""
    import torch

    finite = torch.where(tensor.isfinite(), tensor, 0)  # infinity less infinity is not 0
    tensor.copy_(value.detach() + (finite - finite.detach()))


def _is_inexact(node: torch.fx.Node) -> bool:
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """What the node is a view of; None if it is none."""
    base = node.args[0] if node.op == "call_function" and node.args else None
    shared = set(storages(node)).intersection(storages(base)) if isinstance(base, type(node)) else None
    return base if shared else None


def _root(node: torch.fx.Node) -> torch.fx.Node:
    base = _viewed(node)
    return node if base is None else _root(base)


def _attached(node: torch.fx.Node) -> torch.fx.Node:
    """The same view without the `detach()` on the way, at the graph's insertion point; the node itself if there is
    none."""
    import torch

    base = _viewed(node)
    attached = None if base is None else _attached(base)
    if base is None or (attached is base and node.target is not torch.ops.aten.detach.default):
        return node
    if node.target is torch.ops.aten.detach.default:
        return attached
    return node.graph.node_copy(node, lambda item: attached if item is base else item)
