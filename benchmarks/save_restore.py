"""Checkpoints of a run (jaxnorm.Checkpoints) against a plain copy of the same bytes, on the same disk.

    python benchmarks/save_restore.py --write                # a ResNet-50 with Adam and EMA, 410 MB
    python benchmarks/save_restore.py --megabytes 100 --repeat 3

Both sides take turns in one process. The plain copy writes each array to one file and reads them back into memory and
onto the device; it knows nothing of steps, names, several processes, or of files that are cut short. Neither side
forces the disk to be done (fsync): the system's cache takes the bytes. Printed: the fastest time of the repetitions and
the median, in MB a second.

"Blocked" is what a training loop waits for: until `save` returns.
"""

import argparse
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxnorm

ROOT = pathlib.Path(__file__).parent.parent


def arrays(megabytes: int) -> dict[str, jax.Array]:
    """161 float32 arrays, as many as a ResNet-50 has parameters, of very different sizes; they do not compress."""
    rng = np.random.default_rng(0)
    shares = rng.lognormal(0, 2, 161)
    sizes = np.maximum(1, shares / shares.sum() * megabytes * 1e6 / 4).astype(int)
    return {f"array{i}": jax.device_put(rng.normal(size=n).astype(np.float32)) for i, n in enumerate(sizes)}


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(state: dict[str, jax.Array], folder: pathlib.Path, repeat: int) -> dict[str, list[float]]:
    """Seconds of each repetition, by name."""
    plain = folder / "plain"
    found: dict[str, list[float]] = {name: [] for name in ("blocked", "save", "write", "restore", "read")}

    def write() -> None:
        with plain.open("wb") as file:
            for x in state.values():
                file.write(memoryview(np.asarray(x)).cast("B"))

    def read() -> None:
        with plain.open("rb") as file:
            read = [jax.device_put(np.fromfile(file, x.dtype, x.size)) for x in state.values()]
        jax.block_until_ready(read)

    with jaxnorm.Checkpoints(folder / "run", keep=1) as checkpoints:
        for step in range(1, repeat + 2):
            start = time.perf_counter()
            checkpoints.save(step, state)
            blocked = time.perf_counter() - start
            checkpoints.wait()
            save = time.perf_counter() - start
            times = {"blocked": blocked, "save": save, "write": timed(write)}
            times["restore"] = timed(lambda: jax.block_until_ready(checkpoints.restore(state).state))
            times["read"] = timed(read)
            if step > 1:  # the first warms up
                for name, seconds in times.items():
                    found[name].append(seconds)
            plain.unlink()
        for name, x in checkpoints.restore(state).state.items():
            np.testing.assert_array_equal(x, state[name])
    return found


def report(found: dict[str, list[float]], megabytes: float) -> str:
    """The table, in Markdown."""
    lines = [
        "# Saving and restoring a run",
        "",
        f"Written by `python benchmarks/save_restore.py --write`: {megabytes:.0f} MB in 161 arrays, "
        f"{len(found['save'])} repetitions, jax {jax.__version__}, {jax.devices()[0].device_kind}.",
        "",
        "| | fastest | median | MB/s (fastest) | against the plain copy |",
        "|---|---|---|---|---|",
    ]
    rows = {
        "save, until complete": ("save", "write"),
        "save, blocked": ("blocked", "write"),
        "plain write": ("write", "write"),
        "restore": ("restore", "read"),
        "plain read": ("read", "read"),
    }
    for title, (name, peer) in rows.items():
        best, ratio = min(found[name]), min(found[name]) / min(found[peer])
        lines.append(
            f"| {title} | {best:.2f} s | {statistics.median(found[name]):.2f} s | {megabytes / best:,.0f} | "
            f"{ratio:.1f} x the time |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures, prints, and with --write keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=410)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results/save_restore.md")
    options = parser.parse_args()
    state = arrays(options.megabytes)
    megabytes = sum(x.nbytes for x in state.values()) / 1e6
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        text = report(measure(state, folder, options.repeat), megabytes)
    finally:
        shutil.rmtree(folder)
    print(text)
    if options.write:
        (ROOT / "benchmarks" / "results" / "save_restore.md").write_text(text)


if __name__ == "__main__":
    main()
