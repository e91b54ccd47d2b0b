"""What BatchNorm costs on TPUs and GPUs, by their own compilers, on a machine that has neither.

    python benchmarks/accelerators.py --platform tpu                  # needs libtpu; resumes, some hours for all
    python benchmarks/accelerators.py --platform gpu                  # needs jax[cuda13]
    python benchmarks/accelerators.py --platform tpu --only resnet18  # rows whose name has it
    python benchmarks/accelerators.py --saved                         # the tables again

Programs are compiled ahead of time: for slices of TPU v5e, and for eight H100 by a target configuration. Of a TPU's
program the compiler's estimate of cycles is read, of a GPU's the kernels and the bytes that they read and write, of
both the collectives, copies and temporary memory, always without the branches of a `lax.cond` that a usual step does
not take. Neither is a time: that needs a device.

- layer: one BatchNorm, forward and backward; what replicas send, in every way to be parallel.
- stack: four times convolution 3x3, 256 channels, BatchNorm, relu; a training step, 64 images a device.
- models: a training step (SGD with momentum, bfloat16, 64 images of 224x224 a device under `jaxnorm.data_parallel`), by
  hand with Flax's BatchNorm (fast variance) and with ours (`by_hand.py`), imported from torchvision, and as the Flax
  source that `interop.flax_source` writes of torchvision's.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / "results"
MODELS = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "regnet_y_400mf")
NORMS = {"flax": "Flax", "ours": "jaxnorm", "none": "none", "imported": "imported", "generated": "generated"}
WAYS = ("jit", "shard_map", "pmap", 'jit, P("data", "model")', 'jit, P(None, "model")')

# The H100 as XLA describes one: xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Row(NamedTuple):
    """One program to compile."""

    what: str  # "layer", "stack" or a model's name
    norm: str
    dtype: str
    topology: str
    how: str = "jit"

    @property
    def name(self) -> str:
        return " ".join(self)


def rows(platform: str) -> Iterator[Row]:
    """All programs, the quick ones first."""
    small, large = ("v5e:2x4", "v5e:16x16") if platform == "tpu" else ("h100:8", None)
    for topology in filter(None, (small, large)):
        for how in WAYS:
            yield from (Row("layer", norm, "bfloat16", topology, how) for norm in ("flax", "ours"))
    for dtype in ("bfloat16", "float32"):
        yield from (Row("stack", norm, dtype, small) for norm in ("none", "flax", "ours"))
    for model in MODELS:
        norms = (*(("flax",) if model.startswith("resnet") else ()), "ours", "imported", "generated")
        yield from (Row(model, norm, "bfloat16", small) for norm in norms)


def devices(topology: str) -> list[Any]:
    """The devices of a slice of TPUs, or `h100:8`."""
    import numpy as np

    import jaxnorm.topologies

    if not topology.startswith("h100:"):
        return list(jaxnorm.topologies.topology(topology).devices)
    from jax.experimental import topologies

    count = topology.removeprefix("h100:")
    found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{count}")
    return list(np.ravel(found.devices))


def norm_class(norm: str) -> Any:
    from flax import nnx

    import jaxnorm.nnx

    return {"flax": nnx.BatchNorm, "ours": jaxnorm.nnx.BatchNorm, "none": None}[norm]


def layer(row: Row) -> Callable[[], Any]:
    """Traces a layer of 2048 channels: the gradient with respect to its input."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    found, dtype = devices(row.topology), jnp.dtype(row.dtype)
    named = row.how in ("shard_map", "pmap")
    norm = norm_class(row.norm)(2048, axis_name="data" if named else None, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(norm)

    def gradient(state: Any, x: Any) -> Any:
        return jax.grad(lambda x: (nnx.merge(graph, state, copy=True)(x).astype(jnp.float32) ** 3).sum())(x)

    if row.how == "pmap":
        x = jax.ShapeDtypeStruct((len(found), 1, 32, 32, 2048), dtype)
        mapped = jax.pmap(gradient, axis_name="data", devices=found, in_axes=(None, 0))
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
        return lambda: types.SimpleNamespace(lower=lambda: mapped.lower(arrays, x))  # it has no trace of its own
    if "model" in row.how:
        across = 16 if len(found) > 8 else 2
        mesh = Mesh(np.array(found).reshape(-1, across), ("data", "model"))
        spec = P("data", "model") if "data" in row.how else P(None, "model")
    else:
        mesh, spec = Mesh(np.array(found), ("data",)), P("data")
    if named:
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), spec), out_specs=spec)
    x = jax.ShapeDtypeStruct((len(found), 32, 32, 2048), dtype, sharding=NamedSharding(mesh, spec))
    whole = NamedSharding(mesh, P())
    arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), state)
    return lambda: jax.jit(gradient).trace(arrays, x)


