"""Domain adaptation: gradient reversal, BatchNorm by domain, discrepancies between source and target."""
# ruff: noqa: E712  (as the sources have it)

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from . import integers, model, normal

FIELD = "domain_adaptation"


class ReverseLayerF(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        output = grad_output.neg() * ctx.alpha
        return output, None


class CNNModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature = nn.Sequential()
        self.feature.add_module("f_conv1", nn.Conv2d(3, 8, kernel_size=5))
        self.feature.add_module("f_bn1", nn.BatchNorm2d(8))
        self.feature.add_module("f_pool1", nn.MaxPool2d(2))
        self.feature.add_module("f_relu1", nn.ReLU(True))
        self.feature.add_module("f_conv2", nn.Conv2d(8, 10, kernel_size=5))
        self.feature.add_module("f_bn2", nn.BatchNorm2d(10))
        self.feature.add_module("f_drop1", nn.Dropout2d())
        self.feature.add_module("f_pool2", nn.MaxPool2d(2))
        self.feature.add_module("f_relu2", nn.ReLU(True))

        self.class_classifier = nn.Sequential()
        self.class_classifier.add_module("c_fc1", nn.Linear(10 * 4 * 4, 16))
        self.class_classifier.add_module("c_bn1", nn.BatchNorm1d(16))
        self.class_classifier.add_module("c_relu1", nn.ReLU(True))
        self.class_classifier.add_module("c_drop1", nn.Dropout())
        self.class_classifier.add_module("c_fc3", nn.Linear(16, 10))
        self.class_classifier.add_module("c_softmax", nn.LogSoftmax(dim=1))

        self.domain_classifier = nn.Sequential()
        self.domain_classifier.add_module("d_fc1", nn.Linear(10 * 4 * 4, 16))
        self.domain_classifier.add_module("d_bn1", nn.BatchNorm1d(16))
        self.domain_classifier.add_module("d_relu1", nn.ReLU(True))
        self.domain_classifier.add_module("d_fc2", nn.Linear(16, 2))
        self.domain_classifier.add_module("d_softmax", nn.LogSoftmax(dim=1))

    def forward(self, input_data, alpha=0.7):
        input_data = input_data.expand(input_data.data.shape[0], 3, 28, 28)
        feature = self.feature(input_data)
        feature = feature.view(-1, 10 * 4 * 4)
        reverse_feature = ReverseLayerF.apply(feature, alpha)
        class_output = self.class_classifier(feature)
        domain_output = self.domain_classifier(reverse_feature)
        return class_output, domain_output


@model(FIELD, source="https://github.com/fungtion/DANN, models/model.py")
def dann():
    return CNNModel(), (normal(4, 1, 28, 28),)


class DomainSpecificBatchNorm2d(nn.Module):
    def __init__(self, num_features, num_classes, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        super().__init__()
        self.bns = nn.ModuleList(
            [nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats) for _ in range(num_classes)]
        )

    def reset_running_stats(self):
        for bn in self.bns:
            bn.reset_running_stats()

    def _check_input_dim(self, input):
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")

    def forward(self, x, domain_label):
        self._check_input_dim(x)
        bn = self.bns[domain_label[0]]
        return bn(x), domain_label


class TwoInputSequential(nn.Sequential):
    def forward(self, input1, input2):
        for module in self._modules.values():
            input1, input2 = module(input1, input2)
        return input1, input2


class Conv2d(nn.Conv2d):
    def forward(self, input, domain_label):
        return super().forward(input), domain_label


class ReLU(nn.ReLU):
    def forward(self, input, domain_label):
        return super().forward(input), domain_label


class DSBNNet(nn.Module):
    def __init__(self, domains=2):
        super().__init__()
        self.features = TwoInputSequential(
            Conv2d(3, 6, 3, padding=1, bias=False),
            DomainSpecificBatchNorm2d(6, domains),
            ReLU(inplace=True),
            Conv2d(6, 8, 3, 2, 1, bias=False),
            DomainSpecificBatchNorm2d(8, domains),
            ReLU(inplace=True),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x, domain_label):
        x, _ = self.features(x, domain_label)
        return self.fc(x.mean((2, 3)))


@model(FIELD, source="https://github.com/woozch/DSBN, model/dsbn.py (ModuleList indexed by a tensor's value)")
def dsbn():
    return DSBNNet(), (normal(4, 3, 8, 8), torch.ones(4, dtype=torch.long))


class PerExample(nn.Module):
    """One BatchNorm a domain, each over its own examples, put back by a mask."""

    def __init__(self, num_features, domains):
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm1d(num_features) for _ in range(domains)])

    def forward(self, x, domain):
        every = torch.stack([bn(x) for bn in self.bns], dim=1)
        return every.gather(1, domain.view(-1, 1, 1).expand(-1, 1, x.size(1))).squeeze(1)


