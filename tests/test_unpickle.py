"""A pickle is read as a description: nothing in it runs, whatever it asks for."""

import builtins
import collections
import datetime
import io
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib

import numpy as np
import pytest
import torch

import interop
from interop import CheckpointError, load_checkpoint
from interop.files import budget
from interop.files.budget import Budget
from interop.files.rebuild import build, call
from interop.files.stand_ins import Global, Instance, UnpickleError
from interop.files.unpickle import unpickle

pytestmark = pytest.mark.once


def read(content: bytes) -> object:
    """The value and nothing left over."""
    value, end = unpickle(content, budget=Budget("x", len(content)), call=call, build=build)
    assert end == len(content)
    return value


class Plain:
    """An object with a `__dict__`, whose class the reader never sees."""


# what plain data mean


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_mean_what_pickle_says(protocol):
    shared = [1, 2]
    value = {
        "numbers": [0, 1, -1, 255, 65535, 2**31, -(2**40), 2**100, 1.5, float("inf"), True, False, None],
        "text": ["", "a", "ä€😀", "line\nbreak\\u", "x" * 300],
        "bytes": [b"", b"\x00\xff", b"x" * 300],
        "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {"a": {}}),
        "sets": [{1, 2}, frozenset({"a"})],
        "ordered": collections.OrderedDict(a=1),
        "shared": [shared, shared],
        (1, "key"): complex(1, 2),
    }
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert found["shared"][0] is found["shared"][1]


def test_a_value_may_contain_itself():
    loop: list[object] = []
    loop.append(loop)
    found = read(pickle.dumps(loop))
    assert found[0] is found


def test_objects_become_stand_ins():
    thing = Plain()
    thing.__dict__ |= {"a": 1, "self": thing}
    found = read(pickle.dumps([thing, Plain, datetime.date(2020, 1, 2), pathlib.PurePosixPath("a/b")]))
    assert isinstance(found[0], Instance) and found[0].cls == Global(__name__, "Plain")
    assert found[0].attributes["a"] == 1 and found[0].attributes["self"] is found[0]
    assert found[1] == Global(__name__, "Plain")
    assert str(found[2].cls) == "datetime.date" and isinstance(found[3], Instance)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_mean_what_numpy_says(protocol):
    for value in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), "f4")), np.zeros((0, 2), np.int8)):
        found, _ = unpickle(pickle.dumps(value, protocol), budget=Budget("x", 1000), call=call, build=build)
        found = getattr(found, "array", found)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


# what asks for more


