"""Printers by operation: each writes one operation of a program as terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from interop.porting.values import Writer

Printer = Callable[..., Any]
Function = TypeVar("Function", bound=Printer)

_printers: dict[str, Printer] = {}


def prints(*operations: str) -> Callable[[Function], Function]:
    """Makes a function the printer of operations. It is given the writer and the operation's arguments."""

    def add(function: Function) -> Function:
        _printers.update(dict.fromkeys(operations, function))
        return function

    return add


def printer(operation: str) -> Printer | None:
    """The printer of an operation, if there is one."""
    return _printers.get(operation)


def printed(writer: Writer, operation: str, arguments: Any, keywords: Any) -> Any:
    """What the operation's printer makes of it."""
    return _printers[operation](writer, *arguments, **keywords)
