"""What is raised for modules that cannot become programs, for programs that cannot be, and for files."""

import os


class TraceError(ValueError):
    """A module that cannot be turned into a program; the message says where and what to do."""


class TorchVersionError(TraceError):
    """A torch in which something that tracing needs, and that torch's documentation does not promise, has moved."""


class ProgramError(ValueError):
    """A program that cannot be read, or that cannot run."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked. The message names the file and the entry."""

    def __init__(self, path: "os.PathLike[str] | str", problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
