"""Everything that a module's code can reach and change: attributes, containers, closures, classes, globals, tensors.

The walk begins with the module and what it is called with. It follows attributes, the contents of containers, hooks and
closures, and of the code that is neither Python's nor PyTorch's nor this library's also classes and those globals that
a function names. What holds other objects is a `Holder`; tensors, arrays and generators have values of their own.
"""

from __future__ import annotations

import array
import collections
import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from interop.tracing import private

_NOT_THE_USERS = sys.stdlib_module_names | {"torch", "numpy", "jax", "jaxlib", "flax", "interop", "jaxnorm", "beartype"}
# Of Python's own classes with attributes, those that hold what a user puts there; of PyTorch's, all but its machinery.
_HOLDING = {"collections", "types", "argparse", "weakref", "dataclasses"}
_MACHINERY = (
    "torch._",
    "torch.jit",
    "torch.distributed",
    "torch.utils",
    "torch.autograd",
    "torch.cuda",
    "torch.futures",
)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, np.dtype, range)
Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
LRU_CACHE = type(functools.lru_cache(lambda: None))


class Holder(NamedTuple):
    """What holds other objects under keys, and how it is read and written as a whole.

    Attributes:
        name: of the value under a key: `name(key)`, as the user would write it.
        owner: the object itself.
        table: "parameter", "buffer" or "layer" for a module's own, "attribute" for the attributes of a module, else
            "item".
        read, write: its contents, all at once.
    """

    name: Callable[[Any], str]
    owner: object
    table: str
    read: Callable[[], dict[Any, Any]]
    write: Callable[[Mapping[Any, Any]], None]


class Reached(NamedTuple):
    """What the walk came by, each once."""

    holders: list[Holder]
    tensors: list[tuple[str, torch.Tensor]]
    arrays: list[tuple[str, np.ndarray | bytearray | array.array[Any]]]
    generators: list[tuple[str, Generator]]


def reachable(module: torch.nn.Module, inputs: object = ()) -> Reached:
    """All that `module` and what it is called with can reach."""
    walk = _Walk()
    walk.waiting = [("", module), ("the example inputs", inputs)]
    walk.run()
    return walk.found


