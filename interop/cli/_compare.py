"""jaxnorm compare: a Flax model against its PyTorch origin, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import numpy as np
import typer

from interop.cli._import import INPUT_HELP, MODEL_HELP, WHICH_HELP
from interop.cli.flax_models import FLAX_HELP, RENAME_HELP, flax_model, parse_rename
from interop.cli.libraries import require
from interop.cli.models import build, checkpoint_of, input_shapes, load, parse_options
from interop.cli.output import print_json
from interop.comparing._compare import compare as compare_models
from interop.weights._state_dict import load_state_dict


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    flax: Annotated[
        str,
        typer.Argument(metavar="FLAX", help=FLAX_HELP),
    ],
    weights: Annotated[str | None, typer.Option(metavar="FILE", help="A checkpoint for the PyTorch model.")] = None,
    which: Annotated[str | None, typer.Option(help=WHICH_HELP)] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(help=RENAME_HELP),
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Leave the Flax model's arrays; else it is given PyTorch's.")
    ] = False,
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="name=value for the PyTorch model's constructor; may be repeated.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(min=0, help="The relative difference that is agreement.")] = None,
    seed: Annotated[int, typer.Option(help="Of the input, which is normal.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """A Flax model against its PyTorch origin, layer by layer: where they part, and why.

    Both run on the same input, in eval and in train mode, in float32. The exit code is 1 if they differ.

    \b
    Examples:
      jaxnorm compare torchvision:resnet50 mypackage.resnet:build
      jaxnorm compare timm:resnet50 mypackage.resnet:build --rename 'layer(\\d)=stages.\\1' --weights resnet50.pth
      jaxnorm compare timm:resnet50 resnet50 --as-is
    """
    torch = require("torch")
    module = build(model, parse_options(option or []))
    if (checkpoint := checkpoint_of(weights, which)) is not None:
        load(module, checkpoint, str(checkpoint.path))
    sizes = input_shapes(module, shapes or [])
    generator = np.random.default_rng(seed)
    inputs = [torch.from_numpy(generator.normal(size=size).astype(np.float32)) for size in sizes]
    pairs = parse_rename(rename or [])
    ours = flax_model(flax)
    if not as_is:
        state = {name: value.numpy() for name, value in module.state_dict().items()}
        ours = load_state_dict(ours, state, pairs)
    found = compare_models(ours, module, *inputs, rename=pairs, tolerance=tolerance)
    if as_json:
        print_json({**dataclasses.asdict(found), "agrees": found.agrees})
    else:
        print(f"{model} in PyTorch {torch.__version__}, {flax} in JAX {jax.__version__}\n\n{found}")
    return 0 if found.agrees else 1
