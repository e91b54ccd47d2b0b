"""Point clouds: neighbours by distances, samples by loops, grids by scattering."""

import torch
import torch.nn.functional as F
from torch import nn

from . import integers, model, normal


class STNkd(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.k = k
        self.conv1, self.conv2 = nn.Conv1d(k, 8, 1), nn.Conv1d(8, 16, 1)
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, k * k)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(8), nn.BatchNorm1d(16), nn.BatchNorm1d(8)

    def forward(self, x):
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 16)
        x = F.relu(self.bn3(self.fc1(x)))
        x = self.fc2(x)
        iden = torch.eye(self.k).flatten().view(1, self.k * self.k).repeat(batchsize, 1)
        x = x + iden
        return x.view(-1, self.k, self.k)


class PointNetSeg(nn.Module):
    def __init__(self):
        super().__init__()
        self.stn, self.fstn = STNkd(3), STNkd(8)
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 16, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm1d(16)
        self.head = nn.Sequential(nn.Conv1d(24, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1))

    def forward(self, x):
        n_pts = x.size()[2]
        trans = self.stn(x)
        x = x.transpose(2, 1)
        x = torch.bmm(x, trans)
        x = x.transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        trans_feat = self.fstn(x)
        x = torch.bmm(x.transpose(2, 1), trans_feat).transpose(2, 1)
        pointfeat = x
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 16).view(-1, 16, 1).repeat(1, 1, n_pts)
        x = self.head(torch.cat([x, pointfeat], 1))
        x = x.transpose(2, 1).contiguous()
        x = F.log_softmax(x.view(-1, 4), dim=-1).view(-1, n_pts, 4)
        iden = torch.eye(8)[None, :, :]
        regularizer = torch.mean(torch.norm(torch.bmm(trans_feat, trans_feat.transpose(2, 1)) - iden, dim=(1, 2)))
        return x, regularizer


@model("points", source="https://github.com/fxia22/pointnet.pytorch, pointnet/model.py")
def pointnet():
    return PointNetSeg(), (normal(4, 3, 16),)


def square_distance(src, dst):
    B, N, _ = src.shape
    _, M, _ = dst.shape
    dist = -2 * torch.matmul(src, dst.permute(0, 2, 1))
    dist += torch.sum(src**2, -1).view(B, N, 1)
    dist += torch.sum(dst**2, -1).view(B, 1, M)
    return dist


def index_points(points, idx):
    B = points.shape[0]
    view_shape = list(idx.shape)
    view_shape[1:] = [1] * (len(view_shape) - 1)
    repeat_shape = list(idx.shape)
    repeat_shape[0] = 1
    batch_indices = torch.arange(B, dtype=torch.long).view(view_shape).repeat(repeat_shape)
    return points[batch_indices, idx, :]


def farthest_point_sample(xyz, npoint):
    """Begins at the first point, where the original draws one."""
    B, N, _ = xyz.shape
    centroids = torch.zeros(B, npoint, dtype=torch.long)
    distance = torch.ones(B, N).to(xyz) * 1e10
    farthest = torch.zeros(B, dtype=torch.long)
    batch_indices = torch.arange(B, dtype=torch.long)
    for i in range(npoint):
        centroids[:, i] = farthest
        centroid = xyz[batch_indices, farthest, :].view(B, 1, 3)
        dist = torch.sum((xyz - centroid) ** 2, -1)
        mask = dist < distance
        distance[mask] = dist[mask]
        farthest = torch.max(distance, -1)[1]
    return centroids


def query_ball_point(radius, nsample, xyz, new_xyz):
    B, N, _ = xyz.shape
    _, S, _ = new_xyz.shape
    group_idx = torch.arange(N, dtype=torch.long).view(1, 1, N).repeat([B, S, 1])
    sqrdists = square_distance(new_xyz, xyz)
    group_idx[sqrdists > radius**2] = N
    group_idx = group_idx.sort(dim=-1)[0][:, :, :nsample]
    group_first = group_idx[:, :, 0].view(B, S, 1).repeat([1, 1, nsample])
    mask = group_idx == N
    group_idx[mask] = group_first[mask]
    return group_idx


