"""A whole training run on a folder of images, as timm's and torchvision's reference scripts are: yours to copy.

    DATA/train/CLASS/*.jpg (or .png), DATA/val/CLASS/*.jpg

    jaxnorm import timm:resnet50 --out resnet50                     # once, where torch is
    python -m jaxnorm.launch --processes 2 --devices 4 examples/imagenet.py DATA --model resnet50 --out out/imagenet

Loading by grain (worker processes, an order for each epoch, each process its part), timm's augmentation
(RandomResizedCrop, flip, some of RandAugment, mixup and CutMix, label smoothing), SGD with warm-up and cosine,
bfloat16, accumulation, clipping, EMA, synchronised BatchNorm, evaluation after each epoch, checkpoints. Stopped in any
way and started again, it ends with the bits that it would have had: what a batch holds is a function of the seed and
the batch's number. The model needs a head of as many classes as there are folders (`--option num_classes=...` of
`jaxnorm import`). At the end OUT has model.safetensors and model_ema.safetensors, which `load_state_dict(strict=True)`
accepts. `report.py` beside it shows how the run goes: a table, OUT/metrics.csv, OUT/curves.png, TensorBoard.
"""

import argparse
import contextlib
import itertools
import json
import math
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from PIL import Image, ImageEnhance, ImageOps
from report import Report

import interop
import jaxnorm

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)  # ImageNet's
STOPPED = 75  # sysexits.h, EX_TEMPFAIL: start it again


class ImageFolder:
    """Paths and labels; classes are the folders' names in alphabetical order, as in torchvision."""

    def __init__(self, root: pathlib.Path, classes: list[str] | None = None) -> None:
        self.classes = classes or sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        self.items = [
            (str(path), label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).iterdir())
            if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        ]
        if not self.items:
            raise SystemExit(f"{root} has no class folders with images")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.items[index]


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """An area of 8 to 100 % at a ratio of 3/4 to 4/3 (torchvision/transforms/transforms.py, RandomResizedCrop)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    return center_crop(image, size)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle, 87.5 % of the shorter side."""
    side = 0.875 * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))


# Some of RandAugment's (Cubuk et al. 2019): what each does at a strength of -1 to 1.
AUGMENTATIONS = {
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=(124, 116, 104)),
    "shear": lambda image, s: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0.3 * s, 0, 0, 1, 0), Image.Resampling.BILINEAR
    ),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - round(128 * abs(s))),
}


