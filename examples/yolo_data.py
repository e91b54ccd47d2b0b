"""The data of examples/yolo.py: circles, squares and triangles, and what each of Ultralytics' tasks is to learn."""

from collections.abc import Iterator

import numpy as np

NAMES = ("circle", "square", "triangle")
OBJECTS = 4  # room for so many in each image's targets
CELL = 4  # pixels of a mask's cell: prototypes have a quarter of the image's side
# Where the keypoints are, from (0, 0) to (1, 1) in the object: a top, a left and a right foot.
KEYPOINTS = {
    "circle": [(0.5, 0), (0.5 - 3**0.5 / 4, 0.75), (0.5 + 3**0.5 / 4, 0.75)],
    "square": [(0.5, 0), (0, 1), (1, 1)],
    "triangle": [(0.5, 0), (0, 1), (1, 1)],
}

Batch = dict[str, np.ndarray]


def shapes(size: int, count: int, seed: int, task: str = "detect") -> Batch:
    """Images (N, 3, size, size) from 0 to 1 of one to three shapes, each of one colour, on a background of another.

    `boxes` (N, OBJECTS, 4) are in pixels, `labels` (N, OBJECTS) index NAMES, `mask` (N, OBJECTS) marks the true ones;
    `masks` (N, size / 4, size / 4) is 1 + the object that covers a cell's centre, `keypoints` (N, OBJECTS, 3, 3) are
    x, y and 2: seen. To classify, an image has one shape and a `label` (N,). For oriented boxes the shapes are long and
    turned, and `boxes` (N, OBJECTS, 5) are centre, width, height and angle.
    """
    turned, most = task == "obb", 1 if task == "classify" else 3
    images = np.empty((count, 3, size, size), np.float32)
    boxes, labels = np.zeros((count, OBJECTS, 5 if turned else 4), np.float32), np.zeros((count, OBJECTS), np.int32)
    mask, masks = np.zeros((count, OBJECTS), bool), np.zeros((count, size // CELL, size // CELL), np.int32)
    keypoints = np.zeros((count, OBJECTS, 3, 3), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        background = rng.uniform(0, 1, 3)
        images[i] = background[:, None, None] + rng.normal(0, 0.03, (3, size, size))
        around: list[np.ndarray] = []
        wanted = rng.integers(1, most + 1)
        for _ in range(100):  # tries: where there is no room for another, the image stays as it is
            placed = len(around)
            if placed == wanted:
                break
            side = rng.uniform(0.25, 0.5) * size
            left, top = rng.uniform(0, size - side, 2)
            box = np.array([left, top, left + side, top + side])
            if placed and _overlap(np.array(around), box) > 0:
                continue
            label = rng.integers(len(NAMES))
            # A long shape and its diagonal fit in the square, however it is turned.
            long, short = (side * 0.9, side * rng.uniform(0.3, 0.43)) if turned else (side, side)
            angle = rng.uniform(-np.pi / 4, 3 * np.pi / 4) if turned else 0.0
            oriented = np.array([left + side / 2, top + side / 2, long, short, angle])
            inside = _covered(size, 1, oriented, NAMES[label])
            colour = (background + rng.uniform(0.3, 0.7, 3)) % 1
            images[i] = np.where(inside, colour[:, None, None], images[i])
            masks[i][_covered(size, CELL, oriented, NAMES[label])] = placed + 1
            keypoints[i, placed] = [(left + u * side, top + v * side, 2) for u, v in KEYPOINTS[NAMES[label]]]
            boxes[i, placed] = oriented if turned else box
            labels[i, placed], mask[i, placed] = label, True
            around.append(box)
    # As bytes would hold them, which is how images reach ultralytics.YOLO.
    images = np.rint(np.clip(images, 0, 1) * 255) / np.float32(255)
    found = {"image": images, "boxes": boxes, "labels": labels, "mask": mask, "masks": masks, "keypoints": keypoints}
    return found if task != "classify" else {"image": images, "label": labels[:, 0]}


def _covered(size: int, cell: int, box: np.ndarray, name: str) -> np.ndarray:
    """Which cells have their centre in a shape (bool, size / cell squared)."""
    y, x = (np.mgrid[: size // cell, : size // cell] + 0.5) * cell
    centre_x, centre_y, width, height, angle = box
    x, y, cos, sin = x - centre_x, y - centre_y, np.cos(angle), np.sin(angle)
    u, v = (x * cos + y * sin) / width + 0.5, (y * cos - x * sin) / height + 0.5  # 0 to 1 inside the box
    if name == "circle":
        return (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25
    inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
    return inside & (np.abs(u - 0.5) < v / 2) if name == "triangle" else inside


def _overlap(boxes: np.ndarray, box: np.ndarray) -> float:
    """The largest area that `box` shares with one of `boxes`."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return float(np.max(np.prod(np.maximum(sides, 0), axis=1)))


def drawn(size: int, count: int, steps: int, seed: int, task: str = "detect") -> Iterator[Batch]:
    """A new batch for each step. No image comes twice."""
    whole = shapes(size, count * steps, seed, task)
    for step in range(steps):
        yield {name: array[step * count : (step + 1) * count] for name, array in whole.items()}
