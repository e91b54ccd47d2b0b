"""Video: convolutions over space and time, shifts, recurrences."""

import torch
from torch import nn
from torch.nn import functional as F

from . import model, normal


class Pathways(nn.Module):
    """Gives a network of two pathways its list: every fourth frame, and all."""

    def __init__(self, module, alpha=4):
        super().__init__()
        self.module, self.alpha = module, alpha

    def forward(self, frames):
        slow = torch.index_select(
            frames, 2, torch.linspace(0, frames.shape[2] - 1, frames.shape[2] // self.alpha).long()
        )
        return self.module([slow, frames])


@model("video", source="pytorchvideo, models/slowfast.py")
def slowfast():
    from pytorchvideo.models.slowfast import create_slowfast

    module = create_slowfast(
        model_depth=18,
        model_num_class=5,
        dropout_rate=0.0,
        stem_dim_outs=(16, 2),
        head_pool_kernel_sizes=((2, 1, 1), (8, 1, 1)),
    )
    return Pathways(module), (normal(2, 3, 8, 32, 32),)


@model("video", source="pytorchvideo, models/x3d.py")
def x3d():
    from pytorchvideo.models.x3d import create_x3d

    module = create_x3d(
        input_clip_length=4, input_crop_size=32, model_num_class=5, dropout_rate=0.0, width_factor=1.0, depth_factor=1.0
    )
    return module, (normal(2, 3, 4, 32, 32),)


@model("video", source="pytorchvideo, models/csn.py")
def csn():
    from pytorchvideo.models.csn import create_csn

    module = create_csn(
        model_depth=50, model_num_class=5, dropout_rate=0.0, stem_dim_out=8, head_pool_kernel_size=(1, 2, 2)
    )
    return module, (normal(2, 3, 8, 32, 32),)


@model("video", source="torchvision, models/video/resnet.py: R(2+1)D with one block a stage")
def r2plus1d():
    from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

    module = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1, 1, 1, 1], R2Plus1dStem, num_classes=5)
    return module, (normal(2, 3, 8, 32, 32),)


class MaxPool3dSamePadding(nn.MaxPool3d):
    def compute_pad(self, dim, s):
        if s % self.stride[dim] == 0:
            return max(self.kernel_size[dim] - self.stride[dim], 0)
        else:
            return max(self.kernel_size[dim] - (s % self.stride[dim]), 0)

    def forward(self, x):
        (_, _, t, h, w) = x.size()
        pad_t = self.compute_pad(0, t)
        pad_h = self.compute_pad(1, h)
        pad_w = self.compute_pad(2, w)
        pad_t_f = pad_t // 2
        pad_h_f = pad_h // 2
        pad_w_f = pad_w // 2
        pad = (pad_w_f, pad_w - pad_w_f, pad_h_f, pad_h - pad_h_f, pad_t_f, pad_t - pad_t_f)
        x = F.pad(x, pad)
        return super().forward(x)


