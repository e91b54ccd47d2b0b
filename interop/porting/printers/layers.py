"""Layers: operations that read a module's parameters, as the Flax layer of the same kind at PyTorch's path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interop.conventions import flax_momentum
from interop.ops.convolution import per_dim
from interop.porting.looking import Seen
from interop.porting.printers.registry import prints
from interop.porting.printers.shaping import padded
from interop.porting.terms import Term, binary, call, index, method, tuple_of
from interop.porting.values import Tensor, Unprintable, Writer, images, numbers, plain_order

RNGS = Term("argument", ("rngs",))


def layer_path(w: Writer, weight: Tensor | None, bias: Tensor | None = None, named: str = "weight") -> str | None:
    """The path of the layer whose parameters these are; None where they are not such a layer's, or read elsewhere
    too."""
    if weight is None or weight.state is None or not weight.plain:
        return None
    path, _, last = weight.state.rpartition(".")
    own = {f"{path}.weight".lstrip("."), f"{path}.bias".lstrip(".")}
    if last != named or (bias is not None and (bias.state is None or bias.state not in own)):
        return None
    if bias is None and f"{path}.bias".lstrip(".") in w.entries:
        return None
    return path if path and w.alone(path, own) else None


@prints("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default",
        "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")  # fmt: skip
def conv(
    w: Writer, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    spatial = weight.ndim - 2
    if x.ndim != spatial + 2:
        raise Unprintable("a convolution without a batch")
    stride, dilation = per_dim(stride, spatial), per_dim(dilation, spatial)
    inputs, *kernel = numbers(weight.shape[1:])
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(n % 2 for n in total):
            x = padded(w, x, {i + 2: (n // 2, n - n // 2) for i, n in enumerate(total)}, "constant", 0)
            padding = 0
        else:
            padding = [n // 2 for n in total]
    padding = per_dim(0 if padding == "valid" else padding, spatial)
    array = w.arranged(x, images(x.ndim))
    path = layer_path(w, weight, bias)
    if path is not None:
        rest: dict[str, Any] = {
            "strides": _one(stride),
            "padding": _pairs(_one(padding)),
            "kernel_dilation": _one(dilation),
        }
        rest |= {"feature_group_count": groups, "use_bias": bias is not None}
        constructor = call("nnx.Conv", inputs * groups, weight.shape[0], tuple(kernel), **rest, rngs=RNGS)
        return w.tensor(call(w.member(path, constructor), array), images(x.ndim))
    letters = "DHW"[-spatial:]
    layout = (f"N{letters}C", f"OI{letters}", f"N{letters}C")
    rest = {"rhs_dilation": tuple_of(dilation)} if any(d != 1 for d in dilation) else {}
    rest |= {"feature_group_count": groups} if groups != 1 else {}
    pads = tuple_of(tuple_of((n, n)) for n in padding)
    y: Any = call("lax.conv_general_dilated", array, w.plain(weight), tuple_of(stride), pads, **rest,
                  dimension_numbers=layout)  # fmt: skip
    if bias is not None:
        y = binary("+", y, w.plain(bias))
    return w.tensor(y, images(x.ndim))


def _one(numbers: Sequence[int]) -> Any:
    """One number for all dimensions where they are the same."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def _pairs(padding: Any) -> Any:
    return tuple((n, n) for n in padding) if isinstance(padding, tuple) else padding


