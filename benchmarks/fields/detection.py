"""Detectors: backbones, necks and heads with BatchNorm, small."""
# ruff: noqa: B905  (as the sources have it)

import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "detection"


class BaseConv(nn.Module):
    def __init__(self, in_channels, out_channels, ksize, stride, groups=1, bias=False):
        super().__init__()
        pad = (ksize - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, ksize, stride, pad, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Focus(nn.Module):
    def __init__(self, in_channels, out_channels, ksize=1, stride=1):
        super().__init__()
        self.conv = BaseConv(in_channels * 4, out_channels, ksize, stride)

    def forward(self, x):
        patch_top_left = x[..., ::2, ::2]
        patch_top_right = x[..., ::2, 1::2]
        patch_bot_left = x[..., 1::2, ::2]
        patch_bot_right = x[..., 1::2, 1::2]
        x = torch.cat((patch_top_left, patch_bot_left, patch_top_right, patch_bot_right), dim=1)
        return self.conv(x)


class YOLOXHead(nn.Module):
    def __init__(self, num_classes, strides=(4, 8), in_channels=(8, 12), width=8):
        super().__init__()
        self.num_classes = num_classes
        self.decode_in_inference = True
        self.cls_convs = nn.ModuleList()
        self.reg_convs = nn.ModuleList()
        self.cls_preds = nn.ModuleList()
        self.reg_preds = nn.ModuleList()
        self.obj_preds = nn.ModuleList()
        self.stems = nn.ModuleList()
        for channels in in_channels:
            self.stems.append(BaseConv(channels, width, 1, 1))
            self.cls_convs.append(nn.Sequential(BaseConv(width, width, 3, 1)))
            self.reg_convs.append(nn.Sequential(BaseConv(width, width, 3, 1)))
            self.cls_preds.append(nn.Conv2d(width, num_classes, 1))
            self.reg_preds.append(nn.Conv2d(width, 4, 1))
            self.obj_preds.append(nn.Conv2d(width, 1, 1))
        self.strides = strides
        self.grids = [torch.zeros(1)] * len(in_channels)
        self.initialize_biases(1e-2)

    def initialize_biases(self, prior_prob):
        for conv in self.cls_preds:
            b = conv.bias.view(1, -1)
            b.data.fill_(-math.log((1 - prior_prob) / prior_prob))
            conv.bias = torch.nn.Parameter(b.view(-1), requires_grad=True)

    def forward(self, xin):
        outputs, x_shifts, y_shifts, expanded_strides = [], [], [], []
        for k, (cls_conv, reg_conv, stride_this_level, x) in enumerate(
            zip(self.cls_convs, self.reg_convs, self.strides, xin)
        ):
            x = self.stems[k](x)
            cls_feat = cls_conv(x)
            cls_output = self.cls_preds[k](cls_feat)
            reg_feat = reg_conv(x)
            reg_output = self.reg_preds[k](reg_feat)
            obj_output = self.obj_preds[k](reg_feat)
            if self.training:
                output = torch.cat([reg_output, obj_output, cls_output], 1)
                output, grid = self.get_output_and_grid(output, k, stride_this_level, xin[0].type())
                x_shifts.append(grid[:, :, 0])
                y_shifts.append(grid[:, :, 1])
                expanded_strides.append(torch.zeros(1, grid.shape[1]).fill_(stride_this_level).type_as(xin[0]))
            else:
                output = torch.cat([reg_output, obj_output.sigmoid(), cls_output.sigmoid()], 1)
            outputs.append(output)
        if self.training:
            return torch.cat(outputs, 1)
        self.hw = [x.shape[-2:] for x in outputs]
        # [batch, n_anchors_all, 85]
        outputs = torch.cat([x.flatten(start_dim=2) for x in outputs], dim=2).permute(0, 2, 1)
        return self.decode_outputs(outputs, dtype=xin[0].type())

    def get_output_and_grid(self, output, k, stride, dtype):
        grid = self.grids[k]
        batch_size = output.shape[0]
        n_ch = 5 + self.num_classes
        hsize, wsize = output.shape[-2:]
        if grid.shape[2:4] != output.shape[2:4]:
            yv, xv = torch.meshgrid([torch.arange(hsize), torch.arange(wsize)], indexing="ij")
            grid = torch.stack((xv, yv), 2).view(1, 1, hsize, wsize, 2).type(dtype)
            self.grids[k] = grid
        output = output.view(batch_size, 1, n_ch, hsize, wsize)
        output = output.permute(0, 1, 3, 4, 2).reshape(batch_size, hsize * wsize, -1)
        grid = grid.view(1, -1, 2)
        output[..., :2] = (output[..., :2] + grid) * stride
        output[..., 2:4] = torch.exp(output[..., 2:4]) * stride
        return output, grid

    def decode_outputs(self, outputs, dtype):
        grids, strides = [], []
        for (hsize, wsize), stride in zip(self.hw, self.strides):
            yv, xv = torch.meshgrid([torch.arange(hsize), torch.arange(wsize)], indexing="ij")
            grid = torch.stack((xv, yv), 2).view(1, -1, 2)
            grids.append(grid)
            shape = grid.shape[:2]
            strides.append(torch.full((*shape, 1), stride))
        grids = torch.cat(grids, dim=1).type(dtype)
        strides = torch.cat(strides, dim=1).type(dtype)
        return torch.cat(
            [(outputs[..., 0:2] + grids) * strides, torch.exp(outputs[..., 2:4]) * strides, outputs[..., 4:]], dim=-1
        )


class YOLOX(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Focus(3, 6, ksize=3)
        self.dark1 = BaseConv(6, 8, 3, 2)
        self.dark2 = BaseConv(8, 12, 3, 2)
        self.head = YOLOXHead(3)

    def forward(self, x):
        a = self.dark1(self.stem(x))
        return self.head([a, self.dark2(a)])


@model(FIELD, source="https://github.com/Megvii-BaseDetection/YOLOX, yolox/models/yolo_head.py (grids kept in a list)")
def yolox():
    return YOLOX(), (normal(2, 3, 32, 32),)


class CenterNet(nn.Module):
    def __init__(self, heads=(("hm", 3), ("wh", 2), ("reg", 2))):
        super().__init__()
        self.inplanes = 12
        self.deconv_with_bias = False
        self.heads = dict(heads)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8, momentum=0.1), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.deconv_layers = self._make_deconv_layer(2, [10, 8], [4, 4])
        for head in sorted(self.heads):
            num_output = self.heads[head]
            fc = nn.Sequential(
                nn.Conv2d(8, 8, kernel_size=3, padding=1, bias=True),
                nn.ReLU(inplace=True),
                nn.Conv2d(8, num_output, kernel_size=1, stride=1, padding=0),
            )
            self.__setattr__(head, fc)

    def _make_deconv_layer(self, num_layers, num_filters, num_kernels):
        layers = []
        for i in range(num_layers):
            planes = num_filters[i]
            layers.append(nn.ConvTranspose2d(self.inplanes, planes, num_kernels[i], 2, 1, 0, bias=False))
            layers.append(nn.BatchNorm2d(planes, momentum=0.1))
            layers.append(nn.ReLU(inplace=True))
            self.inplanes = planes
        return nn.Sequential(*layers)

    def decode(self, heat, wh, reg, K=4):
        batch, cat, height, width = heat.size()
        hmax = F.max_pool2d(heat, (3, 3), stride=1, padding=1)
        keep = (hmax == heat).to(heat.dtype)
        heat = heat * keep
        topk_scores, topk_inds = torch.topk(heat.view(batch, cat, -1), K)
        topk_inds = topk_inds % (height * width)
        topk_ys = (topk_inds / width).int().to(heat.dtype)
        topk_xs = (topk_inds % width).int().to(heat.dtype)
        topk_score, topk_ind = torch.topk(topk_scores.view(batch, -1), K)
        topk_clses = torch.div(topk_ind, K, rounding_mode="trunc").int()
        inds = topk_inds.view(batch, -1).gather(1, topk_ind)
        ys = topk_ys.view(batch, -1).gather(1, topk_ind)
        xs = topk_xs.view(batch, -1).gather(1, topk_ind)

        def gather_feat(feat):
            feat = feat.permute(0, 2, 3, 1).contiguous()
            feat = feat.view(feat.size(0), -1, feat.size(3))
            ind = inds.unsqueeze(2).expand(inds.size(0), inds.size(1), feat.size(2))
            return feat.gather(1, ind)

        reg = gather_feat(reg)
        xs = xs.view(batch, K, 1) + reg[:, :, 0:1]
        ys = ys.view(batch, K, 1) + reg[:, :, 1:2]
        wh = gather_feat(wh)
        bboxes = torch.cat(
            [xs - wh[..., 0:1] / 2, ys - wh[..., 1:2] / 2, xs + wh[..., 0:1] / 2, ys + wh[..., 1:2] / 2], dim=2
        )
        return torch.cat([bboxes, topk_score.unsqueeze(2), topk_clses.to(heat.dtype).view(batch, K, 1)], dim=2)

    def forward(self, x):
        x = self.deconv_layers(self.backbone(x))
        ret = {}
        for head in self.heads:
            ret[head] = self.__getattr__(head)(x)
        ret["hm"] = ret["hm"].sigmoid_().clamp(min=1e-4, max=1 - 1e-4)
        if not self.training:
            ret["detections"] = self.decode(ret["hm"], ret["wh"], ret["reg"])
        return ret


@model(
    FIELD, source="https://github.com/xingyizhou/CenterNet, networks/msra_resnet.py and models/decode.py (ctdet_decode)"
)
def centernet():
    return CenterNet(), (normal(2, 3, 32, 32),)


class Scale(nn.Module):
    def __init__(self, init_value=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.FloatTensor([init_value]))

    def forward(self, input):
        return input * self.scale


class FCOS(nn.Module):
    """FPN with BatchNorm, one head over all levels, locations, centreness, and the decoded boxes."""

    def __init__(self, num_classes=3, width=8):
        super().__init__()
        self.c3 = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.c4 = nn.Sequential(nn.Conv2d(8, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU())
        self.lateral3, self.lateral4 = nn.Conv2d(8, width, 1), nn.Conv2d(10, width, 1)
        self.p6 = nn.Conv2d(width, width, 3, 2, 1)
        cls_tower, bbox_tower = [], []
        for _ in range(2):
            cls_tower += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
            bbox_tower += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        self.add_module("cls_tower", nn.Sequential(*cls_tower))
        self.add_module("bbox_tower", nn.Sequential(*bbox_tower))
        self.cls_logits = nn.Conv2d(width, num_classes, 3, 1, 1)
        self.bbox_pred = nn.Conv2d(width, 4, 3, 1, 1)
        self.centerness = nn.Conv2d(width, 1, 3, 1, 1)
        self.scales = nn.ModuleList([Scale(init_value=1.0) for _ in range(3)])
        self.fpn_strides = [4, 8, 16]
        self.norm_reg_targets = True

    def compute_locations(self, feature, stride):
        h, w = feature.size()[-2:]
        shifts_x = torch.arange(0, w * stride, step=stride, dtype=torch.float32, device=feature.device)
        shifts_y = torch.arange(0, h * stride, step=stride, dtype=torch.float32, device=feature.device)
        shift_y, shift_x = torch.meshgrid(shifts_y, shifts_x, indexing="ij")
        shift_x = shift_x.reshape(-1)
        shift_y = shift_y.reshape(-1)
        return torch.stack((shift_x, shift_y), dim=1) + stride // 2

    def forward(self, x):
        c3 = self.c3(x)
        c4 = self.c4(c3)
        p4 = self.lateral4(c4)
        p3 = self.lateral3(c3) + F.interpolate(p4, scale_factor=2, mode="nearest")
        features = [p3, p4, self.p6(F.relu(p4))]
        logits, bbox_reg, centerness = [], [], []
        for l, feature in enumerate(features):
            cls_tower = self.cls_tower(feature)
            box_tower = self.bbox_tower(feature)
            logits.append(self.cls_logits(cls_tower))
            centerness.append(self.centerness(box_tower))
            bbox_pred = self.scales[l](self.bbox_pred(box_tower))
            if self.norm_reg_targets:
                bbox_pred = F.relu(bbox_pred)
                if self.training:
                    bbox_reg.append(bbox_pred)
                else:
                    bbox_reg.append(bbox_pred * self.fpn_strides[l])
            else:
                bbox_reg.append(torch.exp(bbox_pred))
        boxes = []
        for l, (reg, feature) in enumerate(zip(bbox_reg, features)):
            locations = self.compute_locations(feature, self.fpn_strides[l])
            reg = reg.permute(0, 2, 3, 1).reshape(reg.shape[0], -1, 4)
            boxes.append(
                torch.stack(
                    [
                        locations[:, 0] - reg[..., 0],
                        locations[:, 1] - reg[..., 1],
                        locations[:, 0] + reg[..., 2],
                        locations[:, 1] + reg[..., 3],
                    ],
                    dim=-1,
                )
            )
        return logits, centerness, torch.cat(boxes, 1)


@model(FIELD, source="https://github.com/tianzhi0549/FCOS, fcos_core/modeling/rpn/fcos/fcos.py, with BatchNorm towers")
def fcos():
    return FCOS(), (normal(2, 3, 32, 32),)


def depthwise(inp, oup, stride=1):
    return nn.Sequential(
        OrderedDict(
            dw=nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False), bn1=nn.BatchNorm2d(inp), act1=nn.ReLU6(True),
            pw=nn.Conv2d(inp, oup, 1, bias=False), bn2=nn.BatchNorm2d(oup), act2=nn.ReLU6(True),
        )
    )  # fmt: skip


class SSDLite(nn.Module):
    def __init__(self, num_classes=4, is_test=False):
        super().__init__()
        self.num_classes = num_classes
        self.base_net = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(True)),
                depthwise(6, 8),
                depthwise(8, 10, 2),
                depthwise(10, 10),
            ]
        )
        self.source_layer_indexes = [2, (4, "pw")]
        self.extras = nn.ModuleList([depthwise(10, 8, 2), depthwise(8, 8, 2)])
        widths = [8, 10, 8, 8]
        self.classification_headers = nn.ModuleList(
            [nn.Sequential(depthwise(w, w), nn.Conv2d(w, 2 * num_classes, 1)) for w in widths]
        )
        self.regression_headers = nn.ModuleList(
            [nn.Sequential(depthwise(w, w), nn.Conv2d(w, 2 * 4, 1)) for w in widths]
        )
        sizes = [16, 8, 4, 2]
        centers = []
        for s in sizes:
            grid = (torch.arange(s) + 0.5) / s
            y, x = torch.meshgrid(grid, grid, indexing="ij")
            for scale in (1.0, 1.6):
                centers.append(torch.stack([x, y, torch.full_like(x, scale / s), torch.full_like(x, scale / s)], -1))
        self.priors = torch.cat(
            [torch.stack(centers[i : i + 2], 2).reshape(-1, 4) for i in range(0, len(centers), 2)]
        ).unsqueeze(0)
        self.center_variance, self.size_variance = 0.1, 0.2

    def forward(self, x):
        confidences, locations = [], []
        start_layer_index, header_index = 0, 0
        for end_layer_index in self.source_layer_indexes:
            if isinstance(end_layer_index, tuple):
                end_layer_index = end_layer_index[0]
            for layer in self.base_net[start_layer_index:end_layer_index]:
                x = layer(x)
            start_layer_index = end_layer_index
            confidence, location = self.compute_header(header_index, x)
            header_index += 1
            confidences.append(confidence)
            locations.append(location)
        for layer in self.base_net[end_layer_index:]:
            x = layer(x)
        for layer in self.extras:
            x = layer(x)
            confidence, location = self.compute_header(header_index, x)
            header_index += 1
            confidences.append(confidence)
            locations.append(location)
        confidences = torch.cat(confidences, 1)
        locations = torch.cat(locations, 1)
        if self.training:
            return confidences, locations
        confidences = F.softmax(confidences, dim=2)
        priors = self.priors.to(locations)
        boxes = torch.cat(
            [
                locations[..., :2] * self.center_variance * priors[..., 2:] + priors[..., :2],
                torch.exp(locations[..., 2:] * self.size_variance) * priors[..., 2:],
            ],
            dim=locations.dim() - 1,
        )
        return confidences, boxes

    def compute_header(self, i, x):
        confidence = self.classification_headers[i](x)
        confidence = confidence.permute(0, 2, 3, 1).contiguous()
        confidence = confidence.view(confidence.size(0), -1, self.num_classes)
        location = self.regression_headers[i](x)
        location = location.permute(0, 2, 3, 1).contiguous()
        location = location.view(location.size(0), -1, 4)
        return confidence, location


