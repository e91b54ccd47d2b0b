"""jaxnorm export: a saved model as a checkpoint that PyTorch loads."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from interop.running import artifact
from interop.weights._save_checkpoint import save_checkpoint


def export(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A directory that `jaxnorm import` or interop.save wrote.")
    ],
    out: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="Ends in .safetensors, .pth, .pt, .bin or .tar.")],
    layout: Annotated[str | None, typer.Option(help="timm or torchvision: a training checkpoint.")] = None,
) -> None:
    """A saved model as a checkpoint for PyTorch.

    load_state_dict(strict=True) accepts it. PyTorch is not needed here.

    \b
    Examples:
      jaxnorm export resnet50 resnet50.safetensors
      jaxnorm export resnet50 last.pth.tar --layout timm
    """
    model = artifact.load(directory)
    metadata = {"arch": model._interop.model.name} if layout == "timm" else {}
    save_checkpoint(out, model, metadata, layout=layout)
    entries = [entry for entry in model._interop.model.entries if entry.persistent]
    print(f"{out}: {len(entries)} arrays of {model._interop.model.name}")
