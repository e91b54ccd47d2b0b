"""Layers for Flax Linen: BatchNorm over replicas, and its kinds."""

from jaxnorm.linen_batch_norm import BatchNorm
from jaxnorm.linen_frozen import FrozenBatchNorm
from jaxnorm.linen_renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm", "FrozenBatchNorm"]
