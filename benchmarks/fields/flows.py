"""Normalizing flows: BatchNorm in the networks, and as a layer of the flow with running statistics of its own."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import model, normal


class BatchNormFlow(nn.Module):
    """https://github.com/ikostrikov/pytorch-flows, flows.py: statistics by copies and products in place."""

    def __init__(self, num_inputs, momentum=0.0, eps=1e-5):
        super().__init__()
        self.log_gamma = nn.Parameter(torch.zeros(num_inputs))
        self.beta = nn.Parameter(torch.zeros(num_inputs))
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(num_inputs))
        self.register_buffer("running_var", torch.ones(num_inputs))

    def forward(self, inputs, cond_inputs=None, mode="direct"):
        if mode == "direct":
            if self.training:
                self.batch_mean = inputs.mean(0)
                self.batch_var = (inputs - self.batch_mean).pow(2).mean(0) + self.eps

                self.running_mean.mul_(self.momentum)
                self.running_var.mul_(self.momentum)

                self.running_mean.add_(self.batch_mean.data * (1 - self.momentum))
                self.running_var.add_(self.batch_var.data * (1 - self.momentum))

                mean = self.batch_mean
                var = self.batch_var
            else:
                mean = self.running_mean
                var = self.running_var

            x_hat = (inputs - mean) / var.sqrt()
            y = torch.exp(self.log_gamma) * x_hat + self.beta
            return y, (self.log_gamma - 0.5 * torch.log(var)).sum(-1, keepdim=True)
        if self.training:
            mean = self.batch_mean
            var = self.batch_var
        else:
            mean = self.running_mean
            var = self.running_var
        x_hat = (inputs - self.beta) / torch.exp(self.log_gamma)
        y = x_hat * var.sqrt() + mean
        return y, (-self.log_gamma + 0.5 * torch.log(var)).sum(-1, keepdim=True)


def get_mask(in_features, out_features, in_flow_features, mask_type=None):
    if mask_type == "input":
        in_degrees = torch.arange(in_features) % in_flow_features
    else:
        in_degrees = torch.arange(in_features) % (in_flow_features - 1)
    if mask_type == "output":
        out_degrees = torch.arange(out_features) % in_flow_features - 1
    else:
        out_degrees = torch.arange(out_features) % (in_flow_features - 1)
    return (out_degrees.unsqueeze(-1) >= in_degrees.unsqueeze(0)).float()


class MaskedLinear(nn.Module):
    def __init__(self, in_features, out_features, mask, cond_in_features=None, bias=True):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        if cond_in_features is not None:
            self.cond_linear = nn.Linear(cond_in_features, out_features, bias=False)
        self.register_buffer("mask", mask)

    def forward(self, inputs, cond_inputs=None):
        output = F.linear(inputs, self.linear.weight * self.mask, self.linear.bias)
        if cond_inputs is not None:
            output += self.cond_linear(cond_inputs)
        return output


class MADE(nn.Module):
    def __init__(self, num_inputs, num_hidden, num_cond_inputs=None):
        super().__init__()
        self.joiner = MaskedLinear(
            num_inputs, num_hidden, get_mask(num_inputs, num_hidden, num_inputs, "input"), num_cond_inputs
        )
        self.trunk = nn.Sequential(
            nn.Tanh(),
            MaskedLinear(num_hidden, num_hidden, get_mask(num_hidden, num_hidden, num_inputs)),
            nn.Tanh(),
            MaskedLinear(num_hidden, num_inputs * 2, get_mask(num_hidden, num_inputs * 2, num_inputs, "output")),
        )

    def forward(self, inputs, cond_inputs=None, mode="direct"):
        if mode == "direct":
            h = self.joiner(inputs, cond_inputs)
            m, a = self.trunk(h).chunk(2, 1)
            u = (inputs - m) * torch.exp(-a)
            return u, -a.sum(-1, keepdim=True)
        x = torch.zeros_like(inputs)
        for i_col in range(inputs.shape[1]):
            h = self.joiner(x, cond_inputs)
            m, a = self.trunk(h).chunk(2, 1)
            x[:, i_col] = inputs[:, i_col] * torch.exp(a[:, i_col]) + m[:, i_col]
        return x, -a.sum(-1, keepdim=True)


