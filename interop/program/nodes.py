"""A model's graph as plain data: nodes that name their operations, and the state they read. No torch, no JAX.

A `Program` is what one call of a model does: a list of nodes in order, each the application of one named operation
(`aten.conv2d.default`) to values computed before it, to inputs, and to entries of the model's state. A `Model` is what
`interop.from_torch` learns of a PyTorch module: its entries of state, its BatchNorm layers, and two programs over that
state, one for train mode and one for eval mode.

Everything here is written as JSON and read back by `encode` and `decode_model`. Reading validates and executes
nothing: an operation is a name, looked up in `interop.ops` when the program runs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from interop.errors import ProgramError
from interop.program.versions import release

FORMAT = "jaxnorm.program"
VERSION = 2
_FEATURES = 1 << 22  # of BatchNorm layers, that a program may have beyond what its state has
Record = TypeVar("Record")


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
    """One application of an operation. `module` and `source` say where in the user's model it comes from."""

    name: str
    operation: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str = ""
    source: str = ""


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
        return self.fixed is None or _listed(values) == _listed(self.fixed)


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
    def digest(self) -> str:
        """Tells models apart: equal digests, equal graphs and flags."""
        return hashlib.sha256(json.dumps(encode(self), sort_keys=True).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Model) and self.digest == other.digest)

    def __repr__(self) -> str:
        return f"Model({self.name}, {len(self.entries)} entries, {len(self.train.nodes)} nodes)"


def _listed(values: Any) -> str:
    """Numbers as text, in which a nan is a nan; as JSON keeps them."""
    return json.dumps(encode(values))


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


# JSON. Every value that JSON lacks is an object with one key that starts with "$"; a mapping is written as "$map" with
# its keys and values, so that no key of the user's can be mistaken for one of ours.

_RECORDS: dict[str, type] = {
    cls.__name__: cls for cls in (Value, State, DType, Node, Backward, Input, Program, Entry, BatchNormLayer, Model)
}


_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "operation", "module", "source", "dtype", "kind", "path", "torch", "default_dtype"), str),
    **dict.fromkeys(
        ("args", "shape", "inputs", "nodes", "entries", "batch_norms", "guards", "gradients", "results"), tuple
    ),
    **dict.fromkeys(("kwargs", "signature", "updates", "modules"), dict),
    **dict.fromkeys(("persistent", "affine", "track_running_stats", "training", "frozen", "counts"), bool),
    **dict.fromkeys(("train", "eval"), Program),
    "same_as": (str, type(None)),
    "num_features": int,
    "eps": (int, float),
    "momentum": (int, float, type(None)),
}


def encode(value: Any) -> Any:
    """`value` as JSON can hold it. Raises ProgramError for what a program cannot contain."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, complex):
        return {"$complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"$map": [[encode(key), encode(item)] for key, item in value.items()]}
    name = type(value).__name__
    if name in _RECORDS and dataclasses.is_dataclass(value):
        fields = {
            field.name: encode(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not field.metadata or getattr(value, field.name) != field.default
        }
        return {"$" + name: fields}
    raise ProgramError(f"a program cannot hold {value!r} of type {type(value).__qualname__}")


def decode(data: Any) -> Any:
    """The inverse of `encode`. Raises ProgramError, naming what is wrong, for anything that `encode` does not write."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ProgramError(f"expected an object with one key, found {_shown(data)}")
    ((key, body),) = data.items()
    if key == "$float" and body in ("inf", "-inf", "nan"):
        return float(body)
    if key == "$tuple" and isinstance(body, list):
        return tuple(decode(item) for item in body)
    if key == "$map" and isinstance(body, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in body):
        return {_hashable(decode(first)): decode(second) for first, second in body}
    if key == "$complex" and isinstance(body, list) and len(body) == 2:
        real, imaginary = decode(body[0]), decode(body[1])
        if type(real) is float and type(imaginary) is float:
            return complex(real, imaginary)
    if key[:1] == "$" and key[1:] in _RECORDS and isinstance(body, dict):
        cls = _RECORDS[key[1:]]
        known = dataclasses.fields(cls)
        names = {field.name for field in known}
        needed = {field.name for field in known if field.default is dataclasses.MISSING}
        if not needed <= set(body) <= names:
            raise ProgramError(f"a {key[1:]} has the fields {sorted(names)}, found {sorted(body)}")
        fields = {name: decode(item) for name, item in body.items()}
        for name, item in fields.items():
            if name in _FIELDS and not isinstance(item, _FIELDS[name]):
                raise ProgramError(f"the field {name!r} of a {key[1:]} cannot be {_shown(body[name])}")
        return cls(**fields)
    raise ProgramError(f"not part of the format: {_shown(data)}")


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError as error:
        raise ProgramError(f"a mapping has a key that cannot be one: {error}") from None
    return key


def _shown(data: Any) -> str:
    text = json.dumps(data, default=repr)
    return text if len(text) <= 200 else text[:200] + " ..."


def encode_model(model: Model) -> dict[str, Any]:
    """The whole model as JSON, with the format's name and version."""
    return {"format": FORMAT, "version": VERSION, "model": encode(model)}


