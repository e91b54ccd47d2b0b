"""A short run of benchmarks/fuzz_checkpoint.py: mutated files are read rightly or refused, never anything else."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import fuzz_checkpoint


@pytest.mark.parametrize("format", fuzz_checkpoint.FORMATS)
def test_mutated_files_are_read_rightly_or_refused(format):
    results = fuzz_checkpoint.run(format, 0, 60)
    assert results["failed"] == 0
    assert results["refused"] > 0


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

    def greedy(path):
        bytearray(5 * path.stat().st_size + fuzz_checkpoint.OBJECTS)
        return good(path)

    monkeypatch.setattr(fuzz_checkpoint.interop, "load_checkpoint", greedy)
    assert fuzz_checkpoint.check("safetensors", files, tmp_path, traced=True).startswith("allocated ")
