"""What an imported ResNet-50 costs beside a hand-written one: the train step, its compilation, and the import itself.

    python benchmarks/import.py                                   # imported, and Flax by hand
    python benchmarks/import.py --sides pytorch compiled          # eager, and torch.compile
    python benchmarks/import.py --sides torchax --peer FOLDER     # torchax, installed in FOLDER
    python benchmarks/import.py --sides import                    # seconds and memory of from_torch
    python benchmarks/import.py --report benchmarks/results/import_cpu.md

A step is forward, backward and plain SGD on one batch, by default 16 images of 128x128 in float32. By hand means
examples/resnet.py's Linen ResNet-50, NHWC, with Flax's BatchNorm. The two are timed in turns in one process, steps and
compilations alike (medians; three compilations each, from nothing). The import is timed in a fresh process; its memory
is what resident memory gains at its peak in a later import, once PyTorch's exporter has been loaded and the earlier
models are gone.
"""

import argparse
import ctypes
import functools
import gc
import importlib.metadata as metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
RATE = 0.01
SIDES = ("imported", "by hand", "torchax", "pytorch", "compiled", "import")


def torch_module():
    import torch
    import torchvision_cpu  # noqa: F401
    from torchvision import models

    torch.manual_seed(0)
    return models.resnet50()


def batch_of(size, count):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 3, size, size)).astype("float32"), rng.integers(0, 1000, count)


def imported(images, labels):
    """The imported model's step and its state."""
    import jax
    import optax
    import torch
    from flax import nnx

    import interop

    model = interop.from_torch(torch_module().train(), torch.zeros(2, *images.shape[1:]))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, rest, images, labels):
        model = nnx.merge(graph, params, rest, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def step(params, rest):
        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, images, labels)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), rest, loss

    return step, (params, rest)


def by_hand(images, labels):
    """The same of a Linen model; images are NHWC."""
    import jax
    import optax
    import resnet
    from flax import linen

    def norm(self, name):
        return linen.BatchNorm(use_running_average=not self.train, momentum=0.9, epsilon=1e-5, name=name)

    resnet._Layers.norm = norm
    module = resnet.linen_resnet("resnet50")
    images = images.transpose(0, 2, 3, 1)
    variables = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), images[:1])

    def loss_fn(params, rest):
        logits, rest = module.apply({"params": params, **rest}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), rest

    def step(params, rest):
        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), rest, loss

    return step, (variables["params"], {"batch_stats": variables["batch_stats"]})


def torchax_side(images, labels):
    """The same by torchax, whose running statistics stay as they are."""
    import jax
    import optax
    import torchax

    module = torch_module().train()
    trained = {name for name, _ in module.named_parameters()}
    state, function = torchax.extract_jax(module)
    params = {name: value for name, value in state.items() if name in trained}
    rest = {name: value for name, value in state.items() if name not in trained}
    images = jax.numpy.asarray(images)

    def loss_fn(params, rest):
        logits = function({**params, **rest}, (images,))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, rest):
        loss, grads = jax.value_and_grad(loss_fn)(params, rest)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), rest, loss

    return step, (params, rest)


JAX_SIDES = {"imported": imported, "by hand": by_hand, "torchax": torchax_side}


def time_jax(sides, images, labels, repeats, compilations=3):
    """Seconds to compile and to step of each side, in turns."""
    import jax

    compiled, rows = {}, {}
    parts = {side: JAX_SIDES[side](images, labels) for side in sides}
    seconds = {side: [] for side in sides}
    for _ in range(compilations):
        for side, (step, state) in parts.items():
            jax.clear_caches()
            started = time.perf_counter()
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*state)
            traced = time.perf_counter()
            run = lowered.compile()
            seconds[side].append((traced - started, time.perf_counter() - traced))
            compiled[side] = run
    for side, (_, state) in parts.items():
        trace, compile = (statistics.median(column) for column in zip(*seconds[side], strict=True))
        run = compiled[side]
        params, rest, loss = run(*jax.tree.map(lambda x: x.copy(), state))
        rows[side] = {"trace": trace, "compile": compile, "loss": float(loss)}
        compiled[side] = (run, params, rest)
    times = {side: [] for side in sides}
    for _ in range(repeats):
        for side, (run, params, rest) in compiled.items():
            started = time.perf_counter()
            params, rest, loss = jax.block_until_ready(run(params, rest))
            times[side].append(time.perf_counter() - started)
            compiled[side] = (run, params, rest)
    for side in sides:
        rows[side]["step"] = statistics.median(times[side])
    return rows


