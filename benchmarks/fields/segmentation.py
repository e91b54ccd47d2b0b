"""Semantic segmentation: dilated backbones, pyramids, decoders, attention over regions."""
# ruff: noqa: B905  (as the sources have it)

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "segmentation"
IMAGES = (2, 3, 32, 32)


def conv_bn(i, o, k=3, s=1, p=None, d=1, groups=1, act=True):
    layers = [nn.Conv2d(i, o, k, s, d * (k // 2) if p is None else p, d, groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


@model(FIELD, source="segmentation-models-pytorch (package): DeepLabV3Plus, resnet18 of depth 3")
def smp_deeplab():
    import segmentation_models_pytorch as smp

    net = smp.DeepLabV3Plus("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=8, classes=3)
    return net, (normal(2, 3, 64, 64),)


@model(FIELD, source="segmentation-models-pytorch (package): MAnet, attention in the decoder")
def smp_manet():
    import segmentation_models_pytorch as smp

    net = smp.MAnet(
        "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 12, 8), decoder_pab_channels=8
    )
    return net, (normal(2, 3, 32, 32),)


@model(FIELD, source="segmentation-models-pytorch (package): UPerNet, pyramid pooling over a resnet18")
def smp_upernet():
    import segmentation_models_pytorch as smp

    net = smp.UPerNet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=16, classes=3)
    return net, (normal(2, 3, 64, 64),)


@model(FIELD, source="torchvision (package): deeplabv3.ASPP, fcn.FCNHead on a small backbone, auxiliary output")
def torchvision_deeplab():
    from torchvision.models.segmentation._utils import _SimpleSegmentationModel
    from torchvision.models.segmentation.deeplabv3 import ASPP
    from torchvision.models.segmentation.fcn import FCNHead

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv_bn(3, 8, s=2), conv_bn(8, 12, s=2, d=2)

        def forward(self, x):
            x = self.a(x)
            return {"aux": x, "out": self.b(x)}

    head = nn.Sequential(
        ASPP(12, [2, 4, 6], 8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    )
    return _SimpleSegmentationModel(Backbone(), head.append(nn.Conv2d(8, 3, 1)), FCNHead(8, 3)), (normal(*IMAGES),)


class PPM(nn.Module):
    def __init__(self, in_dim, reduction_dim, bins):
        super().__init__()
        self.features = nn.ModuleList()
        for bin in bins:
            self.features.append(
                nn.Sequential(
                    nn.AdaptiveAvgPool2d(bin),
                    nn.Conv2d(in_dim, reduction_dim, kernel_size=1, bias=False),
                    nn.BatchNorm2d(reduction_dim),
                    nn.ReLU(inplace=True),
                )
            )

    def forward(self, x):
        x_size = x.size()
        out = [x]
        for f in self.features:
            out.append(F.interpolate(f(x), x_size[2:], mode="bilinear", align_corners=True))
        return torch.cat(out, 1)


class PSPNet(nn.Module):
    def __init__(self, bins=(1, 2, 3, 6), classes=3):
        super().__init__()
        self.layer0 = nn.Sequential(conv_bn(3, 8, s=2), nn.MaxPool2d(3, 2, 1))
        self.layer3 = conv_bn(8, 8, d=2)
        self.layer4 = conv_bn(8, 8, d=4)
        self.ppm = PPM(8, 2, bins)
        self.cls = nn.Sequential(conv_bn(16, 8), nn.Dropout2d(p=0.1), nn.Conv2d(8, classes, kernel_size=1))
        self.aux = nn.Sequential(conv_bn(8, 8), nn.Dropout2d(p=0.1), nn.Conv2d(8, classes, kernel_size=1))

    def forward(self, x):
        x_size = x.size()
        assert (x_size[2] - 1) % 8 == 0 and (x_size[3] - 1) % 8 == 0
        h = int((x_size[2] - 1) / 8 * 8 + 1)
        w = int((x_size[3] - 1) / 8 * 8 + 1)
        x = self.layer0(x)
        x_tmp = self.layer3(x)
        x = self.layer4(x_tmp)
        x = self.ppm(x)
        x = self.cls(x)
        x = F.interpolate(x, size=(h, w), mode="bilinear", align_corners=True)
        if self.training:
            aux = self.aux(x_tmp)
            aux = F.interpolate(aux, size=(h, w), mode="bilinear", align_corners=True)
            return x, aux
        return x


@model(FIELD, source="https://github.com/hszhao/semseg, model/pspnet.py")
def pspnet():
    return PSPNet(), (normal(2, 3, 33, 33),)


class AttentionRefinementModule(nn.Module):
    def __init__(self, in_chan, out_chan):
        super().__init__()
        self.conv = conv_bn(in_chan, out_chan)
        self.conv_atten = nn.Conv2d(out_chan, out_chan, kernel_size=1, bias=False)
        self.bn_atten = nn.BatchNorm2d(out_chan)

    def forward(self, x):
        feat = self.conv(x)
        atten = torch.mean(feat, dim=(2, 3), keepdim=True)
        atten = self.conv_atten(atten)
        atten = self.bn_atten(atten)
        atten = atten.sigmoid()
        return torch.mul(feat, atten)


class BiSeNet(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.spatial = nn.Sequential(conv_bn(3, 6, 7, 2), conv_bn(6, 8, 3, 2), conv_bn(8, 8, 1))
        self.stem = nn.Sequential(conv_bn(3, 6, 3, 4), conv_bn(6, 8, 3, 2))
        self.deep = conv_bn(8, 12, 3, 2)
        self.arm16, self.arm32 = AttentionRefinementModule(8, 8), AttentionRefinementModule(12, 8)
        self.conv_head32, self.conv_head16 = conv_bn(8, 8), conv_bn(8, 8)
        self.conv_avg = conv_bn(12, 8, 1)
        self.up32, self.up16 = nn.Upsample(scale_factor=2.0), nn.Upsample(scale_factor=2.0)
        self.ffm = conv_bn(16, 8, 1)
        self.ffm_atten, self.ffm_bn = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv_out = nn.Sequential(
            conv_bn(8, 8), nn.Conv2d(8, n_classes * 16, 1), nn.PixelShuffle(4), nn.Upsample(scale_factor=1)
        )

    def forward(self, x):
        feat16 = self.stem(x)
        feat32 = self.deep(feat16)
        avg = torch.mean(feat32, dim=(2, 3), keepdim=True)
        avg = self.conv_avg(avg)
        feat32_arm = self.arm32(feat32)
        feat32_sum = feat32_arm + avg
        feat32_up = self.conv_head32(self.up32(feat32_sum))
        feat16_arm = self.arm16(feat16)
        feat16_sum = feat16_arm + feat32_up
        feat16_up = self.conv_head16(self.up16(feat16_sum))
        fcat = torch.cat([self.spatial(x), feat16_up], dim=1)
        feat = self.ffm(fcat)
        atten = torch.mean(feat, dim=(2, 3), keepdim=True)
        atten = self.ffm_bn(self.ffm_atten(atten)).sigmoid()
        feat_out = torch.mul(feat, atten) + feat
        out = self.conv_out(feat_out)
        return out if self.training else (out, out.argmax(dim=1).to(out.dtype))


@model(FIELD, source="https://github.com/CoinCheung/BiSeNet, lib/models/bisenetv1.py")
def bisenet():
    return BiSeNet(), (normal(4, 3, 32, 32),)


class BasicBlock(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.conv1 = conv_bn(planes, planes)
        self.conv2 = conv_bn(planes, planes, act=False)

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + x, inplace=True)


class HighResolutionModule(nn.Module):
    def __init__(self, channels=(6, 8, 10)):
        super().__init__()
        n = len(channels)
        self.num_branches = n
        self.branches = nn.ModuleList([BasicBlock(c) for c in channels])
        fuse = []
        for i in range(n):
            row = []
            for j in range(n):
                if j > i:
                    row.append(conv_bn(channels[j], channels[i], 1, act=False))
                elif j == i:
                    row.append(None)
                else:
                    steps = [conv_bn(channels[j], channels[j], s=2) for _ in range(i - j - 1)]
                    row.append(nn.Sequential(*steps, conv_bn(channels[j], channels[i], s=2, act=False)))
            fuse.append(nn.ModuleList(row))
        self.fuse_layers = nn.ModuleList(fuse)
        self.relu = nn.ReLU(inplace=False)

    def forward(self, x):
        for i in range(self.num_branches):
            x[i] = self.branches[i](x[i])
        x_fuse = []
        for i in range(len(self.fuse_layers)):
            y = x[0] if i == 0 else self.fuse_layers[i][0](x[0])
            for j in range(1, self.num_branches):
                if i == j:
                    y = y + x[j]
                elif j > i:
                    width_output = x[i].shape[-1]
                    height_output = x[i].shape[-2]
                    y = y + F.interpolate(
                        self.fuse_layers[i][j](x[j]), size=[height_output, width_output], mode="bilinear"
                    )
                else:
                    y = y + self.fuse_layers[i][j](x[j])
            x_fuse.append(self.relu(y))
        return x_fuse


class OCR(nn.Module):
    """Object-contextual representations over HRNet's streams."""

    def __init__(self, classes=3, mid=8, key=6):
        super().__init__()
        self.stem = conv_bn(3, 6, s=2)
        self.transition = nn.ModuleList(
            [conv_bn(6, 6), conv_bn(6, 8, s=2), nn.Sequential(conv_bn(6, 8, s=2), conv_bn(8, 10, s=2))]
        )
        self.stage = HighResolutionModule()
        self.aux_head = nn.Sequential(conv_bn(24, 24, 1), nn.Conv2d(24, classes, 1))
        self.conv3x3 = conv_bn(24, mid)
        self.f_pixel = nn.Sequential(conv_bn(mid, key, 1), conv_bn(key, key, 1))
        self.f_object = nn.Sequential(conv_bn(mid, key, 1), conv_bn(key, key, 1))
        self.f_down, self.f_up = conv_bn(mid, key, 1), conv_bn(key, mid, 1)
        self.conv_bn_dropout = nn.Sequential(conv_bn(2 * mid, mid, 1), nn.Dropout2d(0.05))
        self.cls_head = nn.Conv2d(mid, classes, 1)
        self.key_channels = key

    def forward(self, x):
        x = self.stem(x)
        x = self.stage([t(x) for t in self.transition])
        h, w = x[0].size(2), x[0].size(3)
        feats = torch.cat(
            [x[0], *[F.interpolate(y, size=(h, w), mode="bilinear", align_corners=True) for y in x[1:]]], 1
        )
        out_aux = self.aux_head(feats)
        feats = self.conv3x3(feats)
        # spatial gather
        batch_size, c = out_aux.size(0), out_aux.size(1)
        probs = F.softmax(out_aux.view(batch_size, c, -1), dim=2)
        f = feats.view(batch_size, feats.size(1), -1).permute(0, 2, 1)
        context = torch.matmul(probs, f).permute(0, 2, 1).unsqueeze(3)
        # object attention
        query = self.f_pixel(feats).view(batch_size, self.key_channels, -1).permute(0, 2, 1)
        key = self.f_object(context).view(batch_size, self.key_channels, -1)
        value = self.f_down(context).view(batch_size, self.key_channels, -1).permute(0, 2, 1)
        sim_map = torch.matmul(query, key)
        sim_map = (self.key_channels**-0.5) * sim_map
        sim_map = F.softmax(sim_map, dim=-1)
        context = torch.matmul(sim_map, value).permute(0, 2, 1).contiguous()
        context = context.view(batch_size, self.key_channels, *feats.size()[2:])
        feats = self.conv_bn_dropout(torch.cat([self.f_up(context), feats], 1))
        return [out_aux, self.cls_head(feats)]


@model(FIELD, source="https://github.com/HRNet/HRNet-Semantic-Segmentation (HRNet-OCR), lib/models/seg_hrnet_ocr.py")
def hrnet_ocr():
    return OCR(), (normal(2, 3, 32, 32),)


class DownsamplingBottleneck(nn.Module):
    def __init__(self, in_channels, out_channels, internal_ratio=2):
        super().__init__()
        internal = in_channels // internal_ratio
        self.main_max1 = nn.MaxPool2d(2, stride=2, return_indices=True)
        self.ext = nn.Sequential(
            nn.Conv2d(in_channels, internal, 2, 2, bias=False), nn.BatchNorm2d(internal), nn.PReLU(),
            nn.Conv2d(internal, internal, 3, 1, 1, bias=False), nn.BatchNorm2d(internal), nn.PReLU(),
            nn.Conv2d(internal, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.PReLU(),
        )  # fmt: skip
        self.out_activation = nn.PReLU()

    def forward(self, x):
        main, max_indices = self.main_max1(x)
        ext = self.ext(x)
        n, ch_ext, h, w = ext.size()
        ch_main = main.size()[1]
        padding = torch.zeros(n, ch_ext - ch_main, h, w)
        if main.is_cuda:
            padding = padding.cuda()
        main = torch.cat((main, padding.to(main)), 1)
        out = main + ext
        return self.out_activation(out), max_indices


class UpsamplingBottleneck(nn.Module):
    def __init__(self, in_channels, out_channels, internal_ratio=2):
        super().__init__()
        internal = in_channels // internal_ratio
        self.main_conv1 = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.main_unpool1 = nn.MaxUnpool2d(kernel_size=2)
        self.ext_conv1 = nn.Sequential(
            nn.Conv2d(in_channels, internal, 1, bias=False), nn.BatchNorm2d(internal), nn.ReLU()
        )
        self.ext_tconv1 = nn.ConvTranspose2d(internal, internal, kernel_size=2, stride=2, bias=False)
        self.ext_bn = nn.BatchNorm2d(internal)
        self.ext_conv2 = nn.Sequential(nn.Conv2d(internal, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.out_activation = nn.ReLU()

    def forward(self, x, max_indices, output_size):
        main = self.main_conv1(x)
        main = self.main_unpool1(main, max_indices, output_size=output_size)
        ext = self.ext_conv1(x)
        ext = self.ext_tconv1(ext, output_size=output_size)
        ext = F.relu(self.ext_bn(ext))
        ext = self.ext_conv2(ext)
        return self.out_activation(main + ext)


class ENet(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.main_branch = nn.Conv2d(3, 5, 3, 2, 1, bias=False)
        self.ext_branch = nn.MaxPool2d(3, stride=2, padding=1)
        self.initial_bn, self.initial_act = nn.BatchNorm2d(8), nn.PReLU(8)
        self.downsample1_0 = DownsamplingBottleneck(8, 12)
        self.asymmetric = nn.Sequential(
            nn.Conv2d(12, 12, (5, 1), padding=(2, 0), bias=False), nn.BatchNorm2d(12), nn.PReLU(),
            nn.Conv2d(12, 12, (1, 5), padding=(0, 2), bias=False), nn.BatchNorm2d(12), nn.PReLU(),
        )  # fmt: skip
        self.downsample2_0 = DownsamplingBottleneck(12, 16)
        self.upsample4_0 = UpsamplingBottleneck(16, 12)
        self.upsample5_0 = UpsamplingBottleneck(12, 8)
        self.transposed_conv = nn.ConvTranspose2d(8, num_classes, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        input_size = x.size()
        x = torch.cat((self.main_branch(x), self.ext_branch(x)), 1)
        x = self.initial_act(self.initial_bn(x))
        stage1_input_size = x.size()
        x, max_indices1_0 = self.downsample1_0(x)
        stage2_input_size = x.size()
        x = self.asymmetric(x)
        x, max_indices2_0 = self.downsample2_0(x)
        x = self.upsample4_0(x, max_indices2_0[:, :12], output_size=stage2_input_size)
        x = self.upsample5_0(x, max_indices1_0, output_size=stage1_input_size)
        return self.transposed_conv(x, output_size=input_size)


@model(FIELD, source="https://github.com/davidtvs/PyTorch-ENet, models/enet.py")
def enet():
    return ENet(), (normal(2, 3, 32, 32),)


class REBNCONV(nn.Module):
    def __init__(self, in_ch=3, out_ch=3, dirate=1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(in_ch, out_ch, 3, padding=1 * dirate, dilation=1 * dirate)
        self.bn_s1 = nn.BatchNorm2d(out_ch)
        self.relu_s1 = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu_s1(self.bn_s1(self.conv_s1(x)))


def _upsample_like(src, tar):
    return F.interpolate(src, size=tar.shape[2:], mode="bilinear")


class RSU4(nn.Module):
    def __init__(self, in_ch=3, mid_ch=4, out_ch=8):
        super().__init__()
        self.rebnconvin = REBNCONV(in_ch, out_ch, dirate=1)
        self.rebnconv1 = REBNCONV(out_ch, mid_ch, dirate=1)
        self.pool1 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.rebnconv2 = REBNCONV(mid_ch, mid_ch, dirate=1)
        self.pool2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.rebnconv3 = REBNCONV(mid_ch, mid_ch, dirate=1)
        self.rebnconv4 = REBNCONV(mid_ch, mid_ch, dirate=2)
        self.rebnconv3d = REBNCONV(mid_ch * 2, mid_ch, dirate=1)
        self.rebnconv2d = REBNCONV(mid_ch * 2, mid_ch, dirate=1)
        self.rebnconv1d = REBNCONV(mid_ch * 2, out_ch, dirate=1)

    def forward(self, x):
        hx = x
        hxin = self.rebnconvin(hx)
        hx1 = self.rebnconv1(hxin)
        hx = self.pool1(hx1)
        hx2 = self.rebnconv2(hx)
        hx = self.pool2(hx2)
        hx3 = self.rebnconv3(hx)
        hx4 = self.rebnconv4(hx3)
        hx3d = self.rebnconv3d(torch.cat((hx4, hx3), 1))
        hx3dup = _upsample_like(hx3d, hx2)
        hx2d = self.rebnconv2d(torch.cat((hx3dup, hx2), 1))
        hx2dup = _upsample_like(hx2d, hx1)
        hx1d = self.rebnconv1d(torch.cat((hx2dup, hx1), 1))
        return hx1d + hxin


class U2Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage1 = RSU4(3, 4, 8)
        self.pool12 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.stage2 = RSU4(8, 4, 8)
        self.stage1d = RSU4(16, 4, 8)
        self.side1, self.side2 = nn.Conv2d(8, 1, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.outconv = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        hx1 = self.stage1(x)
        hx2 = self.stage2(self.pool12(hx1))
        hx1d = self.stage1d(torch.cat((_upsample_like(hx2, hx1), hx1), 1))
        d1 = self.side1(hx1d)
        d2 = _upsample_like(self.side2(hx2), d1)
        d0 = self.outconv(torch.cat((d1, d2), 1))
        ma, mi = torch.max(d0.detach()), torch.min(d0.detach())
        return torch.sigmoid(d0), torch.sigmoid(d1), torch.sigmoid(d2), (d0 - mi) / (ma - mi)


@model(FIELD, source="https://github.com/xuebinqin/U-2-Net, model/u2net.py (RSU4, odd sizes)")
def u2net():
    return U2Net(), (normal(2, 3, 27, 27),)


class SegFormer(nn.Module):
    """Patch embeddings, attention with reduced keys, Mix-FFN; the head all-MLP with BatchNorm."""

    def __init__(self, dims=(8, 12), classes=3, emb=8):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Conv2d(3, dims[0], 7, 4, 3), nn.Conv2d(dims[0], dims[1], 3, 2, 1)])
        self.norms = nn.ModuleList([nn.LayerNorm(d) for d in dims])
        self.srs = nn.ModuleList([nn.Conv2d(dims[0], dims[0], 2, 2), nn.Identity()])
        self.attns = nn.ModuleList([nn.MultiheadAttention(d, 2, batch_first=True) for d in dims])
        self.ffns = nn.ModuleList(
            nn.ModuleList([nn.Linear(d, 2 * d), nn.Conv2d(2 * d, 2 * d, 3, 1, 1, groups=2 * d), nn.Linear(2 * d, d)])
            for d in dims
        )
        self.linear_c = nn.ModuleList([nn.Linear(d, emb) for d in dims])
        self.linear_fuse = conv_bn(emb * 2, emb, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.linear_pred = nn.Conv2d(emb, classes, kernel_size=1)

    def forward(self, x):
        B = x.shape[0]
        outs = []
        for embed, norm, sr, attn, (fc1, dw, fc2) in zip(self.embeds, self.norms, self.srs, self.attns, self.ffns):
            x = embed(x)
            _, C, H, W = x.shape
            tokens = norm(x.flatten(2).transpose(1, 2))
            reduced = sr(tokens.permute(0, 2, 1).reshape(B, C, H, W)).reshape(B, C, -1).permute(0, 2, 1)
            tokens = tokens + attn(tokens, reduced, reduced, need_weights=False)[0]
            y = fc1(tokens)
            y = dw(y.transpose(1, 2).view(B, -1, H, W)).flatten(2).transpose(1, 2)
            tokens = tokens + fc2(F.gelu(y))
            x = tokens.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous()
            outs.append(x)
        size = outs[0].size()[2:]
        c = []
        for linear, o in zip(self.linear_c, outs):
            y = linear(o.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(B, -1, o.shape[2], o.shape[3])
            c.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat(c[::-1], dim=1))))


@model(
    FIELD, source="https://github.com/NVlabs/SegFormer, mmseg/models/decode_heads/segformer_head.py, mix_transformer.py"
)
def segformer():
    return SegFormer(), (normal(2, 3, 32, 32),)


class PointRend(nn.Module):
    """A coarse prediction, refined at its least certain points."""

    def __init__(self, classes=3, points=12):
        super().__init__()
        self.fine, self.deep = conv_bn(3, 8, s=2), nn.Sequential(conv_bn(8, 10, s=2), conv_bn(10, 10))
        self.classifier = nn.Conv2d(10, classes, 1)
        self.mlp = nn.Sequential(nn.Conv1d(8 + classes, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, classes, 1))
        self.points = points

    def point_sample(self, input, point_coords, **kwargs):
        add_dim = False
        if point_coords.dim() == 3:
            add_dim = True
            point_coords = point_coords.unsqueeze(2)
        output = F.grid_sample(input, 2.0 * point_coords - 1.0, **kwargs)
        if add_dim:
            output = output.squeeze(3)
        return output

    def forward(self, x):
        res2 = self.fine(x)
        coarse = self.classifier(self.deep(res2))
        up = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        top2 = torch.topk(up, k=2, dim=1)[0]
        uncertainty = (top2[:, 1] - top2[:, 0]).unsqueeze(1)
        R, _, H, W = uncertainty.shape
        h_step, w_step = 1.0 / float(H), 1.0 / float(W)
        idx = torch.topk(uncertainty.view(R, H * W), k=self.points, dim=1)[1]
        point_coords = torch.zeros(R, self.points, 2, dtype=x.dtype, device=x.device)
        point_coords[:, :, 0] = w_step / 2.0 + (idx % W).to(x.dtype) * w_step
        point_coords[:, :, 1] = h_step / 2.0 + (idx // W).to(x.dtype) * h_step
        coarse_p = self.point_sample(coarse, point_coords, align_corners=False)
        fine_p = self.point_sample(res2, point_coords, align_corners=False)
        logits = self.mlp(torch.cat([coarse_p, fine_p], dim=1))
        idx = idx.unsqueeze(1).expand(-1, up.size(1), -1)
        return up.reshape(R, -1, H * W).scatter_(2, idx, logits).view(R, -1, H, W)


@model(
    FIELD, source="https://github.com/facebookresearch/detectron2, projects/PointRend/point_rend (point_features.py)"
)
def point_rend():
    return PointRend(), (normal(2, 3, 32, 32),)
