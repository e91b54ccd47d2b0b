"""Reading checkpoints onto the device: interop.load_checkpoint against torch.load and safetensors' own loaders.

    python benchmarks/checkpoint.py                     # a ResNet-50's state dict, about 100 MB
    python benchmarks/checkpoint.py --gigabytes 4 --repeat 1
    python benchmarks/checkpoint.py --gigabytes 4 --repeat 1 --headroom 2

Each reader runs in a fresh process that imports its libraries first, reads the file (in the system's cache, since it
was just written) and puts every array on the device with jax.device_put. Printed: the median and the fastest time of
the repetitions, the latter's ratio to the first reader's, and the peak of resident memory above that before reading, as
a multiple of the file. The arrays on a CPU device are part of this memory: 1.0 is the least where it copies them, and
where it does not (arrays that begin at multiples of 64 bytes, as in a .pth file) pages that nobody read are not there.

With --headroom the system (RLIMIT_DATA) gives a reader no more than this many gigabytes of memory of its own while it
reads, beside the arrays that it leaves on the device. "Let go" leaves none: each array is summed there, and that is how
much memory reading takes on a host whose accelerator keeps the arrays. Pages of the mapped file are not counted; the
system may take them back at any time.
"""

import argparse
import json
import math
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

OUT_OF_MEMORY = re.compile(
    "MemoryError|Cannot allocate memory|RESOURCE_EXHAUSTED|Out of memory|bad_alloc|can't alloc|memory allocation of"
)
LET_GO = "interop, let go"
READERS = {
    "safetensors": ("safetensors.numpy", "interop", "interop, one by one", "safetensors.torch"),
    "pth": ("torch mmap", "torch", "interop", "interop, one by one"),
}


def resnet50() -> dict[str, np.ndarray]:
    """A state dict with the shapes of torchvision's ResNet-50: 320 entries, 102.5 MB."""
    generator = np.random.default_rng(0)
    state: dict[str, np.ndarray] = {}

    def conv(name: str, out: int, into: int, kernel: int) -> None:
        state[f"{name}.weight"] = generator.random((out, into, kernel, kernel), dtype=np.float32)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = generator.random(channels, dtype=np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(0)

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    into = 64
    for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            for i, (out, before, kernel) in enumerate(((width, into, 1), (width, width, 3), (4 * width, width, 1)), 1):
                conv(f"{name}.conv{i}", out, before, kernel)
                norm(f"{name}.bn{i}", out)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * width, into, 1)
                norm(f"{name}.downsample.1", 4 * width)
            into = 4 * width
    state["fc.weight"] = generator.random((1000, 2048), dtype=np.float32)
    state["fc.bias"] = generator.random(1000, dtype=np.float32)
    return state


def large(gigabytes: float) -> dict[str, np.ndarray]:
    """Matrices of 64 MB."""
    generator = np.random.default_rng(0)
    count = round(gigabytes * 2**30 / 2**26)
    return {f"layer{i}.weight": generator.random((4096, 4096), dtype=np.float32) for i in range(count)}


def limit(reader: str, path: str, headroom: float) -> None:
    """From now on memory of one's own is limited to what there is, the arrays that stay, and `headroom` gigabytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    stays = 0 if reader == LET_GO else pathlib.Path(path).stat().st_size
    most = used + stays + round(headroom * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def read(reader: str, path: str, headroom: float | None) -> tuple[float, float, dict[str, str]]:
    """Seconds, peak bytes above the start, and versions, in this process."""
    import jax
    import safetensors

    versions = {"jax": jax.__version__, "numpy": np.__version__, "safetensors": safetensors.__version__}
    if "torch" in reader:
        import torch

        versions["torch"] = torch.__version__
    import safetensors.numpy

    import interop

    jax.device_put(np.ones(1)).sum().block_until_ready()
    if headroom is not None:
        limit(reader, path, headroom)
    peak = Peak()
    start = time.perf_counter()
    on_device: Any
    if reader == "interop":
        checkpoint = interop.load_checkpoint(path)
        on_device = jax.device_put(dict(checkpoint))
    elif reader == "interop, one by one":  # each array's pages leave memory when it is on the device
        on_device = {}
        for name, array in interop.load_checkpoint(path).items():
            on_device[name] = jax.device_put(array).block_until_ready()
            del array
    elif reader == LET_GO:
        on_device = []
        for array in interop.load_checkpoint(path).values():
            on_device.append(jax.device_put(array).sum().block_until_ready())
            del array
    elif reader == "safetensors.numpy":
        on_device = jax.device_put(safetensors.numpy.load_file(path))
    elif reader == "safetensors.torch":
        import safetensors.torch

        on_device = jax.device_put({name: t.numpy() for name, t in safetensors.torch.load_file(path).items()})
    else:
        state = torch.load(path, mmap="mmap" in reader, weights_only=True)
        on_device = jax.device_put({name: tensor.numpy() for name, tensor in state.items()})
    jax.block_until_ready(on_device)
    seconds = time.perf_counter() - start
    return seconds, peak.stop(), versions


class Peak:
    """The highest resident memory from now on (VmHWM would also remember what was before)."""

    def __init__(self) -> None:
        self.before = self.highest = self._resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> float:
        """Ends the watch; the peak in bytes above the start."""
        self.running = False
        self.thread.join()
        return max(self.highest, self._resident()) - self.before

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self._resident())
            time.sleep(0.002)

    def _resident(self) -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, help="a file of this size instead of a ResNet-50")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--headroom", type=float, help="gigabytes of memory beside the arrays")
    parser.add_argument("--format", choices=READERS, action="append", help="default: all")
    parser.add_argument("--read", nargs=2, metavar=("READER", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(*options.read, options.headroom)))
        return
    import interop

    with tempfile.TemporaryDirectory() as folder:
        state = large(options.gigabytes) if options.gigabytes else resnet50()
        versions: dict[str, str] = {}
        for format in options.format or READERS:
            readers = (*READERS[format], *([LET_GO] if options.headroom else []))
            path = pathlib.Path(folder) / f"x.{format}"
            interop.save_checkpoint(path, state)
            size = path.stat().st_size
            print(f"\n.{format}, {len(state)} arrays, {size / 1e6:.1f} MB, {options.repeat} runs each\n")
            print("| reader | median ms | fastest ms | ratio | peak memory / file |")
            print("|---|---|---|---|---|")
            runs: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
            for _ in range(options.repeat):
                for reader in readers:  # in turn, so that a busy minute is shared by all
                    command = [sys.executable, __file__, "--read", reader, str(path)]
                    command += ["--headroom", str(options.headroom)] if options.headroom else []
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode and options.headroom and OUT_OF_MEMORY.search(done.stderr):
                        continue
                    done.check_returncode()
                    seconds, peak, loaded = json.loads(done.stdout)
                    versions |= loaded
                    runs[reader].append((seconds, peak))
            base = min((seconds for seconds, _ in runs[readers[0]]), default=float("nan"))
            for reader, results in runs.items():
                if not results:
                    print(f"| {reader} | out of memory | | | |")
                    continue
                times = [seconds for seconds, _ in results]
                ratio = "" if math.isnan(base) else f"{min(times) / base:.2f}"
                print(
                    f"| {reader} | {1e3 * statistics.median(times):.0f} | {1e3 * min(times):.0f} "
                    f"| {ratio} | {max(peak for _, peak in results) / size:.2f} |"
                )
            path.unlink()
        used = ", ".join(f"{name} {version}" for name, version in versions.items())
        print(f"\nRatio: of the fastest runs, to the first reader. {used}; CPU")


if __name__ == "__main__":
    main()
