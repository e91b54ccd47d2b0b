"""Everything of torch that its documentation does not promise, each behind a function that says what it is needed for.

No other file touches such names. tests/test_torch_private.py has a test for each, so that a new torch that has moved
one names it; a user of that torch gets a `TorchVersionError` that says what is affected.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from interop.errors import TorchVersionError
from interop.program import versions

if TYPE_CHECKING:
    import sympy
    import torch
    from torch._ops import OpOverload
    from torch._subclasses import FakeTensorMode
    from torch.export.graph_signature import OutputKind
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import TreeSpec as TreeSpec

P = ParamSpec("P")
R = TypeVar("R")


def _needed(purpose: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function that reads what is not promised; `purpose` ends the sentence "jaxnorm needs it ..."."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (AttributeError, ImportError, KeyError, TypeError) as error:
                raise TorchVersionError(
                    f"{versions.where_torch_stands()}: something that jaxnorm needs {purpose} is not where it was "
                    f"({type(error).__name__}: {error}). Tracing (interop.from_torch) is affected; files, artifacts "
                    f"and training are not. Install a torch from {versions.first('torch')} to "
                    f"{versions.last('torch')}, or a newer jaxnorm; see {versions.TABLE}"
                ) from error

        return called

    return mark


# Layers


@_needed("to know BatchNorm layers, subclasses included")
def batch_norm_class() -> type[_BatchNorm]:
    from torch.nn.modules.batchnorm import _BatchNorm

    return _BatchNorm


@_needed("to know dropout layers")
def dropout_class() -> type[_DropoutNd]:
    from torch.nn.modules.dropout import _DropoutNd

    return _DropoutNd


TABLES = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "layer"}  # where a module keeps what


@_needed("to see which tensors a layer has registered, and which of them are None")
def parameters(layer: torch.nn.Module) -> MutableMapping[str, torch.Tensor | None]:
    table: MutableMapping[str, torch.Tensor | None] = vars(layer)["_parameters"]
    return table


@_needed("to see which buffers a layer has registered, and to put others in their place")
def buffers(layer: torch.nn.Module) -> MutableMapping[str, torch.Tensor | None]:
    table: MutableMapping[str, torch.Tensor | None] = vars(layer)["_buffers"]
    return table


@_needed("to put a stand-in at a layer's place, whatever the parent does in __setattr__")
def children(layer: torch.nn.Module) -> MutableMapping[str, torch.nn.Module | None]:
    table: MutableMapping[str, torch.nn.Module | None] = vars(layer)["_modules"]
    return table


@_needed("to see who has a train() and an eval() of their own")
def is_overridden(layer: torch.nn.Module, method: str) -> bool:
    """Whether a layer has another than `torch.nn.Module`'s, PyTorch's own layers apart."""
    import torch

    if method in vars(layer):
        return True
    owner = next(cls for cls in type(layer).__mro__ if method in vars(cls))
    return owner is not torch.nn.Module and not owner.__module__.startswith("torch.nn.")


@_needed("to see a layer's hooks, and to leave out those that only observe")
def forward_hooks(
    layer: torch.nn.Module,
) -> tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]:
    """Those before its forward, and those after it."""
    return vars(layer)["_forward_pre_hooks"], vars(layer)["_forward_hooks"]


@_needed("to see hooks on a layer's gradients")
def has_gradient_hooks(layer: torch.nn.Module) -> bool:
    return bool(vars(layer)["_backward_hooks"] or vars(layer)["_backward_pre_hooks"])


@_needed("to see hooks on a parameter's gradient")
def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


@_needed("to refuse an input as BatchNorm refuses it")
def input_check(layer: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    check: Callable[[torch.Tensor], None] = layer._check_input_dim
    return check


@_needed("to know parameters of lazy layers, which have no shape yet")
def is_uninitialised(tensor: torch.Tensor) -> bool:
    import torch

    return isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)


@_needed("to know objects of PyTorch's C++, as quantised layers hold them")
def is_script_object(value: object) -> bool:
    import torch

    return isinstance(value, torch.ScriptObject)


@_needed("to name the class that TorchScript was made of")
def scripted_class(layer: torch.jit.ScriptModule) -> str:
    return str(layer.original_name)


# Tensors


@_needed("to tell which tensors share memory")
def storage(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


@_needed("to know views")
def is_view(tensor: torch.Tensor) -> bool:
    return bool(tensor._is_view())


@_needed("to tell storages apart")
def storage_key(storage: torch.UntypedStorage) -> int:
    key: int = storage._cdata
    return key


@_needed("to know tensors whose values are bytes in memory")
def has_memory(tensor: torch.Tensor) -> bool:
    """False for stand-ins, sparse tensors and those that are made of other tensors."""
    import torch
    from torch._subclasses import FakeTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    plain = tensor.layout is torch.strided and tensor.device.type != "meta" and not tensor.is_quantized
    made = isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor) or is_uninitialised(tensor)
    return plain and not made and not tensor.is_nested and not tensor.is_mkldnn


@_needed("to put back hooks on a tensor's gradient")
def tensor_hooks(tensor: torch.Tensor) -> list[MutableMapping[int, Callable[..., Any]]]:
    return [table for table in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) if table is not None]


@_needed("to leave a module's tensors in the version that they had")
def set_version(tensor: torch.Tensor, count: int) -> None:
    import torch

    torch._C._autograd._unsafe_set_version_counter((tensor,), (count,))


@_needed("to see that a tensor was written to")
def version(tensor: torch.Tensor) -> int:
    count: int = tensor._version
    return count


# Nested arguments and results

REGISTER_TYPES = "torch.utils._pytree.register_pytree_node"


@_needed("to take nested arguments apart")
def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    from torch.utils import _pytree

    leaves, spec = _pytree.tree_flatten(tree)
    return leaves, spec


@_needed("to put nested arguments together")
def unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    from torch.utils import _pytree

    return _pytree.tree_unflatten(leaves, spec)


@_needed("to take nested arguments apart and name their places")
def flatten_with_names(tree: Any) -> list[tuple[str, Any]]:
    from torch.utils import _pytree

    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]


@_needed("to read the structure of arguments and results")
def parts(spec: TreeSpec) -> list[TreeSpec]:
    """The children of a TreeSpec: `children()` since 2.10, where the attribute of before is deprecated."""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


@_needed("to read the structure of a call's arguments and result")
def call_structure(exported: torch.export.ExportedProgram) -> tuple[TreeSpec, TreeSpec]:
    return exported.call_spec.in_spec, exported.call_spec.out_spec


# Operations and graphs


@_needed("to tell PyTorch's operations from Python functions")
def is_operation(target: torch.fx.node.Target) -> bool:
    import torch

    return isinstance(target, torch._ops.OpOverload)


@_needed("to see what an operation writes to")
def schema(operation: OpOverload) -> torch.FunctionSchema:
    return operation._schema


@_needed("to make in-place operations functional")
def out_of_place(operation: OpOverload) -> OpOverload | None:
    """`aten.relu.default` of `aten.relu_.default`, `aten.bernoulli.p` of `aten.bernoulli_.float`: the overload of the
    name without "_" that has the same arguments, whatever the first is called. None where there is none."""
    import torch

    library, name = operation._schema.name.split("::")
    packet = getattr(getattr(torch.ops, library), name.removesuffix("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    named = [operation._overloadname, *packet.overloads()]  # the same name first
    forms = (getattr(packet, overload, None) for overload in named)

    def arguments(form: OpOverload) -> list[tuple[str, str]]:
        return [(a.name if index else "", str(a.type)) for index, a in enumerate(form._schema.arguments)]

    return next((form for form in forms if form is not None and arguments(form) == arguments(operation)), None)


@_needed("to find the parts of a graph that are recorded without gradients")
def is_gradient_region(node: torch.fx.Node) -> bool:
    """A call of the higher-order operation that stands for `torch.set_grad_enabled`: (enabled, graph, *inputs)."""
    return getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled"


@_needed("to know which state a graph replaces")
def mutations() -> tuple[OutputKind, ...]:
    from torch.export.graph_signature import OutputKind

    kinds = (OutputKind.BUFFER_MUTATION, getattr(OutputKind, "PARAMETER_MUTATION", None))  # the second since 2.9
    return tuple(kind for kind in kinds if kind is not None)


@_needed("to keep a BatchNorm node that nothing reads")
def keep(operation: OpOverload) -> None:
    import torch

    torch.fx.has_side_effect(operation)


@_needed("to see what a graph does with a tensor, while it is recorded")
def graph_nodes(tensors: list[torch.Tensor]) -> list[torch.fx.Node]:
    """The nodes that stand for the tensors in the graph that is being recorded now; none for those not in it."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode: Any = get_proxy_mode()
    slots = [get_proxy_slot(tensor, mode.tracer, None) for tensor in tensors]
    return [slot.proxy.node for slot in slots if slot is not None]


