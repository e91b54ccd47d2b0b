"""Depth and optical flow: cost volumes, warps, iterated lookups."""
# ruff: noqa: B905, RUF059  (as the sources have it)

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal

FIELD = "depth_and_flow"


class ConvBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(int(in_channels), int(out_channels), 3)
        self.nonlin = nn.ELU(inplace=True)

    def forward(self, x):
        return self.nonlin(self.conv(self.pad(x)))


def upsample(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


class DepthDecoder(nn.Module):
    """convs is a dictionary whose keys are tuples, its values in a ModuleList."""

    def __init__(self, num_ch_enc, scales=range(2), num_output_channels=1, use_skips=True):
        super().__init__()
        self.use_skips = use_skips
        self.scales = scales
        self.num_ch_enc = num_ch_enc
        self.num_ch_dec = np.array([4, 6, 8])
        self.convs = {}
        for i in range(2, -1, -1):
            num_ch_in = self.num_ch_enc[-1] if i == 2 else self.num_ch_dec[i + 1]
            self.convs[("upconv", i, 0)] = ConvBlock(num_ch_in, self.num_ch_dec[i])
            num_ch_in = self.num_ch_dec[i]
            if self.use_skips and i > 0:
                num_ch_in += self.num_ch_enc[i - 1]
            self.convs[("upconv", i, 1)] = ConvBlock(num_ch_in, self.num_ch_dec[i])
        for s in self.scales:
            self.convs[("dispconv", s)] = nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(int(self.num_ch_dec[s]), num_output_channels, 3)
            )
        self.decoder = nn.ModuleList(list(self.convs.values()))
        self.sigmoid = nn.Sigmoid()

    def forward(self, input_features):
        self.outputs = {}
        x = input_features[-1]
        for i in range(2, -1, -1):
            x = self.convs[("upconv", i, 0)](x)
            x = [upsample(x)]
            if self.use_skips and i > 0:
                x += [input_features[i - 1]]
            x = torch.cat(x, 1)
            x = self.convs[("upconv", i, 1)](x)
            if i in self.scales:
                self.outputs[("disp", i)] = self.sigmoid(self.convs[("dispconv", i)](x))
        return self.outputs


