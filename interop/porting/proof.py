"""The source that was written, run in a process of its own that never imports torch, against PyTorch in float64.

Compared are the outputs in eval mode, and of a training step outputs, the gradient of every parameter and every buffer
afterwards; and that the state dict is taken and given back name by name and bit by bit. What is drawn is the same on
both sides. Convolutions in groups are computed as the library computes them on a CPU, where XLA's own gradient of them
takes minutes; and the derivative of `hard_sigmoid` is rounded as PyTorch rounds it, to single precision (1 / 6, which
is off by 3e-8 in float64).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-8


class PortError(ValueError):
    """A source that is not what it should be, which is therefore not handed over. A `ValueError`."""


@dataclass(frozen=True)
class Proof:
    """The largest differences, each relative to the largest value of its array."""

    eval: float
    train: float
    gradients: float
    buffers: float
    parameters: int


def prove(text: str, function: str, module: Any, inputs: tuple[Any, ...], plain: bool = False) -> Proof:
    """Compares the source with the module; `plain`: its BatchNorm is Flax's.

    Raises:
        PortError: for a source that does not run, and for differences above `TOLERANCE`, naming the largest.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "ported.py").write_text(text, encoding="utf-8")
        _expected(folder, module, inputs)
        root = str(pathlib.Path(__file__).parent.parent.parent)
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]]),
        }
        command = [
            sys.executable,
            "-m",
            "interop.porting.compared",
            str(folder),
            function,
            *(["plain"] if plain else []),
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode < 0:
            raise PortError(
                f"the comparison was ended by signal {-run.returncode}, as where memory is short: smaller inputs take "
                "less"
            )
        if run.returncode:
            raise PortError(f"the source that was written does not run:\n{run.stderr[-3000:]}")
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    worst = {key: max(values.values(), default=0.0) for key, values in found.items()}
    for key, values in found.items():
        if not worst[key] <= TOLERANCE:
            name = max(values, key=lambda one: np.nan_to_num(values[one], nan=np.inf))
            raise PortError(f"the source that was written differs from PyTorch: {key} {name} by {worst[key]:.1e}")
    return Proof(worst["eval"], worst["train"], worst["gradients"], worst["buffers"], len(found["gradients"]))


def _expected(folder: pathlib.Path, module: Any, inputs: tuple[Any, ...]) -> None:
    """Writes what PyTorch computes."""
    import torch

    from interop.tracing.draws import same_draws

    module = copy.deepcopy(module).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    generator = torch.Generator().manual_seed(0)

    def uniform(like: Any, low: float, high: float) -> Any:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(getattr(layer, "running_var", None), torch.Tensor):
                for name, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5), ("weight", 0.5, 1.5),
                                        ("bias", -0.2, 0.2)):  # fmt: skip
                    if getattr(layer, name, None) is not None:
                        getattr(layer, name).copy_(uniform(getattr(layer, name), low, high))
        inputs = tuple(
            x + 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
            for x in inputs
        )
    np.savez(folder / "state.npz", **{name: x.numpy() for name, x in module.state_dict().items()})
    momenta = {
        f"{path}.running_var".lstrip("."): getattr(layer, "momentum", None) for path, layer in module.named_modules()
    }
    known: dict[str, Any] = {name: m for name, m in momenta.items() if isinstance(m, (int, float))}
    np.savez(folder / "momenta.npz", **known)
    np.savez(folder / "inputs.npz", *(x.numpy() for x in inputs))
    with same_draws(torch), _doubled():
        module.eval()
        with torch.no_grad():
            outputs = _leaves(copy.deepcopy(module)(*inputs))
        np.savez(folder / "eval.npz", *(x.numpy() for x in outputs))
        module.train()
        outputs = _leaves(module(*inputs))
    np.savez(folder / "train.npz", *(x.detach().numpy() for x in outputs))
    weights = [uniform(x, -1.0, 1.0) for x in outputs]
    np.savez(folder / "weights.npz", *(x.numpy() for x in weights))
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = _gradients(loss, parameters)
    np.savez(folder / "gradients.npz", **gradients)
    # The same numbers, rounded in other places: what PyTorch's own rounding is, of a gradient that cancels to nothing.
    again = _gradients(3 * loss, parameters)
    noise: dict[str, Any] = {name: np.abs(again[name] / 3 - x).max(initial=0) for name, x in gradients.items()}
    np.savez(folder / "noise.npz", **noise)
    np.savez(folder / "buffers.npz", **{name: x.numpy() for name, x in module.state_dict().items()
                                        if name not in dict(module.named_parameters())})  # fmt: skip


@contextlib.contextmanager
def _doubled() -> Iterator[None]:
    """What PyTorch's code makes in single precision is made in double precision, as in `compared.py`."""
    import torch
    from torch.overrides import TorchFunctionMode

    def wide(x: Any) -> Any:
        return torch.float64 if x is torch.float32 else x

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            return function(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Doubled():
            yield
    finally:
        torch.set_default_dtype(default)


def _gradients(loss: Any, parameters: Any) -> dict[str, Any]:
    """By name; those aside that the loss does not depend on."""
    import torch

    found = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True, allow_unused=True)
    return {name: x.numpy() for name, x in zip(parameters, found, strict=True) if x is not None}


def _leaves(outputs: Any) -> list[Any]:
    """The floating tensors of a result, in order."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        return [leaf for key in sorted(outputs) for leaf in _leaves(outputs[key])]
    if isinstance(outputs, (list, tuple)):
        return [leaf for item in outputs for leaf in _leaves(item)]
    return []
