# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Port a model to Flax source
#
# `interop.from_torch` runs a PyTorch model in JAX as it is. `interop.flax_source` writes it down: a Python file of Flax
# classes, for those who want to read, change and own the code. The file is proven before you get it: it runs in a fresh
# process without torch and is compared with PyTorch in float64, gradients and running statistics included.
#
# This page ports a model of its own and one of timm's, changes head, stem and widths, checks what the changes did with
# `interop.compare`, trains, and takes the weights home to PyTorch. Writing a file needs ruff (`pip install
# 'jaxnorm[cli]'`).

# %%
import difflib
import importlib
import pathlib
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

import interop
import jaxnorm

folder = pathlib.Path(tempfile.mkdtemp())
sys.path.insert(0, str(folder))  # where the files are written and imported from

# %% [markdown]
# ## A PyTorch model
#
# A small residual network for 8x8 digits, trained for three epochs.

# %%
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=360, random_state=0)


class Block(torch.nn.Module):
    def __init__(self, width, out, stride=1):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(out)
        self.conv2 = torch.nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(out)
        self.shortcut = torch.nn.Sequential()
        if stride != 1 or width != out:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(width, out, 1, stride, bias=False), torch.nn.BatchNorm2d(out)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(torch.nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
        )
        self.blocks = torch.nn.Sequential(Block(16, 16), Block(16, 32, 2), Block(32, 32))
        self.head = torch.nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


