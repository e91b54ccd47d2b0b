"""Brain signals: braindecode's models, and two as their authors have them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import model, normal
from ._absent import stand_ins

CHANNELS, TIMES, RATE = 8, 256, 64


def braindecode(name, **keywords):
    with stand_ins("torchaudio", "torchaudio.functional", "torchaudio.transforms", "linear_attention_transformer"):
        from braindecode import models
    keywords = {"n_chans": CHANNELS, "n_outputs": 3, "n_times": TIMES} | keywords
    return getattr(models, name)(**keywords), (normal(4, keywords["n_chans"], keywords["n_times"]),)


@model("eeg", source="braindecode, models/eegnet.py")
def eegnet():
    return braindecode("EEGNet", kernel_length=32)


@model("eeg", source="braindecode, models/eegnet.py, with the last layer's norm kept small")
def eegnet_max_norm():
    return braindecode("EEGNet", kernel_length=32, final_layer_with_constraint=True)


@model("eeg", source="braindecode, models/shallow_fbcsp.py")
def shallow_fbcsp():
    return braindecode("ShallowFBCSPNet", n_filters_time=8, n_filters_spat=8)


@model("eeg", source="braindecode, models/deep4.py")
def deep4():
    return braindecode("Deep4Net", n_times=512, n_filters_time=6, n_filters_spat=6, n_filters_2=8, n_filters_3=12)


@model("eeg", source="braindecode, models/tsinception.py")
def tsception():
    return braindecode("TSception", sfreq=RATE, hidden_size=16)


@model("eeg", source="braindecode, models/eegconformer.py")
def eeg_conformer():
    return braindecode("EEGConformer", n_filters_time=10, num_layers=2, num_heads=2, att_drop_prob=0.0)


@model("eeg", source="braindecode, models/atcnet.py")
def atcnet():
    return braindecode("ATCNet", n_times=512, sfreq=128, n_windows=2)


@model("eeg", source="braindecode, models/eegtcnet.py")
def eeg_tcnet():
    return braindecode("EEGTCNet", kern_length=32)


@model("eeg", source="braindecode, models/sinc_shallow.py")
def sinc_shallow():
    return braindecode("SincShallowNet", num_time_filters=8, sfreq=RATE)


@model("eeg", source="braindecode, models/fbcnet.py: a bank of filters, then BatchNorm")
def fbcnet():
    return braindecode("FBCNet", n_bands=2, n_filters_spat=4, sfreq=250, n_times=500)


@model("eeg", source="braindecode, models/attentionbasenet.py with squeeze and excitation")
def attention_base():
    return braindecode("AttentionBaseNet", n_times=512, sfreq=RATE, n_temporal_filters=8, attention_mode="se")


@model("eeg", source="braindecode, models/attentionbasenet.py with CAT lite")
def attention_base_catlite():
    return braindecode(
        "AttentionBaseNet", n_times=512, sfreq=RATE, n_temporal_filters=8, attention_mode="catlite", use_mlp=False
    )


@model("eeg", source="braindecode, models/usleep.py")
def usleep():
    return braindecode("USleep", n_chans=2, n_times=100 * 8, sfreq=100, depth=4)


@model("eeg", source="braindecode, models/sccnet.py")
def sccnet():
    return braindecode("SCCNet", sfreq=RATE)


@model("eeg", source="braindecode, models/tidnet.py")
def tidnet():
    return braindecode("TIDNet", t_filters=8, s_growth=6, sfreq=RATE)


@model("eeg", source="braindecode, models/msvtnet.py")
def msvtnet():
    return braindecode("MSVTNet", n_filters_list=(2, 2), conv1_kernels_size=(15, 31), num_heads=2)


@model("eeg", source="braindecode, models/eeginception_erp.py")
def eeg_inception():
    return braindecode("EEGInceptionERP", n_filters=4, n_times=128, sfreq=64)


class Conv2dWithConstraint(nn.Conv2d):
    """Renormalises its own weight before each call, as the Keras constraint does."""

    def __init__(self, *args, max_norm=1.0, **kwargs):
        self.max_norm = max_norm
        super().__init__(*args, **kwargs)

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=self.max_norm)
        return super().forward(x)


class EEGNetConstraint(nn.Module):
    def __init__(self, classes=4, channels=CHANNELS, samples=128, kernel=64, f1=8, d=2):
        super().__init__()
        f2 = f1 * d
        self.conv1 = nn.Conv2d(1, f1, (1, kernel), padding=(0, kernel // 2), bias=False)
        self.bn1 = nn.BatchNorm2d(f1, momentum=0.01, affine=True, eps=1e-3)
        self.depthwise = Conv2dWithConstraint(f1, f2, (channels, 1), groups=f1, bias=False, max_norm=1)
        self.bn2 = nn.BatchNorm2d(f2, momentum=0.01, affine=True, eps=1e-3)
        self.separable = nn.Sequential(
            nn.Conv2d(f2, f2, (1, 16), padding=(0, 8), groups=f2, bias=False), nn.Conv2d(f2, f2, 1, bias=False)
        )
        self.bn3 = nn.BatchNorm2d(f2, momentum=0.01, affine=True, eps=1e-3)
        with torch.no_grad():
            self.flat = self.features(torch.zeros(1, 1, channels, samples)).flatten(1).shape[1]
        self.dense = nn.Linear(self.flat, classes, bias=False)

    def features(self, x):
        x = self.bn1(self.conv1(x))
        x = F.avg_pool2d(F.elu(self.bn2(self.depthwise(x))), (1, 4))
        return F.avg_pool2d(F.elu(self.bn3(self.separable(x))), (1, 8))

    def forward(self, x):
        x = self.features(x.unsqueeze(1))
        return self.dense(x.view(x.size()[0], -1))


@model("eeg", source="torcheeg, models/cnn/eegnet.py: weight.data renormed in forward")
def eegnet_constraint():
    return EEGNetConstraint(), (normal(4, CHANNELS, 128),)


class SpatialGraphBlock(nn.Module):
    """DGCNN for EEG: Chebyshev polynomials of a learned adjacency, BatchNorm over features."""

    def __init__(self, electrodes, features, hidden, order, classes):
        super().__init__()
        self.order = order
        self.A = nn.Parameter(torch.empty(electrodes, electrodes))
        nn.init.xavier_normal_(self.A)
        self.BN1 = nn.BatchNorm1d(features)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(features, hidden) * 0.2) for _ in range(order)])
        self.fc1 = nn.Linear(electrodes * hidden, 16)
        self.fc2 = nn.Linear(16, classes)

    def normalize(self, a):
        a = F.relu(a)
        d = torch.sum(a, 1)
        d = 1 / torch.sqrt(d + 1e-10)
        d = torch.diag_embed(d)
        return torch.matmul(torch.matmul(torch.eye(a.shape[0], device=a.device, dtype=a.dtype) - d, a), d)

    def forward(self, x):
        x = self.BN1(x.transpose(1, 2)).transpose(1, 2)
        lap = self.normalize(self.A)
        support = []
        for i in range(self.order):
            if i == 0:
                support.append(torch.eye(lap.shape[1], dtype=lap.dtype))
            elif i == 1:
                support.append(lap)
            else:
                support.append(torch.matmul(support[-1], self.A))
        result = None
        for i, weight in enumerate(self.weights):
            if result is None:
                result = torch.matmul(support[i], x) @ weight
            else:
                result += torch.matmul(support[i], x) @ weight
        result = F.relu(result / math.sqrt(self.order))
        result = result.reshape(x.shape[0], -1)
        return self.fc2(F.relu(self.fc1(result)))


@model("eeg", source="torcheeg, models/gnn/dgcnn.py")
def eeg_dgcnn():
    return SpatialGraphBlock(CHANNELS, 5, 8, 3, 3), (normal(6, CHANNELS, 5),)
