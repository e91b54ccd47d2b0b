"""Human pose: heat maps, stacked hourglasses, lifting to three dimensions."""
# ruff: noqa: RUF059, SIM108  (as the sources have it)

import math

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "pose"
BN_MOMENTUM = 0.1


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class PoseResNet(nn.Module):
    """Deconvolutions, heat maps; the integral of each for coordinates."""

    def __init__(self, joints=5):
        super().__init__()
        self.inplanes = 6
        self.conv1 = nn.Conv2d(3, 6, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(6, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(4, 1)
        self.layer2 = self._make_layer(6, 1, stride=2)
        self.deconv_layers = self._make_deconv_layer(2, [8, 8], [4, 4])
        self.final_layer = nn.Conv2d(8, joints, kernel_size=1)

    def _make_layer(self, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes * Bottleneck.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * Bottleneck.expansion, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * Bottleneck.expansion, momentum=BN_MOMENTUM),
            )
        layers = [Bottleneck(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * Bottleneck.expansion
        for _ in range(1, blocks):
            layers.append(Bottleneck(self.inplanes, planes))
        return nn.Sequential(*layers)

    def _make_deconv_layer(self, num_layers, num_filters, num_kernels):
        layers = []
        for i in range(num_layers):
            layers.append(nn.ConvTranspose2d(self.inplanes, num_filters[i], num_kernels[i], 2, 1, 0, bias=False))
            layers.append(nn.BatchNorm2d(num_filters[i], momentum=BN_MOMENTUM))
            layers.append(nn.ReLU(inplace=True))
            self.inplanes = num_filters[i]
        return nn.Sequential(*layers)

    def soft_argmax(self, heatmaps):
        n, j, h, w = heatmaps.shape
        heatmaps = heatmaps.reshape((-1, j, h * w))
        heatmaps = F.softmax(heatmaps, 2)
        heatmaps = heatmaps.reshape((-1, j, h, w))
        accu_x = heatmaps.sum(dim=2) * torch.arange(w).to(heatmaps)
        accu_y = heatmaps.sum(dim=3) * torch.arange(h).to(heatmaps)
        return torch.cat((accu_x.sum(dim=2, keepdim=True), accu_y.sum(dim=2, keepdim=True)), dim=2)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.deconv_layers(x)
        x = self.final_layer(x)
        return x, self.soft_argmax(x)


@model(FIELD, source="https://github.com/microsoft/human-pose-estimation.pytorch, lib/models/pose_resnet.py")
def simple_baseline():
    return PoseResNet(), (normal(2, 3, 32, 32),)


class PreActBottleneck(nn.Module):
    expansion = 2

    def __init__(self, inplanes, planes):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=True)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=True)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 2, kernel_size=1, bias=True)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        residual = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        out += residual
        return out


class Hourglass(nn.Module):
    def __init__(self, block, num_blocks, planes, depth):
        super().__init__()
        self.depth = depth
        self.block = block
        self.hg = self._make_hour_glass(block, num_blocks, planes, depth)

    def _make_residual(self, block, num_blocks, planes):
        return nn.Sequential(*[block(planes * block.expansion, planes) for _ in range(num_blocks)])

    def _make_hour_glass(self, block, num_blocks, planes, depth):
        hg = []
        for i in range(depth):
            res = [self._make_residual(block, num_blocks, planes) for _ in range(3)]
            if i == 0:
                res.append(self._make_residual(block, num_blocks, planes))
            hg.append(nn.ModuleList(res))
        return nn.ModuleList(hg)

    def _hour_glass_forward(self, n, x):
        up1 = self.hg[n - 1][0](x)
        low1 = F.max_pool2d(x, 2, stride=2)
        low1 = self.hg[n - 1][1](low1)
        if n > 1:
            low2 = self._hour_glass_forward(n - 1, low1)
        else:
            low2 = self.hg[n - 1][3](low1)
        low3 = self.hg[n - 1][2](low2)
        up2 = F.interpolate(low3, scale_factor=2)
        return up1 + up2

    def forward(self, x):
        return self._hour_glass_forward(self.depth, x)