@model(FIELD, source="domain-specific BatchNorm by example: torch.gather over all domains' outputs")
def dsbn_by_example():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(6, 10)
            self.bn = PerExample(10, 3)
            self.fc2 = nn.Linear(10, 4)

        def forward(self, x, domain):
            return self.fc2(F.relu(self.bn(self.fc1(x), domain)))

    return Net(), (normal(8, 6), integers(3, 8))


class MaskedDomains(nn.Module):
    """Rows of each domain picked out with a boolean mask: shapes that depend on values."""

    def __init__(self, width=6, domains=2):
        super().__init__()
        self.fc1 = nn.Linear(6, width)
        self.bns = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(domains)])

    def forward(self, x, domain):
        x = self.fc1(x)
        out = torch.empty_like(x)
        for i, bn in enumerate(self.bns):
            out[domain == i] = bn(x[domain == i])
        return out


@model(FIELD, source="domain-specific BatchNorm with boolean masks (out[d == i] = bn(x[d == i])), by design of values")
def dsbn_masked():
    return MaskedDomains(), (normal(8, 6), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]))


@model(FIELD, source="pytorch-adapt (package): layers.AdaBNModel's adaptive_batch_norm over a MNIST network")
def adabn():
    from pytorch_adapt.layers import adaptive_batch_norm

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.bn1 = adaptive_batch_norm.AdaptiveBatchNorm2d(6, affine_domain=0)
            self.fc = nn.Linear(6, 8)
            self.bn2 = adaptive_batch_norm.AdaptiveBatchNorm2d(8)

        def branch(self, x, domain):
            x = F.relu(self.bn1(self.conv(x), domain)).mean((2, 3))
            return self.bn2(self.fc(x)[..., None, None], domain).flatten(1)

        def forward(self, source, target):
            return self.branch(source, 0), self.branch(target, 1)

    return Net(), (normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1))


class Feature(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=5, stride=1, padding=2)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, kernel_size=5, stride=1, padding=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 4 * 4, 16)
        self.bn1_fc = nn.BatchNorm1d(16)

    def forward(self, x, reverse=False):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), stride=2, kernel_size=3, padding=1)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), stride=2, kernel_size=3, padding=1)
        x = x.view(x.size(0), 8 * 4 * 4)
        x = F.relu(self.bn1_fc(self.fc1(x)))
        x = F.dropout(x, training=self.training, p=0.0)
        return x


class Predictor(nn.Module):
    def __init__(self, prob=0.0):
        super().__init__()
        self.fc2 = nn.Linear(16, 12)
        self.bn2_fc = nn.BatchNorm1d(12)
        self.fc3 = nn.Linear(12, 10)
        self.bn_fc3 = nn.BatchNorm1d(10)
        self.prob = prob

    def set_lambda(self, lambd):
        self.lambd = lambd

    def forward(self, x, reverse=False):
        if reverse:
            x = ReverseLayerF.apply(x, self.lambd)
        x = F.relu(self.bn2_fc(self.fc2(x)))
        x = self.fc3(x)
        return x


class MCD(nn.Module):
    """Generator and two classifiers, their discrepancy on the target."""

    def __init__(self):
        super().__init__()
        self.G, self.C1, self.C2 = Feature(), Predictor(), Predictor()
        self.C2.set_lambda(0.3)

    def discrepancy(self, out1, out2):
        return torch.mean(torch.abs(F.softmax(out1, dim=1) - F.softmax(out2, dim=1)))

    def forward(self, img_s, img_t):
        feat_s = self.G(img_s)
        output_s1, output_s2 = self.C1(feat_s), self.C2(feat_s, reverse=True)
        feat_t = self.G(img_t)
        output_t1, output_t2 = self.C1(feat_t), self.C2(feat_t)
        return output_s1, output_s2, self.discrepancy(output_t1, output_t2)


