"""suggest_rename: which entry of a state dict is probably which of a model, as a table to read."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from interop.weights._state_dict import check_names, opened
from interop.weights.linen_observe import Inputs
from interop.weights.nnx_tree import Layouts, parts

Signature = tuple[tuple[str, tuple[int, ...]], ...]  # a layer's entries by their last names, with shapes
_Key = frozenset[tuple[Signature, int]]  # the layers in a module, with their numbers

_OPTIONAL = "num_batches_tracked"


class Match(NamedTuple):
    """A layer of the state dict and the layer of the model that it may be."""

    theirs: str
    ours: str
    entries: tuple[str, ...]
    reason: str  # "name", "shape" (they, and the modules they are in, are the only ones of their shapes), or "order"
    others: tuple[str, ...]  # layers of the model that it might be as well, or of the state dict that might be this one


@dataclass(frozen=True)
class Suggestion:
    """A proposal of `suggest_rename`. `str(suggestion)` is a table of it; nothing has been applied.

    ```python
    suggestion = interop.suggest_rename(model, state_dict)
    print(suggestion)
    interop.load_state_dict(model, state_dict, rename=suggestion.rename)     # if it is right
    ```

    **Attributes:**

    - `matches`: layer by layer, in the order of the state dict: named tuples of `theirs` and `ours` (the layers'
      names), `entries`, `reason` ("name", "shape" or "order") and `others` (what it might be as well).
    - `unmatched`: layers of the state dict that fit nowhere, with their shapes.
    - `missing`: layers of the model that nothing fits, with their shapes.
    """

    matches: tuple[Match, ...]
    unmatched: Mapping[str, Signature]
    missing: Mapping[str, Signature]

    @property
    def rename(self) -> dict[str, str]:
        """The names that change, for `load_state_dict` and `state_dict`."""
        return {
            _joined(match.theirs, entry): _joined(match.ours, entry)
            for match in self.matches
            for entry in match.entries
            if match.theirs != match.ours
        }

    @property
    def ambiguous(self) -> tuple[Match, ...]:
        """Matches that are one choice of several."""
        return tuple(match for match in self.matches if match.others)

    def __str__(self) -> str:
        rows = [("state dict", "model", "by", "or")]
        for match in self.matches:
            others = ", ".join(match.others[:3]) + (f" and {len(match.others) - 3} more" if match.others[3:] else "")
            rows.append((match.theirs or "(top)", match.ours or "(top)", match.reason, others))
        rows += [(name or "(top)", "-", _shown(signature), "") for name, signature in self.unmatched.items()]
        rows += [("-", name or "(top)", _shown(signature), "") for name, signature in self.missing.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])) for row in rows]
        summary = (
            f"{len(self.matches)} layers matched, {len(self.ambiguous)} of them ambiguous; "
            f"{len(self.unmatched)} of the state dict and {len(self.missing)} of the model unmatched"
        )
        return "\n".join([*(line.rstrip() for line in lines), summary])


def suggest_rename(
    target: Any, state_dict: Mapping[str, Any], *, layouts: Layouts | None = None, inputs: Inputs = None
) -> Suggestion:
    """Proposes which layer of a state dict is which layer of a model. It changes nothing.

    Layers can only match if their entries have the same last names and, in PyTorch's layouts, the same shapes. Layers
    of equal names are matched first. Of the others, the largest modules that hold the same layers on both sides are
    matched in the longest run of the same order, with similar names preferred among equally long ones; then what is
    left over; then, inside each pair of modules, their parts in the same way.

    A match is ambiguous where order does not settle it: if the two sides have different numbers of modules or layers of
    these shapes, or not in the same order among their neighbours.

    Linen's variables alone are in alphabetical order once they have been through `jax.jit`; with their module they are
    in the order of the calls.

    **Arguments:**

    - `target`, `layouts`, `inputs`: as for `interop.state_dict`.
    - `state_dict`: arrays or tensors by PyTorch's names; only shapes are looked at.

    **Returns:** the `Suggestion`.

    **Raises:** `TypeError`, `ValueError` as `interop.state_dict`; `TypeError` for what is no mapping from names to
    arrays.
    """
    check_names(state_dict)
    ours: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in parts(opened(target, layouts, inputs), layouts):
        for entry, shape in zip(part.entries, part.shapes, strict=True):
            _put(ours, entry, shape)
    theirs: dict[str, dict[str, tuple[int, ...]]] = {}
    for entry, value in state_dict.items():
        _put(theirs, entry, _shape(entry, value))
    left = {name: _signature(entries) for name, entries in theirs.items()}
    right = {name: _signature(entries) for name, entries in _natural(ours).items()}

    found = {name: _Pair(name, "name", True) for name, signature in left.items() if right.get(name) == signature}
    rest_left = {name: signature for name, signature in left.items() if name not in found}
    rest_right = {name: signature for name, signature in right.items() if name not in found}
    _align(_tree(rest_left).children, _tree(rest_right).children, "shape", True, found)
    counts = Counter(rest_left.values()), Counter(rest_right.values())
    taken = {pair.ours for pair in found.values()}
    matches = []
    for name, signature in left.items():
        if name not in found:
            continue
        pair = found[name]
        others: list[str] = []
        if pair.reason != "name" and counts[0][signature] == counts[1][signature] == 1:
            pair = _Pair(pair.ours, "shape", True)
        if not pair.settled:
            others = [b for b, s in rest_right.items() if s == signature and b != pair.ours]
            others = others or [f"{a} for {pair.ours}" for a, s in rest_left.items() if s == signature and a != name]
        matches.append(Match(name, pair.ours, tuple(theirs[name]), pair.reason, tuple(others)))
    return Suggestion(
        tuple(matches),
        {name: signature for name, signature in left.items() if name not in found},
        {name: signature for name, signature in right.items() if name not in taken},
    )


def _shape(entry: str, value: Any) -> tuple[int, ...]:
    try:
        return tuple(map(int, value.shape))
    except (AttributeError, TypeError, RuntimeError):  # torch's, of nested tensors
        raise TypeError(f"entry {entry!r} of the state dict is no array but {type(value).__name__}") from None


def _put(layers: dict[str, dict[str, tuple[int, ...]]], entry: str, shape: tuple[int, ...]) -> None:
    layer, _, last = entry.rpartition(".")
    layers.setdefault(layer, {})[last] = shape


def _signature(entries: Mapping[str, tuple[int, ...]]) -> Signature:
    return tuple(sorted((name, shape) for name, shape in entries.items() if name != _OPTIONAL))


def _natural(layers: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Numbered names in the order of their numbers: Linen's Conv_2 before Conv_10; all others where they are."""
    places: dict[tuple[str, ...], list[str]] = {}
    for name in layers:
        places.setdefault(tuple(re.split(r"\d+", name)), []).append(name)
    sorted_places = {key: iter(sorted(names, key=_numbers)) for key, names in places.items()}
    return {name: layers[name] for name in (next(sorted_places[tuple(re.split(r"\d+", old))]) for old in layers)}


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


