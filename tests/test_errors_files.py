"""Each public function that reads or writes files lets its documented errors out and no others, whatever it is given.

The calls are made in a process of their own (this file as a program): in the tests' own process every call is checked
against its annotations first, which users' calls are not.
"""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import torch

import interop
from interop import CheckpointError, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.once


def paths():
    """What is no path, what is nowhere, and what is there but no file, from a folder with a few of them."""
    return [
        None, 3, True, 1.5, b"x.pth", object(), [], {}, lambda: 0, "", " ", "\0", "a\0b.pth", "\ud800.pth", "~",
        "x" * 300, f"{'x' * 300}.pth", "x" * 243 + ".safetensors", "a/" * 3000 + "b.pth",
        "nowhere/x.pth", "file/x.pth", "loop", "loop/x.pth", "pipe.pth", "pipes", "broken", "closed", "closed/x.pth",
        "/dev/zero", "/dev/null", "/proc/self/mem", "/proc/self/maps", ".", "..", "empty", "hf_hub:", "hf_hub:a",
        pathlib.Path(""), "text.pth", "empty.pth", "half.pth", "half.safetensors", "y.safetensors.index.json", "dcp",
        "artifact", "half artifact", "x.pth",
    ]  # fmt: skip


def furnish(model):
    """The folder that `paths` is about, as the current one."""
    for name in ("file", "text.pth"):
        pathlib.Path(name).write_text("hello, this is no checkpoint")
    pathlib.Path("empty.pth").touch()
    for name in ("empty", "pipes", "dcp", "closed"):
        pathlib.Path(name).mkdir()
    for name in ("pipe.pth", "pipes/program.json", "pipes/.metadata"):
        os.mkfifo(name)
    pathlib.Path("loop").symlink_to("loop")
    pathlib.Path("broken").symlink_to("nowhere.pth")
    pathlib.Path("dcp/.metadata").write_bytes(b"\x80\x02}.")
    interop.save(model, "artifact")
    interop.save(model, "half artifact")
    for name in ("x.pth", "x.safetensors"):
        save_checkpoint(name, model)
        pathlib.Path(name.replace("x", "half")).write_bytes(pathlib.Path(name).read_bytes()[:-50])
    pathlib.Path("y.safetensors.index.json").write_text('{"weight_map": {"a": "pipe.pth", "b": "x.pth"}}')
    program = pathlib.Path("half artifact/program.json")
    program.write_bytes(program.read_bytes()[:-50])
    pathlib.Path("closed/x.pth").write_bytes(pathlib.Path("x.pth").read_bytes())
    pathlib.Path("closed").chmod(0)


def calls(model):
    """(what is called, with what, the call, the errors that it documents)."""
    refused = (CheckpointError, TypeError)
    arrays = {"a": np.ones(2)}
    for path in paths():
        yield "load_checkpoint", path, lambda path=path: load_checkpoint(path), refused
        yield "load", path, lambda path=path: interop.load(path), (*refused, NotImplementedError)
        yield "lint", path, lambda path=path: interop.lint(path), refused
        if not isinstance(path, str) or path.endswith((".pth", ".safetensors", "\0")):
            yield "save_checkpoint", path, lambda path=path: save_checkpoint(path, arrays), refused
        if not isinstance(path, str | pathlib.Path) or path in ("", "\0", "\ud800.pth", "x" * 300, "file", "loop"):
            yield "save", path, lambda path=path: interop.save(model, path), refused
    for which in (3, b"x", [], object(), {}, "", "nope"):
        yield "which", which, lambda which=which: load_checkpoint("x.pth", which), refused
    for rngs in ("x", 3, object()):
        yield "rngs", rngs, lambda rngs=rngs: interop.load("artifact", rngs), refused
    for target in (None, 3, "x", [], object(), torch.nn.Linear(1, 1)):
        yield "save", target, lambda target=target: interop.save(target, "other"), refused


def commands():
    """Command lines: each ends with 0, 1, or 2 and one line that says why."""
    for path in paths():
        if isinstance(path, str) and path not in (".", ".."):
            yield from (
                ["inspect", path],
                ["inspect", path, "--json"],
                ["diff", path, "x.pth"],
                ["export", path, "o.pth"],
            )
            yield from (["convert", path, "o.pth"], ["inspect", path, "--which", "ema"])


