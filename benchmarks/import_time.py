"""Seconds to import a model, beside PyTorch's own export of one mode, and to trace a training step of it.

    python benchmarks/import_time.py                          # efficientnet_b5 resnet50 openunmix (where installed)
    python benchmarks/import_time.py --models resnet50 --report benchmarks/results/import_time.md

An import records two modes and copies the arrays; `torch.export.export` of one mode, dynamic batch, is the measure of
what that costs on the machine at hand. All is timed in one process, in turns, after a first import of another model,
which loads PyTorch's exporter; medians. A trace is JAX's, of a batch size that it has not seen: `jax.jit(f).trace(...)`
of the loss, and of its gradient. Nothing is compiled.
"""

import argparse
import gc
import importlib.metadata as metadata
import os
import pathlib
import platform
import statistics
import sys
import time
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]


def torchvision_model(name):
    def build():
        import torch
        import torchvision_cpu  # noqa: F401
        from torchvision import models

        return getattr(models, name)(), torch.zeros(2, 3, 224, 224)

    return build


def openunmix():
    import torch
    from openunmix.model import OpenUnmix

    return OpenUnmix(nb_bins=2049, nb_channels=2, hidden_size=512), torch.zeros(2, 2, 2049, 255).abs()


MODELS = {
    "efficientnet_b5": torchvision_model("efficientnet_b5"),
    "resnet50": torchvision_model("resnet50"),
    "openunmix": openunmix,
}


def timed(call):
    gc.collect()
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure(name, repeats):
    import jax
    import jax.numpy as jnp
    import torch
    from flax import nnx

    import interop

    torch.manual_seed(0)
    module, x = MODELS[name]()
    module.train()
    # strict is False by default from torch 2.9 on; the import's own exports are the same
    dynamic = ({0: torch.export.Dim.AUTO},)
    exports, imports = [], []
    for _ in range(repeats):
        exports.append(timed(lambda: torch.export.export(module, (x,), dynamic_shapes=dynamic, strict=False))[0])
        seconds, model = timed(lambda: interop.from_torch(module, x))
        imports.append(seconds)
    definition, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x):
        model = nnx.merge(definition, params, rest, copy=True)
        return model(x).sum(), nnx.state(model, nnx.Not(nnx.Param))

    traces = {"loss": [], "gradient": []}
    functions = {"loss": jax.jit(loss), "gradient": jax.jit(jax.grad(loss, has_aux=True))}
    for batch in range(4, 4 + 2 * repeats, 2):
        for what, function in functions.items():
            example = jnp.zeros((batch, *x.shape[1:]))
            traces[what].append(timed(lambda f=function, e=example: f.trace(params, rest, e))[0])
    median = statistics.median
    return median(exports), median(imports), median(traces["loss"]), median(traces["gradient"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", type=pathlib.Path, help="write the table there")
    arguments = parser.parse_args()
    import torch

    import interop

    warnings.simplefilter("ignore")  # torch.export's, about openunmix
    interop.from_torch(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), torch.zeros(2, 3, 8, 8))
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax", "torch", "torchvision"))
    lines = [
        "# Seconds to import, and to trace",
        "",
        "Written by `benchmarks/import_time.py`; export is `torch.export.export` of one mode, in the same process.",
        f"{platform.machine()}, {os.cpu_count()} cores; {versions}.",
        "",
        "| model | export, s | import, s | of export | trace of the loss, s | of its gradient, s | of export |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.models:
        try:
            export, imported, loss, gradient = measure(name, arguments.repeats)
        except ModuleNotFoundError as error:
            print(f"{name}: {error}")
            continue
        cells = [f"{export:.2f}", f"{imported:.2f}", f"{imported / export:.2f}", f"{loss:.2f}"]
        cells += [f"{gradient:.2f}", f"{gradient / export:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.report:
        arguments.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
