"""Equivariant networks: groups of the plane and of space, BatchNorm over fields."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import integers, model, normal


class Wrapped(nn.Module):
    """What is a geometric tensor goes in and out as a tensor."""

    def __init__(self, in_type, body, head):
        super().__init__()
        self.in_type, self.body, self.head = in_type, body, head

    def forward(self, x):
        import e2cnn.nn

        x = e2cnn.nn.GeometricTensor(x, self.in_type)
        x = self.body(x).tensor
        return self.head(x.flatten(2).mean(2))


def e2(nn_, space, hidden=2):
    """Two steerable convolutions over regular fields."""
    in_type = nn_.FieldType(space, [space.trivial_repr])
    mid = nn_.FieldType(space, hidden * [space.regular_repr])
    body = nn_.SequentialModule(
        nn_.R2Conv(in_type, mid, kernel_size=5, padding=2, bias=False),
        nn_.InnerBatchNorm(mid),
        nn_.ReLU(mid, inplace=True),
        nn_.PointwiseAvgPoolAntialiased(mid, sigma=0.66, stride=2),
        nn_.R2Conv(mid, mid, kernel_size=3, padding=1, bias=False),
        nn_.InnerBatchNorm(mid),
        nn_.ReLU(mid, inplace=True),
        nn_.GroupPooling(mid),
    )
    head = nn.Sequential(nn.Linear(hidden, 6), nn.BatchNorm1d(6), nn.ELU(inplace=True), nn.Linear(6, 3))
    return Wrapped(in_type, body, head), (normal(6, 1, 13, 13),)


@model("equivariant", source="e2cnn, README's example over rotations by 90 degrees: regular fields")
def e2cnn_regular():
    import e2cnn.nn
    from e2cnn import gspaces

    return e2(e2cnn.nn, gspaces.Rot2dOnR2(N=4))


class E3(nn.Module):
    """Messages by tensor products whose weights a radial network gives; e3nn's BatchNorm by the fields' norms."""

    def __init__(self):
        super().__init__()
        from e3nn import o3
        from e3nn.nn import BatchNorm, FullyConnectedNet, Gate

        self.irreps_sh = o3.Irreps.spherical_harmonics(2)
        self.gate = Gate("4x0e", [torch.tanh], "3x0e", [torch.sigmoid], "2x1o+1x2e")
        self.tp = o3.FullyConnectedTensorProduct("3x0e", self.irreps_sh, self.gate.irreps_in, shared_weights=False)
        self.fc = FullyConnectedNet([4, 8, self.tp.weight_numel], F.silu)
        self.bn = BatchNorm(self.gate.irreps_out)
        self.scalars = nn.BatchNorm1d(4)
        self.out = o3.Linear(self.gate.irreps_out, "1x0e+1x1o")

    def forward(self, x, positions, edge_index):
        from e3nn import o3
        from e3nn.math import soft_one_hot_linspace

        src, dst = edge_index
        vector = positions[src] - positions[dst]
        sh = o3.spherical_harmonics(self.irreps_sh, vector, normalize=True, normalization="component")
        emb = soft_one_hot_linspace(vector.norm(dim=1), 0.0, 4.0, 4, basis="smooth_finite", cutoff=True).mul(4**0.5)
        message = self.tp(x[src], sh, self.fc(emb))
        out = x.new_zeros(len(x), message.shape[1]).index_add(0, dst, message).div(2.0)
        out = self.bn(self.gate(out))
        scalars = self.scalars(out[:, :4])
        out = torch.cat([scalars, out[:, 4:]], dim=1)
        return self.out(out)


@model("equivariant", source="e3nn, docs/guide/convolution and e3nn.nn.BatchNorm: running statistics of its own")
def e3nn_convolution():
    edges = integers(10, 2, 24)
    edges[1] = (edges[1] + (edges[0] == edges[1])) % 10
    return E3(), (normal(10, 3), normal(10, 3, seed=1), edges)


class P4ConvZ2(nn.Module):
    """Lifts to the group of rotations by 90 degrees: the filter's four turns, by indices that are kept."""

    def __init__(self, in_channels, out_channels, kernel, input_stabilizer=1):
        super().__init__()
        self.out_channels, self.input_stabilizer = out_channels, input_stabilizer
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, input_stabilizer, kernel, kernel))
        stdv = 1.0 / math.sqrt(in_channels * input_stabilizer * kernel * kernel)
        nn.init.uniform_(self.weight, -stdv, stdv)
        self.inds = self.make_transformation_indices(input_stabilizer, kernel)

    @staticmethod
    def make_transformation_indices(stabilizer, k):
        grid = torch.arange(stabilizer * k * k).view(stabilizer, k, k)
        turned = [torch.roll(torch.rot90(grid, r, (1, 2)), r if stabilizer == 4 else 0, 0) for r in range(4)]
        return torch.stack(turned).numpy()

    def forward(self, x):
        w = self.weight.view(self.weight.size(0), self.weight.size(1), -1)
        tw = w[:, :, self.inds.reshape(-1)].view(w.size(0), w.size(1), *self.inds.shape)
        tw = tw.permute(0, 2, 1, 3, 4, 5).contiguous()
        k = self.weight.size(-1)
        tw = tw.view(self.out_channels * 4, -1, k, k)
        size = x.size()
        x = x.view(size[0], -1, size[-2], size[-1])
        y = F.conv2d(x, weight=tw, bias=None, padding=k // 2)
        batch_size, _, ny, nx = y.size()
        return y.view(batch_size, self.out_channels, 4, ny, nx)


class GCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = P4ConvZ2(1, 4, 3), P4ConvZ2(4, 6, 3, input_stabilizer=4)
        self.bn1, self.bn2 = nn.BatchNorm3d(4), nn.BatchNorm3d(6)
        self.fc = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        xs = x.size()
        x = F.max_pool2d(x.view(xs[0], xs[1] * xs[2], xs[3], xs[4]), 2)
        x = x.view(xs[0], xs[1], xs[2], x.size(2), x.size(3))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((-1, -2)).view(x.size()[0], -1))


