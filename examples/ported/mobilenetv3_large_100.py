"""mobilenetv3_large_100 in Flax NNX, as timm:mobilenetv3_large_100 has it in PyTorch. Images are (N, H, W, C).

    model = mobilenetv3_large_100(rngs=nnx.Rngs(0))
    interop.load_state_dict(model, state_dict)  # PyTorch's

Compared with PyTorch 2.13.0+cpu in float64 (jax 0.10.2, flax 0.12.8), largest difference relative
to the largest value: eval 2e-15, train 2e-14, gradients 2e-10, running statistics 1e-14.
"""

from collections.abc import Callable
from functools import partial

import jax
import jaxnorm
from flax import nnx

__all__ = ["mobilenetv3_large_100", "MobileNetV3"]
BatchNorm = partial(jaxnorm.nnx.BatchNorm, momentum=0.9, count_batches=True, promote_dtype=jaxnorm.nnx.input_dtype)


class SqueezeExcite(nnx.Module):
    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs) -> None:
        self.conv_reduce = nnx.Conv(in_features, out_features, (1, 1), rngs=rngs)
        self.conv_expand = nnx.Conv(out_features, in_features, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_se = self.conv_reduce(x.mean((1, 2), keepdims=True))
        x_se = nnx.hard_sigmoid(self.conv_expand(nnx.relu(x_se)))
        return x * x_se


class DepthwiseSeparableConv(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv_dw = nnx.Conv(16, 16, (3, 3), padding=1, feature_group_count=16, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(16, rngs=rngs)
        self.conv_pw = nnx.Conv(16, 16, (1, 1), use_bias=False, rngs=rngs)
        self.bn2 = BatchNorm(16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(y)) + x


class InvertedResidual(nnx.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        se_features: int,
        conv_pwl_features: int,
        *,
        strides: int = 1,
        activation: Callable = nnx.hard_swish,
        with_se: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        self.residual = in_features == conv_pwl_features
        self.conv_pw = nnx.Conv(in_features, out_features, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(out_features, rngs=rngs)
        self.conv_dw = nnx.Conv(
            out_features,
            out_features,
            (kernel_size, kernel_size),
            strides=strides,
            padding=kernel_size // 2,
            feature_group_count=out_features,
            use_bias=False,
            rngs=rngs,
        )
        self.bn2 = BatchNorm(out_features, rngs=rngs)
        if with_se:
            self.se = SqueezeExcite(out_features, se_features, rngs=rngs)
        else:
            self.se = None
        self.conv_pwl = nnx.Conv(out_features, conv_pwl_features, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = BatchNorm(conv_pwl_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activation(self.bn1(self.conv_pw(x)))
        y = self.activation(self.bn2(self.conv_dw(y)))
        if self.se is not None:
            y = self.se(y)
        y = self.bn3(self.conv_pwl(y))
        if self.residual:
            y = y + x
        return y


class ConvBnAct(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(160, 960, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(960, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.hard_swish(self.bn1(self.conv(x)))


class MobileNetV3(nnx.Module):
    def __init__(self, *, layers: tuple[int, ...] = (2, 3, 2, 3), num_classes: int = 1000, rngs: nnx.Rngs) -> None:
        self.conv_stem = nnx.Conv(3, 16, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(16, rngs=rngs)
        self.blocks = nnx.Sequential(
            nnx.Sequential(DepthwiseSeparableConv(rngs=rngs)),
            nnx.Sequential(
                InvertedResidual(16, 64, 3, 32, 24, strides=2, activation=nnx.relu, rngs=rngs),
                *(InvertedResidual(24, 72, 3, 32, 24, activation=nnx.relu, rngs=rngs) for _ in range(layers[0] - 1)),
            ),
            nnx.Sequential(
                InvertedResidual(24, 72, 5, 24, 40, strides=2, activation=nnx.relu, with_se=True, rngs=rngs),
                *(
                    InvertedResidual(40, 120, 5, 32, 40, activation=nnx.relu, with_se=True, rngs=rngs)
                    for _ in range(layers[1] - 1)
                ),
            ),
            nnx.Sequential(
                InvertedResidual(40, 240, 3, 32, 80, strides=2, rngs=rngs),
                InvertedResidual(80, 200, 3, 32, 80, rngs=rngs),
                *(InvertedResidual(80, 184, 3, 32, 80, rngs=rngs) for _ in range(2)),
            ),
            nnx.Sequential(
                InvertedResidual(80, 480, 3, 120, 112, with_se=True, rngs=rngs),
                *(InvertedResidual(112, 672, 3, 168, 112, with_se=True, rngs=rngs) for _ in range(layers[2] - 1)),
            ),
            nnx.Sequential(
                InvertedResidual(112, 672, 5, 168, 160, strides=2, with_se=True, rngs=rngs),
                *(InvertedResidual(160, 960, 5, 240, 160, with_se=True, rngs=rngs) for _ in range(layers[3] - 1)),
            ),
            nnx.Sequential(ConvBnAct(rngs=rngs)),
        )
        self.conv_head = nnx.Conv(960, 1280, (1, 1), rngs=rngs)
        self.classifier = nnx.Linear(1280, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        # x: (N, 64, 64, 3)
        x = nnx.hard_swish(self.bn1(self.conv_stem(x)))  # (N, 32, 32, 16)
        x = self.blocks(x).mean((1, 2), keepdims=True)  # (N, 1, 1, 960)
        x = nnx.hard_swish(self.conv_head(x))  # (N, 1, 1, 1280)
        return self.classifier(x.reshape(x.shape[0], -1))


def mobilenetv3_large_100(
    *, layers: tuple[int, ...] = (2, 3, 2, 3), num_classes: int = 1000, rngs: nnx.Rngs
) -> MobileNetV3:
    return MobileNetV3(layers=layers, num_classes=num_classes, rngs=rngs)
