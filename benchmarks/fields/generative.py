"""Generative models of images: GANs, variational autoencoders, translation from image to image."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from . import integers, model, normal


class DCGAN(nn.Module):
    """Both networks; the discriminator sees what is real and what is generated in two calls."""

    def __init__(self, nz=8, ngf=4, ndf=4):
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, noise, real):
        fake = self.generator(noise)
        output_real = self.discriminator(real).view(-1, 1).squeeze(1)
        output_fake = self.discriminator(fake.detach()).view(-1)
        err_d = F.binary_cross_entropy(output_real, torch.ones_like(output_real)) + F.binary_cross_entropy(
            output_fake, torch.zeros_like(output_fake)
        )
        return err_d, self.discriminator(fake), fake


@model(
    "generative",
    source="https://github.com/pytorch/examples, dcgan/main.py: three calls of the discriminator in a step",
)
def dcgan():
    return DCGAN(), (normal(6, 8, 1, 1), normal(6, 3, 16, 16, seed=1))


def l2normalize(v, eps=1e-12):
    return F.normalize(v, dim=-1, eps=eps)


def power_iteration(w, u_, update=True, eps=1e-12):
    us, vs, svs = [], [], []
    for i, u in enumerate(u_):
        with torch.no_grad():
            v = torch.matmul(u, w)
            v = F.normalize(v, eps=eps)
            vs += [v]
            u = torch.matmul(v, w.t())
            u = F.normalize(u, eps=eps)
            us += [u]
            if update:
                u_[i][:] = u
        svs += [torch.squeeze(torch.matmul(torch.matmul(v, w.t()), u.t()))]
    return svs, us, vs


class SN:
    """BigGAN's spectral norm: buffers u0 and sv0 written by slices in forward."""

    def __init__(self, num_svs, num_itrs, num_outputs, transpose=False, eps=1e-12):
        self.num_itrs, self.num_svs, self.transpose, self.eps = num_itrs, num_svs, transpose, eps
        for i in range(self.num_svs):
            self.register_buffer(f"u{i}", torch.randn(1, num_outputs))
            self.register_buffer(f"sv{i}", torch.ones(1))

    @property
    def u(self):
        return [getattr(self, f"u{i}") for i in range(self.num_svs)]

    @property
    def sv(self):
        return [getattr(self, f"sv{i}") for i in range(self.num_svs)]

    def W_(self):
        w_mat = self.weight.view(self.weight.size(0), -1)
        if self.transpose:
            w_mat = w_mat.t()
        for _ in range(self.num_itrs):
            svs, _us, _vs = power_iteration(w_mat, self.u, update=self.training, eps=self.eps)
        if self.training:
            with torch.no_grad():
                for i, sv in enumerate(svs):
                    self.sv[i][:] = sv
        return self.weight / svs[0]


class SNConv2d(nn.Conv2d, SN):
    def __init__(self, *args, **kwargs):
        nn.Conv2d.__init__(self, *args, **kwargs)
        SN.__init__(self, 1, 1, self.out_channels)

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SNLinear(nn.Linear, SN):
    def __init__(self, *args, **kwargs):
        nn.Linear.__init__(self, *args, **kwargs)
        SN.__init__(self, 1, 1, self.out_features)

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class ccbn(nn.Module):
    """Class-conditional BatchNorm: F.batch_norm on buffers stored_mean and stored_var."""

    def __init__(self, output_size, input_size, eps=1e-5, momentum=0.1):
        super().__init__()
        self.gain, self.bias = (
            SNLinear(input_size, output_size, bias=False),
            SNLinear(input_size, output_size, bias=False),
        )
        self.eps, self.momentum = eps, momentum
        self.register_buffer("stored_mean", torch.zeros(output_size))
        self.register_buffer("stored_var", torch.ones(output_size))

    def forward(self, x, y):
        gain = (1 + self.gain(y)).view(y.size(0), -1, 1, 1)
        bias = self.bias(y).view(y.size(0), -1, 1, 1)
        out = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, self.momentum, self.eps)
        return out * gain + bias


