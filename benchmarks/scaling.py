"""What synchronised BatchNorm costs at 8 to 4096 replicas: counted where that is possible, modelled beyond.

    python benchmarks/scaling.py                       # count (some minutes), model, table and plot
    python benchmarks/scaling.py --saved               # model again from the counts of the last run
    python benchmarks/scaling.py --images-per-second 5000

Counted: the collectives in the compiled HLO of one training step of ResNet-50 (torchvision) and YOLOv8n (Ultralytics),
imported through `interop.from_torch`, on 1 to 8 virtual CPU devices, synchronised and not. Their number and their bytes
depend neither on the images' size nor on the kind of device.

Modelled: their time, by latency and bandwidth (the alpha-beta model of Thakur, Rabenseifner and Gropp, Optimization of
Collective Communication Operations in MPICH, 2005, https://doi.org/10.1177/1094342005051521; the ring's sums are
Patarasuk and Yuan's, https://doi.org/10.1016/j.jpdc.2008.09.002):

                       latencies                     bytes through a replica's link
    all-reduce of m    ring 2(n - 1), tree 2 log2 n  2 (n - 1)/n m

Nothing is hidden behind computation: a layer cannot normalise before the statistics are there.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from jaxnorm.hlo import collectives

ROOT = pathlib.Path(__file__).parent.parent
COUNTED = (1, 2, 4, 8)
MODELLED = tuple(2**k for k in range(3, 13))
LIMIT = 0.01  # of a step


# Counting


def all_reduces(hlo: str, replicas: int) -> list[int]:
    """The bytes of each all-reduce of one program.

    Raises:
        ValueError: for a collective of another kind, which a training step of this library does not have.
    """
    found = collectives(hlo, replicas)
    if others := {one.kind for one in found} - {"all-reduce"}:
        raise ValueError(f"a collective that is no all-reduce: {', '.join(sorted(others))}")
    return [one.bytes for one in found]


def resnet50() -> tuple[Any, Any, dict[str, Any]]:
    """Model, loss function and a batch of one example."""
    import numpy as np
    import optax
    import torch
    import torchvision

    import interop

    model = interop.from_torch(torchvision.models.resnet50(weights=None).train(), torch.zeros(2, 3, 64, 64))

    def loss_fn(model: Any, batch: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
        return losses.mean(), {}

    return model, loss_fn, {"image": np.zeros((1, 3, 64, 64), np.float32), "label": np.zeros(1, np.int32)}


def yolov8n() -> tuple[Any, Any, dict[str, Any]]:
    """Model, loss function and a batch of one example."""
    import numpy as np
    import torch
    import yolo_loss
    from ultralytics.nn.tasks import DetectionModel

    import interop

    model = interop.from_torch(DetectionModel("yolov8n.yaml", verbose=False).train(), torch.zeros(2, 3, 64, 64))

    def loss_fn(model: Any, batch: Any) -> Any:
        # W is each replica's own here (as in Ultralytics' DDP), so that all collectives but one are BatchNorm's.
        losses = yolo_loss.detection_loss(model(batch["image"]), batch, (8, 16, 32))
        return sum(losses.values()), losses

    objects = {"boxes": np.zeros((1, 4, 4), np.float32), "labels": np.zeros((1, 4), np.int32)}
    return model, loss_fn, {"image": np.zeros((1, 3, 64, 64), np.float32), **objects, "mask": np.zeros((1, 4), bool)}


def compiled(model: Any, loss_fn: Any, batch: dict[str, Any], replicas: int) -> str:
    """The compiled HLO of a training step under shard_map, one example a replica."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import Mesh, PartitionSpec

    import jaxnorm

    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    mesh = Mesh(np.array(jax.devices()[:replicas]), ("batch",))
    split, shared = PartitionSpec("batch"), PartitionSpec()
    step = jax.shard_map(
        jaxnorm.train_step(loss_fn, axis_name="batch"),
        mesh=mesh,
        in_specs=(shared, split),
        out_specs=shared,
        check_vma=False,
    )
    whole = {name: np.repeat(array, replicas, axis=0) for name, array in batch.items()}
    # The program is read, not run: code generation need not try hard. The collectives are settled before it.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(step).lower(state, whole).compile(compiler_options=options).as_text()


