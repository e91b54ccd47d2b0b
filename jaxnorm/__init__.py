"""BatchNorm over replicas: exact statistics across devices, PyTorch's conventions, and the tools to train with them."""

from jaxnorm.ema import Ema, EmaState
from jaxnorm.parallel import data_parallel
from jaxnorm.replicas import replica_divergence, replicate, unreplicate
from jaxnorm.train import LossScale, Mean, TrainState, pad_batch, train_step

__all__ = [
    "Ema",
    "EmaState",
    "LossScale",
    "Mean",
    "TrainState",
    "data_parallel",
    "pad_batch",
    "replica_divergence",
    "replicate",
    "train_step",
    "unreplicate",
]
