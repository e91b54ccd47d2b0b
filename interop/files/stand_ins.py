"""What stands for the classes, functions and objects of a pickle: names and state, and nothing that acts."""

import dataclasses
from collections.abc import Mapping
from typing import Any


class UnpickleError(ValueError):
    """A pickle that is broken, or that asks for more than a description of its data."""


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of a class or function that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Instance:
    """Stands for an object of class `cls`: what it would be made from and filled with. It does nothing."""

    cls: Global
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Any = None
    elements: list[Any] = dataclasses.field(default_factory=list)  # of a subclass of list or set
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)  # of a subclass of dict

    def __repr__(self) -> str:
        return f"<{self.cls} object, not built>"

    @property
    def attributes(self) -> dict[Any, Any]:
        """The object's `__dict__` as far as the pickle gives it."""
        state = self.state[0] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        return state if isinstance(state, dict) else {}


def name_of(value: Any) -> str:
    """How a message calls a value: short, and without a look at what is inside (it may be endless)."""
    if isinstance(value, Global | Instance):
        return str(value)
    return f"{value[:60]!r}" if isinstance(value, str | bytes) else f"a value of type {type(value).__name__}"


def check_key(value: Any, depth: int = 8) -> Any:
    """A value that may be a key or in a set: nothing nested deeply, whose hash would exhaust the C stack."""
    if isinstance(value, tuple) and depth and len(value) <= 64:
        return tuple(check_key(item, depth - 1) for item in value)
    if value is None or isinstance(value, str | bytes | int | float | complex | Global | Instance):
        return value
    raise UnpickleError(f"uses {name_of(value)} as a key")
