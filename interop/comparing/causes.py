"""Why a layer differs: PyTorch's settings are put in the place of the Flax layer's, one after the other, until the
numbers agree. What makes them agree is the cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interop.comparing.flax_side import MISSING, Seen
from interop.comparing.report import relative
from interop.comparing.torch_side import TorchLayer
from interop.conventions import FLAX_NAMES, flax_momentum

if TYPE_CHECKING:
    from interop.comparing._compare import FlaxModel

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "no activation": lambda x: x, "relu": jax.nn.relu, "relu6": jax.nn.relu6, "leaky_relu": jax.nn.leaky_relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu (tanh)": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu, "hard_swish": jax.nn.hard_swish, "hard_sigmoid": jax.nn.hard_sigmoid, "elu": jax.nn.elu,
    "selu": jax.nn.selu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "softplus": jax.nn.softplus,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
}  # fmt: skip


class Cause(NamedTuple):
    text: str
    proved: bool


def of_layer(
    model: FlaxModel,
    counterpart: str,
    layer: TorchLayer,
    entries: Mapping[str, np.ndarray],
    origin: Mapping[str, np.ndarray],
    *,
    training: bool,
    tolerance: float,
) -> Cause:
    """Why the layer gives something else than PyTorch's for PyTorch's own input.

    `entries` are the Flax layer's arrays by PyTorch's names, `origin` PyTorch's.
    """
    weights = _weights(layer.path, entries, origin)
    wanted = dict(_settings(layer.module))
    here = {name: model.setting(counterpart, name) for name in wanted}
    other = {name: value for name, value in wanted.items() if not _same(name, here[name], value)}
    usable = {name: value for name, value in other.items() if here[name] is not MISSING}
    changed = _fewest(lambda changes: alone(model, counterpart, layer, changes, training=training), usable, tolerance)
    if changed:
        words = "; ".join(f"{name} is {here[name]!r} here, {value!r} in PyTorch" for name, value in changed.items())
        final = alone(model, counterpart, layer, changed, training=training)
        proved = final is not None and final <= tolerance
        return Cause(f"{layer.path}: {words}" + (f"; and {weights}" if weights and not proved else ""), proved)
    if training and hasattr(layer.module, "running_var") and here["correction"] in (MISSING, 1):
        moved = _statistics(model, counterpart, layer)
        if moved:
            return Cause(f"{layer.path}: {moved}", True)
    if weights:
        return Cause(f"{layer.path}: {weights}", True)
    listed = ", ".join(
        f"{name} {here[name]!r} and {value!r}" for name, value in other.items() if here[name] is not MISSING
    )
    return Cause(
        f"{layer.path}: its arithmetic is another than that of {type(layer.module).__name__}"
        + (f" (settings that differ: {listed})" if listed else ""),
        False,
    )


def _fewest(
    difference: Callable[[Mapping[str, Any]], float | None], settings: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    """Those of the settings that make the layer agree, and no more; or else those that bring it nearer."""

    def agrees(changes: Mapping[str, Any]) -> bool:
        found = difference(changes)
        return found is not None and found <= tolerance

    if settings and agrees(settings):
        needed = dict(settings)
        for name in settings:
            fewer = {key: value for key, value in needed.items() if key != name}
            if fewer and agrees(fewer):
                needed = fewer
        return needed
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        before, after = difference(changed), difference({**changed, name: value})
        if after is not None and (before is None or after < before):
            changed[name] = value
    return changed


def before_layer(
    path: str, layers: list[TorchLayer], seen: Seen, counterparts: Mapping[str, str], tolerance: float
) -> Cause:
    """Why a layer that agrees by itself is given something else: what is computed between it and the one before."""
    order = [layer.path for layer in layers]
    index = order.index(path)
    layer = layers[index]
    given = seen.given.get(counterparts[path])
    if given is None:
        return Cause(f"what is computed before {path} differs", False)
    previous = [one for one in layers[:index] if one.path in counterparts and one.result.shape == layer.given.shape]
    for one in reversed(previous):
        there = _named(one.result, layer.given, tolerance)
        here = _named(one.result, given, tolerance)
        if there and here and there != here:
            return Cause(f"after {one.path}: {there} in PyTorch, {here} here", True)
    shapes = given.shape, layer.given.shape
    where = f"between {order[index - 1]} and {path}" if index else f"before {path}"
    if relative(given, layer.given) is None:
        return Cause(
            f"what is computed {where} differs: {path} is given {shapes[1]} in PyTorch, {shapes[0]} here", True
        )
    return Cause(
        f"what is computed {where} differs (an activation, pooling, a residual, the order of dimensions as flattened)",
        False,
    )


def _named(x: np.ndarray, y: np.ndarray, tolerance: float) -> str | None:
    """The activation that takes x to y, y with its channels at 1 or last."""
    for name, activation in _ACTIVATIONS.items():
        found = relative(y, np.asarray(activation(jnp.asarray(x))))
        if found is not None and found <= tolerance:
            return name
    return None


def alone(
    model: FlaxModel, counterpart: str, layer: TorchLayer, changes: Mapping[str, Any], *, training: bool
) -> float | None:
    """The difference of the Flax layer by itself from PyTorch's, for PyTorch's input: of what it gives, and of the
    statistics that it then has."""
    best = None
    for x in _laid(layer.given):
        try:
            y, after = model.alone(counterpart, jnp.asarray(x), changes, training=training)
        except Exception:  # a setting or an order of dimensions that the layer does not take
            continue
        found = relative(np.asarray(y), layer.result) if isinstance(y, jax.Array) else None
        if found is None:
            continue
        for name, flax_name in FLAX_NAMES.items():
            if training and name.startswith("running") and name in layer.after and flax_name in after:
                found = max(found, relative(after[flax_name], layer.after[name]) or 0.0)
        best = found if best is None else min(best, found)
    return best


def _laid(x: np.ndarray) -> list[np.ndarray]:
    return [x] if x.ndim < 3 else [np.moveaxis(x, 1, -1), x]


def _statistics(model: FlaxModel, counterpart: str, layer: TorchLayer) -> str | None:
    """Whether the variance tracked is the biased one, or by another momentum."""
    for x in _laid(layer.given):
        try:
            _, after = model.alone(counterpart, jnp.asarray(x), {}, training=True)
        except Exception:
            continue
        found, expected = after.get("var"), layer.after.get("running_var")
        if found is None or expected is None or found.shape != expected.shape:
            continue
        taken = 0.1 if layer.module.momentum is None else layer.module.momentum
        count = layer.given.size // expected.size
        batch = layer.given.swapaxes(0, 1).reshape(expected.size, -1).var(1)
        biased = expected - taken * batch * count / (count - 1) + taken * batch
        if np.allclose(found, biased, rtol=1e-4):
            return "it tracks the biased variance, PyTorch the unbiased one: jaxnorm's BatchNorm does as PyTorch"
    return None


def _weights(path: str, entries: Mapping[str, np.ndarray], origin: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the layer's arrays."""
    wrong = []
    for name, value in origin.items():
        if name.rpartition(".")[0] != path or name not in entries or name.endswith("num_batches_tracked"):
            continue
        found = entries[name]
        if found.shape == value.shape and found.dtype == value.dtype and (relative(found, value) or 0.0) <= 1e-6:
            continue
        if found.shape == value.shape and np.array_equal(found, value):
            continue
        wrong.append(f"{name.rpartition('.')[2]} {_how(name, found, value)}")
    return ", ".join(wrong) or None


