# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A checkpoint's doctor
#
# A checkpoint can be wrong and load without a word. Its shapes fit, `load_state_dict(strict=True)` is content, and the
# model is worse than it was, or gives NaN, or runs somebody else's code.
#
# Here are seven files with faults that people really have. For each you see what PyTorch says, what it costs, and what
# finds it: `interop.load_checkpoint` and `interop.lint`, `jaxnorm inspect` and `jaxnorm diff` from a shell, and
# `interop.compare` for a Flax model that was given good weights and computes something else.

# %%
import copy
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import interop
import jaxnorm

folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## A healthy model
#
# A small network for 8x8 digits, trained for four epochs in PyTorch. As many loops do, this one keeps an average of the
# weights (EMA) beside the model. Hold on to the line that updates it: it goes through `parameters()`.

# %%
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=360, random_state=0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(32)
        self.conv3 = torch.nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False)
        self.bn3 = torch.nn.BatchNorm2d(32)
        self.fc = torch.nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


torch.manual_seed(0)
net = Net()
start = copy.deepcopy(net.state_dict())
average = copy.deepcopy(net)
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(4):
    for rows in torch.randperm(len(x_train)).split(64)[:-1]:
        loss = torch.nn.functional.cross_entropy(net(x_train[rows]), y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 0.1)


def accuracy(state):
    """Of PyTorch's model with a state dict, on the test images."""
    model = Net()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return (model.eval()(x_test).argmax(1) == y_test).float().mean().item()


healthy = copy.deepcopy(net.state_dict())
torch.save(healthy, folder / "healthy.pth")
print(f"accuracy {accuracy(healthy):.1%}")
print("findings:", interop.lint(folder / "healthy.pth"))

# %% [markdown]
# A healthy model has no findings.
#
# ## Seven files
#
# 1. **training.pth**, a training checkpoint: saved from DistributedDataParallel, so every name begins with `module.`;
#    the EMA is beside the model.
# 2. **converted.pth**: a conversion script made arrays of zeros and forgot to fill one, a running variance.
# 3. **arithmetic.pth**: weights times 1.2, counted from where training began (a task vector). What is sensible for
#    weights makes running variances negative.
# 4. **overflowed.pth**: the loss was NaN in the last step, one weight still is.
# 5. **counted.pth**: one layer was copied from a file without counters, so `num_batches_tracked` is 0 there.
# 6. **head.pth**: weights loaded with `strict=False` into a model whose head has another name. The head kept its
#    random numbers.
# 7. **gift.pth**: a pickle that calls a function when it is read. This one only makes an empty folder.

# %%
training = {
    "epoch": 4,
    "arch": "net",
    "state_dict": {f"module.{name}": value for name, value in healthy.items()},
    "state_dict_ema": {f"module.{name}": value for name, value in average.state_dict().items()},
    "optimizer": optimizer.state_dict(),
}
torch.save(training, folder / "training.pth")

torch.save({**healthy, "bn2.running_var": torch.zeros(32)}, folder / "converted.pth")

arithmetic = {name: start[name] + 1.2 * (value - start[name]) for name, value in healthy.items()}
torch.save(arithmetic, folder / "arithmetic.pth")

overflowed = copy.deepcopy(healthy)
overflowed["conv3.weight"][5, 0, 1, 1] = torch.nan
torch.save(overflowed, folder / "overflowed.pth")

torch.save({**healthy, "bn2.num_batches_tracked": torch.tensor(0)}, folder / "counted.pth")


class Renamed(Net):
    def __init__(self):
        super().__init__()
        del self.fc
        self.classifier = torch.nn.Linear(32, 10)


renamed = Renamed()
renamed.load_state_dict(healthy, strict=False)
torch.save(renamed.state_dict(), folder / "head.pth")


class Gift:
    def __reduce__(self):
        return os.mkdir, (str(folder / "executed"),)


torch.save({"state_dict": healthy, "notes": Gift()}, folder / "gift.pth")

# %% [markdown]
# ## What PyTorch says, and what it costs
#
# `torch.load` and `load_state_dict(strict=True)`, as one does:

# %%
names = ["healthy", "training", "converted", "arithmetic", "overflowed", "counted", "head", "gift"]
for name in names:
    try:
        state = torch.load(folder / f"{name}.pth")
        state = state.get("state_dict", state)
        print(f"{name:<11} loads, accuracy {accuracy(state):.1%}")
    except (RuntimeError, pickle.UnpicklingError) as error:
        print(f"{name:<11} {type(error).__name__}: {' '.join(str(error).split())[:80]} ...")

# %% [markdown]
# Three files are refused; those are the lucky ones. Of the sick files that load, one has lost a part of its accuracy
# and two are no better than guessing, and nothing said so. (`counted.pth` computes what it should; what its counter
# means comes below.)
#
# ## Reading a file: names, averages, pickles
#
# `interop.load_checkpoint` gives the weights under the model's own names, whatever is around them, and says what it
# took off. `which` chooses between model and average; what a file offers is in `metadata["choices"]`.

