"""Variants of batch normalisation, each in a small network."""
# ruff: noqa: B905, RUF059, SIM102, SIM108  (as the sources have it)

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from . import model, normal

FIELD = "batch_norm_variants"


class Small(nn.Module):
    """Three convolutions, each followed by the variant."""

    def __init__(self, norm, width=8, classes=5, activation=True):
        super().__init__()
        act = nn.ReLU if activation else nn.Identity
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm1 = norm(width)
        self.act1 = act()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.act2 = act()
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm3 = norm(2 * width)
        self.act3 = act()
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.act1(self.norm1(self.conv1(x)))
        x = x + self.act2(self.norm2(self.conv2(x)))
        x = self.act3(self.norm3(self.conv3(x)))
        return self.fc(x.mean(dim=[2, 3]))


class GhostBatchNorm(nn.BatchNorm2d):
    """Statistics of each part of the batch, running ones of their own per part until evaluation."""

    def __init__(self, num_features, num_splits, eps=1e-05, momentum=0.1, weight=True, bias=True):
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.weight.data.fill_(1.0)
        self.bias.data.fill_(0.0)
        self.weight.requires_grad = weight
        self.bias.requires_grad = bias
        self.num_splits = num_splits
        self.register_buffer("running_mean", torch.zeros(num_features * self.num_splits))
        self.register_buffer("running_var", torch.ones(num_features * self.num_splits))

    def train(self, mode=True):
        if (self.training is True) and (mode is False):
            self.running_mean = torch.mean(self.running_mean.view(self.num_splits, self.num_features), dim=0).repeat(
                self.num_splits
            )
            self.running_var = torch.mean(self.running_var.view(self.num_splits, self.num_features), dim=0).repeat(
                self.num_splits
            )
        return super().train(mode)

    def forward(self, input):
        N, C, H, W = input.shape
        if self.training or not self.track_running_stats:
            return F.batch_norm(
                input.view(-1, C * self.num_splits, H, W),
                self.running_mean,
                self.running_var,
                self.weight.repeat(self.num_splits),
                self.bias.repeat(self.num_splits),
                True,
                self.momentum,
                self.eps,
            ).view(N, C, H, W)
        else:
            return F.batch_norm(
                input,
                self.running_mean[: self.num_features],
                self.running_var[: self.num_features],
                self.weight,
                self.bias,
                False,
                self.momentum,
                self.eps,
            )


