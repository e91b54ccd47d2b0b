"""torch.nn.Module -> Model: both modes traced by torch.export, as plain data.

`torch.export` records the operations of one call with a varying batch size; `run_decompositions({})` makes the record
functional: no in-place operation is left, and what the call writes into buffers is listed as outputs. Both modes are
recorded, since Python control flow depends on `self.training`, and the two records share one state.

The module is left as it was found, also after an exception (`snapshot.py`), and each record begins with it as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.arrays import dtype_name
from interop.errors import TraceError
from interop.program import structure
from interop.program.nodes import Model, Program
from interop.program.operations import BATCH_NORM
from interop.program.regions import live
from interop.tracing import private
from interop.tracing.answers import Answers
from interop.tracing.batch_norm import opaque_batch_norms
from interop.tracing.batch_of_one import report_single
from interop.tracing.caught import Caught
from interop.tracing.changes import Changes
from interop.tracing.custom_gradients import CustomGradientError, checked_gradients
from interop.tracing.decompositions import decomposed
from interop.tracing.graph import GraphReader, size_guards
from interop.tracing.hooks import beyond_observers, report_gradient_hooks
from interop.tracing.inplace import make_functional, stop_gradients
from interop.tracing.known import fixed
from interop.tracing.masks import without_unknown_sizes
from interop.tracing.modes import Modes
from interop.tracing.own_backward import nested
from interop.tracing.refusals import (
    explained,
    refuse_other_arguments,
    refuse_shared_writes,
    refuse_unknown_shapes,
    refuse_untraceable,
    some,
)
from interop.tracing.rewrites import rewritten
from interop.tracing.snapshot import left_as_found
from interop.tracing.state import Constants, read_batch_norms, read_state
from interop.tracing.synchronised import in_one_process

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")
_lock = threading.RLock()


def trace(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_dims: Collection[int] = (0,)
) -> tuple[Model, dict[str, np.ndarray]]:
    """Records what `module(*args, **kwargs)` does in train mode and in eval mode.

    Arguments:
        module: a `torch.nn.Module`, in either mode. In train mode, layers that are in eval mode count as frozen. In
            eval mode, `module.train()` says what training means, and layers still in eval mode after it count as
            frozen.
        args, kwargs: example inputs; tensors may hold anything, only shapes and dtypes matter.
        dynamic_dims: the dimensions of every input tensor that may vary from call to call.

    Returns:
        The model, and the arrays of its state by name. Arrays share no memory with the module's tensors only where
        dtypes differ; copy them before either side is changed.

    Raises:
        TypeError, ValueError: for arguments of other kinds, and for inputs that forward does not take.
        TraceError: if PyTorch cannot record the module.

    Warns:
        UserWarning: if its state dict has entries that are no parameters or buffers.
    """
    import torch

    refuse_other_arguments(module, args, kwargs, dynamic_dims)
    refuse_untraceable(module, args, kwargs)
    args, keywords = _traceable_batch((args, dict(kwargs)))
    with (
        _lock,
        torch.compiler.set_stance("force_eager"),  # what torch.compile made runs as what it was made of
        warnings.catch_warnings(),
        left_as_found(module, (args, keywords)) as found,
    ):
        warnings.simplefilter("ignore")  # torch.export warns about itself; what fails is raised
        flags = {path: layer.training for path, layer in module.named_modules()}
        entries, arrays, others = read_state(module)
        layers = read_batch_norms(module)
        constants = Constants()
        report_gradient_hooks(module)
        modes = Modes(module, found)
        programs = {}
        uncounted: dict[str, set[str]] = {}
        for mode in ("train", "eval"):
            record = functools.partial(_record, module, args, keywords, tuple(dynamic_dims), constants, modes, mode)
            programs[mode], uncounted[mode] = beyond_observers(record, modes, mode, module, args, keywords)
        modes.report_sampling()
    if others:
        warnings.warn(
            f"the imported model lacks what the state dict of {type(module).__name__} has besides its parameters and "
            f"buffers (extra state, say): {', '.join(others)}. Add it to interop.state_dict(model) before "
            "load_state_dict(strict=True)",
            stacklevel=3,
        )
    layers = tuple(
        dataclasses.replace(layer, frozen=first in modes.frozen, counts=first not in uncounted["train"])
        for layer, first in ((layer, layer.same_as or layer.path) for layer in layers)
    )
    if any(layer.frozen for layer in layers):
        logger.warning("BatchNorm frozen at import: %d layers", sum(layer.frozen for layer in layers))
    written = [entry.name for entry in entries if entry.kind == "parameter" and entry.name in programs["train"].updates]
    if written:
        logger.warning(
            "forward writes to parameters that train (%s): calls keep what they write, and a step that differentiates "
            "with respect to these parameters goes on from what they were before its call. Let them not require "
            "gradients if they are not to train",
            some(written),
        )
    nodes = {node.args[1] for node in programs["train"].nodes if node.operation == BATCH_NORM}
    apart = [layer.path for layer in layers if (layer.same_as or layer.path) not in nodes]
    if apart:
        logger.warning(
            "BatchNorm layers that are not called, or whose arithmetic is their own: convert_sync_batchnorm has no "
            "effect on %s",
            ", ".join(path or "the module itself" for path in apart),
        )
    arrays.update(constants.arrays)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = {f"{layer.path}.{name}".lstrip(".") for layer in layers if not layer.frozen for name in statistics}
    moved = moved.union(*(program.updates for program in programs.values()))
    model = Model(
        name=type(module).__name__,
        entries=(*fixed(entries, arrays, constants.read, moved), *constants.entries),
        batch_norms=layers,
        modules=flags,
        train=programs["train"],
        eval=programs["eval"],
        torch=torch.__version__,
        default_dtype=dtype_name(torch.get_default_dtype()),
    )
    return model, arrays


def _traceable_batch(
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with one example, doubled: torch.export takes a size of 1 for a constant."""
    import torch

    leaves, spec = private.flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if tensors and all(tensor.shape[0] == 1 for tensor in tensors):
        leaves = [torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf for leaf in leaves]
    return private.unflatten(leaves, spec)


