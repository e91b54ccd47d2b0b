"""What examples/yolo.py shows of what was found: words for a table, and a picture."""

import pathlib

import numpy as np
from yolo_data import NAMES, Batch
from yolo_tasks import Found


def classes(found: Found) -> np.ndarray:
    """Of each object found, or of the image."""
    return found["boxes"][:, -1] if "boxes" in found else found["probabilities"].argmax(keepdims=True)


def words(found: Found, most: int = 2) -> str:
    """The surest objects, or classes."""
    if "boxes" in found:
        return ", ".join(f"{NAMES[int(label)]} ({score:.2f})" for *_, score, label in found["boxes"][:most])
    label = int(classes(found)[0])
    return f"{NAMES[label]} ({found['probabilities'][label]:.2f})"


def truth(tests: Batch, i: int) -> str:
    labels = [tests["label"][i]] if "label" in tests else tests["labels"][i][tests["mask"][i]]
    return ", ".join(NAMES[label] for label in labels)


def draw(tests: Batch, found: list[Found], path: pathlib.Path) -> None:
    """The first images with what was found in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 6, figsize=(12, 4.4), layout="constrained")
    for panel, image, shown in zip(panels.flat, tests["image"], found, strict=False):
        panel.imshow(image.transpose(1, 2, 0))
        panel.set_axis_off()
        for mask in shown.get("masks", ()):
            panel.contour(mask, [0.5], colors="yellow", linewidths=1)
        for places in shown.get("keypoints", ()):
            panel.plot(*(places[:, :2] - 0.5).T, "o", color="yellow", markersize=3)
        for *box, score, label in shown.get("boxes", ()):
            corners = _corners(np.array(box))
            panel.plot(*(corners - 0.5).T, color="white", linewidth=1)
            at = corners[np.argmin(corners[:, 1])]
            text = panel.text(*at, f"{NAMES[int(label)]} {score:.2f}", fontsize=7, color="white", va="bottom")
            text.set_in_layout(False)
        if "probabilities" in shown:
            panel.set_title(words(shown), fontsize=8)
        height, width = image.shape[1:]
        panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _corners(box: np.ndarray) -> np.ndarray:
    """A closed line (5, 2) around an upright box (4 numbers) or a turned one (5)."""
    unit = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    if len(box) == 4:
        return box[:2] + unit * (box[2:] - box[:2])
    cos, sin = np.cos(box[4]), np.sin(box[4])
    return box[:2] + ((unit - 0.5) * box[2:4]) @ np.array([[cos, sin], [-sin, cos]])
