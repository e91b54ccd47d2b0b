"""BatchNorm of other libraries, whose code no trace can look into, comes in as what it computes, and goes home.

None of them can be built here: each stand-in has the module path, name, attributes and signature of the class that it
stands for, and a forward that ends in a `torch.autograd.Function` over code that is not there. The reference beside it
is the layer's own arithmetic in one process, written with PyTorch's functions.
"""

import copy

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from parity_tools import assert_same_step, jax_step, normal, relative, to_jax, torch_step
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import interop
import jaxnorm
from interop.errors import TraceError


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, *others):
        raise RuntimeError("a CUDA extension that is not built here")


class Apex(_BatchNorm):
    __module__, __qualname__ = "apex.parallel.optimized_sync_batchnorm", "SyncBatchNorm"

    def __init__(self, num_features, process_group=None, channel_last=False, fuse_relu=False, **options):
        super().__init__(num_features, **options)
        self.process_group, self.channel_last, self.fuse_relu = process_group, channel_last, fuse_relu

    def forward(self, input, z=None):
        if self.training and self.track_running_stats:
            self.num_batches_tracked += 1
        return Kernel.apply(input, z, self.weight, self.bias, self.running_mean, self.running_var, self.eps)


class ApexInPython(_BatchNorm):
    __module__, __qualname__ = "apex.parallel.sync_batchnorm", "SyncBatchNorm"

    def __init__(self, num_features, process_group=None, **options):
        super().__init__(num_features, **options)
        self.process_group = process_group

    def forward(self, input):
        mean = input.transpose(0, 1).reshape(input.shape[1], -1).mean(1)
        self.running_mean = self.momentum * mean + (1 - self.momentum) * self.running_mean
        return Kernel.apply(input, self.weight, self.bias, mean)


class Naive(nn.BatchNorm2d):
    __module__, __qualname__ = "detectron2.layers.batch_norm", "NaiveSyncBatchNorm"

    def __init__(self, num_features, stats_mode="", **options):
        super().__init__(num_features, **options)
        self._stats_mode = stats_mode

    def forward(self, input):
        return Kernel.apply(input, self._stats_mode)


