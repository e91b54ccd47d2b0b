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

pytestmark = pytest.mark.once

LOGGER.setLevel("ERROR")
STRIDES, CLASSES, PROTOTYPES, KEYPOINTS = (8, 16, 32), 3, 32, (17, 3)
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
def small(task, kpt_shape=KEYPOINTS):
    """A model of three levels and the task's head: what Ultralytics' classes ask for their settings."""
    head, arguments = HEADS[task]
    cfg = {"nc": CLASSES, "kpt_shape": list(kpt_shape), "backbone": BACKBONE}
    module = MODELS[task]({**cfg, "head": [[[2, 3, 4], 1, head, arguments]]}, nc=CLASSES, verbose=False)
    module.args = copy.deepcopy(DEFAULT_CFG)  # where the gains are
    return module


def random_targets(task, counts, size, seed, keypoints=KEYPOINTS, room=13):
    """Padded targets with `counts` objects in the images."""
    rng = np.random.default_rng([seed, 1])
    batch = len(counts)
    side = rng.uniform(0.05, 0.7, (batch, room, 2))
    centre = rng.uniform(side / 2, 1 - side / 2)
    mask = np.arange(room) < np.array(counts)[:, None]
    boxes = np.concatenate([centre - side / 2, centre + side / 2], -1) * size
    if task == "segment" and seed % 2 == 0:  # borders on those of a mask's cells
        boxes = np.round(boxes / 4) * 4
        boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 4)
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
        places = rng.uniform(0, size, (batch, room, keypoints[0], 2))
        seen = rng.integers(0, 3, (batch, room, keypoints[0], 1)) * rng.integers(0, 2, (batch, room, 1, 1))
        targets["keypoints"] = np.concatenate([places, seen], -1)[..., : keypoints[1]]
    return targets


