"""Another distribution whose import name is `interop`, too."""

from __future__ import annotations

import importlib.metadata


def refuse_other_interop() -> None:
    """Raises ImportError where PyPI's `interop` (Illumina's InterOp) is installed beside jaxnorm.

    Both put files into site-packages/interop: whichever was installed last has written over the other's, and removing
    one removes files of both.
    """
    try:
        other = importlib.metadata.distribution("interop")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution interop {other.version} (Illumina's InterOp) is installed in this environment, and jaxnorm "
        "brings a package of that import name too: the files of both are mixed in one folder. Keep them in two "
        "environments: pip uninstall interop jaxnorm, then pip install jaxnorm"
    )
