"""BatchNorm in training, library beside library: the same float32 input, and a float64 reference in NumPy.

    python benchmarks/comparison.py            # prints the table
    python benchmarks/comparison.py --write    # and writes benchmarks/results/comparison.md

A library that is not installed has "not installed" in its column; `pip install --no-deps --target DIR equinox keras
namex h5py optree torchax`, with DIR on PYTHONPATH, brings them beside this environment. (torchax 0.0.13 does not import
with torch 2.13; its repository's newest commit does.) Keras 3 runs on its JAX backend, torchax's layer is a
torch.nn.BatchNorm2d that torchax runs. All is on CPU; the errors are norms, relative to those of the reference.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

SHAPE = (32, 8, 8, 16)
MEANS = (0.0, 10.0, 1e3, 1e4, 1e5)
EPSILON = 1e-5
Arrays = tuple[np.ndarray, ...]


class Side:
    """A BatchNorm layer of a library. Images are (N, H, W, C); `kept` is the share of the old running statistics that a
    step keeps."""

    masks = False
    compiled: Any = None

    def __init__(self, channels: int, kept: float):
        raise NotImplementedError

    def train(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        """The output, without an update of the statistics: what JAX differentiates."""
        raise NotImplementedError

    def gradient(self, x: np.ndarray, dy: np.ndarray) -> Arrays:
        """Output and the input's gradient. The layer stays as it is, so that all means share a compiled program."""
        if self.compiled is None:

            def both(x: jax.Array, dy: jax.Array) -> Any:
                y, vjp = jax.vjp(self.train, x)
                return y, vjp(dy)[0]

            self.compiled = jax.jit(both)
        y, dx = self.compiled(jnp.asarray(x), jnp.asarray(dy))
        return np.asarray(y), np.asarray(dx)

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        raise NotImplementedError

    def statistics(self) -> Arrays:
        """Mean and variance that eval mode uses."""
        raise NotImplementedError

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        """The output in eval mode with these running statistics."""
        raise NotImplementedError


