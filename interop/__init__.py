"""PyTorch in, PyTorch out: models and checkpoints to JAX and back. torch is imported only where its objects arrive."""

from interop import layouts
from interop._config import apply_config, config, load_config
from interop._from_torch import from_torch
from interop._lint import lint
from interop._state_dict import load_state_dict, state_dict
from interop._suggest_rename import Suggestion, suggest_rename
from interop.artifact import load, save
from interop.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from interop.errors import TraceError
from interop.lint_rules import Finding
from interop.module import TracedModule
from interop.ops import register
from interop.optimizer import load_optimizer_state, optax_from_torch, optimizer_state_dict, schedule_from_torch
from interop.program import ProgramError
from interop.variables import Buffer, Constant, Frozen

__all__ = [
    "Buffer",
    "Checkpoint",
    "CheckpointError",
    "Constant",
    "Finding",
    "Frozen",
    "ProgramError",
    "Suggestion",
    "TraceError",
    "TracedModule",
    "apply_config",
    "config",
    "from_torch",
    "layouts",
    "lint",
    "load",
    "load_checkpoint",
    "load_config",
    "load_optimizer_state",
    "load_state_dict",
    "optax_from_torch",
    "optimizer_state_dict",
    "register",
    "save",
    "save_checkpoint",
    "schedule_from_torch",
    "state_dict",
    "suggest_rename",
]