class GhostByChunks(nn.Module):
    """Ghost batch normalisation as tabnet has it: one layer called on each chunk."""

    def __init__(self, input_dim, virtual_batch_size=2, momentum=0.01):
        super().__init__()
        self.input_dim = input_dim
        self.virtual_batch_size = virtual_batch_size
        self.bn = nn.BatchNorm2d(self.input_dim, momentum=momentum)

    def forward(self, x):
        chunks = x.chunk(-(-x.shape[0] // self.virtual_batch_size), 0)
        return torch.cat([self.bn(x_) for x_ in chunks], dim=0)


@model(FIELD, source="https://github.com/davidcpage/cifar10-fast, torch_backend.py (GhostBatchNorm)")
def ghost():
    return Small(lambda n: GhostBatchNorm(n, 2)), (normal(8, 3, 8, 8),)


@model(FIELD, source="https://github.com/dreamquark-ai/tabnet, pytorch_tabnet/tab_network.py (GBN)")
def ghost_by_chunks():
    return Small(GhostByChunks), (normal(6, 3, 8, 8),)


class SwitchNorm2d(nn.Module):
    def __init__(
        self, num_features, eps=1e-5, momentum=0.9, using_moving_average=True, using_bn=True, last_gamma=False
    ):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.using_moving_average = using_moving_average
        self.using_bn = using_bn
        self.last_gamma = last_gamma
        self.weight = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        if self.using_bn:
            self.mean_weight = nn.Parameter(torch.ones(3))
            self.var_weight = nn.Parameter(torch.ones(3))
        else:
            self.mean_weight = nn.Parameter(torch.ones(2))
            self.var_weight = nn.Parameter(torch.ones(2))
        if self.using_bn:
            self.register_buffer("running_mean", torch.zeros(1, num_features, 1))
            self.register_buffer("running_var", torch.zeros(1, num_features, 1))
        self.reset_parameters()

    def reset_parameters(self):
        if self.using_bn:
            self.running_mean.zero_()
            self.running_var.zero_()
        if self.last_gamma:
            self.weight.data.fill_(0)
        else:
            self.weight.data.fill_(1)
        self.bias.data.zero_()

    def _check_input_dim(self, input):
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")

    def forward(self, x):
        self._check_input_dim(x)
        N, C, H, W = x.size()
        x = x.view(N, C, -1)
        mean_in = x.mean(-1, keepdim=True)
        var_in = x.var(-1, keepdim=True)

        mean_ln = mean_in.mean(1, keepdim=True)
        temp = var_in + mean_in**2
        var_ln = temp.mean(1, keepdim=True) - mean_ln**2

        if self.using_bn:
            if self.training:
                mean_bn = mean_in.mean(0, keepdim=True)
                var_bn = temp.mean(0, keepdim=True) - mean_bn**2
                if self.using_moving_average:
                    self.running_mean.mul_(self.momentum)
                    self.running_mean.add_((1 - self.momentum) * mean_bn.data)
                    self.running_var.mul_(self.momentum)
                    self.running_var.add_((1 - self.momentum) * var_bn.data)
                else:
                    self.running_mean.add_(mean_bn.data)
                    self.running_var.add_(mean_bn.data**2 + var_bn.data)
            else:
                mean_bn = torch.autograd.Variable(self.running_mean)
                var_bn = torch.autograd.Variable(self.running_var)

        softmax = nn.Softmax(0)
        mean_weight = softmax(self.mean_weight)
        var_weight = softmax(self.var_weight)

        if self.using_bn:
            mean = mean_weight[0] * mean_in + mean_weight[1] * mean_ln + mean_weight[2] * mean_bn
            var = var_weight[0] * var_in + var_weight[1] * var_ln + var_weight[2] * var_bn
        else:
            mean = mean_weight[0] * mean_in + mean_weight[1] * mean_ln
            var = var_weight[0] * var_in + var_weight[1] * var_ln

        x = (x - mean) / (var + self.eps).sqrt()
        x = x.view(N, C, H, W)
        return x * self.weight + self.bias


@model(FIELD, source="https://github.com/switchablenorms/Switchable-Normalization, devkit/ops/switchable_norm.py")
def switchable():
    return Small(SwitchNorm2d), (normal(4, 3, 8, 8),)


class BatchRenorm2d(nn.Module):
    """Corrections r and d, whose limits grow with the steps."""

    def __init__(self, num_features, eps=1e-3, momentum=0.01, affine=True):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features, dtype=torch.float))
        self.register_buffer("running_std", torch.ones(num_features, dtype=torch.float))
        self.register_buffer("num_batches_tracked", torch.tensor(20000, dtype=torch.long))
        self.weight = nn.Parameter(torch.ones(num_features, dtype=torch.float))
        self.bias = nn.Parameter(torch.zeros(num_features, dtype=torch.float))
        self.affine = affine
        self.eps = eps
        self.step = 0
        self.momentum = momentum

    @property
    def rmax(self):
        return (2 / 35000 * self.num_batches_tracked + 25 / 35).clamp_(1.0, 3.0)

    @property
    def dmax(self):
        return (5 / 20000 * self.num_batches_tracked - 25 / 20).clamp_(0.0, 5.0)

    def forward(self, x, mask=None):
        if x.dim() > 2:
            x = x.transpose(1, -1)
        if self.training:
            dims = [i for i in range(x.dim() - 1)]
            if mask is not None:
                z = x[~mask]
                batch_mean = z.mean(0)
                batch_std = z.std(0, unbiased=False) + self.eps
            else:
                batch_mean = x.mean(dims)
                batch_std = x.std(dims, unbiased=False) + self.eps

            r = (batch_std.detach() / self.running_std.view_as(batch_std)).clamp_(1 / self.rmax, self.rmax)
            d = (
                (batch_mean.detach() - self.running_mean.view_as(batch_mean)) / self.running_std.view_as(batch_std)
            ).clamp_(-self.dmax, self.dmax)
            x = (x - batch_mean) / batch_std * r + d
            self.running_mean += self.momentum * (batch_mean.detach() - self.running_mean)
            self.running_std += self.momentum * (batch_std.detach() - self.running_std)
            self.num_batches_tracked += 1
        else:
            x = (x - self.running_mean) / self.running_std
        if self.affine:
            x = self.weight * x + self.bias
        if x.dim() > 2:
            x = x.transpose(1, -1)
        return x


@model(FIELD, source="https://github.com/ludvb/batchrenorm, batchrenorm/batchrenorm.py")
def renorm():
    return Small(BatchRenorm2d), (normal(4, 3, 8, 8),)