def stack(row: Row) -> Callable[[], Any]:
    import jax
    from by_hand import Chain, Kit, conv_bn

    kit = Kit(norm_class(row.norm), row.dtype)
    return step(row, Chain([conv_bn(kit, 256, 256, 3, act=jax.nn.relu) for _ in range(4)]), (28, 28, 256))


def model(row: Row) -> Callable[[], Any]:
    from by_hand import MODELS, TORCHVISION, Kit

    if row.norm not in ("imported", "generated"):
        return step(row, MODELS[row.what](Kit(norm_class(row.norm), row.dtype)), (224, 224, 3))
    import torch
    import torchvision_cpu  # noqa: F401  # operator schemas that torchvision lacks beside a PyTorch for CPUs

    import interop

    make = getattr(importlib.import_module("torchvision.models"), row.what)
    module = make(**TORCHVISION.get(row.what, {})).train()
    if row.norm == "imported":
        return step(row, interop.from_torch(module, torch.zeros(2, 3, 224, 224)), (3, 224, 224))
    from flax import nnx

    names: dict[str, Any] = {"__name__": "generated"}
    exec(interop.flax_source(module, torch.zeros(2, 3, 64, 64), name=row.what), names)
    return step(row, names[row.what](rngs=nnx.Rngs(0)), (224, 224, 3))


