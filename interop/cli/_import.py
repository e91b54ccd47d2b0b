"""jaxnorm import: a PyTorch model, with weights from a file, as a model that runs without PyTorch."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from interop._from_torch import from_torch
from interop.cli.findings import print_findings
from interop.cli.libraries import require
from interop.cli.models import build, checkpoint_of, dimensions, input_shapes, load, parse_options
from interop.linting._lint import lint
from interop.running import artifact

MODEL_HELP = "timm:NAME, torchvision:NAME, ultralytics:NAME, package.module:callable, or a NAME that one library has."
INPUT_HELP = "Sizes of an input, 2,3,224,224; once for each. Default: two images of the size that the model is for."

WHICH_HELP = "Which of several state dicts: model, ema, or its name; `jaxnorm inspect` shows what a file has."
DYNAMIC_HELP = "Dimensions that may vary: 0 is the batch, 0,2,3 images of any size."
OPTION_HELP = "name=value for the model's constructor; may be repeated."


def import_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[pathlib.Path, typer.Option(metavar="DIR", help="The directory to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="A checkpoint; without one, the initial weights.")
    ] = None,
    which: Annotated[str | None, typer.Option(help=WHICH_HELP)] = None,
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    dynamic: Annotated[str, typer.Option(help=DYNAMIC_HELP)] = "0",
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
) -> None:
    """A PyTorch model as one that runs without PyTorch.

    Written is a directory with its graphs and arrays, which interop.load reads.

    \b
    Examples:
      jaxnorm import timm:resnet50 --weights resnet50.safetensors --out resnet50
      jaxnorm import torchvision:mobilenet_v3_small --weights mobilenet.pth --option num_classes=10 --out mobilenet
      jaxnorm import ultralytics:yolov8n --weights yolov8n.pt --out yolov8n
      jaxnorm import mypackage.models:build --weights last.pth.tar --which ema --input 2,3,64,64 --out mine
    """
    torch = require("torch")
    dims = dimensions(dynamic)
    checkpoint = checkpoint_of(weights, which)
    module = build(model, parse_options(option or []))
    if checkpoint is not None:
        load(module, checkpoint, str(checkpoint.path))
    sizes = input_shapes(module, shapes or [])
    imported = from_torch(module, *(torch.zeros(size) for size in sizes), dynamic_dims=dims)
    artifact.save(imported, out)
    described = imported._interop.model
    origin = "its initial weights (no --weights)" if weights is None else weights
    counts = f"{len(described.entries)} arrays, {len(described.batch_norms)} BatchNorm layers"
    print(f"{model}: {counts}, from {origin}")
    print(f"inputs: {', '.join('x'.join(map(str, size)) for size in sizes)}; dimensions that may vary: {dynamic}")
    print(f"the model is in {out}")
    print_findings(lint(module), str(out))
