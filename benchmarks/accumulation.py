"""Memory and time of a large batch: whole, in microbatches, and whole with blocks computed again.

    python benchmarks/accumulation.py                                  # needs libtpu; half an hour
    python benchmarks/accumulation.py --model resnet18 --batch 64

Statistics of a whole virtual batch need, in each BatchNorm layer, all examples before any of them goes on. So
microbatches one after the other cannot give them, but `jax.checkpoint` around blocks gives them in little memory:
what is kept for the backward pass are the blocks' inputs. (Without it `statistics="batch"` is the first row.)

A training step (SGD with momentum, bfloat16) of a model imported from torchvision is compiled by `jaxnorm.plan` for
eight TPU v5e, which are not there; memory and cycles are the compiler's.
"""

import argparse
import importlib
import importlib.metadata
import os
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = r"layer[1-4]\.\d+"
ROWS = {  # options of train_step, what is computed again, whose statistics
    "one batch": ({}, None, "whole batch"),
    "`accumulate=4`": ({"accumulate": 4}, None, "each microbatch"),
    '`accumulate=4, statistics="batch"`, blocks by `model.checkpoint`': (
        {"accumulate": 4, "statistics": "batch"},
        BLOCKS,
        "whole batch",
    ),
}


def plan(name: str, batch: int, options: dict[str, Any], again: str | None) -> Any:
    """The plan of one row."""
    import jax
    import jax.numpy as jnp
    import optax
    import torch
    import torchvision_cpu  # noqa: F401  # operator schemas that torchvision lacks beside a PyTorch for CPUs

    import interop
    import jaxnorm

    def loss_fn(model: Any, batch: Any) -> Any:
        logits = model(batch["image"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

    make = getattr(importlib.import_module("torchvision.models"), name)
    model = interop.from_torch(make(weights=None).train(), torch.zeros(2, 3, 224, 224))
    if again is not None:
        model.checkpoint(again)
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1, momentum=0.9))
    examples = {
        "image": jax.ShapeDtypeStruct((8 * batch, 3, 224, 224), jnp.bfloat16),
        "label": jax.ShapeDtypeStruct((8 * batch,), jnp.int32),
    }
    return jaxnorm.plan(jaxnorm.train_step(loss_fn, compute_dtype=jnp.bfloat16, **options), state, examples, "v5e:2x4")


def table(name: str, batch: int, found: dict[str, Any]) -> str:
    """The report, in Markdown."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "flax", "libtpu"))
    lines = [
        "# A large batch in little memory",
        "",
        f"Written by `python benchmarks/accumulation.py`: {name} imported from torchvision, bfloat16, {batch} images",
        f"of 224x224 a device, eight TPU v5e by their compiler ({versions}). Ratios are to the first row.",
        "",
        "| | BatchNorm's statistics | temporary memory | ratio | cycles | ratio |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(found.values()))
    for row, one in found.items():
        if not one.fits:
            lines.append(f"| {row} | {ROWS[row][2]} | does not fit | | | |")
            continue
        memory, cycles = one.memory.temporary, one.cycles
        cells = [row, ROWS[row][2], f"{memory / 2**20:,.0f} MiB"]
        cells += [f"{memory / first.memory.temporary:.3f}" if first.fits else "", f"{cycles:,}"]
        cells += [f"{cycles / first.cycles:.3f}" if first.fits else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--batch", type=int, default=256, help="images a device")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "accumulation.md")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT / "examples"))
    found: dict[str, Any] = {}
    for row, (of_step, again, _) in ROWS.items():
        found[row] = plan(options.model, options.batch, of_step, again)
        text = table(options.model, options.batch, found)
        options.out.write_text(text)
        print(text.splitlines()[-1], f"compiled in {found[row].compile_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
