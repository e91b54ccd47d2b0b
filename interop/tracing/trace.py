"""torch.nn.Module -> Model: both modes traced by torch.export, as plain data.

`torch.export` records the operations of one call with a varying batch size; `run_decompositions({})` makes the record
functional: no in-place operation is left, and what the call writes into buffers is listed as outputs. Both modes are
recorded, since Python control flow depends on `self.training`, and the two records share one state.

The module is left as it was found, also after an exception: training flags, buffers, attributes, hooks, random state.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import logging
import random
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.errors import TorchVersionError, TraceError
from interop.program import structure
from interop.program.nodes import Model, Node, Program
from interop.program.operations import BATCH_NORM, CHECK
from interop.tracing import private
from interop.tracing.answers import Answers
from interop.tracing.batch_norm import opaque_batch_norms, unshare
from interop.tracing.batch_of_one import report_single
from interop.tracing.custom_gradients import CustomGradientError, checked_gradients
from interop.tracing.decompositions import decomposed
from interop.tracing.graph import GraphReader, size_guards
from interop.tracing.hooks import beyond_observers, report_gradient_hooks
from interop.tracing.inplace import make_functional, stop_gradients
from interop.tracing.known import fixed
from interop.tracing.masks import without_unknown_sizes
from interop.tracing.refusals import explained, refuse_unknown_shapes, refuse_untraceable, some
from interop.tracing.rewrites import rewritten
from interop.tracing.state import Changes, Constants, read_batch_norms, read_state

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")
_lock = threading.RLock()


def trace(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_dims: Iterable[int] = (0,)
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
        TraceError: if PyTorch cannot record the module.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {type(module).__module__}.{type(module).__qualname__}")
    refuse_untraceable(module, args, kwargs)
    args, keywords = _traceable_batch((args, dict(kwargs)))
    with _lock, _left_as_found(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about itself; what fails is raised
        flags = {path: layer.training for path, layer in module.named_modules()}
        entries, arrays = read_state(module)
        layers = read_batch_norms(module)
        constants = Constants()
        report_gradient_hooks(module)
        modes = {layer: layer.training for layer in module.modules()}
        if not module.training:
            module.train()
        frozen = frozenset(path for path, layer in module.named_modules() if not layer.training)
        unshare(module)
        programs = {}
        uncounted: dict[str, set[str]] = {}
        for mode in ("train", "eval"):
            if mode == "eval":
                _evaluate(module, modes)
            record = functools.partial(_record, module, args, keywords, tuple(dynamic_dims), constants, mode)
            programs[mode], uncounted[mode] = beyond_observers(record, module, args, keywords)
    layers = tuple(
        dataclasses.replace(layer, frozen=first in frozen, counts=first not in uncounted["train"])
        for layer, first in ((layer, layer.same_as or layer.path) for layer in layers)
    )
    if any(layer.frozen for layer in layers):
        logger.warning("BatchNorm frozen at import: %d layers", sum(layer.frozen for layer in layers))
    nodes = {node.args[1] for node in programs["train"].nodes if node.operation == BATCH_NORM}
    apart = [layer.path for layer in layers if (layer.same_as or layer.path) not in nodes]
    if apart:
        logger.warning(
            "BatchNorm layers that are not called, or whose arithmetic is their own: convert_sync_batchnorm has no "
            "effect on %s",
            ", ".join(apart),
        )
    arrays.update(constants.arrays)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = {f"{layer.path}.{name}".lstrip(".") for layer in layers if not layer.frozen for name in statistics}
    written = moved.union(*(program.updates for program in programs.values()))
    model = Model(
        name=type(module).__name__,
        entries=(*fixed(entries, arrays, constants.read, written), *constants.entries),
        batch_norms=layers,
        modules=flags,
        train=programs["train"],
        eval=programs["eval"],
        torch=torch.__version__,
    )
    return model, arrays


def _evaluate(module: torch.nn.Module, modes: Mapping[torch.nn.Module, bool]) -> None:
    """To eval mode; a module that was in it keeps the layers that were in train mode all the same (dropout that samples
    in evaluation, say)."""
    module.eval()
    if modes[module]:
        return
    for layer, training in modes.items():
        layer.training = training
    batch_norm = private.batch_norm_class()
    names = [path for path, layer in module.named_modules() if layer.training and not isinstance(layer, batch_norm)]
    if names:
        logger.warning("in train mode at import inside a model in eval mode, and in its eval graph: %s", some(names))


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


@contextlib.contextmanager
def _left_as_found(module: torch.nn.Module) -> Iterator[None]:
    """Puts back every attribute of every layer, and random states."""
    import torch

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = []
    for layer in module.modules():
        attributes = dict(vars(layer))
        containers = {
            name: value.copy()
            for name, value in attributes.items()
            if isinstance(value, (dict, set, list, collections.deque))
        }
        found.append((layer, attributes, containers))
    try:
        yield
    finally:
        for put_back, state in zip((torch.set_rng_state, random.setstate, np.random.set_state), states, strict=True):
            put_back(state)
        for layer, attributes, containers in found:
            vars(layer).clear()
            vars(layer).update(attributes)
            for name, value in containers.items():
                attributes[name].clear()
                (attributes[name].update if isinstance(value, (dict, set)) else attributes[name].extend)(value)


def _record(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_dims: tuple[int, ...],
    constants: Constants,
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
        changes, answers = Changes(module), Answers(module)
        with (
            opaque_batch_norms(module, own_counters) as counters,
            _plain_results(module, signature, changes),
            rewritten(answers),
            checked_gradients(),
        ):
            try:
                exported = torch.export.export(module, args, kwargs, dynamic_shapes=by_argument, strict=False)
                guards = size_guards(exported)
                if not make_functional(exported):
                    stop_gradients(exported.graph_module)
                    exported = decomposed(exported.run_decompositions({}))
            except CustomGradientError as error:
                raise TraceError(f"{type(module).__name__} in {mode} mode: {error}") from error
            except TorchVersionError:
                raise
            except Exception as error:
                raise TraceError(explained(module, mode, error)) from error
        if counters.own <= own_counters:
            break
        own_counters |= counters.own
    refuse_unknown_shapes(module, exported, mode, without_unknown_sizes(exported))
    try:
        changes.report(exported, mode)
    except ValueError as error:
        raise TraceError(f"{type(module).__name__} in {mode} mode: {error}") from error
    answers.checks.report(mode)
    constants.read.update(answers.read)
    if mode == "eval":
        report_single(module, exported, args, kwargs, _plain)
    return _program(module, exported, args, kwargs, constants, guards), counters.left_alone


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
        with changes.watched():
            return _plain(forward(*args, **kwargs))

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
        nodes=_live(reader.nodes, (reader.output, reader.updates)),
        output=reader.output,
        updates=reader.updates,
        guards=guards,
    )


def _live(nodes: list[Node], results: Any) -> tuple[Node, ...]:
    """The nodes that the results depend on, checks, and BatchNorm layers, whose statistics move whoever uses their
    output."""
    from interop.program.nodes import value_names

    wanted, kept = set(value_names(results)), []
    for node in reversed(nodes):
        if node.name in wanted or node.operation in (BATCH_NORM, CHECK):
            wanted.update(value_names((node.args, node.kwargs)))
            kept.append(node)
    return tuple(reversed(kept))


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
