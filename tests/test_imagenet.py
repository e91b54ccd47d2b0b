"""examples/imagenet.py in its smallest form: it learns, goes home, and goes on with the same bits after a kill."""

import argparse
import re

import imagenet
import jax
import numpy as np
import processes_worker
import pytest
import torch
from PIL import Image
from processes_worker import Group
from sklearn.datasets import load_digits
from torch import nn

import interop

pytestmark = pytest.mark.once


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8 * 16, 10)

    def forward(self, x):
        return self.fc(nn.functional.adaptive_avg_pool2d(torch.relu(self.bn(self.conv(x))), 4).flatten(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 of scikit-learn's digits as JPEG and PNG in folders of their classes, and an imported model."""
    folder = tmp_path_factory.mktemp("imagenet")
    digits = load_digits()
    for i in range(200):
        place = folder / ("val" if i % 4 == 0 else "train") / f"digit {digits.target[i]}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).resize((24, 24)).convert("RGB")
        image.save(place / (f"{i}.jpg" if i % 3 else f"{i}.png"))
    torch.manual_seed(0)
    with jax.enable_x64(False):
        interop.save(interop.from_torch(Net().train(), torch.zeros(2, 3, 16, 16)), folder / "model")
    return folder


def start(folder, out, *more):
    options = f"--size 16 --batch 16 --warmup 1 --ema 0.9 --save-every 3 --steps 14 --accumulate 2 --clip 5 --out {out}"
    arguments = (str(folder), "--model", str(folder / "model"), *options.split(), *more)
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return Group(processes_worker.train_on_images, *arguments, devices=2, logs=logs)


def done(group):
    group.succeed()
    return re.search(r"^done: step 14, state ([0-9a-f]{8})$", group.output(0), re.MULTILINE)[1]


def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(folder, tmp_path):
    """Two processes of two devices, killed after a checkpoint; the data position goes on, augmentation included."""
    whole = start(folder, tmp_path / "whole")
    expected = done(whole)
    evaluated = re.findall(r"^step \d+ .* evaluated (\d+)  EMA loss [0-9.]+", whole.output(0), re.MULTILINE)
    assert evaluated == ["50", "50"]  # each once, whatever the batches are

    cut = start(folder, tmp_path / "cut")
    checkpoints = tmp_path / "cut" / "checkpoints"
    processes_worker.time.sleep(0.1)
    while not (checkpoints / "3").exists() and all(p.is_alive() for p in cut.processes.values()):
        processes_worker.time.sleep(0.005)
    for rank in cut.processes:
        cut.kill(rank)
    cut.wait()
    again = start(folder, tmp_path / "cut")
    assert done(again) == expected
    assert re.search(r"goes on from step \d+, example \d+", again.output(0))

    # what one saw of it: each row once
    first, second = (
        [line.split(",")[:2] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert first == second
    assert len(first) == 3
    assert (tmp_path / "cut" / "curves.png").read_bytes().startswith(b"\x89PNG")

    # home: the trained and the averaged model
    for name in ("model", "model_ema"):
        state = interop.load_checkpoint(tmp_path / "cut" / f"{name}.safetensors")
        Net().load_state_dict(interop.to_torch(dict(state)), strict=True)


def options_of(**changes):
    given = {"seed": 0, "size": 16, "batch": 16, "workers": 0, "smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0}
    return argparse.Namespace(**{**given, "randaugment": 2, **changes})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_a_function_of_the_seed_and_its_number(folder, workers):
    """Taken up at batch 9, in worker processes or not; another seed gives other batches."""
    train = imagenet.ImageFolder(folder / "train")
    through = imagenet.training_batches(train, options_of(), 0)
    expected = [next(through) for _ in range(12)]
    later = imagenet.training_batches(train, options_of(workers=workers), 9)
    for batch in expected[9:]:
        found = next(later)
        for name, value in batch.items():
            np.testing.assert_array_equal(found[name], value)
    other = next(imagenet.training_batches(train, options_of(seed=1), 0))
    assert (other["image"] != expected[0]["image"]).any()
    np.testing.assert_allclose(expected[0]["target"].sum(1), 1, rtol=1e-5)


def test_each_epoch_has_each_image_once_and_validation_all(folder):
    train, val = imagenet.ImageFolder(folder / "train"), imagenet.ImageFolder(folder / "val")
    assert train.classes == [f"digit {i}" for i in range(10)]
    order = imagenet.grain.MapDataset.source(train).seed(0).shuffle().repeat(2)
    for epoch in range(2):
        assert sorted(order[epoch * len(train) + i] for i in range(len(train))) == sorted(train.items)
    assert [order[i] for i in range(20)] != [order[len(train) + i] for i in range(20)]
    labels = [int(y) for batch in imagenet.validation_batches(val, options_of()) for y in batch["label"]]
    assert labels == [label for _, label in val.items]


def test_mixup_and_cutmix_share_images_and_targets_alike():
    """A batch of constant images: the share of the other image's value is the share of its target."""
    images = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None, None], (4, 3, 10, 10))
    batch = {"image": images, "label": np.arange(4)}
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.0, 0.0)):
        for seed in range(5):
            mix = imagenet.Mix(4, 0.0, mixup, cutmix)
            found = mix(batch, np.random.default_rng(seed))
            np.testing.assert_allclose(found["image"].mean((1, 2, 3)), found["target"] @ np.arange(4), rtol=1e-5)
    assert images[0, 0, 0, 0] == 0 and images[3, 0, 0, 0] == 3


def test_the_crop_covers_what_torchvisions_does():
    """RandomResizedCrop: areas of 8 to 100 %, ratios of 3/4 to 4/3; the same generator, the same crop."""
    rng = np.random.default_rng(0)
    gradient = np.zeros((60, 80, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(80)[None, :], np.arange(60)[:, None]
    image, areas, ratios = Image.fromarray(gradient), [], []
    for _ in range(300):
        crop = np.asarray(imagenet.random_resized_crop(image, 64, rng), np.float32)
        width, height = np.ptp(crop[..., 0]) * 64 / 63, np.ptp(crop[..., 1]) * 64 / 63
        areas.append(width * height / 4800)
        ratios.append(width / height)
    assert 0.05 < min(areas) < 0.15 and max(areas) > 0.85 and abs(np.mean(areas) - 0.5) < 0.1
    assert min(ratios) > 0.65 and max(ratios) < 1.55
