"""BatchNorm layers as single nodes of a traced graph: `jaxnorm.batch_norm(x, path)`.

While a module is traced, the forward of PyTorch's own BatchNorm layers emits the node in place of its arithmetic; a
layer that brings a forward of its own (timm's BatchNormAct2d, say) keeps it, and the call of `F.batch_norm` inside it
emits the node. Counters, `momentum=None`, process groups and the choice between batch and running statistics stay out
of the graph, and belong to the `jaxnorm.nnx.BatchNorm` module that the node calls. `F.batch_norm` called elsewhere is
traced like any function, and so is a layer that does more than its node says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

from interop.tracing import private


@functools.cache
def _operation() -> Callable[[Any, str], Any]:
    import torch

    def batch_norm(x: Any, path: Any) -> Any:
        raise RuntimeError(
            "jaxnorm::batch_norm stands for a BatchNorm layer in a traced graph, and cannot run in PyTorch"
        )

    schema = "(Tensor x, str path) -> Tensor"  # given, not inferred: annotations may be wrapped by a type checker
    custom = torch.library.custom_op("jaxnorm::batch_norm", batch_norm, mutates_args=(), schema=schema)
    custom.register_fake(lambda x, path: torch.empty_like(x))
    # Where nothing uses its output, the layer's statistics move all the same: the node stays.
    private.keep(torch.ops.jaxnorm.batch_norm.default)
    return custom


def unshare(root: Any) -> None:
    """Leaves a shared layer that holds BatchNorm at its first place, and puts a stand-in that calls it at every other.

    torch.export cannot make a graph functional in which the buffers of a BatchNorm layer have two names.
    """
    import torch

    class StandIn(torch.nn.Module):
        """Calls a layer that is no part of it."""

        def __init__(self, layer: Any):
            super().__init__()
            self.__dict__["layer"] = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["layer"], name)

    batch_norm = private.batch_norm_class()
    seen: set[Any] = set()
    for parent in list(root.modules()):
        for name, layer in private.children(parent).items():
            if layer is not None and layer in seen and any(isinstance(part, batch_norm) for part in layer.modules()):
                private.children(parent)[name] = StandIn(layer)
            seen.add(layer)


class _Counter:
    """Stands for `num_batches_tracked` while a layer's own forward is traced: counting leaves no trace in the graph."""

    counted = False

    def add_(self, *_: Any) -> _Counter:
        self.counted = True
        return self

    __add__ = __iadd__ = add_

    def __float__(self) -> float:
        return 1.0

    item = __float__


@dataclasses.dataclass
class Counters:
    """What became of the layers, once the trace is over: the paths of those that"""

    left_alone: set[str] = dataclasses.field(default_factory=set)  # normalise by F.batch_norm, and do not count
    own: set[str] = dataclasses.field(default_factory=set)  # do more than their node says: see `opaque_batch_norms`


def _tensors(layer: Any) -> list[Any]:
    """The layer's running_mean, running_var, weight and bias; something new for what is not registered on it.

    That is a weight which a parametrization, pruning or the module's own code computes.
    """
    held = {**private.parameters(layer), **private.buffers(layer)}
    return [held.get(name, object()) for name in ("running_mean", "running_var", "weight", "bias")]


def _flags(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("training", "track_running_stats", "momentum", "eps")}


def _same(tensors: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(tensors, others, strict=True))


class _Watch:
    """What the layers hold when the model's forward begins, and whether its graph uses their buffers."""

    def __init__(self, layers: Iterable[Any]):
        self.layers = list(layers)
        self.tensors: dict[Any, list[Any]] = {}
        self._inputs: dict[Any, list[Any]] = {}

    def begin(self, *_: Any) -> None:
        for layer in self.layers:
            self.tensors[layer] = _tensors(layer)
            names = ("running_mean", "running_var", "num_batches_tracked")
            buffers = [buffer for name in names if (buffer := private.buffers(layer).get(name)) is not None]
            self._inputs[layer] = private.graph_inputs(buffers)

    def used(self, layer: Any) -> bool:
        """Whether anything but the layer's own nodes reads or writes its buffers."""
        return any(node.users for node in self._inputs[layer])


