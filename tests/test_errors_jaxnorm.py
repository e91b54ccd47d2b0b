"""The documented errors are the only ones that leave jaxnorm's public functions and interop's for optimizers."""

import os
import pathlib
import subprocess
import sys

import pytest

import jaxnorm

pytestmark = pytest.mark.once


def test_the_wrong_kind_of_everything_is_refused_by_name():
    """In a process without the suite's type checks, which would refuse it before the library does."""
    here = pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # one device
    command = [sys.executable, str(here / "wrong_arguments.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=here)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert int(result.stdout.split()[-4]) > 3000


def test_every_public_function_is_among_them():
    text = (pathlib.Path(__file__).parent / "wrong_arguments.py").read_text(encoding="utf-8")
    # Plain data, and packages.
    data = {"EmaState", "Moments", "Plan", "RestoredModel", "linen", "nnx"}
    assert [name for name in jaxnorm.__all__ if name not in data and f"jaxnorm.{name}" not in text] == []
