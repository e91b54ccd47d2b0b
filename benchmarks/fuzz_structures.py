"""Files that are well-formed and say odd things: what `fuzz_checkpoint.py` draws beside its mutations.

Each function draws the files of a checkpoint from a random generator: pickles by the grammar of their opcodes, with
objects that are shared through the memo, tall towers of them too; JSON with values of other types; parts of DCP that
tile their tensor, or say so; programs whose digest is right although they were changed.
"""

import functools
import hashlib
import io
import json
import pathlib
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import torch

import interop
from interop.program.encoding import decode, encode

Files = dict[str, bytes]
_NAMES = [
    "a",
    "weight",
    "module.weight",
    "bn.running_var",
    "state_dict",
    "model",
    "model_ema",
    "optimizer",
    "",
    "x" * 300,
]
_SIZES = [0, 1, 2, 3, 4, 7, 64, 2**31, 2**62, 2**63, -1]
_CLASSES = [
    tuple(name.rsplit(".", 1))
    for name in [
        "collections.OrderedDict",
        "argparse.Namespace",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.batchnorm.BatchNorm1d",
        "pathlib.PosixPath",
        "datetime.datetime",
        "torch.device",
        "torch.Size",
        "__main__.Thing",
    ]
]
_FUNCTIONS = [
    tuple(name.rsplit(".", 1))
    for name in [
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._tensor._rebuild_from_type_v2",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "numpy.dtype",
        "collections.defaultdict",
        "collections.Counter",
        "builtins.set",
        "builtins.dict",
        "builtins.complex",
        "builtins.getattr",
        "_codecs.encode",
        "copyreg._reconstructor",
        "re._compile",
        "os.system",
    ]
]


