"""How much work a file may ask for: what follows from the bytes that are there.

A small file can describe much: a dict that three hundred names refer to, in one that three hundred names refer to; a
name of a megabyte that ninety levels share; ten thousand entries at one place of a file. So whatever a reader does for
a claim of the file, and not for a byte of it, is charged here, by the memory that it takes and by the steps that it
makes. Looking at a shared object a second time is free where its result is kept, and costs again where it is not.
"""

import os
from typing import Final

from interop.errors import CheckpointError

MEMORY: Final = 56 << 20  # bytes of objects that any file may make,
_MEMORY_A_BYTE: Final = 3.5  # and so many more for each of its bytes
STEPS: Final = 5_000_000  # steps that any file may ask for; one takes Python about 0.2 microseconds
_STEPS_A_BYTE: Final = 0.4
CHECKED: Final = 256  # bytes that a checksum, a copy or a comparison goes through in the time of a step


class Budget:
    """What a file of `size` bytes may still ask for.

    Together with the mapped file itself this is 1 s + size / (20 MB/s), and 64 MB + 4 size.
    """

    def __init__(self, path: "os.PathLike[str] | str", size: int) -> None:
        self.path, self.size = path, size
        self.memory = MEMORY + int(_MEMORY_A_BYTE * size)
        self.steps = STEPS + int(_STEPS_A_BYTE * size)

    def spend(self, memory: int = 0, steps: int = 0) -> None:
        """Charges bytes of memory and steps of work. Raises CheckpointError when nothing is left."""
        self.memory -= memory
        self.steps -= steps
        if self.memory < 0 or self.steps < 0:
            what = "memory" if self.memory < 0 else "work"
            raise CheckpointError(
                self.path, f"makes more objects than its size allows: what it describes takes more {what} than is read"
            )
