"""The BatchNorm layers of an imported model."""

from __future__ import annotations

from collections.abc import Collection

from flax import nnx

import jaxnorm
from interop.conventions import flax_momentum
from interop.program.nodes import BatchNormLayer


class TracedBatchNorm(jaxnorm.nnx.BatchNorm):
    """`jaxnorm.nnx.BatchNorm` with channels at axis 1, and what PyTorch's layer has besides.

    Attributes:
        affine: PyTorch's flag, whatever arrays there are.
        frozen: stays in eval mode while the model trains.
        counts: training moves its counter, which a layer with a forward of its own may leave alone.
    """

    def __init__(self, layer: BatchNormLayer, arrays: Collection[str], rngs: nnx.Rngs):
        """`arrays` are those that the layer has, by PyTorch's names."""
        momentum = layer.momentum
        if momentum is None and "running_mean" in arrays and "num_batches_tracked" not in arrays:
            momentum = 0.0  # nothing to average by, as in torch/nn/modules/batchnorm.py (_BatchNorm.forward)
        super().__init__(
            1,  # for the time being: the arrays are the model's, and none is made (compiled, for each size) in vain
            use_running_average=not layer.training,
            axis=1,
            momentum=flax_momentum(momentum),
            epsilon=layer.eps,
            use_bias="bias" in arrays,
            use_scale="weight" in arrays,
            promote_dtype=jaxnorm.nnx.input_dtype,
            track_running_stats="running_mean" in arrays,
            count_batches="num_batches_tracked" in arrays,
            rngs=rngs,
        )
        self.num_features = layer.num_features
        self.track_running_stats = layer.track_running_stats
        self.affine = layer.affine
        self.frozen = layer.frozen
        self.counts = layer.counts
        self.layer_name = layer.path
