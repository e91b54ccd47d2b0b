"""A short run of benchmarks/fuzz_checkpoint.py: mutated and odd files are read rightly or refused."""

import pathlib
import random
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import fuzz_checkpoint
import fuzz_structures

pytestmark = pytest.mark.once


@pytest.mark.parametrize("format", fuzz_checkpoint.FORMATS)
def test_odd_files_are_read_rightly_or_refused(format, monkeypatch):
    monkeypatch.setattr(fuzz_checkpoint, "SLOWER", 20)  # every call is checked here
    results = fuzz_checkpoint.run(format, 0, 40)
    assert results["failed"] == 0
    assert results["refused"] > 0


@pytest.mark.parametrize("format", fuzz_checkpoint.seeds())
def test_the_files_that_are_mutated_are_read(format, tmp_path):
    assert fuzz_checkpoint.check(format, fuzz_checkpoint.seeds()[format], tmp_path) == "read"


def test_the_fuzzer_would_notice(monkeypatch, tmp_path):
    """A reader that crashes, that hangs, that takes much memory, or that gives a wrong array fails."""
    files = fuzz_checkpoint.seeds()["safetensors"]
    good = fuzz_checkpoint.interop.load_checkpoint
    assert fuzz_checkpoint.check("safetensors", files, tmp_path) == "read"
    monkeypatch.setattr(fuzz_checkpoint, "SECONDS", 0.2)

    def crash(path):
        raise IndexError

    def hang(path):
        while True:
            pass

    class Wrong(dict):
        metadata = {"which": ""}  # noqa: RUF012

    def wrong(path):
        return Wrong({name: array + 1 if name == "bn.running_var" else array for name, array in good(path).items()})

    for reader, expected in ((crash, "IndexError: "), (hang, "TimeoutError: "), (wrong, "a wrong array")):
        monkeypatch.setattr(fuzz_checkpoint.interop, "load_checkpoint", reader)
        assert fuzz_checkpoint.check("safetensors", files, tmp_path) == expected

    def slow(path):
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return good(path)

    odd = fuzz_structures.safetensors_file(random.Random(2))
    monkeypatch.setattr(fuzz_checkpoint.interop, "load_checkpoint", slow)
    monkeypatch.setattr(fuzz_checkpoint, "SECONDS", 5)
    assert not fuzz_checkpoint.check("json safetensors", odd, tmp_path).startswith("took")
    monkeypatch.setattr(fuzz_checkpoint, "SLOWER", 0.05)
    assert fuzz_checkpoint.check("json safetensors", odd, tmp_path).startswith("took")

    def greedy(path):
        bytearray(5 * path.stat().st_size + fuzz_checkpoint.OBJECTS)
        return good(path)

    monkeypatch.setattr(fuzz_checkpoint.interop, "load_checkpoint", greedy)
    assert fuzz_checkpoint.check("safetensors", files, tmp_path, traced=True).startswith("allocated ")
