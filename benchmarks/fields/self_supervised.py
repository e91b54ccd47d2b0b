"""Self-supervised learning: two views in, a loss out; targets, queues and centres in the module's state."""

import copy

import torch
import torch.nn.functional as F
import torchvision_cpu  # noqa: F401  torchvision beside a CPU build of torch, which lightly imports
from torch import nn

from . import model, normal


class Backbone(nn.Sequential):
    """A small ResNet-like encoder."""

    def __init__(self, width=8):
        super().__init__(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def views(batch=8):
    return normal(batch, 3, 16, 16), normal(batch, 3, 16, 16, seed=1)


class SimSiam(nn.Module):
    """https://github.com/facebookresearch/simsiam, simsiam/builder.py."""

    def __init__(self, dim=8, pred_dim=4):
        super().__init__()
        fc = nn.Sequential(
            nn.Linear(8, 8, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(inplace=True),
            nn.Linear(8, dim),
            nn.BatchNorm1d(dim, affine=False),
        )
        fc[3].bias.requires_grad = False
        self.encoder = nn.Sequential(Backbone(), fc)
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False),
            nn.BatchNorm1d(pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(pred_dim, dim),
        )

    def forward(self, x1, x2):
        z1 = self.encoder(x1)
        z2 = self.encoder(x2)
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach()


@model("self_supervised", source="https://github.com/facebookresearch/simsiam, simsiam/builder.py")
def simsiam():
    return SimSiam(), views()


class MoCo(nn.Module):
    """https://github.com/facebookresearch/moco, moco/builder.py, on one device (no shuffling between several)."""

    def __init__(self, dim=6, K=64, m=0.9, T=0.07):
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q = nn.Sequential(Backbone(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, dim))
        self.encoder_k = nn.Sequential(Backbone(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, dim))
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.register_buffer("queue", torch.randn(dim, K))
        self.queue = nn.functional.normalize(self.queue, dim=0)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _momentum_update_key_encoder(self):
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data = param_k.data * self.m + param_q.data * (1.0 - self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        batch_size = keys.shape[0]
        ptr = int(self.queue_ptr)
        assert self.K % batch_size == 0
        self.queue[:, ptr : ptr + batch_size] = keys.T
        ptr = (ptr + batch_size) % self.K
        self.queue_ptr[0] = ptr

    def forward(self, im_q, im_k):
        q = self.encoder_q(im_q)
        q = nn.functional.normalize(q, dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            k = self.encoder_k(im_k)
            k = nn.functional.normalize(k, dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1)
        logits /= self.T
        self._dequeue_and_enqueue(k)
        return logits


@model(
    "self_supervised",
    source="https://github.com/facebookresearch/moco, moco/builder.py: ptr = int(self.queue_ptr) in slices",
)
def moco():
    return MoCo(), views()


class MoCoOnDevice(MoCo):
    """Without a number read from the device: positions by arithmetic on the tensor."""

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        index = (self.queue_ptr + torch.arange(keys.shape[0])) % self.K
        self.queue[:, index] = keys.T
        self.queue_ptr.add_(keys.shape[0]).remainder_(self.K)


@model(
    "self_supervised", source="https://github.com/facebookresearch/moco, moco/builder.py, its queue written by index"
)
def moco_by_index():
    return MoCoOnDevice(), views()


class EMA:
    def __init__(self, beta):
        self.beta = beta

    def update_average(self, old, new):
        if old is None:
            return new
        return old * self.beta + (1 - self.beta) * new


def update_moving_average(ema_updater, ma_model, current_model):
    for current_params, ma_params in zip(current_model.parameters(), ma_model.parameters(), strict=True):
        old_weight, up_weight = ma_params.data, current_params.data
        ma_params.data = ema_updater.update_average(old_weight, up_weight)


def loss_fn(x, y):
    x = F.normalize(x, dim=-1, p=2)
    y = F.normalize(y, dim=-1, p=2)
    return 2 - 2 * (x * y).sum(dim=-1)


def mlp(dim, hidden, out):
    return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))


class NetWrapper(nn.Module):
    """The features are those that a hook on a layer caught."""

    def __init__(self, net, dim, hidden, layer=-2):
        super().__init__()
        self.net, self.layer = net, layer
        self.projector = mlp(dim, hidden, dim)
        self.hidden = {}
        [*self.net.children()][self.layer].register_forward_hook(self._hook)

    def _hook(self, _, input, output):
        self.hidden[input[0].device] = output.reshape(output.shape[0], -1)

    def forward(self, x):
        self.hidden.clear()
        _ = self.net(x)
        hidden = self.hidden[x.device]
        self.hidden.clear()
        assert hidden is not None, f"hidden layer {self.layer} never emitted an output"
        return self.projector(hidden), hidden


class BYOL(nn.Module):
    """https://github.com/lucidrains/byol-pytorch, byol_pytorch.py; the target moves at the start of each step."""

    def __init__(self):
        super().__init__()
        self.online_encoder = NetWrapper(Backbone(), 8, 12)
        self.target_encoder = copy.deepcopy(self.online_encoder)
        [*self.target_encoder.net.children()][-2]._forward_hooks.clear()
        [*self.target_encoder.net.children()][-2].register_forward_hook(self.target_encoder._hook)
        for p in self.target_encoder.parameters():
            p.requires_grad = False
        self.online_predictor = mlp(8, 12, 8)
        self.target_ema_updater = EMA(0.9)

    def forward(self, image_one, image_two):
        if self.training:
            update_moving_average(self.target_ema_updater, self.target_encoder, self.online_encoder)
        images = torch.cat((image_one, image_two), dim=0)
        online_projections, _ = self.online_encoder(images)
        online_predictions = self.online_predictor(online_projections)
        one, two = online_predictions.chunk(2, dim=0)
        with torch.no_grad():
            target_projections, _ = self.target_encoder(images)
            target_projections = target_projections.detach()
            target_one, target_two = target_projections.chunk(2, dim=0)
        loss = loss_fn(one, target_two.detach()) + loss_fn(two, target_one.detach())
        return loss.mean()


@model(
    "self_supervised", source="https://github.com/lucidrains/byol-pytorch, byol_pytorch.py: features caught by hooks"
)
def byol():
    return BYOL(), views()


class BYOLInPlace(nn.Module):
    """https://github.com/sthalles/PyTorch-BYOL and others: mul_ and add_ on the target's parameters and buffers."""

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(Backbone(), mlp(8, 12, 8))
        self.predictor = mlp(8, 12, 8)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @torch.no_grad()
    def update(self, m):
        for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            target.mul_(m).add_(online.detach(), alpha=1 - m)
        for online, target in zip(self.online.buffers(), self.target.buffers(), strict=True):
            target.copy_(online)

    def forward(self, a, b):
        loss = 0
        for x, y in ((a, b), (b, a)):
            p = self.predictor(self.online(x))
            with torch.no_grad():
                t = self.target(y)
            loss = loss + (2 - 2 * F.cosine_similarity(p, t.detach(), dim=-1)).mean()
        if self.training:
            self.update(0.99)
        return loss


@model("self_supervised", source="https://github.com/sthalles/PyTorch-BYOL, trainer.py; buffers copied too")
def byol_in_place():
    return BYOLInPlace(), views()


def off_diagonal(x):
    n, m = x.shape
    assert n == m
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


class BarlowTwins(nn.Module):
    def __init__(self, sizes=(8, 12, 12), lambd=0.0051):
        super().__init__()
        self.lambd = lambd
        self.backbone = Backbone()
        layers = []
        for i in range(len(sizes) - 2):
            layers.append(nn.Linear(sizes[i], sizes[i + 1], bias=False))
            layers.append(nn.BatchNorm1d(sizes[i + 1]))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
        self.projector = nn.Sequential(*layers)
        self.bn = nn.BatchNorm1d(sizes[-1], affine=False)

    def forward(self, y1, y2):
        z1 = self.projector(self.backbone(y1))
        z2 = self.projector(self.backbone(y2))
        c = self.bn(z1).T @ self.bn(z2)
        c.div_(y1.shape[0])
        on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
        off_diag = off_diagonal(c).pow_(2).sum()
        return on_diag + self.lambd * off_diag


@model(
    "self_supervised", source="https://github.com/facebookresearch/barlowtwins, main.py: the diagonal changed in place"
)
def barlow_twins():
    return BarlowTwins(), views()


class VICReg(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_features = 12
        self.backbone = Backbone()
        self.projector = nn.Sequential(
            nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(True), nn.Linear(12, 12, bias=False)
        )

    def forward(self, x, y):
        x = self.projector(self.backbone(x))
        y = self.projector(self.backbone(y))
        repr_loss = F.mse_loss(x, y)
        x = x - x.mean(dim=0)
        y = y - y.mean(dim=0)
        std_x = torch.sqrt(x.var(dim=0) + 0.0001)
        std_y = torch.sqrt(y.var(dim=0) + 0.0001)
        std_loss = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
        cov_x = (x.T @ x) / (len(x) - 1)
        cov_y = (y.T @ y) / (len(y) - 1)
        cov_loss = off_diagonal(cov_x).pow_(2).sum().div(self.num_features)
        cov_loss += off_diagonal(cov_y).pow_(2).sum().div(self.num_features)
        return 25 * repr_loss + 25 * std_loss + cov_loss


@model("self_supervised", source="https://github.com/facebookresearch/vicreg, main_vicreg.py")
def vicreg():
    return VICReg(), views()


class Lightly(nn.Module):
    """Two views through a backbone and heads of lightly, and its loss."""

    def __init__(self, heads, criterion):
        super().__init__()
        self.backbone, self.heads, self.criterion = Backbone(), nn.ModuleList(heads), criterion

    def one(self, x):
        x = self.backbone(x)
        for head in self.heads:
            x = head(x)
        return x

    def forward(self, a, b):
        return self.criterion(self.one(a), self.one(b))


@model("self_supervised", source="lightly, SimCLRProjectionHead and NTXentLoss")
def simclr():
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    return Lightly([SimCLRProjectionHead(8, 8, 6)], NTXentLoss()), views()


@model("self_supervised", source="lightly, MoCoProjectionHead and NTXentLoss with a memory bank")
def lightly_memory_bank():
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    return Lightly([MoCoProjectionHead(8, 8, 6, batch_norm=True)], NTXentLoss(memory_bank_size=(16, 6))), views()


@model("self_supervised", source="lightly, BarlowTwinsProjectionHead and BarlowTwinsLoss")
def lightly_barlow():
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    return Lightly([BarlowTwinsProjectionHead(8, 8, 6)], BarlowTwinsLoss()), views()


@torch.no_grad()
def sinkhorn(out, iterations=3, epsilon=0.05):
    Q = torch.exp(out / epsilon).t()
    B = Q.shape[1]
    K = Q.shape[0]
    sum_Q = torch.sum(Q)
    Q /= sum_Q
    for _ in range(iterations):
        sum_of_rows = torch.sum(Q, dim=1, keepdim=True)
        Q /= sum_of_rows
        Q /= K
        Q /= torch.sum(Q, dim=0, keepdim=True)
        Q /= B
    Q *= B
    return Q.t()


class SwAV(nn.Module):
    """Crops of several sizes, prototypes renormalised in forward, a queue of past embeddings that moves on."""

    def __init__(self, dim=6, prototypes=5, queue=32):
        super().__init__()
        self.backbone = Backbone()
        self.projection_head = mlp(8, 12, dim)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.register_buffer("queue", torch.randn(2, queue, dim))

    def embed(self, inputs):
        idx_crops = torch.cumsum(
            torch.unique_consecutive(torch.tensor([inp.shape[-1] for inp in inputs]), return_counts=True)[1], 0
        )
        start_idx = 0
        for end_idx in idx_crops:
            _out = self.backbone(torch.cat(inputs[start_idx:end_idx]))
            output = _out if start_idx == 0 else torch.cat((output, _out))
            start_idx = end_idx
        x = self.projection_head(output)
        return nn.functional.normalize(x, dim=1, p=2)

    def forward(self, a, b, small):
        with torch.no_grad():
            w = self.prototypes.weight.data.clone()
            w = nn.functional.normalize(w, dim=1, p=2)
            self.prototypes.weight.copy_(w)
        embedding = self.embed([a, b, small])
        output = self.prototypes(embedding)
        embedding = embedding.detach()
        bs = a.size(0)
        loss = 0
        for i, crop_id in enumerate((0, 1)):
            with torch.no_grad():
                out = output[bs * crop_id : bs * (crop_id + 1)].detach()
                out = torch.cat((torch.mm(self.queue[i], self.prototypes.weight.t()), out))
                self.queue[i, bs:] = self.queue[i, :-bs].clone()
                self.queue[i, :bs] = embedding[crop_id * bs : (crop_id + 1) * bs]
                q = sinkhorn(out)[-bs:]
            subloss = 0
            for v in [v for v in range(3) if v != crop_id]:
                x = output[bs * v : bs * (v + 1)] / 0.1
                subloss -= torch.mean(torch.sum(q * F.log_softmax(x, dim=1), dim=1))
            loss += subloss / 2
        return loss / 2


@model("self_supervised", source="https://github.com/facebookresearch/swav, main_swav.py and src/resnet50.py")
def swav():
    return SwAV(), (normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1), normal(4, 3, 8, 8, seed=2))


class DINO(nn.Module):
    """Weight-normalised last layer, a centre that moves."""

    def __init__(self, dim=6):
        super().__init__()
        self.student = nn.Sequential(Backbone(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4))
        self.last = nn.utils.weight_norm(nn.Linear(4, dim, bias=False))
        self.last.weight_g.data.fill_(1)
        self.last.weight_g.requires_grad = False
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, dim))

    def forward(self, a, b):
        s = self.last(F.normalize(self.student(a), dim=-1, p=2)) / 0.1
        with torch.no_grad():
            t = self.last(F.normalize(self.teacher(b), dim=-1, p=2))
        q = F.softmax((t - self.center) / 0.04, dim=-1).detach()
        loss = torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
        if self.training:
            self.update_center(t)
            with torch.no_grad():
                for ps, pt in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                    pt.data.mul_(0.99).add_((1 - 0.99) * ps.detach().data)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output):
        batch_center = torch.sum(teacher_output, dim=0, keepdim=True)
        batch_center = batch_center / len(teacher_output)
        self.center = self.center * 0.9 + batch_center * (1 - 0.9)


@model(
    "self_supervised", source="https://github.com/facebookresearch/dino, main_dino.py: use_bn_in_head, center rebound"
)
def dino():
    return DINO(), views()
