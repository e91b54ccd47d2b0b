"""Ultralytics' YOLO at small batches: any task, trained in JAX on 8 replicas of one image each, and exported.

The model is Ultralytics', with random weights (YOLOv8n, or what --model says); the loss is Ultralytics' own, in JAX
(yolo_loss). The data are shapes that are drawn here: circles, squares and triangles (yolo_data.py). It is trained
twice, with BatchNorm statistics synchronised over the replicas and with each replica's own, from the same weights on
the same images. At last `ultralytics.YOLO` loads the averaged (EMA) model and finds the same as JAX does.

Written to the output folder: yolo.safetensors (the state dict), yolo.pt (for `ultralytics.YOLO`), yolo.png
(what was found), yolo.json (all figures).
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import yolo_tasks  # before ultralytics: it keeps it from the network
from flax import nnx
from tqdm import tqdm
from yolo_data import Batch, drawn, shapes
from yolo_pictures import classes, draw, truth, words
from yolo_tasks import TASKS, Found, strides

import interop
import jaxnorm

TESTS = 64  # images to test on
LAST = 10  # steps that the training loss is averaged over
CONFIDENCE = 0.1  # of what is shown: a short run is sure of little

Evaluate = Callable[[Any], tuple[Any, float]]


def main() -> None:
    options = parse()
    start = time.perf_counter()
    # For JAX's CPU backend, before its first use. Where there are accelerators enough, they are used instead.
    jax.config.update("jax_num_cpu_devices", options.replicas)
    devices = replica_devices(options.replicas)
    jax.config.update("jax_default_device", devices[0])
    options.out.mkdir(parents=True, exist_ok=True)

    architecture = options.model + TASKS[options.task].suffix
    heading(1, f"{architecture} comes in")
    module = yolo_tasks.module(options.task, options.image_size, options.seed, f"{architecture}.yaml")
    model = interop.from_torch(module, torch.zeros(2, 3, options.image_size, options.image_size))
    synchronised = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    layers = sum(isinstance(layer, nnx.BatchNorm) for _, layer in nnx.iter_graph(model))
    entries = sum(array.size for array in interop.state_dict(model).values())
    print(f"{entries:,} numbers, {layers} BatchNorm layers, now a {type(model).__name__}.")

    heading(2, "Training on drawn shapes")
    tests = shapes(options.image_size, TESTS, options.seed + 1, options.task)
    size = options.replicas * options.accumulate
    print(
        f"{options.image_size}x{options.image_size}; {options.replicas} replicas ({devices[0].device_kind}) x 1 image, "
        f"{options.accumulate} times a step; {options.steps} steps"
    )
    batches = list(drawn(options.image_size, size, options.steps, options.seed, options.task))
    evaluate = evaluator(model, tests, options.task, strides(module))
    begin = {"synchronised": synchronised} | ({} if options.synchronised else {"per replica": model})
    loss_fn = loss_of(options.task, strides(module))
    runs = {
        name: train(start_from, loss_fn, batches, options.accumulate, devices, name)
        for name, start_from in begin.items()
    }

    heading(3, "What synchronisation does at one image a replica")
    figures = {name: summary(run, tests, evaluate, options.task) for name, run in runs.items()}
    print_table(figures)

    heading(4, "Exported to PyTorch")
    averaged = jaxnorm.unreplicate(runs["synchronised"].state).ema_model()
    export_to_torch(averaged, evaluate(averaged)[0], tests, options, f"{architecture}.yaml")

    curves = {name: {"loss by step": run.loss, **figures[name]} for name, run in runs.items()}
    (options.out / "yolo.json").write_text(json.dumps(curves, indent=1) + "\n")
    print(f"\nResults are in {options.out}. All in {time.perf_counter() - start:.0f} s.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="detect", help="what is to be learnt (default detect)")
    parser.add_argument("--model", default="yolov8n", help="yolov5n, yolov8n, yolo11n, yolo12n, ... (default yolov8n)")
    parser.add_argument("--synchronised", action="store_true", help="train once, with synchronised statistics")
    parser.add_argument("--replicas", type=positive, default=8, help="devices; virtual ones on a CPU (default 8)")
    parser.add_argument("--accumulate", type=positive, default=2, help="images of each replica a step (default 2)")
    parser.add_argument("--steps", type=positive, default=100, help="training steps in each run (default 100)")
    parser.add_argument("--image-size", type=of_32, default=64, help="pixels, a multiple of 32 (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default 0)")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder for the results (default out)")
    options = parser.parse_args()
    try:
        yolo_tasks.check(options.task, options.model)
    except FileNotFoundError as error:
        parser.error(str(error))
    return options


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


# Training and evaluation in JAX


class Run(NamedTuple):
    """A trained state, still replicated, and its losses by step."""

    state: jaxnorm.TrainState
    loss: list[float]


def loss_of(task: str, strides: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """Ultralytics' loss of the whole batch, over all replicas; its parts as metrics."""

    def loss_fn(model: Any, batch: Any) -> Any:
        losses = TASKS[task].loss(model(batch["image"]), batch, strides, axis_name="batch")
        return sum(losses.values()), losses

    return loss_fn