class MonoDepth2(nn.Module):
    """Encoder, decoder, pose, and the source view warped into the target's by both, with its SSIM."""

    def __init__(self, h=32, w=32):
        super().__init__()
        self.num_ch_enc = np.array([6, 8, 10])
        self.encoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(int(a), int(b), 3, 2, 1, bias=False), nn.BatchNorm2d(int(b)), nn.ReLU(inplace=False)
            )
            for a, b in zip([3, 6, 8], self.num_ch_enc)
        )
        self.depth = DepthDecoder(self.num_ch_enc)
        self.pose = nn.Sequential(nn.Conv2d(6, 6, 3, 4, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        meshgrid = np.meshgrid(range(w), range(h), indexing="xy")
        self.id_coords = nn.Parameter(
            torch.from_numpy(np.stack(meshgrid, axis=0).astype(np.float32)), requires_grad=False
        )
        self.ones = nn.Parameter(torch.ones(1, 1, h * w), requires_grad=False)
        pix = torch.unsqueeze(torch.stack([self.id_coords[0].view(-1), self.id_coords[1].view(-1)], 0), 0)
        self.pix_coords = nn.Parameter(torch.cat([pix, self.ones], 1), requires_grad=False)
        K = torch.tensor([[0.58 * w, 0, 0.5 * w, 0], [0, 1.92 * h, 0.5 * h, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        self.register_buffer("K", K[None])
        self.register_buffer("inv_K", torch.linalg.pinv(K)[None])
        self.height, self.width = h, w
        self.pool, self.refl = nn.AvgPool2d(3, 1), nn.ReflectionPad2d(1)

    def rot_from_axisangle(self, vec):
        angle = torch.norm(vec, 2, 2, True)
        axis = vec / (angle + 1e-7)
        ca, sa = torch.cos(angle), torch.sin(angle)
        C = 1 - ca
        x, y, z = axis[..., 0].unsqueeze(1), axis[..., 1].unsqueeze(1), axis[..., 2].unsqueeze(1)
        xs, ys, zs = x * sa, y * sa, z * sa
        xC, yC, zC = x * C, y * C, z * C
        xyC, yzC, zxC = x * yC, y * zC, z * xC
        rot = torch.zeros((vec.shape[0], 4, 4)).to(device=vec.device).to(vec.dtype)
        rot[:, 0, 0] = torch.squeeze(x * xC + ca)
        rot[:, 0, 1] = torch.squeeze(xyC - zs)
        rot[:, 0, 2] = torch.squeeze(zxC + ys)
        rot[:, 1, 0] = torch.squeeze(xyC + zs)
        rot[:, 1, 1] = torch.squeeze(y * yC + ca)
        rot[:, 1, 2] = torch.squeeze(yzC - xs)
        rot[:, 2, 0] = torch.squeeze(zxC - ys)
        rot[:, 2, 1] = torch.squeeze(yzC + xs)
        rot[:, 2, 2] = torch.squeeze(z * zC + ca)
        rot[:, 3, 3] = 1
        return rot

    def ssim(self, x, y):
        x, y = self.refl(x), self.refl(y)
        mu_x, mu_y = self.pool(x), self.pool(y)
        sigma_x = self.pool(x**2) - mu_x**2
        sigma_y = self.pool(y**2) - mu_y**2
        sigma_xy = self.pool(x * y) - mu_x * mu_y
        n = (2 * mu_x * mu_y + 0.01**2) * (2 * sigma_xy + 0.03**2)
        d = (mu_x**2 + mu_y**2 + 0.01**2) * (sigma_x + sigma_y + 0.03**2)
        return torch.clamp((1 - n / d) / 2, 0, 1)

    def forward(self, target, source):
        features = []
        x = (target - 0.45) / 0.225
        for layer in self.encoder:
            x = layer(x)
            features.append(x)
        outputs = self.depth(features)
        disp = outputs[("disp", 0)]
        depth = 1 / (0.01 + (10 - 0.01) * disp)
        pose = 0.01 * self.pose(torch.cat([target, source], 1)).mean(3).mean(2).view(-1, 1, 6)
        T = self.rot_from_axisangle(pose[..., :3])
        T[:, :3, 3] = pose[:, 0, 3:]
        batch = target.shape[0]
        cam_points = torch.matmul(self.inv_K[:, :3, :3], self.pix_coords)
        cam_points = depth.view(batch, 1, -1) * cam_points
        cam_points = torch.cat([cam_points, self.ones.expand(batch, -1, -1)], 1)
        P = torch.matmul(self.K, T)[:, :3, :]
        cam_points = torch.matmul(P, cam_points)
        pix_coords = cam_points[:, :2, :] / (cam_points[:, 2, :].unsqueeze(1) + 1e-7)
        pix_coords = pix_coords.view(batch, 2, self.height, self.width)
        pix_coords = pix_coords.permute(0, 2, 3, 1)
        pix_coords[..., 0] /= self.width - 1
        pix_coords[..., 1] /= self.height - 1
        pix_coords = (pix_coords - 0.5) * 2
        warped = F.grid_sample(source, pix_coords, padding_mode="border", align_corners=True)
        loss = 0.85 * self.ssim(warped, target).mean(1, True) + 0.15 * torch.abs(target - warped).mean(1, True)
        identity = torch.abs(target - source).mean(1, True)
        to_optimise, _ = torch.min(torch.cat((identity, loss), dim=1), dim=1)
        return disp, outputs[("disp", 1)], to_optimise.mean((1, 2))


@model(FIELD, source="https://github.com/nianticlabs/monodepth2, networks/depth_decoder.py, layers.py, trainer.py")
def monodepth2():
    return MonoDepth2(), (normal(2, 3, 32, 32), normal(2, 3, 32, 32, seed=1))


def convbn(i, o, k, s, pad, dilation=1):
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, dilation if dilation > 1 else pad, dilation, bias=False), nn.BatchNorm2d(o)
    )


def convbn_3d(i, o, k, s, pad):
    return nn.Sequential(nn.Conv3d(i, o, kernel_size=k, padding=pad, stride=s, bias=False), nn.BatchNorm3d(o))


class PSMNet(nn.Module):
    def __init__(self, maxdisp=16):
        super().__init__()
        self.maxdisp = maxdisp
        self.firstconv = nn.Sequential(
            convbn(3, 4, 3, 2, 1), nn.ReLU(inplace=True), convbn(4, 4, 3, 2, 1, 1), nn.ReLU(inplace=True)
        )
        self.branch = nn.Sequential(nn.AvgPool2d((4, 4), stride=(4, 4)), convbn(4, 4, 1, 1, 0), nn.ReLU(inplace=True))
        self.lastconv = nn.Sequential(convbn(8, 6, 3, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1, bias=False))
        self.dres0 = nn.Sequential(convbn_3d(8, 6, 3, 1, 1), nn.ReLU(inplace=True))
        self.hg1 = nn.Sequential(convbn_3d(6, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.hg2 = nn.Sequential(
            nn.ConvTranspose3d(8, 6, kernel_size=3, padding=1, output_padding=1, stride=2, bias=False),
            nn.BatchNorm3d(6),
        )
        self.classif1 = nn.Sequential(
            convbn_3d(6, 6, 3, 1, 1), nn.ReLU(True), nn.Conv3d(6, 1, 3, padding=1, bias=False)
        )
        self.classif2 = nn.Sequential(
            convbn_3d(6, 6, 3, 1, 1), nn.ReLU(True), nn.Conv3d(6, 1, 3, padding=1, bias=False)
        )

    def feature(self, x):
        output = self.firstconv(x)
        branch = self.branch(output)
        branch = F.interpolate(branch, (output.size()[2], output.size()[3]), mode="bilinear", align_corners=False)
        return self.lastconv(torch.cat((output, branch), 1))

    def regression(self, x):
        disp = torch.Tensor(np.reshape(np.array(range(self.maxdisp)), [1, self.maxdisp, 1, 1])).to(x)
        return torch.sum(x * disp.data, 1, keepdim=False)

    def forward(self, left, right):
        refimg_fea = self.feature(left)
        targetimg_fea = self.feature(right)
        # matching
        cost = torch.autograd.Variable(
            torch.FloatTensor(
                refimg_fea.size()[0],
                refimg_fea.size()[1] * 2,
                self.maxdisp // 4,
                refimg_fea.size()[2],
                refimg_fea.size()[3],
            ).zero_()
        ).to(refimg_fea)
        for i in range(self.maxdisp // 4):
            if i > 0:
                cost[:, : refimg_fea.size()[1], i, :, i:] = refimg_fea[:, :, :, i:]
                cost[:, refimg_fea.size()[1] :, i, :, i:] = targetimg_fea[:, :, :, :-i]
            else:
                cost[:, : refimg_fea.size()[1], i, :, :] = refimg_fea
                cost[:, refimg_fea.size()[1] :, i, :, :] = targetimg_fea
        cost = cost.contiguous()
        cost0 = self.dres0(cost)
        out1 = self.hg2(self.hg1(cost0)) + cost0
        cost1 = self.classif1(out1)
        cost2 = self.classif2(F.relu(out1)) + cost1
        size = [self.maxdisp, left.size()[2], left.size()[3]]
        if self.training:
            cost1 = F.interpolate(cost1, size, mode="trilinear", align_corners=False)
            cost1 = torch.squeeze(cost1, 1)
            pred1 = F.softmax(cost1, dim=1)
            pred1 = self.regression(pred1)
        cost2 = F.interpolate(cost2, size, mode="trilinear", align_corners=False)
        cost2 = torch.squeeze(cost2, 1)
        pred2 = F.softmax(cost2, dim=1)
        pred2 = self.regression(pred2)
        if self.training:
            return pred1, pred2
        return pred2


@model(
    FIELD,
    source="https://github.com/JiaRenChang/PSMNet, models/stackhourglass.py, submodule.py (cost volume by slices)",
)
def psmnet():
    return PSMNet(), (normal(2, 3, 32, 32), normal(2, 3, 32, 32, seed=1))


class RAFT(nn.Module):
    """Context encoder with BatchNorm, all-pairs correlation, lookups by grid_sample, a convolutional GRU, convex
    upsampling."""

    def __init__(self, dim=8, levels=2, radius=1, iters=2):
        super().__init__()
        self.levels, self.radius, self.iters = levels, radius, iters

        def encoder(out, norm):
            return nn.Sequential(
                nn.Conv2d(3, dim, 7, 2, 3), norm(dim), nn.ReLU(inplace=True),
                nn.Conv2d(dim, dim, 3, 2, 1), norm(dim), nn.ReLU(inplace=True),
                nn.Conv2d(dim, dim, 3, 2, 1), norm(dim), nn.ReLU(inplace=True), nn.Conv2d(dim, out, 1),
            )  # fmt: skip

        self.fnet = encoder(dim, nn.InstanceNorm2d)
        self.cnet = encoder(2 * dim, nn.BatchNorm2d)
        self.hdim = self.cdim = dim
        planes = levels * (2 * radius + 1) ** 2
        self.convc, self.convf = nn.Conv2d(planes, dim, 1), nn.Conv2d(2, dim, 7, padding=3)
        self.conv = nn.Conv2d(2 * dim, dim - 2, 3, padding=1)
        self.convz = nn.Conv2d(3 * dim, dim, 3, padding=1)
        self.convr = nn.Conv2d(3 * dim, dim, 3, padding=1)
        self.convq = nn.Conv2d(3 * dim, dim, 3, padding=1)
        self.flow_head = nn.Conv2d(dim, 2, 3, padding=1)
        self.mask = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(dim, 64 * 9, 1))

    def freeze_bn(self):
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()

    def coords_grid(self, batch, ht, wd, like):
        coords = torch.meshgrid(torch.arange(ht), torch.arange(wd), indexing="ij")
        coords = torch.stack(coords[::-1], dim=0).to(like)
        return coords[None].repeat(batch, 1, 1, 1)

    def bilinear_sampler(self, img, coords):
        H, W = img.shape[-2:]
        xgrid, ygrid = coords.split([1, 1], dim=-1)
        xgrid = 2 * xgrid / (W - 1) - 1
        ygrid = 2 * ygrid / (H - 1) - 1
        grid = torch.cat([xgrid, ygrid], dim=-1)
        return F.grid_sample(img, grid, align_corners=True)

    def lookup(self, pyramid, coords):
        r = self.radius
        coords = coords.permute(0, 2, 3, 1)
        batch, h1, w1, _ = coords.shape
        out_pyramid = []
        for i in range(self.levels):
            corr = pyramid[i]
            dx = torch.linspace(-r, r, 2 * r + 1, device=coords.device)
            dy = torch.linspace(-r, r, 2 * r + 1, device=coords.device)
            delta = torch.stack(torch.meshgrid(dy, dx, indexing="ij"), axis=-1)
            centroid_lvl = coords.reshape(batch * h1 * w1, 1, 1, 2) / 2**i
            delta_lvl = delta.view(1, 2 * r + 1, 2 * r + 1, 2)
            coords_lvl = centroid_lvl + delta_lvl
            corr = self.bilinear_sampler(corr, coords_lvl)
            corr = corr.view(batch, h1, w1, -1)
            out_pyramid.append(corr)
        out = torch.cat(out_pyramid, dim=-1)
        return out.permute(0, 3, 1, 2).contiguous()

    def upsample_flow(self, flow, mask):
        N, _, H, W = flow.shape
        mask = mask.view(N, 1, 9, 8, 8, H, W)
        mask = torch.softmax(mask, dim=2)
        up_flow = F.unfold(8 * flow, [3, 3], padding=1)
        up_flow = up_flow.view(N, 2, 9, 1, 1, H, W)
        up_flow = torch.sum(mask * up_flow, dim=2)
        up_flow = up_flow.permute(0, 1, 4, 2, 5, 3)
        return up_flow.reshape(N, 2, 8 * H, 8 * W)

    def forward(self, image1, image2):
        fmap = self.fnet(torch.cat([image1, image2], dim=0))
        fmap1, fmap2 = torch.split(fmap, [image1.shape[0]] * 2, dim=0)
        batch, dim, ht, wd = fmap1.shape
        corr = torch.matmul(fmap1.view(batch, dim, ht * wd).transpose(1, 2), fmap2.view(batch, dim, ht * wd))
        corr = corr.view(batch, ht, wd, 1, ht, wd) / torch.sqrt(torch.tensor(dim).to(corr))
        corr = corr.reshape(batch * ht * wd, 1, ht, wd)
        pyramid = [corr]
        for _ in range(self.levels - 1):
            corr = F.avg_pool2d(corr, 2, stride=2)
            pyramid.append(corr)
        cnet = self.cnet(image1)
        net, inp = torch.split(cnet, [self.hdim, self.cdim], dim=1)
        net, inp = torch.tanh(net), torch.relu(inp)
        coords0 = self.coords_grid(batch, ht, wd, image1)
        coords1 = self.coords_grid(batch, ht, wd, image1)
        predictions = []
        for _ in range(self.iters):
            coords1 = coords1.detach()
            corr = self.lookup(pyramid, coords1)
            flow = coords1 - coords0
            motion = F.relu(self.conv(torch.cat([F.relu(self.convc(corr)), F.relu(self.convf(flow))], dim=1)))
            x = torch.cat([inp, motion, flow], dim=1)
            hx = torch.cat([net, x], dim=1)
            z = torch.sigmoid(self.convz(hx))
            r = torch.sigmoid(self.convr(hx))
            q = torch.tanh(self.convq(torch.cat([r * net, x], dim=1)))
            net = (1 - z) * net + z * q
            coords1 = coords1 + self.flow_head(net)
            predictions.append(self.upsample_flow(coords1 - coords0, 0.25 * self.mask(net)))
        return predictions


@model(FIELD, source="https://github.com/princeton-vl/RAFT, core/raft.py, corr.py, update.py, extractor.py")
def raft():
    return RAFT(), (normal(2, 3, 32, 32), normal(2, 3, 32, 32, seed=1))


@model(FIELD, source="https://github.com/princeton-vl/RAFT, train.py: freeze_bn() before training")
def raft_frozen():
    class Frozen(RAFT):
        def train(self, mode=True):
            super().train(mode)
            self.freeze_bn()
            return self

    return Frozen(iters=1), (normal(2, 3, 32, 32), normal(2, 3, 32, 32, seed=1))


class PWCNet(nn.Module):
    """Warp, local correlation, decoders; BatchNorm in the pyramid."""

    def __init__(self, md=1):
        super().__init__()
        self.md = md

        def conv(i, o, s=1):
            return nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.LeakyReLU(0.1))

        self.conv1, self.conv2 = conv(3, 6, 2), conv(6, 8, 2)
        n = (2 * md + 1) ** 2
        self.dec2, self.flow2 = conv(n + 8, 8), nn.Conv2d(8, 2, 3, 1, 1)
        self.deconv = nn.ConvTranspose2d(2, 2, 4, 2, 1)
        self.dec1, self.flow1 = conv(n + 6 + 2, 8), nn.Conv2d(8, 2, 3, 1, 1)

    def warp(self, x, flo):
        B, C, H, W = x.size()
        xx = torch.arange(0, W).view(1, -1).repeat(H, 1)
        yy = torch.arange(0, H).view(-1, 1).repeat(1, W)
        xx = xx.view(1, 1, H, W).repeat(B, 1, 1, 1)
        yy = yy.view(1, 1, H, W).repeat(B, 1, 1, 1)
        grid = torch.cat((xx, yy), 1).to(x.dtype)
        vgrid = torch.autograd.Variable(grid) + flo
        # scale grid to [-1,1]
        vgrid[:, 0, :, :] = 2.0 * vgrid[:, 0, :, :].clone() / max(W - 1, 1) - 1.0
        vgrid[:, 1, :, :] = 2.0 * vgrid[:, 1, :, :].clone() / max(H - 1, 1) - 1.0
        vgrid = vgrid.permute(0, 2, 3, 1)
        output = F.grid_sample(x, vgrid, align_corners=True)
        mask = torch.autograd.Variable(torch.ones(x.size())).to(x)
        mask = F.grid_sample(mask, vgrid, align_corners=True)
        mask[mask < 0.9999] = 0
        mask[mask > 0] = 1
        return output * mask

    def corr(self, a, b):
        d = self.md
        padded = F.pad(b, [d] * 4)
        h, w = a.shape[-2:]
        out = []
        for i in range(2 * d + 1):
            for j in range(2 * d + 1):
                out.append((a * padded[:, :, i : i + h, j : j + w]).mean(1))
        return F.leaky_relu(torch.stack(out, 1), 0.1)

    def forward(self, im1, im2):
        c11, c21 = self.conv1(im1), self.conv1(im2)
        c12, c22 = self.conv2(c11), self.conv2(c21)
        flow2 = self.flow2(self.dec2(torch.cat((self.corr(c12, c22), c12), 1)))
        up_flow = self.deconv(flow2)
        warp1 = self.warp(c21, up_flow * 0.625)
        corr1 = self.corr(c11, warp1)
        flow1 = self.flow1(self.dec1(torch.cat((corr1, c11, up_flow), 1)))
        return flow1, flow2


@model(FIELD, source="https://github.com/NVlabs/PWC-Net, PyTorch/models/PWCNet.py (warp writes into its grid and mask)")
def pwcnet():
    return PWCNet(), (normal(2, 3, 16, 16), normal(2, 3, 16, 16, seed=1))


def depthwise(in_channels, kernel_size):
    padding = (kernel_size - 1) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel_size, 1, padding, bias=False, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
    )


def pointwise(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 1, 1, 0, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class MobileNetSkipAdd(nn.Module):
    def __init__(self):
        super().__init__()

        def conv_dw(i, o, s):
            return nn.Sequential(
                nn.Conv2d(i, i, 3, s, 1, groups=i, bias=False), nn.BatchNorm2d(i), nn.ReLU6(inplace=True),
                nn.Conv2d(i, o, 1, 1, 0, bias=False), nn.BatchNorm2d(o), nn.ReLU6(inplace=True),
            )  # fmt: skip

        widths = [(3, 6, 1), (6, 8, 2), (8, 8, 1), (8, 10, 2)]
        for i, (a, b, s) in enumerate(widths):
            setattr(self, f"conv{i}", conv_dw(a, b, s))
        self.decode_conv1 = nn.Sequential(depthwise(10, 5), pointwise(10, 8))
        self.decode_conv2 = nn.Sequential(depthwise(8, 5), pointwise(8, 6))
        self.decode_conv3 = pointwise(6, 1)

    def forward(self, x):
        for i in range(4):
            layer = getattr(self, f"conv{i}")
            x = layer(x)
            if i == 0:
                x1 = x
            elif i == 1:
                x2 = x
        for i in range(1, 3):
            layer = getattr(self, f"decode_conv{i}")
            x = layer(x)
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            if i == 2:
                x = x + x1
            elif i == 1:
                x = x + x2
        return self.decode_conv3(x)


@model(FIELD, source="https://github.com/dwofk/fast-depth, models.py (MobileNetSkipAdd)")
def fastdepth():
    return MobileNetSkipAdd(), (normal(4, 3, 16, 16),)


class WSConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        weight_mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - weight_mean
        std = torch.sqrt(torch.var(weight.view(weight.size(0), -1), dim=1) + 1e-12).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LapDepth(nn.Module):
    """Residuals of a Laplacian pyramid of the image, decoded from coarse to fine."""

    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((3, 6), (6, 8), (8, 10))
        )
        self.aspp = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(10), nn.ReLU(), WSConv2d(10, 4, 3, padding=d, dilation=d)) for d in (1, 2, 3)
        )
        self.dec = nn.ModuleList(
            nn.Sequential(WSConv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), WSConv2d(8, 1, 3, padding=1))
            for i in (22, 12, 10)
        )
        self.max_depth = 10.0

    def forward(self, x):
        rgb = [x]
        for _ in range(3):
            rgb.append(F.interpolate(rgb[-1], scale_factor=0.5, mode="bilinear"))
        lap = []
        for i in range(3):
            up = F.interpolate(rgb[i + 1], rgb[i].shape[-2:], mode="bilinear", align_corners=False)
            lap.append(rgb[i] - up)
        feats = []
        y = x
        for e in self.enc:
            y = e(y)
            feats.append(y)
        d = torch.cat([feats[-1]] + [a(feats[-1]) for a in self.aspp], 1)
        outs = [self.dec[0](d)]
        for level, dec in ((1, self.dec[1]), (0, self.dec[2])):
            up = F.interpolate(outs[-1], scale_factor=2, mode="bilinear", align_corners=False)
            feat = feats[level]
            small = F.interpolate(lap[level], size=feat.shape[-2:], mode="area")
            res = dec(torch.cat([feat, up, small], 1))
            outs.append(res + 0.1 * small.mean(dim=1, keepdim=True) + up)
        depth = torch.sigmoid(F.interpolate(outs[-1], size=x.shape[-2:], mode="bicubic", align_corners=True))
        return [depth * self.max_depth, *outs]


