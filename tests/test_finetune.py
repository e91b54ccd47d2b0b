"""The pieces of examples/finetune.py, on a model small enough to compile in seconds."""

import argparse
import pathlib
import sys

import finetune
import jax
import numpy as np
import pytest
import torch

import interop
import jaxnorm

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def data():
    return finetune.digits(8)


def test_digits_are_split_without_overlap(data):
    assert data.train_images.shape == (1437, 3, 8, 8) and data.test_images.shape == (360, 3, 8, 8)
    assert set(data.test_labels) == set(data.train_labels) == set(range(finetune.CLASSES))
    everything = np.concatenate([data.train_images, data.test_images])
    assert -1 < everything.min() < -0.99 and 0.99 < everything.max() <= 1
    # At their own size the images are scikit-learn's, scaled: each once.
    from sklearn.datasets import load_digits

    expected = load_digits().images.reshape(-1, 64)
    grey = np.rint((everything[:, 0].reshape(-1, 64) * 128 + 127) * 16 / 255)
    order = np.lexsort(expected.T), np.lexsort(grey.T)
    np.testing.assert_array_equal(grey[order[1]], expected[order[0]])


def test_batches_are_the_same_for_the_same_seed_and_cover_the_data(data):
    steps = 1437 // 16 + 1
    once, again, other = (list(finetune.shuffled(data, 16, steps, seed)) for seed in (3, 3, 4))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    assert any((a["label"] != b["label"]).any() for a, b in zip(once, other, strict=True))
    seen = np.concatenate([batch["label"] for batch in once])[:1437]
    np.testing.assert_array_equal(np.bincount(seen), np.bincount(data.train_labels))


def test_photographs_are_known_to_the_model_in_pytorch():
    from timm.data import ImageNetInfo

    names, images = finetune.photographs()
    assert images.shape == (4, 3, 224, 224) and images.dtype == np.float32
    found = finetune.torch_logits(finetune.pretrained(), images).argmax(-1)
    labels = [ImageNetInfo().index_to_description(int(index)) for index in found]
    assert dict(zip(names, labels, strict=True)) == {
        "coffee": "espresso",
        "chelsea": "tiger cat",
        "rocket": "missile",
        "stereo_motorcycle": "moped",
    }


def test_new_classifier_keeps_all_else():
    before, after = finetune.pretrained(), finetune.with_classifier(finetune.pretrained(), seed=1)
    assert after.training and after._fc.out_features == finetune.CLASSES
    assert {m.momentum for m in after.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
    for name, tensor in before.state_dict().items():
        if not name.startswith("_fc."):
            assert torch.equal(tensor, after.state_dict()[name]), name


@pytest.mark.parametrize("synchronised", [True, False])
def test_training_and_the_way_home(data, tmp_path, synchronised):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 8 * 8, finetune.CLASSES),
    )
    model = interop.from_torch(module, torch.from_numpy(data.test_images[:2]))
    evaluate = finetune.evaluator(model)
    before = finetune.accuracy(evaluate(model, data.test_images), data.test_labels)
    if synchronised:
        model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    batches = list(finetune.shuffled(data, 32, 30, 0))
    runs = [finetune.train(model, batches, data, evaluate, 0, jax.local_devices()[:4], "test") for _ in range(2)]
    assert runs[0][1:] == runs[1][1:]  # the same seed, the same numbers
    assert runs[0].eval_steps == [10, 20, 30]
    assert runs[0].eval_accuracy[-1] > max(0.5, before) and runs[0].loss[-1] < runs[0].loss[0]

    figures = finetune.summary(runs[0], data, evaluate)
    assert figures["layers whose statistics differ between replicas"] == (0 if synchronised else 1)
    finetune.plot({"synchronised": runs[0], "per replica": runs[1]}, options_for(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    averaged = jaxnorm.unreplicate(runs[0].state, merge=True).ema_model()
    interop.save_checkpoint(tmp_path / "model.pth", averaged)
    module.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    theirs = finetune.torch_logits(module, data.test_images)
    np.testing.assert_allclose(evaluate(averaged, data.test_images), theirs, rtol=1e-4, atol=1e-4)


def options_for(folder):
    return argparse.Namespace(replicas=4, batch_per_replica=8, steps=30, seed=0, out=folder)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--replicas", "-1"], ["--batch-per-replica", "two"]])
def test_bad_options_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        finetune.parse()
    assert refused.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_defaults_are_those_of_the_documentation(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    expected = {"replicas": 8, "batch_per_replica": 2, "steps": 40, "seed": 0, "out": pathlib.Path("out")}
    assert vars(finetune.parse()) == expected
