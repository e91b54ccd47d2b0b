"""What is raised where a module cannot become a program."""


class TraceError(ValueError):
    """A module that cannot be turned into a program; the message says where and what to do."""


class TorchVersionError(TraceError):
    """A torch in which something that tracing needs, and that torch's documentation does not promise, has moved."""