class PointNetSetAbstraction(nn.Module):
    def __init__(self, npoint, radius, nsample, in_channel, mlp, group_all):
        super().__init__()
        self.npoint, self.radius, self.nsample, self.group_all = npoint, radius, nsample, group_all
        self.mlp_convs, self.mlp_bns = nn.ModuleList(), nn.ModuleList()
        for out_channel in mlp:
            self.mlp_convs.append(nn.Conv2d(in_channel, out_channel, 1))
            self.mlp_bns.append(nn.BatchNorm2d(out_channel))
            in_channel = out_channel

    def forward(self, xyz, points):
        xyz = xyz.permute(0, 2, 1)
        if points is not None:
            points = points.permute(0, 2, 1)
        B, N, C = xyz.shape
        if self.group_all:
            new_xyz = torch.zeros(B, 1, C).to(xyz.device)
            grouped = xyz.view(B, 1, N, C)
            new_points = grouped if points is None else torch.cat([grouped, points.view(B, 1, N, -1)], dim=-1)
        else:
            new_xyz = index_points(xyz, farthest_point_sample(xyz, self.npoint))
            idx = query_ball_point(self.radius, self.nsample, xyz, new_xyz)
            new_points = index_points(xyz, idx) - new_xyz.view(B, self.npoint, 1, C)
            if points is not None:
                new_points = torch.cat([new_points, index_points(points, idx)], dim=-1)
        new_points = new_points.permute(0, 3, 2, 1)
        for i, conv in enumerate(self.mlp_convs):
            new_points = F.relu(self.mlp_bns[i](conv(new_points)))
        new_points = torch.max(new_points, 2)[0]
        return new_xyz.permute(0, 2, 1), new_points


class PointNetFeaturePropagation(nn.Module):
    def __init__(self, in_channel, out):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(in_channel, out, 1), nn.BatchNorm1d(out)

    def forward(self, xyz1, xyz2, points1, points2):
        xyz1, xyz2, points2 = xyz1.permute(0, 2, 1), xyz2.permute(0, 2, 1), points2.permute(0, 2, 1)
        B, N, _ = xyz1.shape
        dists = square_distance(xyz1, xyz2)
        dists, idx = dists.sort(dim=-1)
        dists, idx = dists[:, :, :3], idx[:, :, :3]
        dist_recip = 1.0 / (dists + 1e-8)
        norm = torch.sum(dist_recip, dim=2, keepdim=True)
        weight = dist_recip / norm
        interpolated = torch.sum(index_points(points2, idx) * weight.view(B, N, 3, 1), dim=2)
        new_points = torch.cat([points1.permute(0, 2, 1), interpolated], dim=-1).permute(0, 2, 1)
        return F.relu(self.bn(self.conv(new_points)))


class PointNet2(nn.Module):
    def __init__(self):
        super().__init__()
        self.sa1 = PointNetSetAbstraction(6, 0.9, 4, 3, [6, 8], False)
        self.sa2 = PointNetSetAbstraction(None, None, None, 3 + 8, [8, 12], True)
        self.fp = PointNetFeaturePropagation(3 + 8, 8)
        self.fc = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, xyz):
        B = xyz.shape[0]
        l1_xyz, l1_points = self.sa1(xyz, None)
        _, l2_points = self.sa2(l1_xyz, l1_points)
        dense = self.fp(xyz, l1_xyz, xyz, l1_points)
        return F.log_softmax(self.fc(l2_points.view(B, 12)), -1), dense


@model("points", source="https://github.com/yanx27/Pointnet_Pointnet2_pytorch, models/pointnet2_utils.py")
def pointnet2():
    return PointNet2(), (normal(4, 3, 16),)


def knn(x, k):
    inner = -2 * torch.matmul(x.transpose(2, 1), x)
    xx = torch.sum(x**2, dim=1, keepdim=True)
    pairwise_distance = -xx - inner - xx.transpose(2, 1)
    return pairwise_distance.topk(k=k, dim=-1)[1]


def get_graph_feature(x, k):
    batch_size = x.size(0)
    num_points = x.size(2)
    x = x.view(batch_size, -1, num_points)
    idx = knn(x, k=k)
    idx_base = torch.arange(0, batch_size, device=x.device).view(-1, 1, 1) * num_points
    idx = idx + idx_base
    idx = idx.view(-1)
    _, num_dims, _ = x.size()
    x = x.transpose(2, 1).contiguous()
    feature = x.view(batch_size * num_points, -1)[idx, :]
    feature = feature.view(batch_size, num_points, k, num_dims)
    x = x.view(batch_size, num_points, 1, num_dims).repeat(1, 1, k, 1)
    return torch.cat((feature - x, x), dim=3).permute(0, 3, 1, 2).contiguous()