@model(FIELD, source="https://github.com/qfgaohao/pytorch-ssd, vision/ssd/ssd.py and mobilenetv1_ssd_lite.py")
def ssd_lite():
    return SSDLite(), (normal(2, 3, 32, 32),)


class Conv2dStaticSamePadding(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, bias=True, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, bias=bias, groups=groups)
        self.stride = self.conv.stride
        self.kernel_size = self.conv.kernel_size

    def forward(self, x):
        h, w = x.shape[-2:]
        extra_h = (math.ceil(w / self.stride[1]) - 1) * self.stride[1] - w + self.kernel_size[1]
        extra_v = (math.ceil(h / self.stride[0]) - 1) * self.stride[0] - h + self.kernel_size[0]
        left = extra_h // 2
        right = extra_h - left
        top = extra_v // 2
        bottom = extra_v - top
        x = F.pad(x, [left, right, top, bottom])
        return self.conv(x)


class SwishImplementation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, i):
        result = i * torch.sigmoid(i)
        ctx.save_for_backward(i)
        return result

    @staticmethod
    def backward(ctx, grad_output):
        i = ctx.saved_tensors[0]
        sigmoid_i = torch.sigmoid(i)
        return grad_output * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


class MemoryEfficientSwish(nn.Module):
    def forward(self, x):
        return SwishImplementation.apply(x)


