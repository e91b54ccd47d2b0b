"""BatchNorm layers of other libraries than PyTorch, which no trace can look into: CUDA code, collectives.

Such a layer is known by the class that its forward is of, and recorded as what that forward computes in one process:
`F.batch_norm` with what the layer holds, and what comes before and after it. So it becomes a `jaxnorm.nnx.BatchNorm`,
or a recorded `F.batch_norm`, like any layer with a forward of its own (`batch_norm.py`). A subclass with another
forward is traced by its own code.

| class | what it is |
|---|---|
| `apex.parallel.SyncBatchNorm`, both of them | BatchNorm; `channel_last`; `z` and `fuse_relu` where apex heeds them |
| `detectron2.layers.NaiveSyncBatchNorm` | BatchNorm; its own average of replicas is not kept, see below |
| `mmcv.ops.SyncBatchNorm` ("MMSyncBN") | BatchNorm. mmcv's "SyncBN" is PyTorch's own |
| `inplace_abn.ABN` | BatchNorm and an activation |
| `inplace_abn.InPlaceABN`, `InPlaceABNSync`; timm's `InplaceAbn` | the same, scaled by abs(weight) + eps |

Over replicas statistics are those of all values (`jaxnorm/moments.py`). NaiveSyncBatchNorm gives each replica, or with
stats_mode="N" each example, the same weight, which is the same where all replicas have as many values, and tracks the
biased variance there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from interop.errors import TraceError
from interop.tracing import private

if TYPE_CHECKING:
    import torch


def is_batch_norm(layer: torch.nn.Module) -> bool:
    """Whether a layer is PyTorch's BatchNorm, a subclass, or another library's that holds and calls the same."""
    return isinstance(layer, private.batch_norm_class()) or _name(layer) in _OWN_BASE


@contextlib.contextmanager
def in_one_process(root: torch.nn.Module) -> Iterator[None]:
    """For the time of a trace, the layers of `root` that are known here compute what they compute in one process.

    Raises:
        TraceError: for settings whose meaning is not known, naming the layer.
    """
    replaced = []
    try:
        for path, layer in root.named_modules():
            forward = _FORWARDS.get(_name(layer))
            if forward is not None and "forward" not in vars(layer):
                layer.forward = _bound(forward, layer, path)
                replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            vars(layer).pop("forward", None)


def _name(layer: torch.nn.Module) -> str:
    """The class that a layer's forward is of, by its module and name."""
    owner = next((cls for cls in type(layer).__mro__ if "forward" in vars(cls)), type(layer))
    return f"{owner.__module__}.{owner.__qualname__}"


def _bound(forward: Callable[..., Any], layer: torch.nn.Module, path: str) -> Callable[..., Any]:
    described = f"{path or 'the model itself'} ({_name(layer)})"
    if forward is _apex:

        def with_z(input: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
            return _apex(layer, input, z, described)

        return with_z

    def alone(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (input,) = (*args, *kwargs.values())
        result: torch.Tensor = forward(layer, input, described)
        return result

    return alone


def _normalised(layer: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's `_BatchNorm.forward`, in torch/nn/modules/batchnorm.py, with another weight."""
    import torch

    share = 0.0 if layer.momentum is None else layer.momentum
    tracked = getattr(layer, "track_running_stats", True)  # timm's InplaceAbn always does
    counter = getattr(layer, "num_batches_tracked", None)
    if layer.training and tracked and counter is not None:
        counter.add_(1)
        if layer.momentum is None:
            share = 1.0 / float(counter)
    used = not layer.training or tracked
    return torch.nn.functional.batch_norm(
        x,
        layer.running_mean if used else None,
        layer.running_var if used else None,
        weight,
        layer.bias,
        layer.training or layer.running_mean is None,
        share,
        layer.eps,
    )


def _plain(layer: Any, x: torch.Tensor, described: str) -> torch.Tensor:
    return _normalised(layer, x, layer.weight)


def _apex(layer: Any, x: torch.Tensor, z: torch.Tensor | None, described: str) -> torch.Tensor:
    """apex/parallel/optimized_sync_batchnorm.py and sync_batchnorm.py. Only its kernels for channels that lie last know
    `z` and `fuse_relu` (optimized_sync_batchnorm_kernel.py)."""
    last = getattr(layer, "channel_last", False) or x.dim() == 2
    relu = getattr(layer, "fuse_relu", False)
    if (z is not None or relu) and not last:
        raise TraceError(
            f"{described}: apex leaves {'z' if z is not None else 'fuse_relu'} out of what it computes where "
            "channel_last is False. Set channel_last=True, or add z and take the relu outside the layer"
        )
    y = _normalised(layer, x.movedim(-1, 1), layer.weight).movedim(1, -1) if last else _plain(layer, x, described)
    y = y if z is None else y + z
    return y.relu() if relu else y


_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "relu": lambda x, _: x.relu(),
    "leaky_relu": lambda x, slope: _functions().leaky_relu(x, slope),
    "elu": lambda x, alpha: _functions().elu(x, alpha),
    "identity": lambda x, _: x,
}


def _functions() -> Any:
    import torch

    return torch.nn.functional


def _activated(layer: Any, x: torch.Tensor, described: str) -> torch.Tensor:
    name = getattr(layer, "activation", getattr(layer, "act_name", None))
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise TraceError(f"{described}: its activation is one of {', '.join(_ACTIVATIONS)}; found {name!r}")
    return _ACTIVATIONS[name](x, getattr(layer, "activation_param", getattr(layer, "act_param", 0.01)))


def _abn(layer: Any, x: torch.Tensor, described: str) -> torch.Tensor:
    """inplace_abn/abn.py"""
    return _activated(layer, _plain(layer, x, described), described)


def _in_place(layer: Any, x: torch.Tensor, described: str) -> torch.Tensor:
    """inplace_abn/functions.py; src/inplace_abn_cpu.cpp, `forward_cpu`. The input itself is left as it is."""
    import torch

    if layer.weight is None:
        return _abn(layer, x, described)
    # |weight|, whose derivative at 0 is 1 there
    sign = torch.where(layer.weight < 0, -1.0, 1.0).to(layer.weight.dtype)
    return _activated(layer, _normalised(layer, x, layer.weight * sign + layer.eps), described)


_FORWARDS: Mapping[str, Callable[..., torch.Tensor]] = {
    "apex.parallel.sync_batchnorm.SyncBatchNorm": _apex,
    "apex.parallel.optimized_sync_batchnorm.SyncBatchNorm": _apex,
    "detectron2.layers.batch_norm.NaiveSyncBatchNorm": _plain,
    "mmcv.ops.sync_bn.SyncBatchNorm": _plain,
    "inplace_abn.abn.ABN": _abn,
    "inplace_abn.abn.InPlaceABN": _in_place,
    "inplace_abn.abn.InPlaceABNSync": _in_place,
    "timm.layers.inplace_abn.InplaceAbn": _in_place,
}
# Those that are no subclass of PyTorch's BatchNorm, and hold all that it does.
_OWN_BASE = {"mmcv.ops.sync_bn.SyncBatchNorm", "inplace_abn.abn.ABN"}