def _record(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_dims: tuple[int, ...],
    constants: Constants,
    modes: Modes,
    mode: str,
) -> tuple[Program, set[str]]:
    """The graph of one mode, and the BatchNorm layers that leave their counter alone in it."""
    import torch

    def sizes(leaf: object) -> dict[int, object] | None:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {dim: torch.export.Dim.AUTO for dim in dynamic_dims if dim < leaf.ndim and leaf.shape[dim] > 1}

    leaves, spec = private.flatten((args, kwargs))
    shapes = private.unflatten([sizes(leaf) for leaf in leaves], spec)
    signature = _called_signature(module, args, kwargs)
    by_argument = dict(signature.bind(*shapes[0], **shapes[1]).arguments)
    own_counters: set[str] = set()
    while True:
        changes, answers, caught = Changes(module, modes.found), Answers(module), Caught()
        with (
            caught.watched(),
            in_one_process(module),
            opaque_batch_norms(module, own_counters) as counters,
            _plain_results(module, signature, changes),
            rewritten(answers),
            checked_gradients(),
        ):
            try:
                exported = torch.export.export(
                    _ordinary(module), args, kwargs, dynamic_shapes=by_argument, strict=False
                )
                refuse_shared_writes(exported)
                guards = size_guards(exported)
                if not make_functional(exported):
                    stop_gradients(exported.graph_module)
                    exported = decomposed(exported.run_decompositions({}))
            except CustomGradientError as error:
                raise TraceError(f"{type(module).__name__} in {mode} mode: {error}") from error
            except TraceError:
                raise
            except Exception as error:
                raise TraceError(explained(module, mode, error)) from error
        if counters.own <= own_counters:
            break
        own_counters |= counters.own
        modes.enter(mode)
    try:
        caught.refuse(answers.failed)
    except TraceError as error:
        raise TraceError(f"{type(module).__name__} in {mode} mode: {error}") from error
    refuse_unknown_shapes(module, exported, mode, without_unknown_sizes(exported))
    try:
        changes.report(exported, mode)
    except ValueError as error:
        raise TraceError(f"{type(module).__name__} in {mode} mode: {error}") from error
    answers.checks.report(mode)
    constants.read.update(answers.read)
    if mode == "eval":
        modes.enter(mode)
        report_single(module, exported, args, kwargs, _plain)
    return _program(module, exported, args, kwargs, constants, guards), counters.left_alone