# %%
for which in ("model", "ema"):
    checkpoint = interop.load_checkpoint(folder / "training.pth", which=which)
    print(which, checkpoint.metadata["unwrapped"], f"{accuracy(interop.to_torch(checkpoint)):.1%}")
print(checkpoint.metadata["choices"], checkpoint.metadata["epoch"], list(checkpoint)[:2])

# %% [markdown]
# The model is back. The average has the right names and is bad all the same; that is a case for `lint`.
#
# First the gift. Reading a pickle means doing what it says, and it may say "call this function". `torch.load` refuses
# such a file since it reads weights only by default (`weights_only=True`). Many scripts answer that by
# `weights_only=False`, which obeys. `load_checkpoint` reads the weights and obeys nothing:

# %%
executed = folder / "executed"

checkpoint = interop.load_checkpoint(folder / "gift.pth")
print(f"load_checkpoint: {len(checkpoint)} arrays, accuracy {accuracy(interop.to_torch(checkpoint)):.1%}")
print("executed:", executed.exists(), "- notes:", checkpoint.metadata["notes"])

torch.load(folder / "gift.pth", weights_only=False)
print("torch.load(weights_only=False) executed:", executed.exists())

# %% [markdown]
# ## Looking at the numbers: lint
#
# `interop.lint` takes a path, a checkpoint, a state dict or a model, runs nothing, and says what looks wrong, the worst
# first. The docs have [each rule](../lint.md): what it means, where it was seen, what to do.

# %%
ema = interop.load_checkpoint(folder / "training.pth", which="ema")
targets = {name: folder / f"{name}.pth" for name in names} | {"the average": ema}
for name, target in targets.items():
    findings = interop.lint(target)
    print(f"{name}: {len(findings) or 'no'} finding{'s' if len(findings) > 1 else ''}")
    for finding in findings:
        print(f"    {finding.severity} in {finding.layer} ({finding.rule}): {finding.message}")

# %% [markdown]
# The average's running statistics never moved. The training loop went through `parameters()`, and running statistics
# are buffers: the average has averaged weights, and the statistics of a model that has seen no image.
#
# `head.pth` has no finding: lint sees one file, and in that a new head is nothing strange. What was *not* loaded shows
# beside the file that it should have come from: that is `diff`, below. The arrays of `gift.pth` are healthy.
#
# Here are the variances in one picture. In eval mode a channel is divided by the square root of its running variance.

# %%
files = {
    "healthy": healthy,
    "average,\nnever moved": interop.to_torch(ema),
    "zeros of a\nconversion": interop.load_checkpoint(folder / "converted.pth"),
    "weight\narithmetic": arithmetic,
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
jitter = np.random.default_rng(0).uniform(-0.25, 0.25, 32)
for axis, layer in zip(axes, ("bn1", "bn2", "bn3"), strict=True):
    for place, state in enumerate(files.values()):
        values = np.asarray(state[f"{layer}.running_var"])
        found = any(finding.layer == layer for finding in interop.lint(state))
        axis.scatter(place + jitter[: len(values)], values, s=12, color="tab:red" if found else "tab:blue")
    axis.axhspan(-1, 0, color="tab:red", alpha=0.12)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(-1, 4)
    axis.set_xticks(range(len(files)), files, fontsize=7)
    axis.set_title(layer)
    axis.grid(axis="y", alpha=0.3)
axes[0].set_ylabel("running variance, one dot a channel")
figure.suptitle("Running variances by layer and file. Red: lint has a finding")
plt.show()

# %% [markdown]
# ## Modules know more
#
# A file holds arrays. Momentum and eps are in the model's code, so some faults show in a module only. A counter of 0 is
# harmless with PyTorch's default, momentum 0.1, which does not use it. With `momentum=None` the n-th batch weighs
# 1 / n, and the first batch of fine-tuning replaces the statistics of the whole training. And a momentum may be the
# other framework's:

# %%
module = Net()
module.load_state_dict(interop.to_torch(interop.load_checkpoint(folder / "counted.pth")))
module.bn2.momentum = None
module.bn3.momentum = 0.9  # in Flax and TensorFlow the share that is kept; in PyTorch the share that is new

for finding in interop.lint(module):
    print(f"{finding.rule}, {finding.layer}: {finding.message}; suggested: {finding.suggested}")

# %% [markdown]
# ## From a shell
#
# The same without Python: `pip install 'jaxnorm[cli]'` brings the command `jaxnorm`. This notebook runs it as
# `python -m interop.cli`, which is the same program.


# %%
def shell(*arguments):
    print("$ jaxnorm", *arguments)
    command = [sys.executable, "-m", "interop.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(f"{done.stdout}{done.stderr}exit code {done.returncode}\n")


shell("inspect", "training.pth", "--which", "ema", "--depth", "0")

# %% [markdown]
# `inspect` shows what the file says of itself, what `--which` may be, the tree of its layers, the range of each
# BatchNorm layer's statistics, and lint's findings. `--plot x.png` draws the statistics, `--json` is for programs.
#
# `diff` compares two files. This is how the head that was never loaded comes out, and that all else was:

# %%
shell("diff", "healthy.pth", "head.pth")
shell("diff", "healthy.pth", "converted.pth")

# %% [markdown]
# The exit code is 1 where files differ, so that a script can ask.
#
# ## The cure
#
# A wrapping needs none: `load_checkpoint` reads through it, and `interop.save_checkpoint` writes a plain file. NaN
# needs an earlier checkpoint. Running statistics need nothing but data: `jaxnorm.recalibrate` computes them anew from a
# pass over the training images.

# %%
batches = [x.numpy() for x in x_train.split(128)]
for name, state in (("average", ema), ("converted", interop.load_checkpoint(folder / "converted.pth"))):
    module = Net()
    module.load_state_dict(interop.to_torch(state))
    model = interop.from_torch(module, x_test[:2])
    cured = jaxnorm.recalibrate(model, batches)
    interop.save_checkpoint(folder / f"{name}_cured.pth", cured)
    again = torch.load(folder / f"{name}_cured.pth")
    print(
        f"{name}: {accuracy(interop.to_torch(state)):.1%} before, {accuracy(again):.1%} after; "
        f"findings: {interop.lint(folder / f'{name}_cured.pth')}"
    )

# %% [markdown]
# ## Healthy weights in a sick model
#
# Weights may be right and the model that they are loaded into wrong. This is the network in Flax, written as one writes
# it from memory. It loads every array, by name.


# %%
class FlaxNet(nnx.Module):
    def __init__(self, *, padding, norm, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding=padding, use_bias=False, rngs=rngs)
        self.bn1 = norm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, padding=padding, use_bias=False, rngs=rngs)
        self.bn2 = norm(32, rngs=rngs)
        self.conv3 = nnx.Conv(32, 32, (3, 3), strides=2, padding=padding, use_bias=False, rngs=rngs)
        self.bn3 = norm(32, rngs=rngs)
        self.fc = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        x = nnx.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((1, 2)))


