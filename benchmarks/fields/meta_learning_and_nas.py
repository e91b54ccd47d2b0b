"""Meta-learning and architecture search: transductive BatchNorm, inner loops, mixed operations, shared weights."""
# ruff: noqa: B905  (as the sources have it)

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from . import integers, model, normal

FIELD = "meta_learning_and_nas"


def conv_block(in_channels, out_channels):
    bn = nn.BatchNorm2d(out_channels)
    nn.init.uniform_(bn.weight)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), bn, nn.ReLU(), nn.MaxPool2d(2))


class ProtoNet(nn.Module):
    def __init__(self, x_dim=1, hid_dim=6, z_dim=8):
        super().__init__()
        self.encoder = nn.Sequential(
            conv_block(x_dim, hid_dim), conv_block(hid_dim, hid_dim), conv_block(hid_dim, z_dim)
        )

    def embed(self, x):
        x = self.encoder(x)
        return x.view(x.size(0), -1)

    def forward(self, support, query):
        """support: way x shot images; query: way x several."""
        way, shot = support.shape[:2]
        n_query = query.shape[1]
        z = self.embed(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
        z_dim = z.size(-1)
        z_proto = z[: way * shot].view(way, shot, z_dim).mean(1)
        zq = z[way * shot :]
        n, m = zq.size(0), z_proto.size(0)
        x = zq.unsqueeze(1).expand(n, m, z_dim)
        y = z_proto.unsqueeze(0).expand(n, m, z_dim)
        dists = torch.pow(x - y, 2).sum(2)
        log_p_y = F.log_softmax(-dists, dim=1).view(way, n_query, -1)
        target_inds = torch.arange(0, way).view(way, 1, 1).expand(way, n_query, 1).long()
        loss_val = -log_p_y.gather(2, target_inds).squeeze().view(-1).mean()
        _, y_hat = log_p_y.max(2)
        acc_val = torch.eq(y_hat, target_inds.squeeze()).to(x.dtype).mean()
        return loss_val, log_p_y, acc_val


@model(
    FIELD,
    source="https://github.com/jakesnell/prototypical-networks, protonets/models/few_shot.py",
)
def prototypical():
    return ProtoNet(), (normal(4, 2, 1, 16, 16), normal(4, 3, 1, 16, 16, seed=1))


class MAMLNet(nn.Module):
    """Learner of a list of parameters, BatchNorm by F.batch_norm, always in training mode."""

    def __init__(self, config, update_lr=0.1, update_step=2):
        super().__init__()
        self.config = config
        self.vars = nn.ParameterList()
        self.vars_bn = nn.ParameterList()
        self.update_lr = update_lr
        self.update_step = update_step
        for name, param in self.config:
            if name == "conv2d":
                w = nn.Parameter(torch.ones(*param[:4]))
                torch.nn.init.kaiming_normal_(w)
                self.vars.append(w)
                self.vars.append(nn.Parameter(torch.zeros(param[0])))
            elif name == "linear":
                w = nn.Parameter(torch.ones(*param))
                torch.nn.init.kaiming_normal_(w)
                self.vars.append(w)
                self.vars.append(nn.Parameter(torch.zeros(param[0])))
            elif name == "bn":
                self.vars.append(nn.Parameter(torch.ones(param[0])))
                self.vars.append(nn.Parameter(torch.zeros(param[0])))
                running_mean = nn.Parameter(torch.zeros(param[0]), requires_grad=False)
                running_var = nn.Parameter(torch.ones(param[0]), requires_grad=False)
                self.vars_bn.extend([running_mean, running_var])

    def learner(self, x, vars=None, bn_training=True):
        if vars is None:
            vars = self.vars
        idx = 0
        bn_idx = 0
        for name, param in self.config:
            if name == "conv2d":
                w, b = vars[idx], vars[idx + 1]
                x = F.conv2d(x, w, b, stride=param[4], padding=param[5])
                idx += 2
            elif name == "linear":
                w, b = vars[idx], vars[idx + 1]
                x = F.linear(x, w, b)
                idx += 2
            elif name == "bn":
                w, b = vars[idx], vars[idx + 1]
                running_mean, running_var = self.vars_bn[bn_idx], self.vars_bn[bn_idx + 1]
                x = F.batch_norm(x, running_mean, running_var, weight=w, bias=b, training=bn_training)
                idx += 2
                bn_idx += 2
            elif name == "flatten":
                x = x.view(x.size(0), -1)
            elif name == "relu":
                x = F.relu(x, inplace=param[0])
            elif name == "max_pool2d":
                x = F.max_pool2d(x, param[0], param[1], param[2])
            else:
                raise NotImplementedError
        assert idx == len(vars)
        assert bn_idx == len(self.vars_bn)
        return x


MAML_CONFIG = [
    ("conv2d", [4, 1, 3, 3, 2, 0]),
    ("relu", [True]),
    ("bn", [4]),
    ("conv2d", [6, 4, 3, 3, 2, 0]),
    ("relu", [True]),
    ("bn", [6]),
    ("flatten", []),
    ("linear", [3, 6 * 4]),
]


class MAMLForward(MAMLNet):
    def forward(self, x):
        return self.learner(x)


class MAML(MAMLNet):
    @torch.enable_grad()
    def adapt(self, x_spt, y_spt):
        logits = self.learner(x_spt)
        loss = F.cross_entropy(logits, y_spt)
        grad = torch.autograd.grad(loss, list(self.vars))
        fast_weights = [p[1] - self.update_lr * p[0] for p in zip(grad, self.vars)]
        for _ in range(1, self.update_step):
            loss = F.cross_entropy(self.learner(x_spt, fast_weights), y_spt)
            grad = torch.autograd.grad(loss, fast_weights)
            fast_weights = [p[1] - self.update_lr * p[0] for p in zip(grad, fast_weights)]
        return fast_weights

    def forward(self, x_spt, y_spt, x_qry):
        return self.learner(x_qry, self.adapt(x_spt, y_spt))


@model(FIELD, source="https://github.com/dragen1860/MAML-Pytorch, learner.py (running statistics as parameters)")
def maml_learner():
    return MAMLForward(MAML_CONFIG), (normal(6, 1, 12, 12),)


@model(FIELD, source="https://github.com/dragen1860/MAML-Pytorch, meta.py (torch.autograd.grad inside forward)")
def maml_inner_loop():
    return MAML(MAML_CONFIG), (normal(6, 1, 12, 12), integers(3, 6), normal(6, 1, 12, 12, seed=1))


class FuncMAML(nn.Module):
    """The inner loop by torch.func.grad and functional_call."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(), nn.Linear(8, 1)
        )
        self.lrs = nn.ParameterDict(
            {k.replace(".", "_"): nn.Parameter(torch.tensor(0.05)) for k, _ in self.net.named_parameters()}
        )

    def forward(self, x_spt, y_spt, x_qry):
        def loss_fn(params, x, y):
            return F.mse_loss(torch.func.functional_call(self.net, params, (x,)), y)

        params = dict(self.net.named_parameters())
        for _ in range(2):
            grads = torch.func.grad(loss_fn)(params, x_spt, y_spt)
            params = {k: p - self.lrs[k.replace(".", "_")] * grads[k] for k, p in params.items()}
        return torch.func.functional_call(self.net, params, (x_qry,))


@model(FIELD, source="Meta-SGD by torch.func: pytorch's functorch examples (maml_regression)")
def meta_sgd():
    return FuncMAML(), (normal(8, 4), normal(8, 1, seed=1), normal(8, 4, seed=2))


class Transductive(nn.Module):
    """Conv4 whose statistics are always of the batch; cosine classifier; ridge regression as the head (R2D2)."""

    def __init__(self):
        super().__init__()
        layers = []
        for i, o in ((3, 6), (6, 8)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o, track_running_stats=False)]
            layers += [nn.LeakyReLU(0.1), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.bn = nn.BatchNorm1d(8)
        self.lambda_ = nn.Parameter(torch.tensor(0.5))
        self.alpha, self.beta = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(0.1))

    def forward(self, support, labels, query):
        n = support.size(0)
        z = self.features(torch.cat([support, query], 0)).mean((2, 3))
        z = self.bn(z)
        s, q = z[:n], z[n:]
        onehot = F.one_hot(labels, 3).to(z.dtype)
        gram = s @ s.t() + self.lambda_.abs() * torch.eye(n).to(z)
        weights = s.t() @ torch.linalg.solve(gram, onehot)
        ridge = self.alpha * (q @ weights) + self.beta
        prototypes = torch.stack([s[: n // 3].mean(0), s[n // 3 : 2 * n // 3].mean(0), s[2 * n // 3 :].mean(0)])
        cosine = F.cosine_similarity(q.unsqueeze(1), prototypes.unsqueeze(0), dim=-1)
        return ridge, cosine


@model(FIELD, source="https://github.com/bertinetto/r2d2, fewshots/models (ridge regression head), Conv4 transductive")
def conv4_r2d2():
    return Transductive(), (normal(6, 3, 8, 8), torch.tensor([0, 0, 1, 1, 2, 2]), normal(6, 3, 8, 8, seed=1))


OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine=affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine=affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine=affine),
}


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class DilConv(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, dilation, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation=dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, kernel_size=1, padding=0, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, kernel_size=1, padding=0, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_in, kernel_size, stride=1, padding=padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, kernel_size=1, padding=0, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        assert C_out % 2 == 0
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        return self.bn(out)


class MixedOp(nn.Module):
    def __init__(self, C, stride):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in OPS:
            op = OPS[primitive](C, stride, False)
            if "pool" in primitive:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class DARTSCell(nn.Module):
    def __init__(self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.reduction = reduction
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._steps = steps
        self._multiplier = multiplier
        self._ops = nn.ModuleList()
        for i in range(self._steps):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                self._ops.append(MixedOp(C, stride))

    def forward(self, s0, s1, weights):
        s0 = self.preprocess0(s0)
        s1 = self.preprocess1(s1)
        states = [s0, s1]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class DARTS(nn.Module):
    def __init__(self, C=4, classes=5, steps=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.cells = nn.ModuleList(
            [DARTSCell(steps, 2, 6, 6, C, False, False), DARTSCell(steps, 2, 6, 2 * C, C, True, False)]
        )
        self.classifier = nn.Linear(2 * C, classes)
        k = sum(1 for i in range(steps) for n in range(2 + i))
        self.alphas_normal = 1e-1 * torch.randn(k, len(OPS))
        self.alphas_normal.requires_grad_(True)
        self.alphas_reduce = nn.Parameter(1e-1 * torch.randn(k, len(OPS)))
        self._arch_parameters = [self.alphas_normal, self.alphas_reduce]

    def forward(self, input):
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            if cell.reduction:
                weights = F.softmax(self.alphas_reduce, dim=-1)
            else:
                weights = F.softmax(self.alphas_normal.to(input), dim=-1)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.classifier(s1.mean((2, 3)))


@model(FIELD, source="https://github.com/quark0/darts, cnn/model_search.py, operations.py (alphas a plain leaf tensor)")
def darts():
    return DARTS(), (normal(4, 3, 8, 8),)


class SwitchableBatchNorm2d(nn.Module):
    def __init__(self, num_features_list):
        super().__init__()
        self.num_features_list = num_features_list
        self.num_features = max(num_features_list)
        bns = []
        for i in num_features_list:
            bns.append(nn.BatchNorm2d(i))
        self.bn = nn.ModuleList(bns)
        self.width_mult = max(WIDTHS)
        self.ignore_model_profiling = True

    def forward(self, input):
        idx = WIDTHS.index(self.width_mult)
        y = self.bn[idx](input)
        return y


WIDTHS = [0.25, 0.5, 1.0]


class SlimmableConv2d(nn.Conv2d):
    def __init__(self, in_channels_list, out_channels_list, kernel_size, stride=1, padding=0, bias=True):
        super().__init__(max(in_channels_list), max(out_channels_list), kernel_size, stride, padding, bias=bias)
        self.in_channels_list = in_channels_list
        self.out_channels_list = out_channels_list
        self.width_mult = max(WIDTHS)

    def forward(self, input):
        idx = WIDTHS.index(self.width_mult)
        self.in_channels = self.in_channels_list[idx]
        self.out_channels = self.out_channels_list[idx]
        weight = self.weight[: self.out_channels, : self.in_channels, :, :]
        bias = self.bias[: self.out_channels] if self.bias is not None else self.bias
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Slimmable(nn.Module):
    """Every width in one step (the sandwich rule), each narrower one taught by the widest."""

    def __init__(self):
        super().__init__()
        a, b = [4, 8, 16], [5, 10, 20]
        self.features = nn.Sequential(
            SlimmableConv2d([3] * 3, a, 3, 1, 1, bias=False), SwitchableBatchNorm2d(a), nn.ReLU(inplace=True),
            SlimmableConv2d(a, b, 3, 2, 1, bias=False), SwitchableBatchNorm2d(b), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Linear(20, 5)

    def one(self, x, width_mult):
        self.apply(lambda m: setattr(m, "width_mult", width_mult))
        x = self.features(x).mean((2, 3))
        return F.linear(x, self.classifier.weight[:, : x.shape[1]], self.classifier.bias)

    def forward(self, x):
        full = self.one(x, 1.0)
        soft_target = F.softmax(full, dim=1).detach()
        losses = []
        for width_mult in sorted(WIDTHS, reverse=True)[1:]:
            output = self.one(x, width_mult)
            losses.append(torch.mean(-torch.sum(soft_target * F.log_softmax(output, dim=1), dim=1)))
        return full, torch.stack(losses)


@model(
    FIELD, source="https://github.com/JiahuiYu/slimmable_networks, models/slimmable_ops.py (attributes set in forward)"
)
def slimmable():
    return Slimmable(), (normal(4, 3, 8, 8),)


@model(FIELD, source="ofa (package): DynamicMBConvLayer with DynamicBatchNorm2d, elastic kernel, width and expansion")
def once_for_all():
    from ofa.imagenet_classification.elastic_nn.modules.dynamic_layers import DynamicMBConvLayer
    from ofa.imagenet_classification.elastic_nn.modules.dynamic_op import DynamicBatchNorm2d

    DynamicBatchNorm2d.SET_RUNNING_STATISTICS = False

    class Supernet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
            self.a = DynamicMBConvLayer([8], [8], [3, 5], [2, 3], stride=1, act_func="relu6", use_se=True)
            self.b = DynamicMBConvLayer([8], [12], [3, 5, 7], [2, 3], stride=2, act_func="h_swish")
            self.fc = nn.Linear(12, 5)
            self.a.active_kernel_size, self.a.active_expand_ratio = 3, 2
            self.b.active_kernel_size, self.b.active_expand_ratio = 5, 3

        def forward(self, x):
            x = self.stem(x)
            x = x + self.a(x)
            return self.fc(self.b(x).mean((2, 3)))

    return Supernet(), (normal(4, 3, 16, 16),)


class BNCalibrated(nn.Module):
    """A supernet of inverted residuals: Gumbel gates, their hard choice, latency; a copy with statistics of its own."""

    def __init__(self):
        super().__init__()

        def block(i, o, k, e, s):
            return nn.Sequential(
                OrderedDict(
                    pw=nn.Conv2d(i, i * e, 1, bias=False), bn1=nn.BatchNorm2d(i * e, momentum=None), a1=nn.ReLU6(True),
                    dw=nn.Conv2d(i * e, i * e, k, s, k // 2, groups=i * e, bias=False),
                    bn2=nn.BatchNorm2d(i * e, momentum=None), a2=nn.ReLU6(True),
                    pwl=nn.Conv2d(i * e, o, 1, bias=False), bn3=nn.BatchNorm2d(o),
                )
            )  # fmt: skip

        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(True))
        self.choices = nn.ModuleList(
            [nn.ModuleList([block(6, 6, k, e, 1) for k, e in ((3, 1), (5, 1), (3, 2))]) for _ in range(2)]
        )
        self.thetas = nn.ParameterList([nn.Parameter(torch.tensor([1 / 3, 0.2, 0.5])) for _ in range(2)])
        self.register_buffer("latency", torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.5, 2.5]]))
        self.head = nn.Linear(6, 5)
        self.teacher = copy.deepcopy(self.choices[0][0])

    def forward(self, x, temperature=5.0):
        x = self.stem(x)
        with torch.no_grad():
            wanted = self.teacher(x)
        acc_latency = torch.zeros(1).to(x)
        for i, (ops, theta) in enumerate(zip(self.choices, self.thetas)):
            soft = F.softmax(theta / temperature, dim=-1)
            hard = torch.zeros_like(soft).scatter_(0, soft.argmax(-1, keepdim=True), 1.0)
            gate = hard - soft.detach() + soft
            x = x + sum(g * op(x) for g, op in zip(gate, ops))
            acc_latency = acc_latency + (soft * self.latency[i]).sum()
        return self.head(x.mean((2, 3))), acc_latency, F.mse_loss(x, wanted)


@model(
    FIELD, source="FBNet: https://github.com/AnnaAraslanova/FBNet, supernet_functions/model_supernet.py; momentum=None"
)
def fbnet_supernet():
    return BNCalibrated(), (normal(4, 3, 8, 8),)


class TaskNorm(nn.Module):
    """TaskNorm-I: batch statistics blended with instances' by a learned curve of the number of examples."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.sigmoid = nn.Sigmoid()
        self.register_buffer("context_mean", torch.zeros(1, n, 1, 1), persistent=False)
        self.register_buffer("context_var", torch.ones(1, n, 1, 1), persistent=False)

    def forward(self, x, context):
        a = self.sigmoid(self.a * x.size(0) + self.b)
        bn_mean = x.mean((0, 2, 3), keepdim=True)
        bn_var = x.var((0, 2, 3), keepdim=True)
        if context:
            self.context_mean = bn_mean
            self.context_var = bn_var
        else:
            bn_mean, bn_var = self.context_mean, self.context_var
        i_mean = x.mean((2, 3), keepdim=True)
        i_var = x.var((2, 3), keepdim=True)
        mean = a * bn_mean + (1 - a) * i_mean
        var = a * (bn_var + (bn_mean - mean) ** 2) + (1 - a) * (i_var + (i_mean - mean) ** 2)
        y = (x - mean) / torch.sqrt(var + 1e-5)
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class CNAPs(nn.Module):
    """A context set moves the normaliser's statistics, which the target set then uses, with FiLM from the context."""

    def __init__(self):
        super().__init__()
        self.set_encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.gamma, self.beta = nn.Linear(6, 8), nn.Linear(6, 8)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), TaskNorm(8)

    def features(self, x, film, context):
        x = self.norm(self.conv(x), context)
        return F.relu(film[0] * x + film[1]).mean((2, 3))

    def forward(self, context, target):
        task = self.set_encoder(context).flatten(1).mean(0, keepdim=True)
        film = (1 + self.gamma(task)[..., None, None], self.beta(task)[..., None, None])
        c = self.features(context, film, True)
        t = self.features(target, film, False)
        centred = c - c.mean(0, keepdim=True)
        covariance = centred.t() @ centred / (c.size(0) - 1) + 0.1 * torch.eye(8).to(c)
        difference = (t.unsqueeze(1) - c.unsqueeze(0)).flatten(0, 1)
        distance = (difference @ torch.inverse(covariance) * difference).sum(-1).view(t.size(0), -1)
        return -distance


@model(
    FIELD, source="https://github.com/cambridge-mlg/cnaps, src/normalization_layers.py (TaskNormI), Simple CNAPS's head"
)
def task_norm():
    return CNAPs(), (normal(6, 3, 8, 8), normal(6, 3, 8, 8, seed=1))
