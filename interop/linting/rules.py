"""The rules of `interop.lint`: each a small function that looks for one mistake, and cites where it was made.

A rule takes a `Subject` and yields `Finding`s. It says nothing of what it cannot know: a state dict has no momentum.
A layer counts as trained if its bias (its scale, where it has none) has values that differ: both start as constants.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from interop.conventions import flax_momentum, torch_momentum
from interop.linting.subject import NormLayer, Subject, is_share

Severity = Literal["error", "warning", "info"]

TENSORFLOW_EPSILON: Final = 1e-3  # tf.keras.layers.BatchNormalization
_LARGE_EPSILON: Final = 0.1  # no framework's default and no published model comes near; variances often do
_MEAN_OF_NOTHING: Final = 1e-3  # a channel that is always 0 has a running mean below this; seen: 3e-5 and less
_NEVER_INFINITE: Final = ("weight", "bias", "running_mean", "kernel", "scale", "embedding", "mean")
_DEAD: Final = 1e-5  # a scale this small beside the layer's largest


class Finding(NamedTuple):
    """What looks wrong: one finding of `lint`.

    **Attributes:**

    - `rule`: the rule's name, as in `docs/lint.md`.
    - `severity`: "error" (results are or will be wrong), "warning" (probably a mistake) or "info" (worth knowing).
    - `layer`: the layer's name.
    - `message`: what was found.
    - `value`: the number that is suspicious.
    - `suggested`: what it should be; None where that cannot be known.
    """

    rule: str
    severity: Severity
    layer: str
    message: str
    value: float | str | None = None
    suggested: float | str | None = None


Rule = Callable[[Subject], Iterator[Finding]]


def momentum_side(subject: Subject) -> Iterator[Finding]:
    """A momentum of the other framework's convention: above 0.5 in PyTorch, below 0.5 in Flax; or of none.

    PyTorch's is the share of the new batch (0.1), TensorFlow's and Flax's the share that is kept (0.9). torchvision's
    MaxViT was given TensorFlow's 0.99, so that its running statistics were those of the last batch:
    https://github.com/pytorch/vision/issues/8250; likewise BNInception
    (https://github.com/Cadene/pretrained-models.pytorch/issues/44) and DeepLab
    (https://github.com/kazuto1011/deeplab-pytorch/issues/79).
    """
    for layer in subject.layers:
        new = layer.flags.get("momentum")
        if new is None or 0 <= new <= 0.5:
            continue
        flax = subject.convention == "Flax"
        if not is_share(new):
            given, usual = (1 - new, 0.9) if flax else (new, 0.1)
            message = f"momentum {given:g}, which is no share: expected a number from 0 to 1"
            yield Finding("momentum_side", "error", layer.name, message, given, usual)
            continue
        value = float(flax_momentum(new) or 0) if flax else float(new)
        other = float((torch_momentum if flax else flax_momentum)(value) or 0)
        suggested = other if 0 < other < 1 else 0.9 if flax else 0.1
        yield Finding(
            "momentum_side", "warning", layer.name,
            f"momentum {value:g}, which in {subject.convention} is the share {'kept' if flax else 'of the new batch'}: "
            f"{1 - float(new):g} of the running statistics is kept at each step",
            value, suggested,
        )  # fmt: skip


def epsilon_family(subject: Subject) -> Iterator[Finding]:
    """PyTorch's default eps in a model made for TensorFlow's weights, whose default is 1e-3.

    Such a model is told by convolutions that pad as TensorFlow's "SAME" does; PyTorch code has them for nothing else.
    It shows where variances are small, and no file holds eps: YOLO weights trained with 1e-3 and run with 1e-5 lost
    most of their accuracy (https://github.com/VainF/Torch-Pruning/issues/147,
    https://github.com/wang-xinyu/tensorrtx/pull/1444, https://github.com/ZJU-lishuang/yolov5_prune/issues/47).
    """
    known = [layer for layer in subject.layers if _ordinary_epsilon(layer) is not None]
    if not subject.pads_as_tensorflow or any(layer.flags["eps"] >= TENSORFLOW_EPSILON / 2 for layer in known):
        return
    for layer in known:
        yield Finding(
            "epsilon_family", "warning", layer.name,
            f"eps {layer.flags['eps']:g} in a model whose convolutions pad as TensorFlow's do: its weights want 0.001",
            layer.flags["eps"], TENSORFLOW_EPSILON,
        )  # fmt: skip


def epsilon_mixed(subject: Subject) -> Iterator[Finding]:
    """A few layers with another eps than the rest of their part of the model.

    Backbone and head may differ (torchvision's lraspp_mobilenet_v3_large), the blocks of a backbone do not, unless
    eps was set after the model was built and then layers were rebuilt or missed:
    https://github.com/LibreYOLO/libreyolo/pull/700, https://github.com/VainF/Torch-Pruning/issues/147.
    """
    for layer, usual in _odd_ones(subject, _ordinary_epsilon):
        value = layer.flags["eps"]
        message = f"eps {value:g}, where most layers of this part of the model have {usual:g}"
        yield Finding("epsilon_mixed", "warning", layer.name, message, value, usual)


def epsilon_large(subject: Subject) -> Iterator[Finding]:
    """An eps that outweighs variances: most often another argument of the constructor in eps's place.

    eps is the second one, after the number of channels. Code that was ported from Keras gives its momentum there
    (`nn.BatchNorm2d(128, 0.8)`: https://github.com/eriklindernoren/PyTorch-GAN, implementations/dcgan/dcgan.py), other
    code the number of channels twice. Such layers are left out where the usual eps of a model is looked for. Weights
    that were trained so need it.
    """
    for layer in subject.layers:
        eps = layer.flags.get("eps")
        if eps is None or eps < _LARGE_EPSILON:
            continue
        at_start = not _trained(layer) and _at_start(layer)
        advice = "was it meant for another argument?" if at_start else "weights that were trained with it need it"
        message = f"eps {eps:g}, which outweighs variances of its size and below: {advice}"
        yield Finding("epsilon_large", "warning", layer.name, message, eps, 1e-5 if at_start else None)


def channels(subject: Subject) -> Iterator[Finding]:
    """A layer whose statistics, scale and bias are not of one shape.

    Pruning that leaves the statistics as they were gives such files
    (https://github.com/BayesWatch/pytorch-prunes/issues/6), and so do layers with statistics for several widths
    (https://github.com/JiahuiYu/slimmable_networks/issues/24).
    """
    for layer in subject.layers:
        shapes = {key: array.shape for key, array in layer.arrays.items() if key != "num_batches_tracked"}
        var = shapes["running_var"]
        # torch.ao's fused ConvBn2d, before its version 2, has the convolution's weight beside the statistics
        if any(shape != var for key, shape in shapes.items() if key == "running_mean" or len(shape) == len(var)):
            listed = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
            yield Finding("channels", "error", layer.name, f"arrays of several shapes: {listed}")


def variance(subject: Subject) -> Iterator[Finding]:
    """Running variances that no data has: not finite, negative, zero throughout, or zero beside a mean that is not.

    NaN in the running statistics is seen in eval mode only (https://github.com/pytorch/pytorch/issues/1206); negative
    variances come from subtracting eps on conversion (https://github.com/facebookresearch/detectron2/pull/3160,
    https://github.com/shicai/MobileNet-Caffe/issues/87). A single channel of mean and variance 0 has an input that is
    always 0, which trained models have many of, and is no finding.
    """
    for layer in subject.layers:
        var, mean = layer.array("running_var"), layer.array("running_mean")
        if var is None or mean is None or var.size == 0 or var.shape != mean.shape:
            continue
        wrong = ~np.isfinite(var)
        if wrong.any():
            yield _channels("variance", "error", layer, wrong, "a running variance that is not finite", var)
        negative = var < 0
        if negative.any():
            yield _channels("variance", "error", layer, negative, "a negative running variance", var)
        zero = var == 0
        if zero.all() and var.size > 1:
            yield _channels("variance", "error", layer, zero, "a running variance of 0", var)
        elif (zero & (np.abs(mean) > _MEAN_OF_NOTHING)).any():
            strange = zero & (np.abs(mean) > _MEAN_OF_NOTHING)
            yield _channels("variance", "warning", layer, strange, "a running variance of 0, but a mean", mean)


def not_finite(subject: Subject) -> Iterator[Finding]:
    """NaN in any other array, or infinity in a weight, a bias or a running mean.

    Weights that overflowed are saved like any others, and every output is NaN from then on; PyTorch looks at no value
    when it loads one: https://github.com/pytorch/pytorch/issues/10008. Other buffers may hold infinity on purpose:
    masks, ranges that are yet to be observed.
    """
    for name, array in subject.arrays():
        layer, _, last = name.rpartition(".")
        if array.dtype.kind in "biu" or last in ("running_var", "var"):
            continue
        found = np.isfinite(array) if last in _NEVER_INFINITE else ~np.isnan(array)
        bad = array.size - int(np.count_nonzero(found))
        if bad:
            message = f"{last}: {bad} of {array.size} values are not finite"
            yield Finding("not_finite", "error", layer or name, message, bad)


def never_moved(subject: Subject) -> Iterator[Finding]:
    """Running statistics still at 0 and 1, though batches were counted or the layer is trained: eval mode is wrong.

    An average of a model that leaves out the buffers keeps them so (https://github.com/CuriousAI/mean-teacher/issues/9,
    https://github.com/FlyreelAI/sesemi/issues/36, https://github.com/pytorch/ignite/issues/2590), and so does a
    training loop that throws the updated statistics away.
    """
    for layer in subject.layers:
        if not _at_start(layer):
            continue
        if layer.count:
            message = f"running mean 0 and variance 1 in every channel after {layer.count} batches"
            yield Finding("never_moved", "error", layer.name, message, layer.count)
        elif _trained(layer):
            counted = "no batch was counted" if layer.count == 0 else "there is no counter"
            message = f"running mean 0 and variance 1 in every channel beside a trained scale and bias; {counted}"
            yield Finding("never_moved", "error", layer.name, message)


def counters(subject: Subject) -> Iterator[Finding]:
    """Layers that counted other numbers of batches than the rest of their part of the model.

    One forward pass counts once in every layer, so that such statistics come from several runs, or from replicas of
    which some were merged and some taken from rank 0. Without synchronisation the replicas' statistics differ:
    https://github.com/huggingface/pytorch-image-models/issues/110, https://github.com/pytorch/pytorch/issues/13711,
    https://github.com/facebookresearch/detectron2/issues/5398. A new head on an old backbone is no finding.
    """
    for layer, usual in _odd_ones(subject, lambda layer: layer.count):
        message = f"{layer.count} batches were counted, in most layers of this part of the model {usual}"
        yield Finding("counters", "warning", layer.name, message, layer.count, usual)


def restarted_average(subject: Subject) -> Iterator[Finding]:
    """A cumulative average (momentum None) whose counter is 0 beside statistics: the first batch replaces them.

    `momentum=None` weighs a batch by 1 / num_batches_tracked (https://github.com/pytorch/pytorch/pull/5766), and files
    from before that counter, or from TensorFlow, have none to restore
    (https://github.com/pytorch/pytorch/issues/8481).
    """
    for layer in subject.layers:
        if "momentum" in layer.flags and layer.flags["momentum"] is None and layer.count == 0 and not _at_start(layer):
            message = "momentum None and a counter of 0: the first training batch replaces the running statistics"
            yield Finding("restarted_average", "warning", layer.name, message, 0)


def dead_channels(subject: Subject) -> Iterator[Finding]:
    """Channels of a trained layer whose scale is 0 beside the others': they give their bias, whatever the input.

    Weight decay on the scale does it on purpose (network slimming), or to whole layers:
    https://github.com/Eric-mingjie/rethinking-network-pruning/issues/50. Scales that start at 0 (timm's and
    torchvision's zero_init_residual) are none.
    """
    for layer in subject.layers:
        scale = layer.array("weight")
        if scale is None or scale.size == 0 or not _trained(layer) or not np.isfinite(scale).all():
            continue
        dead = np.abs(scale) <= _DEAD * np.abs(scale).max()
        if dead.any():
            severity: Severity = "warning" if dead.all() else "info"
            yield _channels("dead_channels", severity, layer, dead, "a scale of about 0", scale)


def frozen(subject: Subject) -> Iterator[Finding]:
    """Layers that a training model freezes by half: parameters without their statistics, or statistics by momentum.

    `requires_grad=False` does not stop the running statistics (https://github.com/pytorch/pytorch/issues/86590,
    https://github.com/lightly-ai/lightly/issues/1438); `eval()` on the layer does. Layers in eval mode inside a
    training model are reported too, as information: only the next `train()` would tell.
    """
    if not subject.training:
        return
    for layer in subject.layers:
        training, trainable = layer.flags.get("training"), layer.flags.get("trainable")
        if training is False:
            message = "in eval mode inside a training model: its running statistics stay as they are"
            yield Finding("frozen", "info", layer.name, message, False)
        elif training and trainable is False:
            message = "its scale and bias are frozen, its running statistics are not: eval() on the layer stops them"
            yield Finding("frozen", "warning", layer.name, message, True, False)
        if training and layer.flags.get("momentum") == 0:
            flax = subject.convention == "Flax"
            message = "this momentum keeps the running statistics as they are for ever"
            yield Finding("frozen", "warning", layer.name, message, 1.0 if flax else 0.0, 0.9 if flax else 0.1)


def half_precision(subject: Subject) -> Iterator[Finding]:
    """Running statistics in 16 bits: 3 digits, nothing above 65504 (float16), and averages that stop moving.

    A step of 0.01 towards a new mean is lost below half a unit in the last place, and a variance that is too large is
    infinity: https://github.com/pytorch/pytorch/pull/126525, https://github.com/apple/coreai-torch/pull/54.
    """
    for layer in subject.layers:
        dtypes = {layer.arrays[key].dtype.name for key in ("running_mean", "running_var") if key in layer.arrays}
        for dtype in sorted(dtypes & {"float16", "bfloat16"}):
            message = f"running statistics in {dtype}"
            yield Finding("half_precision", "warning", layer.name, message, dtype, "float32")


def shared_storage(subject: Subject) -> Iterator[Finding]:
    """Several names of the same memory: tied weights, and tensors that overlap.

    A file keeps it or not, by its format, and safetensors refuses it
    (https://github.com/safetensors/safetensors/issues/202); an optimizer or an average then updates one array twice.
    Statistics that two layers share without sharing a scale are each other's noise.
    """
    order = {name: index for index, name in enumerate(subject.places)}
    latest: dict[Hashable, tuple[int, int, str]] = {}
    found: list[tuple[str, str, bool]] = []
    for name, (owner, low, high) in sorted(subject.places.items(), key=lambda item: (str(item[1][0]), *item[1][1:])):
        if low == high:
            continue
        before = latest.get(owner)
        if before is not None and low < before[1]:
            first, second = sorted((before[2], name), key=order.__getitem__)
            found.append((second, first, (low, high) == before[:2]))
        if before is None or high > before[1]:
            latest[owner] = low, high, name
    together = {(second, first) for second, first, _ in found}
    groups: dict[tuple[str, str, Severity, str], list[str]] = {}
    for name, first, whole in sorted(found, key=lambda item: order[item[0]]):
        (parent, _, last), (other, _, _) = name.rpartition("."), first.rpartition(".")
        severity: Severity = "info" if whole else "warning"
        how = "the same memory as in {!r}" if whole else "overlapping in memory with {!r}"
        scales = (f"{parent}.weight", f"{other}.weight")
        if last in ("running_mean", "running_var") and scales[0] in order and scales not in together:
            severity, how = "warning", f"{how}, but their scales are two"
        groups.setdefault((parent or name, other or first, severity, how), []).append(last)
    for (layer, other, severity, how), lasts in groups.items():
        yield Finding("shared_storage", severity, layer, f"{', '.join(lasts)}: {how.format(other)}", other)


RULES: Final[tuple[Rule, ...]] = (
    momentum_side,
    epsilon_family,
    epsilon_mixed,
    epsilon_large,
    channels,
    variance,
    not_finite,
    never_moved,
    counters,
    restarted_average,
    dead_channels,
    frozen,
    half_precision,
    shared_storage,
)


def _ordinary_epsilon(layer: NormLayer) -> float | None:
    """The layer's eps, unless it is unknown or none that a layer should be measured by."""
    eps = layer.flags.get("eps")
    return None if eps is None or eps >= _LARGE_EPSILON else float(eps)


def _trained(layer: NormLayer) -> bool:
    """Whether the layer's bias, or its scale where it has no bias, has left the constant that it starts as."""
    values = layer.array("bias")
    values = layer.array("weight") if values is None else values
    finite = np.zeros(0) if values is None else values[np.isfinite(values)]
    return finite.size > 1 and bool(np.ptp(finite) > 0)


def _at_start(layer: NormLayer) -> bool:
    mean, var = layer.array("running_mean"), layer.array("running_var")
    return mean is not None and var is not None and bool((mean == 0).all() and (var == 1).all())


def _channels(
    rule: str, severity: Severity, layer: NormLayer, which: np.ndarray, what: str, values: np.ndarray
) -> Finding:
    """A finding about some channels of a layer."""
    indices = np.flatnonzero(which)
    listed = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    share = "all" if which.all() else f"{len(indices)} of"
    message = f"{share} {which.size} channels have {what}" + ("" if which.all() else f" ({listed})")
    return Finding(rule, severity, layer.name, message, float(values[indices[0]]))


def _odd_ones(subject: Subject, value: Callable[[NormLayer], float | None]) -> Iterator[tuple[NormLayer, Any]]:
    """Layers whose value is not that of most layers of their part of the model, with the latter.

    A part is a child of the model, numbers aside: `backbone`, `layer#`; what all layers' names share is left out.
    """
    paths = [layer.name.split(".") for layer in subject.layers]
    shared = 0  # the beginning that all names have
    while paths and all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    parts: dict[str, list[NormLayer]] = {}
    for layer, path in zip(subject.layers, paths, strict=True):
        if value(layer) is not None:
            parts.setdefault(re.sub(r"\d+", "#", path[shared]), []).append(layer)
    for layers in parts.values():
        (usual, most), *_ = collections.Counter(value(layer) for layer in layers).most_common()
        if most > len(layers) / 2:
            yield from ((layer, usual) for layer in layers if value(layer) != usual)
