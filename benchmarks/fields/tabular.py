"""Tables: numbers and categories in columns."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import integers, model, normal


def following(net):
    """TabNet keeps its groups of columns as an attribute; as a buffer they follow .double() and .float()."""
    groups = net.encoder.group_attention_matrix
    del net.encoder.group_attention_matrix
    net.encoder.register_buffer("group_attention_matrix", groups, persistent=False)
    return net


@model("tabular", source="pytorch-tabnet, tab_network.py: ghost batches of 4 and sparsemax")
def tabnet():
    from pytorch_tabnet.tab_network import TabNet

    groups = torch.eye(6)
    net = TabNet(6, 3, n_d=4, n_a=4, n_steps=2, virtual_batch_size=4, group_attention_matrix=groups)
    net.tabnet = following(net.tabnet)
    return net, (normal(12, 6),)


@model("tabular", source="pytorch-tabnet, tab_network.py: the last ghost batch is smaller, entmax15")
def tabnet_entmax():
    from pytorch_tabnet.tab_network import TabNet

    groups = torch.eye(5)
    net = TabNet(
        5, [2, 3], n_d=4, n_a=4, n_steps=3, virtual_batch_size=5, mask_type="entmax", group_attention_matrix=groups
    )
    net.tabnet = following(net.tabnet)
    return net, (normal(13, 5),)


class TabNetCategories(nn.Module):
    """TabNet reads categories from columns of floats."""

    def __init__(self):
        super().__init__()
        from pytorch_tabnet.tab_network import TabNet

        groups = torch.eye(6)
        self.net = TabNet(
            6,
            2,
            n_d=4,
            n_a=4,
            n_steps=2,
            cat_idxs=[1, 4],
            cat_dims=[5, 3],
            cat_emb_dim=[2, 3],
            virtual_batch_size=8,
            group_attention_matrix=groups,
        )
        self.net.tabnet = following(self.net.tabnet)

    def forward(self, numbers, first, second):
        columns = [
            numbers[:, :1],
            first[:, None].to(numbers),
            numbers[:, 1:3],
            second[:, None].to(numbers),
            numbers[:, 3:],
        ]
        return self.net(torch.cat(columns, dim=1))


@model("tabular", source="pytorch-tabnet, tab_network.py and its EmbeddingGenerator")
def tabnet_categories():
    return TabNetCategories(), (normal(8, 4), integers(5, 8), integers(3, 8, seed=1))


class ResNet(nn.Module):
    def __init__(self, numbers, categories, token, d, factor, layers, outputs, normalization="batchnorm"):
        super().__init__()
        offsets = torch.tensor([0, *categories[:-1]]).cumsum(0)
        self.register_buffer("category_offsets", offsets)
        self.category_embeddings = nn.Embedding(sum(categories), token)
        nn.init.kaiming_uniform_(self.category_embeddings.weight, a=5**0.5)
        self.residual_dropout, self.hidden_dropout = 0.0, 0.0
        width, hidden = numbers + len(categories) * token, int(d * factor)

        def normalize():
            return {"batchnorm": nn.BatchNorm1d, "layernorm": nn.LayerNorm}[normalization](d)

        self.first_layer = nn.Linear(width, d)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": normalize(), "linear0": nn.Linear(d, hidden), "linear1": nn.Linear(hidden, d)})
            for _ in range(layers)
        )
        self.last_normalization = normalize()
        self.head = nn.Linear(d, outputs)

    def forward(self, x_num, x_cat):
        x = []
        if x_num is not None:
            x.append(x_num)
        if x_cat is not None:
            x.append(self.category_embeddings(x_cat + self.category_offsets[None]).view(x_cat.size(0), -1))
        x = torch.cat(x, dim=-1)
        x = self.first_layer(x)
        for layer in self.layers:
            z = x
            z = layer["norm"](z)
            z = layer["linear0"](z)
            z = F.relu(z)
            if self.hidden_dropout:
                z = F.dropout(z, self.hidden_dropout, self.training)
            z = layer["linear1"](z)
            if self.residual_dropout:
                z = F.dropout(z, self.residual_dropout, self.training)
            x = x + z
        x = self.last_normalization(x)
        x = F.relu(x)
        x = self.head(x)
        return x.squeeze(-1)


@model("tabular", source="https://github.com/yandex-research/rtdl-revisiting-models, bin/resnet.py")
def resnet():
    x_cat = torch.stack([integers(4, 10), integers(7, 10, seed=1), integers(2, 10, seed=2)], 1)
    return ResNet(5, [4, 7, 2], 3, 16, 2.0, 2, 1), (normal(10, 5), x_cat)


def sparsemax(x, dim=-1):
    """Martins and Astudillo, 2016: sorts, finds the support, projects."""
    x = x - x.max(dim, keepdim=True)[0]
    ordered = torch.sort(x, descending=True, dim=dim)[0]
    sums = ordered.cumsum(dim) - 1
    rho = torch.arange(1, x.size(dim) + 1, device=x.device, dtype=x.dtype)
    view = [1] * x.dim()
    view[0] = -1
    rho = rho.view(view).transpose(0, dim)
    support = rho * ordered > sums
    size = support.sum(dim=dim).unsqueeze(dim)
    tau = sums.gather(dim, size - 1)
    tau /= size.to(x.dtype)
    return torch.clamp(x - tau, min=0)


class ODST(nn.Module):
    """A layer of oblivious decision trees. Its thresholds are set from data at the first call."""

    def __init__(self, features, trees, depth=3, tree_dim=2, flatten=True):
        super().__init__()
        self.depth, self.num_trees, self.tree_dim, self.flatten_output = depth, trees, tree_dim, flatten
        self.response = nn.Parameter(torch.zeros([trees, tree_dim, 2**depth]))
        nn.init.normal_(self.response)
        self.feature_selection_logits = nn.Parameter(torch.zeros([features, trees, depth]))
        nn.init.uniform_(self.feature_selection_logits)
        self.feature_thresholds = nn.Parameter(torch.randn([trees, depth]) * 0.3)
        self.log_temperatures = nn.Parameter(torch.randn([trees, depth]) * 0.3)
        with torch.no_grad():
            indices = torch.arange(2**depth)
            offsets = 2 ** torch.arange(depth)
            bin_codes = indices.view(1, -1) // offsets.view(-1, 1) % 2
            bin_codes_1hot = torch.stack([bin_codes, 1.0 - bin_codes], dim=-1)
            self.bin_codes_1hot = nn.Parameter(bin_codes_1hot.float(), requires_grad=False)

    def forward(self, x):
        assert len(x.shape) >= 2
        if len(x.shape) > 2:
            return self.forward(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        selectors = sparsemax(self.feature_selection_logits, dim=0)
        values = torch.einsum("bi,ind->bnd", x, selectors)
        logits = (values - self.feature_thresholds) * torch.exp(-self.log_temperatures)
        logits = torch.stack([-logits, logits], dim=-1)
        bins = torch.clamp(0.5 * logits + 0.5, 0, 1)
        matches = torch.einsum("btds,dcs->btdc", bins, self.bin_codes_1hot)
        weights = torch.prod(matches, dim=-2)
        response = torch.einsum("bnd,ncd->bnc", weights, self.response)
        return response.flatten(1, 2) if self.flatten_output else response


class NODE(nn.Sequential):
    """Dense blocks, each of them with BatchNorm of the columns first."""

    def __init__(self, features, trees, layers):
        blocks = []
        width = features
        for _ in range(layers):
            blocks.append(ODST(width, trees))
            width += trees * 2
        super().__init__(*blocks)
        self.bn = nn.BatchNorm1d(features)

    def forward(self, x):
        x = self.bn(x)
        first = x.shape[-1]
        for layer in self:
            if isinstance(layer, ODST):
                x = torch.cat([x, layer(x)], dim=-1)
        return x[..., first:].view(*x.shape[:-1], -1, 2).mean(dim=-2)


@model("tabular", source="https://github.com/Qwicen/node, lib/odst.py and lib/arch.py; BatchNorm of pytorch_tabular")
def node():
    return NODE(5, 3, 2), (normal(8, 5),)


class Embedding(nn.Embedding):
    def __init__(self, ni, nf, std=0.1):
        super().__init__(ni, nf)
        nn.init.trunc_normal_(self.weight.data, std=std)


class LinBnDrop(nn.Sequential):
    def __init__(self, n_in, n_out, bn=True, p=0.0, act=None, lin_first=False):
        layers = [nn.BatchNorm1d(n_out if lin_first else n_in)] if bn else []
        if p != 0:
            layers.append(nn.Dropout(p))
        lin = [nn.Linear(n_in, n_out, bias=not bn)]
        if act is not None:
            lin.append(act)
        layers = lin + layers if lin_first else layers + lin
        super().__init__(*layers)


class TabularModel(nn.Module):
    def __init__(self, emb_szs, n_cont, out_sz, layers, y_range=None):
        super().__init__()
        self.embeds = nn.ModuleList([Embedding(ni, nf) for ni, nf in emb_szs])
        self.emb_drop = nn.Dropout(0.04)
        self.bn_cont = nn.BatchNorm1d(n_cont)
        n_emb = sum(e.embedding_dim for e in self.embeds)
        self.n_emb, self.n_cont, self.y_range = n_emb, n_cont, y_range
        sizes = [n_emb + n_cont, *layers, out_sz]
        actns = [nn.ReLU(inplace=True) for _ in range(len(sizes) - 2)] + [None]
        self.layers = nn.Sequential(
            *[
                LinBnDrop(sizes[i], sizes[i + 1], bn=i != len(actns) - 1, p=0.1, act=a, lin_first=True)
                for i, a in enumerate(actns)
            ]
        )

    def forward(self, x_cat, x_cont=None):
        if self.n_emb != 0:
            x = [e(x_cat[:, i]) for i, e in enumerate(self.embeds)]
            x = torch.cat(x, 1)
            x = self.emb_drop(x)
        if self.n_cont != 0:
            if self.bn_cont is not None:
                x_cont = self.bn_cont(x_cont)
            x = torch.cat([x, x_cont], 1) if self.n_emb != 0 else x_cont
        x = self.layers(x)
        if self.y_range is not None:
            low, high = self.y_range
            x = torch.sigmoid(x) * (high - low) + low
        return x


@model("tabular", source="fastai, tabular/model.py")
def fastai_tabular():
    x_cat = torch.stack([integers(6, 10), integers(3, 10, seed=1)], 1)
    return TabularModel([(6, 4), (3, 2)], 3, 1, [16, 8], y_range=(-0.5, 5.5)), (x_cat, normal(10, 3))


class AutoInt(nn.Module):
    """Interactions by attention over columns, an MLP with BatchNorm beside."""

    def __init__(self, field_dims, embed_dim, atten_dim, heads, layers):
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.offsets = np.array((0, *np.cumsum(field_dims)[:-1]), dtype=np.int64)
        self.linear = nn.Embedding(sum(field_dims), 1)
        self.atten_embedding = nn.Linear(embed_dim, atten_dim)
        self.self_attns = nn.ModuleList([nn.MultiheadAttention(atten_dim, heads, dropout=0.0) for _ in range(layers)])
        self.v_res = nn.Linear(embed_dim, atten_dim)
        self.attn_fc = nn.Linear(len(field_dims) * atten_dim, 1)
        self.mlp = nn.Sequential(
            nn.Linear(len(field_dims) * embed_dim, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def forward(self, x):
        shifted = x + x.new_tensor(self.offsets).unsqueeze(0)
        embed = self.embedding(shifted)
        cross = self.atten_embedding(embed).transpose(0, 1)
        for attention in self.self_attns:
            cross, _ = attention(cross, cross, cross)
        cross = cross.transpose(0, 1)
        cross += self.v_res(embed)
        cross = F.relu(cross).contiguous().view(-1, len(self.offsets) * cross.shape[-1])
        linear = torch.sum(self.linear(shifted), dim=1)
        x = linear + self.attn_fc(cross) + self.mlp(embed.view(embed.shape[0], -1))
        return torch.sigmoid(x.squeeze(1))


@model("tabular", source="https://github.com/rixwew/pytorch-fm, torchfm/model/afi.py")
def autoint():
    x = torch.stack([integers(n, 8, seed=n) for n in (5, 7, 3)], 1)
    return AutoInt([5, 7, 3], 4, 8, 2, 2), (x,)


class CrossNetwork(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.num_layers = layers
        self.w = nn.ModuleList([nn.Linear(width, 1, bias=False) for _ in range(layers)])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros((width,))) for _ in range(layers)])

    def forward(self, x):
        x0 = x
        for i in range(self.num_layers):
            xw = self.w[i](x)
            x = x0 * xw + self.b[i] + x
        return x


class DeepCross(nn.Module):
    def __init__(self, field_dims, numbers, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.register_buffer("offsets", torch.tensor([0, *np.cumsum(field_dims)[:-1].tolist()]), persistent=False)
        width = len(field_dims) * embed_dim + numbers
        self.bn = nn.BatchNorm1d(numbers)
        self.cn = CrossNetwork(width, 3)
        self.mlp = nn.Sequential()
        for i, (n_in, n_out) in enumerate([(width, 16), (16, 8)]):
            self.mlp.add_module(f"fc{i}", nn.Linear(n_in, n_out))
            self.mlp.add_module(f"bn{i}", nn.BatchNorm1d(n_out))
            self.mlp.add_module(f"act{i}", nn.PReLU())
        self.linear = nn.Linear(width + 8, 1, bias=False)

    def forward(self, categories, numbers):
        embedded = self.embedding(categories + self.offsets).flatten(1)
        x = torch.cat([embedded, self.bn(torch.log1p(numbers.abs()) * numbers.sign())], 1)
        return torch.sigmoid(self.linear(torch.cat([self.cn(x), self.mlp(x)], dim=1)).squeeze(1))


@model("tabular", source="https://github.com/rixwew/pytorch-fm, torchfm/model/dcn.py")
def deep_cross():
    x = torch.stack([integers(n, 9, seed=n) for n in (5, 4)], 1)
    return DeepCross([5, 4], 3, 4), (x, normal(9, 3))


class DANet(nn.Module):
    """Abstract layers: learned masks of columns by entmax, ghost BatchNorm by a loop over chunks."""

    def __init__(self, columns, width, masks, ghost=4):
        super().__init__()
        self.masker = nn.Parameter(torch.rand(masks, columns))
        self.conv = nn.Conv1d(masks * columns, 2 * masks * width, 1, groups=masks)
        self.bn = nn.BatchNorm1d(2 * masks * width)
        self.ghost, self.k, self.width = ghost, masks, width
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        b, _ = x.shape
        mask = sparsemax(self.masker, dim=-1)
        x = torch.einsum("nd,bd->bnd", mask, x).reshape(b, -1, 1)
        x = self.conv(x)
        if self.training:
            chunks = x.chunk(int(np.ceil(x.shape[0] / self.ghost)), 0)
            x = torch.cat([self.bn(c) for c in chunks], dim=0)
        else:
            x = self.bn(x)
        x = x.chunk(self.k, 1)
        x = sum(F.relu(torch.sigmoid(part[:, : self.width, :]) * part[:, self.width :, :]) for part in x)
        return self.head(x.squeeze(-1))


@model("tabular", source="https://github.com/WhatAShot/DANet, model/DANet.py")
def danet():
    return DANet(6, 4, 3), (normal(12, 6),)