class Pickle:
    """Writes a pickle that pushes one value after the other; what was pushed may come again."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.kept = 0
        self.keys: dict[str, None] = {}  # of the storages, in order

    def keep(self) -> bytes:
        """Remembers the value on the stack."""
        self.kept += 1
        return pickle.LONG_BINPUT + struct.pack("<I", self.kept - 1)

    def again(self) -> bytes:
        """A value that was remembered, or None."""
        if not self.kept:
            return pickle.NONE
        return pickle.LONG_BINGET + struct.pack("<I", self.rng.randrange(self.kept))

    def text(self, text: str) -> bytes:
        content = text.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(content)) + content

    def number(self, value: int) -> bytes:
        content = pickle.encode_long(value)
        return pickle.LONG4 + struct.pack("<i", len(content)) + content

    def name(self, module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def atom(self) -> bytes:
        rng = self.rng
        match rng.randrange(8):
            case 0:
                return rng.choice([pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE])
            case 1:
                return self.number(rng.choice([*_SIZES, 2**3000, -(2**64), (2**61 - 1) * rng.randrange(100)]))
            case 2:
                return pickle.BINFLOAT + struct.pack(">d", rng.choice([0.0, 1.5, float("nan"), float("inf"), 2.0**61]))
            case 3:
                return pickle.SHORT_BINBYTES + b"\4" + rng.randbytes(4)
            case 4:
                return self.name(*rng.choice(_CLASSES + _FUNCTIONS + [("torch", "float32"), ("torch", "FloatStorage")]))
            case _:
                return self.text(rng.choice(_NAMES))

    def items(self, levels: int, pairs: bool) -> bytes:
        rng = self.rng
        out = b""
        for _ in range(rng.randrange(5)):
            if pairs:
                out += self.text(rng.choice(_NAMES)) if rng.random() < 0.8 else self.value(levels - 1)
            out += self.value(levels - 1)
        return out

    def tensor(self, right: bool = False) -> bytes:
        """A tensor, rightly described more often than not."""
        rng, honest = self.rng, right
        right = right or rng.random() < 0.9
        size = lambda: rng.choice(_SIZES) if not right else rng.randrange(3)  # noqa: E731
        rank = rng.choice([0, 1, 1, 2] if right else [1, 2, 65])
        axes = [self.number(size()) for _ in range(rank)]
        strides = [self.number(1 if right else size()) for _ in range(rank)]
        storage = (
            b"("
            + self.text("storage")
            + self.name(
                "torch", "FloatStorage" if right else rng.choice(["FloatStorage", "BoolStorage", "QInt8Storage"])
            )
        )
        self.keys[key := rng.choice("0001")] = None
        storage += self.text(key) + self.text("cpu") + self.number(4 if right else size()) + b"tQ"
        flags = (
            b"}"
            if honest or rng.random() < 0.95
            else b"}" + self.text(rng.choice(["neg", "conj"])) + pickle.NEWTRUE + b"s"
        )
        out = self.name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + self.number(size() if not right else 0)
        return out + b"(" + b"".join(axes) + b"t(" + b"".join(strides) + b"t" + pickle.NEWFALSE + b"}" + flags + b"tR"

    def module(self, levels: int) -> bytes:
        """A pickled module, whose children may be shared."""
        rng = self.rng
        out = self.name("torch.nn.modules.container", "Sequential") + b")\x81}("
        for field, inner in (
            ("_parameters", self.tensor),
            ("_buffers", self.tensor),
            ("_modules", lambda: self.module(levels - 1)),
        ):
            out += self.text(field) + b"}("
            for index in range(rng.randrange(3) if levels > 0 else 0):
                out += self.text(str(index)) + (self.again() if rng.random() < 0.3 else inner()) + self.keep()
            out += b"u"
        return out + self.text("_non_persistent_buffers_set") + b"]ub"

    def tower(self) -> bytes:
        """Containers that hold one another many times: a few hundred bytes for any number of ways through them."""
        rng = self.rng
        kind, width, levels = rng.choice("dltmf"), rng.choice([2, 8, 64, 300]), rng.choice([2, 3, 8, 30])
        out = (
            rng.choice([self.tensor, self.atom, lambda: b"}(" + self.text("w") + self.tensor() + b"u"])() + self.keep()
        )
        for _ in range(levels):
            last = pickle.LONG_BINGET + struct.pack("<I", self.kept - 1)
            match kind:
                case "d":
                    out += b"0}(" + b"".join(self.text(f"n{i}") + last for i in range(width)) + b"u"
                case "l":
                    out += b"0](" + last * width + b"e"
                case "t":
                    out += b"0(" + last * width + b"t"
                case "f":
                    out += b"0(" + last * width + b"\x91" if self.rng.random() < 0.1 else b"0(" + last * 3 + b"t"
                case "m":
                    children = b"".join(self.text("c" * rng.choice([1, 5000]) + str(i)) + last for i in range(width))
                    out += (
                        b"0"
                        + self.name("torch.nn", "M")
                        + b")\x81}("
                        + self.text("_parameters")
                        + b"}"
                        + self.text("_buffers")
                    )
                    out += b"}" + self.text("_modules") + b"}(" + children + b"uub"
            out += self.keep()
        return out

    def value(self, levels: int) -> bytes:
        """One value."""
        rng = self.rng
        if levels <= 0:
            return self.atom() if rng.random() < 0.7 else self.tensor()
        match rng.randrange(14):
            case 0 | 1:
                return self.again()
            case 2 | 3 | 4:
                return b"}(" + self.items(levels, True) + b"u" + self.keep()
            case 5:
                return b"](" + self.items(levels, False) + b"e" + self.keep()
            case 6:
                return b"(" + self.items(levels, False) + b"t" + self.keep()
            case 7:
                return self.tower() if rng.random() < 0.3 else self.tensor() + self.keep()
            case 8 | 9:
                made = (
                    self.name(*rng.choice(_CLASSES + _FUNCTIONS))
                    + b"("
                    + self.items(levels, False)
                    + b"tR"
                    + self.keep()
                )
                return made + (self.value(levels - 1) + b"b" if rng.random() < 0.3 else b"")
            case 10:
                return self.module(min(levels, 3))
            case 11:
                return b"\x8f(" + self.items(levels, False) + b"\x90" + self.keep()
            case 12:
                return self.tensor()
        return self.atom()

    def checkpoint(self) -> bytes:
        """The whole: a training checkpoint of odd things."""
        out = b"\x80\x02}("
        if self.rng.random() < 0.8:
            weights = (self.text(name) + self.tensor(right=True) for name in ("w", "bn.running_mean", "bn.running_var"))
            out += self.text("state_dict") + b"}(" + b"".join(weights) + b"u"
        for _ in range(self.rng.randrange(1, 6)):
            out += self.text(self.rng.choice(_NAMES)) + self.value(self.rng.randrange(1, 5))
        return out + b"u."


def zipped(rng: random.Random) -> Files:
    """A zip archive of torch.save."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as file:
        file.writestr("x/data.pkl", Pickle(rng).checkpoint())
        file.writestr("x/byteorder", rng.choice(["little"] * 5 + ["big"]))
        file.writestr("x/data/0", bytes(16))
        file.writestr("x/data/1", bytes(rng.choice([0, 16, 16, 16, 100_000])))
    return {"x.pth": stream.getvalue()}