class FlaxNnx(Side):
    """flax.nnx.BatchNorm, as it comes: `use_fast_variance=True`."""

    layer: Any = nnx.BatchNorm
    fields: Mapping[str, Any] = MappingProxyType({})
    masks = True

    def __init__(self, channels: int, kept: float, **fields: Any):
        fields = {**self.fields, "momentum": kept, "epsilon": EPSILON, **fields}
        self.norm = self.layer(channels, **fields, rngs=nnx.Rngs(0))

    def train(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        return nnx.clone(self.norm)(x, mask=mask)

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        self.norm(x, mask=mask)

    def statistics(self) -> Arrays:
        return np.asarray(self.norm.mean[...]), np.asarray(self.norm.var[...])

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        norm = nnx.clone(self.norm)
        norm.mean[...], norm.var[...] = jnp.asarray(mean), jnp.asarray(var)
        return np.asarray(norm(jnp.asarray(x), use_running_average=True))


class FlaxNnxSlow(FlaxNnx):
    fields = MappingProxyType({"use_fast_variance": False})


class Jaxnorm(FlaxNnx):
    layer = jaxnorm.nnx.BatchNorm


class FlaxLinen(Side):
    layer: Any = linen.BatchNorm
    masks = True

    def __init__(self, channels: int, kept: float, **fields: Any):
        self.norm = self.layer(momentum=kept, epsilon=EPSILON, **fields)
        self.variables = self.norm.init(jax.random.key(0), jnp.zeros((2, channels)), use_running_average=True)

    def _apply(self, x: jax.Array, mask: jax.Array | None) -> Any:
        options: Any = {"use_running_average": False, "mask": mask}
        return self.norm.apply(self.variables, x, **options, mutable=["batch_stats"])

    def train(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        return self._apply(x, mask)[0]

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        self.variables = {**self.variables, **self._apply(x, mask)[1]}

    def statistics(self) -> Arrays:
        found = self.variables["batch_stats"]
        return np.asarray(found["mean"]), np.asarray(found["var"])

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        variables = {**self.variables, "batch_stats": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}
        return np.asarray(self.norm.apply(variables, jnp.asarray(x), use_running_average=True))


class JaxnormLinen(FlaxLinen):
    layer = jaxnorm.linen.BatchNorm


class Equinox(Side):
    """equinox.nn.BatchNorm over a vmap, its mode "batch"."""

    mode: Any = "batch"

    def __init__(self, channels: int, kept: float):
        import equinox

        self.eqx = equinox
        self.norm, self.state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
            channels, "batch", momentum=kept, eps=EPSILON, mode=self.mode
        )

    def _apply(self, x: jax.Array, inference: bool = False) -> Any:
        def one(image: jax.Array, state: Any) -> Any:
            return self.norm(image, state, inference=inference)

        both = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        images = x if x.ndim == 2 else jnp.moveaxis(x, -1, 1)
        y, state = both(images, self.state)
        return (y if x.ndim == 2 else jnp.moveaxis(y, 1, -1)), state

    def train(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        return self._apply(x)[0]

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        self.state = self._apply(x)[1]

    def statistics(self) -> Arrays:
        if self.mode == "ema":
            mean, var = (np.asarray(v) for v in self.state.get(self.norm.ema_state_index))
            return mean, var
        # As its __call__ divides them in inference.
        scale = 1 - self.norm.momentum ** float(self.state.get(self.norm.batch_counter))
        mean, var = (np.asarray(v, np.float64) / scale for v in self.state.get(self.norm.batch_state_index))
        return mean, var

    def _set(self, mean: jax.Array, var: jax.Array) -> Any:
        # momentum**counter is 0 after one batch with momentum 0: the state is what eval mode uses.
        norm, state = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)(
            len(mean), "batch", momentum=0.0, eps=EPSILON, mode=self.mode
        )
        if self.mode == "batch":
            state = state.set(norm.batch_counter, jnp.asarray(1))
            return norm, state.set(norm.batch_state_index, (mean, var))
        return norm, state.set(norm.ema_state_index, (mean, var))

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        self.norm, self.state = self._set(jnp.asarray(mean), jnp.asarray(var))
        return np.asarray(self._apply(jnp.asarray(x), inference=True)[0])


class EquinoxEma(Equinox):
    mode = "ema"


class Keras(Side):
    masks = True

    def __init__(self, channels: int, kept: float):
        import keras

        self.norm = keras.layers.BatchNormalization(momentum=kept, epsilon=EPSILON)
        self.norm.build((None, None, None, channels))

    def _call(self, x: jax.Array, mask: jax.Array | None, training: bool = True, moving: Any = None) -> Any:
        # The layer is built for images: a batch of vectors is one of single pixels. A mask has one dimension less.
        images = x if x.ndim == 4 else x[:, None, None]
        options: dict[str, Any] = {"training": training}
        if mask is not None:
            options["mask"] = jnp.broadcast_to(mask.reshape(-1, 1, 1), images.shape[:-1])
        trained = [v.value for v in self.norm.trainable_variables]
        moving = [v.value for v in self.norm.non_trainable_variables] if moving is None else moving
        y, moved = self.norm.stateless_call(trained, moving, images, **options)
        return y.reshape(x.shape), moved

    def train(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        return self._call(x, mask)[0]

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        for variable, value in zip(self.norm.non_trainable_variables, self._call(x, mask)[1], strict=True):
            variable.assign(value)

    def statistics(self) -> Arrays:
        return np.asarray(self.norm.moving_mean), np.asarray(self.norm.moving_variance)

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        return np.asarray(self._call(jnp.asarray(x), None, False, [jnp.asarray(mean), jnp.asarray(var)])[0])


def channels_first(x: Any) -> Any:
    return x if x.ndim == 2 else x.permute(0, 3, 1, 2)


def channels_last(x: Any) -> Any:
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1)


class Torch(Side):
    """torch.nn.BatchNorm2d, images in PyTorch's usual memory format: (N, C, H, W)."""

    layout: str | None = "contiguous_format"

    def __init__(self, channels: int, kept: float):
        import torch

        self.torch = torch
        self.norm = torch.nn.BatchNorm2d(channels, momentum=1 - kept, eps=EPSILON)

    def _call(self, x: Any) -> Any:
        # BatchNorm2d wants images: a batch of vectors is one of single pixels.
        images = channels_first(x) if x.ndim == 4 else x[:, :, None, None]
        if self.layout is not None:
            images = images.contiguous(memory_format=getattr(self.torch, self.layout))
        y = self.norm(images)
        return channels_last(y) if x.ndim == 4 else y[:, :, 0, 0]

    def gradient(self, x: np.ndarray, dy: np.ndarray) -> Arrays:
        given = self.torch.tensor(x, requires_grad=True)
        y = self._call(given)
        y.backward(self.torch.tensor(dy))
        return y.detach().numpy(), given.grad.numpy()

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        self._call(self.torch.tensor(np.asarray(x)))

    def statistics(self) -> Arrays:
        return self.norm.running_mean.numpy().copy(), self.norm.running_var.numpy().copy()

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        self.norm.eval()
        self.norm.running_mean.copy_(self.torch.tensor(mean))
        self.norm.running_var.copy_(self.torch.tensor(var))
        return self._call(self.torch.tensor(x)).detach().numpy()


class TorchChannelsLast(Torch):
    layout = "channels_last"


class Torchax(Torch):
    """torch.nn.BatchNorm2d by torchax: the step as its make_train_step takes it, the statistics of the module called
    eagerly."""

    layout = None

    def __init__(self, channels: int, kept: float):
        super().__init__(channels, kept)
        import torchax
        from torchax import interop

        self.torchax, self.interop, self.env = torchax, interop, torchax.default_env()
        with self.env:
            self.norm = self.norm.to("jax")

    def train(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        return self.interop.jax_view(self._call)(x)

    def gradient(self, x: np.ndarray, dy: np.ndarray) -> Arrays:
        with self.env:
            return Side.gradient(self, x, dy)

    def update(self, x: jax.Array, mask: jax.Array | None = None) -> None:
        with self.env:
            self._call(self.torch.tensor(np.asarray(x)).to("jax"))

    def statistics(self) -> Arrays:
        return tuple(np.asarray(v.jax()) for v in (self.norm.running_mean, self.norm.running_var))

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        with self.env:
            self.norm.eval()
            tensors = [self.torch.tensor(v).to("jax") for v in (mean, var, x)]
            self.norm.running_mean, self.norm.running_var = tensors[:2]
            return np.asarray(self._call(tensors[2]).jax())


SIDES: dict[str, tuple[type[Side], str]] = {
    "jaxnorm nnx": (Jaxnorm, "jaxnorm"),
    "jaxnorm linen": (JaxnormLinen, "jaxnorm"),
    "PyTorch": (Torch, "torch"),
    "PyTorch, channels_last": (TorchChannelsLast, "torch"),
    "Flax nnx": (FlaxNnx, "flax"),
    "Flax nnx, use_fast_variance=False": (FlaxNnxSlow, "flax"),
    "Flax linen": (FlaxLinen, "flax"),
    'Equinox, "batch"': (Equinox, "equinox"),
    'Equinox, "ema"': (EquinoxEma, "equinox"),
    "Keras on JAX": (Keras, "keras"),
    "torchax": (Torchax, "torchax"),
}


def numbers(mean: float, shape: tuple[int, ...] = SHAPE) -> Arrays:
    """An input of deviation 1 about `mean`, as float32 has it, and a cotangent."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape))
    return (x + mean).astype(np.float32), dy.astype(np.float32)


def reference(x: np.ndarray, dy: np.ndarray) -> Arrays:
    """Output, gradient, mean and biased variance in float64."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    scale = 1 / np.sqrt(var + EPSILON)
    y = (x - mean) * scale
    dx = scale * (dy - dy.mean(axes) - y * (dy * y).mean(axes))
    return y, dx, mean, var


def error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def shown(value: float) -> str:
    return f"{value:.0e}" if np.isfinite(value) else "NaN"


def correction(side: type[Side]) -> int | None:
    """What the running variance takes in: 0 for the biased variance, 1 for the unbiased, None if it does not move."""
    x, _ = numbers(0.0, (8, 16))
    layer = side(16, kept=0.0)
    layer.update(jnp.asarray(x))
    var = layer.statistics()[1]
    if (var == 1).all():
        return None
    return min((0, 1), key=lambda ddof: error(var, x.astype(np.float64).var(0, ddof=ddof)))


def digits(side: type[Side]) -> Iterator[tuple[str, str]]:
    ddof = correction(side)
    fresh = side(SHAPE[-1], kept=0.0)
    for mean in MEANS:
        x, dy = numbers(mean)
        y, dx, expected, var = reference(x, dy)
        layer = side(SHAPE[-1], kept=0.0)
        layer.update(jnp.asarray(x))
        found_y, found_dx = fresh.gradient(x, dy)
        found_mean, found_var = layer.statistics()
        count = x.size // x.shape[-1]
        var = var * count / (count - (ddof or 0))
        yield f"output, mean {mean:g}", shown(error(found_y, y))
        yield f"gradient, mean {mean:g}", shown(error(found_dx, dx))
        yield f"running mean, mean {mean:g}", "does not move" if ddof is None else shown(error(found_mean, expected))
        yield f"running variance, mean {mean:g}", "does not move" if ddof is None else shown(error(found_var, var))
        mean32, var32 = expected.astype(np.float32), var.astype(np.float32)
        exact = (x.astype(np.float64) - mean32) / np.sqrt(var32.astype(np.float64) + EPSILON)
        yield f"eval output, mean {mean:g}", shown(error(side(SHAPE[-1], 0.0).evaluate(x, mean32, var32), exact))


def behaviour(side: type[Side]) -> Iterator[tuple[str, str]]:
    ddof = correction(side)
    yield "running variance takes in", {None: "nothing", 0: "m2 / n", 1: "m2 / (n - 1)"}[ddof]
    yield "eval mean and variance after 1 step", after(side, 1)
    yield "after 10 steps", after(side, 10)
    yield "one value per channel in training", alone(side)
    yield "mask, 10 of 16 examples", masked(side)
    yield "mask that leaves nothing", emptied(side)
    yield "replicas with 8 and 2 of 8 examples", uneven(side)
    yield "jit, batch sharded over 8 devices", sharded(side)


def after(side: type[Side], steps: int) -> str:
    """A step takes in a tenth of a batch of mean 3 and variance 4."""
    x, _ = numbers(0.0, (64, 16))
    x = x - x.mean(0)
    x = 3 + 2 * x / x.std(0)
    layer = side(16, kept=0.9)
    for _ in range(steps):
        layer.update(jnp.asarray(x))
    mean, var = layer.statistics()
    return f"{mean.mean():.2f}, {var.mean():.2f}"


def alone(side: type[Side]) -> str:
    layer = side(16, kept=0.9)
    try:
        layer.update(jnp.ones((1, 16)))
    except ValueError:
        return "error"
    return "no error"


def masked(side: type[Side]) -> str:
    """The error of the running statistics."""
    if not side.masks:
        return "no mask"
    x, _ = numbers(0.0, (16, 8, 8, 16))
    mask = (np.arange(16) < 10)[:, None, None, None]
    layer = side(16, kept=0.0)
    layer.update(jnp.asarray(x), jnp.asarray(mask))
    real = x[:10].astype(np.float64)
    expected = real.mean((0, 1, 2)), real.var((0, 1, 2), ddof=correction(side) or 0)
    return shown(max(error(a, b) for a, b in zip(layer.statistics(), expected, strict=True)))


def emptied(side: type[Side]) -> str:
    if not side.masks:
        return "no mask"
    x, _ = numbers(0.0, (16, 16))
    layer = side(16, kept=0.9)
    layer.update(jnp.asarray(x), jnp.zeros((16, 1), bool))
    mean, var = (v.mean() for v in layer.statistics())
    return f"statistics {mean:.1f}, {var:.1f}" if np.isfinite(mean + var) else "NaN"


def uneven(side: type[Side]) -> str:
    """The error of the output for the ten examples, two replicas under vmap with an axis name."""
    if not issubclass(side, FlaxNnx | FlaxLinen):
        return "no axis name" if not issubclass(side, Equinox) else "no mask"
    x, dy = numbers(0.0, (2, 8, 16))
    x = x + np.array([0, 3], np.float32)[:, None, None]
    mask = np.array([[True] * 8, [True] * 2 + [False] * 6])[..., None]
    layer = side(16, kept=0.0, axis_name="batch")
    y = jax.vmap(layer.train, axis_name="batch")(jnp.asarray(x), jnp.asarray(mask))
    real = mask[..., 0]
    return shown(error(np.asarray(y)[real], reference(x[real], dy[real])[0]))


def sharded(side: type[Side]) -> str:
    if side in (Torch, TorchChannelsLast):
        return "no JAX"
    x, dy = numbers(0.0)
    x = x + np.repeat(np.arange(8, dtype=np.float32), 4)[:, None, None, None]
    layer = side(SHAPE[-1], kept=0.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    given = jax.device_put(x, NamedSharding(mesh, P("data")))
    if isinstance(layer, Torchax):
        with layer.env:
            y = jax.jit(layer.train)(given)
    else:
        y = jax.jit(layer.train)(given)
    return shown(error(y, reference(x, dy)[0]))


def column(side: type[Side], library: str) -> dict[str, str] | str:
    try:
        importlib.import_module(library)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as problem:
        return f"import fails: {type(problem).__name__}"
    found = dict(digits(side))
    kinds = dict.fromkeys(key.split(",")[0] for key in found)
    ordered = {key: found[key] for kind in kinds for key in found if key.split(",")[0] == kind}
    return {**ordered, **dict(behaviour(side))}


def versions() -> str:
    names = ("jax", "flax", "torch", "equinox", "keras", "torchax", "numpy")
    found = []
    for name in names:
        try:
            module = importlib.import_module(name)
            found.append(f"{name} {getattr(module, '__version__', None) or importlib.metadata.version(name)}")
        except Exception:
            found.append(f"{name} none")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/comparison.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = {}
    for name, side in SIDES.items():
        began = time.perf_counter()
        columns[name] = column(*side)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    rows = list(dict.fromkeys(key for found in columns.values() if isinstance(found, dict) for key in found))
    table = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [found if isinstance(found, str) else found[row] for found in columns.values()]
        table.append(f"| {row} | {' | '.join(cells)} |")
    today = datetime.date.today()
    text = "\n".join(
        [
            "# BatchNorm in training, library beside library",
            "",
            f"Written by `python benchmarks/comparison.py --write` on {today}, {platform.machine()};",
            f"{versions()}.",
            "",
            f"Float32 input of deviation 1, {'x'.join(map(str, SHAPE))} (N, H, W, C); the mean is in deviations.",
            "Errors are relative to float64 in NumPy, norm-wise; that of the running variance is to the variance that",
            "the library means (m2 / n or m2 / (n - 1)). A step takes in all of the batch, so that the running",
            "statistics are its own; in the rows with steps a tenth of one of mean 3 and variance 4, from 0 and 1.",
            "Two rows are of replicas: under vmap with an axis name, with masks that leave 8 and 2 examples; and under",
            "jit, with the whole batch sharded over 8 devices.",
            "",
            *table,
            "",
        ]
    )
    print(text)
    if options.write:
        path = pathlib.Path(__file__).parent / "results" / "comparison.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
