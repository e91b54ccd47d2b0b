"""jaxnorm export: a saved model, or a run's checkpoint, as a checkpoint that PyTorch loads."""

from __future__ import annotations

import pathlib
from typing import Annotated, Any

import jax
import typer

from interop.cli.flax_models import RENAME_HELP, flax_model, parse_rename
from interop.files.disk import kind, path_of
from interop.running import artifact
from interop.running.module import TracedModule
from interop.weights._save_checkpoint import save_checkpoint
from interop.weights._state_dict import state_dict
from jaxnorm.saved_runs import COLLECTIONS, SavedRun, restore_model


def export(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="What `jaxnorm import`, interop.save or jaxnorm.Checkpoints wrote.")
    ],
    out: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="Ends in .safetensors, .pth, .pt, .bin or .tar.")],
    layout: Annotated[
        str | None, typer.Option(help="timm or torchvision: a training checkpoint, with a run's average.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FLAX",
            help="Of a run: what `jaxnorm import` wrote, or package.module:callable that gives the Flax model.",
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Of a run: which checkpoint; else the last.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Of a run: the average.")] = False,
    rename: Annotated[list[str] | None, typer.Option(help=f"Of a run: {RENAME_HELP}")] = None,
) -> None:
    """A saved model, or the model of a run's checkpoint, as a checkpoint for PyTorch.

    load_state_dict(strict=True) accepts it. PyTorch is not needed here. A run's checkpoint has arrays alone: --model
    says whose they are. The run may go on meanwhile.

    \b
    Examples:
      jaxnorm export resnet50 resnet50.safetensors
      jaxnorm export resnet50 last.pth.tar --layout timm
      jaxnorm export runs/a model.pth --model resnet50
      jaxnorm export runs/a average.pth --model mypackage.resnet:build --step 9000 --ema --rename ^fc=head
    """
    of_run = {"--model": model, "--step": step, "--ema": ema or None, "--rename": rename or None}
    if "://" not in directory and kind(path_of(directory) / artifact.PROGRAM) == "file":
        if given := [name for name, value in of_run.items() if value is not None]:
            raise ValueError(f"{directory} is a saved model: {', '.join(given)} are for a run of jaxnorm.Checkpoints")
        saved = artifact.load(directory)
        metadata = {"arch": saved._interop.model.name} if layout == "timm" else {}
        save_checkpoint(out, saved, metadata, layout=layout)
        entries = [entry for entry in saved._interop.model.entries if entry.persistent]
        print(f"{out}: {len(entries)} arrays of {saved._interop.model.name}")
        return
    try:
        with SavedRun(directory, step) as run:
            step, kinds = run.step, run.kinds
            average = run.has_average and (ema or layout is not None)
            updates = int(run.read(["ema_state/count"])["ema_state/count"]) if average else 0
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{directory} is no saved model (it has no {artifact.PROGRAM}), and {error}") from None
    if model is None:
        raise ValueError(
            f"{directory} is a run, whose checkpoints hold arrays alone: say whose they are by --model, the directory "
            "that `jaxnorm import` or interop.save wrote, or package.module:callable"
        )
    wide = ("float64", "complex128", "int64", "uint64")
    arrays = [kind for name, kind in kinds.items() if name.partition("/")[0] in COLLECTIONS]
    with jax.enable_x64(any(kind.startswith(wide) for kind in arrays)):
        like = flax_model(model, "--model")
        pairs = parse_rename(rename or [])
        state, averaged = (
            state_dict(restore_model(directory, like, step=step, average=wanted).model, pairs)
            if wanted is not None
            else None
            for wanted in (ema, True if average and not ema else None)
        )
    name = like._interop.model.name if isinstance(like, TracedModule) else model
    notes: dict[str, Any] = {"arch": name} if layout == "timm" else {"n_averaged": updates} if averaged else {}
    save_checkpoint(out, state, notes, ema=averaged, layout=layout)
    both = " and their average" if averaged else ", the average" if ema else ""
    print(f"{out}: {len(state or ())} arrays of {name}{both}, step {step} of {directory}")
