"""What is raised for modules that cannot become programs, for programs that cannot be, and for files, and how messages
call values."""

import os


class TraceError(ValueError):
    """A module that cannot be turned into a program; the message says where and what to do. A `ValueError`."""


class TorchVersionError(TraceError):
    """A torch in which something that tracing needs, and that torch's documentation does not promise, has moved."""


class ProgramError(ValueError):
    """A program that cannot be read, or that cannot run. A `ValueError`."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message names file and entry. A `ValueError`."""

    def __init__(self, path: "os.PathLike[str] | str", problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")


def shown(value: object) -> str:
    """How a message calls what a caller gave: numbers and texts as they are, of anything else the type.

    The representation of a container may be endless, and that of an integer of 5,000 digits is an error.
    """
    if isinstance(value, tuple) and len(value) <= 4:
        return f"({', '.join(map(shown, value))})"
    if value is None or isinstance(value, str | bytes | float | bool) or (isinstance(value, int) and abs(value) < 1e30):
        text = repr(value)
        return text if len(text) <= 100 else f"{text[:100]}..."
    return f"a value of type {type(value).__module__}.{type(value).__qualname__}"
