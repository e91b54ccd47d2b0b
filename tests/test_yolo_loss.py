"""Every loss of examples/yolo_loss against Ultralytics' own class, on the same predictions and targets."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yolo_loss
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG, LOGGER
from ultralytics.utils import loss as theirs
from ultralytics.utils.tal import TaskAlignedAssigner

LOGGER.setLevel("ERROR")
STRIDES, CLASSES, PROTOTYPES = (8, 16, 32), 3, 4
BACKBONE = [
    *([-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]),
    *([-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]),
]
LOSSES = {
    "detect": yolo_loss.detection_loss,
    "segment": yolo_loss.segmentation_loss,
    "pose": yolo_loss.pose_loss,
    "obb": yolo_loss.rotated_loss,
}
HEADS = {
    "detect": ("Detect", ["nc"]),
    "segment": ("Segment", ["nc", PROTOTYPES, 8]),
    "pose": ("Pose", ["nc", "kpt_shape"]),
    "obb": ("OBB", ["nc", 1]),
}
MODELS = {
    "detect": tasks.DetectionModel,
    "segment": tasks.SegmentationModel,
    "pose": tasks.PoseModel,
    "obb": tasks.OBBModel,
}
# Compiling takes longer than running here.
in_haste = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@pytest.fixture
def float64(monkeypatch):
    """Ultralytics makes its targets and sums in torch's default dtype, and rounds masks and keypoints by `float()`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def stable(monkeypatch):
    """torch.topk with the first of equal values first, which torch.topk itself leaves open."""

    def topk(values, k, dim=-1, largest=True):
        values, indices = torch.sort(values, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    monkeypatch.setattr(torch, "topk", topk)


@functools.cache
def small(task, reg_max=16, kpt_shape=(4, 3)):
    """A model of three levels and the task's head: what Ultralytics' classes ask for their settings."""
    head, arguments = HEADS[task]
    cfg = {"nc": CLASSES, "reg_max": reg_max, "kpt_shape": list(kpt_shape), "backbone": BACKBONE}
    module = MODELS[task]({**cfg, "head": [[[2, 3, 4], 1, head, arguments]]}, nc=CLASSES, verbose=False)
    module.args = copy.deepcopy(DEFAULT_CFG)  # where the gains are
    return module


def random_targets(task, counts, size, seed, keypoints=4, room=13):
    """Padded targets with `counts` objects in the images."""
    rng = np.random.default_rng([seed, 1])
    batch = len(counts)
    side = rng.uniform(0.05, 0.7, (batch, room, 2))
    centre = rng.uniform(side / 2, 1 - side / 2)
    mask = np.arange(room) < np.array(counts)[:, None]
    boxes = np.concatenate([centre - side / 2, centre + side / 2], -1) * size
    if task == "obb":
        side[:, 1] *= rng.choice([0.1, 1], (batch, 2))  # some too small, to be left out
        angle = rng.uniform(-np.pi / 4, 3 * np.pi / 4, (batch, room, 1))
        boxes = np.concatenate([centre * size, side * size, angle], -1)
    targets = {
        "boxes": np.where(mask[..., None], boxes, 0),
        "labels": np.where(mask, rng.integers(0, CLASSES, (batch, room)), 0),
        "mask": mask,
    }
    if task == "segment":
        cells = size // 4
        targets["masks"] = rng.integers(0, np.array(counts)[:, None, None] + 1, (batch, cells, cells))
    if task == "pose":
        places = rng.uniform(0, size, (batch, room, keypoints, 2))
        seen = rng.integers(0, 3, (batch, room, keypoints, 1)) * rng.integers(0, 2, (batch, room, 1, 1))
        targets["keypoints"] = np.concatenate([places, seen], -1)
    return targets


def random_predictions(task, batch, size, seed, spread=1.0, bins=16, keypoints=(4, 3)):
    """Predictions as a head makes them."""
    rng = np.random.default_rng([seed, 0])
    shapes = [(size // stride, size // stride) for stride in STRIDES]
    anchors = sum(height * width for height, width in shapes)
    said = {
        "boxes": rng.normal(size=(batch, 4 * bins, anchors)) * spread,
        "scores": rng.normal(size=(batch, CLASSES, anchors)),
        "feats": [np.zeros((batch, 1, *shape)) for shape in shapes],
    }
    if bins == 1:
        said["boxes"] = np.abs(said["boxes"]) * 2
    if task == "segment":
        said["mask_coefficient"] = rng.normal(size=(batch, PROTOTYPES, anchors))
        said["proto"] = rng.normal(size=(batch, PROTOTYPES, size // 4, size // 4))
    if task == "pose":
        said["kpts"] = rng.normal(size=(batch, keypoints[0] * keypoints[1], anchors))
    if task == "obb":
        said["angle"] = rng.uniform(-np.pi / 4, 3 * np.pi / 4, (batch, 1, anchors))
    return said


def their_batch(targets, size):
    """The targets as Ultralytics' data loader gives them."""
    image, which = np.nonzero(targets["mask"])
    boxes = targets["boxes"][image, which]
    if boxes.shape[-1] == 5:
        normalised = boxes / [size, size, size, size, 1]
    else:
        sides = boxes[:, 2:] - boxes[:, :2]
        normalised = np.concatenate([boxes[:, :2] + sides / 2, sides], -1) / size
    labels = targets["labels"][image, which].astype(float)[:, None]
    batch = {"batch_idx": torch.tensor(image), "cls": torch.tensor(labels), "bboxes": torch.tensor(normalised)}
    if "masks" in targets:
        masks = targets["masks"] if targets["masks"].ndim == 3 else targets["masks"][image, which]
        batch["masks"] = torch.tensor(masks)
    if "keypoints" in targets:
        keypoints = targets["keypoints"][image, which].copy()
        keypoints[..., :2] /= size
        batch["keypoints"] = torch.tensor(keypoints)
    return batch


def relative(ours, expected):
    expected = np.asarray(expected)
    return np.linalg.norm(np.asarray(ours) - expected) / max(np.linalg.norm(expected), 1e-300)


def leaves(said):
    """The arrays that a head says, by name; its feature maps are there for their shapes."""
    found = {}
    for name, value in said.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": array for inner, array in leaves(value).items()}
        elif name != "feats":
            found[name] = value
    return found


def with_leaves(said, arrays):
    found = dict(said)
    for name, array in arrays.items():
        first, _, rest = name.partition(".")
        found[first] = with_leaves(found[first], {rest: array}) if rest else array
    return found


@functools.cache
def compiled(loss, strides=STRIDES):
    """The parts of a loss, and the gradient of their sum with respect to all that the head says."""

    @in_haste
    def value_and_gradients(said, targets):
        def total(arrays):
            parts = loss(with_leaves(said, arrays), targets, strides)
            return sum(parts.values()), parts

        (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(leaves(said))
        return parts, gradients

    return value_and_gradients


def agree(loss, criterion, said, targets, size, tolerance=1e-12, shown=True, strides=STRIDES):
    """Our loss and Ultralytics': every part, their sum, and the gradient with respect to each array of the head.

    `shown`: whether the parts that Ultralytics shows are those of the loss.
    """
    tensors = jax.tree.map(torch.tensor, said)
    arrays = leaves(tensors)
    for tensor in arrays.values():
        tensor.requires_grad_()
    total, items = criterion(tensors, their_batch(targets, size))
    total.sum().backward()
    parts, gradients = compiled(loss, strides)(said, targets)
    images = len(targets["mask"])
    assert {f"{name}_loss" for name in parts} <= items.keys()
    if shown:
        for name, value in items.items():  # ours has no semantic loss: it is YOLO26's, and 0 here
            assert relative(parts.get(name.removesuffix("_loss"), 0), value) < tolerance, name
    assert relative(sum(parts.values()) * images, total.sum().item()) < tolerance
    for name, tensor in arrays.items():
        expected = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        assert relative(gradients[name] * images, expected) < tolerance, name


@pytest.mark.parametrize("counts", [(1, 3, 5), (0, 2, 0), (0, 0, 0), (9, 12, 1), (4, 4, 4)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("task", LOSSES)
def test_loss_and_gradients_are_ultralytics(float64, stable, task, counts, spread):
    criterion = small(task).double().init_criterion()
    for seed in range(3):
        said = random_predictions(task, len(counts), 64, seed, spread)
        agree(LOSSES[task], criterion, said, random_targets(task, counts, 64, seed), 64)


@pytest.mark.parametrize("task", ["segment", "pose"])
def test_loss_is_ultralytics_as_it_rounds(stable, task):
    # Masks and keypoints in float32, as Ultralytics has them whatever the model computes in.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        criterion = small(task).double().init_criterion()
        said, targets = random_predictions(task, 3, 64, 0, 3.0), random_targets(task, (1, 3, 2), 64, 0)
        agree(LOSSES[task], criterion, said, targets, 64, 1e-6)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "architecture, task",
    [
        *((name, "detect") for name in ("yolov3-tiny", "yolov5n", "yolov8n", "yolov9t", "yolo11n", "yolo12n")),
        *((f"{name}-seg", "segment") for name in ("yolov8n", "yolo11n", "yolo12n")),
        *((f"{name}-pose", "pose") for name in ("yolov8n", "yolo11n", "yolo12n")),
        *((f"{name}-obb", "obb") for name in ("yolov8n", "yolo11n", "yolo12n")),
        *(("yolov10n", "detect"), ("yolo26n", "detect"), ("yolo26n-obb", "obb")),
    ],
)
def test_loss_of_every_family_is_ultralytics(float64, stable, architecture, task):
    module = MODELS[task](f"{architecture}.yaml", nc=CLASSES, verbose=False).double().train()
    module.args = copy.deepcopy(DEFAULT_CFG)
    with torch.no_grad():
        said = module(torch.rand(2, 3, 64, 64))
    said = jax.tree.map(np.asarray, said)
    for head in (said,) if "feats" in said else said.values():
        head["feats"] = [np.zeros((2, 1, *feature.shape[2:])) for feature in head["feats"]]
    strides = tuple(int(stride) for stride in module.stride)
    ends = "one2one" in said
    loss = functools.partial(yolo_loss.end_to_end_loss, LOSSES[task]) if ends else LOSSES[task]
    targets = random_targets(task, (3, 5), 64, 0, keypoints=17)
    agree(loss, module.init_criterion(), said, targets, 64, shown=not ends, strides=strides)


def test_end_to_end_follows_ultralytics_schedule(float64, stable):
    module = tasks.DetectionModel("yolov10n.yaml", nc=CLASSES, verbose=False).double()
    module.args = copy.deepcopy(DEFAULT_CFG)
    module.args.epochs = 5
    criterion = module.init_criterion()
    said = {name: random_predictions("detect", 2, 64, seed) for seed, name in enumerate(("one2many", "one2one"))}
    targets = random_targets("detect", (9, 4), 64, 0)
    for epoch in range(7):
        many = yolo_loss.share_of_many(epoch, 5)
        np.testing.assert_allclose(many, criterion.o2m, rtol=1e-15)
        if epoch in (0, 3):
            loss = functools.partial(yolo_loss.end_to_end_loss, yolo_loss.detection_loss, many=many)
            agree(loss, criterion, said, targets, 64, shown=False)
        criterion.update()


@pytest.mark.parametrize("bins", [16, 1])
@pytest.mark.parametrize("task", ["detect", "obb"])
def test_options_are_ultralytics(float64, stable, task, bins):
    module = small(task, reg_max=bins).double()
    module.args.box, module.args.cls, module.args.dfl, module.args.angle = 2.0, 3.0, 4.0, 5.0
    module.class_weights = torch.tensor([0.5, 1.0, 3.0])
    criterion = module.init_criterion()
    del module.class_weights
    gains = {**yolo_loss.GAINS, "box": 2.0, "cls": 3.0, "dfl": 4.0, "angle": 5.0}
    loss = functools.partial(LOSSES[task], gains=gains, class_weights=np.array([0.5, 1.0, 3.0]))
    module.args = copy.deepcopy(DEFAULT_CFG)
    for seed in range(3):
        said = random_predictions(task, 2, 64, seed, bins=bins)
        agree(loss, criterion, said, random_targets(task, (3, 5), 64, seed), 64)


@pytest.mark.parametrize("size", [16, 32])
def test_masks_one_for_each_object(float64, stable, size):
    # Of twice the prototypes' size they are Ultralytics' where `mask_ratio` is 2.
    module = small("segment").double()
    module.args.overlap_mask = False
    criterion = module.init_criterion()
    module.args.overlap_mask = True
    targets = random_targets("segment", (3, 5), 64, 0)
    masks = np.random.default_rng(0).integers(0, 2, (2, 13, size, size))
    targets["masks"] = np.where(targets["mask"][..., None, None], masks, 0)
    agree(yolo_loss.segmentation_loss, criterion, random_predictions("segment", 2, 64, 0), targets, 64)


def test_masks_of_another_size_than_the_prototypes(float64, stable):
    targets = random_targets("segment", (3, 5), 64, 0)
    targets["masks"] = np.random.default_rng(0).integers(0, 6, (2, 40, 40))
    said = random_predictions("segment", 2, 64, 0)
    agree(yolo_loss.segmentation_loss, small("segment").double().init_criterion(), said, targets, 64)


@pytest.mark.parametrize("kpt_shape, sigmas", [((17, 3), None), ((5, 2), None), ((4, 3), (0.1, 0.2, 0.3, 0.4))])
def test_keypoints_of_other_kinds(float64, stable, kpt_shape, sigmas):
    module = copy.deepcopy(small("pose", kpt_shape=kpt_shape))
    if sigmas is not None:
        module.kpt_oks_sigmas, sigmas = sigmas, np.float32(sigmas)  # which Ultralytics rounds them to
    loss = functools.partial(yolo_loss.pose_loss, sigmas=sigmas)
    targets = random_targets("pose", (3, 5), 64, 0, keypoints=kpt_shape[0])
    targets["keypoints"] = targets["keypoints"][..., : kpt_shape[1]]
    said = random_predictions("pose", 2, 64, 0, keypoints=kpt_shape)
    agree(loss, module.double().init_criterion(), said, targets, 64)


def test_classification_is_ultralytics(float64):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(5, 7)) * 3, rng.integers(0, 7, 5)
    tensor = torch.tensor(logits, requires_grad=True)
    expected, _ = theirs.v8ClassificationLoss()(tensor, {"cls": torch.tensor(label)})
    expected.backward()
    ours, gradient = jax.value_and_grad(lambda x: yolo_loss.classification_loss(x, {"label": label})["cls"])(logits)
    assert relative(ours, expected.item()) < 1e-12 and relative(gradient, tensor.grad) < 1e-12
    in_evaluation = yolo_loss.classification_loss((jax.nn.softmax(logits), logits), {"label": label})["cls"]
    np.testing.assert_array_equal(in_evaluation, ours)