@model("equivariant", source="https://github.com/adambielski/GrouPy, gconv/pytorch_gconv/splitgconv2d.py")
def group_convolution():
    return GCNN(), (normal(6, 1, 8, 8),)


class HarmonicConv(nn.Module):
    """Complex filters R(r) exp(i(m theta + b)), made of rings' weights in forward; BatchNorm of magnitudes."""

    def __init__(self, n_in, n_out, orders, size=5, rings=3):
        super().__init__()
        self.orders = orders
        self.radial = nn.ParameterDict({str(m): nn.Parameter(torch.randn(rings, n_in, n_out) * 0.3) for m in orders})
        self.phase = nn.ParameterDict({str(m): nn.Parameter(torch.rand(n_in, n_out) * 6) for m in orders})
        y, x = torch.meshgrid(torch.arange(size) - size // 2, torch.arange(size) - size // 2, indexing="ij")
        self.register_buffer("r", torch.hypot(x.float(), y.float()))
        self.register_buffer("theta", torch.atan2(y.float(), x.float()))
        self.bns = nn.ModuleDict({str(m): nn.BatchNorm2d(n_out) for m in orders})

    def forward(self, x):
        outputs = {}
        rings = torch.arange(3).to(self.r)
        gauss = torch.exp(-((self.r[None] - rings[:, None, None]) ** 2) / 0.5)
        for m in self.orders:
            w = torch.einsum("rhw,rio->oihw", gauss, self.radial[str(m)])
            angle = m * self.theta[None, None] + self.phase[str(m)].t()[:, :, None, None]
            kernel = torch.polar(w.abs() + 1e-6, angle)
            y = torch.complex(F.conv2d(x, kernel.real, padding=2), F.conv2d(x, kernel.imag, padding=2))
            magnitude = torch.sqrt(y.real.square() + y.imag.square() + 1e-4)
            scale = F.relu(self.bns[str(m)](magnitude)) / magnitude
            outputs[m] = y * scale
        return outputs


class HarmonicNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = HarmonicConv(1, 4, (0, 1))
        self.second = HarmonicConv(8, 4, (0,))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        out = self.first(x)
        x = torch.cat([torch.view_as_real(y).norm(dim=-1) for y in out.values()], 1)
        return self.head(self.second(x)[0].abs().mean((2, 3)))


@model(
    "equivariant",
    source="https://github.com/jacobjma/harmonic-nets and danielewworrall/harmonicConvolutions: complex numbers",
)
def harmonic_net():
    return HarmonicNet(), (normal(6, 1, 9, 9),)


class EGNNLayer(nn.Module):
    """E(n)-equivariant messages; BatchNorm of scalars only, of nodes and edges."""

    def __init__(self, width):
        super().__init__()
        self.edge_mlp = nn.Sequential(
            nn.Linear(2 * width + 1, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.node_mlp = nn.Sequential(
            nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, width)
        )
        layer = nn.Linear(width, 1, bias=False)
        nn.init.xavier_uniform_(layer.weight, gain=0.1)
        self.coord_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), layer, nn.Tanh())

    def forward(self, h, edge_index, coord):
        row, col = edge_index
        coord_diff = coord[row] - coord[col]
        radial = torch.sum(coord_diff**2, 1).unsqueeze(1)
        norm = torch.sqrt(radial).detach() + 1e-8
        coord_diff = coord_diff / norm
        m = self.edge_mlp(torch.cat([h[row], h[col], radial], dim=1))
        trans = coord_diff * self.coord_mlp(m)
        coord = coord + unsorted_segment_mean(trans, row, num_segments=coord.size(0))
        agg = unsorted_segment_sum(m, row, num_segments=h.size(0))
        return h + self.node_mlp(torch.cat([h, agg], dim=1)), coord


