"""Errors that forward catches while it is recorded.

    try:
        y = self.attention(x, mask)
    except TypeError:
        y = self.attention(x)

PyTorch would raise this one too, and the record goes on where forward does. Others are raised by the recording alone,
where code asks for a value: what forward does once it has caught such a one is not what it does with tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from interop.errors import TraceError
from interop.tracing import private
from interop.tracing.custom_gradients import CustomGradientError
from interop.tracing.refusals import users_line


class UnrecordedError(ValueError):
    """What forward asks for and a record cannot have."""


class Caught:
    """The errors of one record."""

    def __init__(self) -> None:
        self._raised: list[BaseException] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """The time of the record, in which a layer that ends by an error is left as one that returns."""
        with (
            private.layers_left_on_errors(),
            private.made_instances((*private.value_errors(), TraceError, CustomGradientError, UnrecordedError),
                                   self._raised.append),
        ):  # fmt: skip
            yield

    def refuse(self, more: Sequence[BaseException] = ()) -> None:
        """For a record that ended well; `more` are other errors that only it has raised.

        Raises:
            TraceError: if forward has caught an error that the recording alone raised. Its traceback ends where it was
                caught, so one that PyTorch itself caught has no line of the user's.
        """
        for error in (*self._raised, *more):
            line = users_line(error)
            if line:
                text = f"{type(error).__name__}: {f'{error}'.strip()}".partition("\n")[0]
                raise TraceError(
                    f"forward catches an error that it does not meet outside of a record{line} ({text}), and goes on "
                    "without what it asked for. Compute with tensors there (torch.where for a choice), or leave out "
                    "the try"
                )
