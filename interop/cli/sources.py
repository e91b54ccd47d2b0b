"""What a command is given to read: a checkpoint, or the directory of a model that was saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from interop.files import hub
from interop.files.checkpoint import Checkpoint, load_checkpoint
from interop.files.disk import kind, path_of
from interop.running import artifact
from interop.running.module import TracedModule
from interop.weights._state_dict import state_dict


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A state dict, where it came from, what its file says besides, and what `interop.lint` is to look at."""

    name: str
    format: str
    state: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]
    target: Checkpoint | TracedModule


def open_source(name: str, which: str | None = None) -> Source:
    """Opens a checkpoint file or folder, a name of Hugging Face's hub, or a directory that `interop.save` wrote."""
    path = path_of(name)
    if not hub.is_name(name) and kind(path) == "a folder" and kind(path / artifact.PROGRAM) != "nothing":
        if which is not None:
            raise ValueError(f"{name}: a saved model has one state; --which is for checkpoints")
        model = artifact.load(path)
        described = model._interop.model
        metadata = {"model": described.name, "nodes": len(described.eval.nodes)}
        return Source(name, "saved model", state_dict(model), metadata, model)
    checkpoint = load_checkpoint(name, which)
    return Source(name, checkpoint.format, checkpoint, checkpoint.metadata, checkpoint)
