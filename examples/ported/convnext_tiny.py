"""convnext_tiny in Flax NNX, as timm:convnext_tiny has it in PyTorch. Images are (N, H, W, C).

    model = convnext_tiny(rngs=nnx.Rngs(0))
    interop.load_state_dict(model, state_dict)  # PyTorch's

Compared with PyTorch 2.13.0+cpu in float64 (jax 0.10.2, flax 0.12.8), largest difference relative
to the largest value: eval 1e-15, train 1e-15, gradients 3e-15, running statistics 0e+00.
"""

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["convnext_tiny", "ConvNeXt"]


class Mlp(nnx.Module):
    def __init__(self, in_features: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(in_features, 4 * in_features, rngs=rngs)
        self.fc2 = nnx.Linear(4 * in_features, in_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class ConvNeXtBlock(nnx.Module):
    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.gamma = nnx.Param(jnp.full((features,), 1e-06, jnp.float32))
        self.conv_dw = nnx.Conv(features, features, (7, 7), padding=3, feature_group_count=features, rngs=rngs)
        self.norm = nnx.LayerNorm(features, epsilon=1e-06, rngs=rngs)
        self.mlp = Mlp(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.mlp(self.norm(self.conv_dw(x)))
        return y * self.gamma[...] + x


class ConvNeXtStage(nnx.Module):
    def __init__(
        self, features: int, blocks_features: int, depth: int, *, with_downsample: bool = False, rngs: nnx.Rngs
    ) -> None:
        if with_downsample:
            self.downsample = nnx.Sequential(
                nnx.LayerNorm(features, epsilon=1e-06, rngs=rngs),
                nnx.Conv(features, 2 * features, (2, 2), strides=2, padding=0, rngs=rngs),
            )
        else:
            self.downsample = None
        self.blocks = nnx.Sequential(*(ConvNeXtBlock(blocks_features, rngs=rngs) for _ in range(depth)))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.downsample is not None:
            x = self.downsample(x)
        return self.blocks(x)


class NormMlpClassifierHead(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(768, epsilon=1e-06, rngs=rngs)
        self.fc = nnx.Linear(768, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x.mean((1, 2), keepdims=True))
        return self.fc(x.reshape(x.shape[0], -1))


class ConvNeXt(nnx.Module):
    def __init__(self, *, layers: tuple[int, ...] = (3, 3, 9, 3), rngs: nnx.Rngs) -> None:
        self.stem = nnx.Sequential(
            nnx.Conv(3, 96, (4, 4), strides=4, padding=0, rngs=rngs), nnx.LayerNorm(96, epsilon=1e-06, rngs=rngs)
        )
        self.stages = nnx.Sequential(
            ConvNeXtStage(96, 96, layers[0], rngs=rngs),
            ConvNeXtStage(96, 192, layers[1], with_downsample=True, rngs=rngs),
            ConvNeXtStage(192, 384, layers[2], with_downsample=True, rngs=rngs),
            ConvNeXtStage(384, 768, layers[3], with_downsample=True, rngs=rngs),
        )
        self.head = NormMlpClassifierHead(rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.stages(self.stem(x)))


def convnext_tiny(*, layers: tuple[int, ...] = (3, 3, 9, 3), rngs: nnx.Rngs) -> ConvNeXt:
    return ConvNeXt(layers=layers, rngs=rngs)
