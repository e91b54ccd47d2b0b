"""PyTorch in, PyTorch out: models and checkpoints to JAX and back. torch is imported only where its objects arrive."""

from interop._clash import refuse_other_interop
from interop._flax_source import flax_source
from interop._from_torch import from_torch
from interop.arrays import to_torch
from interop.comparing._compare import compare
from interop.comparing.report import Comparison, LayerDifference
from interop.errors import ProgramError, TraceError
from interop.files.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from interop.files.epochs import first_epoch
from interop.linting._lint import lint
from interop.linting.rules import Finding
from interop.ops import register
from interop.optimizers._optax_from_torch import optax_from_torch
from interop.optimizers.plateau import Plateau, plateau_from_torch
from interop.optimizers.schedules import schedule_from_torch
from interop.optimizers.state import load_optimizer_state, optimizer_state_dict
from interop.porting.proof import PortError
from interop.running._features import features
from interop.running.artifact import load, save
from interop.running.module import TracedModule
from interop.variables import Buffer, Constant, Frozen
from interop.weights import layouts
from interop.weights._config import apply_config, config, load_config
from interop.weights._freeze import freeze, unfreeze
from interop.weights._save_checkpoint import save_checkpoint
from interop.weights._state_dict import load_state_dict, state_dict
from interop.weights._suggest_rename import Suggestion, suggest_rename

refuse_other_interop()

__all__ = [
    "Buffer",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Constant",
    "Finding",
    "Frozen",
    "LayerDifference",
    "Plateau",
    "PortError",
    "ProgramError",
    "Suggestion",
    "TraceError",
    "TracedModule",
    "apply_config",
    "compare",
    "config",
    "features",
    "first_epoch",
    "flax_source",
    "freeze",
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
    "plateau_from_torch",
    "register",
    "save",
    "save_checkpoint",
    "schedule_from_torch",
    "state_dict",
    "suggest_rename",
    "to_torch",
    "unfreeze",
]
