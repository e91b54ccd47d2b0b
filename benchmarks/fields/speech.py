"""Speech: recognition, speakers."""

import torch
from torch import nn

from . import model, normal


class SeparableBlock(nn.Module):
    """Time-channel separable convolutions, each followed by BatchNorm, with a residual branch."""

    def __init__(self, inputs, outputs, kernel, repeat):
        super().__init__()
        layers = []
        channels = inputs
        for i in range(repeat):
            layers += [
                nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
                nn.Conv1d(channels, outputs, 1, bias=False),
                nn.BatchNorm1d(outputs, eps=1e-3, momentum=0.1),
            ]
            if i < repeat - 1:
                layers += [nn.ReLU(inplace=True), nn.Dropout(0.1)]
            channels = outputs
        self.mconv = nn.ModuleList(layers)
        self.res = nn.ModuleList([nn.Conv1d(inputs, outputs, 1, bias=False), nn.BatchNorm1d(outputs, eps=1e-3)])
        self.mout = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.1))

    def forward(self, x):
        out = x
        for layer in self.mconv:
            out = layer(out)
        res = x
        for layer in self.res:
            res = layer(res)
        out += res
        return self.mout(out)


class QuartzNet(nn.Module):
    def __init__(self, features=64, classes=29, width=48):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(features, width, 33, stride=2, padding=16, bias=False),
            nn.BatchNorm1d(width, eps=1e-3),
            nn.ReLU(inplace=True),
            *(SeparableBlock(width, width, k, 3) for k in (33, 39, 51)),
            nn.Conv1d(width, width, 87, padding=86, dilation=2, groups=width, bias=False),
            nn.Conv1d(width, 2 * width, 1, bias=False),
            nn.BatchNorm1d(2 * width, eps=1e-3),
            nn.ReLU(inplace=True),
        )
        self.decoder = nn.Conv1d(2 * width, classes, 1)

    def forward(self, features):
        return torch.log_softmax(self.decoder(self.encoder(features)).transpose(1, 2), dim=-1)


@model("speech", source="https://github.com/NVIDIA/NeMo, nemo/collections/asr/parts/submodules/jasper.py")
def quartznet():
    return QuartzNet(), (normal(4, 64, 160),)


@model("speech", source="speechbrain, lobes/models/ECAPA_TDNN.py")
def ecapa_tdnn():
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    sizes = {"channels": [32, 32, 32, 32, 64], "attention_channels": 16, "se_channels": 8, "lin_neurons": 24}
    lengths = torch.tensor([1.0, 0.75, 0.5, 1.0], dtype=torch.float64)
    return ECAPA_TDNN(20, **sizes, res2net_scale=4), (normal(4, 40, 20), lengths)


@model("speech", source="speechbrain, lobes/models/Xvector.py")
def xvector():
    from speechbrain.lobes.models.Xvector import Xvector

    return Xvector(tdnn_channels=[32, 32, 32, 32, 64], lin_neurons=32, in_channels=20), (normal(4, 40, 20),)


@model("speech", source="speechbrain, lobes/models/CRDNN.py")
def crdnn():
    from speechbrain.lobes.models.CRDNN import CRDNN

    sizes = {"cnn_channels": [8, 16], "rnn_layers": 2, "rnn_neurons": 16, "dnn_neurons": 24}
    return CRDNN(input_shape=[4, 12, 20], **sizes, dropout=0.0), (normal(4, 12, 20),)


@model("speech", source="speechbrain, lobes/models/ContextNet.py")
def contextnet():
    from speechbrain.lobes.models.ContextNet import ContextNet

    sizes = {"out_channels": 24, "conv_channels": [16] * 3, "kernel_size": 3, "strides": [1, 2, 1], "num_blocks": 3}
    return ContextNet(input_shape=(4, 32, 20), **sizes, num_layers=2, inner_dim=8), (normal(4, 32, 20),)


@model("speech", source="torchaudio, models/conformer.py")
def conformer():
    from torchaudio.models import Conformer

    module = Conformer(input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7)
    return module, (normal(4, 24, 32), torch.tensor([24, 20, 24, 11]))


class MaskConv(nn.Module):
    """Zeros beyond each example's length after every layer."""

    def __init__(self, seq_module):
        super().__init__()
        self.seq_module = seq_module

    def forward(self, x, lengths):
        for module in self.seq_module:
            x = module(x)
            mask = torch.BoolTensor(x.size()).fill_(0)
            if x.is_cuda:
                mask = mask.cuda()
            for i, length in enumerate(lengths):
                length = length.item()
                if (mask[i].size(2) - length) > 0:
                    mask[i].narrow(2, length, mask[i].size(2) - length).fill_(1)
            x = x.masked_fill(mask, 0)
        return x, lengths


