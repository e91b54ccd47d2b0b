"""Time series: classification and forecasting."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm

from . import model, normal


class InceptionModule(nn.Module):
    def __init__(self, ni, nf, ks=20, bottleneck=True):
        super().__init__()
        ks = [ks // (2**i) for i in range(3)]
        ks = [k if k % 2 != 0 else k - 1 for k in ks]
        bottleneck = bottleneck if ni > 1 else False
        self.bottleneck = nn.Conv1d(ni, nf, 1, bias=False) if bottleneck else nn.Identity()
        self.convs = nn.ModuleList([
            nn.Conv1d(nf if bottleneck else ni, nf, k, padding="same", bias=False) for k in ks
        ])  # fmt: skip
        self.maxconvpool = nn.Sequential(nn.MaxPool1d(3, stride=1, padding=1), nn.Conv1d(ni, nf, 1, bias=False))
        self.bn, self.act = nn.BatchNorm1d(nf * 4), nn.ReLU()

    def forward(self, x):
        input_tensor = x
        x = self.bottleneck(input_tensor)
        x = torch.cat([*[conv(x) for conv in self.convs], self.maxconvpool(input_tensor)], dim=1)
        return self.act(self.bn(x))


class InceptionTime(nn.Module):
    def __init__(self, c_in, c_out, nf=4, depth=3):
        super().__init__()
        self.depth = depth
        self.inception, self.shortcut = nn.ModuleList(), nn.ModuleList()
        for d in range(depth):
            self.inception.append(InceptionModule(c_in if d == 0 else nf * 4, nf))
            if d % 3 == 2:
                n_in, n_out = (c_in if d == 2 else nf * 4), nf * 4
                same = nn.BatchNorm1d(n_in)
                self.shortcut.append(
                    same
                    if n_in == n_out
                    else nn.Sequential(nn.Conv1d(n_in, n_out, 1, bias=False), nn.BatchNorm1d(n_out))
                )
        self.act = nn.ReLU()
        self.fc = nn.Linear(nf * 4, c_out)

    def forward(self, x):
        res = x
        for d, layer in enumerate(range(self.depth)):
            x = self.inception[d](x)
            if layer % 3 == 2:
                res = x = self.act(torch.add(x, self.shortcut[d // 3](res)))
        return self.fc(x.mean(-1))


@model("time_series", source="tsai, models/InceptionTime.py")
def inception_time():
    return InceptionTime(2, 3), (normal(6, 2, 32),)


class LSTM_FCN(nn.Module):
    """The recurrent branch reads the series across its variables (shuffled)."""

    def __init__(self, c_in, c_out, seq_len, hidden=6, layers=(8, 12, 8)):
        super().__init__()
        self.rnn = nn.LSTM(seq_len, hidden, num_layers=1, batch_first=True)
        self.rnn_dropout = nn.Dropout(0.8)
        self.convs = nn.ModuleList()
        width = c_in
        for n, k in zip(layers, (7, 5, 3), strict=True):
            self.convs.append(
                nn.Sequential(nn.Conv1d(width, n, k, padding=k // 2, bias=False), nn.BatchNorm1d(n), nn.ReLU())
            )
            width = n
        self.se = nn.Sequential(
            nn.Linear(layers[0], 2, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(2, layers[0], bias=False),
            nn.Sigmoid(),
        )
        self.gap = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(hidden + layers[-1], c_out)

    def forward(self, x):
        output, _ = self.rnn(x)
        last_out = output[:, -1]
        last_out = self.rnn_dropout(last_out)
        y = self.convs[0](x)
        y = y * self.se(self.gap(y).squeeze(-1)).unsqueeze(-1).expand_as(y)
        y = self.convs[2](self.convs[1](y))
        y = self.gap(y).squeeze(-1)
        return self.fc(torch.cat([last_out, y], dim=1))


@model("time_series", source="tsai, models/RNN_FCN.py: MLSTM-FCN")
def lstm_fcn():
    return LSTM_FCN(3, 4, 24), (normal(6, 3, 24),)


class Chomp1d(nn.Module):
    def __init__(self, chomp_size):
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, n_inputs, n_outputs, kernel_size, dilation, dropout=0.2):
        super().__init__()
        padding = (kernel_size - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(n_inputs, n_outputs, kernel_size, padding=padding, dilation=dilation))
        self.conv2 = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(n_outputs, n_outputs, kernel_size, padding=padding, dilation=dilation)
        )
        self.net = nn.Sequential(
            self.conv1,
            Chomp1d(padding),
            nn.BatchNorm1d(n_outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            self.conv2,
            Chomp1d(padding),
            nn.BatchNorm1d(n_outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    def __init__(self, channels=(3, 6, 6)):
        super().__init__()
        self.network = nn.Sequential(
            *[TemporalBlock(channels[i], channels[i + 1], 3, 2**i) for i in range(len(channels) - 1)]
        )
        self.linear = nn.Linear(channels[-1], 2)

    def forward(self, x):
        return self.linear(self.network(x)[:, :, -1])


@model(
    "time_series", source="https://github.com/locuslab/TCN, TCN/tcn.py, with BatchNorm and both kinds of weight_norm"
)
def tcn():
    return TCN(), (normal(6, 3, 24),)


class ResBlock(nn.Module):
    def __init__(self, ni, nf):
        super().__init__()
        convs, n = [], ni
        for i, k in enumerate((7, 5, 3)):
            convs += [nn.Conv1d(n, nf, k, padding="same", bias=False), nn.BatchNorm1d(nf)] + (
                [nn.ReLU()] if i < 2 else []
            )
            n = nf
        self.convs = nn.Sequential(*convs)
        self.shortcut = (
            nn.BatchNorm1d(ni) if ni == nf else nn.Sequential(nn.Conv1d(ni, nf, 1, bias=False), nn.BatchNorm1d(nf))
        )

    def forward(self, x):
        res = x
        x = self.convs(x)
        x += self.shortcut(res)
        return F.relu(x)


@model("time_series", source="tsai, models/ResNet.py")
def resnet():
    net = nn.Sequential(
        ResBlock(2, 6), ResBlock(6, 8), ResBlock(8, 8), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    return net, (normal(6, 2, 24),)


class NBeatsBlock(nn.Module):
    """A basis of trends or seasons, in a parameter without gradient."""

    def __init__(self, units, backcast, forecast, seasonality):
        super().__init__()
        layers, width = [], backcast
        for _ in range(2):
            layers += [nn.Linear(width, units), nn.BatchNorm1d(units), nn.ReLU()]
            width = units
        self.fc = nn.Sequential(*layers)
        total = backcast + forecast
        t = torch.arange(total, dtype=torch.float64) / total
        if seasonality:
            p = total // 4
            basis = torch.stack(
                [torch.cos(2 * math.pi * i * t) for i in range(p)] + [torch.sin(2 * math.pi * i * t) for i in range(p)]
            )
        else:
            basis = torch.stack([t**i for i in range(3)])
        self.basis = nn.Parameter(basis.float(), requires_grad=False)
        self.theta = nn.Linear(units, len(basis), bias=False)
        self.backcast = backcast

    def forward(self, x):
        theta = self.theta(self.fc(x))
        both = torch.einsum("bp,pt->bt", theta, self.basis)
        return both[:, : self.backcast], both[:, self.backcast :]


class NBeats(nn.Module):
    def __init__(self, backcast=12, forecast=4):
        super().__init__()
        self.stacks = nn.ModuleList(
            nn.ModuleList([NBeatsBlock(8, backcast, forecast, seasonality) for _ in range(2)]) for seasonality in (0, 1)
        )

    def forward(self, x, mask):
        residuals = x.flip(dims=(1,))
        mask = mask.flip(dims=(1,))
        forecast = x[:, -1:]
        for stack in self.stacks:
            for block in stack:
                backcast, block_forecast = block(residuals)
                residuals = (residuals - backcast) * mask
                forecast = forecast + block_forecast
        return forecast


@model(
    "time_series",
    source="https://github.com/ServiceNow/N-BEATS, models/nbeats.py, and neuralforecast's batch_normalization",
)
def nbeats():
    return NBeats(), (normal(8, 12), (normal(8, 12, seed=1) > -1).double())


class Transpose(nn.Module):
    def __init__(self, *dims, contiguous=False):
        super().__init__()
        self.dims, self.contiguous = dims, contiguous

    def forward(self, x):
        return x.transpose(*self.dims).contiguous() if self.contiguous else x.transpose(*self.dims)


class RevIN(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.affine_weight, self.affine_bias = (
            nn.Parameter(torch.ones(num_features)),
            nn.Parameter(torch.zeros(num_features)),
        )

    def forward(self, x, mode):
        if mode == "norm":
            dim2reduce = tuple(range(1, x.ndim - 1))
            self.mean = torch.mean(x, dim=dim2reduce, keepdim=True).detach()
            self.stdev = torch.sqrt(torch.var(x, dim=dim2reduce, keepdim=True, unbiased=False) + self.eps).detach()
            return (x - self.mean) / self.stdev * self.affine_weight + self.affine_bias
        x = (x - self.affine_bias) / (self.affine_weight + self.eps * self.eps)
        return x * self.stdev + self.mean


class TSTEncoderLayer(nn.Module):
    """Residual attention: the scores of the layer before are added."""

    def __init__(self, d_model, n_heads, d_ff):
        super().__init__()
        self.n_heads, self.d_k = n_heads, d_model // n_heads
        self.W_Q, self.W_K, self.W_V = (nn.Linear(d_model, d_model) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(self.d_k**-0.5), requires_grad=False)
        self.to_out = nn.Sequential(nn.Linear(d_model, d_model), nn.Dropout(0.1))
        self.norm_attn = nn.Sequential(Transpose(1, 2), nn.BatchNorm1d(d_model), Transpose(1, 2))
        self.ff = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(0.1), nn.Linear(d_ff, d_model))
        self.norm_ffn = nn.Sequential(Transpose(1, 2), nn.BatchNorm1d(d_model), Transpose(1, 2))

    def forward(self, src, prev=None):
        bs = src.size(0)
        q = self.W_Q(src).view(bs, -1, self.n_heads, self.d_k).transpose(1, 2)
        k = self.W_K(src).view(bs, -1, self.n_heads, self.d_k).permute(0, 2, 3, 1)
        v = self.W_V(src).view(bs, -1, self.n_heads, self.d_k).transpose(1, 2)
        scores = torch.matmul(q, k) * self.scale
        if prev is not None:
            scores = scores + prev
        output = torch.matmul(F.softmax(scores, dim=-1), v)
        output = self.to_out(output.transpose(1, 2).contiguous().view(bs, -1, self.n_heads * self.d_k))
        src = self.norm_attn(src + output)
        src = self.norm_ffn(src + self.ff(src))
        return src, scores


class PatchTST(nn.Module):
    def __init__(self, c_in=2, context=24, target=6, patch=6, stride=3, d_model=8):
        super().__init__()
        self.patch, self.stride = patch, stride
        self.revin = RevIN(c_in)
        self.padding_patch_layer = nn.ReplicationPad1d((0, stride))
        patch_num = (context - patch) // stride + 2
        self.W_P = nn.Linear(patch, d_model)
        self.W_pos = nn.Parameter(torch.empty(patch_num, d_model).uniform_(-0.02, 0.02))
        self.layers = nn.ModuleList([TSTEncoderLayer(d_model, 2, 16) for _ in range(2)])
        self.head = nn.Linear(d_model * patch_num, target)

    def forward(self, x):
        z = self.revin(x, "norm").permute(0, 2, 1)
        z = self.padding_patch_layer(z)
        z = z.unfold(dimension=-1, size=self.patch, step=self.stride)
        z = z.permute(0, 1, 3, 2)
        n_vars = z.shape[1]
        z = self.W_P(z.permute(0, 1, 3, 2))
        u = torch.reshape(z, (z.shape[0] * z.shape[1], z.shape[2], z.shape[3])) + self.W_pos
        scores = None
        for layer in self.layers:
            u, scores = layer(u, prev=scores)
        z = torch.reshape(u, (-1, n_vars, u.shape[-2], u.shape[-1])).permute(0, 1, 3, 2)
        z = self.head(z.flatten(start_dim=-2)).permute(0, 2, 1)
        return self.revin(z, "denorm")


@model("time_series", source="https://github.com/yuqinie98/PatchTST, PatchTST_supervised/layers/PatchTST_backbone.py")
def patch_tst():
    return PatchTST(), (normal(4, 24, 2),)


class InceptionBlockV1(nn.Module):
    def __init__(self, n_in, n_out, num_kernels=3):
        super().__init__()
        self.kernels = nn.ModuleList([nn.Conv2d(n_in, n_out, 2 * i + 1, padding=i) for i in range(num_kernels)])
        self.bn = nn.BatchNorm2d(n_out)

    def forward(self, x):
        return self.bn(torch.stack([kernel(x) for kernel in self.kernels], dim=-1).mean(-1))


def FFT_for_Period(x, k=2):
    xf = torch.fft.rfft(x, dim=1)
    frequency_list = abs(xf).mean(0).mean(-1)
    frequency_list[0] = 0
    _, top_list = torch.topk(frequency_list, k)
    top_list = top_list.detach().cpu().numpy()
    period = x.shape[1] // top_list
    return period, abs(xf).mean(-1)[:, top_list]


class TimesBlock(nn.Module):
    """The shapes of what it computes are the periods that the data have."""

    def __init__(self, seq_len, d_model, d_ff, k=2, periods=None):
        super().__init__()
        self.seq_len, self.k, self.periods = seq_len, k, periods
        self.conv = nn.Sequential(InceptionBlockV1(d_model, d_ff), nn.GELU(), InceptionBlockV1(d_ff, d_model))

    def forward(self, x):
        B, T, N = x.size()
        if self.periods is None:
            period_list, period_weight = FFT_for_Period(x, self.k)
        else:
            period_list = self.periods
            period_weight = abs(torch.fft.rfft(x, dim=1)).mean(-1)[:, [T // p for p in period_list]]
        res = []
        for i in range(self.k):
            period = period_list[i]
            if self.seq_len % period != 0:
                length = ((self.seq_len // period) + 1) * period
                padding = torch.zeros([x.shape[0], (length - self.seq_len), x.shape[2]]).to(x.device)
                out = torch.cat([x, padding], dim=1)
            else:
                length = self.seq_len
                out = x
            out = out.reshape(B, length // period, period, N).permute(0, 3, 1, 2).contiguous()
            out = self.conv(out)
            out = out.permute(0, 2, 3, 1).reshape(B, -1, N)
            res.append(out[:, : self.seq_len, :])
        res = torch.stack(res, dim=-1)
        period_weight = F.softmax(period_weight, dim=1)
        period_weight = period_weight.unsqueeze(1).unsqueeze(1).repeat(1, T, N, 1)
        res = torch.sum(res * period_weight, -1)
        return res + x


@model(
    "time_series",
    source="https://github.com/thuml/Time-Series-Library, models/TimesNet.py: periods of the data are sizes",
)
def times_net():
    return TimesBlock(20, 4, 6), (normal(4, 20, 4),)


@model("time_series", source="https://github.com/thuml/Time-Series-Library, models/TimesNet.py, with its periods given")
def times_net_given_periods():
    return TimesBlock(20, 4, 6, periods=(10, 6)), (normal(4, 20, 4),)


class ConvLayer(nn.Module):
    """Informer's distilling: circular convolution, BatchNorm, maximum of every other step."""

    def __init__(self, c_in):
        super().__init__()
        self.downConv = nn.Conv1d(c_in, c_in, 3, padding=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(c_in)
        self.activation = nn.ELU()
        self.maxPool = nn.MaxPool1d(kernel_size=3, stride=2, padding=1)

    def forward(self, x):
        x = self.downConv(x.permute(0, 2, 1))
        x = self.norm(x)
        x = self.activation(x)
        x = self.maxPool(x)
        return x.transpose(1, 2)


class ProbAttention(nn.Module):
    """Queries that matter most, by a sample of the keys; the sample is a buffer here, since forward draws it there."""

    def __init__(self, length, u, sample):
        super().__init__()
        self.u = u
        self.register_buffer(
            "index_sample", torch.randint(length, (length, sample), generator=torch.Generator().manual_seed(0))
        )

    def forward(self, queries, keys, values):
        B, H, L, D = queries.shape
        K_expand = keys.unsqueeze(-3).expand(B, H, L, keys.shape[2], D)
        K_sample = K_expand[:, :, torch.arange(L).unsqueeze(1), self.index_sample, :]
        Q_K_sample = torch.matmul(queries.unsqueeze(-2), K_sample.transpose(-2, -1)).squeeze(-2)
        M = Q_K_sample.max(-1)[0] - torch.div(Q_K_sample.sum(-1), L)
        M_top = M.topk(self.u, sorted=False)[1]
        Q_reduce = queries[torch.arange(B)[:, None, None], torch.arange(H)[None, :, None], M_top, :]
        scores = torch.matmul(Q_reduce, keys.transpose(-2, -1)) / math.sqrt(D)
        context = values.mean(dim=-2).unsqueeze(-2).expand(B, H, L, D).clone()
        attn = torch.softmax(scores, dim=-1)
        context[torch.arange(B)[:, None, None], torch.arange(H)[None, :, None], M_top, :] = torch.matmul(
            attn, values
        ).type_as(context)
        return context.transpose(2, 1).contiguous()


class Informer(nn.Module):
    def __init__(self, c_in=3, d=8, heads=2, length=16):
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv1d(c_in, d, 3, padding=1, padding_mode="circular", bias=False)
        self.qkv = nn.ModuleList([nn.Linear(d, 3 * d) for _ in range(2)])
        self.attn = nn.ModuleList([ProbAttention(length, 4, 5), ProbAttention(length // 2 + 1, 3, 4)])
        self.distil, self.norm, self.projection = ConvLayer(d), nn.LayerNorm(d), nn.Linear(d, 1)

    def forward(self, x):
        x = self.embed(x.permute(0, 2, 1)).transpose(1, 2)
        for i in range(2):
            B, L, D = x.shape
            q, k, v = self.qkv[i](x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + self.attn[i](q, k, v).reshape(B, L, D)
            if i == 0:
                x = self.distil(x)
        return self.projection(self.norm(x))


@model("time_series", source="https://github.com/zhouhaoyi/Informer2020, models/encoder.py and attn.py")
def informer():
    return Informer(), (normal(4, 16, 3),)


class STGCN(nn.Module):
    """ST-GCN for skeletons: BatchNorm over all joints' coordinates at once, an adjacency in a buffer."""

    def __init__(self, c=3, v=5, k=2, out=6):
        super().__init__()
        self.register_buffer("A", torch.rand(k, v, v, generator=torch.Generator().manual_seed(0)))
        self.data_bn = nn.BatchNorm1d(c * v)
        self.gcn = nn.Conv2d(c, out * k, 1)
        self.edge_importance = nn.Parameter(torch.ones(k, v, v))
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(out), nn.ReLU(inplace=True), nn.Conv2d(out, out, (9, 1), padding=(4, 0)), nn.BatchNorm2d(out)
        )
        self.residual = nn.Sequential(nn.Conv2d(c, out, 1), nn.BatchNorm2d(out))
        self.fcn = nn.Conv2d(out, 4, 1)

    def forward(self, x):
        N, C, T, V, M = x.size()
        x = x.permute(0, 4, 3, 1, 2).contiguous()
        x = x.view(N * M, V * C, T)
        x = self.data_bn(x)
        x = x.view(N, M, V, C, T)
        x = x.permute(0, 1, 3, 4, 2).contiguous()
        x = x.view(N * M, C, T, V)
        res = self.residual(x)
        x = self.gcn(x)
        n, kc, t, v = x.size()
        x = x.view(n, 2, kc // 2, t, v)
        x = torch.einsum("nkctv,kvw->nctw", (x, self.A * self.edge_importance))
        x = F.relu(self.tcn(x.contiguous()) + res)
        x = F.avg_pool2d(x, x.size()[2:])
        x = x.view(N, M, -1, 1, 1).mean(dim=1)
        return self.fcn(x).view(x.size(0), -1)


@model("time_series", source="https://github.com/yysijie/st-gcn, net/st_gcn.py")
def st_gcn():
    return STGCN(), (normal(3, 3, 12, 5, 2),)
