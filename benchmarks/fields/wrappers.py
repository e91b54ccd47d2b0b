"""The same small networks inside what people wrap networks in."""
# ruff: noqa: B905  (as the sources have it)

import functools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "wrappers"


class Block(nn.Module):
    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.layer1 = Block(6, 6)
        self.layer2 = Block(6, 10, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(10, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


IMAGES = (4, 3, 8, 8)


@model(FIELD, source="torch.nn.DataParallel around a network")
def data_parallel():
    return nn.DataParallel(Net()), (normal(*IMAGES),)


@model(FIELD, source="torch.compile around one submodule")
def compiled_submodule():
    net = Net()
    net.layer1 = torch.compile(net.layer1)
    return net, (normal(*IMAGES),)


@model(FIELD, source="module.compile() in place, of a block")
def compiled_in_place():
    net = Net()
    net.layer2.compile()
    return net, (normal(*IMAGES),)


@model(FIELD, source="torch.fx.symbolic_trace of a network")
def fx_traced():
    return torch.fx.symbolic_trace(Net()), (normal(*IMAGES),)


@model(FIELD, source="torchvision (package): models.feature_extraction.create_feature_extractor")
def feature_extractor():
    from torchvision.models import feature_extraction

    nodes = {"layer1.relu_1": "low", "layer2.bn2": "high", "avgpool": "pooled"}
    return feature_extraction.create_feature_extractor(Net(), nodes), (normal(*IMAGES),)


@model(FIELD, source="torchvision (package): models._utils.IntermediateLayerGetter and MLP, Conv2dNormActivation, SE")
def intermediate_layers():
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.ops import MLP, Conv2dNormActivation, SqueezeExcitation, StochasticDepth

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = IntermediateLayerGetter(Net(), {"layer1": "a", "layer2": "b"})
            self.lateral = Conv2dNormActivation(10, 6, 1)
            self.se = SqueezeExcitation(6, 3)
            self.drop = StochasticDepth(0.2, "row")
            self.mlp = MLP(6, [8, 5], norm_layer=nn.BatchNorm1d)

        def forward(self, x):
            found = self.body(x)
            b = F.interpolate(self.lateral(found["b"]), size=found["a"].shape[-2:], mode="nearest")
            y = found["a"] + self.drop(self.se(b))
            return OrderedDict(pooled=self.mlp(y.mean((2, 3))), map=y)

    return Head(), (normal(*IMAGES),)


@model(FIELD, source="torch.nn.utils.spectral_norm, weight_norm (hooks) with BatchNorm")
def norm_hooks():
    with_warning = nn.utils.weight_norm
    net = Net()
    net.layer1.conv1 = nn.utils.spectral_norm(net.layer1.conv1)
    net.layer2.conv1 = with_warning(net.layer2.conv1)
    net.fc = nn.utils.spectral_norm(net.fc)
    return net, (normal(*IMAGES),)


@model(FIELD, source="torch.nn.utils.parametrizations (spectral_norm, weight_norm, orthogonal) with BatchNorm")
def parametrised():
    from torch.nn.utils import parametrizations

    net = Net()
    parametrizations.spectral_norm(net.layer1.conv1)
    parametrizations.weight_norm(net.layer2.conv1)
    parametrizations.orthogonal(net.fc, orthogonal_map="householder")
    return net, (normal(*IMAGES),)


class Symmetric(nn.Module):
    def forward(self, w):
        return 0.5 * (w + w.flip(-1))

    def right_inverse(self, w):
        return w


class Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)


@model(FIELD, source="torch.nn.utils.parametrize with own parametrisations, one over a BatchNorm's weight")
def own_parametrisation():
    from torch.nn.utils import parametrize

    net = Net()
    parametrize.register_parametrization(net.layer1.conv1, "weight", Symmetric())
    parametrize.register_parametrization(net.layer1.bn1, "weight", Positive(), unsafe=True)
    return net, (normal(*IMAGES),)


@model(FIELD, source="torch.nn.utils.prune of convolutions and of a BatchNorm's weight")
def pruned():
    from torch.nn.utils import prune

    net = Net()
    prune.l1_unstructured(net.layer1.conv1, "weight", 0.4)
    prune.ln_structured(net.layer2.conv2, "weight", 0.3, n=2, dim=0)
    prune.random_unstructured(net.layer2.bn2, "weight", 0.3)
    return net, (normal(*IMAGES),)


@model(
    FIELD,
    source="torch.utils.checkpoint, reentrant and not (PyTorch's backward moves statistics once more)",
)
def checkpointed():
    from torch.utils.checkpoint import checkpoint, checkpoint_sequential

    class Checkpointed(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.Sequential(Block(10, 10), Block(10, 10))

        def forward(self, x):
            x = self.stem(x)
            x = checkpoint(self.layer1, x, use_reentrant=False)
            x = checkpoint(self.layer2, x, use_reentrant=True)
            x = checkpoint_sequential(self.more, 2, x, use_reentrant=False)
            return self.fc(self.avgpool(x).flatten(1))

    return Checkpointed(), (normal(*IMAGES),)


@model(FIELD, source="torch.optim.swa_utils.AveragedModel")
def averaged_model():
    return torch.optim.swa_utils.AveragedModel(Net(), use_buffers=True), (normal(*IMAGES),)


class LitModule(nn.Module):
    """What a LightningModule is to forward: the network, a loss, metrics' state, an averaged copy without gradients."""

    def __init__(self, decay=0.99):
        super().__init__()
        import copy

        self.example_input_array = torch.zeros(1, 3, 8, 8)
        self.net = Net()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.loss = nn.CrossEntropyLoss(weight=torch.rand(5), label_smoothing=0.1)
        self.register_buffer("correct", torch.zeros(5), persistent=False)
        self.register_buffer("total", torch.tensor(0))
        self.decay = decay
        self._logged = {}

    @torch.no_grad()
    def update_ema(self):
        for p, q in zip(self.ema.parameters(), self.net.parameters()):
            p.mul_(self.decay).add_(q.detach(), alpha=1 - self.decay)

    def log(self, name, value):
        self._logged[name] = value.detach()

    def forward(self, x):
        logits = self.net(x)
        with torch.no_grad():
            teacher = self.ema(x).softmax(-1)
        loss = self.loss(logits, teacher) + F.mse_loss(logits.softmax(-1), teacher)
        if self.training:
            self.correct += F.one_hot(logits.argmax(-1), 5).sum(0)
            self.total += x.shape[0]
        self.log("loss", loss)
        return loss, logits


@model(FIELD, source="a LightningModule's shape: network, EMA teacher, loss module, counters, self.log")
def lightning_like():
    return LitModule(), (normal(*IMAGES),)


class Residual(nn.Module):
    def __init__(self, fn, drop=0.2):
        super().__init__()
        self.fn = fn
        self.drop = drop

    def forward(self, x):
        if not self.training:
            return self.fn(x) * (1 - self.drop) + x
        return x + self.fn(x)


class LayerScale(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.scale = nn.Parameter(0.1 * torch.ones(dim, 1, 1))
        self.fn = fn

    def __getattr__(self, name):  # forwards what it does not have to the layer it wraps
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("fn"), name)

    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) * self.scale


@model(
    FIELD, source="lucidrains' Residual/LayerScale wrappers: scaled in eval only, __getattr__ that forwards, lambdas"
)
def residual_wrappers():
    class Lambda(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.fn = fn

        def forward(self, x):
            return self.fn(x)

    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        *[Residual(LayerScale(6, nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)))) for _ in range(2)],
        Lambda(functools.partial(F.adaptive_avg_pool2d, output_size=1)),
        Lambda(lambda x: x.squeeze(-1).squeeze(-1)),
        nn.BatchNorm1d(6),
    )
    return net, (normal(*IMAGES),)


