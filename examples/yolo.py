"""Small-batch detection: YOLOv8n from Ultralytics, trained in JAX on 8 replicas of one image each, and exported.

The model is Ultralytics', with random weights; the loss is that of `v8DetectionLoss`, in JAX (yolo_loss.py). The data
are shapes that this file draws: circles, squares and triangles. It is trained twice, with BatchNorm statistics
synchronised over the replicas and with each replica's own, from the same weights on the same images. At last
`ultralytics.YOLO` loads the averaged (EMA) model and finds the same objects as JAX does.

Written to the output folder: yolo.safetensors (the state dict), yolo.pt (for `ultralytics.YOLO`), yolo.png
(detections), yolo.json (all figures).
"""

import argparse
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}  # before ultralytics is imported: no network

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchvision_cpu  # ultralytics imports torchvision where it can
from flax import nnx
from tqdm import tqdm
from yolo_loss import detection_loss

import interop
import jaxnorm

NAMES = ("circle", "square", "triangle")
STRIDES = (8, 16, 32)
OBJECTS = 4  # room for so many in each image's targets
TESTS = 64  # images to test on
LAST = 10  # steps that the training loss is averaged over
CONFIDENCE = 0.1  # of what is shown: a short run is sure of little

Batch = dict[str, np.ndarray]
Evaluate = Callable[[Any], tuple[np.ndarray, float]]


