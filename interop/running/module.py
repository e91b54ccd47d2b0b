"""The Flax module that runs a traced model.

Its tree has PyTorch's paths and PyTorch's arrays: `model.layer1` has a child "0", whose `conv1` has a `weight` of
shape (out, in, kh, kw). BatchNorm layers are real `jaxnorm.nnx.BatchNorm` modules, so everything in `jaxnorm` works
on it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from interop.conventions import FLAX_NAMES
from interop.program.dependence import moved_by_inputs
from interop.program.nodes import Entry, Model, Node, Program
from interop.program.recorded import Recorded, other_values
from interop.running.arguments import bind
from interop.running.batch_norm import TracedBatchNorm
from interop.running.dtypes import refuse_other_dtypes
from interop.running.layer import Layer, Place, tree
from interop.running.run import run, unsupported
from interop.running.segments import matches
from interop.running.surgery import program_of
from interop.variables import Buffer, Constant, Frozen, check, to_jax
from jaxnorm import _checks

logger = logging.getLogger("interop")
_CLASSES = {"parameter": nnx.Param, "frozen": Frozen, "buffer": Buffer, "constant": Constant}
_MODES = ("deterministic", "use_running_average", "_interop_place")


class TracedModule(Layer):
    """A PyTorch model in JAX, as `interop.from_torch` and `interop.load` make it.

    `model(*args, **kwargs)` takes what the PyTorch module takes, as arrays, and returns what it returns.
    `model.train()` and `model.eval()` choose between the two recorded graphs; layers that were frozen in eval mode at
    import stay so. Randomness (dropout, stochastic depth) draws from the model's `nnx.Rngs`; under an axis name that
    its BatchNorm layers share, replicas draw differently.

    The tree has PyTorch's paths and PyTorch's arrays: `model.layer1` has a child "0", whose `conv1` has a `weight` of
    shape (out, in, kh, kw). BatchNorm layers are `jaxnorm.nnx.BatchNorm` modules.

    With a `compute_dtype`, parameters and inputs are cast to it for the run, while the model keeps them as they are;
    BatchNorm statistics stay in at least float32.
    """

    def __init__(
        self,
        model: Model,
        arrays: Mapping[str, np.ndarray],
        *,
        training: bool,
        rngs: nnx.Rngs | None = None,
        compute_dtype: DTypeLike | None = None,
    ):
        """Builds the tree. `arrays` holds every entry of the model that is tied to no other, by name.

        Raises:
            NotImplementedError: for operations that have no JAX function.
            ValueError: for arrays that JAX, as configured, cannot hold, and values that the programs do not hold for.
        """
        unsupported(model)
        check(arrays)
        if problems := other_values(model, arrays):
            raise ValueError("\n".join(problems))
        # A model that is itself a BatchNorm layer is not an `nnx.BatchNorm`: the graph has all that it does.
        model = dataclasses.replace(model, batch_norms=tuple(layer for layer in model.batch_norms if layer.path))
        super().__init__(training=training)
        self._interop = Recorded(model, None if compute_dtype is None else jnp.dtype(compute_dtype))
        self._interop_rngs = nnx.Rngs(0) if rngs is None else rngs
        _build(self, model, arrays)

    def __repr__(self) -> str:
        """What it is, and the tree: names and shapes, no values."""
        model = self._interop.model
        sizes = [np.size(x.get_value()) for _, x in nnx.iter_graph(self) if isinstance(x, nnx.Variable)]
        mode = "eval" if self.deterministic else "train"
        cast = "" if self.compute_dtype is None else f", computes in {self.compute_dtype.name}"
        title = f"{type(self).__name__} of {model.name} ({mode} mode, {sum(sizes):,} numbers{cast})"
        return "\n".join(tree(self, title))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph of the current mode.

        **Arguments:**

        - `*args`, `**kwargs`: what the PyTorch module takes, as arrays. A keyword `mask` (bool, one an example of the
          batch; of `jaxnorm.pad_batch`) says which examples count in BatchNorm's statistics, where the PyTorch module
          has no argument of that name. It is followed to each layer through what happens to the batch axis on the way,
          a reshape of (B, T, ...) to (B * T, ...) for instance.

        **Returns:** what the PyTorch module returns, arrays in the place of tensors; dataclasses as named tuples.

        **Raises:**

        - `TypeError`: if the arguments are not those that the model was traced with.
        - `ValueError`: if their shapes are others, up to the varying sizes; for a mask that is none of examples, or
          that cannot be followed, naming where: examples meet before a layer, in an output or in a buffer in another
          way than in a BatchNorm layer's statistics; where a layer was replaced and the record does not say how to call
          the new one.
        """
        program = self._program()
        own = "mask" in (*program.signature["names"], *program.signature["kwargs"])
        mask = None if own else kwargs.pop("mask", None)
        values = bind(program, args, kwargs)
        return run(program, values, self, mask)

    def train(self, **attributes: Any) -> None:
        """To training: batch statistics, running statistics that move, dropout. Layers frozen at import stay in eval
        mode.

        **Arguments:**

        - `**attributes`: others to set in all layers that have them, as in `flax.nnx.Module.train`.

        **Raises:** nothing of its own.
        """
        super().train(**attributes)  # type: ignore[no-untyped-call]
        for _, layer in nnx.iter_graph(self):
            if isinstance(layer, TracedBatchNorm) and layer.frozen:
                layer.use_running_average = True

    def checkpoint(self, *patterns: str, policy: Callable[..., Any] | None = None) -> None:
        r"""Layers whose insides are not kept for the backward pass but computed again, by `jax.checkpoint`.

        ```python
        model.checkpoint(r"layer[12]\.\d+")              # each block of two stages by itself
        model.checkpoint(r"layer\d", policy=jax.checkpoint_policies.dots_saveable)
        model.checkpoint()                               # none
        ```

        **Arguments:**

        - `*patterns`: regular expressions that match the whole path of a layer, as in `layouts=`. Inside a layer that
          matches, others make no difference.
        - `policy`: what is kept all the same; see `jax.checkpoint_policies`.

        **Raises:** `TypeError` for patterns that are no text; `ValueError` for what is no regular expression, and for
        patterns that match no layer, all at once.
        """
        paths = list(self._interop.model.modules)
        for pattern in patterns:
            _checks.pattern("patterns", pattern)
        unknown = [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in paths)]
        if unknown:
            shown = ", ".join(repr(path) for path in paths if path and "." not in path)
            raise ValueError(f"no layer's path matches {unknown}; the model's own layers are {shown}")
        self._describe(dataclasses.replace(self._interop, recompute=tuple(patterns), policy=policy))

    def unshared_statistics(self) -> tuple[str, ...]:
        """The buffers that forward moves in training by arithmetic of its own, from what it is called with: running
        statistics of `F.batch_norm` and of normalisations written out, queues, centres.

        Axis names make no difference to them: `jaxnorm.convert_sync_batchnorm` names them.

        **Returns:** their names in the state dict.

        **Raises:** nothing of its own.
        """
        return tuple(moved_by_inputs(self._interop.model.train))

    @property
    def compute_dtype(self) -> Any:
        """What parameters and inputs are cast to for the run; None for the arrays' own types.

        It can be set: `model.compute_dtype = jnp.bfloat16`. `ValueError` for what is neither None nor a floating dtype.
        """
        return self._interop.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: DTypeLike | None) -> None:
        refuse_other_dtypes(dtype)
        self._describe(dataclasses.replace(self._interop, compute_dtype=None if dtype is None else jnp.dtype(dtype)))

    def nodes(self) -> tuple[Node, ...]:
        """The operations of the current mode, in order.

        **Returns:** a tuple of nodes: each one's `name`, `operation`, `module` (the layer's path) and `source` (the
        line of PyTorch code).

        **Raises:** `ValueError` where a layer was replaced and the record does not say how to call the new one.
        """
        return self._program().nodes

    def _describe(self, recorded: Recorded) -> None:
        """Gives the model another description, and its layers theirs."""
        before = self._interop.model
        self._interop = recorded
        for _, layer in nnx.iter_graph(self):
            place = getattr(layer, "_interop_place", None)
            if isinstance(layer, Layer) and place is not None and place.recorded.model == before:
                layer._interop_place = Place(recorded, place.path)

    def _program(self) -> Program:
        return program_of(self, self._interop.model)


