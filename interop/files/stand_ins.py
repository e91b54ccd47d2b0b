"""What stands for the classes, functions and objects of a pickle: names and state, and nothing that acts."""

import dataclasses
from collections.abc import Mapping
from typing import Any


class UnpickleError(ValueError):
    """A pickle that is broken, or that asks for more than a description of its data."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False, slots=True)
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


class Called(Instance):
    """Stands for what the function `cls` would return: a NumPy generator, a compiled pattern, a thing of the user's."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<what {self.cls}() would make, not rebuilt>"


def name_of(value: Any) -> str:
    """How a message calls a value: short, and without a look at what is inside (it may be endless)."""
    if isinstance(value, Global | Instance):
        return str(value)
    if isinstance(value, str | bytes):
        return f"{value[:60]!r}" + "..." * (len(value) > 60)
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**64):
        return repr(value)
    return f"a value of type {type(value).__name__}"