class Augment:
    """One training example: what it holds is a function of the example and of the generator that grain gives it."""

    def __init__(self, size: int, operations: int) -> None:
        self.size, self.operations = size, operations

    def __call__(self, item: tuple[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
        path, label = item
        image = random_resized_crop(Image.open(path).convert("RGB"), self.size, rng)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        for name in rng.choice(list(AUGMENTATIONS), self.operations):
            image = AUGMENTATIONS[name](image, rng.uniform(-1, 1))
        return example(image, label)


class Prepare:
    """One example of the validation set."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, item: tuple[str, int]) -> dict[str, np.ndarray]:
        return example(center_crop(Image.open(item[0]).convert("RGB"), self.size), item[1])


def example(image: Image.Image, label: int) -> dict[str, np.ndarray]:
    pixels = (np.asarray(image, np.float32) / 255 - MEAN) / STD
    return {"image": pixels.transpose(2, 0, 1), "label": np.int32(label)}


class Mix:
    """Soft targets: label smoothing, and mixup or CutMix of a batch with itself reversed (timm/data/mixup.py)."""

    def __init__(self, classes: int, smoothing: float, mixup: float, cutmix: float) -> None:
        self.classes, self.smoothing, self.mixup, self.cutmix = classes, smoothing, mixup, cutmix

    def __call__(self, batch: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        images, off = batch["image"], self.smoothing / self.classes
        targets = np.full((len(images), self.classes), off, np.float32)
        targets[np.arange(len(images)), batch["label"]] += 1 - self.smoothing
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        strength = self.cutmix if cut else self.mixup
        share = rng.beta(strength, strength) if strength > 0 else 1.0
        if cut:
            height, width = images.shape[2:]
            h, w = (round(n * math.sqrt(1 - share)) for n in (height, width))
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            images = images.copy()
            images[:, :, top : top + h, left : left + w] = batch["image"][::-1, :, top : top + h, left : left + w]
            share = 1 - h * w / (height * width)
        elif share < 1:
            images = np.float32(share) * images + np.float32(1 - share) * images[::-1]
        targets = np.float32(share) * targets + np.float32(1 - share) * targets[::-1]
        return {"image": images.astype(np.float32), "target": targets.astype(np.float32)}


def training_batches(folder: ImageFolder, options: argparse.Namespace, first: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batches from number `first` on, without end."""
    processes, rank = jax.process_count(), jax.process_index()
    examples = grain.MapDataset.source(folder).seed(options.seed).shuffle().repeat(None)
    examples = examples.random_map(Augment(options.size, options.randaugment))
    part = examples.slice(slice(rank, sys.maxsize, processes)).batch(options.batch // processes)
    mixed = part.random_map(Mix(len(folder.classes), options.smoothing, options.mixup, options.cutmix))
    return iter(prefetched(mixed.slice(slice(first, sys.maxsize)), options.workers))


def validation_batches(folder: ImageFolder, options: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the validation set, once; the last batch may be shorter."""
    processes, rank = jax.process_count(), jax.process_index()
    part = grain.MapDataset.source(folder).slice(slice(rank, len(folder), processes)).map(Prepare(options.size))
    return iter(prefetched(part.batch(options.batch // processes), options.workers))


def prefetched(dataset: grain.MapDataset, workers: int) -> grain.IterDataset:
    threads = grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=4)
    batches = dataset.to_iter_dataset(threads)
    if not workers:
        return batches
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags, of which this program has none
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def loss_fn(model: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = model(batch["image"]).astype(jnp.float32)
    return optax.softmax_cross_entropy(logits, batch["target"].astype(jnp.float32)).mean(), {}


def metrics_fn(model: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
    logits = model(batch["image"]).astype(jnp.float32)
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
        "top-1": jaxnorm.in_top_k(logits, batch["label"]),
        "top-5": jaxnorm.in_top_k(logits, batch["label"], min(5, logits.shape[1])),
    }


def main() -> None:
    options = parse()
    processes = jaxnorm.join_processes()
    train = ImageFolder(options.data / "train")
    val = ImageFolder(options.data / "val", train.classes)
    if options.batch % (len(jax.devices()) * options.accumulate) or len(train) < options.batch:
        raise SystemExit(f"--batch {options.batch} is not a multiple of the devices, or more than {len(train)} images")
    per_epoch = len(train) // options.batch
    total = per_epoch * options.epochs if options.steps is None else options.steps
    say(
        f"{len(train)} and {len(val)} images of {len(train.classes)} classes; "
        f"{per_epoch} steps an epoch, {total} in all"
    )

    model = interop.load(options.model)
    model.train()
    model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    warmup = min(options.warmup * per_epoch, max(total // 2, 1))
    rates = optax.warmup_cosine_decay_schedule(0, options.learning_rate, warmup, max(total, warmup + 1))
    tx = optax.chain(optax.add_decayed_weights(options.weight_decay), optax.sgd(rates, momentum=0.9, nesterov=True))
    state = jaxnorm.TrainState.create(model, tx, ema=jaxnorm.Ema(options.ema), rng=jax.random.key(options.seed))
    dtype = jnp.bfloat16 if options.bfloat16 else None
    step = jaxnorm.train_step(loss_fn, accumulate=options.accumulate, compute_dtype=dtype, clip_norm=options.clip)
    step = jaxnorm.data_parallel(step, donate=True)
    evaluation = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn, compute_dtype=dtype))

    # What must be the same when the run is taken up: the data and the numbers of a step.
    config = {name: getattr(options, name) for name in ("batch", "seed", "size", "accumulate", "learning_rate")}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(jaxnorm.Checkpoints(options.out / "checkpoints", config=config))
        taken = 0
        if checkpoints.latest() is not None:
            taken, state, _ = checkpoints.restore(state)
            say(f"goes on from step {taken}, example {taken * options.batch}")
        report = (
            stack.enter_context(Report(options.out, taken, options.tensorboard)) if not jax.process_index() else None
        )
        batches, waited, start, since = training_batches(train, options, taken), 0.0, time.perf_counter(), taken
        while taken < total:
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            state, metrics = step(state, batch)
            taken += 1
            stop = processes > 1 and multihost_utils.reached_preemption_sync_point(taken)
            if taken % per_epoch == 0 or taken == total:
                loss, seconds = float(metrics["loss"]), time.perf_counter() - start
                results = jaxnorm.evaluate(evaluation, state.averaged(), validation_batches(val, options))
                figures = {
                    "loss": loss,
                    "learning rate": float(rates(taken - 1)),
                    "images/s": (taken - since) * options.batch / seconds,
                    "waiting": waited / seconds,  # share of the time that the loader took
                    "evaluated": results["examples"],
                    **{f"EMA {name}": float(results[name]) for name in ("loss", "top-1", "top-5")},
                }
                if report is not None:
                    report.add(taken, figures)
                waited, start, since = 0.0, time.perf_counter(), taken
            if taken % per_epoch == 0 or taken % options.save_every == 0 or taken == total or stop:
                checkpoints.save(taken, state, {"position": taken * options.batch})
            if stop:
                checkpoints.wait()
                say(f"was told to stop (SIGTERM): saved at step {taken}")
                sys.exit(STOPPED)
    if jax.process_index() == 0:
        interop.save_checkpoint(options.out / "model.safetensors", state, {"classes": json.dumps(train.classes)})
        interop.save_checkpoint(options.out / "model_ema.safetensors", state.ema_model())
    say(f"done: step {taken}, state {digest(state):08x}")


def loader_speed(options: argparse.Namespace) -> None:
    """Images a second of the loader alone."""
    batches = training_batches(ImageFolder(options.data / "train"), options, 0)
    next(batches)
    start, count = time.perf_counter(), 0
    for batch in itertools.islice(batches, 20):
        count += len(batch["image"])
    say(f"loader: {count / (time.perf_counter() - start):.1f} images/s, {options.workers} worker processes")


def digest(state: jaxnorm.TrainState) -> int:
    """A checksum of every bit of the state."""
    total = 0
    for x in jax.tree.leaves(state):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        total = zlib.crc32(np.asarray(x.addressable_data(0)).tobytes(), total)
    return total


def say(text: str) -> None:
    """One voice for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="folder with train/ and val/")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="what `jaxnorm import` wrote")
    parser.add_argument("--out", type=pathlib.Path, default="out/imagenet", help="folder that all processes see")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--steps", type=int, help="in the place of --epochs")
    parser.add_argument("--batch", type=int, default=256, help="images a step, over all devices")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-5)
    parser.add_argument("--warmup", type=int, default=5, help="epochs")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
    parser.add_argument("--clip", type=float, default=None, help="largest norm of the gradient")
    parser.add_argument("--ema", type=float, default=0.9998, help="share of the average that is kept")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--mixup", type=float, default=0.2, help="alpha; 0 for none")
    parser.add_argument("--cutmix", type=float, default=1.0, help="alpha; 0 for none")
    parser.add_argument("--randaugment", type=int, default=2, help="operations for each image")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images; 0: threads of this one")
    parser.add_argument("--save-every", type=int, default=1000, help="steps, besides each epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorboard", action="store_true", help="write OUT/tensorboard too (needs tensorboardX)")
    parser.add_argument("--loader-only", action="store_true", help="measure the loader, and end")
    return parser.parse_args()


if __name__ == "__main__":
    if "--loader-only" in sys.argv:
        loader_speed(parse())
    else:
        main()