def count(models: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """{model: {"layers": BatchNorm layers' [number, channels], "synchronised" and "per replica": {replicas: ...}}}.

    The largest number of replicas first, which the model below is made from; `keep` is given what there is after each.
    """
    from flax import nnx
    from tqdm import tqdm

    import jaxnorm

    counted: dict[str, Any] = {}
    made: dict[str, Any] = {}
    steps = [(n, name, kind) for n in reversed(COUNTED) for name in models for kind in ("synchronised", "per replica")]
    with tqdm(steps, desc="compiling", unit="step") as bar:
        for replicas, name, kind in bar:
            bar.set_postfix_str(f"{name}, {kind}, {replicas} replicas")
            if name not in made:
                made[name] = models[name]()
                layers = [node for _, node in nnx.iter_graph(made[name][0]) if isinstance(node, nnx.BatchNorm)]
                counted[name] = {"layers": [len(layers), sum(layer.num_features for layer in layers)]}
                counted[name] |= {"synchronised": {}, "per replica": {}}
            model, loss_fn, batch = made[name]
            if kind == "synchronised":
                model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
            counted[name][kind][str(replicas)] = all_reduces(compiled(model, loss_fn, batch, replicas), replicas)
            keep(counted)
    return counted


def synchronisation(counted: dict[str, Any], replicas: int = COUNTED[-1]) -> list[int]:
    """The all-reduces that a synchronised step has and the other has not, by their bytes.

    XLA merges neighbouring all-reduces, a few of BatchNorm's with one another and with parts of the gradients' large
    one. So that one is taken out by its rank, and what it is larger or smaller by goes to the largest that is left.
    """
    found = sorted(counted["synchronised"][str(replicas)])
    surplus = 0
    for size in sorted(counted["per replica"][str(replicas)], reverse=True):
        surplus += found.pop() - size
    if found:
        found[-1] += surplus
    elif surplus:
        found.append(surplus)
    return found


# Modelling


@dataclass(frozen=True)
class Link:
    """Seconds until a message arrives, and bytes a second in one direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Nodes of `node` replicas. `overhead` is the seconds that a collective takes before anything is sent.

    With `axes` the replicas are a torus of as many dimensions and all links are alike: a collective goes around each
    axis in both directions, over all axes at once. Axes shorter than 4 have no link from the last replica to the first.
    """

    name: str
    overhead: float
    inside: Link
    between: Link
    node: int
    axes: int = 0


# H100 or H200, eight a node.
# - NVLink: 900 GB/s, half of it each way; one 400 Gb/s InfiniBand adapter for each:
#   https://raw.githubusercontent.com/mlcommons/inference_results_v4.1/main/closed/NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json
#   https://docs.nvidia.com/networking/display/ConnectX7VPI/Introduction
# - latencies: NCCL's own model of small messages (protocol LL): 6.8 us to begin, 0.6 us a step over NVLink, 5 us over
#   the network: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc (baseLatencies, hwLatencies; Tree)
GPU = Network("NVLink, InfiniBand", 6.8e-6, Link(0.6e-6, 450e9), Link(5e-6, 50e9), 8)
# TPU v5p, a 3D torus, 90 GB/s each way a link: https://jax-ml.github.io/scaling-book/tpus
# About 1 us a hop; 8 us measured where three hops were expected, so 5 us to begin:
# https://jax-ml.github.io/scaling-book/sharding
TPU = Network("TPU v5p", 5e-6, Link(1e-6, 90e9), Link(1e-6, 90e9), 1, axes=3)


def sides(replicas: int, axes: int) -> tuple[int, ...]:
    """A power of two of replicas as a torus, as near to a cube as it goes: 128 is (8, 4, 4)."""
    exponent = replicas.bit_length() - 1
    if replicas != 1 << exponent:
        raise ValueError(f"the model takes a power of two of replicas; got {replicas}")
    return tuple(2 ** (exponent // axes + (axis < exponent % axes)) for axis in range(axes))


def all_reduce(network: Network, replicas: int, size: int, algorithm: str) -> float:
    """Seconds until each replica has the sum of `size` bytes: a reduce-scatter and an all-gather of the parts."""
    if replicas == 1:
        return 0.0
    sent = 2 * (replicas - 1) * size / replicas
    if algorithm == "torus":
        lengths = [side for side in sides(replicas, network.axes) if side > 1]
        hops = sum(side // 2 if side >= 4 else side - 1 for side in lengths)
        links = sum(2 if side >= 4 else 1 for side in lengths)
        return network.overhead + 2 * hops * network.inside.latency + sent / (links * network.inside.bandwidth)
    nodes = max(1, replicas // network.node)
    if algorithm == "ring":  # around all nodes, through each replica of a node
        between, inside = nodes - 1, replicas - nodes
    elif algorithm == "tree":
        between, inside = math.log2(nodes), math.log2(replicas / nodes)
    else:
        raise ValueError(f'algorithm is "ring", "tree" or "torus"; got {algorithm!r}')
    slowest = (network.between if nodes > 1 else network.inside).bandwidth
    latency = between * network.between.latency + inside * network.inside.latency
    return network.overhead + 2 * latency + sent / slowest


def seconds(found: Iterable[int], network: Network, replicas: int) -> float:
    """All collectives of a step one after the other, each by its fastest algorithm."""
    algorithms = ("torus",) if network.axes else ("ring", "tree")
    return sum(min(all_reduce(network, replicas, size, a) for a in algorithms) for size in found)


def largest_group(found: list[int], network: Network, step: float, limit: float = LIMIT) -> int | None:
    """The most replicas, of 2, 4, ..., 4096, that synchronise within `limit` of a step; None if no two do."""
    fitting = [n for n in (2, 4, *MODELLED) if seconds(found, network, n) < limit * step]
    return max(fitting, default=None)


# Steps: images a second and replica, ResNet-50 training in mixed precision on one A100, as NVIDIA publishes it:
# https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/Classification/ConvNets/resnet50v1.5/README.md
# YOLOv8n is taken to run at the same FLOP/s: 8.9 GFLOPs at 640x640 (ultralytics/cfg/models/v8/yolov8.yaml) against
# 4.09 GMACs, 8.2 GFLOPs (https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.resnet50.html).
IMAGES_PER_SECOND = 2470.0
WORK = {"ResNet-50": 1.0, "YOLOv8n": 8.9 / 8.18}  # in ResNet-50s
IMAGES = {"ResNet-50": (32, 256), "YOLOv8n": (16, 128)}  # a replica


def report(counted: dict[str, Any], images_per_second: float, versions: str) -> str:
    """The tables, in Markdown."""
    lines = ["# Synchronised BatchNorm from 8 to 4096 replicas", "", "Written by `python benchmarks/scaling.py`.", ""]
    lines += [f"## Counted in the compiled training step ({versions})", ""]
    lines += ["| model | statistics | replicas | all-reduces | bytes |", "|---|---|---|---|---|"]
    for model, of_model in counted.items():
        for kind in ("synchronised", "per replica"):
            for replicas, found in sorted(of_model[kind].items(), key=lambda item: int(item[0])):
                lines.append(f"| {model} | {kind} | {replicas} | {len(found)} | {sum(found):,} |")
    lines.append("")
    for model, of_model in counted.items():
        layers, channels = of_model["layers"]
        added = synchronisation(of_model)
        lines.append(
            f"- {model}: {layers} BatchNorm layers, {channels:,} channels. Synchronisation adds {len(added)} "
            f"all-reduces ({sum(added) / channels:.1f} bytes a channel)."
        )
    shown = (8, 64, 512, 4096)
    lines += ["", "## Modelled: synchronisation as a share of a step", ""]
    lines += [
        f"A step is taken as images / {images_per_second:,.0f} a second for ResNet-50 (one A100 in mixed precision) "
        f"and {WORK['YOLOv8n']:.2f} times as long for YOLOv8n at 640x640; on a device twice as fast all shares double. "
        "All replicas form one group. The last column is the largest group that costs under "
        f"{LIMIT:.0%} of a step. Sources of all figures: `benchmarks/scaling.py`.",
        "",
        "| model | network | images a replica | step | "
        + " | ".join(f"{n} replicas" for n in shown)
        + " | group under 1 % |",
        "|---|---|---|---|" + "---|" * len(shown) + "---|",
    ]
    for model, network, images, step, found in cases(counted, images_per_second):
        costs = [seconds(found, network, n) for n in shown]
        group = largest_group(found, network, step)
        lines.append(
            f"| {model} | {network.name} | {images} | {step * 1e3:.1f} ms | "
            + " | ".join(f"{cost * 1e3:.2f} ms, {cost / step:.1%}" for cost in costs)
            + f" | {group or 'none'} |"
        )
    return "\n".join([*lines, "", "![Cost of synchronisation](scaling.png)", ""])


def cases(counted: dict[str, Any], images_per_second: float) -> Iterable[tuple[str, Network, int, float, list[int]]]:
    """Model, network, images a replica, seconds a step, collectives."""
    for model in counted:
        found = synchronisation(counted[model])
        for network in (GPU, TPU):
            for images in IMAGES[model]:
                yield model, network, images, images * WORK[model] / images_per_second, found


def plot(counted: dict[str, Any], images_per_second: float, path: pathlib.Path) -> None:
    """Seconds by replicas, and 1 % of a step for each number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(counted), figsize=(11, 4.2), layout="constrained", sharey=True)
    replicas = (2, 4, *MODELLED)
    for panel, model in zip(panels, counted, strict=True):
        found = synchronisation(counted[model])
        for network, colour in ((GPU, "tab:green"), (TPU, "tab:blue")):
            panel.plot(
                replicas,
                [seconds(found, network, n) * 1e3 for n in replicas],
                color=colour,
                marker="o",
                markersize=4,
                label=network.name,
            )
        for images in IMAGES[model]:
            limit = LIMIT * images * WORK[model] / images_per_second * 1e3
            panel.axhline(limit, color="grey", linestyle="--", linewidth=1)
            panel.annotate(
                f"1 % of a step of {images} images", (4096, limit), (0, 3), textcoords="offset points", ha="right"
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(replicas, [str(n) for n in replicas], fontsize="small")
        panel.set(xlabel="replicas in a group", title=f"{model}: {counted[model]['layers'][0]} BatchNorm layers")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("synchronisation, ms a step")
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Counts or reads the counts, and writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved", action="store_true", help="take the counts of the last run")
    parser.add_argument("--images-per-second", type=float, default=IMAGES_PER_SECOND, help="ResNet-50, one replica")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "scaling.json"
    if not options.saved:
        os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}
        sys.path[:0] = [str(ROOT / "examples")]
        import jax

        jax.config.update("jax_num_cpu_devices", COUNTED[-1])
        jax.config.update("jax_platforms", "cpu")
        import torchvision_cpu  # noqa: F401  torchvision beside a CPU build of PyTorch

        start = time.perf_counter()
        versions = f"jax {jax.__version__}, virtual CPU devices, float32"

        def keep(counted: dict[str, Any]) -> None:
            saved.write_text(json.dumps({"versions": versions, "counted": counted}) + "\n")

        count({"ResNet-50": resnet50, "YOLOv8n": yolov8n}, keep)
        print(f"counted in {time.perf_counter() - start:.0f} s")
    read = json.loads(saved.read_text())
    text = report(read["counted"], options.images_per_second, read["versions"])
    (options.out / "scaling.md").write_text(text)
    plot(read["counted"], options.images_per_second, options.out / "scaling.png")
    print(text)
    for network in (GPU, TPU):
        print(asdict(network))


if __name__ == "__main__":
    main()
