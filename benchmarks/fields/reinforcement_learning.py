"""Reinforcement learning: policies, values, critics and world models with BatchNorm."""
# ruff: noqa: B905, RUF005, UP031  (as the sources have it)

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import integers, model, normal

FIELD = "reinforcement_learning"


class AlphaZeroNet(nn.Module):
    def __init__(self, board=6, planes=4, channels=8, blocks=2, actions=37):
        super().__init__()
        self.board_x = self.board_y = board
        self.action_size = actions
        self.conv = nn.Conv2d(planes, channels, 3, stride=1, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        for block in range(blocks):
            setattr(self, "res_%i" % block, ResBlock(channels, channels))
        self.blocks = blocks
        self.value_conv = nn.Conv2d(channels, 3, kernel_size=1)
        self.value_bn = nn.BatchNorm2d(3)
        self.fc1 = nn.Linear(3 * board * board, 16)
        self.fc2 = nn.Linear(16, 1)
        self.policy_conv = nn.Conv2d(channels, 4, kernel_size=1)
        self.policy_bn = nn.BatchNorm2d(4)
        self.logsoftmax = nn.LogSoftmax(dim=1)
        self.fc = nn.Linear(board * board * 4, actions)

    def forward(self, s, mask):
        s = F.relu(self.bn1(self.conv(s)))
        for block in range(self.blocks):
            s = getattr(self, "res_%i" % block)(s)
        v = F.relu(self.value_bn(self.value_conv(s)))
        v = v.view(-1, 3 * self.board_x * self.board_y)
        v = F.relu(self.fc1(v))
        v = torch.tanh(self.fc2(v))
        p = F.relu(self.policy_bn(self.policy_conv(s)))
        p = p.view(-1, self.board_x * self.board_y * 4)
        p = self.fc(p)
        p = p.masked_fill(mask == 0, -1e9)
        p = self.logsoftmax(p).exp()
        return p, v


class ResBlock(nn.Module):
    def __init__(self, inplanes=128, planes=128, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x):
        residual = x
        out = self.conv1(x)
        out = F.relu(self.bn1(out))
        out = self.conv2(out)
        out = self.bn2(out)
        out += residual
        out = F.relu(out)
        return out


@model(FIELD, source="https://github.com/plkmo/AlphaZero_Connect4, src/alpha_net.py, with a mask of legal moves")
def alphazero():
    return AlphaZeroNet(), (normal(4, 4, 6, 6), (integers(4, 4, 37) > 0).long())


class MuZeroResBlock(nn.Module):
    def __init__(self, num_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, num_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out)


def mlp(input_size, layer_sizes, output_size, output_activation=nn.Identity, activation=nn.ELU):
    sizes = [input_size] + layer_sizes + [output_size]
    layers = []
    for i in range(len(sizes) - 1):
        act = activation if i < len(sizes) - 2 else output_activation
        layers += [nn.Linear(sizes[i], sizes[i + 1]), act()]
    return nn.Sequential(*layers)


class MuZeroResidualNetwork(nn.Module):
    """Representation, then a number of unrolled dynamics steps with predictions."""

    def __init__(self, channels=6, action_space_size=4, support_size=3, board=5):
        super().__init__()
        self.action_space_size = action_space_size
        self.full_support_size = 2 * support_size + 1
        self.conv = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.resblocks = nn.ModuleList([MuZeroResBlock(channels) for _ in range(1)])
        self.dyn_conv = nn.Conv2d(channels + 1, channels, 3, 1, 1, bias=False)
        self.dyn_bn = nn.BatchNorm2d(channels)
        self.dyn_resblocks = nn.ModuleList([MuZeroResBlock(channels) for _ in range(1)])
        self.conv1x1_reward = nn.Conv2d(channels, 2, 1)
        self.conv1x1_value = nn.Conv2d(channels, 2, 1)
        self.conv1x1_policy = nn.Conv2d(channels, 2, 1)
        self.block_output_size = 2 * board * board
        self.fc_reward = mlp(self.block_output_size, [8], self.full_support_size)
        self.fc_value = mlp(self.block_output_size, [8], self.full_support_size)
        self.fc_policy = mlp(self.block_output_size, [8], action_space_size)
        self.support_size = support_size

    def prediction(self, x):
        value = self.conv1x1_value(x)
        policy = self.conv1x1_policy(x)
        value = value.view(-1, self.block_output_size)
        policy = policy.view(-1, self.block_output_size)
        return self.fc_policy(policy), self.fc_value(value)

    def normalise(self, encoded_state):
        # Scale encoded state between [0, 1] (See paper appendix Training)
        flat = encoded_state.view(-1, encoded_state.shape[1], encoded_state.shape[2] * encoded_state.shape[3])
        min_encoded_state = flat.min(2, keepdim=True)[0].unsqueeze(-1)
        max_encoded_state = flat.max(2, keepdim=True)[0].unsqueeze(-1)
        scale_encoded_state = max_encoded_state - min_encoded_state
        scale_encoded_state[scale_encoded_state < 1e-5] += 1e-5
        return (encoded_state - min_encoded_state) / scale_encoded_state

    def representation(self, observation):
        x = F.relu(self.bn(self.conv(observation)))
        for block in self.resblocks:
            x = block(x)
        return self.normalise(x)

    def dynamics(self, encoded_state, action):
        action_one_hot = (
            torch.ones((encoded_state.shape[0], 1, encoded_state.shape[2], encoded_state.shape[3]))
            .to(action.device)
            .to(encoded_state.dtype)
        )
        action_one_hot = action[:, :, None, None] * action_one_hot / self.action_space_size
        x = torch.cat((encoded_state, action_one_hot), dim=1)
        x = F.relu(self.dyn_bn(self.dyn_conv(x)))
        for block in self.dyn_resblocks:
            x = block(x)
        state = x
        x = self.conv1x1_reward(x).view(-1, self.block_output_size)
        return self.normalise(state), self.fc_reward(x)

    def support_to_scalar(self, logits):
        probabilities = torch.softmax(logits, dim=1)
        support = (
            torch.tensor([x for x in range(-self.support_size, self.support_size + 1)])
            .expand(probabilities.shape)
            .to(probabilities)
        )
        x = torch.sum(support * probabilities, dim=1, keepdim=True)
        # Invert the scaling (defined in https://arxiv.org/abs/1805.11593)
        x = torch.sign(x) * (((torch.sqrt(1 + 4 * 0.001 * (torch.abs(x) + 1 + 0.001)) - 1) / (2 * 0.001)) ** 2 - 1)
        return x

    def forward(self, observation, actions):
        hidden = self.representation(observation)
        policy, value = self.prediction(hidden)
        predictions = [(value, policy)]
        rewards = []
        for i in range(actions.shape[1]):
            hidden, reward = self.dynamics(hidden, actions[:, i : i + 1])
            hidden.register_hook(lambda grad: grad * 0.5) if hidden.requires_grad else None
            policy, value = self.prediction(hidden)
            predictions.append((value, policy))
            rewards.append(self.support_to_scalar(reward))
        return predictions, rewards


@model(
    FIELD, source="https://github.com/werner-duvaud/muzero-general, models.py and trainer.py (hooks halve gradients)"
)
def muzero():
    return MuZeroResidualNetwork(), (normal(4, 3, 5, 5), integers(4, 4, 2))


def fanin_init(size, fanin=None):
    fanin = fanin or size[0]
    v = 1.0 / np.sqrt(fanin)
    return torch.Tensor(size).uniform_(-v, v)


class DDPG(nn.Module):
    """Actor, critic, and target copies moved towards them."""

    def __init__(self, nb_states=6, nb_actions=2, hidden1=16, hidden2=12, init_w=3e-3, action_bound=2.0):
        super().__init__()
        self.actor = nn.Sequential(
            nn.BatchNorm1d(nb_states),
            nn.Linear(nb_states, hidden1), nn.BatchNorm1d(hidden1), nn.ReLU(),
            nn.Linear(hidden1, hidden2), nn.BatchNorm1d(hidden2), nn.ReLU(),
            nn.Linear(hidden2, nb_actions), nn.Tanh(),
        )  # fmt: skip
        self.actor[1].weight.data = fanin_init(self.actor[1].weight.data.size())
        self.actor[7].weight.data.uniform_(-init_w, init_w)
        self.critic_bn = nn.BatchNorm1d(nb_states, momentum=0.01)
        self.critic1 = nn.Linear(nb_states, hidden1)
        self.critic_bn1 = nn.BatchNorm1d(hidden1)
        self.critic2 = nn.Linear(hidden1 + nb_actions, hidden2)
        self.critic3 = nn.Linear(hidden2, 1)
        self.action_bound = torch.tensor(action_bound)

    def q(self, x, a):
        out = self.critic1(self.critic_bn(x))
        out = F.relu(self.critic_bn1(out))
        out = F.relu(self.critic2(torch.cat([out, a], 1)))
        return self.critic3(out)

    def forward(self, state, action):
        q = self.q(state, action)
        policy_loss = -self.q(state, self.actor(state) * self.action_bound)
        return q, policy_loss.mean()


@model(FIELD, source="https://github.com/ghliu/pytorch-ddpg, model.py, with the paper's BatchNorm")
def ddpg():
    return DDPG(), (normal(8, 6), normal(8, 2, seed=1))


class BatchRenorm1d(nn.Module):
    """With warm-up by a counter of steps, as CrossQ's ports have it."""

    def __init__(self, num_features, eps=0.001, momentum=0.99, affine=True, warmup_steps=100000):
        super().__init__()
        self.register_buffer("ra_mean", torch.zeros(num_features))
        self.register_buffer("ra_var", torch.ones(num_features))
        self.register_buffer("steps", torch.tensor(150000, dtype=torch.long))
        self.scale = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.affine = affine
        self.eps = eps
        self.rmax, self.dmax = 3.0, 5.0
        self.momentum = momentum
        self.num_features = num_features
        self.warmup_steps = warmup_steps

    def forward(self, x):
        if self.training:
            batch_mean = x.mean(0)
            batch_var = x.var(0, unbiased=False)
            batch_std = (batch_var + self.eps).sqrt()
            with torch.no_grad():
                running_std = (self.ra_var + self.eps).sqrt()
                r = (batch_std / running_std).clamp(1 / self.rmax, self.rmax)
                d = ((batch_mean - self.ra_mean) / running_std).clamp(-self.dmax, self.dmax)
                warmed_up = self.steps > self.warmup_steps
                r = torch.where(warmed_up, r, torch.ones_like(r))
                d = torch.where(warmed_up, d, torch.zeros_like(d))
            custom_mean = batch_mean - d * batch_std.detach() / r
            custom_var = batch_var / r.square()
            self.ra_mean += (1 - self.momentum) * (batch_mean.detach() - self.ra_mean)
            self.ra_var.mul_(self.momentum).add_(batch_var.detach(), alpha=1 - self.momentum)
            self.steps += 1
        else:
            custom_mean, custom_var = self.ra_mean, self.ra_var
        x = (x - custom_mean[None]) / (custom_var[None] + self.eps).sqrt()
        if self.affine:
            x = self.scale * x + self.bias
        return x


class CrossQCritic(nn.Module):
    """Two critics over the joint batch of (s, a) and (s', a'), without target networks."""

    def __init__(self, obs=6, act=2, width=16):
        super().__init__()

        def q_network():
            return nn.Sequential(
                BatchRenorm1d(obs + act),
                nn.Linear(obs + act, width), nn.ReLU(), BatchRenorm1d(width),
                nn.Linear(width, width), nn.ReLU(), BatchRenorm1d(width),
                nn.Linear(width, 1),
            )  # fmt: skip

        self.q_networks = nn.ModuleList([q_network() for _ in range(2)])
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self, obs, action, next_obs, next_action):
        joint = torch.cat([torch.cat([obs, action], 1), torch.cat([next_obs, next_action], 1)])
        q = torch.stack([net(joint) for net in self.q_networks])
        q, q_next = q.squeeze(-1).chunk(2, dim=1)
        target = (q_next.min(0).values - self.log_alpha.exp() * 0.3).detach()
        return q, 0.5 * F.mse_loss(q, (0.99 * target).expand_as(q), reduction="sum")


