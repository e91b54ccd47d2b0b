"""Audio: tagging, separation, sound events, from waveforms and from spectrograms."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal


class Spectrogram(nn.Module):
    """A short-time Fourier transform as convolutions with fixed kernels, as torchlibrosa has it; then mel and dB."""

    def __init__(self, n_fft=64, hop=16, mels=32):
        super().__init__()
        window = np.hanning(n_fft)
        basis = np.exp(-2j * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft) * window
        self.conv_real = nn.Conv1d(1, n_fft // 2 + 1, n_fft, hop, bias=False)
        self.conv_imag = nn.Conv1d(1, n_fft // 2 + 1, n_fft, hop, bias=False)
        self.conv_real.weight.data = torch.Tensor(basis.real[:, None, :])
        self.conv_imag.weight.data = torch.Tensor(basis.imag[:, None, :])
        self.melW = nn.Parameter(torch.rand(n_fft // 2 + 1, mels))
        self.pad = n_fft // 2
        for parameter in self.parameters():
            parameter.requires_grad = False

    def forward(self, wave):
        x = F.pad(wave[:, None, :], pad=(self.pad, self.pad), mode="reflect")
        power = self.conv_real(x) ** 2 + self.conv_imag(x) ** 2
        power = power[:, None, :, :].transpose(2, 3)
        mel = torch.matmul(power, self.melW)
        log_spec = 10.0 * torch.log10(torch.clamp(mel, min=1e-10, max=np.inf))
        log_spec -= 10.0 * np.log10(np.maximum(1e-10, 1.0))
        return log_spec


class ConvBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, (3, 3), (1, 1), (1, 1), bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, (3, 3), (1, 1), (1, 1), bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, input, pool_size=(2, 2), pool_type="avg"):
        x = input
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        if pool_type == "max":
            x = F.max_pool2d(x, kernel_size=pool_size)
        elif pool_type == "avg":
            x = F.avg_pool2d(x, kernel_size=pool_size)
        elif pool_type == "avg+max":
            x1 = F.avg_pool2d(x, kernel_size=pool_size)
            x2 = F.max_pool2d(x, kernel_size=pool_size)
            x = x1 + x2
        else:
            raise Exception("Incorrect argument!")
        return x


def interpolate(x, ratio):
    (batch_size, time_steps, classes_num) = x.shape
    upsampled = x[:, :, None, :].repeat(1, 1, ratio, 1)
    return upsampled.reshape(batch_size, time_steps * ratio, classes_num)


def pad_framewise_output(framewise_output, frames_num):
    pad = framewise_output[:, -1:, :].repeat(1, frames_num - framewise_output.shape[1], 1)
    return torch.cat((framewise_output, pad), dim=1)


class Cnn14(nn.Module):
    """Decision level attention: BatchNorm over mel bins, framewise and clipwise outputs, embedding."""

    def __init__(self, classes_num=7, mels=32, widths=(8, 16, 32)):
        super().__init__()
        self.interpolate_ratio = 8
        self.spectrogram = Spectrogram(mels=mels)
        self.bn0 = nn.BatchNorm2d(mels)
        self.blocks = nn.ModuleList(ConvBlock(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.fc1 = nn.Linear(widths[-1], 32, bias=True)
        self.att = nn.Conv1d(32, classes_num, 1)
        self.cla = nn.Conv1d(32, classes_num, 1)

    def forward(self, input, mixup_lambda=None):
        x = self.spectrogram(input)
        frames_num = x.shape[2]
        x = x.transpose(1, 3)
        x = self.bn0(x)
        x = x.transpose(1, 3)
        if self.training and mixup_lambda is not None:
            x = x[0::2] * mixup_lambda[0::2, None, None, None] + x[1::2] * mixup_lambda[1::2, None, None, None]
        for block in self.blocks:
            x = block(x, pool_size=(2, 2), pool_type="avg")
            x = F.dropout(x, p=0.0, training=self.training)
        x = torch.mean(x, dim=3)
        x1 = F.max_pool1d(x, kernel_size=3, stride=1, padding=1)
        x2 = F.avg_pool1d(x, kernel_size=3, stride=1, padding=1)
        x = x1 + x2
        x = x.transpose(1, 2)
        x = F.relu_(self.fc1(x))
        x = x.transpose(1, 2)
        norm_att = torch.softmax(torch.clamp(self.att(x), -10, 10), dim=-1)
        cla = torch.sigmoid(self.cla(x))
        clipwise_output = torch.sum(norm_att * cla, dim=2)
        framewise_output = interpolate(cla.transpose(1, 2), self.interpolate_ratio)
        framewise_output = pad_framewise_output(framewise_output, frames_num)
        return {"framewise_output": framewise_output, "clipwise_output": clipwise_output}


@model("audio", source="https://github.com/qiuqiangkong/audioset_tagging_cnn, pytorch/models.py")
def panns_cnn14():
    return Cnn14(), (normal(4, 16 * 35),)


@model("audio", source="panns_cnn14 with mixup of pairs in training")
def panns_mixup():
    class Mixed(Cnn14):
        def forward(self, input, mixup_lambda):
            return super().forward(input, mixup_lambda)

    return Mixed(), (normal(4, 16 * 35), torch.tensor([0.3, 0.7, 0.9, 0.1], dtype=torch.float64))


@model("audio", source="openunmix, model.py: OpenUnmix")
def open_unmix():
    from openunmix.model import OpenUnmix

    mean, scale = np.linspace(-1, 1, 24), np.linspace(0.5, 2, 24)
    module = OpenUnmix(33, 2, hidden_size=16, nb_layers=2, input_mean=mean, input_scale=scale, max_bin=24)
    return module, (normal(4, 2, 33, 12).abs(),)


@model("audio", source="openunmix, model.py: Separator with its STFT and without the Wiener filter")
def open_unmix_separator():
    from openunmix.model import OpenUnmix, Separator

    targets = {name: OpenUnmix(33, 2, hidden_size=8, nb_layers=1) for name in ("vocals", "drums")}
    return Separator(targets, niter=0, n_fft=64, n_hop=16, nb_channels=2), (normal(2, 2, 320),)


class VGGish(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for v in (8, "M", 16, "M", 32, 32, "M", 48, 48, "M"):
            if v == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels, v, kernel_size=3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                channels = v
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(48 * 6 * 4, 64), nn.ReLU(True), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, 16), nn.ReLU(True)
        )
        self.register_buffer("pca_eigen_vectors", torch.eye(16))
        self.register_buffer("pca_means", torch.zeros(16, 1))

    def forward(self, x):
        x = self.features(x)
        x = torch.transpose(x, 1, 3)
        x = torch.transpose(x, 1, 2)
        x = x.contiguous()
        x = x.view(x.size(0), -1)
        x = self.embeddings(x)
        if self.training:
            return x
        applied = torch.mm(self.pca_eigen_vectors, (x.t() - self.pca_means)).t()
        clipped = torch.clamp(applied, -2.0, 2.0)
        return torch.squeeze(torch.round((clipped + 2.0) * (255.0 / 4.0)))


@model("audio", source="https://github.com/harritaylor/torchvggish, torchvggish/vggish.py; with BatchNorm")
def vggish():
    return VGGish(), (normal(4, 1, 96, 64),)


class TemporalBlock(nn.Module):
    def __init__(self, inputs, hidden, kernel, dilation, causal):
        super().__init__()
        padding = (kernel - 1) * dilation if causal else (kernel - 1) * dilation // 2
        self.conv1x1 = nn.Conv1d(inputs, hidden, 1, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.depthwise = nn.Conv1d(
            hidden, hidden, kernel, padding=padding, dilation=dilation, groups=hidden, bias=False
        )
        self.chomp = padding if causal else 0
        self.prelu = nn.PReLU()
        self.norm2 = nn.BatchNorm1d(hidden)
        self.pointwise = nn.Conv1d(hidden, inputs, 1, bias=False)

    def forward(self, x):
        residual = x
        out = self.depthwise(self.norm(F.relu(self.conv1x1(x))))
        if self.chomp:
            out = out[:, :, : -self.chomp].contiguous()
        return self.pointwise(self.norm2(self.prelu(out))) + residual


def overlap_and_add(signal, frame_step):
    outer_dimensions = signal.size()[:-2]
    frames, frame_length = signal.size()[-2:]
    subframe_length = math.gcd(frame_length, frame_step)
    subframe_step = frame_step // subframe_length
    subframes_per_frame = frame_length // subframe_length
    output_size = frame_step * (frames - 1) + frame_length
    output_subframes = output_size // subframe_length
    subframe_signal = signal.view(*outer_dimensions, -1, subframe_length)
    frame = torch.arange(0, output_subframes).unfold(0, subframes_per_frame, subframe_step)
    frame = signal.new_tensor(frame).long()
    frame = frame.contiguous().view(-1)
    result = signal.new_zeros(*outer_dimensions, output_subframes, subframe_length)
    result.index_add_(-2, frame, subframe_signal)
    return result.view(*outer_dimensions, -1)


class ConvTasNet(nn.Module):
    """Encoder, masks by dilated separable convolutions, decoder by overlap and add; norm_type "BN"."""

    def __init__(self, N=16, L=8, B=12, H=16, P=3, X=3, R=2, C=2, causal=True):
        super().__init__()
        self.L, self.C, self.N = L, C, N
        self.encoder = nn.Conv1d(1, N, kernel_size=L, stride=L // 2, bias=False)
        self.layer_norm = nn.BatchNorm1d(N)
        self.bottleneck = nn.Conv1d(N, B, 1, bias=False)
        repeats = [nn.Sequential(*(TemporalBlock(B, H, P, 2**x, causal) for x in range(X))) for _ in range(R)]
        self.temporal_conv_net = nn.Sequential(*repeats)
        self.mask_conv1x1 = nn.Conv1d(B, C * N, 1, bias=False)
        self.basis_signals = nn.Linear(N, L, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_normal_(p)

    def forward(self, mixture):
        mixture_w = F.relu(self.encoder(torch.unsqueeze(mixture, 1)))
        M, N, K = mixture_w.size()
        score = self.mask_conv1x1(self.temporal_conv_net(self.bottleneck(self.layer_norm(mixture_w))))
        est_mask = F.softmax(score.view(M, self.C, N, K), dim=1)
        source_w = torch.unsqueeze(mixture_w, 1) * est_mask
        source_w = torch.transpose(source_w, 2, 3)
        est_source = overlap_and_add(self.basis_signals(source_w), self.L // 2)
        T_origin = mixture.size(-1)
        T_conv = est_source.size(-1)
        return F.pad(est_source, (0, T_origin - T_conv))


@model("audio", source="https://github.com/kaituoxu/Conv-TasNet, src/conv_tasnet.py")
def conv_tasnet():
    return ConvTasNet(), (normal(4, 161),)


class HarmonicSTFT(nn.Module):
    """Learnt band-pass filters at the harmonics of each note, applied to an STFT by torch.stft."""

    def __init__(self, n_fft=64, n_harmonic=3, bw_Q=1.0, sample_rate=4000, levels=20):
        super().__init__()
        self.n_fft, self.n_harmonic, self.level = n_fft, n_harmonic, levels
        self.register_buffer("window", torch.hann_window(n_fft))
        f0 = torch.tensor(np.geomspace(60, sample_rate / (2 * n_harmonic), levels).astype("float32"))
        self.register_buffer("f0", torch.cat([f0 * (i + 1) for i in range(n_harmonic)]))
        self.register_buffer("fft_bins", torch.linspace(0, sample_rate // 2, n_fft // 2 + 1))
        self.bw_alpha, self.bw_beta = 0.1079, 24.7
        self.bw_Q = nn.Parameter(torch.tensor(np.array([bw_Q]).astype("float32")))

    def get_harmonic_fb(self):
        bw = (self.bw_alpha * self.f0 + self.bw_beta) / self.bw_Q
        bw = bw.unsqueeze(0)
        f0 = self.f0.unsqueeze(0)
        fft_bins = self.fft_bins.unsqueeze(1)
        up_slope = torch.matmul(fft_bins, (2 / bw)) + 1 - (2 * f0 / bw)
        down_slope = torch.matmul(fft_bins, (-2 / bw)) + 1 + (2 * f0 / bw)
        zero = torch.zeros(1, device=f0.device, dtype=f0.dtype)
        return torch.max(zero, torch.min(down_slope, up_slope))

    def forward(self, waveform):
        spec = torch.stft(waveform, self.n_fft, window=self.window, return_complex=True)
        spectrogram = spec.abs().pow(2.0)
        harmonic_fb = self.get_harmonic_fb()
        harmonic_spec = torch.matmul(spectrogram.transpose(1, 2), harmonic_fb).transpose(1, 2)
        b, _, length = harmonic_spec.size()
        harmonic_spec = harmonic_spec.view(b, self.n_harmonic, self.level, length)
        return 10.0 * torch.log10(harmonic_spec.clamp(min=1e-10))


class HarmonicCNN(nn.Module):
    def __init__(self, n_harmonic=3, width=12, classes=5):
        super().__init__()
        self.hstft = HarmonicSTFT(n_harmonic=n_harmonic)
        self.hstft_bn = nn.BatchNorm2d(n_harmonic)
        self.layers = nn.ModuleList()
        for i, stride in ((n_harmonic, 2), (width, 2), (width, 2)):
            shortcut = nn.Sequential(nn.Conv2d(i, width, 3, stride, 1), nn.BatchNorm2d(width))
            body = nn.Sequential(
                *(nn.Conv2d(i, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)),
            )
            self.layers.append(nn.ModuleDict({"shortcut": shortcut, "body": body}))
        self.dense1 = nn.Linear(width, width)
        self.bn = nn.BatchNorm1d(width)
        self.dense2 = nn.Linear(width, classes)

    def forward(self, x):
        x = self.hstft_bn(self.hstft(x))
        for layer in self.layers:
            x = F.relu(layer["body"](x) + layer["shortcut"](x))
        x = x.mean(2)
        if x.size(-1) != 1:
            x = nn.MaxPool1d(x.size(-1))(x)
        x = x.squeeze(2)
        x = F.relu(self.bn(self.dense1(x)))
        return torch.sigmoid(self.dense2(x))


@model("audio", source="https://github.com/minzwon/sota-music-tagging-models, training/model.py: HarmonicCNN")
def harmonic_cnn():
    return HarmonicCNN(), (normal(4, 800),)


class SampleCNN(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        widths = (8, 8, 16, 16, 32)
        self.layer1 = self.block(1, 8, stride=3, pool=False)
        self.layers = nn.ModuleList(self.block(i, o) for i, o in zip((8, *widths), widths, strict=False))
        self.dense1 = nn.Linear(32, 32)
        self.bn = nn.BatchNorm1d(32)
        self.relu = nn.ReLU()
        self.dense2 = nn.Linear(32, classes)

    def block(self, inputs, outputs, stride=1, pool=True):
        layers = [nn.Conv1d(inputs, outputs, 3, stride=stride, padding=1), nn.BatchNorm1d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, *([nn.MaxPool1d(3)] if pool else []))

    def forward(self, x):
        x = x.unsqueeze(1)
        x = self.layer1(x)
        for layer in self.layers:
            x = layer(x)
        x = x.squeeze(-1)
        x = self.relu(self.bn(self.dense1(x)))
        return nn.Sigmoid()(self.dense2(x))


@model("audio", source="https://github.com/minzwon/sota-music-tagging-models, training/model.py: SampleCNN")
def sample_cnn():
    return SampleCNN(), (normal(4, 3**6),)


class GLU(nn.Module):
    def __init__(self, input_num):
        super().__init__()
        self.sigmoid = nn.Sigmoid()
        self.linear = nn.Linear(input_num, input_num)

    def forward(self, x):
        lin = self.linear(x.permute(0, 2, 3, 1))
        lin = lin.permute(0, 3, 1, 2)
        return lin * self.sigmoid(x)


class CRNN(nn.Module):
    """Sound events: gated convolutions, bidirectional GRU, strong and weak predictions by attention."""

    def __init__(self, nclass=6, filters=(8, 12, 16), hidden=12):
        super().__init__()
        cnn = nn.Sequential()
        for i, (n_in, n_out, pool) in enumerate(zip((1, *filters), filters, ((2, 2), (2, 2), (1, 4)), strict=False)):
            cnn.add_module(f"conv{i}", nn.Conv2d(n_in, n_out, 3, 1, 1))
            cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(n_out, eps=0.001, momentum=0.99))
            cnn.add_module(f"glu{i}", GLU(n_out))
            cnn.add_module(f"dropout{i}", nn.Dropout(0.5))
            cnn.add_module(f"pooling{i}", nn.AvgPool2d(pool))
        self.cnn = cnn
        self.rnn = nn.GRU(filters[-1], hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.dropout = nn.Dropout(0.5)
        self.dense = nn.Linear(2 * hidden, nclass)
        self.dense_softmax = nn.Linear(2 * hidden, nclass)
        self.sigmoid, self.softmax = nn.Sigmoid(), nn.Softmax(dim=-1)

    def forward(self, x, pad_mask):
        x = self.cnn(x.transpose(1, 2).unsqueeze(1).transpose(2, 3))
        bs, chan, frames, freq = x.size()
        if freq != 1:
            x = x.permute(0, 2, 1, 3)
            x = x.contiguous().view(bs, frames, chan * freq)
        else:
            x = x.squeeze(-1)
            x = x.permute(0, 2, 1)
        self.rnn.flatten_parameters()
        x, _ = self.rnn(x)
        x = self.dropout(x)
        strong = self.sigmoid(self.dense(x))
        sof = self.dense_softmax(x)
        sof = sof.masked_fill(pad_mask[:, :: pad_mask.shape[1] // frames, None], -1e30)
        sof = torch.clamp(self.softmax(sof), min=1e-7, max=1)
        weak = (strong * sof).sum(1) / sof.sum(1)
        return strong.transpose(1, 2), weak


@model("audio", source="https://github.com/DCASE-REPO/DESED_task, desed_task/nnet/CRNN.py")
def crnn_events():
    pad_mask = torch.arange(24)[None] >= torch.tensor([24, 20, 12, 24])[:, None]
    return CRNN(), (normal(4, 24, 16), pad_mask)
