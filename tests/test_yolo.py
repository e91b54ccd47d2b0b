"""The detection loss of examples/yolo_loss.py against Ultralytics' own, and the pieces of examples/yolo.py."""

import argparse
import copy
import functools
import pathlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import yolo
import yolo_loss
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.tal import TaskAlignedAssigner
from ultralytics.utils.torch_utils import ModelEMA

import interop
import jaxnorm

# Three levels and YOLOv8's Detect head, small enough to compile in seconds.
SMALL = {
    "nc": 3,
    "backbone": [
        *([-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]),
        *([-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]),
    ],
    "head": [[[2, 3, 4], 1, "Detect", ["nc"]]],
}
CLASSES = len(yolo.NAMES)
# Compiling takes longer than running here.
in_haste = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@pytest.fixture
def float64():
    """Ultralytics makes its targets and sums in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def stable_topk(values, k, dim=-1, largest=True):
    """torch.topk with the first of equal values first, which torch.topk itself leaves open."""
    values, indices = torch.sort(values, dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def random_case(seed, counts, size=64, spread=1.0):
    """Predictions as a Detect head makes them, and padded targets with `counts` objects in the images."""
    rng = np.random.default_rng(seed)
    batch, room = len(counts), 13  # one shape, one compilation
    shapes = [(size // stride, size // stride) for stride in yolo.STRIDES]
    anchors = sum(height * width for height, width in shapes)
    predictions = {
        "boxes": rng.normal(size=(batch, 64, anchors)) * spread,
        "scores": rng.normal(size=(batch, CLASSES, anchors)),
        "feats": [np.zeros((batch, 1, *shape)) for shape in shapes],
    }
    side = rng.uniform(0.05, 0.7, (batch, room, 2))
    centre = rng.uniform(side / 2, 1 - side / 2)
    mask = np.arange(room) < np.array(counts)[:, None]
    boxes = np.concatenate([centre - side / 2, centre + side / 2], -1) * size
    targets = {
        "boxes": np.where(mask[..., None], boxes, 0),
        "labels": np.where(mask, rng.integers(0, CLASSES, (batch, room)), 0),
        "mask": mask,
    }
    return predictions, targets


def their_batch(targets, size):
    """The targets as Ultralytics' data loader gives them."""
    image, which = np.nonzero(targets["mask"])
    boxes = targets["boxes"][image, which]
    sides = boxes[:, 2:] - boxes[:, :2]
    normalised = np.concatenate([boxes[:, :2] + sides / 2, sides], -1) / size
    labels = targets["labels"][image, which].astype(float)[:, None]
    return {"batch_idx": torch.tensor(image), "cls": torch.tensor(labels), "bboxes": torch.tensor(normalised)}


def their_loss(module):
    module.args = copy.deepcopy(DEFAULT_CFG)  # where the gains are
    return v8DetectionLoss(module)


def relative(ours, theirs):
    theirs = np.asarray(theirs)
    return np.linalg.norm(np.asarray(ours) - theirs) / max(np.linalg.norm(theirs), 1e-300)


