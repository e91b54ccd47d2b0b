"""jaxnorm plan: what a training step of a PyTorch model would take on TPUs, before one is rented."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import jaxnorm
from interop._from_torch import from_torch
from interop.cli._import import INPUT_HELP, MODEL_HELP
from interop.cli.libraries import require
from interop.cli.models import build, input_shapes, parse_options
from interop.cli.output import print_json, size, table
from jaxnorm.topologies import topology

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}
DTYPES = ("bfloat16", "float32")


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    topologies: Annotated[
        list[str], typer.Option("--topology", help="A generation of TPUs and its sides, v5e:4x4; may be repeated.")
    ],
    batch: Annotated[list[int], typer.Option(min=1, help="Examples in a step, over all devices; may be repeated.")],
    image: Annotated[int | None, typer.Option(min=1, help="Sides of the images, in pixels.")] = None,
    shapes: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="Of the arithmetic: bfloat16 or float32.")] = "bfloat16",
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adamw.")] = "momentum",
    ema: Annotated[bool, typer.Option("--ema", help="Keep an average of the model.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="name=value for the model's constructor; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """What a training step of a model takes on a slice of TPUs.

    The step (forward, backward, optimizer, synchronised statistics) is compiled for TPUs by their own compiler, on this
    machine, which takes minutes for a large model; no TPU is needed. The loss is the mean square of all outputs, which
    costs as little as a usual one. Times are the compiler's estimate: what a step takes at best.

    \b
    Examples:
      jaxnorm plan timm:resnet50 --topology v5e:4x4 --topology v5e:16x16 --batch 2048 --image 224 --dtype bfloat16
      jaxnorm plan torchvision:resnet18 --topology v6e:2x4 --batch 512 --batch 1024 --optimizer adamw --ema
      jaxnorm plan mypackage.models:build --topology v5p:2x2x1 --batch 64 --input 2,3,64,64 --json
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected {' or '.join(DTYPES)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer {optimizer}: expected {', '.join(OPTIMIZERS)}")
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # libtpu is here to compile, not to look for TPUs
    places = [topology(name) for name in topologies]
    for place in places:
        for count in batch:
            if count % len(place.devices):
                raise ValueError(f"--batch {count}: the {len(place.devices)} devices of {place.name} do not divide it")
    torch = require("torch")
    module = build(model, parse_options(option or [])).train()
    sizes = input_shapes(module, shapes or [])
    if image is not None:
        if shapes:
            raise ValueError("--image and --input both say how large the input is; give one")
        sizes = [(*one[:-2], image, image) for one in sizes]
    imported = from_torch(module, *(torch.zeros(one) for one in sizes))
    average = jaxnorm.Ema(0.9999) if ema else None
    state = jaxnorm.TrainState.create(imported, OPTIMIZERS[optimizer](), ema=average)
    step = jaxnorm.train_step(_loss, compute_dtype=jnp.dtype(dtype))
    found = []
    with _progress(len(places) * len(batch)) as done:
        for place in places:
            for count in batch:
                done(f"{place.name}, batch {count}")
                inputs = tuple(jax.ShapeDtypeStruct((count, *one[1:]), np.float32) for one in sizes)
                found.append(jaxnorm.plan(step, state, inputs, place))
    if json:
        print_json([one.as_dict() for one in found])
        return
    shown = ", ".join("x".join(map(str, one[1:])) for one in sizes)
    print(f"{model}, input {shown}, {dtype}, {optimizer}{', EMA' if ema else ''}\n")
    table(
        (
            "topology",
            "batch",
            "fits",
            "memory",
            "state",
            "step",
            "examples/s",
            "statistics",
            "collectives",
            "largest batch",
        ),
        [_row(one) for one in found],
    )
    print(
        "\nmemory: bytes a device needs, of those it has; state: of them parameters, optimizer and what else stays"
        "\nstep: at best, by the compiler's estimate, nothing hidden of the collectives"
        "\nstatistics: share of the step in BatchNorm's own sums, and in its collectives"
        "\ncollectives: how many, what a device sends in all, share of the step"
        "\nlargest batch: about what memory lasts for"
    )


def _loss(model: Any, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
    outputs = [x for x in jax.tree.leaves(model(*inputs)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((jnp.square(x.astype(jnp.float32)).mean() for x in outputs), jnp.zeros(())), {}


def _row(found: jaxnorm.Plan) -> list[str]:
    memory = found.memory
    state = memory.parameters + memory.optimizer + memory.average + memory.other
    row = [
        found.topology,
        f"{found.batch:,}",
        "yes" if found.fits else "no",
        f"{size(memory.total)} of {size(memory.available)}",
        size(state),
    ]
    if found.seconds is None or found.collectives is None or found.statistics is None or found.cycles is None:
        return [*row, "-", "-", "-", "-", f"{found.largest_batch:,}"]
    compute = found.seconds - found.collectives.seconds
    own = compute * (found.statistics_cycles or 0) / max(found.cycles, 1)
    return [
        *row,
        f"{found.seconds * 1e3:.2f} ms",
        f"{found.examples_per_second:,.0f}",
        f"{own / found.seconds:.1%} + {found.statistics.seconds / found.seconds:.1%}",
        f"{found.collectives.number}, {size(found.collectives.bytes)}, {found.collectives.seconds / found.seconds:.1%}",
        f"{found.largest_batch:,}",
    ]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar whose clock goes on while the compiler works; a line a program where no terminal is. Gives the function to
    call before each piece of work."""
    tqdm = require("tqdm").tqdm
    ended = threading.Event()
    begun = 0

    with tqdm(total=total, desc="compiling", unit="program", disable=None) as bar:

        def tick() -> None:
            while not ended.wait(1):
                bar.refresh()

        def begin(what: str) -> None:
            nonlocal begun
            bar.update(min(begun, 1))
            begun += 1
            if bar.disable:
                print(f"compiling {what}", file=sys.stderr, flush=True)
            else:
                bar.set_postfix_str(what)

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield begin
            bar.update(min(begun, 1))
        finally:
            ended.set()
            clock.join()