def main() -> None:
    options = parse()
    start = time.perf_counter()
    # For JAX's CPU backend, before its first use. Where there are accelerators enough, they are used instead.
    jax.config.update("jax_num_cpu_devices", options.replicas)
    devices = replica_devices(options.replicas)
    jax.config.update("jax_default_device", devices[0])
    options.out.mkdir(parents=True, exist_ok=True)

    heading(1, "YOLOv8n comes in")
    module = detector(options.image_size, options.seed)
    model = interop.from_torch(module, torch.zeros(2, 3, options.image_size, options.image_size))
    synchronised = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    layers = sum(isinstance(layer, nnx.BatchNorm) for _, layer in nnx.iter_graph(model))
    entries = sum(array.size for array in interop.state_dict(model).values())
    print(f"{entries:,} numbers, {layers} BatchNorm layers, now a {type(model).__name__}.")

    heading(2, "Training on drawn shapes")
    tests = shapes(options.image_size, TESTS, options.seed + 1)
    size = options.replicas * options.accumulate
    print(
        f"{options.image_size}x{options.image_size}; {options.replicas} replicas ({devices[0].device_kind}) x 1 image, "
        f"{options.accumulate} times a step; {options.steps} steps"
    )
    batches = list(drawn(options.image_size, size, options.steps, options.seed))
    evaluate = evaluator(model, tests)
    runs = {
        name: train(start_from, batches, options.accumulate, devices, name)
        for name, start_from in {"synchronised": synchronised, "per replica": model}.items()
    }

    heading(3, "What synchronisation does at one image a replica")
    figures = {name: summary(run, tests, evaluate) for name, run in runs.items()}
    print_table(figures)

    heading(4, "Exported to PyTorch")
    averaged = jaxnorm.unreplicate(runs["synchronised"].state).ema_model()
    export_to_torch(averaged, evaluate(averaged)[0], tests, options)

    curves = {name: {"loss by step": run.loss, **figures[name]} for name, run in runs.items()}
    (options.out / "yolo.json").write_text(json.dumps(curves, indent=1) + "\n")
    print(f"\nResults are in {options.out}. All in {time.perf_counter() - start:.0f} s.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=positive, default=8, help="devices; virtual ones on a CPU (default 8)")
    parser.add_argument("--accumulate", type=positive, default=2, help="images of each replica a step (default 2)")
    parser.add_argument("--steps", type=positive, default=100, help="training steps in each run (default 100)")
    parser.add_argument("--image-size", type=of_32, default=64, help="pixels, a multiple of 32 (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default 0)")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder for the results (default out)")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def of_32(text: str) -> int:
    number = positive(text)
    # Below 64 the last level has one cell, and one image has one value for each channel: no statistics.
    if number % 32 or number < 64:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 32, 64 or more")
    return number


def replica_devices(count: int) -> list[jax.Device]:
    """As many accelerators, or else as many virtual devices on the CPU."""
    devices = jax.local_devices()
    return (devices if len(devices) >= count else jax.local_devices(backend="cpu"))[:count]


def heading(number: int, title: str) -> None:
    print(f"\n{number}. {title}\n", flush=True)


# The model in PyTorch


def detector(size: int, seed: int, architecture: str | dict[str, Any] = "yolov8n.yaml") -> Any:
    """Ultralytics' detector for our classes, with random weights, ready to train on images of `size` pixels."""
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import LOGGER

    LOGGER.setLevel("ERROR")
    torch.manual_seed(seed)
    module = DetectionModel(architecture, nc=len(NAMES), verbose=False)
    module.names = dict(enumerate(NAMES))
    module.args = {"task": "detect", "imgsz": size}  # what ultralytics.YOLO asks a model for
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.1  # Ultralytics' 0.03 is for thousands of steps
    head = module.model[-1]
    for branch, stride in zip(head.cv3, STRIDES, strict=True):
        # As Detect.bias_init, which expects images of 640 pixels: so many objects, equally likely in any cell.
        torch.nn.init.constant_(branch[-1].bias, math.log(5 / head.nc / (size / stride) ** 2))
    return module.train()


# The data


def shapes(size: int, count: int, seed: int) -> Batch:
    """Images (N, 3, size, size) from 0 to 1 of one to three shapes, each of one colour, on a background of another.

    `boxes` (N, OBJECTS, 4) are in pixels, `labels` (N, OBJECTS) index NAMES, `mask` (N, OBJECTS) marks the true ones.
    """
    images = np.empty((count, 3, size, size), np.float32)
    boxes, labels = np.zeros((count, OBJECTS, 4), np.float32), np.zeros((count, OBJECTS), np.int32)
    mask = np.zeros((count, OBJECTS), bool)
    y, x = np.mgrid[:size, :size] + 0.5
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        background = rng.uniform(0, 1, 3)
        images[i] = background[:, None, None] + rng.normal(0, 0.03, (3, size, size))
        placed, wanted = 0, rng.integers(1, 4)
        for _ in range(100):  # tries: where there is no room for another, the image stays as it is
            if placed == wanted:
                break
            side = rng.uniform(0.25, 0.5) * size
            left, top = rng.uniform(0, size - side, 2)
            box = np.array([left, top, left + side, top + side])
            if placed and _overlap(boxes[i, :placed], box) > 0:
                continue
            label, u, v = rng.integers(len(NAMES)), (x - left) / side, (y - top) / side  # 0 to 1 inside the box
            inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
            if NAMES[label] == "circle":
                inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25
            elif NAMES[label] == "triangle":
                inside &= np.abs(u - 0.5) < v / 2
            colour = (background + rng.uniform(0.3, 0.7, 3)) % 1
            images[i] = np.where(inside, colour[:, None, None], images[i])
            boxes[i, placed], labels[i, placed], mask[i, placed] = box, label, True
            placed += 1
    # As bytes would hold them, which is how images reach ultralytics.YOLO.
    images = np.rint(np.clip(images, 0, 1) * 255) / np.float32(255)
    return {"image": images, "boxes": boxes, "labels": labels, "mask": mask}


def _overlap(boxes: np.ndarray, box: np.ndarray) -> float:
    """The largest area that `box` shares with one of `boxes`."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return float(np.max(np.prod(np.maximum(sides, 0), axis=1)))


def drawn(size: int, count: int, steps: int, seed: int) -> Iterator[Batch]:
    """A new batch for each step. No image comes twice."""
    whole = shapes(size, count * steps, seed)
    for step in range(steps):
        yield {name: array[step * count : (step + 1) * count] for name, array in whole.items()}


# Training and evaluation in JAX


class Run(NamedTuple):
    """A trained state, still replicated, and its losses by step."""

    state: jaxnorm.TrainState
    loss: list[float]


def loss_fn(model: Any, batch: Any) -> Any:
    """Ultralytics' loss of the whole batch, over all replicas; its parts as metrics."""
    losses = detection_loss(model(batch["image"]), batch, STRIDES, axis_name="batch")
    return losses["box"] + losses["cls"] + losses["dfl"], losses


def ultralytics_ema(decay: float = 0.9999, tau: float = 2000) -> jaxnorm.Ema:
    """`ModelEMA` of ultralytics/utils/torch_utils.py: decay * (1 - exp(-x / tau)) at the x-th update, from 1."""
    return jaxnorm.Ema(decay=lambda x: decay * (1 - jnp.exp(-x / tau)), update_after_step=-1)


def train(model: Any, batches: list[Batch], accumulate: int, devices: list[jax.Device], name: str) -> Run:
    """Trains a copy of the model on the batches, each split over the devices."""
    model.train()
    steps = len(batches)
    rate = optax.warmup_cosine_decay_schedule(1e-4, 3e-3, max(1, steps // 10), steps)
    # Ultralytics' time constant is 2000 updates; in a short run it would average nothing.
    ema = ultralytics_ema(decay=0.95, tau=max(1, steps / 10))
    state = jaxnorm.TrainState.create(model, optax.adam(rate), ema=ema, rng=jax.random.key(0))
    step = jaxnorm.data_parallel(
        jaxnorm.train_step(loss_fn, accumulate=accumulate, clip_norm=10.0),  # Ultralytics' norm
        how="pmap",
        axis_name="batch",
        devices=devices,
    )
    state = jaxnorm.replicate(state, devices)
    loss = []
    with tqdm(batches, name, bar_format="{desc:14s} |{bar:24}| step {n}/{total}{postfix}", postfix="compiling") as bar:
        for batch in bar:
            before = time.perf_counter()
            state, metrics = step(state, batch)
            loss.append(float(metrics["loss"]))
            speed = len(batch["image"]) / (time.perf_counter() - before)
            bar.set_postfix_str(f"loss {loss[-1]:.3f}, {speed:.0f} images/s", refresh=False)
    return Run(state, loss)


def evaluator(model: nnx.Module, tests: Batch) -> Evaluate:
    """A function of any model that differs in its arrays only: predictions in eval mode, and the loss.

    Predictions are (N, 4 + classes, anchors): a centre, a size, and a score for each class.
    """
    model.eval()
    graph, _ = nnx.split(model)

    @jax.jit
    def forward(arrays: Any, tests: Batch) -> Any:
        predictions, raw = nnx.merge(graph, arrays)(tests["image"])
        return predictions, sum(detection_loss(raw, tests, STRIDES).values())

    def evaluate(model: nnx.Module) -> tuple[np.ndarray, float]:
        predictions, loss = forward(nnx.state(model), tests)
        return np.asarray(predictions), float(loss)

    return evaluate


def detections(predictions: np.ndarray, confidence: float) -> list[np.ndarray]:
    """For each image (found, 6): corners, score, class. Non-maximum suppression is Ultralytics'."""
    from ultralytics.utils.nms import non_max_suppression

    without_torchvision()
    found = non_max_suppression(torch.tensor(predictions), confidence, 0.7, max_time_img=math.inf)
    return [image.numpy() for image in found]


def without_torchvision() -> None:
    """Where torchvision's C++ operators are missing, Ultralytics' own non-maximum suppression, in their place."""
    if torchvision_cpu.declared is not None:
        import torchvision
        from ultralytics.utils.nms import TorchNMS

        torchvision.ops.nms = TorchNMS.nms


def mean_average_precision(predictions: np.ndarray, tests: Batch) -> tuple[float, float]:
    """mAP at IoU 0.5, and the mean of those at 0.5, 0.55, ..., 0.95, by Ultralytics' own matching and curves."""
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import ap_per_class, box_iou

    thresholds = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))
    right, found = [], detections(predictions, confidence=0.001)
    for image, boxes, labels, mask in zip(found, tests["boxes"], tests["labels"], tests["mask"], strict=True):
        overlap = box_iou(torch.tensor(boxes[mask]), torch.tensor(image[:, :4]))
        classes = torch.tensor(labels[mask]), torch.tensor(image[:, 5])
        right.append(BaseValidator.match_predictions(thresholds, classes[1], classes[0], overlap).numpy())
    every = np.concatenate(found)
    precision = ap_per_class(np.concatenate(right), every[:, 4], every[:, 5], tests["labels"][tests["mask"]])[5]
    return float(precision[:, 0].mean()), float(precision.mean())


# What is shown


def summary(run: Run, tests: Batch, evaluate: Evaluate) -> dict[str, float]:
    """A run in figures. Running statistics that differ between replicas can be chosen from, or pooled."""
    first, pooled = jaxnorm.unreplicate(run.state, rank=0), jaxnorm.unreplicate(run.state, merge=True)
    figures = {f"train mode: loss, last {LAST} steps": float(np.mean(run.loss[-LAST:]))}
    for name, model in {
        "replica 0's statistics": first.model(),
        "all replicas' pooled": pooled.model(),
        "EMA, pooled": pooled.ema_model(),
    }.items():
        predictions, loss = evaluate(model)
        at_half, over_all = mean_average_precision(predictions, tests)
        figures |= {f"{name}: loss": loss, f"{name}: mAP50": at_half, f"{name}: mAP50-95": over_all}
    figures["layers whose statistics differ between replicas"] = len(jaxnorm.replica_divergence(run.state.batch_stats))
    return figures


def print_table(figures: dict[str, dict[str, float]]) -> None:
    print(f"{'eval mode, unless it says train mode':50s}" + "".join(f"{name:>14s}" for name in figures))
    for row in next(iter(figures.values())):
        values = [of_run[row] for of_run in figures.values()]
        cells = [f"{value:.1%}" if "mAP" in row else f"{value:.4g}" for value in values]
        print(f"{row:50s}" + "".join(f"{cell:>14s}" for cell in cells))


def export_to_torch(
    model: Any, predictions: np.ndarray, tests: Batch, options: Any, architecture: str | dict[str, Any] = "yolov8n.yaml"
) -> None:
    """Saves the model, loads it with `ultralytics.YOLO`, and compares what both find in the test images."""
    import safetensors.torch
    import ultralytics

    without_torchvision()
    # The library writes a state dict; Ultralytics' files are pickles of the module itself.
    interop.save_checkpoint(options.out / "yolo.safetensors", model)
    module = detector(options.image_size, options.seed + 1, architecture)
    module.load_state_dict(safetensors.torch.load_file(options.out / "yolo.safetensors"), strict=True)
    contents = {"model": module.eval(), "ema": None, "epoch": -1, "train_args": module.args}
    torch.save({**contents, "version": ultralytics.__version__}, options.out / "yolo.pt")

    pixels = np.rint(tests["image"][:, ::-1] * 255).astype(np.uint8).transpose(0, 2, 3, 1)  # BGR, as OpenCV has it
    results = ultralytics.YOLO(options.out / "yolo.pt").predict(
        list(np.ascontiguousarray(pixels)),
        imgsz=options.image_size,
        conf=CONFIDENCE,
        iou=0.7,
        device="cpu",
        verbose=False,
        save=False,
    )
    theirs = [result.boxes.data.numpy() for result in results]
    ours = detections(predictions, CONFIDENCE)
    for found in ours:
        found[:, :4] = found[:, :4].clip(0, options.image_size)  # as YOLO.predict does
    same = all(a.shape == b.shape and (a[:, 5] == b[:, 5]).all() for a, b in zip(ours, theirs, strict=True))
    if not same:
        raise SystemExit("ultralytics.YOLO and JAX find different objects")
    print("The first test images, the two surest objects:\n")
    print(f"{'image':7s}{'truth':28s}{'ultralytics.YOLO':34s}JAX")
    for i in range(4):
        truth = ", ".join(NAMES[label] for label in tests["labels"][i][tests["mask"][i]])
        said = [", ".join(f"{NAMES[int(c)]} ({s:.2f})" for *_, s, c in found[i][:2]) for found in (theirs, ours)]
        print(f"{i:<7d}{truth:28s}{said[0]:34s}{said[1]}")
    differences = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    print(
        f"\nyolo.pt: ultralytics.YOLO finds the same {len(differences)} objects in {len(ours)} images; largest "
        f"differences: {differences[:, :4].max(initial=0):.1e} pixels, scores {differences[:, 4].max(initial=0):.1e}"
    )
    draw(tests, ours, options.out / "yolo.png")


def draw(tests: Batch, found: list[np.ndarray], path: pathlib.Path) -> None:
    """The first images with what was found in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 6, figsize=(12, 4.4), layout="constrained")
    for panel, image, boxes in zip(panels.flat, tests["image"], found, strict=False):
        panel.imshow(image.transpose(1, 2, 0))
        panel.set_axis_off()
        for x1, y1, x2, y2, score, label in boxes:
            panel.add_patch(pyplot.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color="white"))
            text = panel.text(x1, y1, f"{NAMES[int(label)]} {score:.2f}", fontsize=7, color="white", va="bottom")
            text.set_in_layout(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
