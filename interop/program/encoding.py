"""A model as JSON, and back.

Reading validates and executes nothing: an operation is a name, looked up in `interop.ops` when the program runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from interop.errors import ProgramError
from interop.program.nodes import (
    Backward,
    BatchNormLayer,
    DType,
    Entry,
    Input,
    Model,
    Node,
    Program,
    State,
    Value,
    map_leaves,
)
from interop.program.versions import release

FORMAT = "jaxnorm.program"
VERSION = 2
_FEATURES = 1 << 22  # of BatchNorm layers, that a program may have beyond what its state has
Record = TypeVar("Record")

# JSON. Every value that JSON lacks is an object with one key that starts with "$"; a mapping is written as "$map" with
# its keys and values, so that no key of the user's can be mistaken for one of ours.

_RECORDS: dict[str, type] = {
    cls.__name__: cls for cls in (Value, State, DType, Node, Backward, Input, Program, Entry, BatchNormLayer, Model)
}


_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "operation", "module", "source", "dtype", "kind", "path", "torch", "default_dtype"), str),
    **dict.fromkeys(("args", "shape", "inputs", "nodes", "entries", "batch_norms", "guards"), tuple),
    **dict.fromkeys(("gradients", "results", "repeats"), tuple),
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


def digest(model: Model) -> str:
    """Tells models apart, in files too: equal digests, equal graphs and flags."""
    return hashlib.sha256(json.dumps(encode(model), sort_keys=True).encode()).hexdigest()


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
