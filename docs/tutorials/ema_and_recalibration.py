# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # EMA and recalibration
#
# An exponential moving average (EMA) of the weights is often a better model than the weights, above all while the
# learning rate is high. With BatchNorm there is a catch: the running statistics of the model are not those of the
# average. This page shows what that costs and what to do: `jaxnorm.Ema` in the training step, number for number timm's
# `ModelEmaV3`, and `jaxnorm.recalibrate`.

# %% tags=["remove_input"]
# timm imports torchvision. Where torchvision was built for another PyTorch than the one at hand, that import fails;
# examples/torchvision_cpu.py mends it. And tqdm, which timm imports, warns in notebooks without widgets.
import contextlib
import sys
import warnings

sys.path += ["examples", "../../examples"]
with contextlib.suppress(ImportError):
    import torchvision_cpu  # noqa: F401
warnings.filterwarnings("ignore", message="IProgress not found")

# %%
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import optax
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import interop
import jaxnorm

# %% [markdown]
# ## Why an average needs statistics of its own
#
# The statistics that are right for a layer depend on all weights before it, and not in a linear way. In the smallest
# case, x @ w with x of variance 1, the variance is the sum of squares of w. Take two weights and their mean:

# %%
generator = np.random.default_rng(0)
x = generator.normal(size=(10_000, 8))
first, second = generator.normal(size=(2, 8))
print("variance with each of two weights:", (x @ first).var().round(2), (x @ second).var().round(2))
print("mean of the two variances:        ", ((x @ first).var() + (x @ second).var()) / 2)
print("variance with the mean weight:    ", (x @ (first + second)).var() / 4)

# %% [markdown]
# Averaging takes the noise out of the weights, and the noise was a part of the variance. The further the weights lie
# apart (high learning rate, few steps, the equal weights of SWA), the more the average of the statistics is off.
#
# ## The same numbers as timm's
#
# The average after a step is `decay * average + (1 - decay) * value`. Three conventions meet here:
#
# | | is given | 0.99 means |
# |---|---|---|
# | `jaxnorm.Ema(decay)`, timm's `ModelEmaV3(decay=)`, optax's `ema(decay)` | the share that is kept | slow |
# | `momentum` of PyTorch's BatchNorm, the weight of `torch.lerp` | the share that is new | the last value, nearly |
# | `momentum` of Flax's and jaxnorm's BatchNorm | the share that is kept | slow |
#
# A small network for digits, in PyTorch and, imported, in JAX. Both train ten steps on the same batches, each with its
# average. timm's average takes in all of the state dict, running statistics included, and so does `jaxnorm.Ema`. The
# step of an update counts from 1; with `use_warmup` the decay depends on it.

# %%
digits = load_digits()
images, labels = (digits.images[:, None] / 16).astype("float32"), digits.target.astype("int32")
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=597, random_state=0)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def loss_fn(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
    return losses.mean(), {}


torch.manual_seed(0)
net = network()
model = interop.from_torch(net, torch.zeros(2, 1, 8, 8))
step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="jit")

options = {"decay": 0.9, "use_warmup": True}
theirs = timm.utils.ModelEmaV3(net, **options)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
state = jaxnorm.TrainState.create(model, optax.sgd(0.1), ema=jaxnorm.Ema(**options))
for update in range(1, 11):
    rows = generator.choice(len(y_train), 64, replace=False)
    optimizer.zero_grad()
    functional.cross_entropy(net(torch.tensor(x_train[rows])), torch.tensor(y_train[rows]).long()).backward()
    optimizer.step()
    theirs.update(net, step=update)
    state, _ = step(state, {"image": x_train[rows], "label": y_train[rows]})

ours = interop.state_dict(state.ema_model())
off = max(float(np.abs(value.numpy() - ours[name]).max()) for name, value in theirs.module.state_dict().items())
print(f"{len(ours)} arrays of the two averages, largest difference {off:.0e}")

# %% [markdown]
# The decay by step, timm's as lines and ours as dots. Without a warm-up, a decay of 0.999 keeps 0.999^300 = 74 % of the
# *first* weights after 300 steps: an average that looks broken is often one that was asked too early.

# %%
steps = np.arange(1, 301)
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for given in (
    {"decay": 0.98},
    {"decay": 0.999, "use_warmup": True},
    {"decay": 0.999, "use_warmup": True, "warmup_power": 3 / 4},
    {"decay": 0.98, "update_after_step": 100},
):
    label = ", ".join(f"{name}={value}" for name, value in given.items())
    timms, average = timm.utils.ModelEmaV3(net, **given), jaxnorm.Ema(**given)
    (line,) = axis.plot(steps, [timms.get_decay(int(s)) for s in steps], linewidth=1, label=label)
    axis.plot(steps[::25], [float(average.get_decay(int(s))) for s in steps[::25]], "o", ms=4, color=line.get_color())
axis.set_xlabel("step")
axis.set_ylabel("share kept")
axis.set_title("Decay by step: timm's (lines) and jaxnorm's (dots)")
axis.legend(fontsize=8)
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Four models of one run
#
# Now a run with a learning rate that is high for its batches of 16. Each 20 steps the test images are seen by
#
# - the **model**: weights and running statistics as they are;
# - the **average with the model's statistics**: what one has if only parameters are averaged and buffers are copied
#   (timm's `exclude_buffers=True`, `AveragedModel` of PyTorch by default);
# - the **average, statistics averaged too**: `jaxnorm.Ema` and `ModelEmaV3` as they are;
# - the **average, recalibrated**: statistics of the average's own activations, from a pass over the training images.
#
# `state.averaged()` is the state with the average in the place of the weights; `recalibrate` takes a state or a model.