def legacy(rng: random.Random) -> Files:
    """A file of torch.save before 1.6, or of pickle.dump alone."""
    written = Pickle(rng)
    content = written.checkpoint()
    if rng.random() < 0.3:
        return {"x.pkl": content}
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    keys = list(written.keys) if rng.random() < 0.9 else rng.choice([["0"], ["0", "1"], ["1", "0"], []])
    storages = b"".join(struct.pack("<q", 4) + bytes(16) for _ in keys)
    return {"x.pth": b"".join(pickle.dumps(value, 2) for value in head) + content + pickle.dumps(keys, 2) + storages}


def swapped(value: Any, rng: random.Random) -> Any:
    """JSON with one to three values replaced by those of other types, left out, or put elsewhere too."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        todo = [value]
        while todo:
            node = todo.pop()
            inside = (
                list(node.items())
                if isinstance(node, dict)
                else list(enumerate(node))
                if isinstance(node, list)
                else []
            )
            places += [(node, key) for key, _ in inside]
            todo += [item for _, item in inside]
        if not places:
            return value
        node, key = rng.choice(places)
        inner = rng.choice(places)
        other = inner[0][inner[1]]
        match rng.randrange(5):
            case 0 | 1:
                node[key] = rng.choice(
                    [
                        None,
                        True,
                        0,
                        -1,
                        1.5,
                        1e300,
                        2**62,
                        2**63,
                        10**400,
                        "",
                        "a",
                        "\ud800",
                        "x" * 300,
                        [],
                        {},
                        [[]],
                        {"a": {}},
                        [0, 4],
                    ]
                )
            case 2:
                del node[key]
            case 3:
                node[key] = json.loads(json.dumps(other))
            case 4 if isinstance(node, dict):
                node[rng.choice(["a", "$Value", "$map", "__metadata__", "x" * 300, ""])] = node.pop(key)
    return value


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def safetensors_file(rng: random.Random) -> Files:
    """A safetensors file whose header has other types in places, or more tensors than bytes."""
    header: Any = {"__metadata__": {"format": "pt", "best": "a.weight"}}
    end = 0
    for index in range(rng.choice([1, 3, 50])):
        shape = rng.choice([[4], [2, 2], [], [0, 5], [0, 2**40], [1] * rng.choice([33, 64, 65])])
        size = 4 * int(np.prod(shape, dtype=object)) if shape else 4
        header[rng.choice(["a.weight", f"layer{index}.weight"])] = {
            "dtype": "F32", "shape": shape, "data_offsets": [end, end := end + size]
        }  # fmt: skip
    if rng.random() < 0.7:
        header = swapped(header, rng)
    text = _text(header)
    return {"x.safetensors": len(text).to_bytes(8, "little") + text + bytes(end)}


def index(rng: random.Random) -> Files:
    """An index and its files."""
    groups = {
        f"x-{i}.safetensors": {f"l{i}.{j}.weight": np.zeros(2, "f4") for j in range(rng.randrange(4))} for i in range(2)
    }
    document: Any = {
        "metadata": {"total_size": 1},
        "weight_map": {n: file for file, group in groups.items() for n in group},
    }
    text = _text(swapped(document, rng) if rng.random() < 0.8 else document)
    return {"x.safetensors.index.json": text, **{file: safetensors.numpy.save(group) for file, group in groups.items()}}


class _As:
    """Pickled, an object of another class with this state."""

    def __init__(self, module: str, name: str, **state: Any) -> None:
        self.where, self.state = (module, name), state


class _Pickler(pickle._Pickler):
    """Writes `_As` by the names that it has."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_as(self, value: _As) -> None:
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*value.where).encode() + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.memoize(value)
        self.save(value.state)
        self.write(pickle.BUILD)

    dispatch[_As] = save_as