class Reverse(nn.Module):
    def __init__(self, num_inputs):
        super().__init__()
        self.perm = np.array(np.arange(0, num_inputs)[::-1])
        self.inv_perm = np.argsort(self.perm)

    def forward(self, inputs, cond_inputs=None, mode="direct"):
        perm = self.perm if mode == "direct" else self.inv_perm
        return inputs[:, perm], torch.zeros(inputs.size(0), 1, device=inputs.device)


class CouplingLayer(nn.Module):
    def __init__(self, num_inputs, num_hidden, mask):
        super().__init__()
        self.register_buffer("mask", mask)
        self.scale_net = nn.Sequential(
            nn.Linear(num_inputs, num_hidden), nn.BatchNorm1d(num_hidden), nn.Tanh(), nn.Linear(num_hidden, num_inputs)
        )
        self.translate_net = nn.Sequential(
            nn.Linear(num_inputs, num_hidden), nn.BatchNorm1d(num_hidden), nn.ReLU(), nn.Linear(num_hidden, num_inputs)
        )

    def forward(self, inputs, cond_inputs=None, mode="direct"):
        mask = self.mask
        masked_inputs = inputs * mask
        log_s = self.scale_net(masked_inputs) * (1 - mask)
        t = self.translate_net(masked_inputs) * (1 - mask)
        if mode == "direct":
            s = torch.exp(log_s)
            return inputs * s + t, log_s.sum(-1, keepdim=True)
        s = torch.exp(-log_s)
        return (inputs - t) * s, -log_s.sum(-1, keepdim=True)


class FlowSequential(nn.Sequential):
    def forward(self, inputs, cond_inputs=None, mode="direct", logdets=None):
        self.num_inputs = inputs.size(-1)
        if logdets is None:
            logdets = torch.zeros(inputs.size(0), 1, device=inputs.device)
        assert mode in ["direct", "inverse"]
        if mode == "direct":
            for module in self._modules.values():
                inputs, logdet = module(inputs, cond_inputs, mode)
                logdets += logdet
        else:
            for module in reversed(self._modules.values()):
                inputs, logdet = module(inputs, cond_inputs, mode)
                logdets += logdet
        return inputs, logdets

    def log_probs(self, inputs, cond_inputs=None):
        u, log_jacob = self(inputs, cond_inputs)
        log_probs = (-0.5 * u.pow(2) - 0.5 * np.log(2 * np.pi)).sum(-1, keepdim=True)
        return (log_probs + log_jacob).sum(-1, keepdim=True)


class LogProbs(nn.Module):
    """A module whose forward is the loss, and a sample from the inverse beside it."""

    def __init__(self, flow, inverse):
        super().__init__()
        self.flow, self.inverse = flow, inverse

    def forward(self, inputs, *cond_inputs):
        loss = -self.flow.log_probs(inputs, *cond_inputs).mean()
        if not self.inverse:
            return loss
        with torch.no_grad():
            samples, _ = self.flow(inputs.flip(0), *cond_inputs, mode="inverse")
        return loss, samples


@model("flows", source="https://github.com/ikostrikov/pytorch-flows, flows.py: MAF with BatchNormFlow, its density")
def maf():
    layers = [layer for _ in range(2) for layer in (MADE(4, 12), BatchNormFlow(4, momentum=0.9), Reverse(4))]
    return LogProbs(FlowSequential(*layers), False), (normal(16, 4),)


@model("flows", source="https://github.com/ikostrikov/pytorch-flows, flows.py: conditional MAF, sampled by columns too")
def maf_conditional():
    layers = [layer for _ in range(2) for layer in (MADE(4, 12, 3), BatchNormFlow(4), Reverse(4))]
    return LogProbs(FlowSequential(*layers), True), (normal(16, 4), normal(16, 3, seed=1))


@model("flows", source="https://github.com/ikostrikov/pytorch-flows, flows.py: RealNVP with BatchNormFlow")
def realnvp():
    mask = torch.arange(0, 6) % 2
    layers = []
    for _ in range(2):
        layers += [CouplingLayer(6, 12, mask.float()), BatchNormFlow(6, momentum=0.9)]
        mask = 1 - mask
    return LogProbs(FlowSequential(*layers), True), (normal(16, 6),)