class BIN2d(nn.modules.batchnorm._BatchNorm):
    """Batch-instance normalisation: a gate a channel between the two."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True):
        super().__init__(num_features, eps, momentum, affine)
        self.gate = Parameter(torch.Tensor(num_features))
        self.gate.data.fill_(1)
        self.gate.bin_gate = True

    def _check_input_dim(self, input):
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")

    def forward(self, input):
        self._check_input_dim(input)
        # Batch norm
        if self.affine:
            bn_w = self.weight * self.gate
        else:
            bn_w = self.gate
        out_bn = F.batch_norm(
            input, self.running_mean, self.running_var, bn_w, self.bias, self.training, self.momentum, self.eps
        )
        # Instance norm
        b, c = input.size(0), input.size(1)
        if self.affine:
            in_w = self.weight * (1 - self.gate)
        else:
            in_w = 1 - self.gate
        input = input.view(1, b * c, *input.size()[2:])
        out_in = F.batch_norm(input, None, None, None, None, True, self.momentum, self.eps)
        out_in = out_in.view(b, c, *input.size()[2:])
        out_in.mul_(in_w[None, :, None, None])
        return out_bn + out_in


@model(FIELD, source="https://github.com/hyeonseobnam/Batch-Instance-Normalization, models/batchinstancenorm.py")
def batch_instance():
    return Small(BIN2d), (normal(4, 3, 8, 8),)


class IBN(nn.Module):
    def __init__(self, planes, ratio=0.5):
        super().__init__()
        self.half = int(planes * ratio)
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(planes - self.half)

    def forward(self, x):
        split = torch.split(x, self.half, 1)
        out1 = self.IN(split[0].contiguous())
        out2 = self.BN(split[1].contiguous())
        return torch.cat((out1, out2), 1)


@model(FIELD, source="https://github.com/XingangPan/IBN-Net, ibnnet/modules.py")
def ibn():
    return Small(IBN), (normal(4, 3, 8, 8),)


class FRN(nn.Module):
    """Filter response normalisation with its thresholded unit."""

    def __init__(self, num_features, eps=1e-6, is_eps_leanable=True):
        super().__init__()
        self.init_eps = eps
        self.weight = Parameter(torch.ones(1, num_features, 1, 1), requires_grad=True)
        self.bias = Parameter(torch.zeros(1, num_features, 1, 1), requires_grad=True)
        self.tau = Parameter(torch.full((1, num_features, 1, 1), -0.5))
        if is_eps_leanable:
            self.eps = Parameter(torch.full((1,), 1e-4), requires_grad=True)
        else:
            self.register_buffer("eps", torch.Tensor([eps]))

    def forward(self, x):
        nu2 = x.pow(2).mean(dim=[2, 3], keepdim=True)
        x = x * torch.rsqrt(nu2 + self.init_eps + self.eps.abs())
        x = self.weight * x + self.bias
        return torch.max(x, self.tau)


@model(FIELD, source="https://github.com/gupta-abhay/pytorch-frn, frn.py; every second norm a BatchNorm2d")
def frn_mix():
    made = []

    def norm(n):
        made.append(n)
        return FRN(n) if len(made) % 2 else nn.BatchNorm2d(n)

    return Small(norm, activation=False), (normal(4, 3, 8, 8),)


class MABN2d(nn.Module):
    """Moving-average batch normalisation: its own backward, statistics kept as buffers that both directions write."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, running_second, eps):
            N, C, H, W = x.size()
            current = (x**2).mean(dim=(0, 2, 3), keepdim=True)
            running_second.mul_(0.98).add_(current, alpha=0.02)
            z = x / (running_second + eps).sqrt()
            ctx.save_for_backward(z, running_second.clone(), weight)
            ctx.eps = eps
            return z * weight.view(1, C, 1, 1)

        @staticmethod
        def backward(ctx, grad):
            z, second, weight = ctx.saved_tensors
            N, C, H, W = z.size()
            y = grad * weight.view(1, C, 1, 1)
            g = (y * z).mean(dim=(0, 2, 3), keepdim=True)
            gx = (y - z * g) / (second + ctx.eps).sqrt()
            return gx, (grad * z).sum(dim=(0, 2, 3)), None, None

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))
        self.weight = Parameter(torch.ones(channels))
        self.bias = Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        if self.training:
            x = self.Function.apply(x, self.weight, self.running_var, self.eps)
            return x + self.bias.view(1, -1, 1, 1)
        r = self.weight.view(1, -1, 1, 1) * torch.rsqrt(self.running_var + self.eps)
        return r * x + self.bias.view(1, -1, 1, 1)


