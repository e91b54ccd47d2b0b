"""jaxnorm port: a PyTorch model as Flax source."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from interop._flax_source import flax_source
from interop.cli._import import INPUT_HELP, MODEL_HELP, OPTION_HELP
from interop.cli.libraries import require
from interop.cli.models import build, input_shapes, parse_options
from interop.files.replacing import replacing


def port(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    file: Annotated[pathlib.Path, typer.Argument(metavar="FILE", help="The Python file to write.")],
    name: Annotated[
        str | None, typer.Option(help="Of the function that makes the model; by default the file's name.")
    ] = None,
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Flax's own BatchNorm: the file needs no jaxnorm, and says what differs.")
    ] = False,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
) -> None:
    """A PyTorch model as Flax source, proven.

    Written is a Python file of classes with PyTorch's names, which needs jax, flax and jaxnorm and loads the model's
    checkpoints by name. Before it is written it runs in a process without torch and is compared with PyTorch in
    float64, in both modes: outputs, gradients, running statistics. What differs is not written.

    \b
    Examples:
      jaxnorm port timm:resnet50 resnet50.py --input 2,3,64,64
      jaxnorm port mypackage.models:build mine.py --name mine
    """
    torch = require("torch")
    module = build(model, parse_options(option or []))
    sizes = input_shapes(module, shapes or [])
    text = flax_source(
        module, *(torch.zeros(size) for size in sizes), name=name or file.stem, origin=model, plain=plain
    )
    with replacing(file) as out:
        out.write_text(text, encoding="utf-8")
    classes = sum(line.startswith("class ") for line in text.splitlines())
    print(f"{model}: {len(text.splitlines())} lines, {classes} classes, in {file}")
    print(text.split('"""')[1].strip().splitlines()[-1])
