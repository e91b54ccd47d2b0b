"""Operations by name. Each is one JAX function with the arguments of PyTorch's schema.

    @register("aten.relu.default", layout="elementwise")
    def relu(x): ...

How a function takes activations is said by `layout`:

- "plain": arrays with PyTorch's order of dimensions (N, C, H, W).
- "elementwise": arrays in any common order; dimensions mean nothing to the function, and its result has the same order.
- "aware": arrays or `Laid` values, as they come; the function answers for the order itself (see `interop.ops.layout`).

A function registered with `random=True` takes a `key`.

What an operation does at a corner or a tie can differ between versions of PyTorch. A program goes by the PyTorch that
recorded it: `@register("aten.clamp.default", since="2.14")` is the operation of programs of that version and newer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from interop.errors import shown
from interop.program.versions import release

Layout = Literal["plain", "elementwise", "aware"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Operation:
    """A named function and how it is called."""

    name: str
    function: Callable[..., Any]
    layout: Layout
    random: bool
    since: tuple[int, ...] = ()  # the first version of PyTorch whose operation this is


_operations: dict[str, dict[tuple[int, ...], Operation]] = {}  # by name, and by `since`


def normalised(name: str) -> str:
    """The name as programs have it: "mylib::op" and "mylib.op" are "mylib.op.default"."""
    name = name.replace("::", ".")
    if not re.fullmatch(r"\w+(\.\w+){1,2}", name):
        raise ValueError(f'an operation is named "library::operation" or "library::operation.overload", found {name!r}')
    library = name.split(".")[0]
    return name if name.count(".") == 2 or library in ("operator", "math", "torch", "builtins") else f"{name}.default"


def register(
    *names: str, layout: Layout = "plain", random: bool = False, since: str | None = None
) -> Callable[[Function], Function]:
    """Makes a function the JAX side of PyTorch operations: for those that jaxnorm does not know, or of your own
    library.

    ```python
    @interop.register("mylib::scaled_tanh")
    def scaled_tanh(x, scale=1.0):
        return scale * jnp.tanh(x)
    ```

    The function takes the arguments of the operation's schema in PyTorch, arrays in the place of tensors. It replaces
    one that is registered already.

    **Arguments:**

    - `*names`: PyTorch's names, `mylib::op` or `mylib::op.overload`.
    - `layout`: how the function takes activations: "plain", with PyTorch's order of dimensions (N, C, H, W);
      "elementwise", in any common order, which its result has too; "aware", where the function answers for the order
      itself (`interop/ops/layout.py`).
    - `random`: whether the function takes a `key=` to draw from.
    - `since`: the first version of PyTorch that does this, "2.14" say; programs of older ones keep the function that is
      registered for them. None: whatever the version.

    **Returns:** a decorator, which gives the function back.

    **Raises:** here, and the decorator for what it is given:

    - `ValueError`: for a name, a layout or a version that is none.
    - `TypeError`: for names that are no text, a version that is none, and what is no function.
    """
    if not isinstance(layout, str) or layout not in ("plain", "elementwise", "aware"):
        raise ValueError(f'layout is "plain", "elementwise" or "aware", found {shown(layout)}')
    if not isinstance(since, str | None):
        raise TypeError(f'since is a version of PyTorch, "2.14" say, found {shown(since)}')
    first = () if since is None else release(since)

    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"an operation's name is a string, found {shown(wrong[0])}")
    keys = [normalised(name) for name in names]

    def add(function: Function) -> Function:
        if not callable(function):
            raise TypeError(f"expected a function for {', '.join(names)}, found {type(function).__name__}")
        for key in keys:
            versions = _operations.setdefault(key, {})
            if since is None:
                versions.clear()
            versions[first] = Operation(key, function, layout, random, first)
        return function

    return add


def lookup(name: str, torch: str) -> Operation | None:
    """The operation of that name as the version `torch` of PyTorch has it, if there is one."""
    found = [operation for first, operation in _operations.get(name, {}).items() if first <= release(torch)]
    return max(found, key=lambda operation: operation.since, default=None)


def names() -> Iterator[str]:
    """The names of all operations, sorted."""
    yield from sorted(_operations)