class HourglassNet(nn.Module):
    def __init__(self, block=PreActBottleneck, num_stacks=2, num_feats=4, num_classes=5):
        super().__init__()
        self.num_stacks = num_stacks
        ch = num_feats * block.expansion
        self.stem = nn.Sequential(nn.Conv2d(3, ch, 7, 2, 3), nn.BatchNorm2d(ch), nn.ReLU(True), block(ch, num_feats))
        hg, res, fc, score, fc_, score_ = [], [], [], [], [], []
        for i in range(num_stacks):
            hg.append(Hourglass(block, 1, num_feats, 2))
            res.append(block(ch, num_feats))
            fc.append(nn.Sequential(nn.Conv2d(ch, ch, kernel_size=1), nn.BatchNorm2d(ch), nn.ReLU(inplace=True)))
            score.append(nn.Conv2d(ch, num_classes, kernel_size=1))
            if i < num_stacks - 1:
                fc_.append(nn.Conv2d(ch, ch, kernel_size=1))
                score_.append(nn.Conv2d(num_classes, ch, kernel_size=1))
        self.hg, self.res, self.fc = nn.ModuleList(hg), nn.ModuleList(res), nn.ModuleList(fc)
        self.score, self.fc_, self.score_ = nn.ModuleList(score), nn.ModuleList(fc_), nn.ModuleList(score_)

    def forward(self, x):
        out = []
        x = self.stem(x)
        for i in range(self.num_stacks):
            y = self.hg[i](x)
            y = self.res[i](y)
            y = self.fc[i](y)
            score = self.score[i](y)
            out.append(score)
            if i < self.num_stacks - 1:
                x = x + self.fc_[i](y) + self.score_[i](score)
        return out


@model(FIELD, source="https://github.com/bearpaw/pytorch-pose, pose/models/hourglass.py (forward recursive)")
def stacked_hourglass():
    return HourglassNet(), (normal(2, 3, 32, 32),)


class HRNet(nn.Module):
    """Two stages, the second with a new resolution; strings for the fusing convolutions' None."""

    def __init__(self, joints=5):
        super().__init__()
        c = [4, 6, 8]
        self.conv1 = nn.Sequential(nn.Conv2d(3, c[0], 3, 2, 1, bias=False), nn.BatchNorm2d(c[0]), nn.ReLU(inplace=True))
        self.transition1 = self._transition([c[0]], c[:2])
        self.stage2 = self._module(c[:2])
        self.transition2 = self._transition(c[:2], c)
        self.stage3 = self._module(c)
        self.final_layer = nn.Conv2d(c[0], joints, 1)

    def _transition(self, pre, cur):
        layers = []
        for i in range(len(cur)):
            if i < len(pre):
                if cur[i] != pre[i]:
                    layers.append(nn.Sequential(nn.Conv2d(pre[i], cur[i], 3, 1, 1), nn.BatchNorm2d(cur[i]), nn.ReLU()))
                else:
                    layers.append(None)
            else:
                layers.append(
                    nn.Sequential(
                        nn.Conv2d(pre[-1], cur[i], 3, 2, 1, bias=False), nn.BatchNorm2d(cur[i]), nn.ReLU(inplace=True)
                    )
                )
        return nn.ModuleList(layers)

    def _module(self, c):
        branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(True)) for w in c
        )
        fuse = []
        for i in range(len(c)):
            row = []
            for j in range(len(c)):
                if j > i:
                    row.append(
                        nn.Sequential(
                            nn.Conv2d(c[j], c[i], 1, bias=False), nn.BatchNorm2d(c[i]),
                            nn.Upsample(scale_factor=2 ** (j - i), mode="nearest"),
                        )
                    )  # fmt: skip
                elif j == i:
                    row.append(None)
                else:
                    conv3x3s = []
                    for k in range(i - j):
                        out = c[i] if k == i - j - 1 else c[j]
                        conv3x3s += [nn.Conv2d(c[j], out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)]
                        if k != i - j - 1:
                            conv3x3s.append(nn.ReLU(True))
                    row.append(nn.Sequential(*conv3x3s))
            fuse.append(nn.ModuleList(row))
        return nn.ModuleDict({"branches": branches, "fuse": nn.ModuleList(fuse)})

    def _run(self, stage, x):
        for i, branch in enumerate(stage["branches"]):
            x[i] = branch(x[i])
        out = []
        for i, row in enumerate(stage["fuse"]):
            y = x[0] if i == 0 else row[0](x[0])
            for j in range(1, len(x)):
                y = y + x[j] if i == j else y + row[j](x[j])
            out.append(F.relu(y))
        return out

    def forward(self, x):
        x = self.conv1(x)
        x_list = [x if t is None else t(x) for t in self.transition1]
        y_list = self._run(self.stage2, x_list)
        x_list = []
        for i in range(3):
            if self.transition2[i] is not None:
                x_list.append(self.transition2[i](y_list[-1]))
            else:
                x_list.append(y_list[i])
        y_list = self._run(self.stage3, x_list)
        return self.final_layer(y_list[0])