class GBlock(nn.Module):
    def __init__(self, in_channels, out_channels, cond):
        super().__init__()
        self.conv1 = SNConv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = SNConv2d(out_channels, out_channels, 3, padding=1)
        self.conv_sc = SNConv2d(in_channels, out_channels, 1)
        self.bn1, self.bn2 = ccbn(in_channels, cond), ccbn(out_channels, cond)

    def forward(self, x, y):
        h = F.relu(self.bn1(x, y))
        h = F.interpolate(h, scale_factor=2)
        x = F.interpolate(x, scale_factor=2)
        h = self.conv1(h)
        h = F.relu(self.bn2(h, y))
        h = self.conv2(h)
        return h + self.conv_sc(x)


class BigGAN(nn.Module):
    """Noise in chunks: each block is given its own with the class's embedding."""

    def __init__(self, chunk=3, blocks=2, channels=8, shared=4, classes=5):
        super().__init__()
        self.num_slots, self.z_chunk_size = blocks + 1, chunk
        self.shared = nn.Embedding(classes, shared)
        self.linear = SNLinear(chunk, channels * 16)
        self.blocks = nn.ModuleList(
            [nn.ModuleList([GBlock(channels, channels, chunk + shared)]) for _ in range(blocks)]
        )
        self.output_layer = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), SNConv2d(channels, 3, 3, padding=1))

    def forward(self, z, y):
        y = self.shared(y)
        zs = torch.split(z, self.z_chunk_size, 1)
        z = zs[0]
        ys = [torch.cat([y, item], 1) for item in zs[1:]]
        h = self.linear(z)
        h = h.view(h.size(0), -1, 4, 4)
        for index, blocklist in enumerate(self.blocks):
            for block in blocklist:
                h = block(h, ys[index])
        return torch.tanh(self.output_layer(h))


@model("generative", source="https://github.com/ajbrock/BigGAN-PyTorch, layers.py and BigGAN.py")
def biggan():
    return BigGAN(), (normal(6, 9), integers(5, 6))


class SPADE(nn.Module):
    def __init__(self, norm_nc, label_nc, hidden=8):
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = (nn.Conv2d(hidden, norm_nc, 3, padding=1) for _ in range(2))

    def forward(self, x, segmap):
        normalized = self.param_free_norm(x)
        segmap = F.interpolate(segmap, size=x.size()[2:], mode="nearest")
        actv = self.mlp_shared(segmap)
        return normalized * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class SPADEResnetBlock(nn.Module):
    def __init__(self, fin, fout, label_nc):
        super().__init__()
        self.learned_shortcut = fin != fout
        fmiddle = min(fin, fout)
        self.conv_0 = spectral_norm(nn.Conv2d(fin, fmiddle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(fmiddle, fout, 3, padding=1))
        if self.learned_shortcut:
            self.conv_s = spectral_norm(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s = SPADE(fin, label_nc)
        self.norm_0, self.norm_1 = SPADE(fin, label_nc), SPADE(fmiddle, label_nc)

    def forward(self, x, seg):
        x_s = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 2e-1))
        dx = self.conv_1(F.leaky_relu(self.norm_1(dx, seg), 2e-1))
        return x_s + dx


class SPADEGenerator(nn.Module):
    def __init__(self, label_nc=4, nf=4):
        super().__init__()
        self.fc = nn.Conv2d(label_nc, 2 * nf, 3, padding=1)
        self.head_0, self.up_0 = SPADEResnetBlock(2 * nf, 2 * nf, label_nc), SPADEResnetBlock(2 * nf, nf, label_nc)
        self.up = nn.Upsample(scale_factor=2)
        self.conv_img = nn.Conv2d(nf, 3, 3, padding=1)

    def forward(self, label):
        seg = torch.zeros(label.shape[0], 4, *label.shape[2:], dtype=self.fc.weight.dtype).scatter_(1, label, 1.0)
        x = self.fc(F.interpolate(seg, size=(4, 4)))
        x = self.head_0(x, seg)
        x = self.up(x)
        x = self.up_0(x, seg)
        x = self.up(x)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 2e-1)))


