"""A file of n bytes is read, or refused, within 1 s + n / (20 MB/s) and 64 MB + 4 n of memory, whatever it says.

Time is the processor's, and four times what is promised: other work shares the machine.
"""

import datetime
import io
import json
import os
import pathlib
import pickle
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest
import torch

import interop
from interop import CheckpointError, load_checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import fuzz_structures

from interop.files import distributed
from interop.files.budget import Budget

pytestmark = pytest.mark.once


def archive(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", bytes(16))
    return stream.getvalue()


READER = """
import json, sys, time
import interop

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

for line in sys.stdin:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the largest memory is counted from now on
    before, start, said = memory("VmRSS"), time.process_time(), {}
    try:
        found = interop.load_checkpoint(line.strip())
        said["names"] = list(found)
    except interop.CheckpointError as error:
        said["error"] = str(error)
    said |= {"took": time.process_time() - start, "peak": memory("VmHWM") - before}
    found = None
    print(json.dumps(said), flush=True)
"""


@pytest.fixture(scope="module")
def reader():
    """A process that reads files, as users do: without the checks of every call that the tests have."""
    command = [sys.executable, "-c", READER]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(interop.__file__).parent.parent)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        torch.save({"w": torch.ones(1)}, (warm := pathlib.Path(tempfile.mkdtemp())) / "x.pth")
        read(process, warm / "x.pth")
        yield process
        process.stdin.close()


def read(process, path):
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def within_bounds(reader, path):
    """The names that are read, or the error's text; fails where that took too long or too much."""
    size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    said = read(reader, path)
    assert said["took"] < 4 * (1 + size / 20e6), said
    assert said["peak"] < (64 << 20) + 4 * size, said
    return said.get("error") or said["names"]


# what is shared


def shared_dicts(levels, width, names=0):
    value = torch.nn.BatchNorm1d(3).state_dict() | dict.fromkeys(map(str, range(names)), torch.ones(1))
    for level in range(levels):
        value = {f"n{level}_{i}": value for i in range(width)}
    return value


def shared_in(kind, beside=True):
    value = [1, 2]
    for _ in range(40):
        value = kind([value, value, value])
    return {"state_dict": {"w": torch.ones(2)}, "log": value} if beside else value


def shared_modules(name):
    module = torch.nn.Linear(1, 1)
    for _ in range(95):
        parent = torch.nn.Module()
        parent._modules[name] = module
        module = parent
    return module


SHARED = {
    "dicts in dicts": lambda: shared_dicts(3, 300),
    "dicts in dicts under a model's key": lambda: {"model": shared_dicts(3, 300)},
    "dicts with many names in dicts": lambda: shared_dicts(2, 300, 300),
    "dicts that may be averages of others": lambda: {f"raw_{i}": {f"w{i}": torch.ones(1)} for i in range(6000)},
    "dicts in the metadata": lambda: {"state_dict": {"w": torch.ones(2)}, "args": shared_dicts(60, 3)},
    "lists": lambda: shared_in(list),
    "tuples": lambda: shared_in(tuple),
    "tuples in sets": lambda: {"state_dict": {"w": torch.ones(2)}, "seen": [{("a", 1)}] * 1000},
    "one long name in 95 modules": lambda: shared_modules("c" * 1_000_000),
    "a prefix of 300000": lambda: {"module." * 300_000 + "w": torch.ones(2)},
    "a wrapper many times": lambda: {"_orig_mod." * 100_000 + "w": torch.ones(2)},
}


@pytest.mark.parametrize("kind", SHARED)
def test_shared_objects_end(reader, tmp_path, kind):
    sys.setrecursionlimit(10_000)
    torch.save(SHARED[kind](), tmp_path / "x.pth")
    found = within_bounds(reader, tmp_path / "x.pth")
    if kind == "a wrapper many times":
        assert isinstance(found, str) or found == ["w"]
    elif "metadata" in kind or kind in ("lists", "tuples", "tuples in sets"):
        assert found == ["w"]  # the weights are not worse for what is beside them
    else:
        assert isinstance(found, str)