@model(
    FIELD, source="CrossQ: https://github.com/Stable-Baselines-Team/stable-baselines3-contrib, common/torch_layers.py"
)
def crossq():
    return CrossQCritic(), (normal(8, 6), normal(8, 2, seed=1), normal(8, 6, seed=2), normal(8, 2, seed=3))


class ImpalaBlock(nn.Module):
    def __init__(self, depth_in, depth_out):
        super().__init__()
        self.conv = nn.Conv2d(depth_in, depth_out, 3, padding=1)
        self.max_pool = nn.MaxPool2d(3, 2, padding=1)
        self.res = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(depth_out, depth_out, 3, padding=1), nn.BatchNorm2d(depth_out),
                nn.ReLU(), nn.Conv2d(depth_out, depth_out, 3, padding=1), nn.BatchNorm2d(depth_out),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        x = self.max_pool(self.conv(x))
        for res in self.res:
            x = x + res(x)
        return x


class IMPALA(nn.Module):
    """Frames of T steps through the convolutions at once, then an LSTM that forgets where an episode ended."""

    def __init__(self, num_actions=4):
        super().__init__()
        self.num_actions = num_actions
        self.blocks = nn.Sequential(ImpalaBlock(3, 4), ImpalaBlock(4, 6))
        self.fc = nn.Linear(6 * 3 * 3, 12)
        core_output_size = self.fc.out_features + num_actions + 1
        self.core = nn.LSTM(core_output_size, 8, 1)
        self.policy = nn.Linear(8, num_actions)
        self.baseline = nn.Linear(8, 1)

    def initial_state(self, batch_size):
        return tuple(torch.zeros(self.core.num_layers, batch_size, self.core.hidden_size) for _ in range(2))

    def forward(self, frame, last_action, reward, done):
        x = frame.transpose(0, 1)  # [T, B, C, H, W]
        last_action, reward, done = last_action.T, reward.T, done.T > 0
        T, B, *_ = x.shape
        x = torch.flatten(x, 0, 1)
        x = x / 255.0 + x * 0.9
        x = F.relu(self.blocks(x))
        x = x.reshape(T * B, -1)
        x = F.relu(self.fc(x))
        one_hot_last_action = F.one_hot(last_action.reshape(T * B), self.num_actions).to(x.dtype)
        clipped_reward = torch.clamp(reward, -1, 1).reshape(T * B, 1)
        core_input = torch.cat([x, clipped_reward, one_hot_last_action], dim=-1)
        core_input = core_input.view(T, B, -1)
        core_output_list = []
        notdone = (~done).to(x.dtype)
        core_state = tuple(s.to(x) for s in self.initial_state(B))
        for input, nd in zip(core_input.unbind(), notdone.unbind()):
            # Reset core state to zero whenever an episode ended.
            nd = nd.view(1, -1, 1)
            core_state = tuple(nd * s for s in core_state)
            output, core_state = self.core(input.unsqueeze(0), core_state)
            core_output_list.append(output)
        core_output = torch.flatten(torch.cat(core_output_list), 0, 1)
        policy_logits = self.policy(core_output)
        baseline = self.baseline(core_output)
        return {"policy_logits": policy_logits.view(T, B, -1), "baseline": baseline.view(T, B)}


