"""What arguments are to be, said at the door: errors that name the argument, what is expected, and what was given."""

from typing import Any

import numpy as np


def whole(name: str, value: Any, least: int = 0, what: str = "a whole number") -> int:
    """`value` as an int that is not below `least`.

    Raises:
        TypeError, ValueError: for anything else.
    """
    expected = f"{name} is {what}, {least} or more"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{expected}; got {shown(value)}")
    if value < least:
        raise ValueError(f"{expected}; got {value}")
    return int(value)


def shown(value: Any) -> str:
    """A few words on a value of any kind."""
    return f"{value!r:.80}" if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