@in_haste
def our_loss(predictions, targets):
    """The three parts, and the gradient of their sum with respect to what the head says."""

    def total(said):
        parts = yolo_loss.detection_loss({**predictions, **said}, targets, yolo.STRIDES)
        return sum(parts.values()), parts

    said = {name: predictions[name] for name in ("boxes", "scores")}
    (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(said)
    return parts, gradients


@pytest.fixture(scope="module")
def small():
    return yolo.detector(64, 0, SMALL)


@pytest.mark.parametrize("counts", [(1, 3, 5), (0, 2, 0), (0, 0, 0), (9, 12, 1), (4, 4, 4)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_loss_and_gradients_are_ultralytics(small, float64, monkeypatch, counts, spread):
    criterion = their_loss(copy.deepcopy(small).double())
    monkeypatch.setattr(torch, "topk", stable_topk)
    for seed in range(4):
        for size in (64,) if seed else (96,):
            predictions, targets = random_case(seed, counts, size, spread)
            theirs = {name: torch.tensor(predictions[name], requires_grad=True) for name in ("boxes", "scores")}
            feats = [torch.tensor(feature) for feature in predictions["feats"]]
            loss, items = criterion({**theirs, "feats": feats}, their_batch(targets, size))
            loss.sum().backward()
            parts, gradients = our_loss(predictions, targets)
            for name in ("box", "cls", "dfl"):
                assert relative(parts[name], items[f"{name}_loss"]) < 1e-12, name
            assert relative(sum(parts.values()) * len(counts), loss.sum().item()) < 1e-12
            for name in theirs:
                assert relative(gradients[name] * len(counts), theirs[name].grad) < 1e-12, name


def test_loss_is_ultralytics_with_pytorchs_own_topk(small, float64):
    # Where no alignments are equal, the order of equal ones does not matter.
    criterion = their_loss(copy.deepcopy(small).double())
    for seed in range(5):
        predictions, targets = random_case(seed, (1, 3, 0), spread=3.0)
        said = {name: torch.tensor(predictions[name]) for name in ("boxes", "scores")}
        feats = [torch.tensor(feature) for feature in predictions["feats"]]
        loss, _ = criterion({**said, "feats": feats}, their_batch(targets, 64))
        assert relative(sum(our_loss(predictions, targets)[0].values()) * 3, loss.sum()) < 1e-12


def test_loss_compiles_once_for_any_number_of_objects():
    compiled = in_haste(lambda p, t: yolo_loss.detection_loss(p, t, yolo.STRIDES))
    predictions, targets = random_case(0, (3, 3))
    for counts in ((0, 0), (1, 2), (3, 3)):
        compiled(predictions, {**targets, "mask": np.arange(13) < np.array(counts)[:, None]})
    assert compiled._cache_size() == 1


def test_padding_changes_nothing():
    predictions, targets = random_case(0, (2, 3, 0))
    rubbish = np.random.default_rng(1).uniform(0, 64, targets["boxes"].shape)
    other = {
        "boxes": np.where(targets["mask"][..., None], targets["boxes"], rubbish),
        "labels": np.where(targets["mask"], targets["labels"], 2),
        "mask": targets["mask"],
    }
    for ours, theirs in zip(*map(jax.tree.leaves, map(our_loss, [predictions] * 2, [targets, other])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


our_assignment = in_haste(lambda *given: yolo_loss.assign(*given, yolo_loss.smallest_side(yolo.STRIDES)))


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_ultralytics(float64, monkeypatch, seed):
    monkeypatch.setattr(torch, "topk", stable_topk)
    rng = np.random.default_rng(seed)
    predictions, targets = random_case(seed, tuple(rng.integers(0, 13, 4)), 96)
    shapes = [feature.shape[2:] for feature in predictions["feats"]]
    points, stride = yolo_loss.anchor_points(shapes, yolo.STRIDES, jnp.float64)
    scores = rng.uniform(0, 1, (4, len(points), CLASSES))
    # Boxes near the objects, so that candidates compete, and some of no overlap at all.
    near = targets["boxes"][:, rng.integers(0, targets["boxes"].shape[1], len(points))]
    boxes = near + rng.normal(size=near.shape) * rng.choice([1, 5, 40], (4, len(points), 1))
    boxes = np.concatenate([np.minimum(boxes[..., :2], boxes[..., 2:]), np.maximum(boxes[..., :2], boxes[..., 2:])], -1)

    pixels = points * stride[:, None]
    found = our_assignment(scores, boxes, pixels, targets)
    theirs = TaskAlignedAssigner(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0, stride=list(yolo.STRIDES))(
        *map(torch.tensor, (scores, boxes, np.array(pixels))),
        torch.tensor(targets["labels"])[..., None],
        torch.tensor(targets["boxes"]),
        torch.tensor(targets["mask"].astype(float))[..., None],
    )
    _, their_boxes, their_scores, foreground, index = (x.numpy() for x in theirs)
    np.testing.assert_array_equal(found.foreground, foreground)
    np.testing.assert_array_equal(found.object, index)
    np.testing.assert_array_equal(found.boxes, their_boxes)
    np.testing.assert_allclose(found.scores, their_scores, rtol=1e-12, atol=1e-15)
    assert foreground.sum() > 10


def test_every_gradient_of_yolov8n_is_ultralytics(float64):
    module = yolo.detector(64, 0).double().train()
    batch = yolo.shapes(64, 3, 5)
    batch |= {name: batch[name].astype(np.float64) for name in ("image", "boxes")}
    batch["mask"][1] = False
    image = torch.tensor(batch["image"])
    model = interop.from_torch(module, image)
    rate = 2.0**80  # what a step of plain descent changes is then no small difference of large numbers
    state = jaxnorm.TrainState.create(model, optax.sgd(rate))

    def loss_fn(model, batch):
        losses = yolo_loss.detection_loss(model(batch["image"]), batch, yolo.STRIDES)
        return sum(losses.values()), losses

    after, metrics = in_haste(jaxnorm.train_step(loss_fn))(state, batch)
    loss, _ = their_loss(module)(module(image), their_batch(batch, 64))
    (loss.sum() / 3).backward()
    assert relative(metrics["loss"], loss.sum().item() / 3) < 1e-12
    before, ours = interop.state_dict(model), interop.state_dict(after.model())
    for name, parameter in module.named_parameters():
        if parameter.grad is None:  # of the distribution's integers, a constant
            assert not parameter.requires_grad
            continue
        assert relative((before[name] - ours[name]) / rate, parameter.grad) < 1e-9, name
    for name, buffer in module.named_buffers():
        assert relative(ours[name], buffer) < 1e-12, name


def test_replicas_have_the_loss_of_the_whole_batch():
    predictions, targets = random_case(3, (1, 0, 4, 2))

    def total(said, predictions, targets, axis_name):
        losses = yolo_loss.detection_loss({**predictions, "boxes": said}, targets, yolo.STRIDES, axis_name)
        return sum(losses.values())

    def replica(predictions, targets):
        return jax.value_and_grad(total)(predictions["boxes"], predictions, targets, "batch")

    parts = jax.tree.map(lambda x: np.asarray(x)[:, None], (predictions, targets))
    losses, gradients = in_haste(jax.vmap(replica, axis_name="batch"))(*parts)
    whole = functools.partial(total, axis_name=None)
    whole, gradient = in_haste(jax.value_and_grad(whole))(jnp.asarray(predictions["boxes"]), predictions, targets)
    assert relative(losses.mean(), whole) < 1e-12
    assert relative(gradients[:, 0] / 4, gradient) < 1e-12


def test_average_is_ultralytics():
    module = torch.nn.Linear(3, 2).double()
    theirs = ModelEMA(module, decay=0.9, tau=5)
    ema = yolo.ultralytics_ema(decay=0.9, tau=5)
    state = ema.init(_arrays(module))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        theirs.update(module)
        state = ema.update(_arrays(module), state, step)
    for name, array in _arrays(theirs.ema).items():
        np.testing.assert_allclose(ema.value(state)[name], array, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(yolo.ultralytics_ema().get_decay(3), 0.9999 * (1 - np.exp(-3 / 2000)), rtol=1e-9)


def _arrays(module):
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def test_shapes_fill_their_boxes():
    batch = yolo.shapes(96, 40, 7)
    np.testing.assert_array_equal(yolo.shapes(96, 41, 7)["image"][:40], batch["image"])
    assert not np.array_equal(yolo.shapes(96, 40, 8)["image"], batch["image"])
    assert batch["image"].dtype == np.float32 and batch["image"].min() >= 0 and batch["image"].max() <= 1
    counts = batch["mask"].sum(1)
    assert set(counts) == {1, 2, 3} and set(batch["labels"][batch["mask"]]) == {0, 1, 2}
    for image, boxes, mask in zip(batch["image"], batch["boxes"], batch["mask"], strict=True):
        background = np.median(image.reshape(3, -1)[:, _outside(boxes[mask], 96).ravel()], axis=1)
        seen = np.abs(image - background[:, None, None]).max(0) > 0.2
        assert not (seen & _outside(boxes[mask], 96)).any()
        for x1, y1, x2, y2 in boxes[mask]:
            rows, columns = np.nonzero(seen[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1])
            extent = np.array([np.ptp(columns) + 1, np.ptp(rows) + 1])
            assert (np.abs(extent - [x2 - x1, y2 - y1]) < 3).all()


def _outside(boxes, size):
    y, x = np.mgrid[:size, :size] + 0.5
    return ~np.any([(x > a) & (x < c) & (y > b) & (y < d) for a, b, c, d in boxes], axis=0)


def test_precision_of_right_and_wrong_predictions():
    tests = yolo.shapes(64, 6, 0)
    predictions = np.zeros((6, 4 + CLASSES, yolo.OBJECTS))
    boxes = tests["boxes"].transpose(0, 2, 1)
    predictions[:, :2], predictions[:, 2:4] = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    image, which = np.nonzero(tests["mask"])
    predictions[image, 4 + tests["labels"][image, which], which] = 0.9
    # 0.995 is what ap_per_class gives to perfect predictions: its curve ends at recall 1.
    np.testing.assert_allclose(yolo.mean_average_precision(predictions, tests), (0.995, 0.995), atol=1e-3)
    other = {**tests, "labels": (tests["labels"] + 1) % CLASSES}
    assert max(yolo.mean_average_precision(predictions, other)) < 0.5


def test_the_way_home(small, tmp_path, capsys):
    size = 64
    averaged = interop.from_torch(small, torch.zeros(2, 3, size, size))
    tests = yolo.shapes(size, 6, 1)
    evaluate = yolo.evaluator(averaged, tests)
    options = SimpleNamespace(out=tmp_path, image_size=size, seed=0)
    # Without training nothing is likely: the class scores are raised, here and in the module that is saved.
    bias = {name: array for name, array in interop.state_dict(averaged).items() if name.endswith("2.bias")}
    interop.load_state_dict(
        averaged, {**interop.state_dict(averaged), **{n: b + 2 for n, b in bias.items() if "cv3" in n}}
    )
    predictions, _ = evaluate(averaged)
    yolo.export_to_torch(averaged, predictions, tests, options, SMALL)
    assert "finds the same" in capsys.readouterr().out
    assert sum(len(found) for found in yolo.detections(predictions, yolo.CONFIDENCE)) > 0
    assert interop.load_checkpoint(tmp_path / "yolo.pt").keys() == interop.state_dict(averaged).keys()
    assert (tmp_path / "yolo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="different objects"):
        yolo.export_to_torch(averaged, predictions[::-1].copy(), tests, options, SMALL)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--image-size", "80"], ["--image-size", "32"]])
def test_bad_options_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["yolo.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        yolo.parse()
    assert refused.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_defaults_are_those_of_the_documentation(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["yolo.py"])
    options = yolo.parse()
    assert isinstance(options, argparse.Namespace)
    expected = {"replicas": 8, "accumulate": 2, "steps": 100, "image_size": 64, "seed": 0, "out": pathlib.Path("out")}
    assert {name: getattr(options, name) for name in expected} == expected
