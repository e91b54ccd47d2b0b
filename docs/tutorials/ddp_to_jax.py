# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # DDP and SyncBatchNorm to JAX in ten minutes
#
# You have a training loop in PyTorch with `DistributedDataParallel` and `SyncBatchNorm`. At the end of this page the
# same model trains in JAX over eight devices, with the optimizer and the schedule that you have. Its loss is PyTorch's
# at every step, and PyTorch loads the result with `strict=True`.
#
# The page needs no accelerator: the eight devices are virtual ones on a CPU. All is in float64, so that what the two
# sides differ by is rounding and can be told from a mistake.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import interop
import jaxnorm

jax.config.update("jax_platforms", "cpu")  # leave these two lines out where you have eight devices
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The loop in PyTorch
#
# As it runs on eight GPUs, a process for each:
#
# ```python
# dist.init_process_group("nccl")
# module = nn.SyncBatchNorm.convert_sync_batchnorm(SmallNet()).to(rank)
# module = DistributedDataParallel(module, device_ids=[rank])
# optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
# scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS, cycle_momentum=False)
#
# for images, labels in loader:                            # a DistributedSampler: this process's 4 of the 32 images
#     loss = functional.cross_entropy(module(images), labels)
#     optimizer.zero_grad()
#     loss.backward()
#     optimizer.step()
#     scheduler.step()
# ```
#
# `SyncBatchNorm` takes mean and variance over all 32 images, and `DistributedDataParallel` averages the gradients of
# eight equal parts. So one process with the whole batch and ordinary BatchNorm computes the same. That is what stands
# for PyTorch here.


# %%
class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


STEPS, BATCH = 100, 32
pixels, labels = load_digits(return_X_y=True)
images = pixels.reshape(-1, 1, 8, 8) / 16
rng = np.random.default_rng(0)
batches = [rng.permutation(len(images))[:BATCH] for _ in range(STEPS)]

torch.manual_seed(0)
module = SmallNet().double()
optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS, cycle_momentum=False)

# %% [markdown]
# JAX starts from the same weights, and from the same place of the schedule. So the hand-over comes before PyTorch's
# loop runs: everything that is read from PyTorch is read here.
#
# ## The same in JAX
#
# | PyTorch | here |
# |---|---|
# | `nn.SyncBatchNorm.convert_sync_batchnorm(module)` | `jaxnorm.convert_sync_batchnorm(model, axis_name="batch")` |
# | the optimizer, the scheduler | `interop.optax_from_torch`, `interop.schedule_from_torch` |
# | `zero_grad`, `backward`, `optimizer.step`, `scheduler.step` | `jaxnorm.train_step(loss_fn)` |
# | `DistributedDataParallel`, `DistributedSampler` | `jaxnorm.data_parallel(step)`: splits the batch, sums gradients |
# | weights, momentum, running statistics, step | one value, `TrainState`, that the step takes and gives |
# | `init_process_group`, on several machines | `jaxnorm.join_processes()` |

# %%
model = interop.from_torch(module, torch.zeros(2, 1, 8, 8, dtype=torch.float64))
model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")

rates = interop.schedule_from_torch(scheduler, steps=STEPS - 1)
tx = interop.optax_from_torch(optimizer, learning_rate=rates)
state = jaxnorm.TrainState.create(model, tx)

# %% [markdown]
# `loss_fn` says what PyTorch's loop says before `backward`. It is written for the part of the batch that a device has:
# the step weighs the parts and adds them up. The convolutions keep PyTorch's layout, (N, C, H, W), so images go in as
# they do there.


# %%
def loss_fn(model, batch):
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="shard_map")

jax_losses = []
for chosen in batches:
    state, metrics = step(state, {"image": images[chosen], "label": labels[chosen]})
    jax_losses.append(float(metrics["loss"]))

print(f"{len(jax.devices())} devices, {BATCH // len(jax.devices())} images each; last loss {jax_losses[-1]:.4f}")

# %% [markdown]
# PyTorch, on the same batches:

# %%
torch_losses = []
for chosen in batches:
    loss = functional.cross_entropy(module(torch.tensor(images[chosen])), torch.tensor(labels[chosen]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    torch_losses.append(loss.item())

difference = np.abs(np.subtract(torch_losses, jax_losses))
print(f"largest difference between the losses of {STEPS} steps: {difference.max():.1e}")

# %% [markdown]
# ## Two losses, one curve

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(torch_losses, color="tab:orange", linewidth=5, alpha=0.5, label="PyTorch, the whole batch")
left.plot(jax_losses, color="tab:blue", linewidth=1.2, label="JAX, 8 devices of 4 images")
left.set(xlabel="step", ylabel="loss", title="Both losses")
left.legend()
right.semilogy(np.maximum(difference, 1e-17), ".", color="tab:blue")  # none: at the lower edge
right.axhline(np.finfo(np.float64).eps, color="grey", linewidth=1, label="float64's epsilon, 2.2e-16")
right.set(xlabel="step", ylabel="difference", title="What they differ by", ylim=(5e-18, 1e-8))
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# Eight devices add numbers in another order than one, so the last digits differ, and each step starts from the
# differences of the one before. Gradients that are summed where they should be averaged, or a variance over 4 images
# where it should be over 32, would be seen at once.
#
# Running statistics have no part in this loss, so compare them by themselves. Two things are easy to get wrong by hand:
# `momentum=0.1` in PyTorch is the share of the new batch, Flax's `momentum=0.9` is the share that is kept; and PyTorch
# tracks the unbiased variance, Flax the biased one. The import translates the first and keeps the second.

# %%
layer = state.model().bn2
print(f"PyTorch: momentum {module.bn2.momentum}; JAX: momentum {layer.momentum}")
mean, var = module.bn2.running_mean.numpy(), module.bn2.running_var.numpy()
print(f"running mean and variance differ by {np.abs(layer.mean - mean).max():.1e}, {np.abs(layer.var - var).max():.1e}")

# %% [markdown]
# ## Home again
#
# The state dict has PyTorch's names, shapes and dtypes, the counter `num_batches_tracked` included, so a fresh module
# takes it strictly. In eval mode it gives the logits that JAX gives.

# %%
home = SmallNet().double()
print(home.load_state_dict(interop.to_torch(interop.state_dict(state)), strict=True))

home.eval()
trained = state.model()
trained.eval()
with torch.no_grad():
    theirs = home(torch.tensor(images)).numpy()
ours = np.asarray(trained(images))
print(f"accuracy on all {len(images)} images: PyTorch {np.mean(theirs.argmax(-1) == labels):.2%}, ", end="")
print(f"JAX {np.mean(ours.argmax(-1) == labels):.2%}; largest difference of logits {np.abs(theirs - ours).max():.1e}")

# %% [markdown]
# `interop.save_checkpoint("model.pth", state)` writes the same as a file that `torch.load` reads. The optimizer goes
# home too: `optimizer.load_state_dict(interop.optimizer_state_dict(state, optimizer, names=module))`.
#
# ## On your own loop
#
# - Several machines: call `jaxnorm.join_processes()` first and give each process its own part of the batch
#   ([many processes](../pods.md)).
# - Accumulation, clipping, bfloat16, EMA: arguments of `train_step` and `TrainState.create`
#   ([training](../training.md)).
# - A run that is half done: `interop.load_optimizer_state` takes the optimizer's state over
#   ([hand-over](../training.md#hand-over-in-mid-training)).
