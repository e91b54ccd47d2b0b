"""Restoration of images: denoising, super-resolution, colours, holes, and their discriminators."""
# ruff: noqa: F841  (as the sources have it)

import math

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "restoration"


class DnCNN(nn.Module):
    def __init__(self, depth=5, n_channels=8, image_channels=1, kernel_size=3):
        super().__init__()
        padding = 1
        layers = []
        layers.append(nn.Conv2d(image_channels, n_channels, kernel_size=kernel_size, padding=padding, bias=True))
        layers.append(nn.ReLU(inplace=True))
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(n_channels, n_channels, kernel_size=kernel_size, padding=padding, bias=False))
            layers.append(nn.BatchNorm2d(n_channels, eps=0.0001, momentum=0.95))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(n_channels, image_channels, kernel_size=kernel_size, padding=padding, bias=False))
        self.dncnn = nn.Sequential(*layers)
        self._initialize_weights()

    def _initialize_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.orthogonal_(m.weight)

    def forward(self, x):
        y = x
        out = self.dncnn(x)
        return y - out


@model(
    FIELD,
    source="https://github.com/SaoYan/DnCNN-PyTorch and https://github.com/cszn/DnCNN, TrainingCodes/dncnn_pytorch",
)
def dncnn():
    return DnCNN(), (normal(4, 1, 16, 16),)


class SRBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1 = nn.Conv2d(n, n, kernel_size=3, stride=1, padding=1, bias=False)
        self.in1 = nn.BatchNorm2d(n)
        self.relu = nn.PReLU()
        self.conv2 = nn.Conv2d(n, n, kernel_size=3, stride=1, padding=1, bias=False)
        self.in2 = nn.BatchNorm2d(n)

    def forward(self, x):
        identity_data = x
        output = self.relu(self.in1(self.conv1(x)))
        output = self.in2(self.conv2(output))
        output = torch.add(output, identity_data)
        return output


class SRResNet(nn.Module):
    def __init__(self, n=8, blocks=2, upscale=4):
        super().__init__()
        self.conv_input = nn.Conv2d(3, n, kernel_size=9, stride=1, padding=4, bias=False)
        self.relu = nn.PReLU()
        self.residual = nn.Sequential(*[SRBlock(n) for _ in range(blocks)])
        self.conv_mid = nn.Conv2d(n, n, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn_mid = nn.BatchNorm2d(n)
        up = []
        for _ in range(int(math.log(upscale, 2))):
            up += [nn.Conv2d(n, 4 * n, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * n), nn.PixelShuffle(2), nn.PReLU()]
        self.upscale = nn.Sequential(*up)
        self.conv_output = nn.Conv2d(n, 3, kernel_size=9, stride=1, padding=4, bias=False)

    def forward(self, x):
        out = self.relu(self.conv_input(x))
        residual = out
        out = self.residual(out)
        out = self.bn_mid(self.conv_mid(out))
        out = torch.add(out, residual)
        out = self.upscale(out)
        out = self.conv_output(out)
        return (torch.tanh(out) + 1) / 2


@model(FIELD, source="https://github.com/twtygqyy/pytorch-SRResNet, srresnet.py; leftthomas/SRGAN's output")
def srresnet():
    return SRResNet(), (normal(2, 3, 8, 8),)


class MeanShift(nn.Conv2d):
    def __init__(self, rgb_range, rgb_mean=(0.4488, 0.4371, 0.4040), rgb_std=(1.0, 1.0, 1.0), sign=-1):
        super().__init__(3, 3, kernel_size=1)
        std = torch.Tensor(rgb_std)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1) / std.view(3, 1, 1, 1)
        self.bias.data = sign * rgb_range * torch.Tensor(rgb_mean) / std
        for p in self.parameters():
            p.requires_grad = False


