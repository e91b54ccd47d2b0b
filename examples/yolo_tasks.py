"""What Ultralytics' tasks are to examples/yolo.py: the PyTorch module, the loss, what is found, and how right it is.

Found in an image is a dictionary of arrays: `boxes` (n, ..., score, class), with `masks` (n, size, size) or `keypoints`
(n, K, 3) where the task has them; `probabilities` (classes,) of an image that is classified. Non-maximum suppression,
masks and matching are Ultralytics' own functions.
"""

import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}  # before ultralytics is imported: no network

import numpy as np
import torch
import torchvision_cpu  # ultralytics imports torchvision where it can
import yolo_loss
from yolo_data import CELL, NAMES, Batch

Found = dict[str, np.ndarray]


class Task(NamedTuple):
    suffix: str  # of Ultralytics' architecture files
    module: str  # the class in ultralytics.nn.tasks
    loss: Callable[..., Any]  # (predictions, targets, strides, axis_name) -> losses by name
    found: Callable[[Any, int, float], list[Found]]  # (what the model gives in evaluation, pixels, confidence)
    scores: Callable[[list[Found], Batch], dict[str, float]]  # how right what was found is
    theirs: Callable[[Any], Found]  # of one of ultralytics.YOLO's results


def module(task: str, size: int, seed: int, architecture: str | dict[str, Any]) -> Any:
    """Ultralytics' model for our classes, with random weights, ready to train on images of `size` pixels."""
    from ultralytics.nn import tasks
    from ultralytics.utils import LOGGER

    LOGGER.setLevel("ERROR")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"data_kpt_shape": [3, 3]} if task == "pose" else {}
    model = getattr(tasks, TASKS[task].module)(architecture, nc=len(NAMES), verbose=False, **options)
    model.names = dict(enumerate(NAMES))
    model.args = {"task": task, "imgsz": size}  # what ultralytics.YOLO asks a model for
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.1  # Ultralytics' 0.03 is for thousands of steps
    if task != "classify":
        head = model.model[-1]
        for branch, stride in zip(head.cv3, strides(model), strict=True):
            # As Detect.bias_init, which expects images of 640 pixels: so many objects, equally likely in any cell.
            torch.nn.init.constant_(branch[-1].bias, math.log(5 / head.nc / (size / stride) ** 2))
    return model.train()


def check(task: str, model: str) -> None:
    """Raises `FileNotFoundError` where Ultralytics has no such architecture: YOLOv5 does nothing but detect."""
    from ultralytics.nn.tasks import yaml_model_load

    name = model + TASKS[task].suffix
    try:
        cfg = yaml_model_load(f"{name}.yaml")
    except FileNotFoundError:
        raise FileNotFoundError(f"Ultralytics has no architecture {name}.yaml: no such model for {task}") from None
    if cfg.get("end2end") or any("v10" in str(layer[2]) for layer in cfg["head"]):
        raise FileNotFoundError(
            f"{name} has a one-to-one branch, which this example does not train: yolo_loss.end_to_end_loss is its loss"
        )


def strides(model: Any) -> tuple[int, ...]:
    """Pixels a cell of a PyTorch model's levels."""
    return tuple(int(stride) for stride in model.stride)


# What is found


def detections(predictions: Any, confidence: float, rotated: bool = False) -> list[np.ndarray]:
    """For each image (found, 6 and more): box, score, class, and what the task adds to them."""
    from ultralytics.utils.nms import non_max_suppression

    without_torchvision()
    given = torch.tensor(np.asarray(predictions))
    found = non_max_suppression(given, confidence, 0.7, max_time_img=math.inf, nc=len(NAMES), rotated=rotated)
    return [image.numpy() for image in found]


def without_torchvision() -> None:
    """Where torchvision's C++ operators are missing, Ultralytics' own non-maximum suppression, in their place."""
    if torchvision_cpu.declared is not None:
        import torchvision
        from ultralytics.utils.nms import TorchNMS

        torchvision.ops.nms = TorchNMS.nms


def _boxes(predictions: Any, size: int, confidence: float) -> list[Found]:
    return [{"boxes": image} for image in detections(predictions, confidence)]


def _masks(predictions: Any, size: int, confidence: float) -> list[Found]:
    from ultralytics.utils.ops import process_mask

    outputs, prototypes = predictions
    every = []
    for image, proto in zip(detections(outputs, confidence), np.asarray(prototypes), strict=True):
        boxes, coefficients = torch.tensor(image[:, :4]), torch.tensor(image[:, 6:])
        masks = process_mask(torch.tensor(proto), coefficients, boxes, (size, size), upsample=True).numpy()
        there = masks.any(axis=(1, 2))  # as ultralytics.YOLO does
        every.append({"boxes": image[there, :6], "masks": masks[there]})
    return every


def _keypoints(predictions: Any, size: int, confidence: float) -> list[Found]:
    return [
        {"boxes": image[:, :6], "keypoints": image[:, 6:].reshape(len(image), -1, 3)}
        for image in detections(predictions, confidence)
    ]


def _rotated(predictions: Any, size: int, confidence: float) -> list[Found]:
    return [{"boxes": image[:, [0, 1, 2, 3, 6, 4, 5]]} for image in detections(predictions, confidence, rotated=True)]


