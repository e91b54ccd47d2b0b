"""What kind of layer a Flax layer is: NNX's and Linen's classes, their subclasses, and jaxnorm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen, nnx

from interop.conventions import flax_momentum, torch_momentum
from interop.weights import layouts, recurrent_layouts
from interop.weights.layouts import Layout


def layout_of(layer: nnx.Module | linen.Module) -> Layout | None:
    """The layout of a layer by its class; None for a class that PyTorch has no counterpart of."""
    for kind, layout in _LAYOUTS:
        if isinstance(layer, kind):
            return layout(layer) if callable(layout) else layout
    return None


def _linear_general(layer: nnx.LinearGeneral | linen.DenseGeneral) -> Layout | None:
    if layer.batch_axis if isinstance(layer, nnx.LinearGeneral) else layer.batch_dims:
        return None  # a layer for each index of the batch axes
    outputs = layer.out_features if isinstance(layer, nnx.LinearGeneral) else layer.features
    return layouts.Linear(_number(layer.axis), _number(outputs))


def _number(axes: int | Sequence[int]) -> int:
    return 1 if isinstance(axes, int) else len(axes)


def _conv_transpose(layer: nnx.ConvTranspose | linen.ConvTranspose) -> Layout:
    return layouts.ConvTranspose(layer.transpose_kernel, _number(layer.kernel_size))


def _conv(layer: nnx.Conv | linen.Conv) -> Layout:
    return layouts.Conv(_number(layer.kernel_size))


# Subclasses before their base classes.
_LAYOUTS: tuple[tuple[type | tuple[type, ...], Layout | Callable[[Any], Layout | None]], ...] = (
    ((nnx.BatchNorm, linen.BatchNorm), layouts.BatchNorm()),
    ((nnx.Linear, linen.Dense), layouts.Linear()),
    ((nnx.LinearGeneral, linen.DenseGeneral), _linear_general),
    ((nnx.Conv, linen.Conv), _conv),
    ((nnx.ConvTranspose, linen.ConvTranspose), _conv_transpose),
    ((nnx.Embed, linen.Embed), layouts.Embed()),
    ((nnx.LayerNorm, linen.LayerNorm, nnx.GroupNorm, linen.GroupNorm), layouts.Norm()),
    ((nnx.InstanceNorm, linen.InstanceNorm, nnx.RMSNorm, linen.RMSNorm), layouts.Norm()),
    ((nnx.PReLU, linen.PReLU), layouts.PReLU()),
    ((nnx.MultiHeadAttention, linen.MultiHeadDotProductAttention), layouts.Attention()),
    ((linen.LSTMCell, linen.OptimizedLSTMCell), recurrent_layouts.LINEN_LSTM),
    (nnx.LSTMCell, recurrent_layouts.NNX_LSTM),
    (nnx.OptimizedLSTMCell, recurrent_layouts.NNX_JOINED_LSTM),
    (linen.GRUCell, recurrent_layouts.LINEN_GRU),
    (nnx.GRUCell, recurrent_layouts.NNX_GRU),
    (linen.SimpleCell, recurrent_layouts.LINEN_SIMPLE),
    (nnx.SimpleCell, recurrent_layouts.NNX_SIMPLE),
)


# Settings: what is no array. Names and meanings are PyTorch's.

Settings = dict[str, Any]


def settings_of(layer: nnx.Module | linen.Module) -> Settings | None:
    """A layer's kind and what PyTorch's layer of that kind calls eps, momentum, affine, ...; None for other layers."""
    if isinstance(layer, (nnx.BatchNorm, linen.BatchNorm)):
        settings: Settings = {
            "kind": "BatchNorm",
            "eps": float(layer.epsilon),
            **_momentum(layer.momentum),
            "affine": bool(getattr(layer, "affine", layer.use_scale or layer.use_bias)),
            "track_running_stats": bool(getattr(layer, "track_running_stats", True)),
        }
        return _with_mode(settings, layer.use_running_average)
    for name, classes in _NORMS.items():
        if isinstance(layer, classes):
            settings = {"kind": name, "eps": float(layer.epsilon), "affine": bool(layer.use_scale)}
            if name == "GroupNorm":
                settings["num_groups"] = layer.num_groups
            return settings
    if isinstance(layer, (nnx.Dropout, linen.Dropout)):
        return _with_mode({"kind": "Dropout", "p": float(layer.rate)}, layer.deterministic)
    return None


def _momentum(momentum: float | None) -> Settings:
    """PyTorch's momentum; beside it Flax's where that does not follow from the number (1e-20, whose other is 1.0)."""
    converted = torch_momentum(momentum)
    if converted is None or momentum is None:
        return {"momentum": None}
    plain = float(converted)
    exact = flax_momentum(plain) == momentum
    return {"momentum": plain} if exact else {"momentum": plain, "flax_momentum": float(momentum)}


def _with_mode(settings: Settings, in_eval: bool | None) -> Settings:
    """In Linen, and where NNX leaves it open, the call says whether it is training."""
    return settings if in_eval is None else {**settings, "training": not in_eval}


_NORMS: dict[str, tuple[type[Any], ...]] = {
    "LayerNorm": (nnx.LayerNorm, linen.LayerNorm),
    "GroupNorm": (nnx.GroupNorm, linen.GroupNorm),
    "InstanceNorm": (nnx.InstanceNorm, linen.InstanceNorm),
    "RMSNorm": (nnx.RMSNorm, linen.RMSNorm),
}
