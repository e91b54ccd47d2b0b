"""Recommendation: clicks, sequences of items, two towers."""

import torch
import torch.nn.functional as F
from torch import nn

from . import integers, model, normal


class Columns(nn.Module):
    """What deepctr-torch takes is one matrix of floats, with the categories in it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, categories, numbers):
        return self.net(torch.cat([categories.to(numbers.dtype), numbers], dim=1))


def deepctr(name, **keywords):
    import deepctr_torch.models as zoo
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    sizes = (5, 7, 4)
    columns = [SparseFeat(f"c{n}", n, embedding_dim=4) for n in sizes] + [DenseFeat("d", 3)]
    net = getattr(zoo, name)(columns, columns, init_std=0.3, **keywords)
    return Columns(net), (torch.stack([integers(n, 8, seed=n) for n in sizes], 1), normal(8, 3))


@model("recommendation", source="deepctr-torch, models/deepfm.py")
def deepfm():
    return deepctr("DeepFM", dnn_hidden_units=(16, 8), dnn_use_bn=True)


@model("recommendation", source="deepctr-torch, models/xdeepfm.py")
def xdeepfm():
    return deepctr("xDeepFM", dnn_hidden_units=(16, 8), cin_layer_size=(8, 6), dnn_use_bn=True)


@model("recommendation", source="deepctr-torch, models/dcn.py: DCN-v2")
def dcn_v2():
    return deepctr("DCN", dnn_hidden_units=(16, 8), cross_parameterization="matrix", dnn_use_bn=True)


@model("recommendation", source="deepctr-torch, models/dcnmix.py: experts of low rank")
def dcn_mix():
    return deepctr("DCNMix", dnn_hidden_units=(16, 8), low_rank=3, num_experts=2, dnn_use_bn=True)


@model("recommendation", source="deepctr-torch, models/autoint.py")
def autoint():
    return deepctr("AutoInt", dnn_hidden_units=(16, 8), att_layer_num=2, dnn_use_bn=True)


class Histories(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, user, item, numbers, history, length):
        columns = [user, item, numbers, history, length]
        return self.net(torch.cat([c.to(numbers.dtype) for c in columns], dim=1))


@model("recommendation", source="deepctr-torch, models/din.py with Dice, whose BatchNorm is inside the activation")
def din():
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DIN

    columns = [SparseFeat("user", 5, embedding_dim=4), SparseFeat("item", 8, embedding_dim=4), DenseFeat("d", 2)]
    history = SparseFeat("hist_item", 8, embedding_dim=4, embedding_name="item")
    columns += [VarLenSparseFeat(history, maxlen=6, length_name="length")]
    net = DIN(columns, ["item"], dnn_hidden_units=(16, 8), att_hidden_size=(8, 4), dnn_use_bn=True, init_std=0.3)
    for linear in net.dnn.linears:  # drawn with a deviation of 1e-4, which BatchNorm's eps would drown
        nn.init.normal_(linear.weight, std=0.3)
    length = 1 + integers(6, 7, 1, seed=3)
    items = integers(7, 7, 6, seed=2) + 1
    items[torch.arange(6) >= length] = 0
    return Histories(net), (integers(5, 7, 1), integers(7, 7, 1, seed=1) + 1, normal(7, 2), items, length)


class Tower(nn.Module):
    def __init__(self, sizes, width, hidden):
        super().__init__()
        self.embeddings = nn.ModuleDict({f"f{i}": nn.EmbeddingBag(n, width, mode="mean") for i, n in enumerate(sizes)})
        layers = []
        last = len(sizes) * width
        for h in hidden:
            layers += [nn.Linear(last, h, bias=False), nn.BatchNorm1d(h), nn.LeakyReLU(0.1), nn.Dropout(0.1)]
            last = h
        self.net = nn.Sequential(*layers[:-2])

    def forward(self, features):
        x = torch.cat([self.embeddings[f"f{i}"](f) for i, f in enumerate(features)], dim=1)
        return F.normalize(self.net(x), p=2, dim=1)


class TwoTower(nn.Module):
    """Scores of all pairs in the batch, with the correction for how often items are drawn."""

    def __init__(self):
        super().__init__()
        self.user, self.item = Tower([6, 5], 4, [12, 8]), Tower([9], 6, [8])
        self.register_buffer("counts", torch.ones(9, dtype=torch.double))
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, user, tags, item):
        u = self.user([user, tags])
        v = self.item([item])
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.99).index_add_(0, item[:, 0], torch.ones_like(item[:, 0], dtype=self.counts.dtype))
        frequency = self.counts[item[:, 0]] / self.counts.sum()
        scores = u @ v.t() / self.temperature.clamp(min=0.05) - torch.log(frequency).to(u)[None, :]
        labels = torch.arange(scores.size(0))
        return F.cross_entropy(scores, labels), u, v


@model("recommendation", source="https://github.com/datawhalechina/torch-rechub, models/matching/dssm.py")
def two_tower():
    return TwoTower(), (integers(6, 8, 1), integers(5, 8, 3, seed=1), integers(9, 8, 1, seed=2))


class NeuMF(nn.Module):
    def __init__(self, users, items, factors, layers):
        super().__init__()
        self.embed_user_GMF, self.embed_item_GMF = nn.Embedding(users, factors), nn.Embedding(items, factors)
        width = factors * 2 ** (layers - 1)
        self.embed_user_MLP, self.embed_item_MLP = nn.Embedding(users, width), nn.Embedding(items, width)
        modules = []
        for i in range(layers):
            size = factors * 2 ** (layers - i)
            modules += [nn.Dropout(0.1), nn.Linear(size, size // 2), nn.BatchNorm1d(size // 2), nn.ReLU()]
        self.MLP_layers = nn.Sequential(*modules)
        self.predict_layer = nn.Linear(factors * 2, 1)

    def forward(self, user, item):
        output_gmf = self.embed_user_GMF(user) * self.embed_item_GMF(item)
        interaction = torch.cat((self.embed_user_MLP(user), self.embed_item_MLP(item)), -1)
        concat = torch.cat((output_gmf, self.MLP_layers(interaction)), -1)
        return self.predict_layer(concat).view(-1)


@model("recommendation", source="https://github.com/guoyang9/NCF, model.py, with BatchNorm")
def ncf():
    return NeuMF(6, 9, 4, 3), (integers(6, 10), integers(9, 10, seed=1))


class PointWiseFeedForward(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(units, units, 1), nn.Conv1d(units, units, 1)
        self.bn = nn.BatchNorm1d(units)
        self.relu = nn.ReLU()

    def forward(self, inputs):
        outputs = self.conv2(self.relu(self.bn(self.conv1(inputs.transpose(-1, -2)))))
        outputs = outputs.transpose(-1, -2)
        outputs += inputs
        return outputs


class SASRec(nn.Module):
    def __init__(self, items, units, length, blocks, heads):
        super().__init__()
        self.item_emb = nn.Embedding(items + 1, units, padding_idx=0)
        self.pos_emb = nn.Embedding(length + 1, units, padding_idx=0)
        self.attention_layernorms = nn.ModuleList([nn.LayerNorm(units, eps=1e-8) for _ in range(blocks)])
        self.attention_layers = nn.ModuleList([nn.MultiheadAttention(units, heads, 0.0) for _ in range(blocks)])
        self.forward_layernorms = nn.ModuleList([nn.LayerNorm(units, eps=1e-8) for _ in range(blocks)])
        self.forward_layers = nn.ModuleList([PointWiseFeedForward(units) for _ in range(blocks)])
        self.last = nn.BatchNorm1d(units)

    def log2feats(self, log_seqs):
        seqs = self.item_emb(log_seqs)
        seqs *= self.item_emb.embedding_dim**0.5
        poss = torch.arange(1, log_seqs.shape[1] + 1).tile(log_seqs.shape[0], 1)
        poss = poss * (log_seqs != 0)
        seqs += self.pos_emb(poss)
        timeline_mask = log_seqs == 0
        seqs *= ~timeline_mask.unsqueeze(-1)
        tl = seqs.shape[1]
        attention_mask = ~torch.tril(torch.ones((tl, tl), dtype=torch.bool))
        for i in range(len(self.attention_layers)):
            seqs = torch.transpose(seqs, 0, 1)
            q = self.attention_layernorms[i](seqs)
            outputs, _ = self.attention_layers[i](q, seqs, seqs, attn_mask=attention_mask)
            seqs = q + outputs
            seqs = torch.transpose(seqs, 0, 1)
            seqs = self.forward_layernorms[i](seqs)
            seqs = self.forward_layers[i](seqs)
            seqs *= ~timeline_mask.unsqueeze(-1)
        valid = ~timeline_mask
        out = seqs.clone()
        out[valid] = self.last(seqs[valid])
        return out

    def forward(self, log_seqs, pos_seqs, neg_seqs):
        feats = self.log2feats(log_seqs)
        pos_logits = (feats * self.item_emb(pos_seqs)).sum(dim=-1)
        neg_logits = (feats * self.item_emb(neg_seqs)).sum(dim=-1)
        return pos_logits, neg_logits


@model(
    "recommendation",
    source="https://github.com/pmixer/SASRec.pytorch, python/model.py, BatchNorm of what is no padding",
)
def sasrec():
    seqs = integers(9, 4, 7) + 1
    seqs[0, :3] = 0
    seqs[2, :5] = 0
    return SASRec(9, 8, 7, 2, 2), (seqs, integers(9, 4, 7, seed=1) + 1, integers(9, 4, 7, seed=2) + 1)


class MMoE(nn.Module):
    """Several tasks, experts shared by gates."""

    def __init__(self, width, experts, tasks, hidden):
        super().__init__()
        self.bn = nn.BatchNorm1d(width)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()) for _ in range(experts)
        )
        self.gates = nn.ParameterList([nn.Parameter(torch.rand(width, experts)) for _ in range(tasks)])
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(tasks)
        )

    def forward(self, x):
        x = self.bn(x)
        experts_o_tensor = torch.stack([e(x) for e in self.experts])
        gates_o = [F.softmax(x @ g, dim=1) for g in self.gates]
        towers = [g.t().unsqueeze(2).expand(-1, -1, experts_o_tensor.shape[-1]) * experts_o_tensor for g in gates_o]
        towers = [torch.sum(ti, dim=0) for ti in towers]
        return {f"task{i}": t(ti).sigmoid() for i, (t, ti) in enumerate(zip(self.towers, towers, strict=True))}


@model(
    "recommendation",
    source="https://github.com/easezyc/Multitask-Recommendation-Library, models/mmoe.py",
)
def mmoe():
    return MMoE(6, 3, 2, 8), (normal(10, 6),)