class DGCNN(nn.Module):
    def __init__(self, k=4):
        super().__init__()
        self.k = k
        self.bn1, self.bn2, self.bn5, self.bn6 = (
            nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm1d(16), nn.BatchNorm1d(8)
        )  # fmt: skip
        self.conv1 = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), self.bn1, nn.LeakyReLU(negative_slope=0.2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), self.bn2, nn.LeakyReLU(negative_slope=0.2))
        self.conv5 = nn.Sequential(nn.Conv1d(16, 16, 1, bias=False), self.bn5, nn.LeakyReLU(negative_slope=0.2))
        self.linear1, self.linear2 = nn.Linear(32, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        batch_size = x.size(0)
        x1 = self.conv1(get_graph_feature(x, k=self.k)).max(dim=-1, keepdim=False)[0]
        x2 = self.conv2(get_graph_feature(x1, k=self.k)).max(dim=-1, keepdim=False)[0]
        x = self.conv5(torch.cat((x1, x2), dim=1))
        x1 = F.adaptive_max_pool1d(x, 1).view(batch_size, -1)
        x2 = F.adaptive_avg_pool1d(x, 1).view(batch_size, -1)
        x = torch.cat((x1, x2), 1)
        return self.linear2(F.leaky_relu(self.bn6(self.linear1(x)), negative_slope=0.2))


@model("points", source="https://github.com/WangYueFt/dgcnn, pytorch/model.py")
def dgcnn():
    return DGCNN(), (normal(4, 3, 16),)


class LocalGrouper(nn.Module):
    """PointMLP's geometric affine: differences from the anchor over one deviation of the whole batch."""

    def __init__(self, channel, groups, kneighbors):
        super().__init__()
        self.groups, self.kneighbors = groups, kneighbors
        self.affine_alpha = nn.Parameter(torch.ones([1, 1, 1, channel + 3]))
        self.affine_beta = nn.Parameter(torch.zeros([1, 1, 1, channel + 3]))

    def forward(self, xyz, points):
        B = xyz.shape[0]
        S = self.groups
        fps_idx = farthest_point_sample(xyz, S).long()
        new_xyz, new_points = index_points(xyz, fps_idx), index_points(points, fps_idx)
        idx = torch.topk(square_distance(new_xyz, xyz), self.kneighbors, dim=-1, largest=False, sorted=False)[1]
        idx = idx.sort(-1)[0]
        grouped = torch.cat([index_points(points, idx), index_points(xyz, idx)], dim=-1)
        mean = torch.cat([new_points, new_xyz], dim=-1).unsqueeze(dim=-2)
        std = torch.std((grouped - mean).reshape(B, -1), dim=-1, keepdim=True).unsqueeze(dim=-1).unsqueeze(dim=-1)
        grouped = (grouped - mean) / (std + 1e-5)
        grouped = self.affine_alpha * grouped + self.affine_beta
        anchors = new_points.view(B, S, 1, -1).repeat(1, 1, self.kneighbors, 1)
        return new_xyz, torch.cat([grouped, anchors], dim=-1)


class PointMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        self.grouper = LocalGrouper(4, 6, 5)
        self.pre = nn.Sequential(nn.Conv1d(11, 8, 1), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.res = nn.Sequential(
            nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)
        )
        self.classifier = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3)
        )

    def forward(self, x):
        xyz = x.permute(0, 2, 1)
        x = self.embedding(x)
        xyz, x = self.grouper(xyz, x.permute(0, 2, 1))
        b, n, s, d = x.size()
        x = x.permute(0, 1, 3, 2)
        x = x.reshape(-1, d, s)
        x = self.pre(x)
        x = F.relu(self.res(x) + x)
        x = F.adaptive_max_pool1d(x, 1).view(b * n, -1)
        x = x.reshape(b, n, -1).permute(0, 2, 1)
        return self.classifier(F.adaptive_max_pool1d(x, 1).squeeze(dim=-1))


@model("points", source="https://github.com/ma-xu/pointMLP-pytorch, classification_ModelNet40/models/pointmlp.py")
def point_mlp():
    return PointMLP(), (normal(4, 3, 16),)


