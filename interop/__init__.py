"""PyTorch in, PyTorch out: models and checkpoints to JAX and back. torch is imported only where its objects arrive."""

from interop._from_torch import from_torch
from interop._state_dict import load_state_dict, state_dict
from interop.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from interop.ops import register
from interop.optimizer import load_optimizer_state, optax_from_torch, optimizer_state_dict, schedule_from_torch

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "from_torch",
    "load_checkpoint",
    "load_optimizer_state",
    "load_state_dict",
    "optax_from_torch",
    "optimizer_state_dict",
    "register",
    "save_checkpoint",
    "schedule_from_torch",
    "state_dict",
]
