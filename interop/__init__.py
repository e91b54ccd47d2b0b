"""PyTorch in, PyTorch out: models and checkpoints to JAX and back. torch is imported only where its objects arrive."""

from interop.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"]