class EDSR(nn.Module):
    """With bn=True, and a self-ensemble over flips in evaluation."""

    def __init__(self, n_feats=8, scale=3, res_scale=0.1):
        super().__init__()
        self.sub_mean, self.add_mean = MeanShift(1), MeanShift(1, sign=1)
        self.head = nn.Conv2d(3, n_feats, 3, padding=1)
        self.body = nn.ModuleList()
        for _ in range(2):
            m = []
            for i in range(2):
                m.append(nn.Conv2d(n_feats, n_feats, 3, padding=1))
                m.append(nn.BatchNorm2d(n_feats))
                if i == 0:
                    m.append(nn.ReLU(True))
            self.body.append(nn.Sequential(*m))
        self.tail = nn.Sequential(
            nn.Conv2d(n_feats, 9 * n_feats, 3, padding=1), nn.PixelShuffle(3), nn.Conv2d(n_feats, 3, 3, padding=1)
        )
        self.res_scale = res_scale
        self.self_ensemble = True

    def one(self, x):
        x = self.sub_mean(x)
        x = self.head(x)
        res = x
        for block in self.body:
            res = res + block(res).mul(self.res_scale)
        res += x
        return self.add_mean(self.tail(res))

    def forward(self, x):
        if self.self_ensemble and not self.training:
            out = [self.one(x), self.one(x.flip(-1)).flip(-1), self.one(x.transpose(-1, -2)).transpose(-1, -2)]
            return torch.stack(out).median(0).values
        return self.one(x)


@model(
    FIELD, source="https://github.com/sanghyun-son/EDSR-PyTorch, src/model/edsr.py, common.py (bn=True), __init__.py"
)
def edsr():
    return EDSR(), (normal(2, 3, 8, 8),)


@model(FIELD, source="basicsr (package): archs.discriminator_arch.VGGStyleDiscriminator128")
def basicsr_discriminator():
    from basicsr.archs.discriminator_arch import VGGStyleDiscriminator128

    return VGGStyleDiscriminator128(num_in_ch=3, num_feat=4), (normal(2, 3, 128, 128),)


@model(FIELD, source="basicsr (package): archs.tof_arch.TOFlow (SPyNet with BatchNorm, warps of seven frames)")
def basicsr_toflow():
    from basicsr.archs.tof_arch import TOFlow

    return TOFlow(adapt_official_weights=False), (normal(2, 7, 3, 16, 16),)