def _how(name: str, found: np.ndarray, value: np.ndarray) -> str:
    last = name.rpartition(".")[2]
    if (last == "running_mean" and not found.any()) or (last == "running_var" and (found == 1).all()):
        return "is as it was at the beginning: the running statistics were not loaded"
    if found.dtype != value.dtype and np.allclose(found.astype(np.float32), value.astype(np.float32), rtol=1e-2):
        return f"is {found.dtype} here, {value.dtype} in PyTorch"
    if found.ndim >= 2 and found.size == value.size:
        for axes in _permutations(found.ndim):
            if found.transpose(axes).shape == value.shape and np.allclose(found.transpose(axes), value, rtol=1e-5):
                return f"has its dimensions in another order: {found.shape} transposed by {axes} is PyTorch's"
    if found.ndim >= 2 and found.shape == value.shape:
        flipped = np.flip(found, tuple(range(2, found.ndim)))
        if found.ndim > 2 and np.allclose(flipped, value, rtol=1e-5):
            return "has its kernel the other way round"
    return "holds other values than PyTorch's: it was not loaded, or was changed"


def _permutations(ndim: int) -> Iterator[tuple[int, ...]]:
    import itertools

    yield from (axes for axes in itertools.permutations(range(ndim)) if axes != tuple(range(ndim)))


def _settings(module: Any) -> Iterator[tuple[str, Any]]:
    """A PyTorch layer's settings by the names of Flax's."""
    if hasattr(module, "padding") and hasattr(module, "stride") and hasattr(module, "dilation"):
        spatial = len(module.kernel_size) if isinstance(module.kernel_size, tuple) else 1
        if isinstance(module.padding, str):
            yield "padding", module.padding.upper()
        else:
            yield "padding", tuple((p, p) for p in _each(module.padding, spatial))
        yield "strides", _each(module.stride, spatial)
        yield "kernel_dilation", _each(module.dilation, spatial)
        yield "feature_group_count", module.groups
    if hasattr(module, "eps"):
        yield "epsilon", module.eps
    if hasattr(module, "momentum"):
        yield "momentum", flax_momentum(module.momentum)
    if hasattr(module, "num_groups"):
        yield "num_groups", module.num_groups
    if hasattr(module, "running_var"):
        yield "correction", 1
        yield "use_running_average", not module.training
    yield "dtype", None


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count


def _same(name: str, here: Any, there: Any) -> bool:
    if here is MISSING:
        return False
    if name == "padding":
        return _pads(here) == _pads(there)
    if isinstance(there, tuple):
        return _each(1 if here is None else here, len(there)) == there
    if isinstance(there, float) and isinstance(here, (int, float)):
        return abs(here - there) <= 1e-9 * max(abs(there), 1e-30)
    return bool(here == there)


def _pads(padding: Any) -> Any:
    if isinstance(padding, str):
        return padding.upper()
    if isinstance(padding, int):
        return padding
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
