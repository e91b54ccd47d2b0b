"""BatchNorm layers as single nodes of a traced graph: `jaxnorm.batch_norm(x, path)`.

While a module is traced, the forward of PyTorch's own BatchNorm layers emits the node in place of its arithmetic; a
layer that brings a forward of its own (timm's BatchNormAct2d, say) keeps it, and the call of `F.batch_norm` inside it
emits the node. Counters, `momentum=None`, process groups and the choice between batch and running statistics stay out
of the graph, and belong to the `jaxnorm.nnx.BatchNorm` module that the node calls. `F.batch_norm` called elsewhere is
traced like any function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Set
from typing import Any

OPERATION = "jaxnorm.batch_norm.default"


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
    torch.fx.has_side_effect(torch.ops.jaxnorm.batch_norm.default)
    return custom


def unshare(root: Any) -> None:
    """Leaves a shared layer that holds BatchNorm at its first place, and puts a stand-in that calls it at every other.

    torch.export cannot make a graph functional in which the buffers of a BatchNorm layer have two names.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    class StandIn(torch.nn.Module):
        """Calls a layer that is no part of it."""

        def __init__(self, layer: Any):
            super().__init__()
            self.__dict__["layer"] = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["layer"], name)

    seen: set[Any] = set()
    for parent in list(root.modules()):
        for name, layer in parent._modules.items():
            if layer is not None and layer in seen and any(isinstance(part, _BatchNorm) for part in layer.modules()):
                parent._modules[name] = StandIn(layer)
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
    """What became of the counters, once the trace is over: the paths of layers with a forward of their own that"""

    left_alone: set[str] = dataclasses.field(default_factory=set)  # normalise by F.batch_norm, and do not count
    own: set[str] = dataclasses.field(default_factory=set)  # do not normalise by F.batch_norm, and count


@contextlib.contextmanager
def opaque_batch_norms(root: Any, own_counters: Set[str] = frozenset()) -> Iterator[Counters]:
    """For the time of a trace: every BatchNorm layer of `root` is one node. Not for several threads at once.

    The counters of the layers at the paths `own_counters` are buffers like any other. That is needed for a layer whose
    arithmetic is all its own, which only a trace shows: see `Counters.own`.
    """
    import torch
    from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

    emit = _operation()
    layers = {layer: path for path, layer in root.named_modules() if isinstance(layer, _BatchNorm)}
    # By their __dict__: where any layer is shared, an activation say, torch.export hands out proxies of all layers
    # (_ModuleStackTracer.AttrProxy), which have a layer's __dict__ and an identity of their own.
    paths = {id(vars(layer)): path for layer, path in layers.items()}
    calls: list[Any] = []
    normalised: set[Any] = set()
    counters = Counters()

    def standard(layer: Any, input: Any) -> Any:
        if id(vars(layer)) not in paths:  # called by the user's code, and no part of the tree
            return originals[SyncBatchNorm if isinstance(layer, SyncBatchNorm) else _BatchNorm](layer, input)
        layer._check_input_dim(input)
        return emit(input, paths[id(vars(layer))])

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
        if calls and eps == calls[-1].eps:
            layer = calls[-1]
            given = (
                (running_mean, layer.running_mean),
                (running_var, layer.running_var),
                (weight, layer.weight),
                (bias, layer.bias),
            )
            if all(mine is None or mine is theirs for mine, theirs in given):
                normalised.add(layer)
                return emit(input, layers[layer])
        return function(input, running_mean, running_var, weight, bias, training, momentum, eps)

    originals = {_BatchNorm: _BatchNorm.forward, SyncBatchNorm: SyncBatchNorm.forward}
    masked = []
    try:
        for layer in layers:
            if type(layer).forward not in originals.values() or "forward" in vars(layer):
                masked.append(
                    (layer, layer.momentum, layer._buffers.get("num_batches_tracked"), vars(layer).get("forward"))
                )
                layer.forward = own(layer, layer.forward)
                if layers[layer] in own_counters:
                    continue
                layer.momentum = 0.1 if layer.momentum is None else layer.momentum
                if layer._buffers.pop("num_batches_tracked", None) is not None:
                    vars(layer)["num_batches_tracked"] = _Counter()
                else:
                    layer._buffers["num_batches_tracked"] = None
        for cls in originals:
            cls.forward = standard
        torch.nn.functional.batch_norm = functional
        yield counters
    finally:
        torch.nn.functional.batch_norm = function
        for cls, forward in originals.items():
            cls.forward = forward
        for layer, momentum, counter, forward in masked:
            layer.momentum = momentum
            stand_in = vars(layer).pop("num_batches_tracked", None)
            if isinstance(stand_in, _Counter) and (layer in normalised) != stand_in.counted:
                (counters.own if stand_in.counted else counters.left_alone).add(layers[layer])
            if layers[layer] not in own_counters:
                layer._buffers["num_batches_tracked"] = counter
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