def ultralytics_ema(decay: float = 0.9999, tau: float = 2000) -> jaxnorm.Ema:
    """`ModelEMA` of ultralytics/utils/torch_utils.py: decay * (1 - exp(-x / tau)) at the x-th update, from 1."""
    return jaxnorm.Ema(decay=lambda x: decay * (1 - jnp.exp(-x / tau)), update_after_step=-1)


def train(model: Any, loss_fn: Any, batches: list[Batch], accumulate: int, devices: list[jax.Device], name: str) -> Run:
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


def evaluator(model: nnx.Module, tests: Batch, task: str, strides: tuple[int, ...]) -> Evaluate:
    """A function of any model that differs in its arrays only: predictions in eval mode, and the loss."""
    model.eval()
    graph, _ = nnx.split(model)

    @jax.jit
    def forward(arrays: Any, tests: Batch) -> Any:
        outputs = nnx.merge(graph, arrays)(tests["image"])
        return outputs[0], sum(TASKS[task].loss(outputs, tests, strides).values())

    def evaluate(model: nnx.Module) -> tuple[Any, float]:
        predictions, loss = forward(nnx.state(model), tests)
        return jax.tree.map(np.asarray, predictions), float(loss)

    return evaluate


# What is shown


def summary(run: Run, tests: Batch, evaluate: Evaluate, task: str) -> dict[str, float]:
    """A run in figures. Running statistics that differ between replicas can be chosen from, or pooled."""
    first, pooled = jaxnorm.unreplicate(run.state, rank=0), jaxnorm.unreplicate(run.state, merge=True)
    figures = {f"train mode: loss, last {LAST} steps": float(np.mean(run.loss[-LAST:]))}
    for name, model in {
        "replica 0's statistics": first.model(),
        "all replicas' pooled": pooled.model(),
        "EMA, pooled": pooled.ema_model(),
    }.items():
        predictions, loss = evaluate(model)
        found = TASKS[task].found(predictions, tests["image"].shape[2], 0.001)
        scores = TASKS[task].scores(found, tests)
        figures |= {f"{name}: loss": loss} | {f"{name}: {score}": value for score, value in scores.items()}
    figures["layers whose statistics differ between replicas"] = len(jaxnorm.replica_divergence(run.state.batch_stats))
    return figures


def print_table(figures: dict[str, dict[str, float]]) -> None:
    print(f"{'eval mode, unless it says train mode':50s}" + "".join(f"{name:>14s}" for name in figures))
    for row in next(iter(figures.values())):
        values = [of_run[row] for of_run in figures.values()]
        cells = [f"{value:.1%}" if "mAP" in row or "top-1" in row else f"{value:.4g}" for value in values]
        print(f"{row:50s}" + "".join(f"{cell:>14s}" for cell in cells))


def export_to_torch(
    model: Any, predictions: Any, tests: Batch, options: Any, architecture: str | dict[str, Any]
) -> None:
    """Saves the model, loads it with `ultralytics.YOLO`, and compares what both find in the test images."""
    import safetensors.torch
    import ultralytics

    yolo_tasks.without_torchvision()
    # The library writes a state dict; Ultralytics' files are pickles of the module itself.
    interop.save_checkpoint(options.out / "yolo.safetensors", model)
    module = yolo_tasks.module(options.task, options.image_size, options.seed + 1, architecture)
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
    theirs = [TASKS[options.task].theirs(result) for result in results]
    ours = TASKS[options.task].found(predictions, options.image_size, CONFIDENCE)
    ours = [yolo_tasks.clipped(image, options.image_size) for image in ours]
    differences = compare(ours, theirs)
    print(
        f"The first test images, the surest of what was found:\n\n{'image':7s}{'truth':28s}{'ultralytics.YOLO':34s}JAX"
    )
    for i in range(4):
        print(f"{i:<7d}{truth(tests, i):28s}{words(theirs[i]):34s}{words(ours[i])}")
    found = sum(len(image.get("boxes", [None])) for image in ours)
    print(
        f"\nyolo.pt: ultralytics.YOLO finds the same {found} in {len(ours)} images; largest differences: "
        + ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    )
    draw(tests, ours, options.out / "yolo.png")


def compare(ours: list[Found], theirs: list[Found]) -> dict[str, float]:
    """The largest difference of each array, of masks the share of pixels; or an end, where other objects are found."""
    differences: dict[str, float] = {}
    for image, other in zip(ours, theirs, strict=True):
        same = image.keys() == other.keys() and all(image[name].shape == other[name].shape for name in image)
        if not same or (classes(image) != classes(other)).any():
            raise SystemExit("ultralytics.YOLO and JAX find different objects")
        apart = {name: np.abs(array - other[name].astype(float)) for name, array in image.items()}
        if "boxes" in apart:
            apart["scores"], apart["boxes"] = apart["boxes"][:, -2], apart["boxes"][:, :-2]
        for name, array in apart.items():
            value = array.mean(axis=(1, 2)) if name == "masks" else array
            differences[name] = max(differences.get(name, 0), float(value.max(initial=0)))
    return differences


if __name__ == "__main__":
    main()