def time_torch(sides, images, labels, repeats):
    """The same of PyTorch, eager and compiled, both channels-last."""
    import torch

    rows = {}
    x, y = torch.from_numpy(images).to(memory_format=torch.channels_last), torch.from_numpy(labels)
    runs = {}
    for side in sides:
        module = torch_module().train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(module.parameters(), RATE)
        call = torch.compile(module) if side == "compiled" else module

        def step(call=call, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(call(x), y)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        started = time.perf_counter()
        loss = step()
        rows[side] = {"first": time.perf_counter() - started, "loss": loss}
        runs[side] = step
    times = {side: [] for side in sides}
    for _ in range(repeats):
        for side, step in runs.items():
            started = time.perf_counter()
            step()
            times[side].append(time.perf_counter() - started)
    for side in sides:
        rows[side]["step"] = statistics.median(times[side])
        if side == "compiled":
            rows[side]["compile"] = rows[side]["first"] - rows[side]["step"]
    return rows


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def time_import(images):
    """Seconds of the first `from_torch` in a process, and then the memory of another."""
    import jax
    import torch

    import interop

    example, module = torch.zeros(2, *images.shape[1:]), torch_module().train()
    started = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(interop.state_dict(interop.from_torch(module, example))))
    row = {"seconds": time.perf_counter() - started}
    started = time.perf_counter()
    interop.from_torch(module, example)
    row["again"] = time.perf_counter() - started
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    peak, going = [before := resident()], True

    def watch():
        while going:
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = interop.from_torch(module, example)
    going = False
    watcher.join()
    del model
    return {"import": {**row, "memory": (peak[0] - before) / size, "megabytes": size / 2**20}}


def measure(sides, arguments):
    images, labels = batch_of(arguments.size, arguments.batch)
    if arguments.peer:
        sys.path.append(str(arguments.peer))
    if sides == ["import"]:
        return time_import(images)
    if set(sides) <= set(JAX_SIDES):
        return time_jax(sides, images, labels, arguments.repeats)
    return time_torch(sides, images, labels, arguments.repeats)


def report(rows, path):
    import platform

    ours, hand = rows.get("imported", {}), rows.get("by hand", {})
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax", "torch", "torchvision"))
    lines = [
        "# An imported ResNet-50 on a CPU",
        "",
        "Written by `benchmarks/import.py`; a step is forward, backward and SGD on 16x3x128x128 in float32.",
        f"{platform.machine()}, {os.cpu_count()} cores; {versions}.",
        "",
        "| | step, s | of Flax by hand | trace, s | compile, s | of Flax by hand | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    titles = {
        "imported": "imported",
        "by hand": "Flax by hand",
        "torchax": "torchax (running statistics do not move)",
        "pytorch": "PyTorch, eager, channels last",
        "compiled": "PyTorch, torch.compile, channels last",
    }
    for side, title in titles.items():
        row = rows.get(side)
        if row:
            cells = [f"{row['step']:.2f}", f"{row['step'] / hand['step']:.2f}" if hand else ""]
            cells += [f"{row['trace']:.1f}" if "trace" in row else ""]
            cells += [f"{row['compile']:.1f}" if "compile" in row else ""]
            cells += [f"{row['compile'] / hand['compile']:.2f}" if hand and "compile" in row else ""]
            lines.append(f"| {title} | {' | '.join(cells)} | {row['loss']:.4f} |")
    row = rows.get("import")
    if row:
        lines += [
            "",
            f"`from_torch`: {row['seconds']:.1f} s the first time in a process, {row['again']:.1f} s after that; at",
            f"its peak {row['memory']:.2f} times the state dict's {row['megabytes']:.0f} MiB above what there was.",
        ]
    if "torchax" in rows:
        lines += [
            "",
            "torchax 0.0.13 names overloads (`aten.norm.names_dim` and their like) that torch 2.13 no longer has, and",
            "does not import beside it; in the copy timed here these lines of its tables are taken out.",
        ]
    if ours and hand:
        both = [(ours[k] + ours["trace"]) / (hand[k] + hand["trace"]) for k in ("compile",)]
        lines += ["", f"Tracing and compiling together: {both[0]:.2f} times Flax by hand."]
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="*", default=["imported", "by hand"], choices=SIDES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=pathlib.Path, help="a folder with torchax")
    parser.add_argument("--rows", type=pathlib.Path, default=ROOT / "benchmarks" / "out" / "import.json")
    parser.add_argument("--report", type=pathlib.Path, help="only write the table, from the rows there are")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.sides, arguments)))
        return
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.rows.read_text()) if arguments.rows.exists() else {}
    if arguments.report:
        report(rows, arguments.report)
        return
    done = subprocess.run([sys.executable, *sys.argv, "--measure"], stdout=subprocess.PIPE, text=True, check=True)
    rows |= json.loads(done.stdout.splitlines()[-1])
    arguments.rows.write_text(json.dumps(rows, indent=1))
    for side in arguments.sides:
        print(side, {key: round(value, 4) for key, value in rows[side].items()})


if __name__ == "__main__":
    main()