def compared(padding, norm):
    model = FlaxNet(padding=padding, norm=norm, rngs=nnx.Rngs(0))
    interop.load_state_dict(model, {k: v for k, v in healthy.items() if "num_batches" not in k})
    return interop.compare(model, net, x_test[:16])


first = compared("SAME", nnx.BatchNorm)
print(first)

# %% [markdown]
# `compare` runs both models in eval and in train mode. `conv1` agrees, `conv2` is the first that differs. It was then
# given PyTorch's own input and PyTorch's settings one after the other, until its numbers agreed; so the cause is
# proved. ("SAME" with stride 2 pads an even width by 0 and 1, not by 1 and 1.) With that mended, `compare` goes on to
# the next:

# %%
second = compared(1, nnx.BatchNorm)
print(second.first, "-", second.cause)

third = compared(1, lambda n, rngs: nnx.BatchNorm(n, momentum=0.9, rngs=rngs))
print(third.first, "-", third.cause)

fourth = compared(1, lambda n, rngs: jaxnorm.nnx.BatchNorm(n, momentum=0.9, rngs=rngs))
print(fourth.first, "-", "agrees:", fourth.agrees)

# %% [markdown]
# Causes are told in Flax's terms: its momentum is the share that is kept, so PyTorch's 0.1 is 0.9. And Flax tracks the
# biased variance of a batch, PyTorch the unbiased one, n / (n - 1) times that; it shows first in `bn3`, where a channel
# of these 16 images has only 64 values. `jaxnorm.nnx.BatchNorm` does as PyTorch. Neither changes an output of these
# weights in eval mode: both show in the statistics that a step of training leaves behind.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
attempts = {"padding SAME": first, "momentum 0.99": second, "biased variance": third, "all mended": fourth}
for axis, mode in zip(axes, ("eval", "train"), strict=True):
    for (title, found), marker in zip(attempts.items(), "os^D", strict=True):
        layers = [layer for layer in found.layers if layer.mode == mode]
        # what the layer gives in the whole model, and the statistics that it leaves behind
        values = [max(layer.relative, layer.alone) for layer in layers]
        axis.semilogy([layer.path for layer in layers], np.maximum(values, 1e-9), marker=marker, ms=5, label=title)
    axis.axhline(found.tolerance, color="grey", linestyle=":", label="tolerance" if mode == "eval" else None)
    axis.set_title(f"{mode} mode")
    axis.grid(alpha=0.3)
axes[0].set_ylabel("relative difference from PyTorch")
axes[0].legend(fontsize=8)
figure.suptitle("interop.compare: the first layer above the tolerance is where to look")
plt.show()

# %% [markdown]
# ## To remember
#
# - Loading without an error says that names and shapes fit. Nothing looks at numbers, unless you ask `interop.lint`.
# - An average of `parameters()` has no running statistics: average the buffers too, or recalibrate
#   ([EMA and recalibration](ema_and_recalibration.py)).
# - Read what you did not write with `interop.load_checkpoint`, never with `weights_only=False`.
# - A ported model that is "a little worse" differs somewhere first: `interop.compare` says where.
