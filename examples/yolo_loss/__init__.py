"""Ultralytics' losses in JAX: detection, segmentation, pose, rotated boxes and classification.

| task | head | Ultralytics' class | here |
|---|---|---|---|
| detect | Detect | `v8DetectionLoss` | `detection_loss` |
| segment | Segment | `v8SegmentationLoss` | `segmentation_loss` |
| pose | Pose | `v8PoseLoss` | `pose_loss` |
| obb | OBB, OBB26 | `v8OBBLoss` | `rotated_loss` |
| classify | Classify | `v8ClassificationLoss` | `classification_loss` |
| detect, obb | with a one-to-one branch: YOLOv10, YOLO26 | `E2ELoss` | `end_to_end_loss` |

The numbers are those of ultralytics/utils/loss.py (Ultralytics 8.4) on the same batch. Targets are padded to a fixed
number of objects an image, with a mask, so that a training step compiles once whatever is in it.

A file holds one idea: `boxes` and `rotated` the two kinds of box, `assignment` which anchors learn which object,
`detection` what all heads with boxes have in common, `masks`, `keypoints` and `classification` the rest.
"""

from .assignment import Assignment, assign, smallest_side
from .boxes import anchor_points
from .classification import classification_loss
from .detection import GAINS, detection_loss
from .end_to_end import end_to_end_loss, share_of_many
from .keypoints import COCO_SIGMAS, pose_loss
from .masks import segmentation_loss
from .rotated import rotated_loss

__all__ = [
    "COCO_SIGMAS",
    "GAINS",
    "Assignment",
    "anchor_points",
    "assign",
    "classification_loss",
    "detection_loss",
    "end_to_end_loss",
    "pose_loss",
    "rotated_loss",
    "segmentation_loss",
    "share_of_many",
    "smallest_side",
]