@_needed("to find the value of a tensor that is made of constants, while it is recorded")
def recorded_as(tensor: torch.Tensor) -> torch.fx.Node | None:
    """The node that stands for the tensor in the graph that is being recorded now, if there is one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode: Any = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


@_needed("to read the constants of a graph that is being recorded")
def recording_root() -> torch.nn.Module:
    """What holds the tensors of the nodes of the kind get_attr."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode: Any = get_proxy_mode()
    root: torch.nn.Module = mode.tracer.root
    return root


@_needed("to record a PackedSequence as a padded one")
def packing() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What pack_padded_sequence and pad_packed_sequence in torch/nn/utils/rnn.py call."""
    import torch

    return torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence


@_needed("to record assertions")
def assertions() -> tuple[Callable[..., Any], ...]:
    """`torch._assert`, and what torch.export makes of it since 2.15 (_NonStrictTorchFunctionHandler)."""
    import torch

    return torch._assert, torch._assert_async


# Sizes that vary


@_needed("to read sizes that vary")
def expression(size: torch.SymInt) -> sympy.Expr:
    """The sympy expression of a torch.SymInt."""
    return size.node.expr


@_needed("to know the size that a varying one has in the example")
def example_size(size: torch.SymInt) -> int:
    hint: int = size.node.hint
    return hint


@_needed("to know what torch.export assumed of sizes that vary")
def assumptions(size: torch.SymInt) -> list[sympy.Basic]:
    return [guard.expr for guard in size.node.shape_env.guards]


@_needed("to write what is assumed of sizes as Python")
def as_python(condition: sympy.Basic) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    text: str = PythonPrinter().doprint(condition)
    return text


@_needed("to find the sizes that masks choose")
def unknown(number: torch.SymInt | torch.SymFloat | torch.SymBool) -> set[sympy.Symbol]:
    """The symbols in a number that depend on values."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return set(free_unbacked_symbols(number))


