"""Text in images: detection, rectification, recognition."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from . import integers, model, normal


class BidirectionalLSTM(nn.Module):
    def __init__(self, nIn, nHidden, nOut):
        super().__init__()
        self.rnn = nn.LSTM(nIn, nHidden, bidirectional=True)
        self.embedding = nn.Linear(nHidden * 2, nOut)

    def forward(self, input):
        recurrent, _ = self.rnn(input)
        T, b, h = recurrent.size()
        t_rec = recurrent.view(T * b, h)
        output = self.embedding(t_rec)
        output = output.view(T, b, -1)
        return output


class CRNN(nn.Module):
    def __init__(self, nc=1, nclass=12, nh=12, leakyRelu=False):
        super().__init__()
        ks, ps, ss = [3, 3, 3, 3, 3, 3, 2], [1, 1, 1, 1, 1, 1, 0], [1] * 7
        nm = [8, 12, 16, 16, 24, 24, 24]
        cnn = nn.Sequential()

        def convRelu(i, batchNormalization=False):
            nIn = nc if i == 0 else nm[i - 1]
            cnn.add_module(f"conv{i}", nn.Conv2d(nIn, nm[i], ks[i], ss[i], ps[i]))
            if batchNormalization:
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(nm[i]))
            cnn.add_module(f"relu{i}", nn.LeakyReLU(0.2, inplace=True) if leakyRelu else nn.ReLU(True))

        convRelu(0)
        cnn.add_module("pooling0", nn.MaxPool2d(2, 2))
        convRelu(1)
        cnn.add_module("pooling1", nn.MaxPool2d(2, 2))
        convRelu(2, True)
        convRelu(3)
        cnn.add_module("pooling2", nn.MaxPool2d((2, 2), (2, 1), (0, 1)))
        convRelu(4, True)
        convRelu(5)
        cnn.add_module("pooling3", nn.MaxPool2d((2, 2), (2, 1), (0, 1)))
        convRelu(6, True)
        self.cnn = cnn
        self.rnn = nn.Sequential(BidirectionalLSTM(nm[-1], nh, nh), BidirectionalLSTM(nh, nh, nclass))

    def forward(self, input):
        conv = self.cnn(input)
        _b, _c, h, _w = conv.size()
        assert h == 1, "the height of conv must be 1"
        conv = conv.squeeze(2)
        conv = conv.permute(2, 0, 1)
        output = self.rnn(conv)
        return output


@model("ocr", source="https://github.com/meijieru/crnn.pytorch, models/crnn.py")
def crnn():
    return CRNN(), (normal(4, 1, 32, 48),)


class CTC(nn.Module):
    """In training the loss as the trainer computes it, else the characters' probabilities."""

    def __init__(self):
        super().__init__()
        self.crnn = CRNN()
        self.criterion = nn.CTCLoss(zero_infinity=True)

    def forward(self, images, text):
        preds = self.crnn(images)
        batch_size = images.size(0)
        if not self.training:
            return preds.softmax(2)
        preds_size = torch.IntTensor([preds.size(0)] * batch_size)
        length = torch.IntTensor([text.size(1)] * batch_size)
        return self.criterion(preds.log_softmax(2), text, preds_size, length)


@model("ocr", source="https://github.com/clovaai/deep-text-recognition-benchmark, train.py: CTCLoss on a CRNN")
def crnn_ctc_loss():
    return CTC(), (normal(4, 1, 32, 48), 1 + integers(11, 4, 4))


def compute_partial_repr(input_points, control_points):
    N = input_points.size(0)
    M = control_points.size(0)
    pairwise_diff = input_points.view(N, 1, 2) - control_points.view(1, M, 2)
    pairwise_diff_square = pairwise_diff * pairwise_diff
    pairwise_dist = pairwise_diff_square[:, :, 0] + pairwise_diff_square[:, :, 1]
    repr_matrix = 0.5 * pairwise_dist * torch.log(pairwise_dist)
    mask = repr_matrix != repr_matrix
    repr_matrix.masked_fill_(mask, 0)
    return repr_matrix


