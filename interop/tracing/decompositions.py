"""Operations that have no JAX function, in terms of others that do: by PyTorch's own definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import interop.ops
from interop.program.operations import DROPPED, GRADIENT_OF, RUN
from interop.tracing.graph import operation_name

if TYPE_CHECKING:
    import torch

_ROUNDS = 4  # a definition may use operations that need one of their own


def decomposed(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The exported program with those operations taken apart that PyTorch knows how to take apart; others stay.

    The definitions are those of `torch.export.default_decompositions()`. Operations that have a JAX function stay
    whole: that function is as near to PyTorch's own kernel as can be, and quicker to compile.
    """
    import torch

    for _ in range(_ROUNDS):
        unknown = {node.target for node in exported.graph.nodes if node.op == "call_function" and _unknown(node.target)}
        table = {op: how for op, how in torch.export.default_decompositions().items() if op in unknown}
        if not table:
            break
        exported = exported.run_decompositions(table)
    return exported


def _unknown(target: torch.fx.node.Target) -> bool:
    import torch

    name = operation_name(target)
    return name not in DROPPED | RUN | {GRADIENT_OF} and interop.ops.lookup(name, torch.__version__) is None