def decode_model(data: Any) -> Model:
    """The inverse of `encode_model`.

    Raises ProgramError for another format or version, and for a model that cannot be right.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProgramError(f'expected the format "{FORMAT}", found {_shown(data)}')
    if data.get("version") != VERSION:
        raise ProgramError(
            f"this version of interop reads version {VERSION} of the format, found {data.get('version')!r}"
        )
    model = decode(data.get("model"))
    if not isinstance(model, Model):
        raise ProgramError(f"expected a Model, found {type(model).__name__}")
    validate(model)
    return model


def validate(model: Model) -> None:
    """Raises ProgramError with every fault found: names used before they are defined, unknown entries, wrong types."""
    faults: list[str] = []
    try:
        release(model.torch)
    except ValueError as error:
        faults.append(f"torch: {error}")
    if model.default_dtype not in ("float64", "float32", "bfloat16", "float16"):
        faults.append(f"default_dtype: {model.default_dtype!r} is no floating-point type")
    entries = {entry.name for entry in _typed(model.entries, Entry, "entries", faults)}
    for entry in model.entries:
        if isinstance(entry, Entry):
            if not all(type(n) is int and 0 <= n < 2**62 for n in entry.shape):
                raise ProgramError(f"not a valid program: entry {entry.name!r} has the shape {_shown(entry.shape)}")
            if entry.kind not in ("parameter", "frozen", "buffer", "constant"):
                faults.append(f"entry {entry.name!r} has the unknown kind {entry.kind!r}")
            if entry.same_as is not None and entry.same_as not in entries:
                faults.append(f"entry {entry.name!r} is tied to {entry.same_as!r}, which is missing")
    faults += [
        f"module {path!r} has the mode {mode!r}" for path, mode in model.modules.items() if not _is_mode(path, mode)
    ]
    room = _FEATURES + sum(math.prod(entry.shape) for entry in model.entries if isinstance(entry, Entry))
    for layer in _typed(model.batch_norms, BatchNormLayer, "batch_norms", faults):
        for name, limit in (("num_features", 2**31 - 1), ("eps", sys.float_info.max), ("momentum", 1)):
            value = getattr(layer, name)
            if value is not None and not 0 <= value <= limit:
                faults.append(f"BatchNorm layer {layer.path!r}: {name} = {value} is not between 0 and {limit}")
        room -= layer.num_features
    if room < 0:  # a layer is made with arrays of its own before it gets those of the file
        faults.append("the BatchNorm layers have many more features than there are numbers in the state")
    for mode, program in (("train", model.train), ("eval", model.eval)):
        known = {item.name for item in _typed(program.inputs, Input, f"{mode}.inputs", faults)}
        faults += _node_faults(mode, program.nodes, known, entries, (program.output, program.updates))
        faults += [f"{mode}: update of the unknown entry {name!r}" for name in program.updates if name not in entries]
        sizes = {size for item in program.inputs for size in getattr(item, "shape", ()) if isinstance(size, str)}
        faults += [f"{mode}: {problem}" for problem in _unsound_guards(program.guards, sizes)]
    if faults:
        raise ProgramError("not a valid program:\n  " + "\n  ".join(faults))


def _unsound_guards(guards: tuple[object, ...], sizes: set[str]) -> Iterator[str]:
    from interop.program.guards import sizes_in

    for guard in guards:
        try:
            if not (isinstance(guard, str) and sizes_in(guard) <= sizes):
                yield f"the guard {guard!r} is not about the inputs' sizes"
        except ProgramError as error:
            yield str(error)


def _node_faults(
    where: str, nodes: Iterable[object], known: set[str], entries: set[str], results: Any
) -> Iterator[str]:
    """What is wrong with nodes, in order, that may read the values `known`, and with the results that follow."""
    faults: list[str] = []
    known = set(known)
    for node in _typed(nodes, Node, f"{where}.nodes", faults):
        faults += _faults(f"{where}: node {node.name!r}", (node.args, node.kwargs), known, entries)
        if node.name in known:
            faults.append(f"{where}: the name {node.name!r} is defined twice")
        known.add(node.name)
    yield from faults
    yield from _faults(f"{where}: output", results, known, entries)


def _is_mode(path: object, mode: object) -> bool:
    return isinstance(path, str) and isinstance(mode, bool)


def _typed(items: Iterable[object], cls: type[Record], where: str, faults: list[str]) -> list[Record]:
    faults += [f"{where}: expected {cls.__name__}, found {_kind(item)}" for item in items if not isinstance(item, cls)]
    return [item for item in items if isinstance(item, cls)]


def _kind(item: object) -> str:
    return type(item).__name__


def _faults(where: str, tree: Any, known: set[str], entries: set[str]) -> Iterator[str]:
    found: list[str] = []

    def check(leaf: object) -> None:
        if isinstance(leaf, Value) and leaf.name not in known:
            found.append(f"{where} reads {leaf.name!r} before it is defined")
        if isinstance(leaf, State) and leaf.name not in entries:
            found.append(f"{where} reads the unknown entry {leaf.name!r}")
        if isinstance(leaf, Backward):
            found.extend(
                _node_faults(f"{where}, backward", leaf.nodes, known | set(leaf.gradients), entries, leaf.results)
            )

    map_leaves(check, tree)
    yield from found