def main() -> int:
    """Makes all calls in an empty folder; prints and counts those that end in another way than documented."""
    from interop.cli import main as command

    os.chdir(tempfile.mkdtemp())
    if os.getuid() == 0:
        deny("closed")
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model = interop.from_torch(network, torch.zeros(2, 2))
    furnish(model)
    wrong = 0
    warnings.simplefilter("ignore")
    for name, given, call, documented in calls(model):
        try:
            call()
        except documented as error:
            if len(str(error)) < 8 or (
                isinstance(error, TypeError) and "expected" not in str(error) and name != "rngs"
            ):
                wrong += 1
                print(f"{name}({given!r:.60}): says only {error}")
        except Exception as error:
            wrong += 1
            print(f"{name}({given!r:.60}): {type(error).__name__}: {error!s:.200}")
    for arguments in commands():
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = command(arguments)
        unworded = ("TypeError", "KeyError", "AttributeError", "RecursionError", "OverflowError", "UnicodeEncodeError")
        lines = said.getvalue().splitlines()
        if status not in (0, 1, 2) or (status == 2 and (len(lines) != 1 or any(word in lines[0] for word in unworded))):
            wrong += 1
            print(f"{arguments[0]} {arguments[1]!r:.60}: {status} {said.getvalue():.200}")
    print(f"{wrong} are wrong")
    return min(wrong, 100)


def deny(folder):
    """Makes a folder one that may not be searched, also for root, who may search all."""
    real = {name: getattr(os, name) for name in ("stat", "open", "scandir")}

    def denied(name):
        def function(path, *args, **kwargs):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(f"{folder}/"):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            if name == "scandir" and os.fspath(path) == folder:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real[name](path, *args, **kwargs)

        return function

    for name in real:
        setattr(os, name, denied(name))


def test_only_documented_errors_leave_the_functions_that_read_and_write_files():
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(interop.__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 are wrong" in done.stdout


# what is written is read again, or is not written


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_writing_refuses_what_reading_would(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    masked = np.ma.array([1.0, 2.0], mask=[True, False])
    for target in ({}, {"a": masked}, {"a": np.array(["x"])}, {"a": np.array([None])}):
        with pytest.raises(
            CheckpointError, match=r"x\.\w+: (there are no arrays|entries (that are no arrays|of dtypes))"
        ):
            save_checkpoint(path, target)
        assert not path.exists()
    for dimensions in (0, 1, 33, 64):
        save_checkpoint(path, {"a": np.ones((1,) * dimensions)})
        assert load_checkpoint(path)["a"].shape == (1,) * dimensions
    for shape in ((0,), (0, 2**40), (2**40, 0)):
        save_checkpoint(path, {"a": np.zeros(shape, np.uint8)})
        assert load_checkpoint(path)["a"].shape == shape


@pytest.mark.parametrize(
    "number", [2**63, -(2**64), 2**2039 - 1, 2**2039, -(2**3000), 2**20_000], ids=lambda n: f"{n.bit_length()} bits"
)
def test_whole_numbers_are_read_at_any_size_and_written_where_torch_reads_them(tmp_path, number, capsys):
    torch.save({"state_dict": {"a": torch.ones(1)}, "number": number}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").metadata["number"] == number
    from interop.cli import main

    for options in ([], ["--json"]):
        assert main(["inspect", str(tmp_path / "x.pth"), *options]) == 0
    capsys.readouterr()
    if number.bit_length() < 2040:
        save_checkpoint(tmp_path / "x.pth", {"a": np.ones(1)}, {"number": number})
        assert torch.load(tmp_path / "x.pth", weights_only=True)["number"] == number
    else:
        with pytest.raises(CheckpointError, match=f"an integer of {number.bit_length()} bits"):
            save_checkpoint(tmp_path / "x.pth", {"a": np.ones(1)}, {"number": number})
    if number.bit_length() < 14_000:  # as long as Python writes numbers as text
        save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)}, {"number": number})
        assert load_checkpoint(tmp_path / "x.safetensors").metadata["number"] == str(number)
    else:
        with pytest.raises(CheckpointError, match="metadata 'number' cannot be written as text"):
            save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)}, {"number": number})


def test_masked_values_are_lost_nowhere():
    masked = np.ma.array([1.0, 2.0], mask=[True, False])
    with pytest.raises(TypeError, match="whose mask would be lost"):
        interop.to_torch({"a": [masked]})
    assert interop.to_torch(np.ma.array([1.0, 2.0])).tolist() == [1, 2]  # nothing is masked


if __name__ == "__main__":
    sys.exit(main())
