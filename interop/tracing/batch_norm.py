"""A traced model's BatchNorm layers become `jaxnorm.nnx.BatchNorm` layers, so that they can be synchronised.

Each call of such a layer is one node of the graph, `jaxnorm.batch_norm(x, path)`, which stands for the layer at that
path. The layer decides the rest: batch or running statistics, counters, `momentum=None`, process groups.

- PyTorch's own BatchNorm classes: their forward is replaced by the node while a module is traced.
- A layer with a forward of its own (timm's BatchNormAct2d, say): that forward is traced, and the `F.batch_norm` in it
  becomes the node.
- Other libraries' layers, whose code cannot be traced: what stands in for it (`synchronised.py`).
- `F.batch_norm` called elsewhere, and a layer that does more than its node would: traced like any function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Set
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.graph import written_by
from interop.tracing.inplace import storages
from interop.tracing.synchronised import is_batch_norm

if TYPE_CHECKING:
    import torch

_AFFINE = ("weight", "bias")
_READ = ("running_mean", "running_var", *_AFFINE, "num_batches_tracked")  # what a layer reads of itself


@functools.cache
def _operation() -> Callable[[torch.Tensor, str], torch.Tensor]:
    import torch

    def batch_norm(x: torch.Tensor, path: str, *_: object) -> torch.Tensor:
        raise RuntimeError(
            "jaxnorm::batch_norm stands for a BatchNorm layer in a traced graph, and cannot run in PyTorch"
        )

    # Given, not inferred: annotations may be wrapped by a type checker.
    schema = "(Tensor x, str path, Tensor? mask=None, int row_dim=0) -> Tensor"
    custom = torch.library.custom_op("jaxnorm::batch_norm", batch_norm, mutates_args=(), schema=schema)
    custom.register_fake(lambda x, path, mask=None, row_dim=0: torch.empty_like(x))
    # Where nothing uses its output, the layer's statistics move all the same: the node stays.
    private.keep(torch.ops.jaxnorm.batch_norm.default)
    return custom


def unshare(root: torch.nn.Module) -> None:
    """Leaves a shared layer that holds BatchNorm or buffers at its first place, and puts a stand-in that calls it at
    every other.

    torch.export cannot make a graph functional in which buffers that forward writes have two names.
    """
    import torch

    class StandIn(torch.nn.Module):
        """Calls a layer that is no part of it."""

        def __init__(self, layer: torch.nn.Module):
            super().__init__()
            self.__dict__["layer"] = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["layer"], name)

    def keeps(part: torch.nn.Module) -> bool:
        return is_batch_norm(part) or bool(private.buffers(part))

    seen: set[torch.nn.Module] = set()
    for parent in list(root.modules()):
        for name, layer in private.children(parent).items():
            if layer is not None and layer in seen and any(map(keeps, layer.modules())):
                private.children(parent)[name] = StandIn(layer)
            seen.add(layer)


class _Counter:
    """Stands for `num_batches_tracked` while a layer's own forward is traced: counting leaves no trace in the graph."""

    counted = False

    def add_(self, *_: object) -> _Counter:
        self.counted = True
        return self

    __add__ = __iadd__ = add_

    def __float__(self) -> float:
        return 1.0

    item = __float__


@dataclasses.dataclass
class Counters:
    """What became of the layers, by their paths, once the trace is over.

    Attributes:
        left_alone: layers that normalise by F.batch_norm and do not count.
        own: layers that do more than their node says; see `opaque_batch_norms`.
    """

    left_alone: set[str] = dataclasses.field(default_factory=set)
    own: set[str] = dataclasses.field(default_factory=set)


def _tensors(layer: torch.nn.Module) -> list[object]:
    """The layer's running_mean, running_var, weight and bias; something new for what is not registered on it.

    That is a weight which a parametrization, pruning or the module's own code computes.
    """
    held = {**private.parameters(layer), **private.buffers(layer)}
    return [held.get(name, object()) for name in _READ[:4]]


def _flags(layer: torch.nn.Module) -> dict[str, bool | float | None]:
    return {name: getattr(layer, name) for name in ("training", "track_running_stats", "momentum", "eps")}