@model(
    FIELD, source="https://github.com/facebookresearch/torchbeast, polybeast_learner.py (Net), BatchNorm as Procgen's"
)
def impala():
    return IMPALA(), (normal(2, 3, 3, 12, 12), integers(4, 2, 3), normal(2, 3, seed=1), integers(2, 2, 3, seed=2))


class NoisyLinear(nn.Module):
    def __init__(self, in_features, out_features, std_init=0.5):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.std_init = std_init
        self.weight_mu = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_sigma = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("weight_epsilon", torch.empty(out_features, in_features))
        self.bias_mu = nn.Parameter(torch.empty(out_features))
        self.bias_sigma = nn.Parameter(torch.empty(out_features))
        self.register_buffer("bias_epsilon", torch.empty(out_features))
        self.reset_parameters()
        self.reset_noise()

    def reset_parameters(self):
        mu_range = 1 / math.sqrt(self.in_features)
        self.weight_mu.data.uniform_(-mu_range, mu_range)
        self.weight_sigma.data.fill_(self.std_init / math.sqrt(self.in_features))
        self.bias_mu.data.uniform_(-mu_range, mu_range)
        self.bias_sigma.data.fill_(self.std_init / math.sqrt(self.out_features))

    def _scale_noise(self, size):
        x = torch.randn(size)
        return x.sign().mul_(x.abs().sqrt_())

    def reset_noise(self):
        epsilon_in = self._scale_noise(self.in_features)
        epsilon_out = self._scale_noise(self.out_features)
        self.weight_epsilon.copy_(epsilon_out.ger(epsilon_in))
        self.bias_epsilon.copy_(epsilon_out)

    def forward(self, input):
        if self.training:
            return F.linear(
                input,
                self.weight_mu + self.weight_sigma * self.weight_epsilon,
                self.bias_mu + self.bias_sigma * self.bias_epsilon,
            )
        else:
            return F.linear(input, self.weight_mu, self.bias_mu)