class _Walk:
    def __init__(self) -> None:
        self.found = Reached([], [], [], [])
        self.waiting: list[tuple[str, Any]] = []
        self._seen: dict[int, object] = {}
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}

    def run(self) -> None:
        while self.waiting:
            name, item = self.waiting.pop()
            if isinstance(item, _PLAIN) or id(item) in self._seen:
                continue
            self._seen[id(item)] = item
            self._visit(name, item)
        for names, used in self._globals.values():
            self._hold(
                "item", names, str, functools.partial(_named, names, used), functools.partial(_rename, names, used)
            )

    def _hold(
        self,
        table: str,
        owner: object,
        name: Callable[[Any], str],
        read: Callable[[], dict[Any, Any]],
        write: Callable[[Mapping[Any, Any]], None],
    ) -> None:
        self.found.holders.append(Holder(name, owner, table, read, write))

    def _visit(self, name: str, item: Any) -> None:
        kind = type(item)
        if issubclass(kind, torch.Tensor):
            self._tensor(name, item)
        elif issubclass(kind, (np.ndarray, bytearray, array.array)):
            self.found.arrays.append((name, item))
            if issubclass(kind, np.ndarray) and item.dtype.hasobject:
                self.waiting += [(name, x) for x in item.flat]
        elif issubclass(kind, Generator):
            self.found.generators.append((name, item))
        elif issubclass(kind, type):
            self._class(name, item)
        elif issubclass(kind, (types.FunctionType, types.MethodType, functools.partial, LRU_CACHE, types.CellType)):
            self._callable(name, item)
        elif issubclass(kind, (property, staticmethod, classmethod, functools.cached_property)):
            parts = ("fget", "fset", "fdel", "__func__", "func")
            self.waiting += [(name, part) for key in parts if (part := getattr(item, key, None)) is not None]
        else:
            self._container(name, item)
            self._object(name, item)

    def _tensor(self, name: str, tensor: torch.Tensor) -> None:
        self.found.tensors.append((name, tensor))
        if tensor.is_leaf and tensor.grad is not None:
            self.waiting.append((f"{name}.grad", tensor.grad))
        tables = [vars(tensor), *private.tensor_hooks(tensor)]
        self.waiting += [(name, table) for table in tables]
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is not None:
            self.waiting += [(f"{name}.{part}", getattr(tensor, part)) for part in inner()[0]]

    def _container(self, name: str, item: Any) -> None:
        at = functools.partial("{}[{!r}]".format, name)
        if isinstance(item, dict):
            self._hold("item", item, at, functools.partial(_plain_dict, item), functools.partial(_fill_dict, item))
            self.waiting += [(at(key), value) for key, value in _plain_dict(item).items()]
            self.waiting += [(name, key) for key in _plain_dict(item) if not isinstance(key, _PLAIN)]
        elif isinstance(item, (list, collections.deque)):
            self._hold("item", item, at, lambda: dict(enumerate(item)), functools.partial(_fill_sequence, item))
            self.waiting += [(at(index), value) for index, value in enumerate(item)]
        elif isinstance(item, set):
            self._hold("item", item, at, lambda: {id(x): x for x in item}, functools.partial(_fill_set, item))
            self.waiting += [(name, value) for value in item]
        elif isinstance(item, (tuple, frozenset)):
            self.waiting += [(at(index), value) for index, value in enumerate(item)]
        elif isinstance(item, types.MappingProxyType):
            self.waiting += [(at(key), value) for key, value in item.items()]

    def _object(self, name: str, item: Any) -> None:
        """Attributes of an object, and its class."""
        kind = type(item)
        if not (isinstance(item, (torch.nn.Module, dict, list, set, tuple)) or _holds_attributes(kind)):
            return
        self.waiting.append((f"{kind.__module__}.{kind.__qualname__}", kind))
        dotted = functools.partial(_dotted, name)
        attributes = getattr(item, "__dict__", None)
        if isinstance(attributes, dict):
            self._seen[id(attributes)] = attributes
            table = "attribute" if isinstance(item, torch.nn.Module) else "item"
            self._hold(table, item, dotted, attributes.copy, functools.partial(_fill_dict, attributes))
            for key, value in attributes.items():
                if isinstance(item, torch.nn.Module) and key in private.TABLES:
                    self._table(private.TABLES[key], dotted, value)
                else:
                    self.waiting.append((dotted(key), value))
        # A class may put a property in the place of a slot of its base.
        slots = [slot for cls in kind.__mro__ for slot in _slots(cls) if _is_slot(inspect.getattr_static(kind, slot))]
        if slots:
            self._hold(
                "item", item, dotted, functools.partial(_slotted, item, slots), functools.partial(_fill, item, slots)
            )
            self.waiting += [(dotted(key), value) for key, value in _slotted(item, slots).items()]

    def _table(self, table: str, dotted: Callable[[Any], str], content: dict[str, Any]) -> None:
        """One of a module's tables, whose entries are called as its attributes are."""
        self._seen[id(content)] = content
        read, write = functools.partial(_plain_dict, content), functools.partial(_fill_dict, content)
        self._hold(table, content, dotted, read, write)
        self.waiting += [(dotted(key), value) for key, value in content.items()]

    def _class(self, name: str, cls: type) -> None:
        for base in cls.__mro__:
            # A graph module has a class of its own, whose forward is written anew with each graph.
            its_own = issubclass(base, torch.fx.GraphModule) and base is not torch.fx.GraphModule
            if (its_own or _users(base.__module__)) and (base is cls or id(base) not in self._seen):
                self._seen[id(base)] = base
                dotted = functools.partial(_dotted, base.__qualname__)
                read, write = functools.partial(_class_attributes, base), functools.partial(_fill_class, base)
                self._hold("item", base, dotted, read, write)
                self.waiting += [(dotted(key), value) for key, value in read().items()]

    def _callable(self, name: str, item: Any) -> None:
        if isinstance(item, types.CellType):
            self._hold("item", item, lambda _: name, lambda: _cell(item), functools.partial(_fill_cell, item))
            self.waiting += [(name, value) for value in _cell(item).values()]
        elif isinstance(item, types.MethodType):
            self.waiting += [(name, item.__self__), (name, item.__func__)]
        elif isinstance(item, functools.partial):
            self.waiting += [(name, item.func), (name, item.args), (name, item.keywords)]
        elif isinstance(item, LRU_CACHE):
            self.waiting.append((name, getattr(item, "__wrapped__", None)))
        else:
            self._function(item)

    def _function(self, function: types.FunctionType) -> None:
        name = function.__qualname__
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.waiting += [(variable, cell) for variable, cell in cells]
        self.waiting += [
            (name, part) for part in (function.__defaults__, function.__kwdefaults__, vars(function)) if part
        ]
        if not _users(function.__module__):
            return
        names = set(_names(function.__code__))
        known, used = self._globals.setdefault(id(function.__globals__), (function.__globals__, set()))
        used |= names
        for variable in names:
            for value in (
                known.get(variable),
                sys.modules.get(variable),
            ):  # the second: imported by the function itself
                self._global(variable, value, names)

    def _global(self, variable: str, value: object, names: set[str]) -> None:
        if not isinstance(value, types.ModuleType):
            self.waiting.append((variable, value))
        elif _users(value.__name__):
            known, used = self._globals.setdefault(id(vars(value)), (vars(value), set()))
            new = [attribute for attribute in names if attribute in known and attribute not in used]
            used.update(new)
            for attribute in new:
                self._global(f"{variable}.{attribute}", known[attribute], names)