@model(FIELD, source="https://github.com/tjqansthd/LapDepth-release, model.py (LDRN)")
def lapdepth():
    return LapDepth(), (normal(2, 3, 32, 32),)


class AdaBins(nn.Module):
    """Bin widths by a softmax, centres by a cumulative sum, depth a mean over them; silog loss in forward."""

    def __init__(self, bins=8):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU())
        self.dec = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU())
        self.widths = nn.Sequential(nn.Linear(8, 12), nn.LeakyReLU(), nn.Linear(12, bins))
        self.conv_out = nn.Sequential(nn.Conv2d(8, bins, 1), nn.Softmax(dim=1))
        self.min_val, self.max_val = 1e-3, 10

    def forward(self, x, target):
        y = self.dec(self.enc(x))
        w = torch.relu(self.widths(y.flatten(2).max(-1)[0])) + 0.1
        w = w / w.sum(dim=1, keepdim=True)
        bin_widths = (self.max_val - self.min_val) * w
        bin_widths = F.pad(bin_widths, (1, 0), mode="constant", value=self.min_val)
        bin_edges = torch.cumsum(bin_widths, dim=1)
        centers = 0.5 * (bin_edges[:, :-1] + bin_edges[:, 1:])
        n, dout = centers.size()
        centers = centers.view(n, dout, 1, 1)
        pred = torch.sum(self.conv_out(y) * centers, dim=1, keepdim=True)
        pred = F.interpolate(pred, target.shape[-2:], mode="bilinear", align_corners=True)
        mask = target > 0.1
        g = torch.log(pred[mask]) - torch.log(target[mask])
        Dg = torch.var(g) + 0.15 * torch.pow(torch.mean(g), 2)
        points = bin_edges[:, 1:].sort(dim=1, descending=True)[0]
        return bin_edges, pred, 10 * torch.sqrt(Dg), points


@model(
    FIELD,
    source="https://github.com/shariqfarooq123/AdaBins, models/unet_adaptive_bins.py, loss.py (boolean mask of pixels)",
)
def adabins():
    return AdaBins(), (normal(2, 3, 16, 16), normal(2, 1, 16, 16, seed=1).abs() + 0.05)