class PointPillars(nn.Module):
    """Padded pillars through a masked PointNet, scattered to a canvas, then a 2-d backbone."""

    def __init__(self, nx=8, ny=8, c=8, batch=2):
        super().__init__()
        self.nx, self.ny, self.c, self.batch = nx, ny, c, batch
        self.linear = nn.Linear(9, c, bias=False)
        self.norm = nn.BatchNorm1d(c, eps=1e-3, momentum=0.01)
        self.block = nn.Sequential(
            nn.ZeroPad2d(1),
            nn.Conv2d(c, c, 3, stride=2, bias=False),
            nn.BatchNorm2d(c, eps=1e-3, momentum=0.01),
            nn.ReLU(),
        )
        self.deblock = nn.Sequential(
            nn.ConvTranspose2d(c, c, 2, stride=2, bias=False), nn.BatchNorm2d(c, eps=1e-3, momentum=0.01), nn.ReLU()
        )
        self.head = nn.Conv2d(c, 2, 1)

    def forward(self, features, num_voxels, coors):
        points_mean = features[:, :, :3].sum(dim=1, keepdim=True) / num_voxels.type_as(features).view(-1, 1, 1)
        f_cluster = features[:, :, :3] - points_mean
        f_center = torch.zeros_like(features[:, :, :2])
        f_center[:, :, 0] = features[:, :, 0] - (coors[:, 3].type_as(features).unsqueeze(1) * 0.5 + 0.25)
        f_center[:, :, 1] = features[:, :, 1] - (coors[:, 2].type_as(features).unsqueeze(1) * 0.5 + 0.25)
        features = torch.cat([features, f_cluster, f_center], dim=-1)
        voxel_count = features.shape[1]
        actual_num = torch.unsqueeze(num_voxels, 1)
        max_num = torch.arange(voxel_count, dtype=torch.int).view(1, -1)
        mask = actual_num.int() > max_num
        mask = torch.unsqueeze(mask, -1).type_as(features)
        features *= mask
        x = self.linear(features)
        x = self.norm(x.permute(0, 2, 1).contiguous()).permute(0, 2, 1).contiguous()
        x = F.relu(x)
        voxel_features = torch.max(x, dim=1, keepdim=True)[0].squeeze()
        batch_canvas = []
        for batch_itt in range(self.batch):
            canvas = torch.zeros(self.c, self.nx * self.ny, dtype=voxel_features.dtype, device=voxel_features.device)
            batch_mask = coors[:, 0] == batch_itt
            this_coords = coors[batch_mask, :]
            indices = this_coords[:, 2] * self.nx + this_coords[:, 3]
            indices = indices.type(torch.long)
            voxels = voxel_features[batch_mask, :]
            voxels = voxels.t()
            canvas[:, indices] = voxels
            batch_canvas.append(canvas)
        batch_canvas = torch.stack(batch_canvas, 0)
        batch_canvas = batch_canvas.view(self.batch, self.c, self.ny, self.nx)
        return self.head(self.deblock(self.block(batch_canvas)))


@model(
    "points",
    source="https://github.com/nutonomy/second.pytorch, second/pytorch/models/pointpillars.py: masks choose pillars",
)
def point_pillars():
    coors = torch.zeros(12, 4, dtype=torch.long)
    coors[:, 0] = torch.arange(12) // 6
    cells = torch.cat([torch.randperm(64, generator=torch.Generator().manual_seed(s))[:6] for s in (0, 1)])
    coors[:, 2], coors[:, 3] = cells // 8, cells % 8
    return PointPillars(), (normal(12, 5, 4), 1 + integers(5, 12), coors)