class SRGANDiscriminator(nn.Module):
    """And the relativistic loss of both."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.LeakyReLU(0.2)]
        for i, o, s in ((6, 6, 2), (6, 8, 1), (8, 8, 2)):
            layers += [nn.Conv2d(i, o, 3, stride=s, padding=1), nn.BatchNorm2d(o), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 12, 1), nn.LeakyReLU(0.2), nn.Conv2d(12, 1, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, real, fake):
        batch_size = real.size(0)
        real_out, fake_out = self.net(real).view(batch_size), self.net(fake).view(batch_size)
        d_loss = 1 - torch.sigmoid(real_out).mean() + torch.sigmoid(fake_out).mean()
        relativistic = F.binary_cross_entropy_with_logits(real_out - fake_out.mean(), torch.ones_like(real_out))
        relativistic += F.binary_cross_entropy_with_logits(fake_out - real_out.mean(), torch.zeros_like(fake_out))
        tv_h = torch.pow((fake[:, :, 1:, :] - fake[:, :, :-1, :]), 2).sum()
        return d_loss, relativistic, tv_h * torch.sigmoid(fake_out).mean()


@model(
    FIELD, source="https://github.com/leftthomas/SRGAN, model.py (Discriminator), loss.py; ESRGAN's relativistic loss"
)
def srgan_discriminator():
    return SRGANDiscriminator(), (normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))


class CALayer(nn.Module):
    def __init__(self, channel, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channel, channel // reduction, 1), nn.ReLU(inplace=True),
            nn.Conv2d(channel // reduction, channel, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return x * self.conv_du(self.avg_pool(x))


class CAB(nn.Module):
    def __init__(self, n, act):
        super().__init__()
        self.CA = CALayer(n)
        self.body = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), act, nn.Conv2d(n, n, 3, padding=1, bias=False)
        )

    def forward(self, x):
        res = self.body(x)
        res = self.CA(res)
        res += x
        return res


class SAM(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((n, n), (n, 3), (3, n)))

    def forward(self, x, x_img):
        x1 = self.conv1(x)
        img = self.conv2(x) + x_img
        x2 = torch.sigmoid(self.conv3(img))
        x1 = x1 * x2
        x1 = x1 + x
        return x1, img


class MPRNet(nn.Module):
    """Two stages over patches and the whole, one shared activation, features merged by halves."""

    def __init__(self, n=8):
        super().__init__()
        act = nn.PReLU()
        self.shallow1 = nn.Sequential(nn.Conv2d(3, n, 3, padding=1), CAB(n, act))
        self.shallow2 = nn.Sequential(nn.Conv2d(3, n, 3, padding=1), CAB(n, act))
        self.down = nn.Sequential(
            nn.Upsample(scale_factor=0.5, mode="bilinear", align_corners=False), nn.Conv2d(n, n, 1)
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(n, n, 1))
        self.enc, self.mid, self.dec = CAB(n, act), CAB(n, act), CAB(n, act)
        self.sam12 = SAM(n)
        self.concat12 = nn.Conv2d(n * 2, n, 3, padding=1)
        self.orb = nn.Sequential(*[CAB(n, act) for _ in range(2)])
        self.tail = nn.Conv2d(n, 3, 3, padding=1)

    def forward(self, x3_img):
        H = x3_img.size(2)
        W = x3_img.size(3)
        x2top_img = x3_img[:, :, 0 : int(H / 2), :]
        x2bot_img = x3_img[:, :, int(H / 2) : H, :]
        feats = []
        for img in (x2top_img, x2bot_img):
            x = self.enc(self.shallow1(img))
            y = self.mid(self.down(x))
            feats.append(self.dec(self.up(y)) + x)
        feat = torch.cat(feats, 2)
        samfeats, stage1_img = self.sam12(feat, x3_img)
        x3 = self.shallow2(x3_img)
        x3_cat = self.orb(self.concat12(torch.cat([x3, samfeats], 1)))
        stage2_img = self.tail(x3_cat)
        diff = stage2_img + x3_img - stage1_img.detach()
        charbonnier = torch.mean(torch.sqrt((diff * diff) + (1e-3 * 1e-3)))
        return [stage2_img + x3_img, stage1_img, charbonnier]


@model(FIELD, source="https://github.com/swz30/MPRNet, Denoising/MPRNet.py, losses.py, with BatchNorm in its CABs")
def mprnet():
    return MPRNet(), (normal(2, 3, 16, 16),)


def add_module(self, module_):
    self.add_module(str(len(self) + 1), module_)


torch_sequential_add = add_module  # the source patches torch.nn.Module.add with it


class Concat(nn.Module):
    def __init__(self, dim, *args):
        super().__init__()
        self.dim = dim
        for idx, module_ in enumerate(args):
            self.add_module(str(idx), module_)

    def forward(self, input):
        inputs = []
        for module_ in self._modules.values():
            inputs.append(module_(input))
        inputs_shapes2 = [x.shape[2] for x in inputs]
        inputs_shapes3 = [x.shape[3] for x in inputs]
        if all(s == inputs_shapes2[0] for s in inputs_shapes2) and all(s == inputs_shapes3[0] for s in inputs_shapes3):
            inputs_ = inputs
        else:
            target_shape2 = min(inputs_shapes2)
            target_shape3 = min(inputs_shapes3)
            inputs_ = []
            for inp in inputs:
                diff2 = (inp.size(2) - target_shape2) // 2
                diff3 = (inp.size(3) - target_shape3) // 2
                inputs_.append(inp[:, :, diff2 : diff2 + target_shape2, diff3 : diff3 + target_shape3])
        return torch.cat(inputs_, dim=self.dim)


def skip(channels=(6, 8), skips=(2, 2)):
    """Deep Image Prior's network: Sequentials that hold Sequentials, a Concat of skip and deeper."""
    net = nn.Sequential()
    model_tmp = net
    input_depth = 4
    for i in range(len(channels)):
        deeper = nn.Sequential()
        shortcut = nn.Sequential(nn.Conv2d(input_depth, skips[i], 1), nn.BatchNorm2d(skips[i]), nn.LeakyReLU(0.2, True))
        torch_sequential_add(model_tmp, Concat(1, shortcut, deeper))
        torch_sequential_add(model_tmp, nn.BatchNorm2d(skips[i] + channels[min(i + 1, len(channels) - 1)]))
        for stride in (2, 1):
            pad = nn.ReflectionPad2d(1)
            conv = nn.Conv2d(input_depth if stride == 2 else channels[i], channels[i], 3, stride)
            torch_sequential_add(deeper, nn.Sequential(pad, conv))
            torch_sequential_add(deeper, nn.BatchNorm2d(channels[i]))
            torch_sequential_add(deeper, nn.LeakyReLU(0.2, inplace=True))
        deeper_main = nn.Sequential()
        if i == len(channels) - 1:
            k = channels[i]
        else:
            torch_sequential_add(deeper, deeper_main)
            k = channels[i + 1]
        torch_sequential_add(deeper, nn.Upsample(scale_factor=2, mode="bilinear"))
        torch_sequential_add(model_tmp, nn.Conv2d(skips[i] + k, channels[i], 3, padding=1))
        torch_sequential_add(model_tmp, nn.BatchNorm2d(channels[i]))
        torch_sequential_add(model_tmp, nn.LeakyReLU(0.2, inplace=True))
        input_depth = channels[i]
        model_tmp = deeper_main
    torch_sequential_add(net, nn.Conv2d(channels[0], 3, 1))
    torch_sequential_add(net, nn.Sigmoid())
    return net


