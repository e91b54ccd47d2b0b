"""A program: the source in a folder against what PyTorch computed, without torch. `proof.py` runs it.

All in double precision, also what the source makes in single precision: so did PyTorch's code, which a model that is
converted to double precision may run in either.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from interop.ops.activations import hardsigmoid
from interop.ops.convolution import _convolution
from interop.ops.draws import middles
from interop.weights._state_dict import load_state_dict, state_dict

# What is left of a gradient that cancels to nothing (of a bias before BatchNorm) is rounding. A difference of a hundred
# times PyTorch's own rounding counts as 1e-8.
_ROUNDINGS = 1e10


def main(folder: pathlib.Path, function: str, plain: bool) -> None:
    """Writes {what: {name: difference}}; `plain`: BatchNorm is Flax's."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    names: dict[str, Any] = {"__name__": "ported"}
    text = (folder / "ported.py").read_text(encoding="utf-8")
    for single in ("astype(jnp.float32", "dtype=jnp.float32"):  # arrays that are written out stay rounded as they were
        text = text.replace(single, single.replace("32", "64"))
    exec(compile(text, "ported.py", "exec"), names)
    with _zeros_for_draws():
        model = names[function](rngs=nnx.Rngs(0))

    def wide(x: Any) -> Any:
        return x.astype(jnp.float64) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x

    nnx.update(model, jax.tree.map(wide, nnx.state(model)))
    state = dict(np.load(folder / "state.npz"))
    buffers = dict(np.load(folder / "buffers.npz"))
    if plain:
        state, buffers = (
            {k: v for k, v in x.items() if not k.endswith("num_batches_tracked")} for x in (state, buffers)
        )
    load_state_dict(model, state)
    home = state_dict(model)
    wrong = [name for name in state if name not in home or home[name].tobytes() != state[name].tobytes()]
    if wrong or home.keys() != state.keys():
        raise SystemExit(f"the state dict does not come back: {wrong or sorted(home.keys() ^ state.keys())}"[:500])
    inputs = [_channels_last(x) for x in _arrays(folder / "inputs.npz")]
    weights = [jnp.asarray(x) for x in _arrays(folder / "weights.npz")]

    whole = jax.lax.conv_general_dilated

    def convolution(x: Any, kernel: Any, strides: Any, padding: Any, *rest: Any, **options: Any) -> Any:
        """In groups as `interop.ops.convolution` has it; kernels of `nnx.Conv` have their sizes first."""
        groups = options.get("feature_group_count", 1)
        simple = not isinstance(padding, str) and not rest and set(options.get("lhs_dilation") or (1,)) == {1}
        if groups == 1 or not simple:
            return whole(x, kernel, strides, padding, *rest, **options)
        numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, options["dimension_numbers"])
        weight = jnp.transpose(kernel, numbers.rhs_spec)
        pads = tuple(tuple(pair) for pair in padding)
        dilation = tuple(options.get("rhs_dilation") or (1,) * len(strides))
        return _convolution(x, weight, tuple(strides), pads, dilation, groups)

    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, nnx.Conv):
            layer.conv_general_dilated = convolution
    setattr(nnx, "hard_sigmoid", hardsigmoid)  # noqa: B010  # whose derivative has PyTorch's rounding
    with middles():
        model.eval()
        evaluated = _leaves(nnx.jit(lambda model, inputs: model(*inputs))(model, inputs))
        model.train()

        def loss(model: Any) -> Any:
            outputs = _leaves(model(*inputs))
            return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), outputs

        (_, outputs), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
    after = state_dict(model)
    if plain:
        for name, momentum in np.load(folder / "momenta.npz").items():
            if name in buffers:
                buffers[name] = _as_flax(buffers[name], state[name], after[name], float(momentum))
    nnx.update(model, gradients)
    found_gradients = state_dict(model)
    expected = dict(np.load(folder / "gradients.npz"))
    noise = dict(np.load(folder / "noise.npz"))
    found = {
        "eval": _differences(evaluated, _arrays(folder / "eval.npz")),
        "train": _differences(outputs, _arrays(folder / "train.npz")),
        "gradients": {
            name: _difference(found_gradients[name], x, _ROUNDINGS * noise[name]) for name, x in expected.items()
        },
        "buffers": {name: _difference(after[name], x) for name, x in buffers.items()},
    }
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def _zeros_for_draws() -> Iterator[None]:
    """For the time of building a model: parameters begin as zeros, since a state dict follows. Drawing them takes XLA
    longer, shape by shape, than all else."""

    def zeros(*_: Any, **__: Any) -> Any:
        return nnx.initializers.zeros

    drawing = [name for name in vars(nnx.initializers) if callable(getattr(nnx.initializers, name))]
    with contextlib.ExitStack() as stack:
        for name in drawing:
            if name.endswith(("normal", "uniform", "orthogonal")):
                stack.enter_context(mock.patch.object(nnx.initializers, name, zeros))
        for layer in (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.Embed):
            options: dict[str, Any] = layer.__init__.__kwdefaults__ or {}
            drawn = {key: nnx.initializers.zeros for key in options if key.endswith("_init")}
            stack.enter_context(mock.patch.dict(options, drawn))
        yield


def _as_flax(expected: np.ndarray, before: np.ndarray, found: np.ndarray, momentum: float) -> np.ndarray:
    """What PyTorch's running variance would be if it took in the biased variance: (n - 1) / n of what it takes in, n a
    whole number that fits what was found."""
    taken = expected - (1 - momentum) * before
    lacking = np.where(expected == found, np.finfo(found.dtype).tiny, expected - found)
    count = max(round(float(np.median(taken / lacking))), 2)
    return expected - taken / count


def _arrays(path: pathlib.Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def _channels_last(x: Any) -> Any:
    return jnp.transpose(x, (0, 2, 3, 1)) if x.ndim == 4 else jnp.asarray(x)


def _leaves(outputs: Any) -> list[Any]:
    """Floating results, images as PyTorch has them."""
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return [jnp.transpose(x, (0, 3, 1, 2)) if x.ndim == 4 else x for x in leaves]


def _differences(found: list[Any], expected: list[np.ndarray]) -> dict[str, float]:
    if len(found) != len(expected):
        raise SystemExit(f"{len(found)} results, PyTorch gives {len(expected)}")
    return {str(i): _difference(a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True))}


def _difference(found: Any, expected: np.ndarray, least: float = 0.0) -> float:
    """The largest difference relative to the largest value, or to `least` where that is more."""
    found = np.asarray(found)
    if found.shape != expected.shape:
        raise SystemExit(f"a result has the shape {found.shape}, PyTorch's {expected.shape}")
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "iub":
        return float(np.abs(found.astype(np.int64) - expected.astype(np.int64)).max())
    size = max(np.abs(expected).max(), least)
    return float(np.abs(found - expected).max() / (size or 1.0))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["plain"])