class SeparableConvBlock(nn.Module):
    def __init__(self, in_channels, out_channels=None, norm=True, activation=False):
        super().__init__()
        if out_channels is None:
            out_channels = in_channels
        self.depthwise_conv = Conv2dStaticSamePadding(
            in_channels, in_channels, kernel_size=3, stride=1, groups=in_channels, bias=False
        )
        self.pointwise_conv = Conv2dStaticSamePadding(in_channels, out_channels, kernel_size=1, stride=1)
        self.norm = norm
        if self.norm:
            self.bn = nn.BatchNorm2d(num_features=out_channels, momentum=0.01, eps=1e-3)
        self.activation = activation
        if self.activation:
            self.swish = MemoryEfficientSwish()

    def forward(self, x):
        x = self.depthwise_conv(x)
        x = self.pointwise_conv(x)
        if self.norm:
            x = self.bn(x)
        if self.activation:
            x = self.swish(x)
        return x


class BiFPN(nn.Module):
    """Three levels with fast normalised weights."""

    def __init__(self, width=8, epsilon=1e-4):
        super().__init__()
        self.epsilon = epsilon
        self.conv4_up, self.conv3_up = SeparableConvBlock(width), SeparableConvBlock(width)
        self.conv4_down, self.conv5_down = SeparableConvBlock(width), SeparableConvBlock(width)
        self.downsample = nn.MaxPool2d(3, 2, 1)
        self.swish = MemoryEfficientSwish()
        self.p4_w1 = nn.Parameter(torch.ones(2, dtype=torch.float32), requires_grad=True)
        self.p4_w1_relu = nn.ReLU()
        self.p3_w1 = nn.Parameter(torch.ones(2, dtype=torch.float32), requires_grad=True)
        self.p3_w1_relu = nn.ReLU()
        self.p4_w2 = nn.Parameter(torch.ones(3, dtype=torch.float32), requires_grad=True)
        self.p4_w2_relu = nn.ReLU()
        self.p5_w2 = nn.Parameter(torch.ones(2, dtype=torch.float32), requires_grad=True)
        self.p5_w2_relu = nn.ReLU()

    def forward(self, inputs):
        p3_in, p4_in, p5_in = inputs
        p4_w1 = self.p4_w1_relu(self.p4_w1)
        weight = p4_w1 / (torch.sum(p4_w1, dim=0) + self.epsilon)
        p4_up = self.conv4_up(self.swish(weight[0] * p4_in + weight[1] * F.interpolate(p5_in, p4_in.shape[-2:])))
        p3_w1 = self.p3_w1_relu(self.p3_w1)
        weight = p3_w1 / (torch.sum(p3_w1, dim=0) + self.epsilon)
        p3_out = self.conv3_up(self.swish(weight[0] * p3_in + weight[1] * F.interpolate(p4_up, p3_in.shape[-2:])))
        p4_w2 = self.p4_w2_relu(self.p4_w2)
        weight = p4_w2 / (torch.sum(p4_w2, dim=0) + self.epsilon)
        p4_out = self.conv4_down(
            self.swish(weight[0] * p4_in + weight[1] * p4_up + weight[2] * self.downsample(p3_out))
        )
        p5_w2 = self.p5_w2_relu(self.p5_w2)
        weight = p5_w2 / (torch.sum(p5_w2, dim=0) + self.epsilon)
        p5_out = self.conv5_down(self.swish(weight[0] * p5_in + weight[1] * self.downsample(p4_out)))
        return p3_out, p4_out, p5_out