@_needed("to find shapes that depend on values")
def depends_on_values(shape: torch.Size) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(shape))


# Modes


@_needed("to run a module for its shapes alone")
def shapes_alone() -> FakeTensorMode:
    """A mode in which tensors are stand-ins without values; its `from_tensor` makes one of a tensor."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@_needed("to see every operation that PyTorch runs")
def dispatch_mode() -> type[TorchDispatchMode]:
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


@contextlib.contextmanager
def arguments_of_distributions_believed() -> Iterator[None]:
    """`torch.distributions` does not look whether parameters and values are in their range, a question about values."""
    holder, before = _validation()
    holder.set_default_validate_args(False)
    try:
        yield
    finally:
        holder.set_default_validate_args(before)


@_needed("to record torch.distributions without a look at the values of their arguments")
def _validation() -> tuple[type[torch.distributions.Distribution], bool]:
    import torch

    return torch.distributions.Distribution, torch.distributions.Distribution._validate_args


@contextlib.contextmanager
def packed_sizes_believed() -> Iterator[None]:
    """Recurrent layers do not look whether the initial state fits the number of packed sequences, a value."""
    with contextlib.ExitStack() as stack:
        for holder, name, original in _size_checks():

            def check(layer: Any, input: Any, hidden: Any, batch_sizes: Any, original: Any = original) -> None:
                if batch_sizes is None:
                    original(layer, input, hidden, batch_sizes)

            stack.enter_context(_replaced(holder, name, check))
        yield


@_needed("to record recurrent layers of packed sequences")
def _size_checks() -> list[tuple[type, str, Callable[..., Any]]]:
    import torch

    name = "check_forward_args"
    holders = (torch.nn.RNNBase, torch.nn.LSTM)
    return [(holder, name, vars(holder)[name]) for holder in holders]


@contextlib.contextmanager
def symbolic_truth(answer: Callable[[], bool | None]) -> Iterator[None]:
    """Where the truth of a number that depends on values is asked for, `answer` may give it; None: torch raises."""
    holder, original = _truth()

    def truth(number: torch.SymBool) -> bool:
        try:
            return original(number)
        except Exception as error:
            given = answer() if type(error).__name__.startswith("GuardOnDataDependent") else None
            if given is None:
                raise
            return given

    with _replaced(holder, "__bool__", truth):
        yield


@_needed("to know errors that only a record raises")
def value_errors() -> tuple[type[Exception], ...]:
    """Where code asks for values, for sizes that depend on them, or for what no stand-in of a tensor can do."""
    from torch._dynamo.exc import UserError
    from torch._subclasses import fake_tensor
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return (
        GuardOnDataDependentSymNode,
        UserError,
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
    )


@contextlib.contextmanager
def made_instances(classes: Sequence[type[Exception]], note: Callable[[Exception], None]) -> Iterator[None]:
    """Each exception of these classes that is made goes to `note`."""

    def noting(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Exception, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            note(self)

        return init

    with contextlib.ExitStack() as stack:
        for cls in classes:
            stack.enter_context(_replaced(cls, "__init__", noting(cls.__init__)))
        yield


@contextlib.contextmanager
def layers_left_on_errors() -> Iterator[None]:
    """The stack of layers that a tracer keeps loses a layer that ends by an error, which torch forgets."""
    holder, original = _tracer()

    def call_module(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth = len(self.module_stack)
        try:
            return original(self, *args, **kwargs)
        except Exception:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise

    with _replaced(holder, "call_module", call_module):
        yield


@_needed("to record code that catches a layer's error")
def _tracer() -> tuple[type, Callable[..., Any]]:
    import torch.fx

    return torch.fx.Tracer, torch.fx.Tracer.call_module


@_needed("to record code that checks values")
def _truth() -> tuple[type[torch.SymBool], Callable[[torch.SymBool], bool]]:
    import torch

    return torch.SymBool, torch.SymBool.__bool__


@_needed("to compute with real tensors while a module is recorded")
def _ways_outside() -> tuple[Callable[[], AbstractContextManager[Any]], Callable[[], AbstractContextManager[Any]]]:
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    return torch._C.DisableTorchFunction, _disable_current_modes


@contextlib.contextmanager
def outside_the_trace() -> Iterator[None]:
    """What is computed here is not recorded."""
    functions, modes = _ways_outside()
    with functions(), modes():
        yield


@_needed("to turn gradients on and off as torch.no_grad does")
def set_grad_enabled(mode: bool) -> None:
    import torch

    torch._C._set_grad_enabled(mode)


@contextlib.contextmanager
def grad_mode_kept() -> Iterator[None]:
    """`torch.no_grad()` and its like change nothing here."""
    with _replaced(*_grad_switch(), lambda _: None):
        yield


@_needed("to leave torch.no_grad() without effect inside a function with its own backward")
def _grad_switch() -> tuple[ModuleType, str]:
    import torch

    name = "_set_grad_enabled"
    getattr(torch._C, name)
    return torch._C, name


@contextlib.contextmanager
def causal_masks_believed() -> Iterator[None]:
    """`nn.Transformer` and its layers do not look whether a mask is the causal one, a question about values; its
    answer is a hint (`_detect_is_causal_mask` in torch/nn/modules/transformer.py)."""
    with _replaced(*_causal_mask_detection(), lambda mask, is_causal=None, size=None: is_causal is True):
        yield


@_needed("to record Transformer layers without a look at the values of their masks")
def _causal_mask_detection() -> tuple[ModuleType, str]:
    from torch.nn.modules import transformer

    name = "_detect_is_causal_mask"
    getattr(transformer, name)
    return transformer, name


@contextlib.contextmanager
def _replaced(holder: ModuleType | type, name: str, value: Callable[..., Any]) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


@_needed("to record what torch.utils.checkpoint(use_reentrant=True) runs")
def checkpoint_function() -> type[torch.autograd.Function]:
    """A torch.autograd.Function whose forward is `(ctx, run_function, preserve_rng_state, *args)`."""
    from torch.utils.checkpoint import CheckpointFunction

    return CheckpointFunction