class KAMENBatchNorm(nn.Module):
    """https://github.com/kamenbliznashki/normalizing_flows, maf.py: the moments by lerp, kept for the inverse."""

    def __init__(self, input_size, momentum=0.9, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.log_gamma = nn.Parameter(torch.zeros(input_size))
        self.beta = nn.Parameter(torch.zeros(input_size))
        self.register_buffer("running_mean", torch.zeros(input_size))
        self.register_buffer("running_var", torch.ones(input_size))

    def forward(self, x, cond_y=None):
        if self.training:
            self.batch_mean = x.mean(0)
            self.batch_var = x.var(0)
            self.running_mean.mul_(self.momentum).add_(self.batch_mean.data * (1 - self.momentum))
            self.running_var.mul_(self.momentum).add_(self.batch_var.data * (1 - self.momentum))
            mean, var = self.batch_mean, self.batch_var
        else:
            mean, var = self.running_mean, self.running_var
        x_hat = (x - mean) / torch.sqrt(var + self.eps)
        y = self.log_gamma.exp() * x_hat + self.beta
        log_abs_det_jacobian = self.log_gamma - 0.5 * torch.log(var + self.eps)
        return y, log_abs_det_jacobian.expand_as(x)


class Density(nn.Module):
    """A base distribution in buffers; torch.distributions for its density."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("base_dist_mean", torch.zeros(size))
        self.register_buffer("base_dist_var", torch.ones(size))
        self.nets = nn.ModuleList(
            [nn.Sequential(nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2 * size)) for _ in range(2)]
        )
        self.norms = nn.ModuleList([KAMENBatchNorm(size) for _ in range(2)])
        self.register_buffer("mask", torch.arange(size).float() % 2)

    @property
    def base_dist(self):
        return torch.distributions.Normal(self.base_dist_mean, self.base_dist_var)

    def forward(self, x):
        sum_log_abs_det_jacobians = 0
        mask = self.mask
        for net, norm in zip(self.nets, self.norms, strict=True):
            s, t = net(x * mask).chunk(2, dim=-1)
            s = s.tanh() * (1 - mask)
            x = x * mask + (1 - mask) * (x - t) * (-s).exp()
            sum_log_abs_det_jacobians = sum_log_abs_det_jacobians - s
            x, logdet = norm(x)
            sum_log_abs_det_jacobians = sum_log_abs_det_jacobians + logdet
            mask = 1 - mask
        return torch.sum(self.base_dist.log_prob(x) + sum_log_abs_det_jacobians, dim=1)


@model("flows", source="https://github.com/kamenbliznashki/normalizing_flows, maf.py")
def realnvp_distributions():
    return Density(5), (normal(16, 5),)


class NormFlows(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.forward_kld(x), self.flow.inverse(x)


@model("flows", source="normflows: masked affine autoregressive flows whose residual MADE has BatchNorm")
def normflows_maf():
    import normflows as nf

    flows = []
    for _ in range(2):
        flows += [nf.flows.MaskedAffineAutoregressive(4, 12, num_blocks=1), nf.flows.LULinearPermute(4)]
    for flow in flows[::2]:
        flow.autoregressive_net = nf.nets.MADE(4, 12, num_blocks=1, output_multiplier=2, use_batch_norm=True)
    net = nf.NormalizingFlow(nf.distributions.base.DiagGaussian(4), flows)
    return NormFlows(net), (normal(16, 4),)


@model(
    "flows",
    source="normflows: neural spline coupling by residual networks with BatchNorm; ActNorm",
)
def normflows_spline():
    import normflows as nf

    flows = []
    for _ in range(2):
        flows += [nf.flows.CoupledRationalQuadraticSpline(4, 1, 8, num_bins=4), nf.flows.ActNorm(4)]
    for flow in flows[::2]:
        net = flow.prqct.transform_net
        flow.prqct.transform_net = nf.nets.ResidualNet(
            net.initial_layer.in_features, net.final_layer.out_features, 8, num_blocks=1, use_batch_norm=True
        )
    return NormFlows(nf.NormalizingFlow(nf.distributions.base.DiagGaussian(4), flows)), (normal(16, 4),)


class NormFlowsBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        import normflows as nf

        self.affine = nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4], init_zeros=False))
        self.norm = nf.flows.BatchNorm()
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        x, first = self.affine(x)
        x, second = self.norm(x)
        return self.head(x), first + second


@model("flows", source="normflows, flows/normalization.py: BatchNorm of the batch in both modes")
def normflows_batch_norm():
    return NormFlowsBatchNorm(), (normal(16, 4),)


class ActNorm(nn.Module):
    """https://github.com/rosinality/glow-pytorch, model.py: set by the first batch, which a buffer remembers."""

    def __init__(self, in_channel):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, in_channel, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, in_channel, 1, 1))
        self.register_buffer("initialized", torch.tensor(1, dtype=torch.uint8))

    def initialize(self, x):
        with torch.no_grad():
            flatten = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1)
            mean = flatten.mean(1).unsqueeze(1).unsqueeze(2).unsqueeze(3).permute(1, 0, 2, 3)
            std = flatten.std(1).unsqueeze(1).unsqueeze(2).unsqueeze(3).permute(1, 0, 2, 3)
            self.loc.data.copy_(-mean)
            self.scale.data.copy_(1 / (std + 1e-6))

    def forward(self, x):
        _, _, height, width = x.shape
        if self.initialized.item() == 0:
            self.initialize(x)
            self.initialized.fill_(1)
        log_abs = torch.log(torch.abs(self.scale))
        logdet = height * width * torch.sum(log_abs)
        return self.scale * (x + self.loc), logdet