class EfficientDet(nn.Module):
    """BiFPN cells and a classifier whose convolutions are shared by levels, its BatchNorms not."""

    def __init__(self, width=8, anchors=3, classes=4):
        super().__init__()
        self.num_classes = classes
        self.stem = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU())
            for a, b in ((3, width), (width, width), (width, width))
        )
        self.bifpn = nn.Sequential(*[BiFPN(width) for _ in range(2)])
        self.conv_list = nn.ModuleList([SeparableConvBlock(width, width, norm=False) for _ in range(2)])
        self.bn_list = nn.ModuleList(
            [nn.ModuleList([nn.BatchNorm2d(width, momentum=0.01, eps=1e-3) for _ in range(2)]) for _ in range(3)]
        )
        self.header = SeparableConvBlock(width, anchors * classes, norm=False)
        self.num_anchors = anchors
        self.swish = MemoryEfficientSwish()

    def forward(self, x):
        inputs = []
        for stage in self.stem:
            x = stage(x)
            inputs.append(x)
        feats = []
        for feat, bn_list in zip(self.bifpn(inputs), self.bn_list):
            for _i, bn, conv in zip(range(2), bn_list, self.conv_list):
                feat = conv(feat)
                feat = bn(feat)
                feat = self.swish(feat)
            feat = self.header(feat)
            feat = feat.permute(0, 2, 3, 1)
            feat = feat.contiguous().view(*feat.shape[:3], self.num_anchors, self.num_classes)
            feat = feat.contiguous().view(feat.shape[0], -1, self.num_classes)
            feats.append(feat)
        feats = torch.cat(feats, dim=1)
        return feats.sigmoid()


