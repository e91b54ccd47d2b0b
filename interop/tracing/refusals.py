"""What PyTorch cannot record: refused or explained in words that say where it is and what to do."""

from __future__ import annotations

import inspect
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interop import dtypes
from interop.arrays import dtype_name
from interop.errors import TraceError
from interop.tracing import private
from interop.tracing.graph import module_path, source_line, written_by
from interop.tracing.inplace import storages
from interop.tracing.synchronised import is_batch_norm

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")


def refuse_other_arguments(
    module: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_dims: Collection[int]
) -> None:
    """Arguments that are no module, no inputs of its, or no dimensions."""
    import torch

    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, type) and issubclass(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found the class {module.__qualname__}: make one of it")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {kind}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(_scripted([("the module", module)]))
    if not vars(module).keys() >= private.TABLES.keys():
        raise TypeError(f"{kind} is no whole torch.nn.Module: its __init__ does not call super().__init__()")
    if isinstance(dynamic_dims, (str, bytes)) or not isinstance(dynamic_dims, Collection):
        raise TypeError(f"dynamic_dims is a sequence of dimensions, as in (0,) or (0, 2, 3), found {dynamic_dims!r}")
    for dim in dynamic_dims:
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
            raise TypeError(f"dynamic_dims are numbers of dimensions, found {dim!r}")
        if dim < 0:
            raise ValueError(f"dynamic_dims count from the first dimension, which is 0; found {dim}")
    if not _takes_a_mode(module):
        inner = (
            ": import the network, its .model" if isinstance(getattr(module, "model", None), torch.nn.Module) else ""
        )
        raise TypeError(
            f"{type(module).__name__}.train() takes no mode, as that of a torch.nn.Module does; it is a tool around a "
            f"network{inner}"
        )
    try:
        tensors = [leaf for leaf in private.flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        most = max((tensor.ndim for tensor in tensors), default=0)
        if beyond := [dim for dim in dynamic_dims if tensors and dim >= most and dim > 0]:
            raise ValueError(
                f"dynamic_dims {beyond}: the example inputs have {most} dimensions at most, 0 to {most - 1}"
            )
    except RecursionError as error:
        raise ValueError("the example inputs are nested too deeply, or contain themselves") from error
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # of what is not written in Python, and of no function at all
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__}.forward{signature} does not take these example inputs: {error}"
        ) from error


def _takes_a_mode(module: torch.nn.Module) -> bool:
    try:
        inspect.signature(module.train).bind(True)
        names = list(inspect.signature(module.train).parameters)
    except (TypeError, ValueError):
        return False
    return not names or "mode" in names or len(names) == 1 or names[0] in ("args", "flag", "training")


def _scripted(layers: list[tuple[str, torch.jit.ScriptModule]]) -> str:
    """Of TorchScript inside TorchScript the outermost."""
    outer = [(path, layer) for path, layer in layers if not any(path.startswith(f"{other}.") for other, _ in layers)]
    named = [f"{path} (of the class {private.scripted_class(layer)})" for path, layer in outer]
    return (
        f"TorchScript cannot be traced by torch.export: {some(named)}. Give the torch.nn.Module that was scripted or "
        "traced, made of that class, and load the state dict into it"
    )