# %%
torch.manual_seed(0)
model = interop.from_torch(network(), torch.zeros(2, 1, 8, 8))
start = jaxnorm.TrainState.create(model, optax.sgd(0.3, momentum=0.9), ema=jaxnorm.Ema(0.98))


def metrics_fn(model, batch):
    return {"accuracy": model(batch["image"]).argmax(-1) == batch["label"]}


evaluation = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn), how="jit")
test = [{"image": x_test, "label": y_test}]
batches = np.split(x_train, 6)


def accuracy(state):
    return float(jaxnorm.evaluate(evaluation, state, test)["accuracy"])


state, generator = start, np.random.default_rng(0)
names = "model", "average, model's statistics", "average, averaged statistics", "average, recalibrated"
curves = {name: [] for name in names}
kept = {}
for update in range(1, 301):
    rows = generator.choice(len(y_train), 16, replace=False)
    state, _ = step(state, {"image": x_train[rows], "label": y_train[rows]})
    if update % 20 == 0:
        average = state.averaged()
        recalibrated = jaxnorm.recalibrate(average, batches)
        for name, seen in zip(
            curves,
            (state, average.replace(batch_stats=state.batch_stats), average, recalibrated),
            strict=True,
        ):
            curves[name].append(accuracy(seen))
        kept[update] = state, average, recalibrated

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for (name, values), style in zip(curves.items(), ("o-", "v:", "s--", "D-"), strict=True):
    axis.plot(list(kept), values, style, ms=4, label=name)
axis.set_xlabel("step")
axis.set_ylabel("test accuracy")
axis.set_title("One run, four models")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
for update in (60, 300):
    at = list(kept).index(update)
    print(f"step {update}:", "; ".join(f"{name}: {values[at]:.1%}" for name, values in curves.items()))

# %% [markdown]
# - With the model's statistics the average is useless for a long time, although its weights are good: recalibrated, the
#   *same* weights soon are the best of the four.
# - Averaged statistics are much nearer, and late are as good as recalibrated ones. Early they lag: they still hold what
#   they began with, and those of weights that the average has left behind.
# - At the end the average is better than the model that it is the average of, without a lower learning rate.
#
# What was wrong with the statistics? For each channel, the running variance that the average has beside the variance
# that its activations really have:

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
for axis, update in zip(axes, (60, 300), strict=True):
    state, average, recalibrated = kept[update]
    true = interop.state_dict(recalibrated)
    for name, seen, style in (("model's", state, "v"), ("averaged", average, "s")):
        given = interop.state_dict(seen)
        for layer in ("1", "4", "7"):
            own, used = (np.asarray(d[f"{layer}.running_var"]) for d in (true, given))
            color = "tab:orange" if name == "model's" else "tab:green"
            axis.loglog(own, used, style, ms=4, color=color, alpha=0.6, label=name if layer == "1" else None)
    axis.axline((1, 1), (2, 2), color="grey", linewidth=0.8)
    axis.set_title(f"step {update}")
    axis.set_xlabel("variance of the average's activations")
    axis.grid(alpha=0.3)
axes[0].set_ylabel("running variance that it is given")
axes[0].legend()
plt.show()

# %% [markdown]
# Above the line the layer divides by too much, and what comes out is too small, layer after layer. At the end the
# averaged ones lie on the line.
#
# ## Equal weights: SWA
#
# Stochastic weight averaging takes points far apart, all with the same weight: PyTorch's `AveragedModel`, whose recipe
# ends with `update_bn`. `jaxnorm.Ema.averaged_model()` is that average; it counts its own updates and copies buffers.

# %%
swa = jaxnorm.Ema.averaged_model()
memory = None
for update in (100, 140, 180, 220, 260, 300):
    state, _, _ = kept[update]
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    memory = swa.update(tree, swa.init(tree) if memory is None else memory)

average = kept[300][0].replace(**swa.value(memory))
recalibrated = jaxnorm.recalibrate(average, batches)
print(f"SWA of {int(memory.count)} points, the last one's statistics: {accuracy(average):.1%}")
print(f"SWA, recalibrated: {accuracy(recalibrated):.1%}")

# %% [markdown]
# `update_bn` averages the means and variances of the batches as if all were equal in size, and leaves out the variance
# between their means. `recalibrate` merges all batches by their counts: what it gives are the statistics of the
# examples together. `layer_by_layer=True` goes a step further and sets one layer after the other, each on the very
# inputs that it has in eval mode; it takes a pass for each layer.
#
# ## Taking it home
#
# A checkpoint with both, as timm writes it. PyTorch loads the recalibrated average with `strict=True`:

# %%
path = pathlib.Path(tempfile.mkdtemp(), "last.pth.tar")
state, average, recalibrated = kept[300]
interop.save_checkpoint(path, state, {"epoch": 4, "arch": "network"}, ema=recalibrated.model(), layout="timm")

home = network()
home.load_state_dict(torch.load(path)["state_dict_ema"], strict=True)
with torch.no_grad():
    seen = home.eval()(torch.tensor(x_test)).argmax(1).numpy()
print(f"in PyTorch: {(seen == y_test).mean():.1%}, in JAX: {accuracy(recalibrated):.1%}")

# %% [markdown]
# ## To remember
#
# - Running statistics belong to the weights that made them. Average them with the weights (`Ema`'s default), or compute
#   them anew. An average with the model's is another model.
# - Recalibrate early in training, at high learning rates, after SWA, and whenever weights were changed without training
#   (merged, pruned, rounded). It needs images and no labels.
# - `decay` is what is kept. Give it a warm-up, or look at the average only after some multiples of 1 / (1 - decay)
#   steps.
# - [Training](../training.md#ema) has the averages of timm, torchvision and PyTorch beside each other, and averages
#   that are kept elsewhere than on the accelerator.