@prints("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def conv_transpose(
    w: Writer, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    spatial = weight.ndim - 2
    path = layer_path(w, weight, bias)
    if path is None or groups != 1:
        raise Unprintable("a transposed convolution in groups, or with a computed kernel")
    stride, dilation = per_dim(stride, spatial), per_dim(dilation, spatial)
    padding, extra = per_dim(padding, spatial), per_dim(output_padding, spatial)
    reach = [d * (k - 1) for d, k in zip(dilation, numbers(weight.shape[2:]), strict=True)]
    pads = tuple((r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True))
    rest: dict[str, Any] = {"strides": tuple(stride), "padding": pads, "kernel_dilation": _one(dilation)}
    rest["use_bias"] = bias is not None
    kernel = tuple(weight.shape[2:])
    constructor = call("nnx.ConvTranspose", weight.shape[0], weight.shape[1], kernel, **rest, rngs=RNGS)
    return w.tensor(call(w.member(path, constructor), w.arranged(x, images(x.ndim))), images(x.ndim))


@prints("aten.linear.default")
def linear(w: Writer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    path = layer_path(w, weight, bias)
    order = x.order if x.order[-1:] == (x.ndim - 1,) and x.vector is None else plain_order(x.ndim)
    array = w.arranged(x, order)
    if path is not None:
        constructor = call("nnx.Linear", weight.shape[1], weight.shape[0], use_bias=bias is not None, rngs=RNGS)
        return w.tensor(call(w.member(path, constructor), array), order)
    kernel = w.plain(weight)
    y: Any = binary("@", array, Term("attribute", (kernel, "T")))
    if bias is not None:
        y = binary("+", y, w.plain(bias))
    return w.tensor(y, order)


@prints("jaxnorm.batch_norm.default")
def batch_norm(w: Writer, x: Tensor, path: str, *mask: Any) -> Tensor:
    layer = next(layer for layer in w.model.batch_norms if layer.path == path)
    if mask or layer.frozen or not layer.counts:
        raise Unprintable(f"{path}, a BatchNorm layer that is frozen, or counts some of the rows")
    if x.ndim == 1:
        raise Unprintable("BatchNorm of one dimension")
    order = images(x.ndim)
    rest: dict[str, Any] = {"momentum": flax_momentum(layer.momentum), "epsilon": layer.eps}
    counted = f"{path}.num_batches_tracked".lstrip(".") in w.entries
    rest |= {"use_bias": layer.affine, "use_scale": layer.affine, "track_running_stats": layer.track_running_stats}
    rest["count_batches"] = counted and layer.track_running_stats
    constructor = call("BatchNorm", layer.num_features, **rest, rngs=RNGS)
    return w.tensor(call(w.member(path, constructor), w.arranged(x, order)), order)


@prints("aten.layer_norm.default")
def layer_norm(
    w: Writer, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: Any = 1e-5, *_: Any,
) -> Tensor:  # fmt: skip
    if len(shape) != 1:
        return _normalised(w, x, tuple(range(x.ndim - len(shape), x.ndim)), weight, bias, eps)
    order = x.order if x.order[-1] == x.ndim - 1 and x.vector is None else plain_order(x.ndim)
    array = w.arranged(x, order)
    path = layer_path(w, weight, bias)
    if weight is None and bias is None:
        path = w.free_path("norm")
    if path is None:
        return _normalised(w, x, (x.ndim - 1,), weight, bias, eps)
    rest: dict[str, Any] = {"epsilon": eps}
    rest |= {"use_scale": weight is not None, "use_bias": bias is not None}
    constructor = call("nnx.LayerNorm", shape[0], **rest, rngs=RNGS)
    return w.tensor(call(w.member(path, constructor), array), order)


@prints("aten.rms_norm.default")
def rms_norm(w: Writer, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: Any = None) -> Tensor:
    path = layer_path(w, weight)
    if path is None or eps is None or len(shape) != 1:
        axes = tuple_of(sorted(x.axis(dim) for dim in range(x.ndim - len(shape), x.ndim)))
        least = Term("attribute", (call("jnp.finfo", Term("attribute", (x.term, "dtype"))), "eps"))
        squares = method(binary("**", x.term, 2), "mean", axes, keepdims=True)
        y: Any = binary("*", x.term, call("lax.rsqrt", binary("+", squares, least if eps is None else eps)))
        return w.tensor(y if weight is None else binary("*", y, w.expanded(weight, x.order)), x.order)
    order = x.order if x.order[-1] == x.ndim - 1 and x.vector is None else plain_order(x.ndim)
    constructor = call("nnx.RMSNorm", shape[0], epsilon=eps, rngs=RNGS)
    return w.tensor(call(w.member(path, constructor), w.arranged(x, order)), order)


def _normalised(
    w: Writer, x: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: Any,
    result: int | None = None,
) -> Tensor:  # fmt: skip
    """(x - mean) / sqrt(var + eps), written out."""
    axes = tuple_of(sorted(x.axis(dim) for dim in dims))
    mean = call(Term("attribute", (x.term, "mean")), axes, keepdims=True)
    var = call(Term("attribute", (x.term, "var")), axes, keepdims=True)
    y: Any = binary("*", binary("-", x.term, mean), call("lax.rsqrt", binary("+", var, eps)))
    for sign, parameter in (("*", weight), ("+", bias)):
        if parameter is not None:
            y = binary(sign, y, w.expanded(parameter, x.order))
    return w.tensor(y, x.order, result)


@prints("aten.group_norm.default")
def group_norm(
    w: Writer, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: Any = 1e-5,
    *_: Any,
) -> Tensor:  # fmt: skip
    channels = x.shape[1]
    path = layer_path(w, weight, bias)
    if weight is None and bias is None:
        path = w.free_path("norm")
    if path is None:
        raise Unprintable("group_norm with computed parameters")
    rest: dict[str, Any] = {"num_groups": groups, "epsilon": eps}
    rest |= {"use_scale": weight is not None, "use_bias": bias is not None}
    constructor = call("nnx.GroupNorm", channels, **rest, rngs=RNGS)
    return w.tensor(call(w.member(path, constructor), w.arranged(x, images(x.ndim))), images(x.ndim))


@prints("aten.instance_norm.default")
def instance_norm(
    w: Writer, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, mean: Any = None, var: Any = None,
    use_input_stats: bool = True, momentum: Any = 0.1, eps: Any = 1e-5, *_: Any,
) -> Tensor:  # fmt: skip
    if mean is not None or not use_input_stats:
        raise Unprintable("instance_norm with running statistics")
    return _normalised(w, x, tuple(range(2, x.ndim)), _channels(weight, x), _channels(bias, x), eps)


def _channels(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    if parameter is None:
        return None
    shape = tuple(x.shape[1] if dim == 1 else 1 for dim in range(x.ndim))
    return Tensor(parameter.term, Seen(shape, parameter.seen.dtype), plain_order(x.ndim), 1)


@prints("aten._native_batch_norm_legit.no_stats")
def batch_norm_without_stats(
    w: Writer, x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: Any, eps: Any
) -> tuple[Tensor, ...]:
    """Its first result alone: the others are for PyTorch's backward pass."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    return (_normalised(w, x, dims, _channels(weight, x), _channels(bias, x), eps, 0),)


@prints("aten.batch_norm.default")
def functional_batch_norm(
    w: Writer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None = None,
    var: Tensor | None = None, training: bool = True, momentum: Any = 0.0, eps: Any = 1e-5, *_: Any,
) -> Tensor:  # fmt: skip
    """Without statistics that are kept: of a kernel that is standardised, say."""
    if mean is not None and not training:
        center, spread = _channels(mean, x), _channels(var, x)
        assert center is not None and spread is not None
        scale = call("lax.rsqrt", binary("+", w.expanded(spread, x.order), eps))
        y: Any = binary("*", binary("-", x.term, w.expanded(center, x.order)), scale)
        for sign, parameter in (("*", _channels(weight, x)), ("+", _channels(bias, x))):
            if parameter is not None:
                y = binary(sign, y, w.expanded(parameter, x.order))
        return w.tensor(y, x.order)
    if mean is not None:
        raise Unprintable("batch_norm of a function, with running statistics")
    dims = [dim for dim in range(x.ndim) if dim != 1]
    return _normalised(w, x, dims, _channels(weight, x), _channels(bias, x), eps)


@prints("aten.embedding.default")
def embedding(w: Writer, weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    path = layer_path(w, weight)
    if path is None:
        return w.tensor(index(w.plain(weight), w.plain(indices)))
    constructor = call("nnx.Embed", weight.shape[0], weight.shape[1], rngs=RNGS)
    return w.tensor(call(w.member(path, constructor), w.plain(indices)))