class InvConv2dLU(nn.Module):
    def __init__(self, in_channel):
        super().__init__()
        weight = torch.linalg.qr(torch.randn(in_channel, in_channel))[0]
        w_p, w_l, w_u = torch.linalg.lu(weight)
        w_s = torch.diag(w_u)
        w_u = torch.triu(w_u, 1)
        u_mask = torch.triu(torch.ones_like(w_u), 1)
        self.register_buffer("w_p", w_p)
        self.register_buffer("u_mask", u_mask)
        self.register_buffer("l_mask", u_mask.T.contiguous())
        self.register_buffer("s_sign", torch.sign(w_s))
        self.register_buffer("l_eye", torch.eye(in_channel))
        self.w_l, self.w_s = nn.Parameter(w_l), nn.Parameter(torch.log(torch.abs(w_s)))
        self.w_u = nn.Parameter(w_u)

    def forward(self, x):
        _, _, height, width = x.shape
        weight = (
            self.w_p
            @ (self.w_l * self.l_mask + self.l_eye)
            @ ((self.w_u * self.u_mask) + torch.diag(self.s_sign * torch.exp(self.w_s)))
        )
        return F.conv2d(x, weight.unsqueeze(2).unsqueeze(3)), height * width * torch.sum(self.w_s)


class ZeroConv2d(nn.Module):
    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv = nn.Conv2d(in_channel, out_channel, 3, padding=0)
        nn.init.normal_(self.conv.weight, 0, 0.05)
        self.scale = nn.Parameter(torch.zeros(1, out_channel, 1, 1))

    def forward(self, x):
        out = F.pad(x, [1, 1, 1, 1], value=1)
        return self.conv(out) * torch.exp(self.scale * 3)


class Glow(nn.Module):
    def __init__(self, channels=1, hidden=8, flows=2):
        super().__init__()
        squeezed = channels * 4
        self.actnorms = nn.ModuleList([ActNorm(squeezed) for _ in range(flows)])
        self.invconvs = nn.ModuleList([InvConv2dLU(squeezed) for _ in range(flows)])
        self.couplings = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(squeezed // 2, hidden, 3, padding=1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(inplace=True),
                ZeroConv2d(hidden, squeezed),
            )
            for _ in range(flows)
        )
        self.prior = ZeroConv2d(squeezed // 2, squeezed)

    def forward(self, x):
        b, c, h, w = x.shape
        out = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).contiguous().view(b, c * 4, h // 2, w // 2)
        logdet = 0
        for actnorm, invconv, net in zip(self.actnorms, self.invconvs, self.couplings, strict=True):
            out, det1 = actnorm(out)
            out, det2 = invconv(out)
            in_a, in_b = out.chunk(2, 1)
            log_s, t = net(in_a).chunk(2, 1)
            s = torch.sigmoid(log_s + 2)
            out = torch.cat([in_a, (in_b + t) * s], 1)
            logdet = logdet + det1 + det2 + torch.sum(torch.log(s).view(b, -1), 1)
        out, z = out.chunk(2, 1)
        mean, log_sd = self.prior(out).chunk(2, 1)
        log_p = -0.5 * np.log(2 * np.pi) - log_sd - 0.5 * (z - mean) ** 2 / torch.exp(2 * log_sd)
        return log_p.view(b, -1).sum(1) + logdet, out


@model("flows", source="https://github.com/rosinality/glow-pytorch, model.py, with BatchNorm in the coupling networks")
def glow():
    return Glow(), (normal(6, 1, 8, 8),)