def build_output_control_points(num_control_points, margins):
    margin_x, margin_y = margins
    num_ctrl_pts_per_side = num_control_points // 2
    ctrl_pts_x = torch.linspace(margin_x, 1.0 - margin_x, num_ctrl_pts_per_side)
    ctrl_pts_top = torch.stack([ctrl_pts_x, torch.ones(num_ctrl_pts_per_side) * margin_y], dim=1)
    ctrl_pts_bottom = torch.stack([ctrl_pts_x, torch.ones(num_ctrl_pts_per_side) * (1.0 - margin_y)], dim=1)
    return torch.cat([ctrl_pts_top, ctrl_pts_bottom], dim=0)


class TPSSpatialTransformer(nn.Module):
    def __init__(self, output_image_size, num_control_points, margins):
        super().__init__()
        self.output_image_size, self.num_control_points = output_image_size, num_control_points
        self.target_height, self.target_width = output_image_size
        target_control_points = build_output_control_points(num_control_points, margins)
        N = num_control_points
        forward_kernel = torch.zeros(N + 3, N + 3)
        target_control_partial_repr = compute_partial_repr(target_control_points, target_control_points)
        forward_kernel[:N, :N].copy_(target_control_partial_repr)
        forward_kernel[:N, -3].fill_(1)
        forward_kernel[-3, :N].fill_(1)
        forward_kernel[:N, -2:].copy_(target_control_points)
        forward_kernel[-2:, :N].copy_(target_control_points.transpose(0, 1))
        inverse_kernel = torch.inverse(forward_kernel)
        HW = self.target_height * self.target_width
        target_coordinate = list(itertools.product(range(self.target_height), range(self.target_width)))
        target_coordinate = torch.Tensor(target_coordinate)
        Y, X = target_coordinate.split(1, dim=1)
        Y = Y / (self.target_height - 1)
        X = X / (self.target_width - 1)
        target_coordinate = torch.cat([X, Y], dim=1)
        target_coordinate_partial_repr = compute_partial_repr(target_coordinate, target_control_points)
        target_coordinate_repr = torch.cat(
            [target_coordinate_partial_repr, torch.ones(HW, 1), target_coordinate], dim=1
        )
        self.register_buffer("inverse_kernel", inverse_kernel)
        self.register_buffer("padding_matrix", torch.zeros(3, 2))
        self.register_buffer("target_coordinate_repr", target_coordinate_repr)
        self.register_buffer("target_control_points", target_control_points)

    def forward(self, input, source_control_points):
        assert source_control_points.ndimension() == 3
        assert source_control_points.size(1) == self.num_control_points
        assert source_control_points.size(2) == 2
        batch_size = source_control_points.size(0)
        Y = torch.cat([source_control_points, self.padding_matrix.expand(batch_size, 3, 2)], 1)
        mapping_matrix = torch.matmul(self.inverse_kernel, Y)
        source_coordinate = torch.matmul(self.target_coordinate_repr, mapping_matrix)
        grid = source_coordinate.view(-1, self.target_height, self.target_width, 2)
        grid = torch.clamp(grid, 0, 1)
        grid = 2.0 * grid - 1.0
        return F.grid_sample(input, grid, align_corners=False), source_coordinate


def conv3x3_block(in_planes, out_planes, stride=1):
    return nn.Sequential(
        nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=1, padding=1),
        nn.BatchNorm2d(out_planes),
        nn.ReLU(inplace=True),
    )