@model(
    FIELD, source="https://github.com/megvii-model/MABN, MABN.py (the forward average; every second norm a BatchNorm2d)"
)
def moving_average():
    made = []

    def norm(n):
        made.append(n)
        return nn.BatchNorm2d(n) if len(made) % 2 else MABN2d(n)

    return Small(norm), (normal(4, 3, 8, 8),)


class RepresentativeBatchNorm2d(nn.BatchNorm2d):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.num_features = num_features
        self.center_weight = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale_weight = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale_bias = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.stas = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, input):
        self._check_input_dim(input)
        ####### centering calibration begin #######
        input += self.center_weight * self.stas(input)
        ####### centering calibration end #######
        exponential_average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked = self.num_batches_tracked + 1
            if self.momentum is None:
                exponential_average_factor = 1.0 / float(self.num_batches_tracked)
            else:
                exponential_average_factor = self.momentum
        output = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            None,
            None,
            self.training or not self.track_running_stats,
            exponential_average_factor,
            self.eps,
        )
        ####### scaling calibration begin #######
        scale_factor = torch.sigmoid(self.scale_weight * self.stas(output) + self.scale_bias)
        ####### scaling calibration end #######
        if self.affine:
            return self.weight[None, :, None, None] * output * scale_factor + self.bias[None, :, None, None]
        return output * scale_factor


@model(FIELD, source="https://github.com/ShangHua-Gao/RBN, rbn.py")
def representative():
    return Small(RepresentativeBatchNorm2d), (normal(4, 3, 8, 8),)


class WSConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        weight_mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - weight_mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BCNorm(nn.Module):
    """Batch-channel normalisation (estimated statistics, then groups of channels)."""

    def __init__(self, num_channels, num_groups=4, eps=1e-5, estimate=True):
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = Parameter(torch.ones(1, num_groups, 1))
        self.bias = Parameter(torch.zeros(1, num_groups, 1))
        self.bn = EstBN(num_channels) if estimate else nn.BatchNorm2d(num_channels)

    def forward(self, inp):
        out = self.bn(inp)
        out = out.view(1, inp.size(0) * self.num_groups, -1)
        out = torch.batch_norm(out, None, None, None, None, True, 0, self.eps, True)
        out = out.view(inp.size(0), self.num_groups, -1)
        out = self.weight * out + self.bias
        return out.view_as(inp)