@model("generative", source="https://github.com/NVlabs/SPADE, models/networks/normalization.py, with spectral_norm")
def spade():
    return SPADEGenerator(), (integers(4, 4, 1, 16, 16),)


class AdaptiveInstanceNorm2d(nn.Module):
    """MUNIT's: F.batch_norm over a reshaped batch, weight and bias assigned from outside."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = None
        self.bias = None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        assert self.weight is not None and self.bias is not None, "Please assign weight and bias before calling AdaIN!"
        b, c = x.size(0), x.size(1)
        running_mean = self.running_mean.repeat(b)
        running_var = self.running_var.repeat(b)
        x_reshaped = x.contiguous().view(1, b * c, *x.size()[2:])
        out = F.batch_norm(x_reshaped, running_mean, running_var, self.weight, self.bias, True, self.momentum, self.eps)
        return out.view(b, c, *x.size()[2:])


class MUNIT(nn.Module):
    def __init__(self, dim=4, style=3):
        super().__init__()
        self.style = nn.Sequential(
            nn.Conv2d(3, dim, 4, 2, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, style, 1)
        )
        self.content = nn.Sequential(nn.Conv2d(3, dim, 4, 2, 1), nn.BatchNorm2d(dim), nn.ReLU(True))
        self.dec = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            AdaptiveInstanceNorm2d(dim),
            nn.ReLU(True),
            nn.Conv2d(dim, dim, 3, padding=1),
            AdaptiveInstanceNorm2d(dim),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(dim, 3, 5, padding=2),
            nn.BatchNorm2d(3),
            nn.Tanh(),
        )
        self.mlp = nn.Sequential(nn.Linear(style, 8), nn.ReLU(True), nn.Linear(8, 4 * dim))

    def assign_adain_params(self, adain_params, model):
        for m in model.modules():
            if m.__class__.__name__ == "AdaptiveInstanceNorm2d":
                mean = adain_params[:, : m.num_features]
                std = adain_params[:, m.num_features : 2 * m.num_features]
                m.bias = mean.contiguous().view(-1)
                m.weight = std.contiguous().view(-1)
                if adain_params.size(1) > 2 * m.num_features:
                    adain_params = adain_params[:, 2 * m.num_features :]

    def forward(self, images, other):
        content, style = self.content(images), self.style(other)
        self.assign_adain_params(self.mlp(style.view(style.size(0), -1)), self.dec)
        return self.dec(content)


@model(
    "generative", source="https://github.com/NVlabs/MUNIT, networks.py: weights assigned to other modules in forward"
)
def munit_adain():
    return MUNIT(), (normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))


class VanillaVAE(nn.Module):
    """The noise is an input, since two libraries draw differently."""

    def __init__(self, latent=4, dims=(4, 8)):
        super().__init__()
        modules, channels = [], 3
        for h in dims:
            modules.append(nn.Sequential(nn.Conv2d(channels, h, 3, 2, 1), nn.BatchNorm2d(h), nn.LeakyReLU()))
            channels = h
        self.encoder = nn.Sequential(*modules)
        self.fc_mu, self.fc_var = nn.Linear(dims[-1] * 16, latent), nn.Linear(dims[-1] * 16, latent)
        self.decoder_input = nn.Linear(latent, dims[-1] * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(4), nn.LeakyReLU()
        )
        self.final_layer = nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(),
            nn.Conv2d(4, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, x, eps):
        result = torch.flatten(self.encoder(x), start_dim=1)
        mu, log_var = self.fc_mu(result), self.fc_var(result)
        z = eps * torch.exp(0.5 * log_var) + mu
        recons = self.final_layer(self.decoder(self.decoder_input(z).view(-1, 8, 4, 4)))
        kld_loss = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
        loss = F.mse_loss(recons, x) + 0.005 * kld_loss
        return {"loss": loss, "Reconstruction_Loss": recons.detach(), "KLD": -kld_loss}


@model("generative", source="https://github.com/AntixK/PyTorch-VAE, models/vanilla_vae.py")
def vae():
    return VanillaVAE(), (normal(6, 3, 16, 16), normal(6, 4, seed=1))


class Quantize(nn.Module):
    """https://github.com/rosinality/vq-vae-2-pytorch, vqvae.py."""

    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input):
        flatten = input.reshape(-1, self.dim)
        dist = flatten.pow(2).sum(1, keepdim=True) - 2 * flatten @ self.embed + self.embed.pow(2).sum(0, keepdim=True)
        _, embed_ind = (-dist).max(1)
        embed_onehot = F.one_hot(embed_ind, self.n_embed).type(flatten.dtype)
        embed_ind = embed_ind.view(*input.shape[:-1])
        quantize = self.embed_code(embed_ind)
        if self.training:
            embed_onehot_sum = embed_onehot.sum(0)
            embed_sum = flatten.transpose(0, 1) @ embed_onehot
            self.cluster_size.data.mul_(self.decay).add_(embed_onehot_sum, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(embed_sum.detach(), alpha=1 - self.decay)
            n = self.cluster_size.sum()
            cluster_size = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
            embed_normalized = self.embed_avg / cluster_size.unsqueeze(0)
            self.embed.data.copy_(embed_normalized)
        diff = (quantize.detach() - input).pow(2).mean()
        quantize = input + (quantize - input).detach()
        return quantize, diff, embed_ind

    def embed_code(self, embed_id):
        return F.embedding(embed_id, self.embed.transpose(0, 1))


class VQVAE(nn.Module):
    def __init__(self, channel=6, embed=4, codes=8):
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(3, channel, 4, stride=2, padding=1),
            nn.BatchNorm2d(channel),
            nn.ReLU(inplace=True),
            nn.Conv2d(channel, channel, 4, stride=2, padding=1),
            nn.BatchNorm2d(channel),
        )
        self.quantize_conv, self.quantize = nn.Conv2d(channel, embed, 1), Quantize(embed, codes)
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(embed, channel, 4, stride=2, padding=1),
            nn.BatchNorm2d(channel),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(channel, 3, 4, stride=2, padding=1),
        )

    def forward(self, x):
        quant = self.quantize_conv(self.enc(x)).permute(0, 2, 3, 1)
        quant, diff, ids = self.quantize(quant)
        quant = quant.permute(0, 3, 1, 2)
        return self.dec(quant), diff.unsqueeze(0), ids.to(x.dtype)