@model(FIELD, source="https://github.com/DmitryUlyanov/deep-image-prior, models/skip.py, common.py")
def deep_image_prior():
    return skip(), (normal(2, 4, 18, 18),)


class ECCV16(nn.Module):
    """Colourisation: a distribution over quantised colours, annealed to a mean, with rebalancing in backward."""

    class Rebalance(torch.autograd.Function):
        @staticmethod
        def forward(ctx, data_input, factors):
            ctx.save_for_backward(factors)
            return data_input.clone()

        @staticmethod
        def backward(ctx, grad_output):
            (factors,) = ctx.saved_tensors
            return grad_output * factors, None

    def __init__(self, q=13):
        super().__init__()
        self.l_cent, self.l_norm, self.ab_norm = 50.0, 100.0, 110.0
        self.model1 = nn.Sequential(
            nn.Conv2d(1, 6, 3, 1, 1), nn.ReLU(True), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(True), nn.BatchNorm2d(6)
        )
        self.model2 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(True), nn.BatchNorm2d(8))
        self.model5 = nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2, padding=2), nn.ReLU(True), nn.BatchNorm2d(8))
        self.model8 = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(True), nn.Conv2d(8, q, 1))
        self.softmax = nn.Softmax(dim=1)
        self.model_out = nn.Conv2d(q, 2, kernel_size=1, padding=0, dilation=1, stride=1, bias=False)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        gamut = torch.randn(q, 2)
        self.register_buffer("pts_in_hull", gamut)
        self.register_buffer("weights", torch.rand(q) + 0.5)

    def encode(self, ab):
        flat = ab.permute(0, 2, 3, 1).reshape(-1, 2)
        distance = torch.cdist(flat, self.pts_in_hull)
        dists, inds = torch.topk(distance, 5, dim=1, largest=False)
        weights = torch.exp(-(dists**2) / (2 * 0.8**2))
        weights = weights / weights.sum(1, keepdim=True)
        encoded = torch.zeros(flat.shape[0], self.pts_in_hull.shape[0], dtype=ab.dtype)
        encoded[torch.arange(flat.shape[0])[:, None], inds] = weights
        return encoded.view(ab.shape[0], ab.shape[2], ab.shape[3], -1).permute(0, 3, 1, 2)

    def forward(self, input_l, ab):
        conv = self.model8(self.model5(self.model2(self.model1((input_l - 0.5) / 1.2))))
        with torch.no_grad():
            target = self.encode(F.avg_pool2d(ab, 2))
            factors = self.weights[target.argmax(1)].unsqueeze(1)
        conv = self.Rebalance.apply(conv, factors)
        loss = -(target * F.log_softmax(conv, dim=1)).sum(dim=1).mean()
        out_reg = self.model_out(self.softmax(conv))
        annealed = torch.exp(F.log_softmax(conv, 1) / 0.38)
        annealed = annealed / annealed.sum(1, keepdim=True)
        mean = torch.einsum("nqhw,qc->nchw", annealed, self.pts_in_hull)
        return self.upsample(out_reg) * 1.1, loss, mean