_DCP = "torch.distributed.checkpoint.metadata"


def _grid(rng: random.Random, shape: list[int], low: list[int] | None = None) -> list[tuple[list[int], list[int]]]:
    """Parts that tile a shape, by cutting again and again."""
    low = low or [0] * len(shape)
    wide = [axis for axis, n in enumerate(shape) if n > 1]
    if not wide or rng.random() < 0.3:
        return [(low, shape)]
    axis = rng.choice(wide)
    cut = rng.randrange(1, shape[axis])
    first, second = list(shape), list(shape)
    first[axis], second[axis] = cut, shape[axis] - cut
    place = list(low)
    place[axis] += cut
    return _grid(rng, first, low) + _grid(rng, second, place)


@functools.cache
def _torch_bytes(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    torch.save(torch.zeros(shape), stream)
    return stream.getvalue()


def distributed(rng: random.Random) -> Files:
    """A folder of DCP: parts that tile their tensor, or that overlap, leave holes, or lie at one place of the file."""
    data = b""
    described: dict[Any, Any] = {}
    storage: dict[Any, Any] = {}
    for number in range(rng.randrange(1, 4)):
        name = rng.choice([f"model.l{number}.weight", "a", "x" * 300])
        shape = [rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.choice([0, 1, 2, 3]))]
        parts = _grid(rng, shape)
        if rng.random() < 0.5:
            match rng.randrange(4):
                case 0:
                    parts = parts + [rng.choice(parts)] * rng.choice([1, 300])
                case 1:
                    parts = parts[:-1]
                case 2 if shape:
                    shape = [n + rng.randrange(2) for n in shape]
                case 3:
                    parts = [([n + rng.randrange(2) for n in low], size) for low, size in parts]
        chunks = []
        for low, size in parts:
            content = _torch_bytes(tuple(size))
            at = {"relative_path": "x.distcp", "offset": len(data), "length": len(content)}
            if rng.random() < 0.05:
                at[rng.choice(sorted(at))] = rng.choice([0, -1, 2**40, "y", "../x", None])
            if rng.random() < 0.9:
                data += content
            chunks.append(_As(_DCP, "ChunkStorageMetadata", offsets=tuple(low), sizes=tuple(size)))
            key = _As(_DCP, "MetadataIndex", fqn=name, offset=tuple(low), index=None)
            storage[key] = _As("torch.distributed.checkpoint.filesystem", "_StorageInfo", **at)
        if rng.random() < 0.1:
            chunks = chunks * rng.choice([2, 50])
        described[name] = _As(_DCP, "TensorStorageMetadata", size=tuple(shape), chunks=chunks)
    planner = {name: tuple(name.split(".")) for name in described} if rng.random() < 0.5 else None
    stream = io.BytesIO()
    metadata = _As(_DCP, "Metadata", state_dict_metadata=described, storage_data=storage, planner_data=planner)
    _Pickler(stream, 2).dump(metadata)
    return {".metadata": stream.getvalue(), "x.distcp": data or b"x"}


@functools.cache
def _saved() -> Files:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    with tempfile.TemporaryDirectory() as folder:
        interop.save(interop.from_torch(net, torch.zeros(2, 3)), folder)
        return {name: (pathlib.Path(folder) / name).read_bytes() for name in ("program.json", "model.safetensors")}


def artifact(rng: random.Random) -> Files:
    """A saved model whose program has other types in places; half of them with the digest that is theirs."""
    files = dict(_saved())
    document = swapped(json.loads(files["program.json"]), rng)
    files["program.json"] = _text(document)
    if rng.random() < 0.5:
        try:
            text = json.dumps(encode(decode(document["model"])), sort_keys=True)
        except Exception:  # no program: the digest does not matter
            return files
        content = files["model.safetensors"]
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"]["digest"] = hashlib.sha256(text.encode()).hexdigest()
        files["model.safetensors"] = len(_text(header)).to_bytes(8, "little") + _text(header) + content[8 + length :]
    return files


FORMATS: dict[str, Callable[[random.Random], Files]] = {
    "grammar zip": zipped,
    "grammar legacy": legacy,
    "json safetensors": safetensors_file,
    "json index": index,
    "chunks": distributed,
    "artifact": artifact,
}