def step(row: Row, model: Any, image: tuple[int, ...]) -> Callable[[], Any]:
    """Traces the training step of `data_parallel`, 64 images a device; the loss is the mean square of the output."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxnorm
    from jaxnorm.parallel import traced

    def loss_fn(model: Any, x: Any) -> Any:
        return jnp.square(model(x).astype(jnp.float32)).mean(), {}

    model.train()
    found = devices(row.topology)
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1, momentum=0.9))
    batch = jax.ShapeDtypeStruct((64 * len(found), *image), row.dtype)
    step = jaxnorm.train_step(loss_fn, compute_dtype=jnp.dtype(row.dtype))
    return lambda: traced(step, row.how, state, batch, found)


def measure(row: Row) -> dict[str, Any]:
    """Traces, lowers and compiles one program, and reads it."""
    from jaxnorm import hlo

    build: Callable[[Row], Callable[[], Any]] = {"layer": layer, "stack": stack}.get(row.what, model)
    trace = build(row)
    trace_begun = time.process_time()
    traced = trace()
    begun = time.process_time()
    lowered = traced.lower()
    text = lowered.as_text()
    compile_begun = time.process_time()
    compiled = lowered.compile()
    ended = time.process_time()
    program = compiled.as_text()
    kernels = hlo.operations(program)
    collectives = hlo.collectives(program, len(devices(row.topology)))
    outside = hlo.outside_branches(program)
    found = {
        "trace_s": round(begun - trace_begun, 1),
        "lower_s": round(compile_begun - begun, 1),
        "compile_s": round(ended - compile_begun, 1),
        "text": len(text),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": len(collectives),
        "collective_bytes": [one.bytes for one in collectives],
        "copies": len(re.findall(r"= \w+\[\d[\d,]*\]\S* copy\(", outside)),  # of arrays, not of counters
        "convolutions": len(re.findall(r" convolution\(", outside)) or len(re.findall(r"__cudnn\$conv", outside)),
    }
    if row.topology.startswith("h100"):
        return found | {
            "kernels": sum(map(len, kernels.values())),
            "bytes": sum(map(sum, kernels.values())),
            "copies": len(kernels.get("copy", [])),
        }
    return found | {
        "cycles": hlo.cycles(program),
        "statistics": hlo.cycles(program, "batch_statistics", ("convolution",)),
    }


def versions(platform: str) -> str:
    packages = ("jax", "flax", "libtpu" if platform == "tpu" else "jaxlib")
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def tables(saved: dict[str, Any]) -> str:
    """The report, in Markdown."""
    lines = [
        "# BatchNorm on accelerators, compiled ahead of time",
        "",
        "Written by `python benchmarks/accelerators.py`.",
    ]
    for platform, title in (("tpu", "TPU v5e"), ("gpu", "Eight H100")):
        of_platform = saved.get(platform, {"rows": {}})
        found = {row: of_platform["rows"][row.name] for row in rows(platform) if row.name in of_platform["rows"]}
        if not found:
            continue
        lines += ["", f"## {title} ({of_platform['versions']})"]
        lines += ["", "One layer of 2048 channels, bfloat16, forward and backward: collectives and their bytes.", ""]
        lines += ["| topology | how | Flax | jaxnorm |", "|---|---|---|---|"]
        for row in found:
            if row.what == "layer" and row.norm == "ours":
                flax = found.get(row._replace(norm="flax"))
                lines.append(f"| {row.topology} | {row.how} | {_sent(flax)} | {_sent(found[row])} |")
        cost = "cycles" if platform == "tpu" else "kernels"
        base = {"stack": "none", **dict.fromkeys(MODELS, "ours")}
        lines += ["", "Training steps; a ratio is to the row that has 1.000.", ""]
        header = [cost, "ratio", "copies", "convolutions", "collectives", "temporary", "trace", "compile"]
        if platform == "gpu":
            header.insert(2, "bytes")
        lines += ["| | BatchNorm | dtype | " + " | ".join(header) + " |", "|---" * (3 + len(header)) + "|"]
        for row, values in found.items():
            if row.what == "layer":
                continue
            of_base = found.get(row._replace(norm=base[row.what]), values)
            cells = [
                *(row.what, NORMS[row.norm], row.dtype, f"{values[cost]:,}", f"{values[cost] / of_base[cost]:.3f}"),
                *([f"{values['bytes'] / 1e6:,.0f} MB"] if platform == "gpu" else []),
                *(str(values["copies"]), str(values["convolutions"]), str(values["collectives"])),
                *(f"{values['temporary'] / 2**20:,.0f} MiB", f"{values['trace_s'] + values['lower_s']:.1f} s"),
                f"{values['compile_s']:.0f} s",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _sent(values: dict[str, Any] | None) -> str:
    if values is None:
        return "-"
    return f"{values['collectives']}: {' + '.join(f'{size:,}' for size in values['collective_bytes'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("tpu", "gpu"), default="tpu")
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--saved", action="store_true", help="no compiling: the report of what was measured")
    options = parser.parse_args()
    path = RESULTS / "accelerators.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if not options.saved:
        sys.path.insert(0, str(ROOT / "examples"))
        if options.platform == "tpu":
            os.environ["JAX_PLATFORMS"] = "cpu"
        else:  # the compiler finds no GPU, and has nothing to tune on
            os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
            os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
        now = versions(options.platform)
        for row in rows(options.platform):
            if options.only not in row.name:
                continue
            if saved.get(options.platform, {}).get("versions") != now:
                saved[options.platform] = {"versions": now, "rows": {}}
            if row.name in saved[options.platform]["rows"]:
                continue
            print(row.name, flush=True)
            saved[options.platform]["rows"][row.name] = measure(row)
            print("   ", saved[options.platform]["rows"][row.name], flush=True)
            path.write_text(json.dumps(saved, indent=1) + "\n")
    (RESULTS / "accelerators.md").write_text(tables(saved))
    print(tables(saved))


if __name__ == "__main__":
    main()
