"""Faces: embeddings with margins, detection, landmarks."""

import math
from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional as F

from . import integers, model, normal


@model("faces", source="facenet-pytorch, models/inception_resnet_v1.py: fewer blocks")
def facenet():
    from facenet_pytorch import InceptionResnetV1

    module = InceptionResnetV1(classify=True, num_classes=5, dropout_prob=0.0)
    for name in ("repeat_1", "repeat_2", "repeat_3"):
        setattr(module, name, getattr(module, name)[:1])
    return module, (normal(2, 3, 80, 80),)


def l2_norm(input, axis=1):
    norm = torch.norm(input, 2, axis, True)
    output = torch.div(input, norm)
    return output


class SEModule(nn.Module):
    def __init__(self, channels, reduction):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1, padding=0, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1, padding=0, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        module_input = x
        x = self.avg_pool(x)
        x = self.fc1(x)
        x = self.relu(x)
        x = self.fc2(x)
        x = self.sigmoid(x)
        return module_input * x


class BottleneckIRSE(nn.Module):
    def __init__(self, in_channel, depth, stride):
        super().__init__()
        if in_channel == depth:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channel, depth, (1, 1), stride, bias=False), nn.BatchNorm2d(depth)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channel),
            nn.Conv2d(in_channel, depth, (3, 3), (1, 1), 1, bias=False),
            nn.PReLU(depth),
            nn.Conv2d(depth, depth, (3, 3), stride, 1, bias=False),
            nn.BatchNorm2d(depth),
            SEModule(depth, 4),
        )

    def forward(self, x):
        shortcut = self.shortcut_layer(x)
        res = self.res_layer(x)
        return res + shortcut


class Bottleneck(namedtuple("Block", ["in_channel", "depth", "stride"])):
    """A named tuple describing a ResNet block."""


def get_block(in_channel, depth, num_units, stride=2):
    return [Bottleneck(in_channel, depth, stride)] + [Bottleneck(depth, depth, 1) for i in range(num_units - 1)]


class Flatten(nn.Module):
    def forward(self, input):
        return input.view(input.size(0), -1)


class Backbone(nn.Module):
    def __init__(self, embedding=24):
        super().__init__()
        blocks = [get_block(8, 8, 2), get_block(8, 16, 2), get_block(16, 24, 2)]
        self.input_layer = nn.Sequential(nn.Conv2d(3, 8, (3, 3), 1, 1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(24), nn.Dropout(0.6), Flatten(), nn.Linear(24 * 4 * 4, embedding), nn.BatchNorm1d(embedding)
        )
        modules = []
        for block in blocks:
            for bottleneck in block:
                modules.append(BottleneckIRSE(bottleneck.in_channel, bottleneck.depth, bottleneck.stride))
        self.body = nn.Sequential(*modules)

    def forward(self, x):
        x = self.input_layer(x)
        x = self.body(x)
        x = self.output_layer(x)
        return l2_norm(x)


class Arcface(nn.Module):
    def __init__(self, embedding_size, classnum, s=64.0, m=0.5):
        super().__init__()
        self.kernel = nn.Parameter(torch.Tensor(embedding_size, classnum))
        self.kernel.data.uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)
        self.m, self.s = m, s
        self.cos_m, self.sin_m = math.cos(m), math.sin(m)
        self.mm = self.sin_m * m
        self.threshold = math.cos(math.pi - m)

    def forward(self, embbedings, label):
        nB = len(embbedings)
        kernel_norm = l2_norm(self.kernel, axis=0)
        cos_theta = torch.mm(embbedings, kernel_norm)
        cos_theta = cos_theta.clamp(-1, 1)
        cos_theta_2 = torch.pow(cos_theta, 2)
        sin_theta_2 = 1 - cos_theta_2
        sin_theta = torch.sqrt(sin_theta_2)
        cos_theta_m = cos_theta * self.cos_m - sin_theta * self.sin_m
        cond_v = cos_theta - self.threshold
        cond_mask = cond_v <= 0
        keep_val = cos_theta - self.mm
        cos_theta_m[cond_mask] = keep_val[cond_mask]
        output = cos_theta * 1.0
        idx_ = torch.arange(0, nB, dtype=torch.long)
        output[idx_, label] = cos_theta_m[idx_, label]
        output *= self.s
        return output