# Modules and layers as trees, and their alignment.


class _Pair(NamedTuple):
    ours: str
    reason: str
    settled: bool


@dataclass
class _Node:
    """A module, or with no children a layer. A module with entries of its own has them in a child of its name."""

    name: str
    children: list[_Node]
    layers: Counter[Signature]  # those below, whatever their names

    @property
    def key(self) -> _Key:
        return frozenset(self.layers.items())


def _tree(layers: Mapping[str, Signature]) -> _Node:
    root = _Node("", [], Counter())
    nodes = {"": root}
    for name, signature in layers.items():
        node = root
        node.layers[signature] += 1
        words = name.split(".") if name else []
        for end in range(1, len(words) + 1):
            path = ".".join(words[:end])
            if path not in nodes:
                nodes[path] = _Node(path, [], Counter())
                node.children.append(nodes[path])
            node = nodes[path]
            node.layers[signature] += 1
        node.children.append(_Node(name, [], Counter([signature])))
    return root


def _align(left: list[_Node], right: list[_Node], reason: str, settled: bool, found: dict[str, _Pair]) -> None:
    """Matches the layers of two lists of nodes.

    `reason` is why the lists belong together, and `settled` whether that is certain.
    """
    keys = [{node.key for node in _below(nodes)} for nodes in (left, right)]
    left, right = _units(left, keys[1]), _units(right, keys[0])
    numbers = [Counter(node.key for node in nodes) for nodes in (left, right)]
    in_order: Counter[_Key] = Counter()
    pairs: list[tuple[_Node, _Node]] = []
    while run := _longest_run(left, right):
        in_order = in_order or Counter(a.key for a, _ in run)  # of the first run
        pairs += run
        matched = {id(node) for pair in run for node in pair}
        left, right = ([node for node in nodes if id(node) not in matched] for nodes in (left, right))
    for a, b in pairs:
        here, there = numbers[0][a.key], numbers[1][a.key]
        certain = settled and (here == there == 1 or here == there == in_order[a.key])
        why = reason if here == there == 1 else "order"
        if a.children or b.children:
            _align(a.children or [a], b.children or [b], why, certain, found)
        else:
            found[a.name] = _Pair(b.name, why, certain)
    if left and right and any(node.children for node in (*left, *right)):
        _align(_opened(left), _opened(right), "order", False, found)


def _units(nodes: list[_Node], keys: set[_Key]) -> list[_Node]:
    """The largest parts that the other side has too, and layers."""
    return [
        unit
        for node in nodes
        for unit in ([node] if node.key in keys or not node.children else _units(node.children, keys))
    ]


def _below(nodes: list[_Node]) -> list[_Node]:
    return [found for node in nodes for found in (node, *_below(node.children))]


def _opened(nodes: list[_Node]) -> list[_Node]:
    return [child for node in nodes for child in (node.children or [node])]


def _longest_run(left: list[_Node], right: list[_Node]) -> list[tuple[_Node, _Node]]:
    """The most pairs of alike nodes in the same order on both sides, of similar names where there is a choice."""
    theirs, ours = [node.key for node in left], [node.key for node in right]
    scores = np.zeros((len(left) + 1, len(right) + 1))
    for i in range(len(left) - 1, -1, -1):
        for j in range(len(right) - 1, -1, -1):
            scores[i, j] = max(scores[i + 1, j], scores[i, j + 1])
            if theirs[i] == ours[j]:
                similar = difflib.SequenceMatcher(None, left[i].name, right[j].name, autojunk=False).ratio()
                # Similarity never outweighs one more pair.
                scores[i, j] = max(scores[i, j], scores[i + 1, j + 1] + 1 + similar / (len(left) + 1))
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if scores[i, j] == scores[i + 1, j]:
            i += 1
        elif scores[i, j] == scores[i, j + 1]:
            j += 1
        else:
            found.append((left[i], right[j]))
            i, j = i + 1, j + 1
    return found


def _joined(layer: str, entry: str) -> str:
    return f"{layer}.{entry}" if layer else entry


def _shown(signature: Signature) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in signature)