class Rainbow(nn.Module):
    """Distributional, duelling, noisy; and the projection of the target distribution onto the atoms."""

    def __init__(self, actions=3, atoms=7):
        super().__init__()
        self.atoms = atoms
        self.action_space = actions
        self.register_buffer("support", torch.linspace(-3, 3, atoms))
        self.convs = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=0), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=1, padding=0), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.conv_output_size = 8 * 9
        self.fc_h_v = NoisyLinear(self.conv_output_size, 10)
        self.fc_h_a = NoisyLinear(self.conv_output_size, 10)
        self.fc_z_v = NoisyLinear(10, self.atoms)
        self.fc_z_a = NoisyLinear(10, actions * self.atoms)

    def q(self, x, log=False):
        x = self.convs(x)
        x = x.view(-1, self.conv_output_size)
        v = self.fc_z_v(F.relu(self.fc_h_v(x)))
        a = self.fc_z_a(F.relu(self.fc_h_a(x)))
        v, a = v.view(-1, 1, self.atoms), a.view(-1, self.action_space, self.atoms)
        q = v + a - a.mean(1, keepdim=True)
        return F.log_softmax(q, dim=2) if log else F.softmax(q, dim=2)

    def forward(self, states, next_states, actions, returns):
        batch_size = states.size(0)
        v_min, v_max = -3.0, 3.0
        delta_z = (v_max - v_min) / (self.atoms - 1)
        log_ps = self.q(states, log=True)
        log_ps_a = log_ps[range(batch_size), actions]
        with torch.no_grad():
            pns = self.q(next_states)
            dns = self.support.expand_as(pns) * pns
            argmax_indices_ns = dns.sum(2).argmax(1)
            pns_a = pns[range(batch_size), argmax_indices_ns]
            Tz = returns.unsqueeze(1) + 0.99 * self.support.unsqueeze(0)
            Tz = Tz.clamp(min=v_min, max=v_max)
            b = (Tz - v_min) / delta_z
            l, u = b.floor().to(torch.int64), b.ceil().to(torch.int64)
            l[(u > 0) * (l == u)] -= 1
            u[(l < (self.atoms - 1)) * (l == u)] += 1
            m = states.new_zeros(batch_size, self.atoms)
            offset = (
                torch.linspace(0, ((batch_size - 1) * self.atoms), batch_size)
                .unsqueeze(1)
                .expand(batch_size, self.atoms)
                .to(actions)
            )
            m.view(-1).index_add_(0, (l + offset).view(-1), (pns_a * (u.to(b) - b)).view(-1))
            m.view(-1).index_add_(0, (u + offset).view(-1), (pns_a * (b - l.to(b))).view(-1))
        loss = -torch.sum(m * log_ps_a, 1)
        return loss, log_ps