class Trained(nn.Module):
    """Backbone and head as the learner calls them: logits with the margin in training, embeddings otherwise."""

    def __init__(self, backbone, head):
        super().__init__()
        self.model, self.head = backbone, head

    def forward(self, images, labels):
        embeddings = self.model(images)
        return self.head(embeddings, labels) if self.training else embeddings


@model("faces", source="https://github.com/TreB1eN/InsightFace_Pytorch, model.py: Backbone ir_se and Arcface")
def ir_se_arcface():
    return Trained(Backbone(), Arcface(24, 10)), (normal(4, 3, 32, 32), integers(10, 4))


class ConvBlock(nn.Module):
    def __init__(self, in_c, out_c, kernel=(1, 1), stride=(1, 1), padding=(0, 0), groups=1, linear=False):
        super().__init__()
        self.conv = nn.Conv2d(in_c, out_c, kernel, groups=groups, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_c)
        self.linear = linear
        if not linear:
            self.prelu = nn.PReLU(out_c)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.linear else self.prelu(x)


class DepthWise(nn.Module):
    def __init__(self, in_c, out_c, residual=False, stride=(2, 2), groups=1):
        super().__init__()
        self.conv = ConvBlock(in_c, groups)
        self.conv_dw = ConvBlock(groups, groups, (3, 3), stride, (1, 1), groups=groups)
        self.project = ConvBlock(groups, out_c, linear=True)
        self.residual = residual

    def forward(self, x):
        if self.residual:
            short_cut = x
        x = self.conv(x)
        x = self.conv_dw(x)
        x = self.project(x)
        if self.residual:
            x = short_cut + x
        return x


class MobileFaceNet(nn.Module):
    def __init__(self, embedding_size=24):
        super().__init__()
        self.conv1 = ConvBlock(3, 16, (3, 3), (2, 2), (1, 1))
        self.conv2_dw = ConvBlock(16, 16, (3, 3), (1, 1), (1, 1), groups=16)
        self.conv_23 = DepthWise(16, 16, groups=32)
        self.conv_3 = nn.Sequential(*(DepthWise(16, 16, True, (1, 1), 32) for _ in range(3)))
        self.conv_34 = DepthWise(16, 24, groups=48)
        self.conv_4 = nn.Sequential(*(DepthWise(24, 24, True, (1, 1), 48) for _ in range(2)))
        self.conv_6_sep = ConvBlock(24, 64)
        self.conv_6_dw = ConvBlock(64, 64, (6, 6), groups=64, linear=True)
        self.conv_6_flatten = Flatten()
        self.linear = nn.Linear(64, embedding_size, bias=False)
        self.bn = nn.BatchNorm1d(embedding_size)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return l2_norm(x)


class CosineMargin(nn.Module):
    """Am_softmax of the same file: a mask by scatter, indexing by it."""

    def __init__(self, embedding_size=24, classnum=10, m=0.35, s=30.0):
        super().__init__()
        self.kernel = nn.Parameter(torch.Tensor(embedding_size, classnum))
        self.kernel.data.uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)
        self.m, self.s = m, s

    def forward(self, embbedings, label):
        kernel_norm = l2_norm(self.kernel, axis=0)
        cos_theta = torch.mm(embbedings, kernel_norm)
        cos_theta = cos_theta.clamp(-1, 1)
        phi = cos_theta - self.m
        label = label.view(-1, 1)
        index = cos_theta.data * 0.0
        index.scatter_(1, label.data.view(-1, 1), 1)
        index = index.byte().bool()
        output = cos_theta * 1.0
        output[index] = phi[index]
        output *= self.s
        return output


@model("faces", source="https://github.com/TreB1eN/InsightFace_Pytorch, model.py: MobileFaceNet and Am_softmax")
def mobilefacenet():
    return Trained(MobileFaceNet(), CosineMargin()), (normal(4, 3, 48, 48), integers(10, 4))


