"""What is raised for modules that cannot become programs, and for programs that cannot be."""


class TraceError(ValueError):
    """A module that cannot be turned into a program; the message says where and what to do."""


class TorchVersionError(TraceError):
    """A torch in which something that tracing needs, and that torch's documentation does not promise, has moved."""


class ProgramError(ValueError):
    """A program that cannot be read, or that cannot run."""