@model(FIELD, source="https://github.com/zylo117/Yet-Another-EfficientDet-Pytorch, efficientdet/model.py")
def efficientdet():
    return EfficientDet(), (normal(2, 3, 32, 32),)


@model(
    FIELD,
    source="torchvision (package): ops.FeaturePyramidNetwork with BatchNorm and RetinaNet's heads, anchors and all",
)
def retinanet():
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

    class RetinaNet(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.c3 = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.c4 = nn.Sequential(nn.Conv2d(8, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU())
            self.fpn = FeaturePyramidNetwork(
                [8, 10], width, extra_blocks=LastLevelP6P7(width, width), norm_layer=nn.BatchNorm2d
            )
            self.anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0),) * 4)
            self.head = RetinaNetHead(width, 2, 3, norm_layer=nn.BatchNorm2d)

        def forward(self, x):
            c3 = self.c3(x)
            features = list(self.fpn(OrderedDict(p3=c3, p4=self.c4(c3))).values())
            found = self.head(features)
            anchors = torch.stack(self.anchors(ImageList(x, [x.shape[-2:]] * x.shape[0]), features))
            widths = anchors[..., 2] - anchors[..., 0]
            found["bbox"] = found.pop("bbox_regression") * widths[..., None] + anchors
            return found

    return RetinaNet(), (normal(2, 3, 32, 32),)


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        num_batches_tracked_key = prefix + "num_batches_tracked"
        if num_batches_tracked_key in state_dict:
            del state_dict[num_batches_tracked_key]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        eps = 1e-5
        scale = w * (rv + eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


class DETR(nn.Module):
    def __init__(self, hidden=8, queries=4, classes=3):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 6, 7, 2, 3, bias=False), FrozenBatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(6, 8, 3, 2, 1, bias=False), FrozenBatchNorm2d(8), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.input_proj = nn.Sequential(nn.Conv2d(8, hidden, 1), nn.BatchNorm2d(hidden))
        self.transformer = nn.Transformer(hidden, 2, 1, 1, 16, dropout=0.0)
        self.query_embed = nn.Embedding(queries, hidden)
        self.class_embed = nn.Linear(hidden, classes + 1)
        self.bbox_embed = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        for name, parameter in self.backbone.named_parameters():
            if name.startswith("0."):
                parameter.requires_grad_(False)

    def position(self, mask, num_pos_feats=4, temperature=10000):
        not_mask = ~mask
        y_embed = not_mask.cumsum(1, dtype=torch.float32)
        x_embed = not_mask.cumsum(2, dtype=torch.float32)
        eps = 1e-6
        y_embed = y_embed / (y_embed[:, -1:, :] + eps) * 2 * math.pi
        x_embed = x_embed / (x_embed[:, :, -1:] + eps) * 2 * math.pi
        dim_t = torch.arange(num_pos_feats, dtype=torch.float32, device=mask.device)
        dim_t = temperature ** (2 * torch.div(dim_t, 2, rounding_mode="floor") / num_pos_feats)
        pos_x = x_embed[:, :, :, None] / dim_t
        pos_y = y_embed[:, :, :, None] / dim_t
        pos_x = torch.stack((pos_x[:, :, :, 0::2].sin(), pos_x[:, :, :, 1::2].cos()), dim=4).flatten(3)
        pos_y = torch.stack((pos_y[:, :, :, 0::2].sin(), pos_y[:, :, :, 1::2].cos()), dim=4).flatten(3)
        return torch.cat((pos_y, pos_x), dim=3).permute(0, 3, 1, 2)

    def forward(self, x, mask):
        src = self.backbone(x)
        m = F.interpolate(mask[None].to(x.dtype), size=src.shape[-2:]).to(torch.bool)[0]
        pos = self.position(m).to(src.dtype).flatten(2).permute(2, 0, 1)
        src = self.input_proj(src).flatten(2).permute(2, 0, 1)
        query = self.query_embed.weight.unsqueeze(1).repeat(1, x.shape[0], 1)
        hs = self.transformer(
            src + pos, query, src_key_padding_mask=m.flatten(1), memory_key_padding_mask=m.flatten(1)
        ).transpose(0, 1)
        return {"pred_logits": self.class_embed(hs), "pred_boxes": self.bbox_embed(hs).sigmoid()}


@model(FIELD, source="https://github.com/facebookresearch/detr, models/backbone.py, position_encoding.py, detr.py")
def detr():
    mask = torch.zeros(2, 32, 32, dtype=torch.long)
    mask[1, :, 20:] = 1
    return DETR(), (normal(2, 3, 32, 32), mask)