def keys(levels, width, ending=b"K\x01s."):
    out = b"\x80\x02}(" + b"K\x01" * width + b"tq\x00"
    for level in range(1, levels):
        out += b"0(" + (b"h" + bytes([level - 1])) * width + b"tq" + bytes([level])
    return out + ending


def of_one_hash(key, count):
    return b"\x80\x02}(" + b"".join(key(i) + b"N" for i in range(1, count)) + b"u."


LONG = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
OPCODES = {
    "keys of tuples of tuples": keys(8, 64),
    "keys of tuples, in a set": keys(20, 3, b"0\x8f(h\x13\x90."),
    "keys of one hash": of_one_hash(lambda i: b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little"), 60_000),
    "keys of complex numbers of one hash": of_one_hash(
        lambda i: b"c__builtin__\ncomplex\n" + struct.pack(">cdcd", b"G", -1000003.0 * i, b"G", i) + b"\x86R", 10_000
    ),
    "long keys that are equal": b"\x80\x02}" + LONG + b"q\x00NsNN00" + LONG + b"q\x010" + b"h\x01Ns" * 200_000 + b".",
    "texts that are made bytes again and again": 
        b"\x80\x02" + LONG + b"q\x000(" + b"c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R" * 3000 + b"t.",
    "one path of a long text": 
        b"\x80\x02}(X\x01\0\0\0wNX\x01\0\0\0pcpathlib\nPosixPath\n(" + LONG + b"q\x00" + b"h\x00" * 3000 + b"tRu.",
    "opcodes that do nothing": b"\x80\x02" + b"N0" * 5_000_000 + b"N.",
    "empty sets": b"(" + b"\x8f" * 2_000_000 + b"t.",
    "numbers of the memo": b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i * 1000) for i in range(200_000)) + b".",
    "classes of long names": b"(" + b"X\xff\xff\0\0" + b"a" * 65535 + b"q\x00" + b"h\x00h\x00\x93" * 10_000 + b"t.",
}  # fmt: skip


@pytest.mark.parametrize("kind", OPCODES)
def test_opcodes_end(reader, tmp_path, kind):
    for name, content in (("x.pth", archive(OPCODES[kind])), ("x.pkl", OPCODES[kind])):
        if name == "x.pth" or content.startswith(b"\x80"):
            (tmp_path / name).write_bytes(content)
            assert isinstance(within_bounds(reader, tmp_path / name), str)


def test_a_header_ends(reader, tmp_path):
    tensor = b'"a%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for text in (
        b"{" + b",".join(tensor % i for i in range(200_000)) + b"}",
        b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(500_000)) + b"}}",
        b'{"a":[' + b"{}," * 500_000 + b"{}]}",
        '{{"a{}":1}}'.format("\N{GRINNING FACE}" * 500_000).encode(),
        b'{"a":' + b"[" * 100_000,
    ):
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        assert isinstance(within_bounds(reader, tmp_path / "x.safetensors"), str)


# folders of torch.distributed.checkpoint

DCP = "torch.distributed.checkpoint.metadata"


def folder(path, shapes, places=None, extra=None):
    """A folder of DCP. `shapes` has by name the whole and its parts (offsets, sizes); all parts of a shape are one."""
    stored, described, storage = b"", {}, {}
    at = {}
    make = fuzz_structures._As
    for name, (shape, parts) in shapes.items():
        chunks = []
        for low, size in parts:
            if size not in at:
                content = fuzz_structures._torch_bytes(size)
                at[size] = (len(stored), len(content))
                stored += content
            offset, length = at[size]
            chunks.append(make(DCP, "ChunkStorageMetadata", offsets=low, sizes=size))
            info = make(
                "torch.distributed.checkpoint.filesystem",
                "_StorageInfo",
                relative_path="x",
                offset=offset,
                length=length,
            )
            storage[make(DCP, "MetadataIndex", fqn=name, offset=low, index=None)] = info
        described[name] = make(DCP, "TensorStorageMetadata", size=shape, chunks=chunks)
    stream = io.BytesIO()
    metadata = make(
        DCP, "Metadata", state_dict_metadata=described | (extra or {}), storage_data=storage, planner_data=None
    )
    fuzz_structures._Pickler(stream, 2).dump(metadata)
    path.mkdir(exist_ok=True)
    (path / ".metadata").write_bytes(stream.getvalue())
    (path / "x").write_bytes(stored)
    return path