class Reduce:
    """Pickled, it asks for `function(*args)`."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def malicious(path: str) -> dict[str, bytes]:
    """Pickles each of which, run by the `pickle` module, creates the file `path` (or ends the process)."""
    touch = f"open({path!r}, 'w').close()"
    shell = f"touch {path}"
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()  # noqa: E731
    at = lambda module, name: b"c" + f"{module}\n{name}\n".encode()  # noqa: E731
    return {
        "reduce os.system": pickle.dumps(Reduce(os.system, shell)),
        "reduce eval": pickle.dumps(Reduce(eval, touch)),
        "reduce exec": pickle.dumps(Reduce(exec, touch)),
        "reduce open": pickle.dumps(Reduce(open, path, "w")),
        "reduce Popen": pickle.dumps(Reduce(subprocess.Popen, ["touch", path])),
        "reduce __import__": pickle.dumps(Reduce(builtins.__import__, "antigravity")),
        "reduce getattr": b"\x80\x02" + at("builtins", "getattr") + at("os", "path") + text("x") + b"\x86R"
        + text(shell) + b"\x85R.",
        "reduce map": pickle.dumps(Reduce(list, Reduce(map, os.system, [shell]))),
        "reduce partial": b"\x80\x02" + at("functools", "partial") + at("os", "system") + text(shell) + b"\x86R)R.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(shell) + b"\x85R.",
        "stack global with dots": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(shell) + b"\x85R.",
        "global posix": b"cposix\nsystem\n" + text(shell) + b"\x85R.",
        "inst": b"(" + text(shell) + b"ios\nsystem\n.",
        "obj": b"(" + at("os", "system") + text(shell) + b"o.",
        "newobj": b"\x80\x02" + at("os", "system") + text(shell) + b"\x85\x81.",
        "newobj_ex": b"\x80\x04" + at("subprocess", "Popen") + text(shell) + b"\x85}" + text("shell") + b"\x88s\x92.",
        "build setstate": b"\x80\x02" + at("os", "system") + b")\x81}" + text("__setstate__")
        + at("os", "system") + b"sb" + text(shell) + b"b.",
        "build attributes": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + at("os", "system") + b"sb.",
        "memo": b"\x80\x02" + at("os", "system") + b"q\x00" + text(shell) + b"\x85q\x01" + b"00h\x00h\x01R.",
        "memo swap": b"\x80\x02" + at("collections", "OrderedDict") + b"q\x00" + at("os", "system")
        + b"q\x000" + b"h\x00" + text(shell) + b"\x85R.",
        "nested": pickle.dumps(Reduce(pickle.loads, pickle.dumps(Reduce(os.system, shell)))),
        "nested storage": pickle.dumps(Reduce(torch.storage._load_from_bytes, pickle.dumps(Reduce(os.system, shell)))),
        "rebuild of a function": b"\x80\x02" + at("torch._tensor", "_rebuild_from_type_v2") + b"(" + at("os", "system")
        + at("torch", "Tensor") + text(shell) + b"\x85}tR.",
        "dict key": b"\x80\x02}" + at("os", "system") + text(shell) + b"\x85RK\x01s.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02(" + text("module") + at("os", "system") + text(shell) + text("x") + b"tQ"
        + text(shell) + b"\x85R.",
        "factory": b"\x80\x02ccollections\ndefaultdict\n" + at("os", "system") + b"\x85R" + text(shell) + b"K\x01s.",
        "codecs": b"\x80\x02c_codecs\nencode\n" + text(shell) + text("zlib_codec") + b"\x86R.",
        "numpy object array": pickle.dumps(np.array([Reduce(os.system, shell)], dtype=object)),
        "after stop": b"\x80\x02N." + pickle.dumps(Reduce(os.system, shell)),
        "pip": b"\x80\x02" + at("pip", "main") + b"]" + text("--version") + b"a\x85R.",
        "webbrowser": b"\x80\x02" + at("webbrowser", "open") + text("file://x") + b"\x85R.",
        "timeit": b"\x80\x02" + at("timeit", "timeit") + text(touch) + b"\x85R.",
        "runpy": b"\x80\x02" + at("runpy", "_run_code") + text(touch) + b"}\x86R.",
    }  # fmt: skip


def archive(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return stream.getvalue()


def legacy(pickled: bytes) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(value, 2) for value in head) + pickled + pickle.dumps([], 2)


@pytest.fixture
def sentinel(tmp_path):
    """A path that must not exist at the end."""
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists()


WRAPS = {"zip": archive, "legacy": legacy, "bare": bytes}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", malicious(""))
def test_a_malicious_pickle_executes_nothing(tmp_path, sentinel, name, wrap):
    (tmp_path / "x.pth").write_bytes(WRAPS[wrap](malicious(str(sentinel))[name]))
    with pytest.raises(CheckpointError, match=r"x\.pth: "):
        load_checkpoint(tmp_path / "x.pth")


def test_the_interpreter_sees_no_execution_and_no_import(tmp_path, sentinel):
    """All malicious files again, under Python's own audit hook, which sees what C code does too."""
    for name, content in malicious(str(sentinel)).items():
        for wrap, function in WRAPS.items():
            (tmp_path / f"{wrap} {name.replace('/', ' ')}.pth").write_bytes(function(content))
    torch.save({"a": torch.ones(1)}, tmp_path / "good.pth")
    code = """
        import pathlib, sys, interop
        folder = pathlib.Path(sys.argv[1])
        interop.load_checkpoint(folder / "good.pth")
        files = sorted(folder.glob("* *.pth"))
        seen, watching = [], True
        def hook(event, args):
            if watching and event != "open" or event == "open" and watching and not str(args[0]).endswith(".pth"):
                seen.append((event, str(args)[:80]))
        sys.addaudithook(hook)
        for file in files:
            try:
                interop.load_checkpoint(file)
            except interop.CheckpointError:
                pass
        watching = False
        # mapping the file is all that the reader asks of the system (and the number of an object of its own)
        events = {event for event, _ in seen} - {"mmap.__new__", "builtins.id"}
        print(len(files), sorted(events), seen[:3] if len(seen) < 9 else "")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(interop.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split(" ", 1)[1].strip() == "[]", done.stdout
    assert int(done.stdout.split()[0]) == 3 * len(malicious(""))


def test_the_malicious_pickles_would_execute(tmp_path):
    """The sentinel can be tripped: what the reader refuses, the `pickle` module runs."""
    for name in ("reduce os.system", "inst", "memo swap", "stack global with dots", "reduce exec"):
        path = tmp_path / name.replace(" ", "_")
        pickle.loads(malicious(str(path))[name])
        assert path.exists(), name


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("reduce os.system", "posix.system"),
        ("reduce eval", "builtins.eval"),
        ("reduce partial", "functools.partial"),
        ("nested", "_pickle.loads"),
        ("timeit", "timeit.timeit"),
    ],
)
def test_the_stand_in_names_what_was_asked_for(name, asked):
    assert repr(read(malicious("x")[name])) == f"<what {asked}() would make, not rebuilt>"


def test_a_known_call_with_what_it_cannot_have_is_an_error():
    with pytest.raises(UnpickleError, match="zlib_codec"):
        read(malicious("x")["codecs"])


def test_an_object_beside_the_weights_does_no_harm(tmp_path, sentinel):
    """A class gives a stand-in wherever it stands; the weights are read and the stand-in is seen in the metadata."""
    saved = {"model": {"a": torch.ones(2)}, "process": Reduce(subprocess.Popen, ["touch", str(sentinel)])}
    torch.save(saved, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert checkpoint["a"].tolist() == [1, 1]
    assert repr(checkpoint.metadata["process"]) == "<subprocess.Popen object, not built>"
    torch.save({"model": {"a": torch.ones(2), "b": Reduce(os.system, "true")}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: entry 'b' .*asks to call the function posix\.system"):
        load_checkpoint(tmp_path / "x.pth")  # it may be a weight, which nobody would miss


def test_no_torch_function_is_called_either(tmp_path, monkeypatch):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pth")

    def never(*args, **kwargs):
        raise AssertionError("called")

    for name in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"):
        monkeypatch.setattr(torch._utils, name, never)
    assert load_checkpoint(tmp_path / "x.pth")["a"].tolist() == [1, 1]


# what is broken or too much


@pytest.mark.parametrize(
    "content",
    [
        b"", b".", b"\x80", b"\x80\x09.", b"0.", b"1.", b"(.",
        b"NN.", b"a.", b"e.", b"s.", b"u.", b"t.", b"\x85.", b"\x86.",
        b"N\x87.", b"h\x00.", b"j\x00\x00\x00\x00.", b"gx\n.", b"R.",
        b"b.", b"Na.", b"(Ne.", b"}(Nu.", b"]NNs.", b"\x8f(]\x90.",
        b"X\xff\xff\xff\xffa.", b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.",
        b"\x8b\xff\xff\xff\x7fa.", b"\x8b\xff\xff\xff\xffa.",
        b"T\xff\xff\xff\xffa.", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"Iabc\n.", b"F1.2.3\n.", b"L" + b"9" * 5000 + b"\n.",
        b"Sabc\n.", b"S'\\x\n.", b"X\x01\x00\x00\x00\xff.", b"c\n", b"cos\n",
        b"\x97.", b"\x98.", b"\xff.", b"K\x01)R.", b"PK\n.",
        b"}]K\x01s.", b"}}K\x01s.",
        b"(Nd.", b"ccollections\nOrderedDict\nNR.", b"ccollections\nOrderedDict\nK\x05\x85R.",
        b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", b"c__builtin__\nset\nK\x01\x85R.", b"cnumpy\ndtype\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
    ],
)  # fmt: skip
def test_a_broken_pickle_is_an_error(content):
    with pytest.raises(UnpickleError):
        read(content)


def test_nesting_does_not_exhaust_the_stack(tmp_path):
    deep = 3000  # C code follows some thousand levels, and not a million: the reader goes by rule, not by luck
    for content in (b"N" + b"\x85" * deep + b".", b"]" * deep + b"a" * (deep - 1) + b"."):
        read(content)
        (tmp_path / "x.pth").write_bytes(archive(content))
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(UnpickleError, match="as a key"):  # its hash would overflow the C stack
        read(b"}N" + b"\x85" * deep + b"K\x01s.")
    with pytest.raises(CheckpointError, match="nested more deeply"):
        inner = b"]" * 500 + b"a" * 499
        model = pickle.dumps({"a": np.ones(1)}, 2)[2:-1]
        (tmp_path / "x.pth").write_bytes(
            archive(b"\x80\x02}(X\x05\x00\x00\x00model" + model + b"X\x01\x00\x00\x00x" + inner + b"u.")
        )
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("unit", [b"\x8f", b"}", b"]", b"(d"], ids=["sets", "dicts", "lists", "marked dicts"])
def test_a_pickle_cannot_make_much_more_than_it_is(unit):
    little = Budget("x", 0)
    little.memory = 1 << 20
    with pytest.raises(CheckpointError, match="makes more objects than its size allows"):
        unpickle(b"(" + unit * 20_000 + b"t.", budget=little)


def test_copies_of_what_was_kept_count_too():
    copies = b"ctorch\nSize\nh\x00\x85R" * 200
    with pytest.raises(CheckpointError, match="makes more objects"):
        read(b"(" + b"N" * 10_000 + b"lq\x00(" + copies + b"t0.")


def test_modules_that_contain_themselves_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "MEMORY", 1 << 20)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model._modules["again"] = model
    torch.save(model, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="modules without end"):
        load_checkpoint(tmp_path / "x.pth")
    level = torch.nn.Linear(1, 1)
    for _ in range(60):  # 2^60 names
        level = torch.nn.Sequential(level, level)
    torch.save(level, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="makes more objects than its size allows"):
        load_checkpoint(tmp_path / "x.pth")


# tensors that lie


def tensor_file(
    key="0", offset=0, size=(2,), stride=(1,), numel=4, storage="FloatStorage", content=b"\0" * 16, flags=None
) -> bytes:
    """A file with one tensor, described as asked."""
    name = lambda module, name: Global(module, name)  # noqa: E731
    stream = io.BytesIO()

    def save(value):
        if isinstance(value, Global):
            stream.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, tuple):
            stream.write(b"(")
            for item in value:
                save(item)
            stream.write(b"t")
        else:
            stream.write(pickle.dumps(value, 2)[2:-1])

    stream.write(b"\x80\x02}X\x01\x00\x00\x00a")
    save(name("torch._utils", "_rebuild_tensor_v2"))
    stream.write(b"(")
    save(("storage", name("torch", storage), key, "cpu", numel))
    stream.write(b"Q")
    for value in (offset, size, stride, False, {}, *(() if flags is None else (flags,))):
        save(value)
    stream.write(b"tRs.")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/data.pkl", stream.getvalue())
        zipped.writestr("archive/data/0", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (5,)}, r"entry 'a': shape \(5,\) .* needs 20 bytes, its storage .* has 16"),
        ({"offset": 3}, "entry 'a': .*needs 20 bytes"),
        ({"stride": (4,)}, "entry 'a': .*needs 20 bytes"),
        ({"size": (-1,)}, "entry 'a': .* are no sizes"),
        ({"offset": -1}, "entry 'a': .* are no sizes"),
        ({"stride": (-1,)}, "entry 'a': .* are no sizes"),
        ({"stride": (1.0,)}, "entry 'a': .* are no sizes"),
        ({"stride": ()}, "entry 'a': 1 sizes with 0 strides"),
        ({"size": (2**61,), "stride": (0,)}, "entry 'a': .* is larger than an array can be"),
        ({"size": (2**40,), "stride": (0,)}, "entry 'a': .* repeats 16 bytes to"),
        ({"size": (0, 2**61), "stride": (1, 1)}, "entry 'a': .* is larger than an array can be"),
        ({"size": (1,) * 70, "stride": (1,) * 70}, "entry 'a': 70 sizes"),
        ({"numel": 5}, "expects 5 x float32 of storage"),
        ({"numel": -1}, "without class, key and size"),
        ({"key": "1"}, "storage '1', which is not in the archive"),
        ({"key": "../data/0"}, "which is no key"),
        ({"key": 7}, "without class, key and size"),
        ({"storage": "QInt8Storage"}, "entry 'a' is no array"),
        (
            {"storage": "BoolStorage", "flags": {"neg": True}},
            "entry 'a': it is marked as negated, which bool cannot be",
        ),
        ({"flags": {"conj": True}}, "entry 'a': it is marked as conjugated, which float32 cannot be"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage(tmp_path, change, message):
    (tmp_path / "x.pth").write_bytes(tensor_file())
    assert load_checkpoint(tmp_path / "x.pth")["a"].tolist() == [0, 0]
    (tmp_path / "x.pth").write_bytes(tensor_file(**change))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pth")


# zip tricks


def test_zip_tricks_are_errors(tmp_path):
    good = tensor_file()
    end = good.rindex(b"PK\5\6")
    central = good.index(b"PK\1\2")
    second = good.index(b"PK\1\2", central + 1)
    record = good.index(b"PK\3\4", 1)

    def patched(position: int, content: bytes) -> bytes:
        return good[:position] + content + good[position + len(content) :]

    lies = io.BytesIO()
    with zipfile.ZipFile(lies, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + b"." * 100)
    lying = bytearray(lies.getvalue())
    for start, at in ((lying.rindex(b"PK\1\2"), 24), (0, 22)):  # declares one byte
        lying[start + at : start + at + 4] = struct.pack("<I", 1)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * 100_000_000)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data.pkl", b"\x80\x02].")
    tricks = {
        "takes more memory than is read": bomb.getvalue(),
        "does not unpack to what is announced": bytes(lying),
        "appears twice": twice.getvalue(),
        "overlap": patched(central + 20, struct.pack("<2I", 300, 300)),
        "is encrypted": patched(central + 8, b"\1\0"),
        "is packed with method 99": patched(central + 10, struct.pack("<H", 99)),
        "has another name in its own header": patched(record + 30, b"brchive"),
        "is described in two ways": patched(record + 8, struct.pack("<H", 8)),
        "several parts": patched(end + 4, b"\1\0"),
        "is not where it should be": patched(end + 8, struct.pack("<2H", 9, 9)),
        "name is not UTF-8": patched(central + 46, b"\xff"),
        "checksum does not match": patched(second + 16, b"\1\2\3\4"),
        "lies outside of it": patched(second + 42, struct.pack("<I", 2**31)),
        "not one of torch.save: 0 entries data.pkl": archive(b"N.").replace(b"data.pkl", b"data.pkx"),
    }  # fmt: skip
    for message, content in tricks.items():
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / "x.pth")
        assert "x.pth" in str(caught.value)
        assert message in str(caught.value)


def test_members_that_share_bytes_are_an_error(tmp_path):
    """Two names for one region: a quine-like bomb, or a weight that is read as code elsewhere."""
    good = tensor_file(content=b"\0" * 16)
    directory = good[good.index(b"PK\1\2") : good.rindex(b"PK\5\6")]
    first = good[good.index(b"PK\1\2") : good.index(b"PK\1\2", good.index(b"PK\1\2") + 1)]
    body = good[: good.index(b"PK\1\2")]
    forged = first.replace(b"data.pkl", b"data.pkm")
    content = body + directory + forged
    size = len(directory) + len(forged)
    content += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, size, len(body), 0)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"overlap|another name"):
        load_checkpoint(tmp_path / "x.pth")


def test_every_opcode_is_known_or_refused():
    """No opcode of any protocol is met by accident."""
    for opcode in pickletools.opcodes:
        with pytest.raises(UnpickleError):
            read(opcode.code.encode("latin-1"))
    assert zlib.crc32(b"") == 0 and interop.CheckpointError is CheckpointError


def test_one_storage_as_two_dtypes_is_an_error(tmp_path):
    """torch.save never writes it, and torch.load would give the second tensor the first one's dtype."""
    torch.save({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000"))
    with pytest.raises(CheckpointError, match="has storage 'x/data/0' as float32 and as int32"):
        load_checkpoint(tmp_path / "y.pth")