@model(
    FIELD, source="https://github.com/richzhang/colorization, colorizers/eccv16.py; the paper's targets and rebalancing"
)
def colourisation():
    return ECCV16(), (normal(2, 1, 16, 16), normal(2, 2, 16, 16, seed=1))


class PartialConv2d(nn.Conv2d):
    def __init__(self, *args, multi_channel=False, return_mask=True, **kwargs):
        self.multi_channel = multi_channel
        self.return_mask = return_mask
        super().__init__(*args, **kwargs)
        if self.multi_channel:
            self.weight_maskUpdater = torch.ones(self.out_channels, self.in_channels, *self.kernel_size)
        else:
            self.weight_maskUpdater = torch.ones(1, 1, self.kernel_size[0], self.kernel_size[1])
        w = self.weight_maskUpdater
        self.slide_winsize = w.shape[1] * w.shape[2] * w.shape[3]
        self.last_size = (None, None, None, None)
        self.update_mask = None
        self.mask_ratio = None

    def forward(self, input, mask_in=None):
        assert len(input.shape) == 4
        if mask_in is not None or self.last_size != tuple(input.shape):
            self.last_size = tuple(input.shape)
            with torch.no_grad():
                if self.weight_maskUpdater.type() != input.type():
                    self.weight_maskUpdater = self.weight_maskUpdater.to(input)
                if mask_in is None:
                    mask = torch.ones(input.data.shape[0], input.data.shape[1], *input.data.shape[2:]).to(input)
                else:
                    mask = mask_in
                self.update_mask = F.conv2d(
                    mask,
                    self.weight_maskUpdater,
                    bias=None,
                    stride=self.stride,
                    padding=self.padding,
                    dilation=self.dilation,
                )
                self.mask_ratio = self.slide_winsize / (self.update_mask + 1e-8)
                self.update_mask = torch.clamp(self.update_mask, 0, 1)
                self.mask_ratio = torch.mul(self.mask_ratio, self.update_mask)
        raw_out = super().forward(torch.mul(input, mask) if mask_in is not None else input)
        if self.bias is not None:
            bias_view = self.bias.view(1, self.out_channels, 1, 1)
            output = torch.mul(raw_out - bias_view, self.mask_ratio) + bias_view
            output = torch.mul(output, self.update_mask)
        else:
            output = torch.mul(raw_out, self.mask_ratio)
        if self.return_mask:
            return output, self.update_mask
        return output