class Unit3D(nn.Module):
    def __init__(self, in_channels, output_channels, kernel_shape=(1, 1, 1), stride=(1, 1, 1), use_batch_norm=True):
        super().__init__()
        self._kernel_shape, self._stride, self._use_batch_norm = kernel_shape, stride, use_batch_norm
        self._activation_fn = F.relu if use_batch_norm else None
        self.conv3d = nn.Conv3d(in_channels, output_channels, kernel_shape, stride, padding=0, bias=not use_batch_norm)
        if self._use_batch_norm:
            self.bn = nn.BatchNorm3d(output_channels, eps=0.001, momentum=0.01)

    def compute_pad(self, dim, s):
        if s % self._stride[dim] == 0:
            return max(self._kernel_shape[dim] - self._stride[dim], 0)
        else:
            return max(self._kernel_shape[dim] - (s % self._stride[dim]), 0)

    def forward(self, x):
        (_, _, *sizes) = x.size()
        pads = [self.compute_pad(i, s) for i, s in enumerate(sizes)]
        x = F.pad(x, [p for pad in reversed(pads) for p in (pad // 2, pad - pad // 2)])
        x = self.conv3d(x)
        if self._use_batch_norm:
            x = self.bn(x)
        if self._activation_fn is not None:
            x = self._activation_fn(x)
        return x


class InceptionModule(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.b0 = Unit3D(inputs, outputs[0])
        self.b1a = Unit3D(inputs, outputs[1])
        self.b1b = Unit3D(outputs[1], outputs[2], (3, 3, 3))
        self.b2a = Unit3D(inputs, outputs[3])
        self.b2b = Unit3D(outputs[3], outputs[4], (3, 3, 3))
        self.b3a = MaxPool3dSamePadding(kernel_size=[3, 3, 3], stride=(1, 1, 1), padding=0)
        self.b3b = Unit3D(inputs, outputs[5])

    def forward(self, x):
        b0 = self.b0(x)
        b1 = self.b1b(self.b1a(x))
        b2 = self.b2b(self.b2a(x))
        b3 = self.b3b(self.b3a(x))
        return torch.cat([b0, b1, b2, b3], dim=1)


class I3D(nn.Module):
    VALID_ENDPOINTS = ("Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Mixed_3b", "MaxPool3d_4a_3x3", "Mixed_4b")

    def __init__(self, num_classes=5, spatial_squeeze=True):
        super().__init__()
        self._spatial_squeeze = spatial_squeeze
        self.end_points = {
            "Conv3d_1a_7x7": Unit3D(3, 8, [7, 7, 7], (2, 2, 2)),
            "MaxPool3d_2a_3x3": MaxPool3dSamePadding(kernel_size=[1, 3, 3], stride=(1, 2, 2), padding=0),
            "Mixed_3b": InceptionModule(8, [4, 6, 8, 4, 6, 4]),
            "MaxPool3d_4a_3x3": MaxPool3dSamePadding(kernel_size=[3, 3, 3], stride=(2, 2, 2), padding=0),
            "Mixed_4b": InceptionModule(22, [6, 8, 10, 6, 8, 6]),
        }
        self.avg_pool = nn.AvgPool3d(kernel_size=[2, 3, 4], stride=(1, 1, 1))
        self.dropout = nn.Dropout(0.5)
        self.logits = Unit3D(30, num_classes, use_batch_norm=False)
        self.build()

    def build(self):
        for k in self.end_points:
            self.add_module(k, self.end_points[k])

    def forward(self, x):
        for end_point in self.VALID_ENDPOINTS:
            if end_point in self.end_points:
                x = self._modules[end_point](x)
        x = self.logits(self.dropout(self.avg_pool(x)))
        if self._spatial_squeeze:
            logits = x.squeeze(3).squeeze(3)
        return logits


@model("video", source="https://github.com/piergiaj/pytorch-i3d, pytorch_i3d.py")
def i3d():
    return I3D(), (normal(2, 3, 12, 21, 32),)


class TemporalShift(nn.Module):
    def __init__(self, net, n_segment=3, n_div=8):
        super().__init__()
        self.net, self.n_segment, self.fold_div = net, n_segment, n_div

    def forward(self, x):
        x = self.shift(x, self.n_segment, fold_div=self.fold_div)
        return self.net(x)

    @staticmethod
    def shift(x, n_segment, fold_div=3):
        nt, c, h, w = x.size()
        n_batch = nt // n_segment
        x = x.view(n_batch, n_segment, c, h, w)
        fold = c // fold_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)


class TSN(nn.Module):
    """A network for images on each segment, its blocks shifted in time; consensus by the mean."""

    def __init__(self, num_segments=4, num_class=5):
        import torchvision

        super().__init__()
        self.num_segments, self.num_class = num_segments, num_class
        self.base_model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        for stage in (self.base_model.layer1, self.base_model.layer2, self.base_model.layer3, self.base_model.layer4):
            for block in stage.children():
                block.conv1 = TemporalShift(block.conv1, num_segments)
        feature_dim = self.base_model.fc.in_features
        self.base_model.fc = nn.Dropout(p=0.5)
        self.new_fc = nn.Linear(feature_dim, num_class)
        self._enable_pbn = True

    def train(self, mode=True):
        """Partial BN: all but the first BatchNorm stay in eval mode, their weights without gradient."""
        super().train(mode)
        count = 0
        if self._enable_pbn and mode:
            for m in self.base_model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    count += 1
                    if count >= 2:
                        m.eval()
                        m.weight.requires_grad = False
                        m.bias.requires_grad = False
        return self

    def forward(self, input):
        sample_len = 3
        base_out = self.base_model(input.view((-1, sample_len, *input.size()[-2:])))
        base_out = self.new_fc(base_out)
        base_out = base_out.view((-1, self.num_segments, *base_out.size()[1:]))
        output = base_out.mean(dim=1, keepdim=True)
        return output.squeeze(1)


@model("video", source="https://github.com/mit-han-lab/temporal-shift-module, ops/temporal_shift.py and ops/models.py")
def tsm():
    return TSN(), (normal(2, 12, 32, 32),)


class ConvLSTMCell(nn.Module):
    def __init__(self, input_dim, hidden_dim, kernel_size, bias):
        super().__init__()
        self.hidden_dim = hidden_dim
        padding = kernel_size[0] // 2, kernel_size[1] // 2
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=padding, bias=bias)
        self.norm = nn.BatchNorm2d(4 * hidden_dim)

    def forward(self, input_tensor, cur_state):
        h_cur, c_cur = cur_state
        combined = torch.cat([input_tensor, h_cur], dim=1)
        combined_conv = self.norm(self.conv(combined))
        cc_i, cc_f, cc_o, cc_g = torch.split(combined_conv, self.hidden_dim, dim=1)
        i = torch.sigmoid(cc_i)
        f = torch.sigmoid(cc_f)
        o = torch.sigmoid(cc_o)
        g = torch.tanh(cc_g)
        c_next = f * c_cur + i * g
        h_next = o * torch.tanh(c_next)
        return h_next, c_next

    def init_hidden(self, batch_size, image_size):
        height, width = image_size
        zeros = torch.zeros(batch_size, self.hidden_dim, height, width, device=self.conv.weight.device)
        return zeros.to(self.conv.weight.dtype), zeros.to(self.conv.weight.dtype)


class ConvLSTM(nn.Module):
    def __init__(self, input_dim, hidden_dim, kernel_size, num_layers, batch_first=False, return_all_layers=False):
        super().__init__()
        self.num_layers, self.batch_first, self.return_all_layers = num_layers, batch_first, return_all_layers
        cells = [
            ConvLSTMCell(input_dim if i == 0 else hidden_dim[i - 1], hidden_dim[i], kernel_size, True)
            for i in range(num_layers)
        ]
        self.cell_list = nn.ModuleList(cells)

    def forward(self, input_tensor, hidden_state=None):
        if not self.batch_first:
            input_tensor = input_tensor.permute(1, 0, 2, 3, 4)
        b, _, _, h, w = input_tensor.size()
        if hidden_state is not None:
            raise NotImplementedError()
        hidden_state = [cell.init_hidden(batch_size=b, image_size=(h, w)) for cell in self.cell_list]
        layer_output_list, last_state_list = [], []
        seq_len = input_tensor.size(1)
        cur_layer_input = input_tensor
        for layer_idx in range(self.num_layers):
            h, c = hidden_state[layer_idx]
            output_inner = []
            for t in range(seq_len):
                h, c = self.cell_list[layer_idx](cur_layer_input[:, t, :, :, :], cur_state=[h, c])
                output_inner.append(h)
            layer_output = torch.stack(output_inner, dim=1)
            cur_layer_input = layer_output
            layer_output_list.append(layer_output)
            last_state_list.append([h, c])
        if not self.return_all_layers:
            layer_output_list = layer_output_list[-1:]
            last_state_list = last_state_list[-1:]
        return layer_output_list, last_state_list


@model("video", source="https://github.com/ndrplz/ConvLSTM_pytorch, convlstm.py; BatchNorm on the gates")
def convlstm():
    return ConvLSTM(3, [6, 8], (3, 3), 2, batch_first=True), (normal(2, 5, 3, 12, 12),)