class Holding(nn.Module):
    """What mmcv's and inplace_abn's layers hold: no subclass of PyTorch's BatchNorm."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        for name, start in (("weight", torch.ones), ("bias", torch.zeros)):
            self.register_parameter(name, nn.Parameter(start(num_features)) if affine else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    def forward(self, x):
        return Kernel.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)


class Mmcv(Holding):
    __module__, __qualname__ = "mmcv.ops.sync_bn", "SyncBatchNorm"

    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        self.group, self.group_size = None, 1

    def forward(self, input):
        return super().forward(input)


class Abn(Holding):
    __module__, __qualname__ = "inplace_abn.abn", "ABN"

    def __init__(self, num_features, activation="leaky_relu", activation_param=0.01, **options):
        super().__init__(num_features, **options)
        self.activation, self.activation_param = activation, activation_param

    def forward(self, x):
        return super().forward(x)


class InPlace(Abn):
    __module__, __qualname__ = "inplace_abn.abn", "InPlaceABNSync"
    group = None

    def forward(self, x):
        return super().forward(x)


class Subclass(Apex):
    """Somebody's own, with apex's forward."""

    __module__, __qualname__ = "somebody.layers", "Norm"


def function(layer, x, weight):
    if layer.training and layer.track_running_stats:
        layer.num_batches_tracked += 1
    cumulative = layer.training and layer.momentum is None
    share = 1 / float(layer.num_batches_tracked) if cumulative else layer.momentum or 0.0
    training = layer.training or layer.running_mean is None
    return F.batch_norm(x, layer.running_mean, layer.running_var, weight, layer.bias, training, share, layer.eps)


class Reference(nn.Module):
    """The model around a layer, with what the layer computes written out."""

    def __init__(self, layer, written):
        super().__init__()
        self.first, self.norm, self.last, self.written = nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 3), written

    def forward(self, x):
        y = self.first(x)
        return self.last(self.norm(y) if self.written is None else self.written(self.norm, y))


def plain(layer, x):
    return function(layer, x, layer.weight)


def abn(layer, x):
    y = function(layer, x, layer.weight)
    return {"leaky_relu": lambda: F.leaky_relu(y, layer.activation_param), "identity": lambda: y, "relu": y.relu,
            "elu": lambda: F.elu(y, layer.activation_param)}[layer.activation]()  # fmt: skip


def in_place(layer, x):
    return F.elu(function(layer, x, layer.weight.abs() + layer.eps), layer.activation_param)


LAYERS = {
    "apex": (lambda: Apex(4, eps=1e-3), plain),
    "apex, cumulative": (lambda: Apex(4, momentum=None), plain),
    "apex, a subclass": (lambda: Subclass(4, momentum=0.3), plain),
    "apex in Python": (lambda: ApexInPython(4, affine=False), plain),
    "detectron2": (lambda: Naive(4, stats_mode="N"), plain),
    "mmcv": (lambda: Mmcv(4, momentum=0.2), plain),
    "mmcv, nothing tracked": (lambda: Mmcv(4, track_running_stats=False), plain),
    "inplace_abn.ABN": (lambda: Abn(4, activation_param=0.2), abn),
    "inplace_abn.InPlaceABNSync": (lambda: InPlace(4, activation="elu", activation_param=0.7), in_place),
}


def drawn(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, low, high in (
            ("weight", -1, 1.5),
            ("bias", -0.5, 0.5),
            ("running_mean", -1, 1),
            ("running_var", 0.5, 2),
        ):
            if (tensor := getattr(layer, name)) is not None:
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return layer


def pair(name):
    make, written = LAYERS[name]
    module = Reference(drawn(make()), None).double().train()
    reference = copy.deepcopy(module)
    reference.written = written
    return module, reference


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_no_trace_looks_into_trains_and_evaluates_as_what_it_computes(name):
    module, reference = pair(name)
    x = normal(3, 3, 7, 7)
    before = dict(vars(module.norm))
    model = interop.from_torch(module, x)
    assert {key for key in vars(module.norm)} == set(before) and "forward" not in vars(module.norm)
    for training in (True, False):
        reference.train(training)
        model.train() if training else model.eval()
        assert_same_step(jax_step(model, to_jax(x)), torch_step(reference, x), 1e-12)
    module.load_state_dict({key: torch.tensor(value) for key, value in interop.state_dict(model).items()}, strict=True)
    layer = not name.endswith("InPlaceABNSync")
    assert isinstance(model.norm, jaxnorm.nnx.BatchNorm) == layer


@pytest.mark.parametrize("name", ["apex", "mmcv", "inplace_abn.ABN"])
def test_it_is_synchronised_as_any_other(name):
    module, reference = pair(name)
    x = normal(8, 3, 7, 7)
    graph, state = nnx.split(jaxnorm.convert_sync_batchnorm(interop.from_torch(module, x[:2]), "batch"))
    run = jax.pmap(lambda x: nnx.merge(graph, state, copy=True)(x), axis_name="batch", devices=jax.devices()[:4])
    y = run(to_jax(x).reshape(4, 2, 3, 7, 7)).reshape(8, 2, 3, 3)
    assert relative(y, reference(x).detach()) < 1e-12


def test_what_keeps_another_scale_is_named_where_an_axis_name_does_not_reach_it():
    module, _ = pair("inplace_abn.InPlaceABNSync")
    model = interop.from_torch(module, normal(2, 3, 7, 7))
    with pytest.warns(UserWarning, match=r"not synchronised.*norm\.running_mean"):
        jaxnorm.convert_sync_batchnorm(model, "batch")


class ChannelsLast(nn.Module):
    def __init__(self, fuse_relu):
        super().__init__()
        self.norm = drawn(Apex(4, channel_last=True, fuse_relu=fuse_relu))

    def forward(self, x, z):
        return self.norm(x, z)


@pytest.mark.parametrize("fuse_relu", [True, False])
def test_apexs_channels_last_with_a_summand_and_a_relu(fuse_relu):
    module = ChannelsLast(fuse_relu).double().train()
    x, z = normal(3, 5, 5, 4), normal(3, 5, 5, 4, seed=2)
    model = interop.from_torch(module, x, z)
    reference = copy.deepcopy(module)

    def forward(x, z):
        y = function(reference.norm, x.permute(0, 3, 1, 2), reference.norm.weight).permute(0, 2, 3, 1) + z
        return y.relu() if fuse_relu else y

    reference.forward = forward
    for training in (True, False):
        reference.train(training)
        model.train() if training else model.eval()
        expected = forward(x, z).detach()
        assert relative(model(to_jax(x), to_jax(z)), expected) < 1e-12
        for name, value in reference.state_dict().items():
            assert relative(interop.state_dict(model)[name], value) < 1e-12


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Reference(Apex(4, fuse_relu=True), None), r"norm \(apex.*SyncBatchNorm\): apex leaves fuse_relu out"),
        (Reference(Apex(4), lambda norm, y: norm(y, y)), r"norm \(apex.*\): apex leaves z out of what it computes"),
        (
            Reference(Abn(4, activation="gelu"), None),
            r"norm \(inplace_abn\.abn\.ABN\): its activation is one of .*'gelu'",
        ),
    ],
)
def test_what_apex_leaves_out_and_unknown_activations_are_refused_by_name(module, says):
    with pytest.raises(TraceError, match=says):
        interop.from_torch(module, torch.zeros(2, 3, 7, 7))
    assert "forward" not in vars(module.norm)


class Overridden(Apex):
    """Its own forward is what counts."""

    def forward(self, input):
        return 2 * F.relu(input)


def test_a_forward_of_ones_own_is_traced_as_it_is():
    module = Overridden(4).double()
    x = normal(3, 4, 5, 5)
    model = interop.from_torch(nn.Sequential(module), x)
    np.testing.assert_array_equal(model(to_jax(x)), 2 * x.relu().numpy())
