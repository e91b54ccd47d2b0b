"""A model's variables one by one, and what each layer's are in a state dict. NNX and Linen models alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from interop.errors import shown
from interop.weights.layouts import Arrays, Layout, Piece, same
from interop.weights.rename import check_pattern

Path = tuple[str, ...]
Layouts = Mapping[str, Layout]


class Slot(NamedTuple):
    """A variable at one of its places in the tree."""

    path: Path
    key: Hashable  # of the variable itself: the same at all its places
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclass
class Tree:
    """A model, taken apart into variables and layers."""

    title: str  # for errors
    slots: list[Slot]
    layouts: dict[Path, Layout]
    # puts values into the model, and returns it
    write: Callable[[dict[Hashable, np.ndarray]], nnx.Module | Mapping[str, Any]]


class Part(NamedTuple):
    """Entries of a state dict, and the variables that hold the same numbers."""

    layer: str  # the layer's path in the model, with dots
    entries: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the entries
    slots: tuple[Slot, ...]
    piece: Piece

    def read(self) -> Arrays:
        """The entries' values, in one piece of memory each."""
        values = self.piece.to_torch(*(slot.read() for slot in self.slots))
        return tuple(np.asarray(value, order="C") for value in values)


def parts(tree: Tree, layouts: Layouts | None = None) -> list[Part]:
    """Every variable of the model once, layer by layer, in the order of the tree.

    Raises:
        ValueError: for layers whose variables are not what their layout is for, and for `layouts` that fit no layer.
    """
    by_path = {slot.path: slot for slot in tree.slots}
    below: dict[Path, list[Path]] = {}
    for path in by_path:
        for end in range(len(path)):
            below.setdefault(path[:end], []).append(path)
    rules = {**tree.layouts, **_given(checked(layouts), below)}
    found: list[Part] = []
    taken: set[Path] = set()
    problems = []
    for layer in sorted(rules, key=len):  # a layer comes before the layers inside it
        own = {".".join(path[len(layer) :]): by_path[path] for path in below.get(layer, ()) if path not in taken}
        if not own:
            continue
        try:
            pieces = rules[layer].pieces({name: slot.shape for name, slot in own.items()})
        except ValueError as error:
            problems.append(f"  {'.'.join(layer)}: {error}")
            continue
        for piece in pieces:
            slots = tuple(own[name] for name in piece.variables)
            taken.update(slot.path for slot in slots)
            found.append(_part(layer, piece, slots))
    if problems:
        raise ValueError("\n".join([f"layers of {tree.title} that have no state dict as they are:", *problems]))
    for path, slot in by_path.items():
        if path not in taken:
            found.append(_part(path[:-1], Piece((path[-1],), (path[-1],), same, same), (slot,)))
    order = {path: index for index, path in enumerate(by_path)}
    first: dict[str, int] = {}
    for part in found:
        first[part.layer] = min(order[part.slots[0].path], first.get(part.layer, len(order)))
    return sorted(found, key=lambda part: first[part.layer])  # a layer's parts keep PyTorch's order


def checked(layouts: Layouts | None) -> Layouts:
    """The caller's layouts, none for None. Raises TypeError for what is none, and ValueError for what is no pattern."""
    if layouts is None:
        return {}
    if not isinstance(layouts, Mapping):
        raise TypeError(
            "layouts= is a mapping from layers' paths, or patterns of them, to members of interop.layouts; found "
            f"{type(layouts).__name__}"
        )
    for pattern, layout in layouts.items():
        if not isinstance(pattern, str):
            raise TypeError(f"layouts= goes by layers' paths, or patterns of them, found {shown(pattern)}")
        check_pattern(pattern, "layouts=")
        if isinstance(layout, type) or not isinstance(layout, Layout):
            raise TypeError(
                f"layouts=: {pattern!r} has a member of interop.layouts, such as Linear(), found {shown(layout)}"
            )
    return layouts


def _part(layer: Path, piece: Piece, slots: tuple[Slot, ...]) -> Part:
    blanks = [np.broadcast_to(np.zeros((), np.bool_), slot.shape) for slot in slots]
    shapes = tuple(tuple(entry.shape) for entry in piece.to_torch(*blanks))
    return Part(".".join(layer), tuple(".".join((*layer, name)) for name in piece.entries), shapes, slots, piece)


def _given(layouts: Layouts, layers: Iterable[Path]) -> dict[Path, Layout]:
    """The caller's layouts by the paths of the layers that their patterns match."""
    names = {path: ".".join(path) for path in layers if path}
    problems = []
    found: dict[Path, Layout] = {}
    for pattern, layout in layouts.items():
        fitting = matched({pattern: layout}, names)
        if not fitting:
            problems.append(f"  {pattern!r} is no layer of the model")
        problems += [f"  {names[path]!r} has several, {pattern!r} among them" for path in fitting if path in found]
        found |= dict.fromkeys(fitting, layout)
    if problems:
        some = ", ".join(list(names.values())[:12])
        raise ValueError("\n".join([f"layouts= goes by layers' paths, or patterns of them ({some}, ...):", *problems]))
    return found


def matched(layouts: Layouts, layers: Iterable[Path]) -> set[Path]:
    """The layers that a pattern of `layouts` matches as a whole."""
    return {path for path in layers if any(re.fullmatch(pattern, ".".join(path)) for pattern in layouts)}