@model(FIELD, source="https://github.com/Kaixhin/Rainbow, model.py and agent.py (learn), with BatchNorm")
def rainbow():
    return Rainbow(), (normal(4, 4, 11, 11), normal(4, 4, 11, 11, seed=1), integers(3, 4), normal(4, seed=2))


class WorldModel(nn.Module):
    """Convolutional encoder with BatchNorm, categorical latents with straight-through gradients, GRU dynamics."""

    def __init__(self, classes=4, groups=3, deter=8, actions=2):
        super().__init__()
        self.classes, self.groups, self.deter = classes, groups, deter
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(),
        )  # fmt: skip
        self.to_logits = nn.Linear(6 * 4 + deter, groups * classes)
        self.cell = nn.GRUCell(groups * classes + actions, deter)
        self.prior = nn.Sequential(nn.Linear(deter, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, groups * classes))
        self.decoder = nn.Sequential(
            nn.Linear(deter + groups * classes, 6 * 4), nn.Unflatten(1, (6, 2, 2)),
            nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4, 3, 4, 2, 1),
        )  # fmt: skip

    def latent(self, logits):
        logits = logits.view(-1, self.groups, self.classes)
        probs = logits.softmax(-1) * 0.99 + 0.01 / self.classes
        distribution = torch.distributions.OneHotCategorical(probs=probs, validate_args=False)
        sample = F.one_hot(distribution.probs.argmax(-1), self.classes).to(probs)
        return (sample + probs - probs.detach()).flatten(1), distribution.logits

    def forward(self, images, actions):
        B, T = images.shape[:2]
        embed = self.encoder(images.flatten(0, 1)).view(B, T, -1)
        h = images.new_zeros(B, self.deter)
        z = images.new_zeros(B, self.groups * self.classes)
        states, kls = [], []
        for t in range(T):
            h = self.cell(torch.cat([z, actions[:, t]], -1), h)
            z, post = self.latent(self.to_logits(torch.cat([embed[:, t], h], -1)))
            _, prior = self.latent(self.prior(h))
            kls.append((post.exp() * (post - prior)).sum((-1, -2)).clamp(min=0.05))
            states.append(torch.cat([h, z], -1))
        states = torch.stack(states, 1)
        decoded = self.decoder(states.flatten(0, 1)).view_as(images)
        return F.mse_loss(decoded, images, reduction="none").sum((2, 3, 4)), torch.stack(kls, 1)