@model(
    "generative",
    source="https://github.com/rosinality/vq-vae-2-pytorch, vqvae.py: a codebook in buffers, moved in forward",
)
def vq_vae():
    return VQVAE(), (normal(4, 3, 16, 16),)


class SEBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.se = nn.Sequential(nn.Linear(c, 4), nn.ReLU(inplace=True), nn.Linear(4, c), nn.Sigmoid())

    def forward(self, x):
        se = torch.mean(x, dim=[2, 3])
        se = se.view(se.size(0), -1)
        se = self.se(se)
        return x * se.view(se.size(0), -1, 1, 1)


class ConvSN(nn.Conv2d):
    """NVAE's convolution: weight normalised by a log norm of its own, in forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        norm = torch.sqrt(torch.sum(self.weight**2, dim=[1, 2, 3]) + 1e-8)
        self.log_weight_norm = nn.Parameter(torch.log(norm).detach(), requires_grad=True)

    def forward(self, x):
        norm = torch.exp(self.log_weight_norm)
        w = self.weight
        self.weight_normalized = (
            norm.view(-1, 1, 1, 1) * w / torch.sqrt(torch.sum(w * w, dim=[1, 2, 3], keepdim=True) + 1e-8)
        )
        return F.conv2d(x, self.weight_normalized, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SwishFn(torch.autograd.Function):
    """Keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx, i):
        result = i * torch.sigmoid(i)
        ctx.save_for_backward(i)
        return result

    @staticmethod
    def backward(ctx, grad_output):
        (i,) = ctx.saved_tensors
        sigmoid_i = torch.sigmoid(i)
        return grad_output * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