def conv_bn(inp, oup, stride=1, leaky=0, kernel=3):
    layers = [nn.Conv2d(inp, oup, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(oup)]
    return nn.Sequential(*layers, *([] if leaky is None else [nn.LeakyReLU(negative_slope=leaky, inplace=True)]))


class FPN(nn.Module):
    def __init__(self, in_channels_list, out_channels):
        super().__init__()
        self.output1 = conv_bn(in_channels_list[0], out_channels, leaky=0.1, kernel=1)
        self.output2 = conv_bn(in_channels_list[1], out_channels, leaky=0.1, kernel=1)
        self.output3 = conv_bn(in_channels_list[2], out_channels, leaky=0.1, kernel=1)
        self.merge1 = conv_bn(out_channels, out_channels, leaky=0.1)
        self.merge2 = conv_bn(out_channels, out_channels, leaky=0.1)

    def forward(self, input):
        input = list(input.values())
        output1 = self.output1(input[0])
        output2 = self.output2(input[1])
        output3 = self.output3(input[2])
        up3 = F.interpolate(output3, size=[output2.size(2), output2.size(3)], mode="nearest")
        output2 = output2 + up3
        output2 = self.merge2(output2)
        up2 = F.interpolate(output2, size=[output1.size(2), output1.size(3)], mode="nearest")
        output1 = output1 + up2
        output1 = self.merge1(output1)
        return [output1, output2, output3]


class SSH(nn.Module):
    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv3X3 = conv_bn(in_channel, out_channel // 2, leaky=None)
        self.conv5X5_1 = conv_bn(in_channel, out_channel // 4, leaky=0.1)
        self.conv5X5_2 = conv_bn(out_channel // 4, out_channel // 4, leaky=None)
        self.conv7X7_2 = conv_bn(out_channel // 4, out_channel // 4, leaky=0.1)
        self.conv7x7_3 = conv_bn(out_channel // 4, out_channel // 4, leaky=None)

    def forward(self, input):
        conv3X3 = self.conv3X3(input)
        conv5X5_1 = self.conv5X5_1(input)
        conv5X5 = self.conv5X5_2(conv5X5_1)
        conv7X7_2 = self.conv7X7_2(conv5X5_1)
        conv7X7 = self.conv7x7_3(conv7X7_2)
        out = torch.cat([conv3X3, conv5X5, conv7X7], dim=1)
        return F.relu(out)


class Head(nn.Module):
    def __init__(self, inchannels, width, num_anchors=2):
        super().__init__()
        self.width = width
        self.conv1x1 = nn.Conv2d(inchannels, num_anchors * width, kernel_size=(1, 1), stride=1, padding=0)

    def forward(self, x):
        out = self.conv1x1(x)
        out = out.permute(0, 2, 3, 1).contiguous()
        return out.view(out.shape[0], -1, self.width)


class RetinaFace(nn.Module):
    def __init__(self, out_channels=16):
        from torchvision.models._utils import IntermediateLayerGetter

        super().__init__()
        backbone = nn.Sequential()
        for name, i, o in (("stage1", 3, 8), ("stage2", 8, 16), ("stage3", 16, 24)):
            backbone.add_module(name, nn.Sequential(conv_bn(i, o, 2, 0.1), conv_bn(o, o, 1, 0.1)))
        backbone.add_module("avg", nn.AdaptiveAvgPool2d((1, 1)))
        self.body = IntermediateLayerGetter(backbone, {"stage1": 1, "stage2": 2, "stage3": 3})
        self.fpn = FPN([8, 16, 24], out_channels)
        self.ssh1, self.ssh2, self.ssh3 = (SSH(out_channels, out_channels) for _ in range(3))
        self.ClassHead, self.BboxHead, self.LandmarkHead = (
            nn.ModuleList(Head(out_channels, width) for _ in range(3)) for width in (2, 4, 10)
        )

    def forward(self, inputs):
        out = self.body(inputs)
        fpn = self.fpn(out)
        feature1 = self.ssh1(fpn[0])
        feature2 = self.ssh2(fpn[1])
        feature3 = self.ssh3(fpn[2])
        features = [feature1, feature2, feature3]
        bbox_regressions = torch.cat([self.BboxHead[i](feature) for i, feature in enumerate(features)], dim=1)
        classifications = torch.cat([self.ClassHead[i](feature) for i, feature in enumerate(features)], dim=1)
        ldm_regressions = torch.cat([self.LandmarkHead[i](feature) for i, feature in enumerate(features)], dim=1)
        if self.training:
            output = (bbox_regressions, classifications, ldm_regressions)
        else:
            output = (bbox_regressions, F.softmax(classifications, dim=-1), ldm_regressions)
        return output


@model("faces", source="https://github.com/biubug6/Pytorch_Retinaface, models/retinaface.py and models/net.py")
def retinaface():
    return RetinaFace(), (normal(4, 3, 50, 40),)


class BlazeBlock(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1):
        super().__init__()
        self.stride = stride
        self.channel_pad = out_channels - in_channels
        if stride == 2:
            self.max_pool = nn.MaxPool2d(kernel_size=stride, stride=stride)
            padding = 0
        else:
            padding = (kernel_size - 1) // 2
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.stride == 2:
            h = F.pad(x, (0, 2, 0, 2), "constant", 0)
            x = self.max_pool(x)
        else:
            h = x
        if self.channel_pad > 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.channel_pad), "constant", 0)
        return self.act(self.convs(h) + x)


class BlazeFace(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone1 = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=0, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            *(BlazeBlock(8, 12), BlazeBlock(12, 16, stride=2), BlazeBlock(16, 16), BlazeBlock(16, 20)),
        )
        self.backbone2 = nn.Sequential(BlazeBlock(20, 24, stride=2), BlazeBlock(24, 24), BlazeBlock(24, 24))
        self.classifier_8 = nn.Conv2d(20, 2, 1, bias=True)
        self.classifier_16 = nn.Conv2d(24, 6, 1, bias=True)
        self.regressor_8 = nn.Conv2d(20, 32, 1, bias=True)
        self.regressor_16 = nn.Conv2d(24, 96, 1, bias=True)

    def forward(self, x):
        x = F.pad(x, (1, 2, 1, 2), "constant", 0)
        b = x.shape[0]
        x = self.backbone1(x)
        h = self.backbone2(x)
        c1 = self.classifier_8(x)
        c1 = c1.permute(0, 2, 3, 1)
        c1 = c1.reshape(b, -1, 1)
        c2 = self.classifier_16(h)
        c2 = c2.permute(0, 2, 3, 1)
        c2 = c2.reshape(b, -1, 1)
        c = torch.cat((c1, c2), dim=1)
        r1 = self.regressor_8(x)
        r1 = r1.permute(0, 2, 3, 1)
        r1 = r1.reshape(b, -1, 16)
        r2 = self.regressor_16(h)
        r2 = r2.permute(0, 2, 3, 1)
        r2 = r2.reshape(b, -1, 16)
        r = torch.cat((r1, r2), dim=1)
        return [r, c]


@model("faces", source="https://github.com/hollance/BlazeFace-PyTorch, blazeface.py; with BatchNorm unfolded")
def blazeface():
    return BlazeFace(), (normal(4, 3, 32, 32),)


class InvertedResidual(nn.Module):
    def __init__(self, inp, oup, stride, use_res_connect, expand_ratio=6):
        super().__init__()
        self.use_res_connect = use_res_connect
        hidden = inp * expand_ratio
        self.conv = nn.Sequential(
            *(nn.Conv2d(inp, hidden, 1, 1, 0, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)),
            *(nn.Conv2d(hidden, oup, 1, 1, 0, bias=False), nn.BatchNorm2d(oup)),
        )

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


class PFLD(nn.Module):
    """Landmarks from three scales, and in training the pose of the head."""

    def __init__(self, width=12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.block3 = nn.Sequential(
            InvertedResidual(width, width, 2, False, 2), InvertedResidual(width, width, 1, True, 2)
        )
        self.conv4 = InvertedResidual(width, 2 * width, 2, False, 2)
        self.conv6 = InvertedResidual(2 * width, 8, 1, False, 2)
        self.conv7 = conv_bn(8, 16, 2, 0)
        self.conv8 = nn.Conv2d(16, 32, 3, 1, 0)
        self.avg_pool1 = nn.AvgPool2d(6)
        self.avg_pool2 = nn.AvgPool2d(3)
        self.fc = nn.Linear(8 + 16 + 32, 20)
        self.auxiliary = nn.Sequential(conv_bn(width, 16, 2, 0), conv_bn(16, 8, 1, 0), nn.AdaptiveMaxPool2d(1))
        self.pose = nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        out1 = self.block3(x)
        x = self.conv4(out1)
        x = self.conv6(x)
        x1 = self.avg_pool1(x)
        x1 = x1.view(x1.size(0), -1)
        x = self.conv7(x)
        x2 = self.avg_pool2(x)
        x2 = x2.view(x2.size(0), -1)
        x3 = self.relu(self.conv8(x))
        x3 = x3.view(x3.size(0), -1)
        multi_scale = torch.cat([x1, x2, x3], 1)
        landmarks = self.fc(multi_scale)
        if self.training:
            return self.pose(torch.flatten(self.auxiliary(out1), 1)), landmarks
        return landmarks


@model("faces", source="https://github.com/polarisZhao/PFLD-pytorch, models/pfld.py")
def pfld():
    return PFLD(), (normal(4, 3, 48, 48),)
