"""What PyTorch cannot record: refused or explained in words that say where it is and what to do."""

from __future__ import annotations

import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interop.errors import TraceError
from interop.tracing import private
from interop.tracing.graph import module_path, source_line

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")


def refuse_untraceable(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What torch.export would answer in words that do not help."""
    import torch

    problems = []
    scripted = [path or "the module" for path, x in module.named_modules() if isinstance(x, torch.jit.ScriptModule)]
    if scripted:
        problems.append(
            f"TorchScript cannot be traced by torch.export: {some(scripted)}. Give the torch.nn.Module that was "
            "scripted, and load the weights into that"
        )
    packed = [
        path or "the module"
        for path, layer in module.named_modules()
        if any(private.is_script_object(value) for value in vars(layer).values())
    ]
    if packed:
        problems.append(
            f"objects of PyTorch's C++, as quantised layers hold them, cannot be traced: {some(packed)}. Import the "
            "module before it is quantised"
        )
    state = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, tensor in state if tensor.device.type == "meta"]
    if empty:
        problems.append(f"tensors on the meta device have no values: {some(empty)}. Load the weights first")
    arrays = [
        f"{name} is a {type(leaf).__module__}.{type(leaf).__name__}"
        for name, leaf in private.flatten_with_names((args, dict(kwargs)))
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, torch.Tensor)
    ]
    if arrays:
        problems.append(f"example inputs are torch.Tensors (torch.from_numpy makes one): {some(arrays)}")
    if problems:
        raise TraceError("\n".join(problems))


def refuse_unknown_shapes(module: torch.nn.Module, exported: torch.export.ExportedProgram, mode: str, why: str) -> None:
    """Shapes that depend on values, which XLA has none of; `why` a mask does not do in their place."""
    lines = []
    for node in exported.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", None)
        if node.op == "call_function" and shape is not None and private.depends_on_values(shape):
            lines.append(f"  {node.target}, in {module_path(node) or 'the module itself'} ({source_line(node)})")
    if lines:
        message = (
            f"{type(module).__name__} in {mode} mode has shapes that depend on values (boolean indices, nonzero, ...), "
            "which jax.jit cannot compile; torch.where keeps the shape:\n"
            + "\n".join(lines)
            + (f"\nNo mask does in their place, because of {why}" if why else "")
        )
        if mode == "train":
            raise TraceError(message)
        logger.warning("%s", message)  # what follows the network in eval can run outside jit


def explained(module: torch.nn.Module, mode: str, error: Exception) -> str:
    text = str(error).strip().split("\n\nThe following call raised")[0]
    if type(error).__name__.startswith("GuardOnDataDependent"):
        text = text.partition("\n")[0]  # how to debug torch.export follows
    advice = "Shapes and control flow may depend on the shapes of the inputs, not on their values."
    if unknown := re.search(r"Found <class '(.+?)'> in output", text):
        text = f"it returns a {unknown[1]}"
        advice = (
            "Results are tensors, numbers, and tuples, lists, dicts and dataclasses of them. Have the module leave it "
            f"out (config.use_cache = False, say), or register its type with {private.REGISTER_TYPES}"
        )
    place = _users_line(error)
    return (
        f"torch.export cannot record {type(module).__name__} in {mode} mode{place}\n{type(error).__name__}: {text}\n"
        f"{advice}"
    )


def _users_line(error: BaseException | None) -> str:
    """Where the module's own code was when it happened: the innermost line that is no other's."""
    # Other code that may be on the way there.
    packages = [sys.modules[name] for name in ("torch", "interop", "jaxtyping") if name in sys.modules]
    others = ("<", *(str(pathlib.Path(str(package.__file__)).parent) for package in packages))
    found = ""
    while error is not None:  # to the first cause: what torch.export raises itself was not raised in that code
        for frame in traceback.extract_tb(error.__traceback__):
            path = pathlib.Path(frame.filename)
            if not frame.filename.startswith(others) and path.name not in ("contextlib.py", "functools.py"):
                found = f" at {path.parent.name}/{path.name}:{frame.lineno}: {frame.line}"
        error = error.__cause__
    return found


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)