class SequenceWise(nn.Module):
    """Collapses time and batch: a layer for every step."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        t, n = x.size(0), x.size(1)
        x = x.view(t * n, -1)
        x = self.module(x)
        return x.view(t, n, -1)


class BatchRNN(nn.Module):
    def __init__(self, input_size, hidden_size, batch_norm=True):
        super().__init__()
        self.hidden_size = hidden_size
        self.batch_norm = SequenceWise(nn.BatchNorm1d(input_size)) if batch_norm else None
        self.rnn = nn.LSTM(input_size, hidden_size, bidirectional=True, bias=True)

    def flatten_parameters(self):
        self.rnn.flatten_parameters()

    def forward(self, x, output_lengths):
        if self.batch_norm is not None:
            x = self.batch_norm(x)
        x = nn.utils.rnn.pack_padded_sequence(x, output_lengths, enforce_sorted=False)
        x, _ = self.rnn(x)
        x, _ = nn.utils.rnn.pad_packed_sequence(x)
        return x.view(x.size(0), x.size(1), 2, -1).sum(2).view(x.size(0), x.size(1), -1)


class InferenceBatchSoftmax(nn.Module):
    def forward(self, x):
        return nn.functional.softmax(x, dim=-1) if not self.training else x


class DeepSpeech2(nn.Module):
    """Strided convolutions over the spectrogram, bidirectional LSTMs over packed sequences, BatchNorm between."""

    def __init__(self, mask, features=33, hidden=24, layers=2, classes=29):
        super().__init__()
        self.conv = mask(
            nn.Sequential(
                nn.Conv2d(1, 8, kernel_size=(41, 11), stride=(2, 2), padding=(20, 5)),
                nn.BatchNorm2d(8),
                nn.Hardtanh(0, 20, inplace=True),
                nn.Conv2d(8, 8, kernel_size=(21, 11), stride=(2, 1), padding=(10, 5)),
                nn.BatchNorm2d(8),
                nn.Hardtanh(0, 20, inplace=True),
            )
        )
        size = ((features + 1) // 2 + 1) // 2 * 8
        self.rnns = nn.Sequential(
            BatchRNN(size, hidden, batch_norm=False), *(BatchRNN(hidden, hidden) for _ in range(layers - 1))
        )
        self.fc = nn.Sequential(
            SequenceWise(nn.Sequential(nn.BatchNorm1d(hidden), nn.Linear(hidden, classes, bias=False)))
        )
        self.inference_softmax = InferenceBatchSoftmax()

    def forward(self, x, lengths):
        lengths = lengths.cpu().int()
        output_lengths = self.get_seq_lens(lengths)
        x, _ = self.conv(x, output_lengths)
        sizes = x.size()
        x = x.view(sizes[0], sizes[1] * sizes[2], sizes[3])
        x = x.transpose(1, 2).transpose(0, 1).contiguous()
        for rnn in self.rnns:
            x = rnn(x, output_lengths)
        x = self.fc(x)
        x = x.transpose(0, 1)
        return self.inference_softmax(x), output_lengths

    def get_seq_lens(self, input_length):
        seq_len = input_length
        for m in self.conv.modules():
            if type(m) is nn.Conv2d:
                seq_len = (seq_len + 2 * m.padding[1] - m.dilation[1] * (m.kernel_size[1] - 1) - 1) // m.stride[1] + 1
        return seq_len.int()


@model("speech", source="https://github.com/SeanNaren/deepspeech.pytorch, deepspeech_pytorch/model.py")
def deepspeech2():
    return DeepSpeech2(MaskConv), (normal(4, 1, 33, 40), torch.tensor([40, 31, 36, 24]))


class MaskedByComparison(MaskConv):
    """As later code writes it: no loop over the examples."""

    def forward(self, x, lengths):
        for module in self.seq_module:
            x = module(x)
            beyond = torch.arange(x.size(-1), device=x.device)[None, :] >= lengths[:, None]
            x = x.masked_fill(beyond[:, None, None, :], 0)
        return x, lengths


@model("speech", source="deepspeech2, its mask by a comparison")
def deepspeech2_masked():
    return DeepSpeech2(MaskedByComparison), (normal(4, 1, 33, 40), torch.tensor([40, 31, 36, 24]))


class GLUBlock(nn.Module):
    def __init__(self, inputs, outputs, kernel, dropout):
        super().__init__()
        self.conv = nn.utils.weight_norm(nn.Conv1d(inputs, 2 * outputs, kernel, padding=kernel // 2))
        self.norm = nn.BatchNorm1d(outputs)
        self.dropout = dropout

    def forward(self, x):
        x = self.norm(nn.functional.glu(self.conv(x), dim=1))
        return nn.functional.dropout(x, self.dropout, self.training, inplace=True)


class Wav2Letter(nn.Module):
    """From the waveform, in gated convolutions with weight norm, BatchNorm behind the gate."""

    def __init__(self, classes=28):
        super().__init__()
        self.front = nn.Conv1d(1, 24, 40, stride=16, bias=False)
        self.norm = nn.BatchNorm1d(24, affine=False)
        self.blocks = nn.ModuleList([GLUBlock(i, o, k, 0.0) for i, o, k in ((24, 24, 7), (24, 32, 9), (32, 48, 1))])
        self.out = nn.utils.weight_norm(nn.Conv1d(48, classes, 1))

    def forward(self, wave):
        x = self.front(wave.unsqueeze(1)).abs()
        x = self.norm(x.clamp(min=1e-3).log())
        for block in self.blocks:
            x = block(x)
        return self.out(x).permute(2, 0, 1).log_softmax(-1)


@model("speech", source="https://github.com/flashlight/wav2letter, recipes/conv_glu; in PyTorch with BatchNorm")
def wav2letter():
    return Wav2Letter(), (normal(4, 800),)