class PConvUNet(nn.Module):
    def __init__(self, layer_size=2):
        super().__init__()
        self.freeze_enc_bn = False
        self.layer_size = layer_size
        self.enc_1 = PartialConv2d(3, 6, 7, 2, 3, bias=False, multi_channel=True)
        self.enc_2 = PartialConv2d(6, 8, 3, 2, 1, bias=False, multi_channel=True)
        self.bn_1, self.bn_2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.dec_2 = PartialConv2d(8 + 6, 6, 3, 1, 1, bias=False, multi_channel=True)
        self.dec_1 = PartialConv2d(6 + 3, 3, 3, 1, 1, bias=True, multi_channel=True)
        self.bn_d2 = nn.BatchNorm2d(6)

    def forward(self, input, input_mask):
        h_dict, h_mask_dict = {"h_0": input}, {"h_0": input_mask}
        for i in range(1, self.layer_size + 1):
            h, m = getattr(self, f"enc_{i}")(h_dict[f"h_{i - 1}"], h_mask_dict[f"h_{i - 1}"])
            h_dict[f"h_{i}"] = F.relu(getattr(self, f"bn_{i}")(h))
            h_mask_dict[f"h_{i}"] = m
        h, h_mask = h_dict["h_2"], h_mask_dict["h_2"]
        for i in range(self.layer_size, 0, -1):
            enc_h_key = f"h_{i - 1}"
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h_mask = F.interpolate(h_mask, scale_factor=2, mode="nearest")
            h = torch.cat([h, h_dict[enc_h_key]], dim=1)
            h_mask = torch.cat([h_mask, h_mask_dict[enc_h_key]], dim=1)
            h, h_mask = getattr(self, f"dec_{i}")(h, h_mask)
            if i > 1:
                h = F.leaky_relu(self.bn_d2(h), 0.2)
        comp = input_mask * input + (1 - input_mask) * h
        features = comp.flatten(2)
        gram = features.bmm(features.transpose(1, 2)) / features[0].numel()
        return h, h_mask, gram


@model(
    FIELD, source="https://github.com/NVIDIA/partialconv, models/partialconv2d.py; naoto0804/pytorch-inpainting's UNet"
)
def partial_convolution():
    mask = torch.ones(2, 3, 16, 16, dtype=torch.float64)
    mask[:, :, 4:12, 5:9] = 0
    return PConvUNet(), (normal(2, 3, 16, 16), mask)


class IRCNNHQS(nn.Module):
    """Plug-and-play half-quadratic splitting: a blur undone in the Fourier domain, then a denoiser, unrolled."""

    def __init__(self, iterations=2):
        super().__init__()
        self.denoiser = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(True),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 1, 3, padding=1),
        )  # fmt: skip
        self.rho = nn.Parameter(torch.linspace(0.1, 0.3, iterations))
        k = torch.outer(torch.hann_window(5, periodic=False), torch.hann_window(5, periodic=False)) + 0.05
        self.register_buffer("kernel", k / k.sum())

    def p2o(self, psf, shape):
        otf = torch.zeros(psf.shape[:-2] + shape).type_as(psf)
        otf[..., : psf.shape[0], : psf.shape[1]].copy_(psf)
        for axis, axis_size in enumerate(psf.shape):
            otf = torch.roll(otf, -int(axis_size / 2), dims=axis)
        return torch.fft.fftn(otf, dim=(-2, -1))

    def forward(self, y):
        FB = self.p2o(self.kernel, y.shape[-2:])
        FBC = torch.conj(FB)
        F2B = torch.pow(torch.abs(FB), 2)
        FBFy = FBC * torch.fft.fftn(y, dim=(-2, -1))
        x = y
        for rho in self.rho:
            alpha = F.softplus(rho)
            FR = FBFy + torch.fft.fftn(alpha * x, dim=(-2, -1))
            z = torch.real(torch.fft.ifftn(FR / (F2B + alpha), dim=(-2, -1)))
            x = z - self.denoiser(z)
        return x


@model(FIELD, source="https://github.com/cszn/USRNet, models/network_usrnet.py (FFT data step), IRCNN's denoiser")
def deblurring():
    return IRCNNHQS(), (normal(4, 1, 12, 12),)