@model(
    FIELD, source="STORM / DreamerV2: https://github.com/weipu-zhang/STORM, sub_models/world_models.py; mode for sample"
)
def world_model():
    return WorldModel(), (normal(3, 3, 3, 8, 8), normal(3, 3, 2, seed=1))


class RunningNorm(nn.Module):
    """Observations normalised by Welford's moments, kept as buffers, then a Gaussian policy squashed by tanh."""

    def __init__(self, n=6, actions=2):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("var", torch.ones(n))
        self.register_buffer("count", torch.tensor(1e-4))
        self.body = nn.Sequential(nn.Linear(n, 12), nn.BatchNorm1d(12), nn.Tanh())
        self.mu = nn.Linear(12, actions)
        self.log_std = nn.Linear(12, actions)

    @torch.no_grad()
    def update(self, x):
        batch_mean, batch_var, batch_count = x.mean(0), x.var(0, correction=0), x.shape[0]
        delta = batch_mean - self.mean
        tot_count = self.count + batch_count
        new_mean = self.mean + delta * batch_count / tot_count
        m_a = self.var * self.count
        m_b = batch_var * batch_count
        M2 = m_a + m_b + torch.square(delta) * self.count * batch_count / tot_count
        self.mean[:] = new_mean
        self.var[:] = M2 / tot_count
        self.count.fill_(tot_count)

    def forward(self, x, noise):
        if self.training:
            self.update(x)
        x = torch.clamp((x - self.mean) / torch.sqrt(self.var + 1e-8), -5, 5)
        h = self.body(x)
        mu, log_std = self.mu(h), self.log_std(h)
        log_std = torch.tanh(log_std)
        log_std = -5 + 0.5 * (2 + 5) * (log_std + 1)
        normal = torch.distributions.Normal(mu, log_std.exp(), validate_args=False)
        x_t = mu + log_std.exp() * noise
        y_t = torch.tanh(x_t)
        log_prob = normal.log_prob(x_t)
        log_prob -= torch.log((1 - y_t.pow(2)) + 1e-6)
        return y_t, log_prob.sum(1, keepdim=True), normal.entropy()


@model(FIELD, source="https://github.com/vwxyzjn/cleanrl, sac_continuous_action.py; RunningMeanStd of gym in a module")
def sac_running_norm():
    return RunningNorm(), (normal(8, 6), normal(8, 2, seed=1))