class Swish(nn.Module):
    def forward(self, x):
        return SwishFn.apply(x)


class NVAECell(nn.Module):
    def __init__(self, c, ex=3):
        super().__init__()
        hidden = c * ex
        self.conv = nn.Sequential(
            nn.BatchNorm2d(c, eps=1e-5, momentum=0.05),
            ConvSN(c, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden, eps=1e-5, momentum=0.05),
            Swish(),
            ConvSN(hidden, hidden, 5, padding=2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, eps=1e-5, momentum=0.05),
            Swish(),
            ConvSN(hidden, c, 1, bias=False),
            nn.BatchNorm2d(c, momentum=0.05),
        )
        self.se = SEBlock(c)

    def forward(self, x):
        return x + 0.1 * self.se(self.conv(x))


class NVAE(nn.Module):
    """Two cells and the two losses that are computed of weights: of the norms, and of BatchNorm's scales."""

    def __init__(self, c=4):
        super().__init__()
        self.stem = ConvSN(3, c, 3, padding=1)
        self.cells = nn.ModuleList([NVAECell(c) for _ in range(2)])
        self.sampler = ConvSN(c, 4, 3, padding=1)
        self.all_bn_layers = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        self.all_log_norm = [m.log_weight_norm for m in self.modules() if isinstance(m, ConvSN)]

    def batchnorm_loss(self):
        return sum(torch.max(torch.abs(layer.weight)) for layer in self.all_bn_layers if layer.affine)

    def forward(self, x, eps):
        s = self.stem(2 * x - 1.0)
        for cell in self.cells:
            s = cell(s)
        mu, log_sigma = torch.chunk(self.sampler(s), 2, dim=1)
        mu = 5.0 * torch.tanh(mu / 5.0)
        sigma = torch.exp(5.0 * torch.tanh(log_sigma / 5.0)) + 1e-2
        return eps * sigma + mu, self.batchnorm_loss()


@model("generative", source="https://github.com/NVlabs/NVAE, neural_operations.py and model.py")
def nvae():
    return NVAE(), (normal(4, 3, 8, 8).sigmoid(), normal(4, 2, 8, 8, seed=1))


class UnetSkipConnectionBlock(nn.Module):
    def __init__(self, outer_nc, inner_nc, input_nc=None, submodule=None, outermost=False, innermost=False):
        super().__init__()
        self.outermost = outermost
        norm_layer = functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
        input_nc = outer_nc if input_nc is None else input_nc
        downconv = nn.Conv2d(input_nc, inner_nc, 4, 2, 1, bias=False)
        downrelu, uprelu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        if outermost:
            upconv = nn.ConvTranspose2d(inner_nc * 2, outer_nc, 4, 2, 1)
            model = [downconv, submodule, uprelu, upconv, nn.Tanh()]
        elif innermost:
            upconv = nn.ConvTranspose2d(inner_nc, outer_nc, 4, 2, 1, bias=False)
            model = [downrelu, downconv, uprelu, upconv, norm_layer(outer_nc)]
        else:
            upconv = nn.ConvTranspose2d(inner_nc * 2, outer_nc, 4, 2, 1, bias=False)
            model = [downrelu, downconv, norm_layer(inner_nc), submodule, uprelu, upconv, norm_layer(outer_nc)]
            model += [nn.Dropout(0.5)]
        self.model = nn.Sequential(*model)

    def forward(self, x):
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)  # x after the in-place LeakyReLU that the model begins with