class Functional(nn.Module):
    """A network whose weights come from a hypernetwork's changes, by functional_call."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.shift = nn.Parameter(torch.randn(10))

    def forward(self, x):
        parameters = dict(self.net.named_parameters())
        parameters["layer2.bn2.bias"] = parameters["layer2.bn2.bias"] + self.shift
        parameters = {k: v * 1.01 for k, v in parameters.items()}
        return torch.func.functional_call(self.net, parameters, (x,))


@model(FIELD, source="torch.func.functional_call of changed parameters, buffers in place")
def functional_call():
    return Functional(), (normal(*IMAGES),)


class Ensemble(nn.Module):
    """stack_module_state and vmap over members (in eval, as BatchNorm's statistics cannot be moved under vmap)."""

    def __init__(self, members=3):
        super().__init__()
        self.members = nn.ModuleList([Net() for _ in range(members)])
        self.bn = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.bn(torch.stack([m(x) for m in self.members]).mean(0))


@model(FIELD, source="an ensemble of networks in a ModuleList, averaged")
def ensemble():
    return Ensemble(), (normal(*IMAGES),)


@model(FIELD, source="forward hooks and pre-hooks on an nn.Sequential: features kept, outputs changed, inputs scaled")
def hooked():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                OrderedDict(
                    conv1=nn.Conv2d(3, 6, 3, padding=1),
                    bn1=nn.BatchNorm2d(6),
                    relu=nn.ReLU(inplace=False),
                    conv2=nn.Conv2d(6, 6, 3, padding=1),
                    bn2=nn.BatchNorm2d(6),
                )
            )
            self.net.bn1.register_forward_hook(self.keep("bn1"))
            self.net.relu.register_forward_hook(lambda module, args, output: output * 1.5)
            self.net.conv2.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean((2, 3), True),))
            self.net.bn2.register_forward_hook(self.keep("bn2"))

        def keep(self, name):
            def hook(module, args, output):
                module.kept = {name: output}

            return hook

        def forward(self, x):
            y = self.net(x)
            features = {
                k: v for m in self.net.modules() if hasattr(m, "kept") for k, v in m.__dict__.pop("kept").items()
            }
            gram = [torch.einsum("nchw,ndhw->ncd", f, f) / f[0, 0].numel() for f in features.values()]
            return y, gram

    return Hooked(), (normal(*IMAGES),)


@model(FIELD, source="torch.jit.script of one submodule")
def scripted_submodule():
    net = Net()
    net.layer1 = torch.jit.script(net.layer1)
    return net, (normal(*IMAGES),)


@model(FIELD, source="torch.jit.trace of one submodule")
def jit_traced_submodule():
    net = Net()
    net.layer1 = torch.jit.trace(net.layer1.eval(), torch.zeros(2, 6, 8, 8))
    return net.train(), (normal(*IMAGES),)


@model(
    FIELD, source="torch.nn.SyncBatchNorm.convert_sync_batchnorm, without a process group; autocast off inside forward"
)
def sync_batch_norm():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.net(x)

    return Cast(), (normal(*IMAGES),)


@model(FIELD, source="nn.utils.fusion: fuse_conv_bn_eval of the stem, the rest as it was; lazy layers materialised")
def fused_and_lazy():
    net = Net()
    net.stem = nn.Sequential(nn.utils.fuse_conv_bn_eval(net.stem[0].eval(), net.stem[1].eval()), nn.ReLU())
    net.fc = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(5))
    net(torch.randn(4, 3, 8, 8))
    return net, (normal(*IMAGES),)