class VoxelNet(nn.Module):
    """Dynamic voxels: each point has a voxel's number; means and maxima by scatter_reduce, a dense 3-d grid."""

    def __init__(self, c=6, grid=(4, 4, 4)):
        super().__init__()
        self.grid, self.c = grid, c
        self.vfe1 = nn.Sequential(nn.Linear(6, c, bias=False), nn.BatchNorm1d(c), nn.ReLU())
        self.vfe2 = nn.Sequential(nn.Linear(2 * c, c, bias=False), nn.BatchNorm1d(c), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv3d(c, c, 3, padding=1, bias=False), nn.BatchNorm3d(c), nn.ReLU(inplace=True))
        self.rpn = nn.Sequential(nn.Conv2d(4 * c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 2, 1))

    def forward(self, points):
        b, n, _ = points.shape
        cell = ((points.clamp(-1.99, 1.99) + 2).floor()).long()
        index = (cell[..., 0] * 4 + cell[..., 1]) * 4 + cell[..., 2] + torch.arange(b)[:, None] * 64
        index = index.reshape(-1)
        points = points.reshape(b * n, 3)
        count = torch.zeros(b * 64).to(points).index_add_(0, index, torch.ones(b * n).to(points))
        mean = torch.zeros(b * 64, 3).to(points).index_add_(0, index, points) / count.clamp(min=1)[:, None]
        x = self.vfe1(torch.cat([points, points - mean[index]], -1))
        top = x.new_zeros(b * 64, self.c).scatter_reduce_(0, index[:, None].expand_as(x), x, "amax", include_self=True)
        x = self.vfe2(torch.cat([x, top[index]], -1))
        top = torch.full((b * 64, self.c), float("-inf"), dtype=x.dtype)
        top = top.scatter_reduce(0, index[:, None].expand_as(x), x, reduce="amax")
        top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        grid = top.view(b, *self.grid, self.c).permute(0, 4, 1, 2, 3).contiguous()
        grid = self.conv(grid)
        return self.rpn(grid.view(b, -1, *grid.shape[3:]))


@model(
    "points",
    source="https://github.com/skyhehe123/VoxelNet-pytorch, voxelnet.py, with dynamic voxels as in mmdetection3d",
)
def voxelnet():
    return VoxelNet(), (normal(4, 20, 3),)


class KPConv(nn.Module):
    """Kernel points; neighbours' indices point to a shadow point far away where there are fewer."""

    def __init__(self, c_in, c_out, kernel=5, radius=1.5):
        super().__init__()
        self.extent = radius / 2
        self.weights = nn.Parameter(torch.randn(kernel, c_in, c_out) * 0.3)
        points = torch.randn(kernel, 3, generator=torch.Generator().manual_seed(0))
        self.kernel_points = nn.Parameter(points, requires_grad=False)

    def forward(self, q_pts, s_pts, neighb_inds, x):
        s_pts = torch.cat((s_pts, torch.zeros_like(s_pts[:1, :]) + 1e6), 0)
        neighbors = s_pts[neighb_inds, :]
        neighbors = neighbors - q_pts.unsqueeze(1)
        neighbors.unsqueeze_(2)
        differences = neighbors - self.kernel_points
        sq_distances = torch.sum(differences**2, dim=3)
        all_weights = torch.clamp(1 - torch.sqrt(sq_distances) / self.extent, min=0.0)
        all_weights = torch.transpose(all_weights, 1, 2)
        x = torch.cat((x, torch.zeros_like(x[:1, :])), 0)
        neighb_x = x[neighb_inds]
        weighted_features = torch.matmul(all_weights, neighb_x)
        weighted_features = weighted_features.permute((1, 0, 2))
        return torch.sum(torch.matmul(weighted_features, self.weights), dim=0)


class BatchNormBlock(nn.Module):
    """KPConv's: points are the length of a single example."""

    def __init__(self, in_dim, bn_momentum=0.02):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(in_dim, momentum=bn_momentum)

    def forward(self, x):
        x = x.unsqueeze(2)
        x = x.transpose(0, 2)
        x = self.batch_norm(x)
        x = x.transpose(0, 2)
        return x.squeeze()


class KPResnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.unary1, self.bn1 = nn.Linear(4, 6, bias=False), BatchNormBlock(6)
        self.conv, self.bn2 = KPConv(6, 6), BatchNormBlock(6)
        self.unary2, self.bn3 = nn.Linear(6, 8, bias=False), BatchNormBlock(8)
        self.shortcut = nn.Linear(4, 8, bias=False)
        self.relu = nn.LeakyReLU(0.1)

    def forward(self, points, neighbors, features):
        x = self.relu(self.bn1(self.unary1(features)))
        x = self.relu(self.bn2(self.conv(points, points, neighbors, x)))
        return self.relu(self.bn3(self.unary2(x)) + self.shortcut(features))


@model("points", source="https://github.com/HuguesTHOMAS/KPConv-PyTorch, models/blocks.py")
def kpconv():
    points = normal(20, 3)
    near = torch.cdist(points, points).sort(1)
    neighbors = near[1][:, :6].clone()
    neighbors[near[0][:, :6] > 1.5] = 20
    return KPResnet(), (points, neighbors, normal(20, 4, seed=1))