@model(FIELD, source="https://github.com/leoxiaobin/deep-high-resolution-net.pytorch, lib/models/pose_hrnet.py")
def hrnet():
    return HRNet(), (normal(2, 3, 32, 32),)


class BlazeBlock(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=5, stride=1):
        super().__init__()
        self.stride = stride
        self.channel_pad = out_channels - in_channels
        if stride == 2:
            self.max_pool = nn.MaxPool2d(kernel_size=stride, stride=stride)
            padding = 0
        else:
            padding = (kernel_size - 1) // 2
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=True),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=1, padding=0, bias=True),
            nn.BatchNorm2d(out_channels),
        )
        self.act = nn.PReLU(out_channels)

    def forward(self, x):
        if self.stride == 2:
            h = F.pad(x, (1, 2, 1, 2), "constant", 0)
            x = self.max_pool(x)
        else:
            h = x
        if self.channel_pad > 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.channel_pad), "constant", 0)
        return self.act(self.convs(h) + x)


class BlazePose(nn.Module):
    def __init__(self, joints=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 0), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.a, self.b, self.c = BlazeBlock(6, 8), BlazeBlock(8, 10, stride=2), BlazeBlock(10, 12, stride=2)
        self.up_c, self.up_b = nn.Conv2d(12, 8, 1), nn.Conv2d(10, 8, 1)
        self.heat = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, joints, 1))
        self.reg = nn.Sequential(nn.Conv2d(12, 10, 4), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, joints * 4, 1))
        self.joints = joints

    def forward(self, x):
        x = F.pad(x, [1, 2, 1, 2], value=0)
        a = self.a(self.stem(x))
        b = self.b(a)
        c = self.c(b)
        y = self.up_b(b) + F.interpolate(self.up_c(c), scale_factor=2, mode="bilinear", align_corners=False)
        heat = self.heat(y)
        reg = self.reg(c).reshape(-1, self.joints, 4)
        visible = reg[..., 3:].sigmoid()
        return heat, torch.cat([reg[..., :3] / 32, visible], -1)


@model(FIELD, source="https://github.com/zmurez/MediaPipePyTorch, blazebase.py (BlazeBlock) and blazepose.py's heads")
def blazepose():
    return BlazePose(), (normal(2, 3, 32, 32),)