def test_parts_tile_or_do_not():
    """Against counting the parts at each place."""
    import random

    rng = random.Random(0)
    seen = set()
    for number in range(150):
        shape = tuple(
            rng.choice([1, 2, 3, 4, 0] if number % 5 == 0 else [1, 2, 3, 4]) for _ in range(rng.choice([1, 2, 3]))
        )
        parts = [(tuple(low), tuple(size)) for low, size in fuzz_structures._grid(rng, list(shape))]
        if number % 2 and len(parts) > 1:
            low, size = parts.pop(rng.randrange(len(parts)))
            parts.append((tuple(n + rng.choice([-1, 0, 0, 1]) for n in low), size))
            parts = [(tuple(max(n, 0) for n in low), size) for low, size in parts]
        count = np.zeros([2 * n + 2 for n in shape], int)
        for low, size in parts:
            count[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] += 1
        right = np.zeros_like(count)
        right[tuple(slice(0, n) for n in shape)] = 1
        expected = bool((count == right).all())
        assert distributed._tiles(shape, parts, Budget("x", 0)) == expected
        seen.add(expected)
    assert seen == {True, False}


def test_many_parts_end(reader, tmp_path):
    rows = [((i,), (1,)) for i in range(5000)]
    assert within_bounds(reader, folder(tmp_path / "a", {"w": ((5000,), rows)})) == ["w"]
    empty = [((0,), (0,))] * 3000
    within_bounds(reader, folder(tmp_path / "b", {f"w{i}": ((0,), empty) for i in range(3)}))
    names = {f"w{i}": ((1000,), [((0,), (1000,))]) for i in range(3000)}  # one place of the file
    assert len(within_bounds(reader, folder(tmp_path / "c", names))) == 3000
    endless: list = []
    for _ in range(30):
        endless = [endless, endless, endless]
    for extra in ({"x": endless}, {("a",): endless}):
        found = within_bounds(reader, folder(tmp_path / "d", {"w": ((1,), [((0,), (1,))])}, extra=extra))
        assert isinstance(found, str) and len(found) < 500


# what is no file


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def no_file(path):
    path.mkdir()