def refuse_untraceable(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What torch.export would answer in words that do not help."""
    import torch

    problems = []
    scripted = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, torch.jit.ScriptModule)]
    if scripted:
        problems.append(_scripted(scripted))
    packed = [
        path or "the module"
        for path, layer in module.named_modules()
        if not isinstance(layer, torch.jit.ScriptModule)
        and any(private.is_script_object(value) for value in vars(layer).values())
    ]
    if packed:
        problems.append(
            f"objects of PyTorch's C++, as quantised layers hold them, cannot be traced: {some(packed)}. Import the "
            "module before it is quantised"
        )
    state = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, tensor in state if tensor.device.type == "meta"]
    if empty:
        problems.append(f"tensors on the meta device have no values: {some(empty)}. Load the weights first")
    arrays = [
        f"{name} is a {type(leaf).__module__}.{type(leaf).__name__}"
        for name, leaf in private.flatten_with_names((args, dict(kwargs)))
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, torch.Tensor)
    ]
    if arrays:
        problems.append(f"example inputs are torch.Tensors (torch.from_numpy makes one): {some(arrays)}")
    unknown = [f"{name} is {dtype_name(tensor.dtype)}" for name, tensor in state if not _is_known(tensor)]
    if unknown:
        problems.append(
            f"tensors of a dtype or a layout that NumPy and JAX do not have: {some(unknown)}. Convert them (.to(...), "
            ".to_dense()), or keep them outside the module"
        )
    settings = [
        f"{path or 'the module'}.{name} is a {type(value).__module__}.{type(value).__qualname__}"
        for path, layer in module.named_modules()
        if is_batch_norm(layer)
        for name in ("eps", "momentum")
        if not isinstance(value := getattr(layer, name, None), (int, float, np.integer, np.floating, type(None)))
    ]
    if settings:
        problems.append(
            f"settings of BatchNorm layers are numbers: {some(settings)}. Make it one (float(...)), or a BatchNorm of "
            "your own by other names of F.batch_norm's arguments"
        )
    if problems:
        raise TraceError("\n".join(problems))


def _is_known(tensor: torch.Tensor) -> bool:
    import torch

    if tensor.device.type == "meta" or private.is_uninitialised(tensor):  # which have errors of their own
        return True
    return dtype_name(tensor.dtype) in dtypes.TORCH and tensor.layout is torch.strided and not tensor.is_nested


def refuse_shared_writes(exported: torch.export.ExportedProgram) -> None:
    """Writes to a tensor whose memory another name has too: a recorded graph knows each by its own name."""
    import torch

    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    names: dict[int, set[str]] = {}
    for spec in exported.graph_signature.input_specs:
        node = placeholders.get(spec.arg.name)
        if spec.target is not None and node is not None:
            for memory in storages(node):
                names.setdefault(memory, set()).add(spec.target)
    graphs = [part for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = (target for part in graphs for node in part.graph.nodes for target in written_by(node))
    shared = {
        name
        for target in targets
        for memory in storages(target)
        if len(names.get(memory, ())) > 1
        for name in names[memory]
    }
    if shared:
        raise TraceError(
            f"forward writes to memory that several tensors share: {some(sorted(shared))}. A recorded tensor does not "
            "see what is written to another: register one of them, and make the others of it in forward (self.flat[:4])"
        )


def refuse_unknown_shapes(module: torch.nn.Module, exported: torch.export.ExportedProgram, mode: str, why: str) -> None:
    """Shapes that depend on values, which XLA has none of; `why` a mask does not do in their place."""
    lines = []
    for node in exported.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", None)
        if node.op == "call_function" and shape is not None and private.depends_on_values(shape):
            lines.append(f"  {node.target}, in {module_path(node) or 'the module itself'} ({source_line(node)})")
    if lines:
        message = (
            f"{type(module).__name__} in {mode} mode has shapes that depend on values (boolean indices, nonzero, ...), "
            "which jax.jit cannot compile; torch.where keeps the shape:\n"
            + "\n".join(lines)
            + (f"\nNo mask does in their place, because of {why}" if why else "")
        )
        if mode == "train":
            raise TraceError(message)
        logger.warning("%s", message)  # what follows the network in eval can run outside jit


def explained(module: torch.nn.Module, mode: str, error: Exception) -> str:
    text = str(error).strip().split("\n\nThe following call raised")[0]
    if type(error).__name__.startswith("GuardOnDataDependent"):
        text = text.partition("\n")[0]  # how to debug torch.export follows
    advice = "Shapes and control flow may depend on the shapes of the inputs, not on their values."
    if unknown := re.search(r"Found <class '(.+?)'> in output", text):
        text = f"it returns a {unknown[1]}"
        advice = (
            "Results are tensors, numbers, and tuples, lists, dicts and dataclasses of them. Have the module leave it "
            f"out (config.use_cache = False, say), or register its type with {private.REGISTER_TYPES}"
        )
    if constant := re.search(r"Constant (\S+) is mutated in the forward method", text):
        name = "" if constant[1].startswith("lifted_tensor") else f" {constant[1]}"
        text = f"forward writes to the tensor{name}, which is neither a parameter nor a buffer"
        advice = "Make it a buffer (register_buffer): a graph has no other state."
    place = users_line(error)
    return (
        f"torch.export cannot record {type(module).__name__} in {mode} mode{place}\n{type(error).__name__}: {text}\n"
        f"{advice}"
    )


def users_line(error: BaseException | None) -> str:
    """Where the module's own code was when it happened: the innermost line that is no other's."""
    # Other code that may be on the way there.
    packages = [sys.modules[name] for name in ("torch", "interop", "jaxtyping") if name in sys.modules]
    others = ("<", *(str(pathlib.Path(str(package.__file__)).parent) for package in packages))
    found = ""
    while error is not None:  # to the first cause: what torch.export raises itself was not raised in that code
        for frame in traceback.extract_tb(error.__traceback__):
            path = pathlib.Path(frame.filename)
            if not frame.filename.startswith(others) and path.name not in ("contextlib.py", "functools.py"):
                found = f" at {path.parent.name}/{path.name}:{frame.lineno}: {frame.line}"
        error = error.__cause__
    return found


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)
