"""The commands, put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer

from interop.cli._compare import compare
from interop.cli._convert import convert
from interop.cli._diff import diff
from interop.cli._export import export
from interop.cli._import import import_
from interop.cli._inspect import inspect
from interop.cli._plan import plan
from interop.cli._port import port
from interop.cli._verify import verify


def command() -> Any:
    """The command line as typer makes it; plain text everywhere, so that help reads the same in a pipe."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)
    app.callback()(_options)
    app.command("inspect")(inspect)
    app.command("convert")(convert)
    app.command("diff")(diff)
    app.command("import")(import_)
    app.command("export")(export)
    app.command("verify")(verify)
    app.command("compare")(compare)
    app.command("plan")(plan)
    app.command("port")(port)
    return typer.main.get_command(app)


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"jaxnorm {version('jaxnorm')}")
        raise typer.Exit
    return wanted


def _options(
    shown: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Checkpoints and models between PyTorch and JAX.

    Exit codes: 0; 1 if diff, verify or compare found a difference; 2 for an error, which is one line on stderr.

    \b
    Examples:
      jaxnorm inspect model_best.pth.tar --plot statistics.png
      jaxnorm convert model_best.pth.tar model.safetensors --which ema
      jaxnorm diff model.safetensors finetuned.safetensors
      jaxnorm import timm:resnet50 --weights resnet50.safetensors --out resnet50
      jaxnorm verify timm:resnet50 resnet50
      jaxnorm export resnet50 resnet50.pth
      jaxnorm compare torchvision:resnet50 mypackage.resnet:build
      jaxnorm plan timm:resnet50 --topology v5e:4x4 --batch 2048
      jaxnorm port timm:resnet50 resnet50.py
    """
