"""Re-identification of people: embeddings behind BatchNorm, parts, attention."""

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal


@model("reid", source="torchreid, reid/models/osnet.py")
def osnet():
    from torchreid.reid.models.osnet import OSBlock, OSNet

    module = OSNet(10, [OSBlock] * 3, [1, 1, 1], [16, 64, 96, 128], loss="triplet", feature_dim=32)
    return module, (normal(4, 3, 64, 32),)


@model("reid", source="torchreid, reid/models/osnet_ain.py")
def osnet_ain():
    from torchreid.reid.models.osnet_ain import OSBlock, OSBlockINin, OSNet

    blocks = [[OSBlockINin], [OSBlock], [OSBlockINin]]
    module = OSNet(10, blocks, [1, 1, 1], [16, 64, 96, 128], feature_dim=32, conv1_IN=True)
    return module, (normal(4, 3, 64, 32),)


@model("reid", source="torchreid, reid/models/pcb.py")
def pcb():
    from torchreid.reid.models.pcb import PCB
    from torchvision.models.resnet import BasicBlock

    module = PCB(10, "triplet", BasicBlock, [1, 1, 1, 1], parts=4, reduced_dim=32)
    return module, (normal(4, 3, 64, 32),)


@model("reid", source="torchreid, reid/models/hacnn.py")
def hacnn():
    from torchreid.reid.models.hacnn import HACNN

    return HACNN(10, loss="triplet", nchannels=[32, 64, 96], feat_dim=32, use_gpu=False), (normal(2, 3, 160, 64),)


@model("reid", source="torchreid, reid/models/mlfn.py")
def mlfn():
    from torchreid.reid.models.mlfn import MLFN

    sizes = {"groups": 4, "channels": [8, 16, 24, 32, 48], "embed_dim": 24}
    return MLFN(10, loss="triplet", **sizes), (normal(2, 3, 64, 32),)


def weights_init_kaiming(m):
    classname = m.__class__.__name__
    if classname.find("Linear") != -1:
        nn.init.kaiming_normal_(m.weight, a=0, mode="fan_out")
    elif classname.find("BatchNorm") != -1 and m.affine:
        nn.init.constant_(m.weight, 1.0)
        nn.init.constant_(m.bias, 0.0)


class BNNeck(nn.Module):
    """The strong baseline: features for the triplet loss before a BatchNorm without bias, classes behind it."""

    def __init__(self, num_classes=10, neck="bnneck", neck_feat="after"):
        import torchvision

        super().__init__()
        base = torchvision.models.resnet18()
        base.layer4[0].conv1.stride = (1, 1)
        base.layer4[0].downsample[0].stride = (1, 1)
        self.base = nn.Sequential(*list(base.children())[:-2])
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.neck, self.neck_feat = neck, neck_feat
        self.bottleneck = nn.BatchNorm1d(512)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(512, num_classes, bias=False)
        self.bottleneck.apply(weights_init_kaiming)

    def forward(self, x):
        global_feat = self.gap(self.base(x))
        global_feat = global_feat.view(global_feat.shape[0], -1)
        feat = self.bottleneck(global_feat) if self.neck == "bnneck" else global_feat
        if self.training:
            return self.classifier(feat), global_feat
        return feat if self.neck_feat == "after" else global_feat


@model("reid", source="https://github.com/michuanhaohao/reid-strong-baseline, modeling/baseline.py")
def bnneck():
    return BNNeck(), (normal(2, 3, 64, 32),)


class NonLocal(nn.Module):
    def __init__(self, in_channels, reduc_ratio=2):
        super().__init__()
        self.inter_channels = in_channels // reduc_ratio
        self.g = nn.Sequential(nn.Conv2d(in_channels, self.inter_channels, kernel_size=1))
        self.W = nn.Sequential(nn.Conv2d(self.inter_channels, in_channels, kernel_size=1), nn.BatchNorm2d(in_channels))
        nn.init.constant_(self.W[1].weight, 0.0)
        nn.init.constant_(self.W[1].bias, 0.0)
        self.theta = nn.Conv2d(in_channels, self.inter_channels, kernel_size=1)
        self.phi = nn.Conv2d(in_channels, self.inter_channels, kernel_size=1)

    def forward(self, x):
        batch_size = x.size(0)
        g_x = self.g(x).view(batch_size, self.inter_channels, -1)
        g_x = g_x.permute(0, 2, 1)
        theta_x = self.theta(x).view(batch_size, self.inter_channels, -1)
        theta_x = theta_x.permute(0, 2, 1)
        phi_x = self.phi(x).view(batch_size, self.inter_channels, -1)
        f = torch.matmul(theta_x, phi_x)
        N = f.size(-1)
        f_div_C = f / N
        y = torch.matmul(f_div_C, g_x)
        y = y.permute(0, 2, 1).contiguous()
        y = y.view(batch_size, self.inter_channels, *x.size()[2:])
        return self.W(y) + x


class GeneralizedMeanPoolingP(nn.Module):
    def __init__(self, norm=3, output_size=1, eps=1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1) * norm)
        self.output_size = output_size
        self.eps = eps

    def forward(self, x):
        x = x.clamp(min=self.eps).pow(self.p)
        return F.adaptive_avg_pool2d(x, self.output_size).pow(1.0 / self.p)


class AGW(nn.Module):
    """Non-local blocks after chosen blocks of each stage, generalised mean, BNNeck."""

    def __init__(self, num_classes=10, non_layers=(0, 1, 1, 0)):
        import torchvision

        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        base = torchvision.models.ResNet(block, [1, 2, 2, 1], num_classes=1)
        base.fc = nn.Identity()
        self.base = base
        widths = (64, 128, 256, 512)
        depths = (1, 2, 2, 1)
        self.NL = nn.ModuleList(
            nn.ModuleList([NonLocal(w) for _ in range(n)]) for w, n in zip(widths, non_layers, strict=True)
        )
        self.NL_idx = [sorted([d - (i + 1) for i in range(n)]) for d, n in zip(depths, non_layers, strict=True)]
        self.global_pool = GeneralizedMeanPoolingP()
        self.bottleneck = nn.BatchNorm1d(512)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(512, num_classes, bias=False)

    def forward(self, x):
        b = self.base
        x = b.maxpool(b.relu(b.bn1(b.conv1(x))))
        for stage, blocks, indices in zip((b.layer1, b.layer2, b.layer3, b.layer4), self.NL, self.NL_idx, strict=True):
            counter = 0
            for i in range(len(stage)):
                x = stage[i](x)
                if counter < len(indices) and i == indices[counter]:
                    x = blocks[counter](x)
                    counter += 1
        global_feat = self.global_pool(x)
        global_feat = global_feat.view(global_feat.shape[0], -1)
        feat = self.bottleneck(global_feat)
        if not self.training:
            return F.normalize(feat)
        return self.classifier(feat), global_feat


@model("reid", source="https://github.com/mangye16/ReID-Survey, modeling/baseline.py")
def agw():
    return AGW(), (normal(2, 3, 64, 32),)