def _same(tensors: Iterable[object], others: Iterable[object]) -> bool:
    return all(a is b for a, b in zip(tensors, others, strict=True))


@contextlib.contextmanager
def opaque_batch_norms(root: torch.nn.Module, own_counters: Set[str] = frozenset()) -> Iterator[Counters]:
    """For the time of a trace: every BatchNorm layer of `root` is one node. Not for several threads at once.

    A node is the layer as it was imported. A layer that does more is recorded as the functions that it calls, its
    counter a buffer like any other: one called with other flags, tensors or arguments than its own, one whose running
    statistics the graph uses or changes by itself, one whose arithmetic is all its own. Only a trace shows which
    layers these are (`Counters.own`); their paths are the `own_counters` of the next one. So is `root` recorded
    where it is such a layer, since no module of the tree stands for it.
    """
    recording = _Recording(root, own_counters)
    try:
        recording.start()
        yield recording.counters
    finally:
        recording.stop()


class _Recording:
    """One trace: what stands in for BatchNorm's code, and what was seen of each layer."""

    def __init__(self, root: torch.nn.Module, own_counters: Set[str]):
        import torch

        self.counters = Counters()
        self._root, self._own_counters = root, own_counters
        self._emit = _operation()
        kinds = (private.batch_norm_class(), torch.nn.SyncBatchNorm)
        self._paths = {layer: path for path, layer in root.named_modules() if path and is_batch_norm(layer)}
        # By their __dict__: where any layer is shared, an activation say, torch.export hands out proxies of all layers
        # (_ModuleStackTracer.AttrProxy), which have a layer's __dict__ and an identity of their own.
        self._known = {id(vars(layer)): layer for layer in self._paths}
        self._forwards = {cls: cls.forward for cls in kinds}
        self._function = torch.nn.functional.batch_norm
        self._found = {layer: _flags(layer) for layer in self._paths}  # as the user left them
        self._expected: dict[
            torch.nn.Module, dict[str, bool | float | None]
        ] = {}  # flags of a layer that is as it was imported
        self._tensors: dict[torch.nn.Module, list[object]] = {}  # what it holds when the model's forward begins
        self._inputs: dict[torch.nn.Module, dict[str, torch.fx.Node]] = {}  # the graph's nodes for what it reads
        self._within: list[
            torch.nn.Module
        ] = []  # layers with a forward of their own that are being called, the innermost last
        self._emitted: set[torch.nn.Module] = set()
        self._normalised: set[torch.nn.Module] = set()
        # layer, counter, forward of its own
        self._masked: list[tuple[torch.nn.Module, torch.Tensor | None, Callable[..., Any] | None]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Puts the stand-ins in their places."""
        import torch

        self._hooks = [
            self._root.register_forward_pre_hook(self._begin, prepend=True),
            self._root.register_forward_hook(self._end),
        ]
        for layer in self._paths:
            if type(layer).forward not in self._forwards.values() or "forward" in vars(layer):
                self._mask(layer)
        for layer in self._paths:  # in eval, the layers of the imported model all are, whatever PyTorch's do
            self._expected[layer] = {**_flags(layer), "training": layer.training and self._root.training}
        for cls in self._forwards:
            cls.forward = lambda layer, input: self._standard(layer, input)
        torch.nn.functional.batch_norm = functools.wraps(self._function)(lambda *a, **k: self._functional(*a, **k))

    def stop(self) -> None:
        """Puts everything back, and finishes `counters`."""
        import torch

        torch.nn.functional.batch_norm = self._function
        for hook in self._hooks:
            hook.remove()
        for cls, forward in self._forwards.items():
            cls.forward = forward
        for layer, counter, forward in self._masked:
            stand_in = vars(layer).pop("num_batches_tracked", None)
            if isinstance(stand_in, _Counter) and (layer in self._normalised) != stand_in.counted:
                (self.counters.own if stand_in.counted else self.counters.left_alone).add(self._paths[layer])
            if self._paths[layer] not in self._own_counters:
                private.buffers(layer)["num_batches_tracked"] = counter
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
        for layer, flags in self._found.items():  # which the model's own code may have set
            vars(layer).update(flags)

    def _mask(self, layer: torch.nn.Module) -> None:
        """A layer with a forward of its own: its calls are known as such, and its counter leaves no trace."""
        buffers, forward = private.buffers(layer), layer.forward
        self._masked.append((layer, buffers.get("num_batches_tracked"), vars(layer).get("forward")))

        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            self._within.append(layer)
            try:
                return forward(*args, **kwargs)
            finally:
                self._within.pop()

        layer.forward = called
        if self._paths[layer] in self._own_counters:
            return
        layer.momentum = 0.1 if layer.momentum is None else layer.momentum
        if buffers.pop("num_batches_tracked", None) is not None:
            vars(layer)["num_batches_tracked"] = _Counter()
        else:
            buffers["num_batches_tracked"] = None

    def _begin(self, *_: object) -> None:
        """The model's forward begins."""
        for layer in self._paths:
            self._tensors[layer] = _tensors(layer)
            held = {**private.parameters(layer), **private.buffers(layer)}
            self._inputs[layer] = {
                name: private.graph_nodes([held[name]])[0] for name in _READ if held.get(name) is not None
            }

    def _end(self, *_: object) -> None:
        """It ends. A layer does more than its node says where anything else reads or writes its running statistics, or
        writes its weight or bias: the node stands for what these hold when the model is called."""
        graphs = {node.graph for inputs in self._inputs.values() for node in inputs.values()}
        targets = {target for graph in graphs for node in graph.nodes for target in written_by(node)}
        memory = {storage for target in targets for storage in storages(target)}
        for layer in self._emitted:
            inputs = self._inputs[layer]
            moved = any(node.users for name, node in inputs.items() if name not in _AFFINE)
            if moved or any(node in targets or memory.intersection(storages(node)) for node in inputs.values()):
                self.counters.own.add(self._paths[layer])

    def _as_imported(self, layer: torch.nn.Module) -> bool:
        return _flags(layer) == self._expected[layer] and _same(_tensors(layer), self._tensors[layer])

    def _node(self, layer: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        self._emitted.add(layer)
        return self._emit(input, self._paths[layer])

    def _standard(self, layer: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        """Stands in for the forward of PyTorch's own layers."""
        mine = self._known.get(id(vars(layer)))  # None where the user's code calls a layer that is no part of the tree
        if mine is not None and self._paths[mine] not in self._own_counters:
            if self._as_imported(mine):
                private.input_check(layer)(input)
                return self._node(mine, input)
            self.counters.own.add(self._paths[mine])
        plain, sync = self._forwards
        original = self._forwards[sync if isinstance(layer, sync) else plain]
        averages = layer.momentum is None and layer.num_batches_tracked is not None
        if averages and layer.training and layer.track_running_stats:
            return _averaged(layer, input, original)
        return original(layer, input)

    def _functional(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Stands in for F.batch_norm: the node of the layer that calls it, if with what that layer holds."""
        layer = self._within[-1] if self._within else None
        if layer is not None and self._paths[layer] not in self._own_counters:
            # What _BatchNorm.forward would give, in torch/nn/modules/batchnorm.py.
            mean, var, *affine = _tensors(layer)
            given = None if layer.training and not layer.track_running_stats else mean
            moments = [given, None if given is None else var]
            if (
                self._as_imported(layer)
                and _same((running_mean, running_var, weight, bias), (*moments, *affine))
                and training == (layer.training or mean is None)
                and (momentum == layer.momentum or not training or given is None)
                and eps == layer.eps
            ):
                self._normalised.add(layer)
                return self._node(layer, input)
            self.counters.own.add(self._paths[layer])
        return self._function(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _averaged(
    layer: torch.nn.Module, input: torch.Tensor, forward: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A layer with a cumulative average. The share of the batch is float(num_batches_tracked), which no graph has: its
    statistics, and then their part."""
    import torch

    moments = layer.running_mean, layer.running_var
    before = [running.clone() for running in moments]
    layer.momentum = 1.0
    y = forward(layer, input)
    layer.momentum = None
    with torch.no_grad():
        for running, old in zip(moments, before, strict=True):
            running.copy_(old + (running - old) / layer.num_batches_tracked)
    return y