@contextlib.contextmanager
def opaque_batch_norms(root: Any, own_counters: Set[str] = frozenset()) -> Iterator[Counters]:
    """For the time of a trace: every BatchNorm layer of `root` is one node. Not for several threads at once.

    A node is the layer as it was imported. A layer that does more is recorded as the functions that it calls, its
    counter a buffer like any other: one called with other flags, tensors or arguments than its own, one whose running
    statistics the graph uses or changes by itself, one whose arithmetic is all its own. Only a trace shows which
    layers these are (`Counters.own`); their paths are the `own_counters` of the next one. So is `root` recorded
    where it is such a layer, since no module of the tree stands for it.
    """
    import torch

    batch_norm, sync_batch_norm = private.batch_norm_class(), torch.nn.SyncBatchNorm
    emit = _operation()
    layers = {layer: path for path, layer in root.named_modules() if path and isinstance(layer, batch_norm)}
    # By their __dict__: where any layer is shared, an activation say, torch.export hands out proxies of all layers
    # (_ModuleStackTracer.AttrProxy), which have a layer's __dict__ and an identity of their own.
    known = {id(vars(layer)): layer for layer in layers}
    found = {layer: _flags(layer) for layer in layers}
    expected: dict[Any, dict[str, Any]] = {}
    calls: list[Any] = []
    emitted: set[Any] = set()
    normalised: set[Any] = set()
    counters = Counters()
    watch = _Watch(layers)

    def as_imported(layer: Any) -> bool:
        return _flags(layer) == expected[layer] and _same(_tensors(layer), watch.tensors[layer])

    def node(layer: Any, input: Any) -> Any:
        emitted.add(layer)
        return emit(input, layers[layer])

    def standard(layer: Any, input: Any) -> Any:
        mine = known.get(id(vars(layer)))  # None where the user's code calls a layer that is no part of the tree
        if mine is not None and layers[mine] not in own_counters:
            if as_imported(mine):
                private.input_check(layer)(input)
                return node(mine, input)
            counters.own.add(layers[mine])
        original = originals[sync_batch_norm if isinstance(layer, sync_batch_norm) else batch_norm]
        averages = layer.momentum is None and layer.num_batches_tracked is not None
        if not (averages and layer.training and layer.track_running_stats):
            return original(layer, input)
        # The share of the batch is float(num_batches_tracked), which no graph has: its statistics, and then their part.
        moments = layer.running_mean, layer.running_var
        before = [running.clone() for running in moments]
        layer.momentum = 1.0
        y = original(layer, input)
        layer.momentum = None
        with torch.no_grad():
            for running, old in zip(moments, before, strict=True):
                running.copy_(old + (running - old) / layer.num_batches_tracked)
        return y

    def own(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(layer)
            try:
                return forward(*args, **kwargs)
            finally:
                calls.pop()

        return called

    function = torch.nn.functional.batch_norm

    @functools.wraps(function)
    def functional(
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: Any = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if calls and layers[calls[-1]] not in own_counters:
            layer = calls[-1]
            # What _BatchNorm.forward would give, in torch/nn/modules/batchnorm.py.
            mean, var, *affine = _tensors(layer)
            given = None if layer.training and not layer.track_running_stats else mean
            moments = [given, None if given is None else var]
            if (
                as_imported(layer)
                and _same((running_mean, running_var, weight, bias), (*moments, *affine))
                and training == (layer.training or mean is None)
                and (momentum == layer.momentum or not training or given is None)
                and eps == layer.eps
            ):
                normalised.add(layer)
                return node(layer, input)
            counters.own.add(layers[layer])
        return function(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def end(*_: Any) -> None:
        counters.own.update(layers[layer] for layer in emitted if watch.used(layer))

    originals = {cls: cls.forward for cls in (batch_norm, sync_batch_norm)}
    masked = []
    hooks = [root.register_forward_pre_hook(watch.begin, prepend=True), root.register_forward_hook(end)]
    try:
        for layer in layers:
            if type(layer).forward not in originals.values() or "forward" in vars(layer):
                masked.append((layer, private.buffers(layer).get("num_batches_tracked"), vars(layer).get("forward")))
                layer.forward = own(layer, layer.forward)
                if layers[layer] in own_counters:
                    continue
                layer.momentum = 0.1 if layer.momentum is None else layer.momentum
                if private.buffers(layer).pop("num_batches_tracked", None) is not None:
                    vars(layer)["num_batches_tracked"] = _Counter()
                else:
                    private.buffers(layer)["num_batches_tracked"] = None
        for layer in layers:  # in eval, the layers of the imported model all are, whatever PyTorch's do
            expected[layer] = {**_flags(layer), "training": layer.training and root.training}
        for cls in originals:
            cls.forward = standard
        torch.nn.functional.batch_norm = functional
        yield counters
    finally:
        torch.nn.functional.batch_norm = function
        for hook in hooks:
            hook.remove()
        for cls, forward in originals.items():
            cls.forward = forward
        for layer, counter, forward in masked:
            stand_in = vars(layer).pop("num_batches_tracked", None)
            if isinstance(stand_in, _Counter) and (layer in normalised) != stand_in.counted:
                (counters.own if stand_in.counted else counters.left_alone).add(layers[layer])
            if layers[layer] not in own_counters:
                private.buffers(layer)["num_batches_tracked"] = counter
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
        for layer, flags in found.items():  # which the model's own code may have set
            vars(layer).update(flags)