def _ordinary(module: torch.nn.Module) -> torch.nn.Module:
    """A `torch.fx.GraphModule` as a module of another class: torch.export interprets the graph of such a root, without
    a call of the module or of its hooks (`_export_to_aten_ir` in torch/export/_trace.py)."""
    import torch

    if not isinstance(module, torch.fx.GraphModule):
        return module
    called = torch.nn.Module.__new__(type(type(module).__name__, (torch.nn.Module,), {}))
    object.__setattr__(called, "__dict__", vars(module))  # which has the forward that stands in for the module's own
    return called


def _called_signature(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.Signature:
    """The signature of `forward`, *args and **kwargs spelled out as this call gives them.

    Torch.export loses track of them.
    """
    known = list(inspect.signature(module.forward).parameters.values())
    if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in known):
        return inspect.Signature(known)
    names = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"argument_{index}" for index in range(len(names), len(args))]
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    positional = [inspect.Parameter(name, kinds[0]) for name in names[: len(args)]]
    return inspect.Signature([*positional, *(inspect.Parameter(name, kinds[1]) for name in kwargs)])


@contextlib.contextmanager
def _plain_results(module: torch.nn.Module, signature: inspect.Signature, changes: Changes) -> Iterator[None]:
    """Dataclass results become named tuples for the time of the trace: torch.export knows no others. What a call
    changes goes to `changes`."""
    forward = module.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return changes.watched(lambda: _plain(forward(*args, **kwargs)))

    plain.__signature__ = signature  # type: ignore[attr-defined]
    had = "forward" in vars(module)
    module.forward = plain
    try:
        yield
    finally:
        if had:
            module.forward = forward
        else:
            del module.forward


def _plain(result: Any) -> Any:
    if dataclasses.is_dataclass(result) and not isinstance(result, (type, dict)):
        fields = tuple(field.name for field in dataclasses.fields(result))
        values = (_plain(getattr(result, name)) for name in fields)
        return structure.named_type(type(result).__name__, fields)(*values)
    if type(result) is dict:
        return {key: _plain(item) for key, item in result.items()}
    if type(result) in (tuple, list):
        return type(result)(_plain(item) for item in result)
    return result


def _program(
    module: torch.nn.Module,
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    constants: Constants,
    guards: tuple[str, ...],
) -> Program:
    reader = GraphReader(module, exported, constants)
    reader.read()
    return Program(
        inputs=tuple(reader.inputs),
        signature=_signature(module, exported, reader, args, kwargs),
        nodes=live(nested(reader.nodes), (reader.output, reader.updates)),
        output=reader.output,
        updates=reader.updates,
        guards=guards,
    )


def _signature(
    module: torch.nn.Module,
    exported: torch.export.ExportedProgram,
    reader: GraphReader,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The structure of a call.

    Positional and keyword arguments, and the names under which positional ones may come too.
    """
    tree = reader.structure(private.call_structure(exported)[0], iter(reader.user_inputs))
    (positional, keywords) = tree[1]
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {
        "args": list(positional[1]),
        "kwargs": dict(keywords[1]),
        "names": [parameter.name for parameter in parameters if parameter.kind in plain],
    }
