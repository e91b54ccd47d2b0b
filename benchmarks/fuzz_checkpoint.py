"""Mutated checkpoint files: each is read rightly or is a CheckpointError, soon, and without much memory.

    python benchmarks/fuzz_checkpoint.py --count 100000                     # each format, about half an hour in all
    python benchmarks/fuzz_checkpoint.py --format zip --first 5000 --count 1   # one case again

Case number n of a format is the same on every run and machine, so a run goes on where another ended (`--first`). A case
passes if load_checkpoint raises CheckpointError, or if every array is the one that the reference has; in both cases
soon, within the address space of MEMORY and, traced in one case of TRACED, within 4 x the files plus Python's objects:

| format | mutated | reference |
|---|---|---|
| safetensors | the file | the safetensors library, on the same bytes |
| zip | the file, which is full of checksums | the arrays before the mutation |
| pickle | `data.pkl` in a zip whose checksums are right again | torch.load(weights_only=True), if that reads it |
| legacy | the file | torch.load(weights_only=True), if that reads it |
| index | the index or one of its files | the arrays before the mutation, or the library's |
| distributed | `.metadata` or a file of parts | the arrays before the mutation |

Beside them there are the well-formed files of `fuzz_structures.py`, which describe odd things, and artifacts, which
`interop.load` reads. These must end within 1 s and 64 MB, and 1 s for 20 MB and 4 bytes for each byte more.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fuzz_structures
import numpy as np
import safetensors
import safetensors.torch
import torch

import interop
from interop.cli.values import as_json, brief

SECONDS = 5  # a case that takes longer hangs, if it had the processor for half of that time
PATIENCE = 20  # times this long it may wait for the processor
MEMORY = 256 << 20  # bytes of address space that reading a file of a few kB may ask for
TRACED = 10  # in one case of so many every allocation is counted, which takes several times as long
SLOWER = 1  # times the time that a well-formed file may take: with checks of every call, more
OBJECTS = 256 << 10  # bytes of Python objects beside 4 x the files: names, parsers, texts, calls checked by beartype
_NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
_PIECES = [
    b"R",
    b"b",
    b"Q",
    b"\x85",
    b"\x86",
    b"h\x00",
    b"q\x00",
    b"(",
    b"t",
    b"u",
    b"}",
    b"]",
    b"cos\nsystem\n",
    b"{",
    b'"',
    b"[",
    b",",
    b"0",
    b"-1",
]


def arrays() -> dict[str, np.ndarray]:
    """The checkpoint that is mutated: a few layers, several dtypes."""
    generator = np.random.default_rng(0)
    return {
        "conv.weight": generator.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bn.weight": generator.normal(size=4).astype(np.float16),
        "bn.running_var": generator.normal(size=4),
        "bn.num_batches_tracked": np.array(7),
        "mask": np.array([[True, False, True]]),
        "empty": np.zeros((0, 2), np.float32),
    }


def seeds() -> dict[str, dict[str, bytes]]:
    """For each format the files of a good checkpoint, by name."""
    values = {name: torch.from_numpy(value.copy()) for name, value in arrays().items()}
    values["tied"] = values["conv.weight"]
    values["view"] = values["conv.weight"].transpose(0, 1)[1:]
    values["half"] = torch.arange(6).to(torch.bfloat16)
    state = {"state_dict": {f"module.{name}": value for name, value in values.items()}, "epoch": 3, "args": {"lr": 0.1}}
    files: dict[str, dict[str, bytes]] = {}
    for name, zipped in (("zip", True), ("legacy", False)):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=zipped)
        files[name] = {"x.pth": stream.getvalue()}
    files["pickle"] = files["zip"]
    separate = {name: value.contiguous().clone() for name, value in values.items()}
    files["safetensors"] = {"x.safetensors": safetensors.torch.save(separate, {"format": "pt", "arch": "net"})}
    half = len(separate) // 2
    shards = {f"x-{i}.safetensors": dict(list(separate.items())[i * half : (i + 1) * half + i]) for i in range(2)}
    weight_map = {name: shard for shard, group in shards.items() for name in group}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    files["index"] = {
        "x.safetensors.index.json": index,
        **{name: safetensors.torch.save(group) for name, group in shards.items()},
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.distributed.checkpoint as dcp

        dcp.save({"model": separate, "epoch": 3}, checkpoint_id=folder)
        files["distributed"] = {file.name: file.read_bytes() for file in sorted(pathlib.Path(folder).iterdir())}
    return files


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four small changes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1) if data else 0
        # headers are where the structure is
        if rng.random() < 0.5:
            at = min(at, rng.choice([8, 64, 512, 2048]), len(data))
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                width = rng.choice([1, 2, 4, 8])
                data[at : at + width] = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, "little")
            case 3:
                del data[at : at + rng.choice([1, 1, 2, 8, 64, 512])]
            case 4:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8])))
            case 5:
                del data[at:]
            case 6:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.choice([1, 4, 16, 64, 256])]
            case 7:
                data[at:at] = rng.choice(_PIECES)
            case 8:
                start = rng.randrange(len(data) + 1)
                width = rng.choice([1, 4, 16, 64])
                data[at : at + width] = data[start : start + width]
    return bytes(data)


def repack(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A zip with its data.pkl changed and its checksums right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, change(member) if name.endswith("data.pkl") else member)
    return stream.getvalue()


def cases(format: str, first: int, count: int) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The numbered mutations of a format's files."""
    files = {} if format in fuzz_structures.FORMATS else seeds()[format]
    for number in range(first, first + count):
        rng = random.Random(f"{format} {number}")
        if format in fuzz_structures.FORMATS:
            yield number, fuzz_structures.FORMATS[format](rng)
            continue
        name = rng.choice(sorted(files))
        if format == "pickle":
            changed = repack(files[name], functools.partial(mutate, rng=rng))
        else:
            changed = mutate(files[name], rng)
        yield number, {**files, name: changed}


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> bool:
    """Names, shapes, dtypes and bits; `expected` is torch's or NumPy's."""
    if set(found) != set(expected):
        return False
    for name, value in expected.items():
        tensor = torch.as_tensor(value)
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        array = found[name]
        if array.shape != tuple(tensor.shape) or f"torch.{array.dtype.name}" != str(tensor.dtype):
            return False
        if np.ascontiguousarray(array).tobytes() != bits:
            return False
    return True