def _build(root: TracedModule, model: Model, arrays: Mapping[str, np.ndarray]) -> None:
    by_path: dict[str, nnx.Module] = {"": root}
    entries = {entry.name: entry for entry in model.entries}
    rngs = nnx.Rngs(0)
    for layer in model.batch_norms:
        if layer.same_as is None:
            arrays_of = [name for name in FLAX_NAMES if f"{layer.path}.{name}".removeprefix(".") in entries]
            by_path[layer.path] = TracedBatchNorm(layer, arrays_of, rngs)
    for layer in model.batch_norms:
        if layer.same_as is not None:
            by_path[layer.path] = by_path[layer.same_as]
    for path in (*model.modules, *by_path):
        _place(by_path, path, root)
    variables: dict[str, nnx.Variable[Any]] = {}
    for entry in model.entries:
        parent, _, name = entry.name.rpartition(".")
        holder = _place(by_path, parent, root)
        mapped = isinstance(holder, nnx.BatchNorm) and name in FLAX_NAMES
        name = FLAX_NAMES[name] if mapped else name
        if entry.same_as is None:
            variables[entry.name] = _variable(entry, holder, name, arrays)
        value = variables[entry.same_as or entry.name]
        if mapped:
            setattr(holder, name, value)
        else:
            _put(holder, name, value, entry.name)


def _place(by_path: dict[str, nnx.Module], path: str, root: TracedModule) -> nnx.Module:
    """The node at `path`, made with all above it where there is none yet."""
    if path not in by_path:
        by_path[path] = Layer(Place(root._interop, path), training=not root.deterministic)
    if path:
        parent, _, name = path.rpartition(".")
        _put(_place(by_path, parent, root), name, by_path[path], path)
    return by_path[path]


def _put(holder: nnx.Module, name: str, value: nnx.Module | nnx.Variable[Any], path: str) -> None:
    """`holder.name = value`, where that is free. `train` and `eval` set the attributes `_MODES` wherever they are."""
    if vars(holder).get(name) is value:
        return
    own = isinstance(holder, TracedModule) and hasattr(TracedModule, name)
    if own or name in vars(holder) or name in _MODES:
        raise ValueError(
            f"the name {path!r} is taken: an attribute of the Flax module, or an entry of the state, has it too. "
            "Rename it in the PyTorch module"
        )
    setattr(holder, name, value)


def _variable(entry: Entry, holder: nnx.Module, name: str, arrays: Mapping[str, np.ndarray]) -> nnx.Variable[Any]:
    value: Any = to_jax(arrays[entry.name])
    cls = _CLASSES[entry.kind]
    if isinstance(holder, nnx.BatchNorm) and name in ("mean", "var", "num_batches_tracked"):
        cls = nnx.BatchStat
    metadata: dict[str, Any] = {"torch_dtype": entry.dtype}
    if not entry.persistent:
        metadata["persistent"] = False
    return cls(value, **metadata)
