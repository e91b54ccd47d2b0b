"""Medicine: segmentation and classification of slices and of volumes."""

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal


@model("medical", source="monai, networks/nets/unet.py")
def unet3d():
    from monai.networks.nets import UNet

    module = UNet(3, 1, 3, channels=(8, 16, 24), strides=(2, 2), num_res_units=2, norm="batch")
    return module, (normal(2, 1, 16, 16, 16),)


@model("medical", source="monai, networks/nets/attentionunet.py")
def attention_unet():
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(2, 1, 2, channels=(8, 16, 24), strides=(2, 2)), (normal(4, 1, 32, 32),)


@model("medical", source="monai, networks/nets/basic_unetplusplus.py")
def unet_plus_plus():
    from monai.networks.nets import BasicUNetPlusPlus

    module = BasicUNetPlusPlus(2, 1, 2, features=(4, 4, 8, 12, 16, 4), norm="batch", deep_supervision=True)
    return module, (normal(4, 1, 32, 32),)


@model("medical", source="monai, networks/nets/dynunet.py")
def dynunet():
    from monai.networks.nets import DynUNet

    kernels, strides = [3, 3, 3, 3], [1, 2, 2, 2]
    module = DynUNet(
        *(3, 1, 3, kernels, strides, strides[1:]),
        filters=[4, 8, 12, 16],
        norm_name="batch",
        deep_supervision=True,
        deep_supr_num=2,
        res_block=True,
    )
    return module, (normal(2, 1, 16, 16, 16),)


@model("medical", source="monai, networks/nets/vnet.py")
def vnet():
    from monai.networks.nets import VNet

    return VNet(spatial_dims=2, in_channels=1, out_channels=2), (normal(2, 1, 32, 32),)


@model("medical", source="monai, networks/nets/densenet.py")
def densenet3d():
    from monai.networks.nets import DenseNet

    module = DenseNet(3, 1, 4, init_features=8, growth_rate=4, block_config=(2, 3, 2))
    return module, (normal(2, 1, 32, 32, 32),)


@model("medical", source="monai, networks/nets/highresnet.py")
def highresnet():
    from monai.networks.nets import HighResNet

    layers = (
        {"name": "conv_0", "n_features": 8, "kernel_size": 3},
        {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 2},
        {"name": "res_2", "n_features": 16, "kernels": (3, 3), "repeat": 1},
        {"name": "conv_1", "n_features": 12, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    )
    return HighResNet(3, 1, 3, layer_params=layers), (normal(2, 1, 12, 12, 12),)


@model("medical", source="segmentation-models-pytorch, decoders/unet with encoders/mobilenet.py")
def smp_unet():
    import segmentation_models_pytorch as smp

    module = smp.Unet(
        "mobilenet_v2",
        encoder_weights=None,
        decoder_attention_type="scse",
        decoder_channels=(32, 16, 16, 16, 16),
        aux_params={"classes": 3, "pooling": "avg", "dropout": 0.0},
    )
    return module, (normal(2, 3, 64, 64),)


@model("medical", source="segmentation-models-pytorch, decoders/manet")
def smp_manet():
    import segmentation_models_pytorch as smp

    return smp.MAnet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)), (normal(2, 3, 64, 64),)


class DoubleConv(nn.Module):
    def __init__(self, in_channels, out_channels, mid_channels=None):
        super().__init__()
        if not mid_channels:
            mid_channels = out_channels
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diffY = x2.size()[2] - x1.size()[2]
        diffX = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """Pads what it has scaled up to the size of what it joins: images of any size."""

    def __init__(self, n_channels=3, n_classes=2, width=8):
        super().__init__()
        self.inc = DoubleConv(n_channels, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * width, 2 * width))
        self.up1 = Up(4 * width, width)
        self.up2 = Up(2 * width, width)
        self.outc = nn.Conv2d(width, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x)


@model("medical", source="https://github.com/milesial/Pytorch-UNet, unet/unet_model.py")
def unet2d():
    return UNet(), (normal(4, 3, 35, 30),)