def _probabilities(predictions: Any, size: int, confidence: float) -> list[Found]:
    return [{"probabilities": image} for image in np.asarray(predictions)]


def clipped(found: Found, size: int) -> Found:
    """Upright boxes and keypoints within the image, as ultralytics.YOLO shows them."""
    found = {name: array.copy() for name, array in found.items()}
    if "boxes" in found and found["boxes"].shape[1] == 6:
        found["boxes"][:, :4] = found["boxes"][:, :4].clip(0, size)
    if "keypoints" in found:
        found["keypoints"][..., :2] = found["keypoints"][..., :2].clip(0, size)
    return found


# How right it is


def _precision(similarity: Callable[[Batch, int, np.ndarray, Found], Any]) -> Callable[..., dict[str, float]]:
    """mAP at similarity 0.5, and the mean of those at 0.5, 0.55, ..., 0.95, by Ultralytics' matching and curves."""

    def scores(found: list[Found], tests: Batch) -> dict[str, float]:
        from ultralytics.engine.validator import BaseValidator
        from ultralytics.utils.metrics import ap_per_class

        thresholds = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))
        right = []
        for i, image in enumerate(found):
            objects = np.flatnonzero(tests["mask"][i])
            classes = torch.tensor(tests["labels"][i][objects]), torch.tensor(image["boxes"][:, -1])
            alike = similarity(tests, i, objects, image)
            right.append(BaseValidator.match_predictions(thresholds, classes[1], classes[0], alike).numpy())
        every = np.concatenate([image["boxes"][:, -2:] for image in found])
        precision = ap_per_class(np.concatenate(right), *every.T, tests["labels"][tests["mask"]])[5]
        return {"mAP50": float(precision[:, 0].mean()), "mAP50-95": float(precision.mean())}

    return scores


def _of_boxes(tests: Batch, i: int, objects: np.ndarray, found: Found) -> Any:
    from ultralytics.utils.metrics import box_iou

    return box_iou(torch.tensor(tests["boxes"][i][objects]), torch.tensor(found["boxes"][:, :4]))


def _of_rotated(tests: Batch, i: int, objects: np.ndarray, found: Found) -> Any:
    from ultralytics.utils.metrics import batch_probiou

    return batch_probiou(torch.tensor(tests["boxes"][i][objects]), torch.tensor(found["boxes"][:, :5]))


def _of_masks(tests: Batch, i: int, objects: np.ndarray, found: Found) -> Any:
    from ultralytics.utils.metrics import mask_iou

    pixels = tests["masks"][i].repeat(CELL, 0).repeat(CELL, 1)
    truth = (pixels == objects[:, None, None] + 1).reshape(len(objects), -1)
    return mask_iou(torch.tensor(truth).float(), torch.tensor(found["masks"].reshape(len(found["masks"]), -1)).float())


def _of_keypoints(tests: Batch, i: int, objects: np.ndarray, found: Found) -> Any:
    from ultralytics.utils.metrics import kpt_iou

    boxes = tests["boxes"][i][objects]
    area = torch.tensor((boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.53)  # PoseValidator's: of an object in its box
    truth = torch.tensor(tests["keypoints"][i][objects])
    return kpt_iou(truth, torch.tensor(found["keypoints"]), area, sigma=[1 / 3] * 3)


def _accuracy(found: list[Found], tests: Batch) -> dict[str, float]:
    said = np.array([image["probabilities"].argmax() for image in found])
    return {"top-1": float((said == tests["label"]).mean())}


def _classification(predictions: Any, targets: Any, strides: Any, axis_name: str | None = None) -> Any:
    return yolo_loss.classification_loss(predictions, targets)  # a mean over images: the same over replicas


TASKS = {
    "detect": Task(
        suffix="",
        module="DetectionModel",
        loss=yolo_loss.detection_loss,
        found=_boxes,
        scores=_precision(_of_boxes),
        theirs=lambda result: {"boxes": result.boxes.data.numpy()},
    ),
    "segment": Task(
        suffix="-seg",
        module="SegmentationModel",
        loss=yolo_loss.segmentation_loss,
        found=_masks,
        scores=_precision(_of_masks),
        theirs=lambda result: {
            "boxes": result.boxes.data.numpy(),
            "masks": result.masks.data.numpy() if result.masks else np.zeros((0, *result.orig_shape), np.uint8),
        },
    ),
    "pose": Task(
        suffix="-pose",
        module="PoseModel",
        loss=yolo_loss.pose_loss,
        found=_keypoints,
        scores=_precision(_of_keypoints),
        theirs=lambda result: {"boxes": result.boxes.data.numpy(), "keypoints": result.keypoints.data.numpy()},
    ),
    "obb": Task(
        suffix="-obb",
        module="OBBModel",
        loss=yolo_loss.rotated_loss,
        found=_rotated,
        scores=_precision(_of_rotated),
        theirs=lambda result: {"boxes": result.obb.data.numpy()},
    ),
    "classify": Task(
        suffix="-cls",
        module="ClassificationModel",
        loss=_classification,
        found=_probabilities,
        scores=_accuracy,
        theirs=lambda result: {"probabilities": result.probs.data.numpy()},
    ),
}
