"""Spiking networks: neurons with a state over time steps, surrogate gradients, BatchNorm before the threshold."""
# ruff: noqa: B007, RUF005, SIM114  (as the sources have it)

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "spiking"


@model(FIELD, source="spikingjelly (package): neuron.LIFNode, layer.*, the tutorial's CSNN, step by step")
def spikingjelly_lif():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class CSNN(nn.Module):
        def __init__(self, T, channels):
            super().__init__()
            self.T = T
            self.conv_fc = nn.Sequential(
                layer.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
                layer.BatchNorm2d(channels),
                neuron.LIFNode(surrogate_function=surrogate.ATan()),
                layer.MaxPool2d(2, 2),
                layer.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
                layer.BatchNorm2d(channels),
                neuron.LIFNode(surrogate_function=surrogate.ATan()),
                layer.MaxPool2d(2, 2),
                layer.Flatten(),
                layer.Linear(channels * 2 * 2, 10, bias=False),
                neuron.LIFNode(surrogate_function=surrogate.ATan()),
            )

        def forward(self, x):
            functional.reset_net(self)
            out = 0.0
            for _ in range(self.T):
                out += self.conv_fc(x)
            return out / self.T

    return CSNN(4, 6), (normal(4, 1, 8, 8),)


@model(FIELD, source="spikingjelly (package): the same in multi-step mode, with ParametricLIFNode and IFNode")
def spikingjelly_multi_step():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Net(nn.Module):
        def __init__(self, T, channels):
            super().__init__()
            self.T = T
            self.conv = nn.Sequential(layer.Conv2d(2, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels))
            self.spiking = nn.Sequential(
                neuron.IFNode(surrogate_function=surrogate.Sigmoid(), detach_reset=True),
                layer.Conv2d(channels, channels, 3, padding=1, stride=2, bias=False),
                layer.BatchNorm2d(channels),
                neuron.ParametricLIFNode(init_tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
                layer.AdaptiveAvgPool2d((1, 1)),
                layer.Flatten(),
                layer.Linear(channels, 5),
            )
            functional.set_step_mode(self.spiking, "m")

        def forward(self, x):
            functional.reset_net(self)
            x_seq = self.conv(x).unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
            return self.spiking(x_seq).mean(0)

    return Net(3, 6), (normal(4, 2, 8, 8),)


@model(FIELD, source="spikingjelly (package): layer.ThresholdDependentBatchNorm2d")
def spikingjelly_tdbn():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Net(nn.Module):
        def __init__(self, T, channels):
            super().__init__()
            self.T = T
            self.net = nn.Sequential(
                layer.Conv2d(2, channels, 3, padding=1, bias=False),
                layer.ThresholdDependentBatchNorm2d(0.7071, 1.0, channels),
                neuron.LIFNode(tau=4 / 3, surrogate_function=surrogate.PiecewiseQuadratic(), decay_input=False),
                layer.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
                layer.ThresholdDependentBatchNorm2d(0.7071, 1.0, 2 * channels),
                neuron.LIFNode(tau=4 / 3, v_reset=None, surrogate_function=surrogate.PiecewiseQuadratic()),
                layer.Flatten(),
                layer.Linear(2 * channels * 9, 5),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x):
            functional.reset_net(self)
            return self.net(x.transpose(0, 1)).mean(dim=0)

    return Net(3, 4), (normal(4, 3, 2, 6, 6),)


@model(FIELD, source="spikingjelly (package): model.sew_resnet.BasicBlock")
def spikingjelly_sew_resnet():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            settings = {"spiking_neuron": neuron.IFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
            self.conv1 = layer.Conv2d(3, width, 3, padding=1, bias=False)
            self.bn1 = layer.BatchNorm2d(width)
            self.sn1 = neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
            self.layer1 = sew_resnet.BasicBlock(width, width, cnf="ADD", **settings)
            downsample = nn.Sequential(
                sew_resnet.conv1x1(width, 2 * width, 2),
                layer.BatchNorm2d(2 * width),
            )
            self.layer2 = sew_resnet.BasicBlock(width, 2 * width, 2, downsample, cnf="ADD", **settings)
            self.fc = layer.Linear(2 * width, 5)
            functional.set_step_mode(self, "m")

        def forward(self, x):
            functional.reset_net(self)
            x = x.unsqueeze(0).repeat(3, 1, 1, 1, 1)
            x = self.layer2(self.layer1(self.sn1(self.bn1(self.conv1(x)))))
            return self.fc(x.mean((-2, -1))).mean(0)

    return Net(), (normal(4, 3, 8, 8),)


@model(
    FIELD, source="spikingjelly (package): model.spiking_vgg's blocks over encoding.PoissonEncoder's place, PSN neurons"
)
def spikingjelly_psn():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Net(nn.Module):
        def __init__(self, T=4, width=6):
            super().__init__()
            self.net = nn.Sequential(
                layer.Conv1d(3, width, 3, padding=1, bias=False, step_mode="m"),
                layer.BatchNorm1d(width, step_mode="m"),
                neuron.PSN(T=T, surrogate_function=surrogate.ATan()),
                layer.Conv1d(width, width, 3, padding=1, bias=False, step_mode="m"),
                layer.BatchNorm1d(width, step_mode="m"),
                neuron.SlidingPSN(k=2, exp_init=True, surrogate_function=surrogate.ATan(), step_mode="m"),
            )
            self.fc = nn.Linear(width, 5)

        def forward(self, x):
            functional.reset_net(self)
            return self.fc(self.net(x.transpose(0, 1)).mean((0, -1)))

    return Net(), (normal(4, 4, 3, 10),)


@model(FIELD, source="snntorch (package): Leaky with learned beta, the tutorial's convolutional network with BatchNorm")
def snntorch_leaky():
    import snntorch as snn
    from snntorch import surrogate

    class Net(nn.Module):
        def __init__(self, num_steps=4):
            super().__init__()
            self.num_steps = num_steps
            spike_grad = surrogate.fast_sigmoid(slope=25)
            self.conv1 = nn.Conv2d(1, 6, 3)
            self.bn1 = nn.BatchNorm2d(6)
            self.lif1 = snn.Leaky(beta=0.9, spike_grad=spike_grad, learn_beta=True)
            self.conv2 = nn.Conv2d(6, 8, 3)
            self.bn2 = nn.BatchNorm2d(8)
            self.lif2 = snn.Leaky(beta=0.5, spike_grad=surrogate.atan(), threshold=0.5, learn_threshold=True)
            self.fc1 = nn.Linear(8 * 2 * 2, 5)
            self.lif3 = snn.Leaky(beta=0.8, spike_grad=spike_grad, reset_mechanism="zero")

        def forward(self, x):
            mem1 = self.lif1.init_leaky()
            mem2 = self.lif2.init_leaky()
            mem3 = self.lif3.init_leaky()
            spk_rec, mem_rec = [], []
            for step in range(self.num_steps):
                cur1 = F.max_pool2d(self.bn1(self.conv1(x)), 2)
                spk1, mem1 = self.lif1(cur1, mem1)
                cur2 = self.bn2(F.pad(self.conv2(spk1), (0, 1, 0, 1)))
                spk2, mem2 = self.lif2(cur2, mem2)
                cur3 = self.fc1(spk2.flatten(1))
                spk3, mem3 = self.lif3(cur3, mem3)
                spk_rec.append(spk3)
                mem_rec.append(mem3)
            return torch.stack(spk_rec), torch.stack(mem_rec)

    return Net(), (normal(4, 1, 8, 8),)


@model(FIELD, source="snntorch (package): nn.Sequential with init_hidden=True, Synaptic and RLeaky")
def snntorch_hidden():
    import snntorch as snn
    from snntorch import surrogate

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            grad = surrogate.sigmoid(slope=25)
            self.net = nn.Sequential(
                nn.Linear(10, 12),
                nn.BatchNorm1d(12),
                snn.Synaptic(alpha=0.9, beta=0.8, spike_grad=grad, init_hidden=True),
                nn.Linear(12, 8),
                nn.BatchNorm1d(8),
                snn.RLeaky(beta=0.9, linear_features=8, spike_grad=grad, init_hidden=True),
                nn.Linear(8, 5),
                snn.Leaky(beta=0.7, spike_grad=grad, init_hidden=True, output=True),
            )

        def forward(self, data):
            for layer in self.net:  # utils.reset knows the neurons that were made, not deep copies of them
                if isinstance(layer, snn.SpikingNeuron):
                    layer.reset_mem()
            spk_rec = []
            for step in range(data.size(1)):
                spk_out, mem_out = self.net(data[:, step])
                spk_rec.append(spk_out + 0.1 * mem_out)
            return torch.stack(spk_rec)

    return Net(), (normal(6, 4, 10),)


class ActFun(torch.autograd.Function):
    """A step forward, a rectangle backward."""

    thresh = 0.5
    lens = 0.5

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.gt(ActFun.thresh).to(input.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        temp = abs(input - ActFun.thresh) < ActFun.lens
        return grad_input * temp.to(input.dtype)


act_fun = ActFun.apply


def mem_update(ops, x, mem, spike, decay=0.2):
    mem = mem * decay * (1.0 - spike) + ops(x)
    spike = act_fun(mem)
    return mem, spike


class SCNN(nn.Module):
    def __init__(self, time_window=4):
        super().__init__()
        self.time_window = time_window
        self.conv1 = nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), nn.BatchNorm2d(6))
        self.conv2 = nn.Sequential(nn.Conv2d(6, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.fc1 = nn.Linear(8 * 4, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, input):
        batch_size, device = input.size(0), input.device
        c1_mem = c1_spike = torch.zeros(batch_size, 6, 8, 8, device=device, dtype=input.dtype)
        c2_mem = c2_spike = torch.zeros(batch_size, 8, 4, 4, device=device, dtype=input.dtype)
        h1_mem = h1_spike = h1_sumspike = torch.zeros(batch_size, 12, device=device, dtype=input.dtype)
        h2_mem = h2_spike = h2_sumspike = torch.zeros(batch_size, 5, device=device, dtype=input.dtype)
        for _step in range(self.time_window):
            x = torch.sigmoid(input)
            c1_mem, c1_spike = mem_update(self.conv1, x, c1_mem, c1_spike)
            x = F.avg_pool2d(c1_spike, 2)
            c2_mem, c2_spike = mem_update(self.conv2, x, c2_mem, c2_spike)
            x = F.avg_pool2d(c2_spike, 2)
            x = x.view(batch_size, -1)
            h1_mem, h1_spike = mem_update(self.fc1, x, h1_mem, h1_spike)
            h1_sumspike += h1_spike
            h2_mem, h2_spike = mem_update(self.fc2, h1_spike, h2_mem, h2_spike)
            h2_sumspike += h2_spike
        return h2_sumspike / self.time_window, h2_mem


@model(
    FIELD,
    source="https://github.com/yjwu17/STBP-for-training-SpikingNN, spiking_model.py; += on aliased zeros",
)
def stbp():
    return SCNN(), (normal(4, 1, 8, 8),)


class TdBatchNorm(nn.BatchNorm2d):
    """Over the batch and the time steps, scaled by the threshold; steps in the last dimension."""

    def __init__(self, num_features, eps=1e-05, momentum=0.1, alpha=1, affine=True, track_running_stats=True, Vth=0.5):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.alpha = alpha
        self.Vth = Vth

    def forward(self, input):
        exponential_average_factor = 0.0
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                exponential_average_factor = 1.0 / float(self.num_batches_tracked)
            else:
                exponential_average_factor = self.momentum
        # calculate running estimates
        if self.training:
            mean = input.mean([0, 2, 3, 4])
            # use biased var in train
            var = input.var([0, 2, 3, 4], unbiased=False)
            n = input.numel() / input.size(1)
            with torch.no_grad():
                self.running_mean = (
                    exponential_average_factor * mean + (1 - exponential_average_factor) * self.running_mean
                )
                # update running_var with unbiased var
                self.running_var = (
                    exponential_average_factor * var * n / (n - 1) + (1 - exponential_average_factor) * self.running_var
                )
        else:
            mean = self.running_mean
            var = self.running_var
        input = (
            self.alpha
            * self.Vth
            * (input - mean[None, :, None, None, None])
            / (torch.sqrt(var[None, :, None, None, None] + self.eps))
        )
        if self.affine:
            input = input * self.weight[None, :, None, None, None] + self.bias[None, :, None, None, None]
        return input


class TdLayer(nn.Module):
    def __init__(self, layer, bn=None):
        super().__init__()
        self.layer = layer
        self.bn = bn

    def forward(self, x):
        steps = x.shape[-1]
        x_ = torch.zeros(self.layer(x[..., 0]).shape + (steps,), device=x.device, dtype=x.dtype)
        for step in range(steps):
            x_[..., step] = self.layer(x[..., step])
        if self.bn is not None:
            x_ = self.bn(x_)
        return x_


class LIFSpike(nn.Module):
    def forward(self, x):
        steps = x.shape[-1]
        u = torch.zeros(x.shape[:-1], device=x.device, dtype=x.dtype)
        out = torch.zeros(x.shape, device=x.device, dtype=x.dtype)
        for step in range(steps):
            u, out[..., step] = self.state_update(u, out[..., max(step - 1, 0)], x[..., step])
        return out

    def state_update(self, u_t_n1, o_t_n1, W_mul_o_t1_n, tau=0.25):
        u_t1_n1 = tau * u_t_n1 * (1 - o_t_n1) + W_mul_o_t1_n
        o_t1_n1 = act_fun(u_t1_n1)
        return u_t1_n1, o_t1_n1


@model(FIELD, source="https://github.com/thiswinex/STBP-simple, layers.py (tdBatchNorm, tdLayer, LIFSpike)")
def stbp_tdbn():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1_s = TdLayer(nn.Conv2d(2, 6, 3, 1, 1, bias=False), TdBatchNorm(6))
            self.conv2_s = TdLayer(nn.Conv2d(6, 8, 3, 2, 1, bias=False), TdBatchNorm(8))
            self.fc1_s = TdLayer(nn.Linear(8 * 9, 5))
            self.spike = LIFSpike()

        def forward(self, x):
            x = self.spike(self.conv1_s(x))
            x = self.spike(self.conv2_s(x))
            x = x.view(x.shape[0], -1, x.shape[4])
            x = self.fc1_s(x)
            return torch.sum(x, dim=2) / x.shape[2]

    return Net(), (normal(4, 2, 6, 6, 3),)


class Surrogate_BP_Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        out = torch.zeros_like(input)
        out[input > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        grad = grad_input * 0.3 * F.threshold(1.0 - torch.abs(input), 0, 0)
        return grad


class SNN_BNTT(nn.Module):
    """A BatchNorm for each time step."""

    def __init__(self, num_steps=4, leak_mem=0.95, img_size=8, num_cls=5):
        super().__init__()
        self.img_size = img_size
        self.num_cls = num_cls
        self.num_steps = num_steps
        self.spike_fn = Surrogate_BP_Function.apply
        self.leak_mem = leak_mem
        bias_flag = False
        self.conv1 = nn.Conv2d(3, 6, kernel_size=3, stride=1, padding=1, bias=bias_flag)
        self.bntt1 = nn.ModuleList([nn.BatchNorm2d(6, eps=1e-4, momentum=0.1) for i in range(self.num_steps)])
        self.conv2 = nn.Conv2d(6, 8, kernel_size=3, stride=1, padding=1, bias=bias_flag)
        self.bntt2 = nn.ModuleList([nn.BatchNorm2d(8, eps=1e-4, momentum=0.1) for i in range(self.num_steps)])
        self.pool = nn.AvgPool2d(kernel_size=2)
        self.fc1 = nn.Linear(8 * 4 * 4, 12, bias=bias_flag)
        self.bntt_fc = nn.ModuleList([nn.BatchNorm1d(12, eps=1e-4, momentum=0.1) for i in range(self.num_steps)])
        self.fc2 = nn.Linear(12, num_cls, bias=bias_flag)
        self.conv_list = [self.conv1, self.conv2]
        self.bntt_list = [self.bntt1, self.bntt2, self.bntt_fc]
        for bn_list in self.bntt_list:
            for bn_temp in bn_list:
                bn_temp.bias = None
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                m.threshold = 1.0
                nn.init.xavier_uniform_(m.weight, gain=2)
            elif isinstance(m, nn.Linear):
                m.threshold = 1.0
                nn.init.xavier_uniform_(m.weight, gain=2)

    def forward(self, inp):
        batch_size = inp.size(0)
        mem_conv1 = torch.zeros(batch_size, 6, self.img_size, self.img_size, dtype=inp.dtype)
        mem_conv2 = torch.zeros(batch_size, 8, self.img_size, self.img_size, dtype=inp.dtype)
        mem_conv_list = [mem_conv1, mem_conv2]
        mem_fc1 = torch.zeros(batch_size, 12, dtype=inp.dtype)
        mem_fc2 = torch.zeros(batch_size, self.num_cls, dtype=inp.dtype)
        for t in range(self.num_steps):
            # a Poisson generator in the original
            out_prev = torch.mul(
                torch.le(torch.full_like(inp, 0.3) * (t + 1) / 2, torch.abs(inp)).to(inp.dtype), inp.sign()
            )
            for i in range(len(self.conv_list)):
                mem_conv_list[i] = self.leak_mem * mem_conv_list[i] + self.bntt_list[i][t](self.conv_list[i](out_prev))
                mem_thr = (mem_conv_list[i] / self.conv_list[i].threshold) - 1.0
                out = self.spike_fn(mem_thr)
                rst = torch.zeros_like(mem_conv_list[i])
                rst[mem_thr > 0] = self.conv_list[i].threshold
                mem_conv_list[i] = mem_conv_list[i] - rst
                out_prev = out.clone()
                if i == 1:
                    out = self.pool(out_prev)
                    out_prev = out.clone()
            out_prev = out_prev.reshape(batch_size, -1)
            mem_fc1 = self.leak_mem * mem_fc1 + self.bntt_fc[t](self.fc1(out_prev))
            mem_thr = (mem_fc1 / self.fc1.threshold) - 1.0
            out = self.spike_fn(mem_thr)
            rst = torch.zeros_like(mem_fc1)
            rst[mem_thr > 0] = self.fc1.threshold
            mem_fc1 = mem_fc1 - rst
            out_prev = out.clone()
            # accumulate voltage in the last layer
            mem_fc2 = mem_fc2 + self.fc2(out_prev)
        out_voltage = mem_fc2 / self.num_steps
        return out_voltage


@model(
    FIELD,
    source="https://github.com/Intelligent-Computing-Lab-Yale/BNTT-Batch-Normalization-Through-Time, model.py",
)
def bntt():
    return SNN_BNTT(), (normal(4, 3, 8, 8),)
