"""BatchNorm over replicas: exact statistics across devices, PyTorch's conventions, and the tools to train with them."""

from jaxnorm import linen, nnx
from jaxnorm._batch_norm import batch_norm, normalize
from jaxnorm._plan import Plan, plan
from jaxnorm._recalibrate import recalibrate
from jaxnorm.checkpoints import Checkpoints
from jaxnorm.ema import Ema, EmaState
from jaxnorm.evaluation import eval_step, evaluate
from jaxnorm.frozen import convert_frozen_batchnorm, revert_frozen_batchnorm
from jaxnorm.loss_scale import LossScale
from jaxnorm.means import Mean, pad_batch
from jaxnorm.metrics import Confusion, in_top_k
from jaxnorm.moments import Moments, merge, moments
from jaxnorm.parallel import data_parallel
from jaxnorm.processes import join_processes
from jaxnorm.replicas import replica_divergence, replicate, unreplicate
from jaxnorm.saved_runs import RestoredModel, restore_model
from jaxnorm.sync import convert_sync_batchnorm, revert_sync_batchnorm
from jaxnorm.train import TrainState, train_step

__all__ = [
    "Checkpoints",
    "Confusion",
    "Ema",
    "EmaState",
    "LossScale",
    "Mean",
    "Moments",
    "Plan",
    "RestoredModel",
    "TrainState",
    "batch_norm",
    "convert_frozen_batchnorm",
    "convert_sync_batchnorm",
    "data_parallel",
    "eval_step",
    "evaluate",
    "in_top_k",
    "join_processes",
    "linen",
    "merge",
    "moments",
    "nnx",
    "normalize",
    "pad_batch",
    "plan",
    "recalibrate",
    "replica_divergence",
    "replicate",
    "restore_model",
    "revert_frozen_batchnorm",
    "revert_sync_batchnorm",
    "train_step",
    "unreplicate",
]
