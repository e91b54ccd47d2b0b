"""How many examples hypothesis draws: the same few in the suite, other and many more in `make fuzz`."""

import os

from hypothesis import settings

TIMES = int(os.environ.get("JAXNORM_FUZZ", "1"))


def examples(count):
    """So many in the suite."""
    return settings(max_examples=count * TIMES)
