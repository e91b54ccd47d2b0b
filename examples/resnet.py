"""ResNets written by hand in Flax, Linen's and NNX's, with jaxnorm's BatchNorm and torchvision's names.

The names are the paths in the model: weights of torchvision and timm load with no rename, and are exported strictly:

    model = resnet.nnx_resnet("resnet50", rngs=nnx.Rngs(0))
    interop.load_state_dict(model, torchvision.models.resnet50(weights="DEFAULT").state_dict())

    module = resnet.linen_resnet("resnet50")
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))   # no initial values needed
    module, variables = interop.load_state_dict((module, variables), state_dict)

Images are (batch, height, width, channels). Deep Residual Learning, https://arxiv.org/abs/1512.03385; the stride of a
bottleneck is in its 3x3 convolution, as in torchvision ("v1.5").

Run it to see that all three compute the same: python examples/resnet.py resnet18
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxnorm


class Architecture(NamedTuple):
    """What torchvision's ResNets differ in."""

    bottleneck: bool
    depths: tuple[int, ...]  # blocks of each stage
    groups: int = 1  # of a bottleneck's 3x3 convolution
    group_width: int = 64  # channels of such a group, at the first stage

    def inner(self, features: int) -> int:
        """Channels of the 3x3 convolution in a bottleneck of `features` x 4."""
        return features * self.group_width // 64 * self.groups


ARCHITECTURES = {
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "resnet34": Architecture(False, (3, 4, 6, 3)),
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet101": Architecture(True, (3, 4, 23, 3)),
    "resnet152": Architecture(True, (3, 8, 36, 3)),
    "wide_resnet50_2": Architecture(True, (3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": Architecture(True, (3, 4, 23, 3), group_width=128),
    "resnext50_32x4d": Architecture(True, (3, 4, 6, 3), groups=32, group_width=4),
    "resnext101_32x8d": Architecture(True, (3, 4, 23, 3), groups=32, group_width=8),
}

_he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's for convolutions


def _max_pool(x: jax.Array) -> jax.Array:
    return linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


# NNX


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, **options: Any) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=_he,
        **options,
    )


def _norm(features: int, **options: Any) -> jaxnorm.nnx.BatchNorm:
    return jaxnorm.nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, count_batches=True, **options)


class NnxBasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, features: int, stride: int, of: Architecture, **options: Any):
        self.conv1 = _conv(inputs, features, 3, stride, **options)
        self.bn1 = _norm(features, **options)
        self.conv2 = _conv(features, features, 3, **options)
        self.bn2 = _norm(features, **options)
        self.downsample = _nnx_downsample(inputs, features, stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class NnxBottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, features: int, stride: int, of: Architecture, **options: Any):
        inner, outputs = of.inner(features), 4 * features
        self.conv1 = _conv(inputs, inner, 1, **options)
        self.bn1 = _norm(inner, **options)
        self.conv2 = _conv(inner, inner, 3, stride, of.groups, **options)
        self.bn2 = _norm(inner, **options)
        self.conv3 = _conv(inner, outputs, 1, **options)
        self.bn3 = _norm(outputs, **options)
        self.downsample = _nnx_downsample(inputs, outputs, stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


def _nnx_downsample(inputs: int, outputs: int, stride: int, **options: Any) -> Any:
    if stride == 1 and inputs == outputs:
        return None
    return nnx.Sequential(_conv(inputs, outputs, 1, stride, **options), _norm(outputs, **options))


class NnxResNet(nnx.Module):
    """A ResNet in NNX. `model.train()` and `model.eval()` choose the mode.

    Args:
        of: the architecture.
        num_classes: outputs.
        options: of all layers: `param_dtype`, `dtype`, and `rngs`.
    """

    def __init__(self, of: Architecture, num_classes: int = 1000, **options: Any):
        block = NnxBottleneck if of.bottleneck else NnxBasicBlock
        self.conv1 = _conv(3, 64, 7, 2, **options)
        self.bn1 = _norm(64, **options)
        self.stages = len(of.depths)
        inputs = 64
        for i, depth in enumerate(of.depths):
            features = 64 * 2**i
            blocks = []
            for j in range(depth):
                blocks.append(block(inputs, features, 2 if i > 0 and j == 0 else 1, of, **options))
                inputs = 4 * features if of.bottleneck else features
            setattr(self, f"layer{i + 1}", nnx.Sequential(*blocks))
        self.fc = nnx.Linear(inputs, num_classes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _max_pool(jax.nn.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((1, 2)))


def nnx_resnet(name: str, num_classes: int = 1000, **options: Any) -> NnxResNet:
    """A ResNet in NNX by torchvision's name."""
    return NnxResNet(ARCHITECTURES[name], num_classes, **options)


# Linen


class _Layers(NamedTuple):
    """The layers of a Linen model, with its options."""

    train: bool
    axis_name: str | None
    param_dtype: Any

    def conv(self, outputs: int, size: int, stride: int = 1, groups: int = 1, *, name: str) -> Callable[..., Any]:
        return linen.Conv(
            outputs,
            (size, size),
            strides=stride,
            padding=size // 2,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=_he,
            param_dtype=self.param_dtype,
            name=name,
        )

    def norm(self, name: str) -> Callable[..., Any]:
        return jaxnorm.linen.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=1e-5,
            count_batches=True,
            axis_name=self.axis_name,
            param_dtype=self.param_dtype,
            force_float32_reductions=jnp.finfo(self.param_dtype).bits <= 32,  # running statistics in float32 or wider
            name=name,
        )


class LinenBlock(linen.Module):
    """A basic block or a bottleneck."""

    features: int
    stride: int
    of: Architecture

    @linen.compact
    def __call__(self, x: jax.Array, layers: _Layers) -> jax.Array:
        conv, norm = layers.conv, layers.norm
        if self.of.bottleneck:
            inner, outputs = self.of.inner(self.features), 4 * self.features
            y = jax.nn.relu(norm("bn1")(conv(inner, 1, name="conv1")(x)))
            y = jax.nn.relu(norm("bn2")(conv(inner, 3, self.stride, self.of.groups, name="conv2")(y)))
            y = norm("bn3")(conv(outputs, 1, name="conv3")(y))
        else:
            outputs = self.features
            y = jax.nn.relu(norm("bn1")(conv(outputs, 3, self.stride, name="conv1")(x)))
            y = norm("bn2")(conv(outputs, 3, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != outputs:
            x = LinenDownsample(outputs, self.stride, name="downsample")(x, layers)
        return jax.nn.relu(y + x)


class LinenDownsample(linen.Module):
    """The shortcut where the shape changes. Its layers have the numbers that they have in PyTorch's Sequential."""

    outputs: int
    stride: int

    @linen.compact
    def __call__(self, x: jax.Array, layers: _Layers) -> jax.Array:
        return layers.norm("1")(layers.conv(self.outputs, 1, self.stride, name="0")(x))


class LinenStage(linen.Module):
    """Blocks in a row, by their numbers."""

    features: int
    stride: int
    depth: int
    of: Architecture

    @linen.compact
    def __call__(self, x: jax.Array, layers: _Layers) -> jax.Array:
        for i in range(self.depth):
            x = LinenBlock(self.features, self.stride if i == 0 else 1, self.of, name=str(i))(x, layers)
        return x


class LinenResNet(linen.Module):
    """A ResNet in Linen: `module.apply(variables, x, train=True, mutable=["batch_stats"])`.

    Attributes:
        of: the architecture.
        num_classes: outputs.
        axis_name: over which BatchNorm layers share their statistics.
        param_dtype: of the parameters.
    """

    of: Architecture
    num_classes: int = 1000
    axis_name: str | None = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = _Layers(train, self.axis_name, self.param_dtype)
        x = _max_pool(jax.nn.relu(layers.norm("bn1")(layers.conv(64, 7, 2, name="conv1")(x))))
        for i, depth in enumerate(self.of.depths):
            x = LinenStage(64 * 2**i, 1 if i == 0 else 2, depth, self.of, name=f"layer{i + 1}")(x, layers)
        return linen.Dense(self.num_classes, param_dtype=self.param_dtype, name="fc")(x.mean((1, 2)))


def linen_resnet(name: str, num_classes: int = 1000, **fields: Any) -> LinenResNet:
    """A ResNet in Linen by torchvision's name."""
    return LinenResNet(ARCHITECTURES[name], num_classes, **fields)


def main(name: str) -> None:
    """torchvision's network, NNX's and Linen's with its weights, on the same noise."""
    import torch
    import torchvision_cpu  # noqa: F401
    from torchvision import models

    import interop

    torch.manual_seed(0)
    module = getattr(models, name)().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = module(images).numpy()
    x = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
    model = interop.load_state_dict(nnx.eval_shape(lambda: nnx_resnet(name, rngs=nnx.Rngs(0))), module.state_dict())
    model.eval()
    linen_module = linen_resnet(name)
    variables = jax.eval_shape(linen_module.init, jax.random.key(0), x)
    linen_module, variables = interop.load_state_dict((linen_module, variables), module.state_dict())
    print(f"{name}: {len(module.state_dict())} arrays. Largest difference to PyTorch, of {np.abs(expected).max():.3f}:")
    print(f"NNX    {np.abs(model(x) - expected).max():.1e}")
    print(f"Linen  {np.abs(linen_module.apply(variables, x) - expected).max():.1e}")
    for target in (model, (linen_module, variables)):
        arrays = {key: torch.tensor(value) for key, value in interop.state_dict(target).items()}
        module.load_state_dict(arrays, strict=True)
    print("Both are exported: load_state_dict(strict=True) takes them.")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "resnet18")