@model(
    "generative",
    source="https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix, models/networks.py: skips changed in place",
)
def pix2pix():
    block = UnetSkipConnectionBlock(8, 8, innermost=True)
    block = UnetSkipConnectionBlock(4, 8, submodule=block)
    return UnetSkipConnectionBlock(3, 4, input_nc=3, submodule=block, outermost=True), (normal(4, 3, 16, 16),)


class SNGAN(nn.Module):
    """Spectral norm by hooks (the old function) and by parametrization (the new one)."""

    def __init__(self):
        super().__init__()
        new = nn.utils.parametrizations.spectral_norm
        self.generator = nn.Sequential(
            nn.Linear(8, 4 * 16),
            nn.Unflatten(1, (4, 4, 4)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 3, 4, 2, 1),
        )
        self.discriminator = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 4, 3, padding=1)),
            nn.LeakyReLU(0.1),
            new(nn.Conv2d(4, 6, 4, 2, 1)),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
        )
        self.l5 = new(nn.Linear(6 * 16, 1))
        self.l_y = spectral_norm(nn.Embedding(5, 6 * 16))

    def forward(self, z, y):
        h = self.discriminator(self.generator(z))
        output = self.l5(h)
        output += torch.sum(self.l_y(y) * h, dim=1, keepdim=True)
        return output


@model(
    "generative",
    source="https://github.com/pfnet-research/sngan_projection and its PyTorch port crcrpar/pytorch.sngan_projection",
)
def sngan_projection():
    return SNGAN(), (normal(6, 8), integers(5, 6))


class ConditionalBatchNorm2d(nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.num_features = num_features
        self.bn = nn.BatchNorm2d(num_features, affine=False)
        self.embed = nn.Embedding(num_classes, num_features * 2)
        self.embed.weight.data[:, :num_features].normal_(1, 0.02)
        self.embed.weight.data[:, num_features:].zero_()

    def forward(self, x, y):
        out = self.bn(x)
        gamma, beta = self.embed(y).chunk(2, 1)
        return gamma.view(-1, self.num_features, 1, 1) * out + beta.view(-1, self.num_features, 1, 1)


class SAGAN(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.snlinear = spectral_norm(nn.Linear(6, c * 16))
        self.cbn = ConditionalBatchNorm2d(c, 4)
        self.theta, self.phi = (spectral_norm(nn.Conv2d(c, c // 4, 1)) for _ in range(2))
        self.g, self.attn = spectral_norm(nn.Conv2d(c, c // 2, 1)), spectral_norm(nn.Conv2d(c // 2, c, 1))
        self.sigma = nn.Parameter(torch.zeros(1))
        self.out = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), spectral_norm(nn.Conv2d(c, 3, 3, padding=1)), nn.Tanh())

    def forward(self, z, labels):
        x = self.snlinear(z).view(z.size(0), -1, 4, 4)
        x = F.interpolate(F.relu(self.cbn(x, labels)), scale_factor=2)
        _, ch, h, w = x.size()
        theta = self.theta(x).view(-1, ch // 4, h * w)
        phi = F.max_pool2d(self.phi(x), 2).view(-1, ch // 4, h * w // 4)
        attn = F.softmax(torch.bmm(theta.permute(0, 2, 1), phi), dim=-1)
        g = F.max_pool2d(self.g(x), 2).view(-1, ch // 2, h * w // 4)
        attn_g = torch.bmm(g, attn.permute(0, 2, 1)).view(-1, ch // 2, h, w)
        return self.out(x + self.sigma * self.attn(attn_g))


@model("generative", source="https://github.com/voletiv/self-attention-GAN-pytorch, sagan_models.py")
def sagan():
    return SAGAN(), (normal(6, 6), integers(4, 6))
