"""flax_source: a PyTorch model as Flax source that a person would have written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interop._from_torch import from_torch
from interop.porting.proof import PortError
from interop.program.recorded import model_of
from interop.running.places import variable
from interop.variables import to_numpy

if TYPE_CHECKING:
    import torch

    from interop.porting.assembling import Assembly


def flax_source(
    module: torch.nn.Module,
    *example_inputs: Any,
    name: str | None = None,
    origin: str | None = None,
    plain: bool = False,
) -> str:
    """The text of a Python file: the model in Flax NNX, which computes what the PyTorch module computes.

    ```python
    text = interop.flax_source(torchvision.models.resnet50(), torch.zeros(2, 3, 224, 224))
    pathlib.Path("resnet50.py").write_text(text)
    ```

    The file needs jax, flax and jaxnorm (`plain`: not that). Its classes and attributes bear PyTorch's names, so that
    `interop.load_state_dict(model, state_dict)` takes every checkpoint of the module and `interop.state_dict(model)`
    gives it back; images are (N, H, W, C). Before it is handed over it runs in a process without torch, and is compared
    with the module in float64: outputs in eval and train mode, every gradient and every buffer after a step of training
    within 1e-8, relative to the largest value of each array; its docstring has what was found.

    **Arguments:**

    - `module`: the PyTorch model. It is left as it is.
    - `*example_inputs`: tensors, as for `interop.from_torch`, images (N, C, H, W). The comparison is made at their
      sizes: small ones are quick, but BatchNorm needs more than a few values for each channel.
    - `name`: of the function that makes the model; by default the class's in small letters.
    - `origin`: what the file says the model is; by default the class's module and name.
    - `plain`: BatchNorm is Flax's own, `flax.nnx.BatchNorm`, so that the file needs no jaxnorm. The docstring says what
      then differs: the running variance, which is compared with (n - 1) / n of PyTorch's update, and counters.

    **Returns:** the text of the file.

    **Raises:**

    - `interop.PortError`: for operations that have no plain expression, all at once with the layers that use them; for
      a source that differs from PyTorch, with where it does.
    - `ValueError`: for a `name` that is none of a function; and as `interop.from_torch`.
    - `TypeError`, `interop.TraceError`, `NotImplementedError`: as `interop.from_torch`.
    """
    from interop.porting.file import written
    from interop.porting.proof import prove

    title = name or re.sub(r"\W", "_", type(module).__name__).lower()
    if not title.isidentifier():
        raise ValueError(f"name={name!r} is no name of a function")
    assembly = assembled(module, example_inputs, title)
    described = origin or f"{type(module).__module__}.{type(module).__name__}"
    proof = prove(written(assembly, title, described, None, plain), title, module, example_inputs, plain)
    return written(assembly, title, described, proof, plain)


def assembled(module: torch.nn.Module, example_inputs: Sequence[Any], title: str) -> Assembly:
    """The classes of a module.

    Raises:
        PortError: for operations that have no plain expression, all at once, and for modules that make no classes.
    """
    from interop.porting.assembling import Assembly
    from interop.porting.bodies import Tree
    from interop.porting.values import Unprintable

    imported = from_torch(module, *example_inputs)
    recorded = model_of(imported)
    assert recorded is not None
    tree = Tree({path: type(one) for path, one in module.named_modules()})
    arrays = {entry.name: to_numpy(variable(imported, entry.name)) for entry in recorded.entries}
    kind = type(module).__name__
    try:
        assembly = Assembly(recorded, tree, arrays, title)
    except Unprintable as error:
        raise PortError(f"{kind} cannot be written as source: {error}") from error
    if assembly.problems:
        lines = [
            f"  {what}, in {', '.join(sorted(set(places))[:5]) or 'the model itself'}"
            for what, places in sorted(assembly.problems.items())
        ]
        raise PortError(f"{kind} has operations without a plain expression:\n" + "\n".join(lines))
    return assembly