def reference(format: str, files: dict[str, bytes], path: pathlib.Path, found: interop.Checkpoint) -> bool:
    """Whether an accepted checkpoint has the right arrays."""
    if format == "safetensors":
        return same(found, safetensors.torch.load(files["x.safetensors"]))
    if format in ("zip", "distributed"):
        original = _original(format)
        if format == "zip" and list(found) != list(original):
            return False
        # a name in DCP's metadata may be another one; what it names may not
        bits = {np.ascontiguousarray(v).tobytes() + str((v.shape, v.dtype)).encode() for v in original.values()}
        return all(np.ascontiguousarray(v).tobytes() + str((v.shape, v.dtype)).encode() in bits for v in found.values())
    if format == "index":
        tensors: dict[str, Any] = {}
        for name, content in files.items():
            if name.endswith(".safetensors"):
                tensors |= safetensors.torch.load(content)
        return same(found, tensors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(io.BytesIO(files["x.pth"]), weights_only=True)
    except Exception:  # torch refuses more: functions and classes that it does not know
        return True
    state = value["state_dict"] if found.metadata["which"] == "state_dict" and isinstance(value, dict) else value
    for name, array in found.items():
        tensor = next((state[n] for n in (name, f"module.{name}") if isinstance(state, dict) and n in state), None)
        if isinstance(tensor, torch.Tensor) and not same({name: array}, {name: tensor}):
            return False
    return True


_originals: dict[str, dict[str, np.ndarray]] = {}


def _original(format: str) -> dict[str, np.ndarray]:
    if format not in _originals:
        with tempfile.TemporaryDirectory() as folder:
            path = _write(pathlib.Path(folder), seeds()[format])
            _originals[format] = {name: np.array(array) for name, array in interop.load_checkpoint(path).items()}
    return _originals[format]


def _write(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for old in folder.iterdir():  # other names than those of the case before
        if old.name not in files:
            old.unlink()
    return folder if len(files) > 1 else folder / next(iter(files))


def check(format: str, files: dict[str, bytes], folder: pathlib.Path, traced: bool = False) -> str:
    """Reads one case: "refused", "read", or what went wrong."""
    # the machine may be busy, or this process stopped, for longer than a case may take
    start, alarms = time.process_time(), 0

    def hang(*_: object) -> None:
        nonlocal alarms
        alarms += 1
        if time.process_time() - start > SECONDS / 2 or alarms == PATIENCE:
            raise TimeoutError

    path = _write(folder, files)
    allocated = 0
    if traced:
        tracemalloc.start()
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        checkpoint = interop.load(path) if format == "artifact" else interop.load_checkpoint(path)
        for array in () if format == "artifact" else checkpoint.values():
            array.tobytes()
        if format in fuzz_structures.FORMATS and format != "artifact":
            interop.lint(checkpoint)
            json.dumps([[as_json(value), brief(value)] for value in checkpoint.metadata.values()], allow_nan=False)
        result = "read"
    except NotImplementedError as error:
        result = "refused" if format == "artifact" else f"NotImplementedError: {error}"
    except interop.CheckpointError as error:
        result = "refused" if folder.name in str(error) else f"no file is named: {error}"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if traced:
            allocated = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    size, structured = sum(map(len, files.values())), format in fuzz_structures.FORMATS
    allowed = 4 * size + (64 << 20 if structured else OBJECTS)
    if allocated > allowed:
        return f"allocated {allocated} bytes, of {allowed}"
    if structured and not traced and (took := time.process_time() - start) > SLOWER * (1 + size / 20e6):
        return f"took {took:.2f} s for {size} bytes"
    if result == "read" and not structured and not reference(format, files, path, checkpoint):
        result = "a wrong array"
    return result


@contextlib.contextmanager
def at_most(memory: int | None) -> Iterator[None]:
    """The process may ask for so many bytes of address space more; None: for any number."""
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def run(
    format: str, first: int, count: int, keep: pathlib.Path | None = None, memory: int | None = None
) -> dict[str, int]:
    """Runs cases; the numbers of those read, refused and failed. The files of failed ones are kept in `keep`."""
    results = {"read": 0, "refused": 0, "failed": 0}
    with tempfile.TemporaryDirectory() as name:
        for number, files in cases(format, first, count):
            # A few written files are large: these may take as much more.
            allowed = None if memory is None else memory + 4 * sum(map(len, files.values()))
            with at_most(allowed):
                result = check(format, files, pathlib.Path(name), traced=number % TRACED == 0)
            if result in results:
                results[result] += 1
                continue
            results["failed"] += 1
            print(f"{format} {number}: {result[:300]}", file=sys.stderr)
            if keep:
                folder = keep / f"{format}-{number}"
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder, files)
    return results


FORMATS = ("safetensors", "zip", "pickle", "legacy", "index", "distributed", *fuzz_structures.FORMATS)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="mutations of each format")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--format", choices=FORMATS, action="append", help="default: all")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the files of failed cases")
    options = parser.parse_args()
    logging.getLogger("interop").setLevel(logging.ERROR)  # entries that are no arrays: thousands of them
    print(f"numpy {np.__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}")
    print(f"{'format':16} {'cases':>8} {'read':>8} {'refused':>8} {'failed':>8} {'us/case':>8} {'peak MB +':>9}")
    failed = 0
    for format in options.format or FORMATS:
        run(format, 0, 20)  # imports and caches
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        results = run(format, options.first, options.count, options.keep, MEMORY)
        each = (time.perf_counter() - start) / options.count * 1e6
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{format:16} {options.count:8} {results['read']:8} {results['refused']:8} {results['failed']:8} "
            f"{each:8.0f} {grown:9.1f}",
            flush=True,
        )
        failed += results["failed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