class TemporalModelBase(nn.Module):
    def __init__(self, num_joints_in, in_features, num_joints_out, filter_widths, causal, dropout, channels):
        super().__init__()
        for fw in filter_widths:
            assert fw % 2 != 0, "Only odd filter widths are supported"
        self.num_joints_in = num_joints_in
        self.in_features = in_features
        self.num_joints_out = num_joints_out
        self.filter_widths = filter_widths
        self.drop = nn.Dropout(dropout)
        self.relu = nn.ReLU(inplace=True)
        self.pad = [filter_widths[0] // 2]
        self.expand_bn = nn.BatchNorm1d(channels, momentum=0.1)
        self.shrink = nn.Conv1d(channels, num_joints_out * 3, 1)

    def set_bn_momentum(self, momentum):
        self.expand_bn.momentum = momentum
        for bn in self.layers_bn:
            bn.momentum = momentum

    def forward(self, x):
        assert len(x.shape) == 4
        assert x.shape[-2] == self.num_joints_in
        assert x.shape[-1] == self.in_features
        sz = x.shape[:3]
        x = x.view(x.shape[0], x.shape[1], -1)
        x = x.permute(0, 2, 1)
        x = self._forward_blocks(x)
        x = x.permute(0, 2, 1)
        x = x.view(sz[0], -1, self.num_joints_out, 3)
        return x


class TemporalModel(TemporalModelBase):
    def __init__(
        self, num_joints_in, in_features, num_joints_out, filter_widths, causal=False, dropout=0.25, channels=12,
        dense=False,
    ):  # fmt: skip
        super().__init__(num_joints_in, in_features, num_joints_out, filter_widths, causal, dropout, channels)
        self.expand_conv = nn.Conv1d(num_joints_in * in_features, channels, filter_widths[0], bias=False)
        layers_conv, layers_bn = [], []
        self.causal_shift = [(filter_widths[0]) // 2 if causal else 0]
        next_dilation = filter_widths[0]
        for i in range(1, len(filter_widths)):
            self.pad.append((filter_widths[i] - 1) * next_dilation // 2)
            self.causal_shift.append((filter_widths[i] // 2 * next_dilation) if causal else 0)
            layers_conv.append(
                nn.Conv1d(
                    channels,
                    channels,
                    filter_widths[i] if not dense else (2 * self.pad[-1] + 1),
                    dilation=next_dilation if not dense else 1,
                    bias=False,
                )
            )
            layers_bn.append(nn.BatchNorm1d(channels, momentum=0.1))
            layers_conv.append(nn.Conv1d(channels, channels, 1, dilation=1, bias=False))
            layers_bn.append(nn.BatchNorm1d(channels, momentum=0.1))
            next_dilation *= filter_widths[i]
        self.layers_conv = nn.ModuleList(layers_conv)
        self.layers_bn = nn.ModuleList(layers_bn)

    def _forward_blocks(self, x):
        x = self.drop(self.relu(self.expand_bn(self.expand_conv(x))))
        for i in range(len(self.pad) - 1):
            pad = self.pad[i + 1]
            shift = self.causal_shift[i + 1]
            res = x[:, :, pad + shift : x.shape[2] - pad + shift]
            x = self.drop(self.relu(self.layers_bn[2 * i](self.layers_conv[2 * i](x))))
            x = res + self.drop(self.relu(self.layers_bn[2 * i + 1](self.layers_conv[2 * i + 1](x))))
        x = self.shrink(x)
        return x


@model(FIELD, source="https://github.com/facebookresearch/VideoPose3D, common/model.py (TemporalModel)")
def videopose3d():
    net = TemporalModel(5, 2, 5, [3, 3, 3], causal=True)
    net.set_bn_momentum(0.05)
    return net, (normal(2, 30, 5, 2),)


class MartinezBlock(nn.Module):
    def __init__(self, linear_size, p_dropout=0.5):
        super().__init__()
        self.l_size = linear_size
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(p_dropout)
        self.w1, self.w2 = nn.Linear(linear_size, linear_size), nn.Linear(linear_size, linear_size)
        self.batch_norm1, self.batch_norm2 = nn.BatchNorm1d(linear_size), nn.BatchNorm1d(linear_size)

    def forward(self, x):
        y = self.dropout(self.relu(self.batch_norm1(self.w1(x))))
        y = self.dropout(self.relu(self.batch_norm2(self.w2(y))))
        return x + y


class Martinez(nn.Module):
    def __init__(self, linear_size=16, num_stage=2, p_dropout=0.5, joints=5, max_norm=True):
        super().__init__()
        self.w1 = nn.Linear(joints * 2, linear_size)
        self.batch_norm1 = nn.BatchNorm1d(linear_size)
        self.linear_stages = nn.ModuleList([MartinezBlock(linear_size, p_dropout) for _ in range(num_stage)])
        self.w2 = nn.Linear(linear_size, joints * 3)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(p_dropout)
        self.max_norm = max_norm
        self.parents = [-1, 0, 1, 0, 3]

    def forward(self, x):
        with torch.no_grad():  # the original renormalises after each step
            norms = self.w1.weight.norm(dim=1, keepdim=True)
        w1 = self.w1.weight * (1.0 / norms.clamp(min=1.0)) if self.max_norm else self.w1.weight
        y = F.linear(x.flatten(1), w1, self.w1.bias)
        y = self.dropout(self.relu(self.batch_norm1(y)))
        for stage in self.linear_stages:
            y = stage(y)
        pose = self.w2(y).view(-1, 5, 3)
        bones = torch.stack([pose[:, j] - pose[:, p] for j, p in enumerate(self.parents) if p >= 0], 1)
        return pose - pose[:, :1], torch.linalg.vector_norm(bones, dim=-1)


@model(FIELD, source="https://github.com/weigq/3d_pose_baseline_pytorch, src/model.py, with bones' lengths")
def martinez():
    return Martinez(), (normal(8, 5, 2),)


class GraphConv(nn.Module):
    """Semantic graph convolution: an adjacency learned on a mask."""

    def __init__(self, i, o, adj):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(size=(2, i, o)))
        nn.init.xavier_uniform_(self.W.data, gain=1.414)
        self.adj = adj
        self.m = self.adj > 0
        self.e = nn.Parameter(torch.zeros(1, int(self.m.sum())))
        nn.init.constant_(self.e.data, 1)
        self.bias = nn.Parameter(torch.zeros(o))
        self.bn = nn.BatchNorm1d(o)

    def forward(self, input):
        h0 = torch.matmul(input, self.W[0])
        h1 = torch.matmul(input, self.W[1])
        adj = -9e15 * torch.ones_like(self.adj).to(input)
        adj[self.m] = self.e.flatten()
        adj = F.softmax(adj, dim=1)
        M = torch.eye(adj.size(0), dtype=adj.dtype).to(input.device)
        output = torch.matmul(adj * M, h0) + torch.matmul(adj * (1 - M), h1) + self.bias.view(1, 1, -1)
        return F.relu(self.bn(output.transpose(1, 2)).transpose(1, 2))


@model(
    FIELD, source="https://github.com/garyzhao/SemGCN, models/sem_graph_conv.py (masked assignment into an adjacency)"
)
def sem_gcn():
    adj = torch.eye(5)
    for child, parent in ((1, 0), (2, 1), (3, 0), (4, 3)):
        adj[child, parent] = adj[parent, child] = 1
    return nn.Sequential(GraphConv(2, 8, adj), GraphConv(8, 8, adj), nn.Linear(8, 3)), (normal(6, 5, 2),)


class SixD(nn.Module):
    """Rotations from six numbers, a kinematic chain and a camera: SMPL-like regression."""

    def __init__(self, joints=4):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc1 = nn.Linear(16 + joints * 6 + 3, 16)
        self.decpose, self.deccam = nn.Linear(16, joints * 6), nn.Linear(16, 3)
        self.register_buffer("init_pose", torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(joints)[None])
        self.register_buffer("init_cam", torch.tensor([[0.9, 0.0, 0.0]]))
        self.register_buffer("offsets", torch.arange(3.0 * joints).view(joints, 3) / 10)
        self.parents = [-1, 0, 1, 1]
        self.joints = joints

    def rot6d(self, x):
        x = x.reshape(-1, 3, 2)
        a1, a2 = x[:, :, 0], x[:, :, 1]
        b1 = F.normalize(a1)
        b2 = F.normalize(a2 - torch.einsum("bi,bi->b", b1, a2).unsqueeze(-1) * b1)
        b3 = torch.cross(b1, b2, dim=1)
        return torch.stack((b1, b2, b3), dim=-1)

    def forward(self, x):
        xf = self.features(x)
        pred_pose = self.init_pose.expand(x.shape[0], -1)
        pred_cam = self.init_cam.expand(x.shape[0], -1)
        for _ in range(3):
            xc = torch.cat([xf, pred_pose, pred_cam], 1)
            xc = self.fc1(xc)
            pred_pose = self.decpose(xc) + pred_pose
            pred_cam = self.deccam(xc) + pred_cam
        rot = self.rot6d(pred_pose).view(-1, self.joints, 3, 3)
        transforms = F.pad(
            torch.cat([rot, self.offsets.expand(x.shape[0], -1, -1).unsqueeze(-1)], -1), [0, 0, 0, 1], value=0
        )
        transforms[..., 3, 3] = 1
        chain = [transforms[:, 0]]
        for i in range(1, self.joints):
            chain.append(torch.matmul(chain[self.parents[i]], transforms[:, i]))
        posed = torch.stack(chain, dim=1)[:, :, :3, 3]
        angle = torch.acos(((rot.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1 + 1e-6, 1 - 1e-6)) / math.pi
        return posed[..., :2] * pred_cam[:, None, :1] + pred_cam[:, None, 1:], angle


@model(
    FIELD,
    source="https://github.com/nkolot/SPIN, models/hmr.py, utils/geometry.py (rot6d_to_rotmat), smplx's lbs chain",
)
def hmr():
    return SixD(), (normal(8, 10),)
