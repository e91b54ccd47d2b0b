"""torchvision's models as one would write them in Flax: NNX, channels last, and torchvision's names of modules.

So `interop.load_state_dict(model, torch_model.state_dict())` fills them without a rename, and both can be compared.
Dropout and stochastic depth are left out: what is measured is convolutions and BatchNorm.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Layer = Callable[[jax.Array], jax.Array]


class Kit:
    """The layers that a model is made of: `norm` is the BatchNorm to measure, None for none, `dtype` that of the
    arithmetic."""

    def __init__(self, norm: type[nnx.Module] | None, dtype: Any = None):
        self.rngs, self.dtype, self.norm = nnx.Rngs(0), dtype, norm

    def conv(
        self, inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Any:
        pad = (size - 1) // 2
        return nnx.Conv(
            inputs, outputs, (size, size), stride, padding=(pad, pad), feature_group_count=groups, use_bias=bias,
            dtype=self.dtype, rngs=self.rngs,
        )  # fmt: skip

    def bn(self, features: int, epsilon: float = 1e-5) -> Any:
        if self.norm is None:
            return nnx.identity
        return self.norm(features, momentum=0.9, epsilon=epsilon, dtype=self.dtype, rngs=self.rngs)

    def linear(self, inputs: int, outputs: int) -> Any:
        return nnx.Linear(inputs, outputs, dtype=self.dtype, rngs=self.rngs)


class Chain(nnx.List):
    """Layers one after the other, with numbers as names."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self:
            x = layer(x)
        return x


def conv_bn(kit: Kit, *conv: int, act: Layer | None = jax.nn.relu, epsilon: float = 1e-5, groups: int = 1) -> Chain:
    return Chain([kit.conv(*conv, groups=groups), kit.bn(conv[1], epsilon), *([] if act is None else [act])])


def max_pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


class ResNetBlock(nnx.Module):
    """torchvision.models.resnet: BasicBlock, or Bottleneck where `wide`."""

    def __init__(self, kit: Kit, inputs: int, width: int, stride: int, wide: bool):
        outputs = 4 * width if wide else width
        self.wide = wide
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        if not wide:
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        for i, size in enumerate(sizes, 1):
            setattr(self, f"conv{i}", kit.conv(*size))
            setattr(self, f"bn{i}", kit.bn(size[1]))
        narrower = stride > 1 or inputs != outputs
        self.downsample = conv_bn(kit, inputs, outputs, 1, stride, act=None) if narrower else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.wide:
            y = self.bn3(self.conv3(jax.nn.relu(y)))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nnx.Module):
    def __init__(self, kit: Kit, depths: tuple[int, ...], wide: bool):
        self.conv1, self.bn1 = kit.conv(3, 64, 7, 2), kit.bn(64)
        inputs = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(ResNetBlock(kit, inputs, 64 << i, 2 if i and not j else 1, wide))
                inputs = (64 << i) * (4 if wide else 1)
            setattr(self, f"layer{i + 1}", Chain(blocks))
        self.fc = kit.linear(inputs, 1000)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(jax.nn.relu(self.bn1(self.conv1(x))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(x.mean((1, 2)))


class SqueezeExcite(nnx.Module):
    def __init__(self, kit: Kit, features: int, squeezed: int, act: Layer, gate: Layer):
        self.fc1, self.fc2 = (
            kit.conv(features, squeezed, bias=True),
            kit.conv(squeezed, features, bias=True),
        )
        self.act, self.gate = act, gate

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((1, 2), keepdims=True)))))


class Inverted(nnx.Module):
    """MBConv: expand, depthwise, squeeze and excite, project."""

    def __init__(
        self, kit: Kit, inputs: int, hidden: int, outputs: int, size: int, stride: int, act: Layer, gate: Layer,
        squeezed: int | None, squeeze_act: Layer, epsilon: float,
    ):  # fmt: skip
        layers: list[Any] = []
        if hidden != inputs:
            layers.append(conv_bn(kit, inputs, hidden, act=act, epsilon=epsilon))
        layers.append(conv_bn(kit, hidden, hidden, size, stride, act=act, epsilon=epsilon, groups=hidden))
        if squeezed is not None:
            layers.append(SqueezeExcite(kit, hidden, squeezed, squeeze_act, gate))
        layers.append(conv_bn(kit, hidden, outputs, act=None, epsilon=epsilon))
        self.block = Chain(layers)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.block(x) if self.residual else self.block(x)


