"""compare: where a Flax model and its PyTorch origin part, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from interop.arrays import to_numpy
from interop.comparing import causes, torch_side
from interop.comparing.flax_side import LinenModel, NnxModel, Seen
from interop.comparing.report import Comparison, LayerDifference, relative
from interop.comparing.torch_side import TorchLayer, TorchRun
from interop.running.module import TracedModule
from interop.weights import nnx_tree
from interop.weights._state_dict import opened, state_dict
from interop.weights.nnx_tree import Layouts, Tree
from interop.weights.rename import Rename, Renaming

if TYPE_CHECKING:
    from torch.nn import Module

FlaxModel = NnxModel | LinenModel


def compare(
    model: Any,
    module: Module,
    *inputs: Any,
    rename: Rename | None = None,
    layouts: Layouts | None = None,
    tolerance: float | None = None,
) -> Comparison:
    """A Flax model against the PyTorch model that it is to be, layer by layer, in eval and in train mode: where they
    part, and why.

    ```python
    print(interop.compare(model, module, torch.randn(2, 3, 224, 224)))
    ```

    Both run on the same input. Of each layer that has parameters or statistics, the outputs are compared; the first
    that differs is looked at by itself: it is given PyTorch's own input to it. If it then still differs, PyTorch's
    settings (padding, strides, epsilon, momentum, ...) are put in the place of its own until the numbers agree, and its
    arrays are compared; if not, what differs lies between it and the layer before, an activation for instance. Neither
    model is changed. Dropout drops nothing on either side, but in imported models, whose train mode is then compared
    layer by layer alone.

    **Arguments:**

    - `model`: an NNX model, imported or written by hand, or Linen's `(module, variables)`. One that has convolutions of
      Flax's is given images with their channels last. A Linen model is told its mode by its argument `train`,
      `training`, `deterministic` or `use_running_average`.
    - `module`: the `torch.nn.Module`.
    - `*inputs`: what the PyTorch module is called with: tensors, with more than one example.
    - `rename`, `layouts`: as for `interop.load_state_dict`, from PyTorch's names to the model's.
    - `tolerance`: the relative difference that is agreement; 1e-3 where the PyTorch model is in float32 or narrower,
      1e-8 in float64.

    **Returns:** the `Comparison`.

    **Raises:**

    - `TypeError`: for models of other kinds, and inputs that are no arrays.
    - `ValueError`: where no layer of the two has the same name: give `rename`, see `interop.suggest_rename`; and as
      `interop.state_dict`.
    - What the PyTorch module itself raises for these inputs.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the second argument, found {type(module).__name__}")
    side = _side(model)
    origin = {name: to_numpy(value) for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    given = tuple(_arranged(side, x) for x in inputs)
    called = side.arguments(given) if isinstance(side, LinenModel) else None
    entries = state_dict(model, rename, layouts=layouts, inputs=called)
    tree = opened(model, layouts, called)
    pairs = _pairs(tree, rename, layouts, {name.rpartition(".")[0] for name in origin})
    if not pairs:
        raise ValueError(
            f"no layer of the two has the same name: PyTorch has {', '.join(list(origin)[:4])}, ..., the Flax model "
            f"{', '.join(list(entries)[:4])}, ... Give rename=; interop.suggest_rename proposes one"
        )
    limit = tolerance if tolerance is not None else (1e-8 if _is_double(module) else 1e-3)
    rows: list[LayerDifference] = []
    outputs: dict[str, float] = {}
    notes: list[str] = []
    first, cause = None, None
    for mode in ("eval", "train"):
        training = mode == "train"
        theirs = torch_side.run(module, inputs, training=training)
        ours = _run(side, given, pairs, mode, notes)
        found = [
            _difference(side, layer, pairs[layer.path], ours, mode, limit)
            for layer in theirs.layers
            if layer.path in pairs
        ]
        rows += found
        if ours.outputs:
            outputs[mode] = _outputs(ours, theirs)
        wrong = next((row for row in found if not row.agrees), None)
        if first is None and wrong is not None:
            first = wrong.path
            cause = _cause(side, wrong, theirs, ours, pairs, entries, origin, limit)
        elif first is None and outputs.get(mode, 0.0) > limit:
            last = found[-1].path if found else "the model"
            first = last
            cause = causes.Cause(f"what is computed after {last} differs, or the outputs are others", False)
    ignored = "num_batches_tracked"
    return Comparison(
        layers=tuple(rows),
        outputs=outputs,
        first=first,
        cause=None if cause is None else cause.text,
        proved=cause is not None and cause.proved,
        tolerance=limit,
        missing=tuple(name for name in origin if name not in entries and not name.endswith(ignored)),
        unexpected=tuple(name for name in entries if name not in origin and not name.endswith(ignored)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _side(model: Any) -> FlaxModel:
    if isinstance(model, nnx.Module):
        return NnxModel(model)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module):
        return LinenModel(*model)
    raise TypeError(f"expected an nnx.Module or Linen's (module, variables), found {type(model).__name__}")


def _pairs(tree: Tree, rename: Rename | None, layouts: Layouts | None, known: set[str]) -> dict[str, str]:
    """The Flax layer's path for each PyTorch layer's."""
    parts = nnx_tree.parts(tree, layouts)
    names = Renaming(rename).to_torch([entry for part in parts for entry in part.entries])
    pairs: dict[str, str] = {}
    for part in parts:
        for entry in part.entries:
            path = names[entry].rpartition(".")[0]
            if path in known:
                pairs.setdefault(path, part.layer)
    return pairs


def _run(side: FlaxModel, given: tuple[Any, ...], pairs: dict[str, str], mode: str, notes: list[str]) -> Seen:
    training = mode == "train"
    if training and isinstance(side, NnxModel) and _draws(side.model):
        notes.append("whole runs in train mode, since the imported model draws random numbers there")
        return Seen({}, {}, [])
    try:
        return side.run(given, pairs.values(), training=training)
    except Exception as error:
        notes.append(f"the Flax model's run in {mode} mode, which raises {type(error).__name__}: {str(error)[:300]}")
        return Seen({}, {}, [])


def _draws(model: nnx.Module) -> bool:
    from interop.running.layer import draws

    if not isinstance(model, TracedModule):
        return False
    recorded = model._interop.model
    return any(draws(node, recorded.torch) for node in recorded.train.nodes)


def _difference(
    side: FlaxModel, layer: TorchLayer, counterpart: str, ours: Seen, mode: str, limit: float
) -> LayerDifference:
    whole = None
    if counterpart in ours.results:
        whole = relative(ours.results[counterpart], layer.result)
        whole = float("inf") if whole is None else whole  # another shape
    own = causes.alone(side, counterpart, layer, {}, training=mode == "train")
    moves = bool(layer.after)
    agrees = (whole is not None and whole <= limit) or (whole is None and (own is None or own <= limit))
    if agrees and moves and mode == "train" and own is not None and own > limit:
        agrees = False  # statistics go where no output tells
    kind = type(layer.module).__name__
    return LayerDifference(layer.path, counterpart, kind, mode, layer.result.shape, whole, own, agrees)


def _outputs(ours: Seen, theirs: TorchRun) -> float:
    if len(ours.outputs) != len(theirs.outputs):
        return float("inf")
    found = [relative(a, b) for a, b in zip(ours.outputs, theirs.outputs, strict=True)]
    return max((float("inf") if value is None else value for value in found), default=0.0)


def _cause(
    side: FlaxModel,
    wrong: LayerDifference,
    theirs: TorchRun,
    ours: Seen,
    pairs: dict[str, str],
    entries: dict[str, np.ndarray],
    origin: dict[str, np.ndarray],
    limit: float,
) -> causes.Cause:
    layer = next(layer for layer in theirs.layers if layer.path == wrong.path)
    if wrong.alone is not None and wrong.alone <= limit:
        return causes.before_layer(wrong.path, theirs.layers, ours, pairs, limit)
    return causes.of_layer(
        side,
        wrong.counterpart,
        layer,
        entries,
        origin,
        training=wrong.mode == "train",
        tolerance=limit,
    )


def _arranged(side: FlaxModel, x: Any) -> Any:
    """An input for the Flax model: channels last where its convolutions are Flax's."""
    array = jnp.asarray(np.asarray(to_numpy(x)))
    if array.ndim < 3 or (isinstance(side, NnxModel) and isinstance(side.model, TracedModule)):
        return array
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.moveaxis(array, 1, -1) if floating and _convolves(side) else array


def _convolves(side: FlaxModel) -> bool:
    if isinstance(side, LinenModel):
        kernels = [np.ndim(x) for x in _kernels(side.variables.get("params", {}))]
        return any(ndim >= 3 for ndim in kernels)
    kinds = (nnx.Conv, nnx.ConvTranspose)
    return any(isinstance(layer, kinds) for _, layer in nnx.iter_graph(side.model))


def _kernels(tree: Any) -> list[Any]:
    found = []
    for name, value in tree.items():
        if hasattr(value, "items"):
            found += _kernels(value)
        elif name == "kernel":
            found.append(value)
    return found


def _is_double(module: Module) -> bool:
    import torch

    return any(p.dtype == torch.float64 for p in module.parameters())