class STNHead(nn.Module):
    def __init__(self, in_planes, num_ctrlpoints):
        super().__init__()
        self.num_ctrlpoints = num_ctrlpoints
        self.stn_convnet = nn.Sequential(
            *(conv3x3_block(in_planes, 8), nn.MaxPool2d(kernel_size=2, stride=2)),
            *(conv3x3_block(8, 12), nn.MaxPool2d(kernel_size=2, stride=2)),
            conv3x3_block(12, 16),
        )
        self.stn_fc1 = nn.Sequential(nn.Linear(4 * 8 * 16, 24), nn.BatchNorm1d(24), nn.ReLU(inplace=True))
        self.stn_fc2 = nn.Linear(24, num_ctrlpoints * 2)
        margin = 0.01
        xs = torch.linspace(margin, 1.0 - margin, num_ctrlpoints // 2)
        points = torch.cat([torch.stack([xs, torch.full_like(xs, y)], 1) for y in (margin, 1.0 - margin)])
        self.stn_fc2.weight.data.mul_(0.01)
        self.stn_fc2.bias.data = points.view(-1)

    def forward(self, x):
        x = self.stn_convnet(x)
        batch_size, _, _h, _w = x.size()
        x = x.view(batch_size, -1)
        img_feat = self.stn_fc1(x)
        x = self.stn_fc2(0.1 * img_feat)
        x = x.view(-1, self.num_ctrlpoints, 2)
        return img_feat, x


class AttentionDecoder(nn.Module):
    """A step a character: attention over the sequence, a GRU; teacher forcing in training, its own argmax otherwise."""

    def __init__(self, num_classes, in_planes, s_dim, att_dim, max_len):
        super().__init__()
        self.num_classes, self.s_dim, self.max_len = num_classes, s_dim, max_len
        self.s_embed, self.x_embed = nn.Linear(s_dim, att_dim), nn.Linear(in_planes, att_dim)
        self.w_embed = nn.Linear(att_dim, 1)
        self.tgt_embedding = nn.Embedding(num_classes + 1, att_dim)
        self.gru = nn.GRU(input_size=in_planes + att_dim, hidden_size=s_dim, batch_first=True)
        self.fc = nn.Linear(s_dim, num_classes)

    def step(self, x, state, y_prev):
        batch_size, T, _ = x.size()
        x_proj = self.x_embed(x.view(-1, x.size(2))).view(batch_size, T, -1)
        s_proj = torch.unsqueeze(self.s_embed(state.squeeze(0)), 1).expand(batch_size, T, x_proj.size(2))
        v_proj = self.w_embed(torch.tanh(s_proj + x_proj).view(batch_size * T, -1)).view(batch_size, T)
        alpha = F.softmax(v_proj, dim=1)
        context = torch.bmm(alpha.unsqueeze(1), x).squeeze(1)
        y_proj = self.tgt_embedding(y_prev.long())
        output, state = self.gru(torch.cat([y_proj, context], 1).unsqueeze(1), state)
        return self.fc(output.squeeze(1)), state

    def forward(self, x, targets):
        batch_size = x.size(0)
        state = torch.zeros(1, batch_size, self.s_dim).to(x)
        outputs = []
        predicted = None
        for i in range(self.max_len):
            if i == 0:
                y_prev = torch.zeros(batch_size).fill_(self.num_classes)
            elif self.training:
                y_prev = targets[:, i - 1]
            else:
                y_prev = predicted
            output, state = self.step(x, state, y_prev)
            predicted = output.max(1)[1]
            outputs.append(output)
        return torch.cat([_.unsqueeze(1) for _ in outputs], 1)


class ASTER(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.tps = TPSSpatialTransformer((16, 32), 8, (0.05, 0.05))
        self.stn_head = STNHead(3, 8)
        self.encoder = nn.Sequential(
            conv3x3_block(3, 8), nn.MaxPool2d(2), conv3x3_block(8, 16), nn.MaxPool2d((8, 1), (8, 1))
        )
        self.rnn = nn.LSTM(16, 8, bidirectional=True, num_layers=2, batch_first=True)
        self.decoder = AttentionDecoder(classes, 16, 12, 12, 4)

    def forward(self, x, rec_targets):
        stn_input = F.interpolate(x, [16, 32], mode="bilinear", align_corners=True)
        _, ctrl_points = self.stn_head(stn_input)
        x, _ = self.tps(x, ctrl_points)
        features = self.encoder(x)
        features = features.squeeze(2).transpose(2, 1)
        features, _ = self.rnn(features)
        return self.decoder(features.contiguous(), rec_targets)


@model(
    "ocr", source="https://github.com/ayumiymk/aster.pytorch, lib/models: tps_spatial_transformer, stn_head and others"
)
def aster():
    return ASTER(), (normal(4, 3, 24, 48), integers(10, 4, 4))


class DBHead(nn.Module):
    def __init__(self, in_channels, out_channels, k=50):
        super().__init__()
        self.k = k
        self.binarize = self._branch(in_channels)
        self.thresh = self._init_thresh(in_channels)

    def _branch(self, in_channels):
        return nn.Sequential(
            nn.Conv2d(in_channels, in_channels // 4, 3, padding=1),
            *(nn.BatchNorm2d(in_channels // 4), nn.ReLU(inplace=True)),
            nn.ConvTranspose2d(in_channels // 4, in_channels // 4, 2, 2),
            *(nn.BatchNorm2d(in_channels // 4), nn.ReLU(inplace=True)),
            nn.ConvTranspose2d(in_channels // 4, 1, 2, 2),
            nn.Sigmoid(),
        )

    def _init_thresh(self, inner_channels):
        in_channels = inner_channels
        return nn.Sequential(
            nn.Conv2d(in_channels, inner_channels // 4, 3, padding=1, bias=False),
            *(nn.BatchNorm2d(inner_channels // 4), nn.ReLU(inplace=True)),
            *(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(inner_channels // 4, inner_channels // 4, 3, 1, 1),
            ),
            *(nn.BatchNorm2d(inner_channels // 4), nn.ReLU(inplace=True)),
            nn.ConvTranspose2d(inner_channels // 4, 1, 2, 2),
            nn.Sigmoid(),
        )

    def forward(self, x):
        shrink_maps = self.binarize(x)
        threshold_maps = self.thresh(x)
        if self.training:
            binary_maps = self.step_function(shrink_maps, threshold_maps)
            y = torch.cat((shrink_maps, threshold_maps, binary_maps), dim=1)
        else:
            y = torch.cat((shrink_maps, threshold_maps), dim=1)
        return y

    def step_function(self, x, y):
        return torch.reciprocal(1 + torch.exp(-self.k * (x - y)))


class DBNet(nn.Module):
    """Resnet of small stages, FPN that adds and joins, the head of differentiable binarisation."""

    def __init__(self, inner=16):
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = (8, 12, 16, 24)
        self.stages = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(zip((8, *widths), widths, strict=False)):
            stride = 1 if i == 0 else 2
            down = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            self.stages.append(BasicBlock(n_in, n_out, stride, down))
        self.reduce = nn.ModuleList(self._conv(w, inner // 4, 1) for w in widths)
        self.smooth = nn.ModuleList(self._conv(inner // 4, inner // 4, 3) for _ in range(3))
        self.conv = self._conv(inner, inner, 3)
        self.head = DBHead(inner, 2)

    def _conv(self, i, o, k):
        return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

    def _upsample_add(self, x, y):
        return F.interpolate(x, size=y.size()[2:]) + y

    def forward(self, x):
        _, _, H, W = x.size()
        x = self.stem(x)
        feats = []
        for stage in self.stages:
            x = stage(x)
            feats.append(x)
        c2, c3, c4, c5 = feats
        p5 = self.reduce[3](c5)
        p4 = self.smooth[0](self._upsample_add(p5, self.reduce[2](c4)))
        p3 = self.smooth[1](self._upsample_add(p4, self.reduce[1](c3)))
        p2 = self.smooth[2](self._upsample_add(p3, self.reduce[0](c2)))
        h, w = p2.size()[2:]
        joined = torch.cat([p2, *(F.interpolate(p, size=(h, w)) for p in (p3, p4, p5))], dim=1)
        y = self.head(self.conv(joined))
        return F.interpolate(y, size=(H, W), mode="bilinear", align_corners=True)


@model("ocr", source="https://github.com/WenmuZhou/DBNet.pytorch, models: neck/FPN.py and head/DBHead.py")
def dbnet():
    return DBNet(), (normal(2, 3, 60, 84),)


class EAST(nn.Module):
    def __init__(self, scope=512):
        super().__init__()
        layers, channels = [], 3
        for v in (8, "M", 12, "M", 16, 16, "M", 16, "M", 24, "M"):
            if v == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels, v, kernel_size=3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                channels = v
        self.features = nn.Sequential(*layers)
        self.convs1 = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in ((40, 16), (32, 12), (24, 8)))
        self.bns1 = nn.ModuleList(nn.BatchNorm2d(o) for o in (16, 12, 8))
        self.convs2 = nn.ModuleList(nn.Conv2d(o, o, 3, padding=1) for o in (16, 12, 8))
        self.bns2 = nn.ModuleList(nn.BatchNorm2d(o) for o in (16, 12, 8))
        self.conv7, self.bn7, self.relu7 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv_score, self.conv_loc, self.conv_angle = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)
        self.scope = scope

    def forward(self, x):
        out = []
        for m in self.features:
            x = m(x)
            if isinstance(m, nn.MaxPool2d):
                out.append(x)
        out = out[1:]
        y = out[3]
        for i, (conv1, bn1, conv2, bn2) in enumerate(zip(self.convs1, self.bns1, self.convs2, self.bns2, strict=True)):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            y = torch.cat((y, out[2 - i]), 1)
            y = F.relu(bn1(conv1(y)))
            y = F.relu(bn2(conv2(y)))
        y = self.relu7(self.bn7(self.conv7(y)))
        score = torch.sigmoid(self.conv_score(y))
        loc = torch.sigmoid(self.conv_loc(y)) * self.scope
        angle = (torch.sigmoid(self.conv_angle(y)) - 0.5) * 3.141592653589793
        geo = torch.cat((loc, angle), 1)
        return score, geo


@model("ocr", source="https://github.com/SakuraRiver/EAST, model.py")
def east():
    return EAST(), (normal(2, 3, 64, 96),)


class Mixing(nn.Module):
    """SVTR's block: local attention by a mask made when the block is built, or global; an MLP behind it."""

    def __init__(self, dim, num_heads, mixer, HW, local_k=(3, 5), prenorm=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.num_heads, self.scale, self.mixer, self.prenorm = num_heads, (dim // num_heads) ** -0.5, mixer, prenorm
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        if mixer == "Local":
            H, W = HW
            hk, wk = local_k
            mask = torch.ones(H * W, H + hk - 1, W + wk - 1)
            for h in range(0, H):
                for w in range(0, W):
                    mask[h * W + w, h : h + hk, w : w + wk] = 0.0
            mask_paddle = mask[:, hk // 2 : H + hk // 2, wk // 2 : W + wk // 2].flatten(1)
            mask_inf = torch.full([H * W, H * W], float("-inf"))
            mask = torch.where(mask_paddle < 1, mask_paddle, mask_inf)
            self.mask = mask[None, None, :]

    def attend(self, x):
        _, N, C = x.shape
        qkv = self.qkv(x).reshape((-1, N, 3, self.num_heads, C // self.num_heads)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q.matmul(k.permute(0, 1, 3, 2))
        if self.mixer == "Local":
            attn += self.mask
        attn = nn.functional.softmax(attn, dim=-1)
        return self.proj((attn.matmul(v)).permute(0, 2, 1, 3).reshape((-1, N, C)))

    def forward(self, x):
        if self.prenorm:
            x = self.norm1(x + self.attend(x))
            x = self.norm2(x + self.mlp(x))
        else:
            x = x + self.attend(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        return x


class SVTR(nn.Module):
    """Patches by convolutions with BatchNorm, mixing blocks, merging of heights, pooling to a line."""

    def __init__(self, size=(16, 48), dim=16, classes=12):
        super().__init__()
        self.HW = [size[0] // 4, size[1] // 4]
        self.embed = nn.Sequential(
            *(nn.Conv2d(3, dim // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(dim // 2), nn.GELU()),
            *(nn.Conv2d(dim // 2, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.GELU()),
        )
        self.pos_embed = nn.Parameter(torch.zeros([1, self.HW[0] * self.HW[1], dim]))
        self.blocks1 = nn.ModuleList([Mixing(dim, 2, "Local", self.HW) for _ in range(2)])
        self.merge_conv, self.merge_norm = nn.Conv2d(dim, 24, 3, (2, 1), 1), nn.LayerNorm(24)
        self.blocks2 = nn.ModuleList([Mixing(24, 2, "Global", None, prenorm=True)])
        self.avg_pool = nn.AdaptiveAvgPool2d([1, size[1] // 4])
        self.last_conv, self.hardswish = nn.Conv2d(24, 32, 1, bias=False), nn.Hardswish()
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        x = self.embed(x).flatten(2).permute(0, 2, 1)
        x = x + self.pos_embed
        for blk in self.blocks1:
            x = blk(x)
        x = self.merge_conv(x.permute(0, 2, 1).reshape([-1, 16, self.HW[0], self.HW[1]]))
        x = self.merge_norm(x.flatten(2).permute(0, 2, 1))
        for blk in self.blocks2:
            x = blk(x)
        x = self.avg_pool(x.permute(0, 2, 1).reshape([-1, 24, self.HW[0] // 2, self.HW[1]]))
        x = self.norm(self.hardswish(self.last_conv(x)).squeeze(2)).permute(0, 2, 1)
        x = self.head(x)
        if not self.training:
            x = F.softmax(x, dim=2)
        return x


@model("ocr", source="https://github.com/frotms/PaddleOCR2Pytorch, pytorchocr/modeling/backbones/rec_svtrnet.py")
def svtr():
    return SVTR(), (normal(4, 3, 16, 48),)


class SEBlock(nn.Module):
    def __init__(self, in_channels, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(in_channels, in_channels // reduction, 1)
        self.conv2 = nn.Conv2d(in_channels // reduction, in_channels, 1)

    def forward(self, inputs):
        outputs = self.avg_pool(inputs)
        outputs = F.relu(self.conv1(outputs))
        outputs = F.relu6(self.conv2(outputs) + 3.0, inplace=True) / 6.0
        return inputs * outputs


class RSELayer(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, shortcut=True):
        super().__init__()
        self.in_conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.se_block = SEBlock(out_channels)
        self.shortcut = shortcut

    def forward(self, ins):
        x = self.in_conv(ins)
        return x + self.se_block(x) if self.shortcut else self.se_block(x)


class PPDetection(nn.Module):
    """MobileNetV3's features, the RSEFPN neck, a DB head."""

    def __init__(self, out_channels=16):
        import torchvision

        super().__init__()
        settings = torchvision.models.mobilenetv3.InvertedResidualConfig
        rows = [(8, 3, 8, 8, True, "RE", 2), (8, 3, 24, 16, False, "RE", 2), (16, 5, 40, 24, True, "HS", 2)]
        config = [settings(*row, 1, 1.0) for row in rows]
        self.backbone = torchvision.models.MobileNetV3(config, 8, num_classes=2).features
        self.out_indices = (1, 2, 3)
        self.ins_conv = nn.ModuleList(RSELayer(w, out_channels, 1) for w in (8, 16, 24))
        self.inp_conv = nn.ModuleList(RSELayer(out_channels, out_channels // 4, 3) for _ in range(3))
        self.head = DBHead(12, 2)

    def forward(self, x):
        outputs = []
        for i, layer in enumerate(self.backbone):
            x = layer(x)
            if i in self.out_indices:
                outputs.append(x)
        in4, in3, in2 = (conv(c) for conv, c in zip(reversed(self.ins_conv), reversed(outputs), strict=True))
        out3 = in3 + F.interpolate(in4, scale_factor=2, mode="nearest")
        out2 = in2 + F.interpolate(out3, scale_factor=2, mode="nearest")
        p4, p3, p2 = (conv(o) for conv, o in zip(self.inp_conv, (in4, out3, out2), strict=True))
        p4 = F.interpolate(p4, scale_factor=4, mode="nearest")
        p3 = F.interpolate(p3, scale_factor=2, mode="nearest")
        return {"maps": self.head(torch.cat([p4, p3, p2], dim=1))}


@model("ocr", source="https://github.com/frotms/PaddleOCR2Pytorch, pytorchocr/modeling/necks/db_fpn.py: RSEFPN")
def pp_ocr():
    return PPDetection(), (normal(2, 3, 64, 64),)
