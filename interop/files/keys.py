"""Which values of a pickle may be keys of a dict or members of a set, and what it costs to look them up.

The hash of a tuple is computed anew each time, as often as a value is in it, and deeply nested ones exhaust the C
stack; numbers and tuples can be chosen so that thousands have one hash, and then each is compared with all before it.
"""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from interop.files.budget import CHECKED
from interop.files.stand_ins import UnpickleError, name_of

_MOST_VALUES: Final = 64  # in one key, counted as often as they are there
_MOST_BITS: Final = 4096
_MOST_OF_A_HASH: Final = 64
_OWN_HASH: Final = 2**61 - 1  # sys.hash_info.modulus: a smaller number is its own hash


class Keys:
    """The keys of the dicts and sets that are being made."""

    def __init__(self) -> None:
        # by id: the dict or set, which lives as long as it is here, and how often it has a hash that can be chosen
        self._of: dict[int, tuple[Any, dict[int, int]]] = {}

    def check(self, target: Any, keys: Iterable[Any]) -> int:
        """The steps that it takes to put `keys` into `target`.

        Raises UnpickleError for what cannot be a key, holds too many values, or has the hash of too many others.
        """
        steps = 0
        for key in keys:
            if type(key) is str and len(key) < CHECKED:
                continue
            steps += _steps(key, _MOST_VALUES)
            if isinstance(key, tuple | frozenset | complex | np.generic) or (
                isinstance(key, int) and abs(key) >= _OWN_HASH
            ):
                steps += 2
                _, hashes = self._of.setdefault(id(target), (target, {}))
                hashes[hash(key)] = count = hashes.get(hash(key), 0) + 1
                if count > _MOST_OF_A_HASH:
                    raise UnpickleError(f"has more than {_MOST_OF_A_HASH} keys of one hash, such as {name_of(key)}")
        return steps


def check_keys(keys: Iterable[Any]) -> None:
    """As `Keys.check`, for all keys that a dict or set will have."""
    Keys().check(None, keys)


def _steps(key: Any, room: int) -> int:
    if isinstance(key, str | bytes):
        return len(key) // CHECKED
    if isinstance(key, int):
        if key.bit_length() > _MOST_BITS:
            raise UnpickleError(f"uses a number of {key.bit_length()} bits as a key")
        return 0
    if isinstance(key, tuple | frozenset):
        steps = 0
        for item in key:
            steps += 1
            if steps > room:
                raise UnpickleError(f"uses {name_of(key)} as a key, which holds too much for one")
            steps += _steps(item, room - steps)
        return steps
    if type(key).__hash__ is None:
        raise UnpickleError(f"uses {name_of(key)} as a key")
    return 0