def plug(path):
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [pipe, device, no_file, plug])
def test_what_is_no_file_is_an_error_wherever_one_is_expected(tmp_path, make):
    """In a thread of its own no test could be ended that waits: pytest would wait as well, so an alarm ends it."""
    import signal

    def stop(*_):
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        saved = fuzz_structures._saved()
        for name in ("program.json", "model.safetensors"):
            place = tmp_path / f"artifact {name}"
            place.mkdir()
            for other, content in saved.items():
                (place / other).write_bytes(content) if other != name else make(place / other)
            with pytest.raises(CheckpointError, match="not a regular file"):
                interop.load(place)
        (tmp_path / "i").mkdir()
        (tmp_path / "i" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
        make(tmp_path / "i" / "y.safetensors")
        make(tmp_path / "z.safetensors.index.json")
        make(tmp_path / "z.pth")
        (tmp_path / "dcp").mkdir()
        make(tmp_path / "dcp" / ".metadata")
        parts = folder(tmp_path / "d", {"w": ((1,), [((0,), (1,))])})
        (parts / "x").unlink()
        make(parts / "x")
        for path in (
            "i",
            "i/x.safetensors.index.json",
            "z.safetensors.index.json",
            "z.pth",
            "dcp/.metadata",
            "d",
            "dcp",
        ):
            with pytest.raises(
                CheckpointError, match=r"not a regular file|without a checkpoint|link out of the folder"
            ):
                load_checkpoint(tmp_path / path)
            with pytest.raises(CheckpointError):
                interop.lint(tmp_path / path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# what is ordinary


def test_many_tensors_and_long_logs_are_read(reader, tmp_path):
    weights = {f"layer{i}.weight": torch.zeros(2) for i in range(40_000)}
    torch.save(weights, tmp_path / "x.pth")
    assert within_bounds(reader, tmp_path / "x.pth") == list(weights)
    interop.save_checkpoint(tmp_path / "x.safetensors", {name: np.zeros(64, "f4") for name in weights})
    assert sorted(within_bounds(reader, tmp_path / "x.safetensors")) == sorted(weights)
    log = [{"epoch": i, "loss": 0.5 * i, "lr": 0.1 * i} for i in range(200_000)]
    for kept in (log, list(range(1_000_000))):
        torch.save({"state_dict": {"w": torch.ones(1)}, "log": kept}, tmp_path / "x.pth")
        assert within_bounds(reader, tmp_path / "x.pth") == ["w"]


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


def function_of_the_user():
    """Its name is what a pickle has of it."""


UNKNOWN = {
    "generator": np.random.default_rng(0),
    "state": np.random.RandomState(3),
    "philox": np.random.Philox(1),
    "pattern": re.compile("a+"),
    "function": function_of_the_user,
    "method": datetime.datetime.now,
    "call": Evil(),
    "masked": np.ma.array([1.0, 2.0], mask=[True, False]),
    "objects": np.array([{}, None], dtype=object),
    "text": np.array(["a", "b"]),
    "when": np.datetime64("2024-01-01"),
    "numbers as keys": {np.int64(3): 1, 2.5: 2, (1, "a"): 3, frozenset({1}): 4, None: 5},
    "tensors as keys": {torch.ones(1): 1},
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1),
    "iterator": iter([1, 2]),
    "large": 2**3000,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_object_of_any_kind_beside_the_weights(tmp_path, name, capsys):
    weights = {"w": torch.arange(3.0)}
    torch.save({"state_dict": weights, "epoch": 3, "thing": [UNKNOWN[name]]}, tmp_path / "x.pth")
    found = load_checkpoint(tmp_path / "x.pth")
    assert found["w"].tolist() == [0, 1, 2] and found.metadata["epoch"] == 3
    shown = repr(found.metadata["thing"])
    if name in ("generator", "state", "philox", "pattern", "call", "masked", "iterator"):
        assert "not rebuilt" in shown or "not built" in shown
    from interop.cli import main

    for options in ([], ["--json"]):
        assert main(["inspect", str(tmp_path / "x.pth"), *options]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{\n") :])["metadata"]["epoch"] == 3


def test_a_weight_made_by_an_unknown_function_is_missed(tmp_path):
    torch.save({"w": torch.ones(1), "v": np.ma.array([1.0], mask=[True])}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"entry 'v' may be an array, but asks to call .*_mareconstruct"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2s_models_are_read(tmp_path, protocol):
    """fvcore/common/checkpoint.py and detectron2/checkpoint: pickle.dump of NumPy's arrays by names."""
    weights = {"backbone.conv1.weight": np.arange(6, dtype="f4").reshape(2, 3), "roi.bias": np.float64(2)}
    document = {"model": weights, "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(document, protocol))
    found = load_checkpoint(tmp_path / "R-50.pkl")
    assert found.format == "pickle" and set(found) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value)
    assert found.metadata["matching_heuristics"] is True and found.metadata["__author__"] == "someone"
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(document, protocol) + b"more")
    with pytest.raises(CheckpointError, match="no magic number, and is no single pickle as 4 bytes follow its end"):
        load_checkpoint(tmp_path / "R-50.pkl")
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"lr": 0.1}, protocol))
    with pytest.raises(CheckpointError, match="has no state dict"):
        load_checkpoint(tmp_path / "R-50.pkl")
