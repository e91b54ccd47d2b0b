"""Layers for Flax NNX: BatchNorm over replicas, and its kinds."""

from jaxnorm.nnx_batch_norm import BatchNorm, input_dtype
from jaxnorm.nnx_frozen import FrozenBatchNorm
from jaxnorm.nnx_renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm", "FrozenBatchNorm", "input_dtype"]