def unsorted_segment_sum(data, segment_ids, num_segments):
    result_shape = (num_segments, data.size(1))
    result = data.new_full(result_shape, 0)
    segment_ids = segment_ids.unsqueeze(-1).expand(-1, data.size(1))
    result.scatter_add_(0, segment_ids, data)
    return result


def unsorted_segment_mean(data, segment_ids, num_segments):
    result_shape = (num_segments, data.size(1))
    segment_ids = segment_ids.unsqueeze(-1).expand(-1, data.size(1))
    result = data.new_full(result_shape, 0)
    count = data.new_full(result_shape, 0)
    result.scatter_add_(0, segment_ids, data)
    count.scatter_add_(0, segment_ids, torch.ones_like(data))
    return result / count.clamp(min=1)


class EGNN(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding_in, self.embedding_out = nn.Linear(4, width), nn.Linear(width, 2)
        for i in range(2):
            self.add_module(f"gcl_{i}", EGNNLayer(width))

    def forward(self, h, x, edges):
        h = self.embedding_in(h)
        for i in range(2):
            h, x = self._modules[f"gcl_{i}"](h, edges, x)
        return self.embedding_out(h), x


@model("equivariant", source="https://github.com/vgsatorras/egnn, models/egnn_clean/egnn_clean.py")
def egnn():
    edges = torch.tensor([[i, j] for i in range(8) for j in range(8) if i != j]).t().contiguous()
    return EGNN(), (normal(8, 4), normal(8, 3, seed=1), edges)


class VNLinearLeakyReLU(nn.Module):
    """Vector neurons: BatchNorm of vectors' lengths."""

    def __init__(self, n_in, n_out, negative_slope=0.2):
        super().__init__()
        self.negative_slope = negative_slope
        self.map_to_feat, self.map_to_dir = nn.Linear(n_in, n_out, bias=False), nn.Linear(n_in, n_out, bias=False)
        self.bn = nn.BatchNorm1d(n_out)

    def forward(self, x):
        p = self.map_to_feat(x.transpose(1, -1)).transpose(1, -1)
        norm = torch.norm(p, dim=2) + 1e-6
        norm_bn = self.bn(norm)
        norm, norm_bn = norm.unsqueeze(2), norm_bn.unsqueeze(2)
        p = p / norm * norm_bn
        d = self.map_to_dir(x.transpose(1, -1)).transpose(1, -1)
        dotprod = (p * d).sum(2, keepdims=True)
        mask = (dotprod >= 0).to(p)
        d_norm_sq = (d * d).sum(2, keepdims=True)
        slope = self.negative_slope
        return slope * p + (1 - slope) * (mask * p + (1 - mask) * (p - (dotprod / (d_norm_sq + 1e-6)) * d))


class VNPointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.vn1, self.vn2 = VNLinearLeakyReLU(1, 4), VNLinearLeakyReLU(4, 6)
        self.std = nn.Linear(6, 3, bias=False)
        self.head = nn.Sequential(nn.Linear(18, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        x = self.vn2(self.vn1(x.unsqueeze(1)))
        z = self.std(x.transpose(1, -1)).transpose(1, -1)
        z = z.transpose(1, 2)
        invariant = torch.einsum("bijm,bjkm->bikm", x, z)
        x = invariant.mean(-1).reshape(x.size(0), -1)
        return self.head(x)


@model("equivariant", source="https://github.com/FlyingGiraffe/vnn, models/vn_layers.py")
def vector_neurons():
    return VNPointNet(), (normal(6, 3, 10),)
