"""Where a run that a checkpoint was written by goes on."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from interop.files.checkpoint import Checkpoint
from jaxnorm import _checks as check


def first_epoch(checkpoint: Checkpoint | Mapping[str, Any]) -> int | None:
    """The epoch that a run resumed from this checkpoint begins with, counted from 0.

    | written by | `epoch` is | goes on with |
    |---|---|---|
    | timm, `version` 2 (timm/models/_helpers.py, `resume_checkpoint`) | the last one done | `epoch + 1` |
    | timm before, which has `arch` and no `version`, or 1 | the next | `epoch` |
    | torchvision's references, Lightning | the last one done | `epoch + 1` |
    | Ultralytics | the last one done, -1 once training has ended | `epoch + 1`, None |

    **Arguments:**

    - `checkpoint`: what `load_checkpoint` gave, or its metadata.

    **Returns:** the epoch; None where training has ended, or nothing says.

    **Raises:** `TypeError` for what is neither a checkpoint nor a mapping; `ValueError` for an epoch that is no whole
    number.
    """
    check.instance("checkpoint", checkpoint, Checkpoint | Mapping, "what load_checkpoint gave, or its metadata")
    notes = checkpoint.metadata if isinstance(checkpoint, Checkpoint) else checkpoint
    epoch = notes.get("epoch")
    if epoch is None:
        return None
    try:
        number = operator.index(epoch.item() if hasattr(epoch, "item") else epoch)
        version = operator.index(notes.get("version", 1))
    except TypeError:
        raise ValueError(f"epoch is a whole number, found {epoch!r} (version {notes.get('version')!r})") from None
    if number < 0:
        return None
    timms = "arch" in notes and not any(key.startswith("pytorch-lightning") for key in notes)
    return number if timms and version < 2 else number + 1