@model(FIELD, source="https://github.com/mil-tokyo/MCD_DA, classification/model/svhn2mnist.py and solver.py")
def mcd():
    return MCD(), (normal(4, 3, 16, 16), normal(4, 3, 16, 16, seed=1))


class _TransNorm(nn.Module):
    """Statistics for source and target halves, channels weighted by how transferable they are."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.weight = Parameter(torch.Tensor(num_features))
        self.bias = Parameter(torch.Tensor(num_features))
        self.register_buffer("running_mean_source", torch.zeros(num_features))
        self.register_buffer("running_mean_target", torch.zeros(num_features))
        self.register_buffer("running_var_source", torch.ones(num_features))
        self.register_buffer("running_var_target", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.weight.data.uniform_()
        self.bias.data.zero_()

    def _load_from_state_dict_from_pretrained_model(self, *args):
        raise NotImplementedError

    def forward(self, input):
        self._check_input_dim(input)
        if self.training:  ## train mode
            ## 1. Domain Specific Mean and Variance.
            batch_size = input.size()[0] // 2
            input_source = input[:batch_size]
            input_target = input[batch_size:]

            ## 2. Domain Specific Normalization.
            z_source = F.batch_norm(
                input_source, self.running_mean_source, self.running_var_source, self.weight, self.bias,
                self.training or not self.track_running_stats, self.momentum, self.eps,
            )  # fmt: skip
            z_target = F.batch_norm(
                input_target, self.running_mean_target, self.running_var_target, self.weight, self.bias,
                self.training or not self.track_running_stats, self.momentum, self.eps,
            )  # fmt: skip
            z = torch.cat((z_source, z_target), dim=0)

            ## 3. Domain Adaptive Alpha.
            if input.dim() == 4:
                input_source = input_source.permute(0, 2, 3, 1).contiguous().view(-1, self.num_features)
                input_target = input_target.permute(0, 2, 3, 1).contiguous().view(-1, self.num_features)

            cur_mean_source = torch.mean(input_source, dim=0)
            cur_var_source = torch.var(input_source, dim=0)
            cur_mean_target = torch.mean(input_target, dim=0)
            cur_var_target = torch.var(input_target, dim=0)

            ## 3.2 Channel Transferability
            dis = torch.abs(
                cur_mean_source / torch.sqrt(cur_var_source + self.eps)
                - cur_mean_target / torch.sqrt(cur_var_target + self.eps)
            )
            prob = 1.0 / (1.0 + dis)
            alpha = self.num_features * prob / sum(prob)

            if input.dim() == 2:
                alpha = alpha.view(1, self.num_features)
            elif input.dim() == 4:
                alpha = alpha.view(1, self.num_features, 1, 1)
            ## 3.3 Residual Connection
            return z * (1 + alpha.detach())
        else:  ## test mode
            z = F.batch_norm(
                input, self.running_mean_target, self.running_var_target, self.weight, self.bias,
                self.training or not self.track_running_stats, self.momentum, self.eps,
            )  # fmt: skip
            dis = torch.abs(
                self.running_mean_source / torch.sqrt(self.running_var_source + self.eps)
                - self.running_mean_target / torch.sqrt(self.running_var_target + self.eps)
            )
            prob = 1.0 / (1.0 + dis)
            alpha = self.num_features * prob / sum(prob)
            if input.dim() == 2:
                alpha = alpha.view(1, self.num_features)
            elif input.dim() == 4:
                alpha = alpha.view(1, self.num_features, 1, 1)
            return z * (1 + alpha.detach())


class TransNorm2d(_TransNorm):
    def _check_input_dim(self, input):
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")


class TransNorm1d(_TransNorm):
    def _check_input_dim(self, input):
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")


@model(FIELD, source="https://github.com/thuml/TransNorm, trans_norm.py")
def trans_norm():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), TransNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, bias=False), TransNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), TransNorm1d(8),
    )  # fmt: skip
    return net, (normal(8, 3, 8, 8),)


def calc_coeff(iter_num, high=1.0, low=0.0, alpha=10.0, max_iter=10000.0):
    return float(2.0 * (high - low) / (1.0 + np.exp(-alpha * iter_num / max_iter)) - (high - low) + low)


def grl_hook(coeff):
    def fun1(grad):
        return -coeff * grad.clone()

    return fun1


def Entropy(input_):
    epsilon = 1e-5
    entropy = -input_ * torch.log(input_ + epsilon)
    return torch.sum(entropy, dim=1)


class RandomLayer(nn.Module):
    def __init__(self, input_dim_list=(), output_dim=16):
        super().__init__()
        self.input_num = len(input_dim_list)
        self.output_dim = output_dim
        self.random_matrix = [torch.randn(input_dim_list[i], output_dim) for i in range(self.input_num)]

    def forward(self, input_list):
        return_list = [torch.mm(input_list[i], self.random_matrix[i].to(input_list[i])) for i in range(self.input_num)]
        return_tensor = return_list[0] / np.power(float(self.output_dim), 1.0 / len(return_list))
        for single in return_list[1:]:
            return_tensor = torch.mul(return_tensor, single)
        return return_tensor


class AdversarialNetwork(nn.Module):
    def __init__(self, in_feature, hidden_size):
        super().__init__()
        self.ad_layer1 = nn.Linear(in_feature, hidden_size)
        self.bn1 = nn.BatchNorm1d(hidden_size)
        self.relu1 = nn.ReLU()
        self.ad_layer3 = nn.Linear(hidden_size, 1)
        self.sigmoid = nn.Sigmoid()
        self.iter_num = 0
        self.alpha = 10
        self.low = 0.0
        self.high = 1.0
        self.max_iter = 10000.0

    def forward(self, x):
        coeff = calc_coeff(2000, self.high, self.low, self.alpha, self.max_iter)
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(grl_hook(coeff))
        x = self.relu1(self.bn1(self.ad_layer1(x)))
        y = self.ad_layer3(x)
        return self.sigmoid(y)


class CDAN(nn.Module):
    def __init__(self, random=True):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.fc = nn.Linear(12, 5)
        self.ad_net = AdversarialNetwork(16 if random else 60, 10)
        self.random_layer = RandomLayer([12, 5], 16) if random else None

    def forward(self, x):
        feature = self.base(x)
        softmax_out = nn.Softmax(dim=1)(self.fc(feature)).detach()
        if self.random_layer is None:
            op_out = torch.bmm(softmax_out.unsqueeze(2), feature.unsqueeze(1))
            ad_out = self.ad_net(op_out.view(-1, softmax_out.size(1) * feature.size(1)))
        else:
            random_out = self.random_layer([feature, softmax_out])
            ad_out = self.ad_net(random_out.view(-1, random_out.size(1)))
        entropy = Entropy(softmax_out)
        entropy = 1.0 + torch.exp(-entropy)
        half = x.size(0) // 2
        source_mask = torch.ones_like(entropy)
        source_mask[half:] = 0
        source_weight = entropy * source_mask
        weight = source_weight / torch.sum(source_weight).detach().item()
        dc_target = torch.cat([torch.ones(half, 1), torch.zeros(x.size(0) - half, 1)]).to(x)
        loss = torch.sum(weight.view(-1, 1) * nn.BCELoss(reduction="none")(ad_out, dc_target))
        return self.fc(feature), loss / torch.sum(weight).detach().item()


@model(
    FIELD,
    source="https://github.com/thuml/CDAN, pytorch/network.py and loss.py (Tensor.register_hook reverses gradients)",
)
def cdan():
    return CDAN(random=False), (normal(8, 6),)


@model(FIELD, source="https://github.com/thuml/CDAN, RandomLayer: its matrices a plain list of tensors")
def cdan_random():
    return CDAN(random=True), (normal(8, 6),)


class AFN(nn.Module):
    """Stepwise adaptive feature norm."""

    def __init__(self, weight=0.05, delta_r=1.0):
        super().__init__()
        self.fc1 = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12, affine=True), nn.ReLU(inplace=True), nn.Dropout(0.5)
        )
        self.fc2 = nn.Linear(12, 5)
        self.weight_L2norm = weight
        self.delta_r = delta_r
        self.p = 0.5

    def get_L2norm_loss_self_driven(self, x):
        radius = x.norm(p=2, dim=1).detach()
        assert radius.requires_grad == False
        radius = radius + self.delta_r
        loss = ((x.norm(p=2, dim=1) - radius) ** 2).mean()
        return self.weight_L2norm * loss

    def forward(self, x):
        emb = self.fc1(x)
        emb = emb.mul_(0.7) if not self.training else emb * 0.7
        return self.fc2(emb), self.get_L2norm_loss_self_driven(emb)


@model(FIELD, source="https://github.com/jihanyang/AFN, vanilla/Office31/SAFN/code/train.py, model/net.py")
def afn():
    return AFN(), (normal(8, 6),)


class DeepCORAL(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ELU(), nn.Linear(10, 8))

    def coral(self, source, target):
        d = source.size(1)
        ns, nt = source.size(0), target.size(0)
        tmp_s = torch.ones((1, ns)).to(source) @ source
        cs = (source.t() @ source - (tmp_s.t() @ tmp_s) / ns) / (ns - 1)
        tmp_t = torch.ones((1, nt)).to(target) @ target
        ct = (target.t() @ target - (tmp_t.t() @ tmp_t) / nt) / (nt - 1)
        loss = (cs - ct).pow(2).sum().sqrt()
        return loss / (4 * d * d)

    def mmd(self, source, target, kernel_mul=2.0, kernel_num=5):
        n_samples = int(source.size()[0]) + int(target.size()[0])
        total = torch.cat([source, target], dim=0)
        total0 = total.unsqueeze(0).expand(int(total.size(0)), int(total.size(0)), int(total.size(1)))
        total1 = total.unsqueeze(1).expand(int(total.size(0)), int(total.size(0)), int(total.size(1)))
        L2_distance = ((total0 - total1) ** 2).sum(2)
        bandwidth = torch.sum(L2_distance.data) / (n_samples**2 - n_samples)
        bandwidth /= kernel_mul ** (kernel_num // 2)
        bandwidth_list = [bandwidth * (kernel_mul**i) for i in range(kernel_num)]
        kernels = sum([torch.exp(-L2_distance / bandwidth_temp) for bandwidth_temp in bandwidth_list])
        n = int(source.size()[0])
        XX, YY, XY, YX = kernels[:n, :n], kernels[n:, n:], kernels[:n, n:], kernels[n:, :n]
        return torch.mean(XX + YY - XY - YX)

    def forward(self, source, target):
        s, t = self.features(source), self.features(target)
        return self.coral(s, t), self.mmd(s, t), s


@model(FIELD, source="https://github.com/jindongwang/transferlearning, code/DeepDA/loss_funcs/coral.py and mmd.py")
def deep_coral():
    return DeepCORAL(), (normal(8, 6), normal(8, 6, seed=1) + 0.5)


class BIN(nn.Module):
    """AdaIN-like moves of the target's statistics to the source's, then BatchNorm; statistics by instance."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.mix = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.enc(x)
        B = x.size(0)
        mu = x.mean(dim=[2, 3], keepdim=True)
        var = x.var(dim=[2, 3], keepdim=True)
        sig = (var + 1e-6).sqrt()
        mu, sig = mu.detach(), sig.detach()
        x_normed = (x - mu) / sig
        lmda = 0.1 + 0.8 * torch.arange(B, dtype=x.dtype).view(B, 1, 1, 1) / B
        perm = torch.arange(B - 1, -1, -1)  # inverse index
        perm_b, perm_a = perm.chunk(2)
        perm = torch.cat([perm_b, perm_a], 0)
        mu2, sig2 = mu[perm], sig[perm]
        mu_mix = mu * lmda + mu2 * (1 - lmda)
        sig_mix = sig * lmda + sig2 * (1 - lmda)
        return self.mix(x_normed * sig_mix + mu_mix)


@model(FIELD, source="https://github.com/KaiyangZhou/mixstyle-release, dassl's mixstyle.py, its random numbers fixed")
def mixstyle():
    return BIN(), (normal(4, 3, 6, 6),)
