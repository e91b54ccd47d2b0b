"""What a file says beside its weights, as ordinary values."""

import pathlib
from typing import Any, Final

from interop.files.budget import Budget
from interop.files.disk import CheckpointError
from interop.files.rebuild import finish
from interop.files.stand_ins import Instance, name_of
from interop.files.tensors import Tensor

NAMESPACES: Final = ("argparse.Namespace", "types.SimpleNamespace")
_DEEPEST: Final = 100
_SMALL: Final = 16
_ATOMS: Final = frozenset({str, int, float, bool, bytes, complex, type(None)})


class Metadata:
    """Turns what the pickle gave into ordinary values, in place: a log of a million records is there once.

    Tensors become arrays, namespaces dicts, paths text; what has no such form stays a stand-in. Each object is looked
    at once, however many refer to it, and what is made of it is shared in the same way.
    """

    def __init__(self, path: pathlib.Path, budget: Budget) -> None:
        self.path, self.budget = path, budget
        self._memo: dict[int, tuple[Any, Any]] = {}  # by id: the object, which keeps its id to itself, and its value

    def plain(self, value: Any, depth: int = 0) -> Any:
        """The ordinary value. Raises CheckpointError for tensors that lie and for what is nested without end."""
        value = finish(value)
        if type(value) in _ATOMS:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known[1]
        if depth > _DEEPEST:
            raise CheckpointError(self.path, "is nested more deeply than a checkpoint")
        if isinstance(value, dict):
            return self._items(value, value.items(), depth)
        if isinstance(value, list):
            return self._items(value, enumerate(value), depth)
        if isinstance(value, tuple):
            self.budget.spend(steps=len(value) // 2)
            if len(value) <= _SMALL and all(type(item) in _ATOMS for item in value):
                return value
            items = [self.plain(item, depth + 1) for item in value]
            same = all(new is old for new, old in zip(items, value, strict=True))
            return self._keep(value, value if same else tuple(items))
        if isinstance(value, Tensor):
            if problem := value.problem():
                raise CheckpointError(self.path, f"a tensor beside the state dict: {problem}")
            self.budget.spend(memory=400 + value.copied(), steps=20)
            return self._keep(value, value.array())
        return self._keep(value, self._of_instance(value, depth)) if isinstance(value, Instance) else value

    def _keep(self, value: Any, result: Any) -> Any:
        self.budget.spend(memory=160)
        self._memo[id(value)] = value, result
        return result

    def _items(self, value: Any, items: Any, depth: int) -> Any:
        self.budget.spend(steps=len(value) // 2)
        inner = [(key, item) for key, item in items if type(item) not in _ATOMS]
        if inner or len(value) > _SMALL:  # the few atoms of a small one are as soon looked at again as remembered
            self._keep(value, value)
        for key, item in inner:
            new = self.plain(item, depth + 1)
            if new is not item:
                value[key] = new
        return value

    def _of_instance(self, value: Instance, depth: int) -> Any:
        cls = str(value.cls)
        if cls in NAMESPACES:
            return self.plain(value.attributes, depth + 1)
        if cls.startswith("pathlib.") and value.args and all(isinstance(part, str) for part in value.args):
            self.budget.spend(memory=4 * sum(map(len, value.args)))
            return str(pathlib.PurePosixPath(*value.args))
        if cls == "torch.device":
            parts = [str(part) for part in value.args if type(part) is str or (type(part) is int and abs(part) < 2**63)]
            self.budget.spend(memory=sum(map(len, parts)))
            return ":".join(parts)
        return value


def said(value: Any) -> str:
    """A key of metadata as text; those that are none by what they are (`name_of`), as they may be endless."""
    return value if isinstance(value, str) else name_of(value)