def random_predictions(task, batch, size, seed, spread=1.0, keypoints=KEYPOINTS):
    """Predictions as a head makes them."""
    rng = np.random.default_rng([seed, 0])
    shapes = [(size // stride, size // stride) for stride in STRIDES]
    anchors = sum(height * width for height, width in shapes)
    said = {
        "boxes": rng.normal(size=(batch, 64, anchors)) * spread,
        "scores": rng.normal(size=(batch, CLASSES, anchors)),
        "feats": [np.zeros((batch, 1, *shape)) for shape in shapes],
    }
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
def compiled(loss, strides):
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
    for seed in range(2):
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
        said = module(torch.rand(3, 3, 64, 64))
    said = jax.tree.map(np.asarray, said)
    for head in (said,) if "feats" in said else said.values():
        head["feats"] = [np.zeros((3, 1, *feature.shape[2:])) for feature in head["feats"]]
    strides = tuple(int(stride) for stride in module.stride)
    ends = "one2one" in said
    loss, criterion = LOSSES[task], module.init_criterion()
    if ends:
        criterion.one2one.hyp.epochs = 5
        criterion.update()
        loss = functools.partial(yolo_loss.end_to_end_loss, loss, many=yolo_loss.share_of_many(1, 5))
    targets = random_targets(task, (3, 0, 9), 64, 0)
    agree(loss, criterion, said, targets, 64, shown=not ends, strides=strides)


def test_end_to_end_follows_ultralytics_schedule():
    module = tasks.DetectionModel("yolov10n.yaml", nc=CLASSES, verbose=False)
    module.args = copy.deepcopy(DEFAULT_CFG)
    for module.args.epochs in (5, 1):
        criterion = module.init_criterion()
        for epoch in range(7):
            np.testing.assert_allclose(yolo_loss.share_of_many(epoch, module.args.epochs), criterion.o2m, rtol=1e-15)
            criterion.update()


@pytest.mark.parametrize("task", ["segment", "obb"])
def test_options_are_ultralytics(float64, stable, task):
    module = small(task).double()
    module.args.box, module.args.cls, module.args.dfl, module.args.angle = 2.0, 3.0, 4.0, 5.0
    module.class_weights = torch.tensor([0.5, 1.0, 3.0])
    criterion = module.init_criterion()
    del module.class_weights
    gains = {**yolo_loss.GAINS, "box": 2.0, "cls": 3.0, "dfl": 4.0, "angle": 5.0}
    loss = functools.partial(LOSSES[task], gains=gains, class_weights=np.array([0.5, 1.0, 3.0]))
    module.args = copy.deepcopy(DEFAULT_CFG)
    for seed in range(3):
        said = random_predictions(task, 2, 64, seed)
        agree(loss, criterion, said, random_targets(task, (3, 5), 64, seed), 64)


def test_masks_one_for_each_object(float64, stable):
    module = small("segment").double()
    module.args.overlap_mask = False
    criterion = module.init_criterion()
    module.args.overlap_mask = True
    targets = random_targets("segment", (3, 5), 64, 0)
    masks = np.random.default_rng(0).integers(0, 2, (2, 13, 16, 16))
    targets["masks"] = np.where(targets["mask"][..., None, None], masks, 0)
    agree(yolo_loss.segmentation_loss, criterion, random_predictions("segment", 2, 64, 0), targets, 64)


def test_masks_of_another_size_than_the_prototypes(float64, stable):
    targets = random_targets("segment", (3, 5), 64, 0)
    targets["masks"] = np.random.default_rng(0).integers(0, 6, (2, 40, 40))
    said = random_predictions("segment", 2, 64, 0)
    agree(yolo_loss.segmentation_loss, small("segment").double().init_criterion(), said, targets, 64)


@pytest.mark.parametrize("kpt_shape, sigmas", [((5, 2), None), ((4, 3), (0.1, 0.2, 0.3, 0.4))])
def test_keypoints_of_other_kinds(float64, stable, kpt_shape, sigmas):
    module = copy.deepcopy(small("pose", kpt_shape=kpt_shape))
    if sigmas is not None:
        module.kpt_oks_sigmas, sigmas = sigmas, np.float32(sigmas)  # which Ultralytics rounds them to
    loss = functools.partial(yolo_loss.pose_loss, sigmas=sigmas)
    targets = random_targets("pose", (3, 5), 64, 0, kpt_shape)
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


def test_loss_is_ultralytics_with_pytorchs_own_topk(float64):
    # Where no alignments are equal, the order of equal ones does not matter.
    criterion = small("detect").double().init_criterion()
    for seed in range(5):
        said, targets = random_predictions("detect", 3, 64, seed, 3.0), random_targets("detect", (1, 3, 0), 64, seed)
        agree(yolo_loss.detection_loss, criterion, said, targets, 64)


@pytest.mark.parametrize("task", LOSSES)
def test_padding_changes_nothing(task):
    said, targets = random_predictions(task, 3, 64, 0), random_targets(task, (2, 3, 0), 64, 0)
    rng = np.random.default_rng(1)
    other = {**targets, "labels": np.where(targets["mask"], targets["labels"], 2)}
    for name in {"boxes", "keypoints"} & targets.keys():
        real = targets["mask"].reshape(*targets["mask"].shape, *[1] * (targets[name].ndim - 2))
        other[name] = np.where(real, targets[name], rng.uniform(0, 64, targets[name].shape))
    both = [compiled(LOSSES[task], STRIDES)(said, given) for given in (targets, other)]
    for ours, padded in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(ours, padded)


@pytest.mark.parametrize("task", LOSSES)
def test_loss_compiles_once_for_any_number_of_objects(task):
    # Whatever a test before has put there: no compilation more.
    function = compiled(LOSSES[task], STRIDES)
    said = random_predictions(task, 3, 64, 0)
    function(said, random_targets(task, (0, 0, 0), 64, 0))
    before = function._cache_size()
    for counts in ((0, 1, 2), (9, 3, 13)):
        function(said, random_targets(task, counts, 64, 0))
    assert function._cache_size() == before


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_replicas_have_the_loss_of_the_whole_batch(task):
    said, targets = random_predictions(task, 3, 64, 3), random_targets(task, (1, 0, 4), 64, 3)

    def total(arrays, said, targets):
        return sum(LOSSES[task](with_leaves(said, arrays), targets, STRIDES, "batch").values())

    def replica(said, targets):
        return jax.value_and_grad(total)(leaves(said), said, targets)

    parts = jax.tree.map(lambda x: np.asarray(x)[:, None], (said, targets))
    losses, gradients = in_haste(jax.vmap(replica, axis_name="batch"))(*parts)
    whole, expected = compiled(LOSSES[task], STRIDES)(said, targets)
    assert relative(losses.mean(), sum(whole.values())) < 1e-12
    for name, gradient in expected.items():
        assert relative(gradients[name][:, 0] / 3, gradient) < 1e-12, name


our_assignment = in_haste(lambda *given: yolo_loss.assign(*given, yolo_loss.smallest_side(STRIDES)))


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_ultralytics(float64, stable, seed):
    rng = np.random.default_rng(seed)
    targets = random_targets("detect", tuple(rng.integers(0, 13, 4)), 96, seed)
    shapes = [(96 // stride, 96 // stride) for stride in STRIDES]
    points, stride = yolo_loss.anchor_points(shapes, STRIDES, jnp.float64)
    scores = rng.uniform(0, 1, (4, len(points), CLASSES))
    # Boxes near the objects, so that candidates compete, and some of no overlap at all.
    near = targets["boxes"][:, rng.integers(0, targets["boxes"].shape[1], len(points))]
    boxes = near + rng.normal(size=near.shape) * rng.choice([1, 5, 40], (4, len(points), 1))
    boxes = np.concatenate([np.minimum(boxes[..., :2], boxes[..., 2:]), np.maximum(boxes[..., :2], boxes[..., 2:])], -1)

    pixels = points * stride[:, None]
    found = our_assignment(scores, boxes, pixels, targets)
    assigned = TaskAlignedAssigner(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0, stride=list(STRIDES))(
        *map(torch.tensor, (scores, boxes, np.array(pixels))),
        torch.tensor(targets["labels"])[..., None],
        torch.tensor(targets["boxes"]),
        torch.tensor(targets["mask"].astype(float))[..., None],
    )
    _, their_boxes, their_scores, foreground, index = (x.numpy() for x in assigned)
    np.testing.assert_array_equal(found.foreground, foreground)
    np.testing.assert_array_equal(found.object, index)
    np.testing.assert_array_equal(found.boxes, their_boxes)
    np.testing.assert_allclose(found.scores, their_scores, rtol=1e-12, atol=1e-15)
    assert foreground.sum() > 10


def _changed(task, said=None, targets=None, strides=STRIDES):
    """A loss of a case in which something is wrong; None removes."""
    case = random_predictions(task, 2, 64, 0), random_targets(task, (1, 2), 64, 0)
    changed = [
        {k: v for k, v in {**had, **(new or {})}.items() if v is not None}
        for had, new in zip(case, (said, targets), strict=True)
    ]
    return LOSSES[task](*changed, strides)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _changed("detect", strides=(8, 16)), "84 anchors and 3 levels .* strides .8, 16.*model.stride"),
        (lambda: _changed("detect", strides=(4, 8, 16, 32)), "do not go with strides"),
        (lambda: _changed("segment", {"proto": None}), "Segment head says .*proto.*only boxes, scores"),
        (lambda: _changed("pose", {"kpts": None}), "Pose head says .*kpts"),
        (lambda: _changed("obb", {"angle": None}), "OBB head says .*angle"),
        (lambda: _changed("detect", {"one2many": {}}), "one-to-one branch.*end_to_end_loss"),
        (lambda: _changed("segment", {"proto": (0, 0)}), "Segment26"),
        (lambda: _changed("pose", {"kpts_sigma": 0}), "Pose26"),
        (
            lambda: _changed("detect", targets={"boxes": np.zeros((2, 13, 5))}),
            r"boxes'\] is \(2, 13, 5\), expected \(2, obj",
        ),
        (lambda: _changed("detect", targets={"mask": None}), "no 'mask', which is .batch, objects."),
        (lambda: _changed("detect", targets={"mask": np.ones((2, 13))}), "mask'. is bool, not int64 and float64"),
        (lambda: _changed("detect", targets={"labels": np.ones((2, 13, 1))}), r"labels'\] is \(2, 13, 1\)"),
        (lambda: _changed("segment", targets={"masks": None}), "no 'masks', which is .* i . 1 where object i is"),
        (lambda: _changed("segment", targets={"masks": np.zeros((15, 16, 16))}), r"masks'\] is \(15, 16, 16\)"),
        (lambda: _changed("pose", targets={"keypoints": np.zeros((2, 13, 5, 3))}), r"keypoints'\] is .*51 channels"),
        (lambda: yolo_loss.detection_loss(np.zeros(3), {}, STRIDES), "a dictionary, or a pair .*: ndarray"),
        (lambda: yolo_loss.end_to_end_loss(yolo_loss.detection_loss, {}, {}, STRIDES), "no one-to-one branch"),
        (lambda: yolo_loss.classification_loss({"boxes": 0}, {}), "Classify head says logits"),
        (lambda: yolo_loss.classification_loss(np.zeros((2, 3)), {"cls": 0}), "targets have cls and no 'label'"),
        (
            lambda: yolo_loss.classification_loss(np.zeros((2, 3)), {"label": np.zeros((2, 3))}),
            "float64.2, 3., expected .2,",
        ),
    ],
)
def test_wrong_heads_and_targets_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sigmas_are_one_for_each_keypoint():
    said, targets = random_predictions("pose", 2, 64, 0), random_targets("pose", (1, 2), 64, 0)
    for sigmas in ([0.1], [0.0] * 17):
        with pytest.raises(ValueError, match="17 positive numbers"):
            yolo_loss.pose_loss(said, targets, STRIDES, sigmas=sigmas)