class EfficientNetB0(nnx.Module):
    STAGES = (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )  # fmt: skip

    def __init__(self, kit: Kit):
        features: list[Any] = [conv_bn(kit, 3, 32, 3, 2, act=jax.nn.silu)]
        inputs = 32
        for expand, size, stride, outputs, depth in self.STAGES:
            blocks = []
            for i in range(depth):
                how = (size, 1 if i else stride, jax.nn.silu, jax.nn.sigmoid, max(1, inputs // 4), jax.nn.silu, 1e-5)
                blocks.append(Inverted(kit, inputs, inputs * expand, outputs, *how))
                inputs = outputs
            features.append(Chain(blocks))
        self.features = Chain([*features, conv_bn(kit, 320, 1280, act=jax.nn.silu)])
        self.classifier = nnx.List([None, kit.linear(1280, 1000)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.classifier[1](self.features(x).mean((1, 2)))


def divisible(features: int) -> int:
    """To the next multiple of 8, not less than 0.9 of it: torchvision.models._utils._make_divisible."""
    nearest = max(8, (features + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * features else nearest


class MobileNetV3Large(nnx.Module):
    ROWS = (
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
        (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2),
        (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
    )  # fmt: skip

    def __init__(self, kit: Kit):
        hard = jax.nn.hard_swish
        features: list[Any] = [conv_bn(kit, 3, 16, 3, 2, act=hard, epsilon=1e-3)]
        inputs = 16
        for size, hidden, outputs, squeeze, swish, stride in self.ROWS:
            act = hard if swish else jax.nn.relu
            squeezed = divisible(hidden // 4) if squeeze else None
            how = (size, stride, act, jax.nn.hard_sigmoid, squeezed, jax.nn.relu, 1e-3)
            features.append(Inverted(kit, inputs, hidden, outputs, *how))
            inputs = outputs
        self.features = Chain([*features, conv_bn(kit, 160, 960, act=hard, epsilon=1e-3)])
        self.classifier = nnx.List([kit.linear(960, 1280), None, None, kit.linear(1280, 1000)])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, _, _, last = self.classifier
        return last(jax.nn.hard_swish(first(self.features(x).mean((1, 2)))))


class DenseLayer(nnx.Module):
    def __init__(self, kit: Kit, inputs: int):
        self.norm1, self.conv1 = kit.bn(inputs), kit.conv(inputs, 128)
        self.norm2, self.conv2 = kit.bn(128), kit.conv(128, 32, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(jax.nn.relu(self.norm1(x)))
        return self.conv2(jax.nn.relu(self.norm2(x)))


class Transition(nnx.Module):
    def __init__(self, kit: Kit, inputs: int):
        self.norm, self.conv = kit.bn(inputs), kit.conv(inputs, inputs // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.avg_pool(self.conv(jax.nn.relu(self.norm(x))), (2, 2), (2, 2))


class Named(nnx.Module):
    """Modules by name."""

    def __init__(self, **modules: Any):
        for name, module in modules.items():
            setattr(self, name, module)


class DenseNet121(nnx.Module):
    def __init__(self, kit: Kit):
        named: dict[str, Any] = {"conv0": kit.conv(3, 64, 7, 2), "norm0": kit.bn(64)}
        features = 64
        for i, depth in enumerate((6, 12, 24, 16), 1):
            layers = {f"denselayer{j + 1}": DenseLayer(kit, features + 32 * j) for j in range(depth)}
            named[f"denseblock{i}"] = Named(**layers)
            features += 32 * depth
            if i < 4:
                named[f"transition{i}"] = Transition(kit, features)
                features //= 2
        self.features = Named(**named, norm5=kit.bn(features))
        self.classifier = kit.linear(features, 1000)

    def __call__(self, x: jax.Array) -> jax.Array:
        f = self.features
        x = max_pool(jax.nn.relu(f.norm0(f.conv0(x))))
        for i, depth in enumerate((6, 12, 24, 16), 1):
            block, found = getattr(f, f"denseblock{i}"), [x]
            for j in range(depth):
                found.append(getattr(block, f"denselayer{j + 1}")(jnp.concatenate(found, -1)))
            x = jnp.concatenate(found, -1)
            x = getattr(f, f"transition{i}")(x) if i < 4 else x
        return self.classifier(jax.nn.relu(f.norm5(x)).mean((1, 2)))


class RegNetBlock(nnx.Module):
    def __init__(self, kit: Kit, inputs: int, width: int, group: int, stride: int):
        self.proj = conv_bn(kit, inputs, width, 1, stride, act=None) if inputs != width or stride > 1 else None
        squeeze = SqueezeExcite(kit, width, round(inputs / 4), jax.nn.relu, jax.nn.sigmoid)
        self.f = Named(
            a=conv_bn(kit, inputs, width),
            b=conv_bn(kit, width, width, 3, stride, groups=width // group),
            se=squeeze,
            c=conv_bn(kit, width, width, act=None),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.f.c(self.f.se(self.f.b(self.f.a(x))))
        return jax.nn.relu(y + (x if self.proj is None else self.proj(x)))


class RegNetY400MF(nnx.Module):
    STAGES = ((1, 48), (3, 104), (6, 208), (6, 440))

    def __init__(self, kit: Kit):
        self.stem = conv_bn(kit, 3, 32, 3, 2)
        stages, inputs = {}, 32
        for i, (depth, width) in enumerate(self.STAGES, 1):
            blocks = {}
            for j in range(depth):
                blocks[f"block{i}-{j}"] = RegNetBlock(kit, inputs, width, 8, 1 if j else 2)
                inputs = width
            stages[f"block{i}"] = Named(**blocks)
        self.trunk_output = Named(**stages)
        self.fc = kit.linear(inputs, 1000)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for i, (depth, _) in enumerate(self.STAGES, 1):
            stage = getattr(self.trunk_output, f"block{i}")
            for j in range(depth):
                x = getattr(stage, f"block{i}-{j}")(x)
        return self.fc(x.mean((1, 2)))


MODELS: dict[str, Callable[[Kit], nnx.Module]] = {
    "resnet18": partial(ResNet, depths=(2, 2, 2, 2), wide=False),
    "resnet50": partial(ResNet, depths=(3, 4, 6, 3), wide=True),
    "efficientnet_b0": EfficientNetB0,
    "mobilenet_v3_large": MobileNetV3Large,
    "densenet121": DenseNet121,
    "regnet_y_400mf": RegNetY400MF,
}
# What torchvision is told to leave out: dropout and stochastic depth.
TORCHVISION: dict[str, dict[str, float]] = {
    "efficientnet_b0": {"dropout": 0.0, "stochastic_depth_prob": 0.0},
    "mobilenet_v3_large": {"dropout": 0.0},
}