def _users(module: str | None) -> bool:
    """Whether code of the module is the user's, or a library's that is written as a user's would be."""
    return bool(module) and str(module).partition(".")[0] not in _NOT_THE_USERS


def _holds_attributes(kind: type) -> bool:
    module = kind.__module__ if isinstance(kind.__module__, str) else ""
    first = module.partition(".")[0]
    if issubclass(kind, types.ModuleType):
        return False
    if first == "torch":
        return not module.startswith(_MACHINERY)
    return _users(module) or first in _HOLDING


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _dotted(name: str, key: object) -> str:
    return f"{name}.{key}".removeprefix(".")


# Reading and writing. Subclasses may have a __setitem__ of their own, which is not asked.


def _plain_dict(item: dict[Any, Any]) -> dict[Any, Any]:
    return dict(zip(dict.keys(item), dict.values(item), strict=True))


def _fill_dict(item: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    base = collections.OrderedDict if isinstance(item, collections.OrderedDict) else dict
    base.clear(item)
    for key, value in content.items():
        base.__setitem__(item, key, value)


def _fill_sequence(item: Any, content: Mapping[int, Any]) -> None:
    base = list if isinstance(item, list) else collections.deque
    base.clear(item)
    base.extend(item, content.values())


def _fill_set(item: set[Any], content: Mapping[Any, Any]) -> None:
    set.clear(item)
    set.update(item, content.values())


def _cell(cell: types.CellType) -> dict[str, Any]:
    try:
        return {"": cell.cell_contents}
    except ValueError:  # empty
        return {}


def _fill_cell(cell: types.CellType, content: Mapping[str, Any]) -> None:
    if content:
        cell.cell_contents = content[""]
    else:
        del cell.cell_contents


def _named(names: dict[str, Any], used: set[str]) -> dict[str, Any]:
    return {name: names[name] for name in sorted(used) if name in names}


def _rename(names: dict[str, Any], used: set[str], content: Mapping[str, Any]) -> None:
    for name in used - content.keys():
        names.pop(name, None)
    names.update(content)


def _class_attributes(cls: type) -> dict[str, Any]:
    return {key: value for key, value in vars(cls).items() if not (key.startswith("__") or key == "_abc_impl")}


def _fill_class(cls: type, content: Mapping[str, Any]) -> None:
    now = _class_attributes(cls)
    for key in now.keys() - content.keys():
        type.__delattr__(cls, key)
    for key, value in content.items():
        if now.get(key, cls) is not value:
            type.__setattr__(cls, key, value)


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if _is_slot(vars(cls).get(name))]


def _is_slot(attribute: object) -> bool:
    return isinstance(attribute, types.MemberDescriptorType)


def _slotted(item: object, slots: list[str]) -> dict[str, Any]:
    return {name: getattr(item, name) for name in slots if hasattr(item, name)}


def _fill(item: object, slots: list[str], content: Mapping[str, Any]) -> None:
    for name in slots:
        if name in content:
            object.__setattr__(item, name, content[name])
        elif hasattr(item, name):
            object.__delattr__(item, name)
