"""Packages that others import and that their models with BatchNorm do not use."""

import contextlib
import importlib
import sys
from unittest import mock


@contextlib.contextmanager
def stand_ins(*names):
    """Empty modules for those of `names` that cannot be imported here (wheels for GPUs, or for NumPy 1)."""
    added = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:
            sys.modules[name] = mock.MagicMock()
            added.append(name)
    yield
    for name in added:
        sys.modules.pop(name, None)
