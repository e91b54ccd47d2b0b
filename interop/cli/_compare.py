"""jaxnorm compare: a Flax model against its PyTorch origin, layer by layer."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import typer
from flax import nnx

from interop.cli._import import INPUT_HELP, MODEL_HELP
from interop.cli.models import build, found_in, input_shapes, load, parse_options
from interop.cli.output import print_json, require
from interop.comparing._compare import compare as compare_models
from interop.files.checkpoint import load_checkpoint
from interop.running import artifact
from interop.weights._state_dict import load_state_dict


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    flax: Annotated[
        str,
        typer.Argument(
            metavar="FLAX",
            help="package.module:callable that gives an NNX model, or Linen's (module, variables); or what "
            "`jaxnorm import` wrote.",
        ),
    ],
    weights: Annotated[str | None, typer.Option(metavar="FILE", help="A checkpoint for the PyTorch model.")] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=REPLACEMENT, from PyTorch's names to the Flax model's; may be repeated."),
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
    if weights is not None:
        load(module, load_checkpoint(weights), weights)
    sizes = input_shapes(module, shapes or [])
    generator = np.random.default_rng(seed)
    inputs = [torch.from_numpy(generator.normal(size=size).astype(np.float32)) for size in sizes]
    pairs = [_pair(text) for text in rename or []] or None
    ours = _flax_model(flax)
    if not as_is:
        state = {name: value.numpy() for name, value in module.state_dict().items()}
        ours = load_state_dict(ours, state, pairs)
    found = compare_models(ours, module, *inputs, rename=pairs, tolerance=tolerance)
    if as_json:
        print_json({**dataclasses.asdict(found), "agrees": found.agrees})
    else:
        print(f"{model} in PyTorch {torch.__version__}, {flax} in JAX {jax.__version__}\n\n{found}")
    return 0 if found.agrees else 1


def _flax_model(name: str) -> Any:
    if pathlib.Path(name).is_dir():
        return artifact.load(name)
    package, colon, path = name.partition(":")
    if not colon:
        raise ValueError(f"FLAX is package.module:callable, or a directory that `jaxnorm import` wrote; found {name}")
    found = found_in(package, path)
    return found if isinstance(found, nnx.Module | tuple) else found()


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, replacement = text.partition("=")
    if not equals:
        raise ValueError(f"--rename {text}: expected PATTERN=REPLACEMENT")
    return pattern, replacement