class EstBN(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features
        self.weight = Parameter(torch.ones(num_features))
        self.bias = Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.register_buffer("estbn_moving_speed", torch.zeros(1))

    def forward(self, inp):
        ms = self.estbn_moving_speed.item()
        if self.training:
            with torch.no_grad():
                inp_t = inp.transpose(0, 1).contiguous().view(self.num_features, -1)
                running_mean = inp_t.mean(dim=1)
                inp_t = inp_t - self.running_mean.view(-1, 1)
                running_var = torch.mean(inp_t * inp_t, dim=1)
                self.running_mean.data.mul_(1 - ms).add_(ms * running_mean.data)
                self.running_var.data.mul_(1 - ms).add_(ms * running_var.data)
        out = inp - self.running_mean.view(1, -1, 1, 1)
        out = out / torch.sqrt(self.running_var + 1e-5).view(1, -1, 1, 1)
        weight = self.weight.view(1, -1, 1, 1)
        bias = self.bias.view(1, -1, 1, 1)
        out = weight * out + bias
        return out


def with_standardised_weights(module):
    for name in ("conv1", "conv2", "conv3"):
        old = getattr(module, name)
        setattr(module, name, WSConv2d(old.in_channels, old.out_channels, 3, old.stride, 1, bias=False))
    return module


@model(FIELD, source="https://github.com/joe-siyuan-qiao/WeightStandardization, README.md")
def weight_standardisation():
    return with_standardised_weights(Small(nn.BatchNorm2d)), (normal(4, 3, 8, 8),)


@model(
    FIELD, source="https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization, README.md (BCNorm with BatchNorm2d)"
)
def batch_channel():
    return with_standardised_weights(Small(lambda n: BCNorm(n, estimate=False))), (normal(4, 3, 8, 8),)


@model(
    FIELD,
    source="https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization, README.md (EstBN: .item() of a buffer)",
)
def batch_channel_estimated():
    return with_standardised_weights(Small(BCNorm)), (normal(4, 3, 8, 8),)


class ABN(nn.Module):
    """Activated batch normalisation, without the package's kernels."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, activation="leaky_relu", param=0.01):
        super().__init__()
        self.num_features = num_features
        self.affine = affine
        self.eps = eps
        self.momentum = momentum
        self.activation = activation
        self.activation_param = param
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.abs() + self.eps, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip
        if self.activation == "relu":
            return F.relu(x, inplace=True)
        elif self.activation == "leaky_relu":
            return F.leaky_relu(x, negative_slope=self.activation_param, inplace=True)
        elif self.activation == "elu":
            return F.elu(x, alpha=self.activation_param, inplace=True)
        else:
            return x


@model(FIELD, source="https://github.com/mapillary/inplace_abn, inplace_abn/abn.py (ABN)")
def activated():
    return Small(ABN, activation=False), (normal(4, 3, 8, 8),)


class EvoNorm2D(nn.Module):
    """EvoNorm-B0, which keeps a running variance."""

    def __init__(self, input, non_linear=True, version="B0", momentum=0.9, eps=1e-5, training=True):
        super().__init__()
        self.non_linear = non_linear
        self.version = version
        self.momentum = momentum
        self.eps = eps
        self.insize = input
        self.gamma = nn.Parameter(torch.ones(1, self.insize, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, self.insize, 1, 1))
        if self.non_linear:
            self.v = nn.Parameter(torch.ones(1, self.insize, 1, 1))
        self.register_buffer("running_var", torch.ones(1, self.insize, 1, 1))

    def instance_std(self, x, eps=1e-5):
        var = torch.var(x, dim=(2, 3), keepdim=True).expand_as(x)
        if torch.isnan(var).any():
            var = torch.zeros(var.shape)
        return torch.sqrt(var + eps)

    def forward(self, x):
        if self.training:
            var = torch.var(x, dim=(0, 2, 3), unbiased=False, keepdim=True)
            self.running_var.mul_(self.momentum)
            self.running_var.add_((1 - self.momentum) * var)
        else:
            var = self.running_var
        if self.non_linear:
            den = torch.max((var + self.eps).sqrt(), self.v * x + self.instance_std(x, eps=self.eps))
            return x / den * self.gamma + self.beta
        return x * self.gamma + self.beta


class EvoNormB0(EvoNorm2D):
    """The same without the look at values for NaN, and the statistics outside of autograd, as timm has it."""

    def instance_std(self, x, eps=1e-5):
        return torch.sqrt(torch.var(x, dim=(2, 3), keepdim=True, unbiased=False).expand_as(x) + eps)

    def forward(self, x):
        if self.training:
            var = x.float().var(dim=(0, 2, 3), unbiased=False)
            n = x.numel() / x.shape[1]
            self.running_var.copy_(
                (self.running_var * self.momentum)
                + (var.detach()[None, :, None, None] * (1 - self.momentum) * (n / (n - 1)))
            )
        else:
            var = self.running_var
        left = var.to(x.dtype).view(1, -1, 1, 1).add(self.eps).sqrt().expand_as(x)
        right = x * self.v + self.instance_std(x, self.eps)
        return x / left.max(right) * self.gamma + self.beta


@model(FIELD, source="https://github.com/digantamisra98/EvoNorm, models/evonorm2d.py (asks isnan(...).any())")
def evonorm_b0():
    return Small(EvoNorm2D, activation=False), (normal(4, 3, 8, 8),)


@model(FIELD, source="https://github.com/huggingface/pytorch-image-models, timm/layers/evo_norm.py, by hand")
def evonorm_b0_timm():
    return Small(EvoNormB0, activation=False), (normal(4, 3, 8, 8),)


def apply_complex(fr, fi, input):
    return torch.complex(fr(input.real) - fi(input.imag), fr(input.imag) + fi(input.real))


class ComplexConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1):
        super().__init__()
        self.conv_r = nn.Conv2d(in_channels, out_channels, kernel_size, stride)
        self.conv_i = nn.Conv2d(in_channels, out_channels, kernel_size, stride)

    def forward(self, input):
        return apply_complex(self.conv_r, self.conv_i, input)


class ComplexLinear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.fc_r = nn.Linear(in_features, out_features)
        self.fc_i = nn.Linear(in_features, out_features)

    def forward(self, input):
        return apply_complex(self.fc_r, self.fc_i, input)


class ComplexBatchNorm2d(nn.Module):
    """complexPyTorch's, with the input's precision where it has complex64 throughout."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = Parameter(torch.Tensor(num_features, 3))
        self.bias = Parameter(torch.Tensor(num_features, 2))
        self.register_buffer("running_mean", torch.zeros(num_features, dtype=torch.complex128))
        self.register_buffer("running_covar", torch.zeros(num_features, 3))
        self.running_covar[:, 0] = 1.4142135623730951
        self.running_covar[:, 1] = 1.4142135623730951
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        nn.init.constant_(self.weight[:, :2], 1.4142135623730951)
        nn.init.zeros_(self.weight[:, 2])
        nn.init.zeros_(self.bias)

    def forward(self, input):
        exponential_average_factor = 0.0
        if self.training:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                if self.momentum is None:
                    exponential_average_factor = 1.0 / float(self.num_batches_tracked)
                else:
                    exponential_average_factor = self.momentum
        if self.training:
            mean_r = input.real.mean([0, 2, 3]).type(input.dtype)
            mean_i = input.imag.mean([0, 2, 3]).type(input.dtype)
            mean = mean_r + 1j * mean_i
        else:
            mean = self.running_mean.to(input.dtype)
        if self.training:
            with torch.no_grad():
                self.running_mean = (
                    exponential_average_factor * mean + (1 - exponential_average_factor) * self.running_mean
                )
        input = input - mean[None, :, None, None]
        if self.training:
            n = input.numel() / input.size(1)
            Crr = 1.0 / n * input.real.pow(2).sum(dim=[0, 2, 3]) + self.eps
            Cii = 1.0 / n * input.imag.pow(2).sum(dim=[0, 2, 3]) + self.eps
            Cri = (input.real.mul(input.imag)).mean(dim=[0, 2, 3])
        else:
            Crr = self.running_covar[:, 0] + self.eps
            Cii = self.running_covar[:, 1] + self.eps
            Cri = self.running_covar[:, 2]
        if self.training:
            with torch.no_grad():
                self.running_covar[:, 0] = (
                    exponential_average_factor * Crr * n / (n - 1)
                    + (1 - exponential_average_factor) * self.running_covar[:, 0]
                )
                self.running_covar[:, 1] = (
                    exponential_average_factor * Cii * n / (n - 1)
                    + (1 - exponential_average_factor) * self.running_covar[:, 1]
                )
                self.running_covar[:, 2] = (
                    exponential_average_factor * Cri * n / (n - 1)
                    + (1 - exponential_average_factor) * self.running_covar[:, 2]
                )
        det = Crr * Cii - Cri.pow(2)
        s = torch.sqrt(det)
        t = torch.sqrt(Cii + Crr + 2 * s)
        inverse_st = 1.0 / (s * t)
        Rrr = (Cii + s) * inverse_st
        Rii = (Crr + s) * inverse_st
        Rri = -Cri * inverse_st
        dtype = input.dtype
        input = (Rrr[None, :, None, None] * input.real + Rri[None, :, None, None] * input.imag).type(dtype) + 1j * (
            Rii[None, :, None, None] * input.imag + Rri[None, :, None, None] * input.real
        ).type(dtype)
        return (
            self.weight[None, :, 0, None, None] * input.real
            + self.weight[None, :, 2, None, None] * input.imag
            + self.bias[None, :, 0, None, None]
        ).type(dtype) + 1j * (
            self.weight[None, :, 2, None, None] * input.real
            + self.weight[None, :, 1, None, None] * input.imag
            + self.bias[None, :, 1, None, None]
        ).type(dtype)


class ComplexNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = ComplexConv2d(1, 4)
        self.bn = ComplexBatchNorm2d(4)
        self.conv2 = ComplexConv2d(4, 6)
        self.fc1 = ComplexLinear(2 * 2 * 6, 8)
        self.bn2 = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.conv1(torch.complex(x, x.flip(-1)))
        x = torch.complex(F.relu(x.real), F.relu(x.imag))
        x = torch.complex(F.max_pool2d(x.real, 2), F.max_pool2d(x.imag, 2))
        x = self.bn(x)
        x = self.conv2(x)
        x = F.relu(x.real).type(x.dtype) + 1j * F.relu(x.imag).type(x.dtype)
        x = x.view(-1, 2 * 2 * 6)
        x = self.fc1(x)
        x = self.bn2(x.abs())
        return F.log_softmax(x, dim=1)


@model(FIELD, source="https://github.com/wavefrontshaping/complexPyTorch, complexLayers.py (in the input's precision)")
def complex_conv():
    return ComplexNet(), (normal(4, 1, 10, 10),)


class ComplexBatchNorm(nn.Module):
    """Whitening of real and imaginary parts, kept in the last dimension, as DCCRN has it."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.num_features = num_features // 2
        self.eps = eps
        self.momentum = momentum
        n = self.num_features
        self.Wrr = nn.Parameter(torch.ones(n))
        self.Wri = nn.Parameter(torch.empty(n).uniform_(-0.9, 0.9))
        self.Wii = nn.Parameter(torch.ones(n))
        self.Br = nn.Parameter(torch.zeros(n))
        self.Bi = nn.Parameter(torch.zeros(n))
        self.register_buffer("RMr", torch.zeros(n))
        self.register_buffer("RMi", torch.zeros(n))
        self.register_buffer("RVrr", torch.ones(n))
        self.register_buffer("RVri", torch.zeros(n))
        self.register_buffer("RVii", torch.ones(n))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, inputs):
        xr, xi = torch.chunk(inputs, 2, 1)
        exponential_average_factor = 0.0
        if self.training:
            self.num_batches_tracked += 1
            if self.momentum is None:
                exponential_average_factor = 1.0 / self.num_batches_tracked.item()
            else:
                exponential_average_factor = self.momentum
        training = self.training
        redux = [i for i in reversed(range(xr.dim())) if i != 1]
        vdim = [1] * xr.dim()
        vdim[1] = xr.size(1)
        if training:
            Mr, Mi = xr, xi
            for d in redux:
                Mr = Mr.mean(d, keepdim=True)
                Mi = Mi.mean(d, keepdim=True)
            self.RMr.lerp_(Mr.squeeze(), exponential_average_factor)
            self.RMi.lerp_(Mi.squeeze(), exponential_average_factor)
        else:
            Mr = self.RMr.view(vdim)
            Mi = self.RMi.view(vdim)
        xr, xi = xr - Mr, xi - Mi
        if training:
            Vrr = xr * xr
            Vri = xr * xi
            Vii = xi * xi
            for d in redux:
                Vrr = Vrr.mean(d, keepdim=True)
                Vri = Vri.mean(d, keepdim=True)
                Vii = Vii.mean(d, keepdim=True)
            self.RVrr.lerp_(Vrr.squeeze(), exponential_average_factor)
            self.RVri.lerp_(Vri.squeeze(), exponential_average_factor)
            self.RVii.lerp_(Vii.squeeze(), exponential_average_factor)
        else:
            Vrr = self.RVrr.view(vdim)
            Vri = self.RVri.view(vdim)
            Vii = self.RVii.view(vdim)
        Vrr = Vrr + self.eps
        Vii = Vii + self.eps
        tau = Vrr + Vii
        delta = torch.addcmul(Vrr * Vii, Vri, Vri, value=-1)
        s = delta.sqrt()
        t = (tau + 2 * s).sqrt()
        rst = (s * t).reciprocal()
        Urr = (s + Vii) * rst
        Uii = (s + Vrr) * rst
        Uri = (-Vri) * rst
        Wrr, Wri, Wii = self.Wrr.view(vdim), self.Wri.view(vdim), self.Wii.view(vdim)
        Zrr = (Wrr * Urr) + (Wri * Uri)
        Zri = (Wrr * Uri) + (Wri * Uii)
        Zir = (Wri * Urr) + (Wii * Uri)
        Zii = (Wri * Uri) + (Wii * Uii)
        yr = (Zrr * xr) + (Zri * xi)
        yi = (Zir * xr) + (Zii * xi)
        yr = yr + self.Br.view(vdim)
        yi = yi + self.Bi.view(vdim)
        return torch.cat([yr, yi], 1)


@model(FIELD, source="https://github.com/huyanxin/DeepComplexCRN, complexnn.py (ComplexBatchNorm)")
def complex_dccrn():
    return Small(ComplexBatchNorm), (normal(4, 3, 8, 8),)


class LayerNormThroughBatchNorm(nn.Module):
    """Layer normalisation by a BatchNorm1d over transposed activations, and a GroupNorm by F.batch_norm."""

    def __init__(self, features, groups=2, batch=4):
        super().__init__()
        self.groups = groups
        self.ln = nn.BatchNorm1d(batch, affine=False, track_running_stats=False)
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.bn = nn.BatchNorm2d(features)

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.ln(x.reshape(1, n, c * h * w)).view(n, c, h, w)
        y = y * self.gamma[:, None, None] + self.beta[:, None, None]
        g = F.batch_norm(x.reshape(1, n * self.groups, -1), None, None, training=True).view_as(x)
        return self.bn(y + 0.5 * g)


@model(FIELD, source="the trick of https://github.com/ruotianluo (LayerNorm as BatchNorm1d of the transpose)")
def layer_norm_through_batch_norm():
    class Fixed(Small):
        def forward(self, x):
            if x.shape[0] != 4:  # the trick knows its batch
                return torch.cat([super(Fixed, self).forward(part) for part in x.split(4)])
            return super().forward(x)

    return Fixed(LayerNormThroughBatchNorm), (normal(4, 3, 8, 8),)


class ByHand(nn.Module):
    """Statistics moved by assignment, F.batch_norm never asked to move them; scale and shift evolve from the input."""

    def __init__(self, n, momentum=0.05):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("var", torch.ones(n))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.gate = nn.Sequential(nn.Linear(n, max(n // 4, 1)), nn.ReLU(), nn.Linear(max(n // 4, 1), 2 * n))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.steps += 1
                decay = torch.clamp(1.0 / self.steps, min=self.momentum)
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
                self.mean = (1 - decay) * self.mean + decay * mean
                self.var = self.var.lerp(var, decay)
            x_hat = F.batch_norm(x, None, None, training=True)
        else:
            x_hat = F.batch_norm(x, self.mean, self.var, training=False)
        weight, bias = self.gate(x.mean((2, 3))).chunk(2, dim=1)
        return x_hat * (1 + weight.tanh())[..., None, None] + bias[..., None, None]


@model(FIELD, source="instance-level meta normalisation (Jia et al. 2019) with F.batch_norm by hand")
def by_hand_with_gate():
    return Small(ByHand), (normal(4, 3, 8, 8),)


class VirtualBatchNorm(nn.Module):
    """Statistics of a reference batch that forward passes through first (Salimans et al. 2016)."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.ref_mean = self.register_parameter("ref_mean", None)
        self.ref_mean_sq = self.register_parameter("ref_mean_sq", None)
        self.gamma = Parameter(torch.normal(mean=torch.ones(1, num_features, 1, 1), std=0.02))
        self.beta = Parameter(torch.zeros(1, num_features, 1, 1))

    def get_stats(self, x):
        mean = x.mean(3, keepdim=True).mean(2, keepdim=True).mean(0, keepdim=True)
        mean_sq = (x**2).mean(3, keepdim=True).mean(2, keepdim=True).mean(0, keepdim=True)
        return mean, mean_sq

    def forward(self, x, ref_mean, ref_mean_sq):
        mean, mean_sq = self.get_stats(x)
        if ref_mean is None or ref_mean_sq is None:
            mean = mean.clone().detach()
            mean_sq = mean_sq.clone().detach()
            out = self._normalize(x, mean, mean_sq)
        else:
            batch_size = x.size(0)
            new_coeff = 1.0 / (batch_size + 1.0)
            old_coeff = 1.0 - new_coeff
            mean = new_coeff * mean + old_coeff * ref_mean
            mean_sq = new_coeff * mean_sq + old_coeff * ref_mean_sq
            out = self._normalize(x, mean, mean_sq)
        return out, mean, mean_sq

    def _normalize(self, x, mean, mean_sq):
        assert mean_sq is not None
        assert mean is not None
        assert len(x.size()) == 4
        std = torch.sqrt(self.eps + mean_sq - mean**2)
        x = x - mean
        x = x / std
        return x * self.gamma + self.beta


class VBNDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)])
        self.vbns = nn.ModuleList([VirtualBatchNorm(8), VirtualBatchNorm(12)])
        self.bn = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 1)

    def features(self, x, stats):
        new = []
        for i, (conv, vbn) in enumerate(zip(self.convs, self.vbns)):
            x, mean, mean_sq = vbn(conv(x), *(stats[i] if stats else (None, None)))
            new.append((mean, mean_sq))
            x = F.leaky_relu(x, 0.2)
        return x, new

    def forward(self, x, reference):
        _, stats = self.features(reference, None)
        h, _ = self.features(x, stats)
        return self.fc(self.bn(h.flatten(2).sum(-1))).squeeze(1)


@model(FIELD, source="https://github.com/santi-pdp/segan_pytorch, segan/models/core.py (VirtualBatchNorm1d)")
def virtual():
    return VBNDiscriminator(), (normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1))