torch.manual_seed(0)
net = DigitNet()
optimizer = torch.optim.Adam(net.parameters(), 3e-3)
for _ in range(3):
    for rows in torch.randperm(len(x_train)).split(64)[:-1]:
        loss = functional.cross_entropy(net(x_train[rows]), y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

net.eval()
with torch.no_grad():
    theirs = net(x_test)
print(f"test accuracy in PyTorch: {(theirs.argmax(1) == y_test).float().mean():.1%}")

# %% [markdown]
# ## The file
#
# The example input says the sizes. Values do not matter, but BatchNorm needs more than a few for each channel, so give
# it a handful of images.

# %%
text = interop.flax_source(net, torch.zeros(8, 1, 8, 8), name="digit_net", origin="DigitNet")
print(text)

# %% [markdown]
# What to see in it:
#
# - The **docstring** has the proof: the largest differences from PyTorch, relative to the largest value of each array.
# - **Names** are PyTorch's (`stem`, `blocks`, `bn1`, `head`), so checkpoints load by name.
# - **Images** are (N, H, W, C), as Flax's convolutions want them.
# - **BatchNorm** is `jaxnorm.nnx.BatchNorm` with `momentum=0.9`, PyTorch's 0.1. It tracks the unbiased variance and
#   counts batches as PyTorch does. (`plain=True` writes `flax.nnx.BatchNorm`; the docstring then says what differs.)
# - **One class for three blocks.** What the three differ in became arguments. What only one of them has, the shortcut,
#   has its numbers as they are, and stands under the condition that tells this block from the others. The file says
#   what *these* layers are; PyTorch's `stride != 1 or width != out` says more, and is not in any recording.
#
# ## Weights by name

# %%
(folder / "digit_net.py").write_text(text)
digit_net = importlib.import_module("digit_net")

model = digit_net.digit_net(rngs=nnx.Rngs(0))
interop.load_state_dict(model, net.state_dict())

x = jnp.asarray(x_test.numpy()).transpose(0, 2, 3, 1)
model.eval()
ours = model(x)
print("largest difference between logits:", float(np.abs(np.asarray(ours) - theirs.numpy()).max()))
print("of:", float(theirs.abs().max()))

# %% [markdown]
# ## Changing it
#
# From here on the file is yours: open it in an editor. This page replaces text, so that you see each change. The first
# one is to change nothing: widths become an argument, with the old width as its default.


# %%
def changed(text, *changes):
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    return text


def difference(before, after):
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    print("\n".join(line for line in lines if not line.startswith(("---", "+++", "@@"))))


wider = changed(
    text,
    ("nnx.Conv(16, 32, (1, 1), strides=2, ", "nnx.Conv(in_features, out_features, (1, 1), strides=strides, "),
    ("BatchNorm(32, rngs=rngs)", "BatchNorm(out_features, rngs=rngs)"),
    ("self, *, num_classes: int = 10,", "self, *, num_classes: int = 10, width: int = 16,"),
    ("nnx.Conv(1, 16, (3, 3), padding=1, ", "nnx.Conv(1, width, (3, 3), padding=1, "),
    ("BatchNorm(16, rngs=rngs)", "BatchNorm(width, rngs=rngs)"),
    ("Block(16, 16, rngs=rngs)", "Block(width, width, rngs=rngs)"),
    ("Block(16, 32, strides=2, rngs=rngs)", "Block(width, 2 * width, strides=2, rngs=rngs)"),
    ("Block(32, 32, rngs=rngs)", "Block(2 * width, 2 * width, rngs=rngs)"),
    ("nnx.Linear(32, num_classes, ", "nnx.Linear(2 * width, num_classes, "),
    ("def digit_net(*, num_classes: int = 10,", "def digit_net(*, num_classes: int = 10, width: int = 16,"),
    ("DigitNet(num_classes=num_classes, ", "DigitNet(num_classes=num_classes, width=width, "),
)
difference(text, wider)
(folder / "digit_net_wider.py").write_text(wider)
digit_net_wider = importlib.import_module("digit_net_wider")

# %% [markdown]
# Is it still the same model? The proof in the docstring was of the text before. `interop.compare` runs the changed
# model beside its PyTorch origin, layer by layer, in eval and in train mode:

# %%
model = digit_net_wider.digit_net(rngs=nnx.Rngs(0))
interop.load_state_dict(model, net.state_dict())
table = str(interop.compare(model, net, x_test[:32])).splitlines()
print("\n".join([*table[:18], "...", *table[-3:]]))  # eval mode, and the end

# %% [markdown]
# It is. Here is a change that is none of the harmless ones, made in passing: `gelu` for the first `relu` of the block.
# Every weight loads. `compare` finds the place:

# %%
(folder / "digit_net_gelu.py").write_text(changed(wider, ("nnx.relu(self.bn1(", "nnx.gelu(self.bn1(")))
digit_net_gelu = importlib.import_module("digit_net_gelu")

wrong = digit_net_gelu.digit_net(rngs=nnx.Rngs(0))
interop.load_state_dict(wrong, net.state_dict())
found = interop.compare(wrong, net, x_test[:32])
print(found.first, "-", found.cause)
print("largest difference of a layer by itself:", max(layer.alone for layer in found.layers))

# %% [markdown]
# Each layer by itself, given PyTorch's own input, agrees (the column *alone* of the table). So the layers are right,
# and what lies between two of them is not. In a picture, each logit of the test images in PyTorch and here:

# %%
wrong.eval()
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for axis, logits, title in ((axes[0], ours, "as ported"), (axes[1], wrong(x), "gelu instead of relu")):
    off = float(np.abs(np.asarray(logits) - theirs.numpy()).max())
    axis.plot([theirs.min(), theirs.max()], [theirs.min(), theirs.max()], color="grey", linewidth=0.8)
    axis.scatter(theirs.numpy().ravel(), np.asarray(logits).ravel(), s=4, color="tab:blue", alpha=0.5)
    axis.set_title(f"{title}: largest difference {off:.1e}", fontsize=10)
    axis.set_xlabel("logit in PyTorch")
    axis.grid(alpha=0.3)
axes[0].set_ylabel("logit in Flax")
plt.show()

# %% [markdown]
# ## Another head, and training
#
# `num_classes` is an argument of every ported classifier. The new task: is the digit odd? All weights but the head's
# are PyTorch's. `strict=False` allows for what is missing, the head, and for nothing of another shape.


# %%
def odd_model(ported):
    model = digit_net_wider.digit_net(num_classes=2, rngs=nnx.Rngs(0))
    if ported:
        backbone = {name: value for name, value in net.state_dict().items() if not name.startswith("head.")}
        interop.load_state_dict(model, backbone, strict=False)
    return model


def loss_fn(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
    return losses.mean(), {}


images_last = x_train.numpy().transpose(0, 2, 3, 1)
odd = (y_train % 2).numpy()
step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="jit")
curves, trained = {}, {}
for name, ported in (("PyTorch's weights", True), ("random weights", False)):
    state = jaxnorm.TrainState.create(odd_model(ported), optax.adam(1e-3))
    order = np.random.default_rng(0)
    curves[name] = []
    for _ in range(60):
        rows = order.choice(len(odd), 64, replace=False)
        state, metrics = step(state, {"image": images_last[rows], "label": odd[rows]})
        curves[name].append(float(metrics["loss"]))
    trained[name] = state.model()
    trained[name].eval()
    right = trained[name](x).argmax(-1) == (y_test % 2).numpy()
    print(f"{name}: test accuracy after 60 steps {float(right.mean()):.1%}")

# %%
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, curve in curves.items():
    axis.plot(curve, label=name)
axis.set_xlabel("step")
axis.set_ylabel("training loss")
axis.set_title("Odd or even: a new head on the ported model")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# A ported model is an `nnx.Module` like any other: it trains with optax, `nnx.jit`, or `jaxnorm.TrainState` as here.
#
# The way home is by name, too. PyTorch takes what was trained, with `strict=True`:

# %%
home = DigitNet(classes=2)
home.load_state_dict(interop.to_torch(interop.state_dict(trained["PyTorch's weights"])), strict=True)
with torch.no_grad():
    there = home.eval()(x_test).numpy()
print("largest difference between logits:", float(np.abs(there - np.asarray(trained["PyTorch's weights"](x))).max()))

# %% [markdown]
# A model of another width is another model. PyTorch's weights do not fit it, and the error says so of all arrays at
# once; the model stays as it was:

# %%
try:
    interop.load_state_dict(digit_net_wider.digit_net(width=24, rngs=nnx.Rngs(0)), net.state_dict())
except ValueError as error:
    print(str(error)[:400], "...")

# %% [markdown]
# ## A model of timm's, from a shell
#
# `jaxnorm port` does the same with a name: `timm:`, `torchvision:`, or `package.module:callable` for your own. (This
# notebook runs the command `jaxnorm` as `python -m interop.cli`, which is the same program.)


# %%
def shell(*arguments):
    print("$ jaxnorm", *arguments)
    command = [sys.executable, "-m", "interop.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    shown = lines if len(lines) < 24 else [*lines[:14], "...", *lines[-4:]]
    print("\n".join(shown), f"\nexit code {done.returncode}")


shell("port", "timm:test_resnet", "test_resnet.py", "--input", "4,3,64,64")
ported = (folder / "test_resnet.py").read_text()
print(ported[ported.index("class ResNet") :])

# %% [markdown]
# The stem halves the image twice, by a stride and by a pooling. For small images one leaves out the pooling. `jaxnorm
# compare` gives the changed model PyTorch's weights and says what is another one now. It calls a function without
# arguments, so the file gets one.

# %%
lines = [line for line in ported.splitlines() if "nnx.max_pool" not in line]
small = "\n".join(lines) + "\n\n\ndef build():\n    return test_resnet(rngs=nnx.Rngs(0))\n"
(folder / "test_resnet_small.py").write_text(small)
shell("compare", "timm:test_resnet", "test_resnet_small:build", "--input", "4,3,64,64")

# %% [markdown]
# All weights fit, and `layer1.0.conv1` is the first layer that differs: `inf`, since its images have another size now.
# *Alone* it computes what PyTorch's does. The place between `bn1` and it is where the pooling was: this is the change
# that was meant.
#
# ## To remember
#
# - The file is proven at the moment it is written. After each change of yours, `interop.compare` (or `jaxnorm compare`)
#   says what still agrees and where the first difference is.
# - Sizes that all instances share stand there as numbers. Make them arguments when you need them, and compare once.
# - Some models have no plain source (`interop.PortError` says why, all reasons at once, before anything is written);
#   `interop.from_torch` runs those. [Porting](../porting.md) has the rules, [ported](../ported.md) a model of each of
#   timm's families.
