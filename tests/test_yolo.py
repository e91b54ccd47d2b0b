"""The pieces of examples/yolo.py: every task in, trained, measured and home. test_yolo_loss.py has the losses."""

import argparse
import copy
import functools
import pathlib
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import torch
import yolo
import yolo_data
import yolo_tasks
from page_reader import programs
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import ModelEMA
from yolo_tasks import TASKS

import interop
import jaxnorm

pytestmark = pytest.mark.once

CLASSES = len(yolo_data.NAMES)
# Compiling takes longer than running here.
in_haste = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def small(task):
    """An architecture of three levels and the task's head, small enough to compile in seconds."""
    backbone = [
        *([-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]),
        *([-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]),
    ]
    heads = {
        "detect": ("Detect", ["nc"]),
        "segment": ("Segment", ["nc", 4, 8]),
        "pose": ("Pose", ["nc", "kpt_shape"]),
        "obb": ("OBB", ["nc", 1]),
        "classify": ("Classify", ["nc"]),
    }
    levels = -1 if task == "classify" else [2, 3, 4]
    return {"nc": CLASSES, "kpt_shape": [3, 3], "backbone": backbone, "head": [[levels, 1, *heads[task]]]}


@pytest.fixture
def float64(monkeypatch):
    """Ultralytics makes its targets and sums in torch's default dtype, and rounds masks and keypoints by `float()`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(before)


def relative(ours, theirs):
    theirs = np.asarray(theirs)
    return np.linalg.norm(np.asarray(ours) - theirs) / max(np.linalg.norm(theirs), 1e-300)


def their_batch(batch):
    """A batch as Ultralytics' data loader gives it."""
    if "label" in batch:
        return {"cls": torch.tensor(batch["label"].astype(int))}
    image, which = np.nonzero(batch["mask"])
    size, boxes = batch["image"].shape[2], batch["boxes"][image, which]
    if boxes.shape[1] == 4:
        boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1)
    boxes[:, :4] /= size
    return {
        "batch_idx": torch.tensor(image),
        "cls": torch.tensor(batch["labels"][image, which].astype(float)[:, None]),
        "bboxes": torch.tensor(boxes),
        "masks": torch.tensor(batch["masks"]),
        "keypoints": torch.tensor(batch["keypoints"][image, which] / [size, size, 1]),
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_gradient_of_a_trained_model_is_ultralytics(float64, task):
    module = yolo_tasks.module(task, 64, 0, small(task)).double()
    module.args = copy.deepcopy(DEFAULT_CFG)  # where the gains are
    batch = yolo.shapes(64, 3, 5, task)
    batch |= {name: array.astype(np.float64) for name, array in batch.items() if array.dtype == np.float32}
    if task != "classify":
        batch["mask"][1], batch["masks"][1] = False, 0
    image = torch.tensor(batch["image"])
    model = interop.from_torch(module, image)
    rate = 2.0**80  # what a step of plain descent changes is then no small difference of large numbers
    state = jaxnorm.TrainState.create(model, optax.sgd(rate))
    strides = yolo_tasks.strides(module)

    def loss_fn(model, batch):
        losses = TASKS[task].loss(model(batch["image"]), batch, strides)
        return sum(losses.values()), losses

    after, metrics = in_haste(jaxnorm.train_step(loss_fn))(state, batch)
    images = 1 if task == "classify" else 3  # all other losses are Ultralytics' divided by the images
    loss, _ = module.init_criterion()(module(image), their_batch(batch))
    (loss.sum() / images).backward()
    assert relative(metrics["loss"], loss.sum().item() / images) < 1e-12
    before, ours = interop.state_dict(model), interop.state_dict(after.model())
    for name, parameter in module.named_parameters():
        if parameter.grad is None:  # of the distribution's integers, a constant
            assert not parameter.requires_grad
            continue
        assert relative((before[name] - ours[name]) / rate, parameter.grad) < 1e-9, name
    for name, buffer in module.named_buffers():
        assert relative(ours[name], buffer) < 1e-12, name


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


def test_masks_and_keypoints_are_those_of_the_shapes():
    batch = yolo.shapes(96, 40, 7)
    for i, (image, mask) in enumerate(zip(batch["image"], batch["mask"], strict=True)):
        for j in np.flatnonzero(mask):
            cells = batch["masks"][i] == j + 1
            # A shape has one colour, also in cells at its border: one of the pixels around their centre is inside.
            around = np.stack([image[:, 1 + k :: 4, 1 + l :: 4][:, cells] for k in (0, 1) for l in (0, 1)])
            colour = np.median(around, axis=(0, 2), keepdims=True)
            assert (np.abs(around - colour).max(1).min(0) < 0.02).all()
            x1, y1, x2, y2 = batch["boxes"][i, j]
            share = {"circle": np.pi / 4, "square": 1, "triangle": 0.5}[yolo_data.NAMES[batch["labels"][i, j]]]
            assert abs(cells.sum() * 16 / ((x2 - x1) * (y2 - y1)) - share) < 0.15
            (top, left, right), edge = batch["keypoints"][i, j], 1e-3
            np.testing.assert_allclose(top[:2], [(x1 + x2) / 2, y1], atol=edge)
            assert x1 - edge <= left[0] < top[0] < right[0] <= x2 + edge and left[1] == right[1] <= y2 + edge
    assert (batch["masks"].max((1, 2)) == batch["mask"].sum(1)).all()


def test_turned_shapes_fill_their_boxes():
    batch = yolo.shapes(96, 30, 3, "obb")
    y, x = np.mgrid[:96, :96] + 0.5
    for image, boxes, mask in zip(batch["image"], batch["boxes"], batch["mask"], strict=True):
        corners = yolo_corners(boxes[mask])
        assert (corners > 0).all() and (corners < 96).all()
        outside = np.ones((96, 96), bool)
        for centre_x, centre_y, width, height, angle in boxes[mask]:
            u = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
            v = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
            outside &= (np.abs(u) > width / 2) | (np.abs(v) > height / 2)
        background = np.median(image[:, outside], axis=1)
        seen = np.abs(image - background[:, None, None]).max(0) > 0.2
        assert not (seen & outside).any() and seen.sum() > 0.3 * (~outside).sum()


def yolo_corners(boxes):
    from ultralytics.utils.ops import xywhr2xyxyxyxy

    return xywhr2xyxyxyxy(boxes)


def _right(task, tests):
    """What a perfect model finds."""
    if task == "classify":
        return [{"probabilities": np.eye(CLASSES)[label]} for label in tests["label"]]
    found = []
    for i, mask in enumerate(tests["mask"]):
        scores = np.stack([np.full(mask.sum(), 0.9), tests["labels"][i][mask]], -1)
        image = {"boxes": np.concatenate([tests["boxes"][i][mask], scores], -1).astype(np.float32)}
        if task == "segment":
            cells = tests["masks"][i] == np.flatnonzero(mask)[:, None, None] + 1
            image["masks"] = cells.repeat(4, 1).repeat(4, 2).astype(np.uint8)
        if task == "pose":
            image["keypoints"] = tests["keypoints"][i][mask]
        found.append(image)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_right_and_wrong_predictions(task):
    tests = yolo.shapes(64, 6, 0, task)
    right = _right(task, tests)
    # 0.995 is what ap_per_class gives to perfect predictions: its curve ends at recall 1.
    wanted = {"top-1": 1} if task == "classify" else {"mAP50": 0.995, "mAP50-95": 0.995}
    assert TASKS[task].scores(right, tests) == pytest.approx(wanted, abs=1e-3)
    name = "label" if task == "classify" else "labels"
    other = {**tests, name: (tests[name] + 1) % CLASSES}
    assert max(TASKS[task].scores(right, other).values()) < 0.5
    added = {"segment": "masks", "pose": "keypoints"}.get(task)
    if added:  # right boxes are not enough
        away = [{**image, added: image[added][:, ::-1] // 2} for image in right]
        assert max(TASKS[task].scores(away, tests).values()) < 0.5


def test_a_run_trains_and_is_summarised():
    module = yolo_tasks.module("segment", 64, 0, small("segment"))
    strides = yolo_tasks.strides(module)
    model = interop.from_torch(module, torch.zeros(2, 3, 64, 64))
    synchronised = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    batches = list(yolo.drawn(64, 2, 3, 0, "segment"))
    run = yolo.train(synchronised, yolo.loss_of("segment", strides), batches, 1, yolo.replica_devices(2), "segment")
    # Whether each step was the right one, test_every_gradient says. The loss need not fall at once: what it is divided
    # by, the sum of the target scores, moves with the predictions.
    assert np.isfinite(run.loss).all() and len(run.loss) == 3
    tests = yolo.shapes(64, 4, 1, "segment")
    figures = yolo.summary(run, tests, yolo.evaluator(model, tests, "segment", strides), "segment")
    assert figures["layers whose statistics differ between replicas"] == 0
    assert {"EMA, pooled: loss", "EMA, pooled: mAP50", "EMA, pooled: mAP50-95"} <= figures.keys()


@pytest.mark.parametrize("task", TASKS)
def test_the_way_home(task, tmp_path, capsys):
    size, architecture = 64, small(task)
    module = yolo_tasks.module(task, size, 0, architecture)
    model = interop.from_torch(module, torch.zeros(2, 3, size, size))
    tests = yolo.shapes(size, 6, 1, task)
    evaluate = yolo.evaluator(model, tests, task, yolo_tasks.strides(module))
    # Without training nothing is likely: the class scores are raised, here and in the module that is saved.
    raised = {name: array + 2 for name, array in interop.state_dict(model).items() if _class_bias(name)}
    interop.load_state_dict(model, {**interop.state_dict(model), **raised})
    predictions, _ = evaluate(model)
    options = SimpleNamespace(out=tmp_path, image_size=size, seed=0, task=task)
    yolo.export_to_torch(model, predictions, tests, options, architecture)
    assert "finds the same" in capsys.readouterr().out
    found = TASKS[task].found(predictions, size, yolo.CONFIDENCE)
    assert sum(len(image.get("boxes", [0])) for image in found) > 0
    assert interop.load_checkpoint(tmp_path / "yolo.pt").keys() == interop.state_dict(model).keys()
    assert (tmp_path / "yolo.png").read_bytes().startswith(b"\x89PNG")


def _class_bias(name):
    return "cv3" in name and name.endswith("2.bias")


def test_other_findings_end_the_export():
    right = _right("detect", yolo.shapes(64, 4, 0))
    assert yolo.compare(right, right) == {"boxes": 0, "scores": 0}
    other = copy.deepcopy(right)
    other[1]["boxes"][0, -1] = 2 - other[1]["boxes"][0, -1] % 2
    for wrong in (right[::-1], other, [{**image, "masks": image["boxes"]} for image in right]):
        with pytest.raises(SystemExit, match="different objects"):
            yolo.compare(right, wrong)


def test_other_probabilities_end_the_export():
    right = _right("classify", yolo.shapes(64, 4, 0, "classify"))
    with pytest.raises(SystemExit, match="different objects"):
        yolo.compare(right, [{"probabilities": image["probabilities"][::-1]} for image in right])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "segment", "--model", "yolov5n"], "no architecture yolov5n-seg.yaml"),
        (["--model", "yolov10n"], "one-to-one branch.*end_to_end_loss"),
        (["--model", "yolo26n", "--task", "pose"], "one-to-one branch"),
    ],
)
def test_models_that_are_not_there_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["yolo.py", *arguments])
    with pytest.raises(SystemExit):
        yolo.parse()
    assert re.search(message, capsys.readouterr().err)


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
    expected = {
        "task": "detect",
        "model": "yolov8n",
        "synchronised": False,
        "replicas": 8,
        "accumulate": 2,
        "steps": 100,
        "image_size": 64,
        "seed": 0,
        "out": pathlib.Path("out"),
    }
    assert {name: getattr(options, name) for name in expected} == expected


def test_the_program_of_the_page(monkeypatch):
    (program,) = programs("docs/yolo.md")
    monkeypatch.setattr(sys, "path", [*sys.path])
    # The architecture is the small one here, which compiles in seconds.
    names = {"small": small("pose")}
    program._replace(text=program.text.replace('"yolov8n-pose.yaml"', "small")).run(names)
    assert names["metrics"].keys() >= {"loss", "box", "cls", "dfl", "pose", "kobj"}
    assert np.isfinite(names["metrics"]["loss"])
