"""A model's graph as plain data: nodes that name their operations, and the state they read. No torch, no JAX.

A `Program` is what one call of a model does: a list of nodes in order, each the application of one named operation
(`aten.conv2d.default`) to values computed before it, to inputs, and to entries of the model's state. A `Model` is what
`interop.from_torch` learns of a PyTorch module: its entries of state, its BatchNorm layers, and two programs over that
state, one for train mode and one for eval mode.

`encoding.py` writes all of it as JSON and reads it back.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Value:
    """The result of an earlier node, or an input, by name."""

    name: str


@dataclasses.dataclass(frozen=True)
class State:
    """An entry of the model's state, by PyTorch's name: `layer1.0.conv1.weight`."""

    name: str


@dataclasses.dataclass(frozen=True)
class DType:
    """An element type by PyTorch's name without the prefix: `float32`, `int64`, `bool`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Node:
    """One application of an operation.

    `module` and `source` say where in the user's model it comes from; `repeats` which calls of the modules around it
    were not their first: `layer1.0.relu@2` is the third call of that layer.
    """

    name: str
    operation: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str = ""
    source: str = ""
    repeats: tuple[str, ...] = dataclasses.field(default=(), metadata={"written": "where it is not the default"})


@dataclasses.dataclass(frozen=True)
class Backward:
    """A backward pass of the user's own, the last argument of a `CUSTOM_GRADIENT` node (see `operations.py`).

    Attributes:
        gradients: the names under which `nodes` read the gradients of the node's outputs.
        nodes: in order of execution; they read values from around them too.
        results: the gradients of the node's inputs.
    """

    gradients: tuple[str, ...]
    nodes: tuple[Node, ...]
    results: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor that the program takes. A dimension is a number, or the name of a size that may vary (`s0`)."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Program:
    """One call of the model.

    Attributes:
        inputs: the tensors taken, in the order of the leaves of `signature`.
        signature: nested structure of the arguments, `{"args": [...], "kwargs": {...}, "names": [...]}`; a leaf is an
            `Input`'s name as `Value`, and anything else is a constant that a call has to repeat.
        nodes: in order of execution.
        output: nested structure of `Value`, `State` and constants that the call returns (see `structure.py`).
        updates: entries of state that the call replaces, with their new values.
        guards: what has to hold of the sizes that vary, as text (`s0 <= 4`; see `guards.py`): elsewhere PyTorch's
            code would have taken another branch.
    """

    inputs: tuple[Input, ...]
    signature: Mapping[str, Any]
    nodes: tuple[Node, ...]
    output: Any
    updates: Mapping[str, Value | State]
    guards: tuple[str, ...]

    @functools.cached_property
    def last_use(self) -> Mapping[int, tuple[str, ...]]:
        """For each node's index, the values that no later node reads."""
        last = {name: index for index, node in enumerate(self.nodes) for name in value_names((node.args, node.kwargs))}
        for name in value_names((self.output, self.updates)):
            last.pop(name, None)
        grouped: dict[int, list[str]] = {}
        for name, index in last.items():
            grouped.setdefault(index, []).append(name)
        return {index: tuple(names) for index, names in grouped.items()}

    @functools.cached_property
    def made_of_sizes(self) -> frozenset[str]:
        """The values that depend on sizes and numbers alone: on no element of an input and no entry of the state."""
        made: set[str] = set()
        for node in self.nodes:
            arguments = (node.args, node.kwargs)
            base = node.operation.split(".")[1]
            of_shape = base.startswith(("sym_", "new_")) or base.endswith("_like") or base == "numel"
            if of_shape or (all(name in made for name in value_names(arguments)) and not any(state_names(arguments))):
                made.add(node.name)
        return frozenset(made)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of the state.

    Attributes:
        name: PyTorch's name.
        kind: "parameter", "frozen" (requires_grad=False), "buffer" or "constant" (a tensor the code itself makes).
        shape, dtype: as in PyTorch.
        persistent: whether it belongs to the state dict.
        same_as: the first name of the same tensor, for tied weights.
        fixed: its values as nested lists, where the model's code has read them as numbers: the programs hold for these
            alone.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    persistent: bool = True
    same_as: str | None = None
    fixed: Any = dataclasses.field(default=None, metadata={"written": "where it is not the default"})

    def holds(self, values: Any) -> bool:
        """Whether the entry may have these values, given as nested lists."""
        return self.fixed is None or repr(values) == repr(self.fixed)  # in which a nan is a nan


@dataclasses.dataclass(frozen=True)
class BatchNormLayer:
    """A BatchNorm layer at its path: everything about it that is not an array.

    `momentum` is PyTorch's (share of the new batch; None is the cumulative average). `training` is the layer's own
    flag when it was imported; `frozen` means that it stays in eval mode while the model trains; `counts`, that training
    moves its counter, which a layer with a forward of its own may leave alone. `same_as` names the first path of a
    shared layer.
    """

    path: str
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    training: bool
    frozen: bool = False
    same_as: str | None = None
    counts: bool = True


@dataclasses.dataclass(frozen=True)
class Model:
    """What is known of a PyTorch module: its state, its BatchNorm layers, the flags of its layers, and its programs.

    `modules` maps the path of every module to its training flag at import. `torch` is the version of PyTorch that
    recorded the programs, whose rules hold in them (see `interop.ops.registry`). A file that does not say is of the
    time when 2.13.0 was the only one, and one of 2.13.0 does not say. `default_dtype` was torch.get_default_dtype()
    then: what Python's floats are among integers.
    """

    name: str
    entries: tuple[Entry, ...]
    batch_norms: tuple[BatchNormLayer, ...]
    modules: Mapping[str, bool]
    train: Program
    eval: Program
    torch: str = dataclasses.field(default="2.13.0", metadata={"written": "where it is not the default"})
    default_dtype: str = dataclasses.field(default="float32", metadata={"written": "where it is not the default"})

    @functools.cached_property
    def _key(self) -> str:
        """Of models with equal graphs and flags the same."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Model) and self._key == other._key)

    def __repr__(self) -> str:
        return f"Model({self.name}, {len(self.entries)} entries, {len(self.train.nodes)} nodes)"


def value_names(tree: Any) -> Iterator[str]:
    """The names of all values that a nested structure refers to; of a `Backward`, those from around it."""
    for leaf in _leaves(tree):
        if isinstance(leaf, Value):
            yield leaf.name
        elif isinstance(leaf, Backward):
            own = {*leaf.gradients, *(node.name for node in leaf.nodes)}
            yield from (name for name in value_names(_read_by(leaf)) if name not in own)


def state_names(tree: Any) -> Iterator[str]:
    """The names of all entries of the state that a nested structure refers to, those inside of a `Backward` too."""
    for leaf in _leaves(tree):
        if isinstance(leaf, State):
            yield leaf.name
        elif isinstance(leaf, Backward):
            yield from state_names(_read_by(leaf))


def every_node(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes, and those of their backward passes."""
    for node in nodes:
        yield node
        for leaf in _leaves(node.args):
            if isinstance(leaf, Backward):
                yield from every_node(leaf.nodes)


def _read_by(backward: Backward) -> list[Any]:
    return [*([node.args, node.kwargs] for node in backward.nodes), backward.results]


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `function` applied to everything that is not a list, a tuple or a mapping."""
    if isinstance(tree, list):
        return [map_leaves(function, item) for item in tree]
    if isinstance(tree, tuple):
        return tuple(map_leaves(function, item) for item in tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, item) for key, item in tree.items()}
    return function(tree)
