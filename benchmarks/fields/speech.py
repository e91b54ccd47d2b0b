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
