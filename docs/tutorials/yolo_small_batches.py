# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # YOLO with two images a device
#
# A detector's images are large, so few of them fit on a device. A BatchNorm layer that normalises by two images is a
# different function for each pair of them, and each device's running statistics drift to somewhere else. This page
# trains an Ultralytics network in JAX both ways, synchronised and per replica, on eight devices of two images, measures
# how far the replicas come apart, and tries to mend it afterwards.
#
# Run it in a clone of the repository: the losses are `examples/yolo_loss`, Ultralytics' own in JAX, to be copied into a
# project of yours.

# %%
import contextlib
import os
import sys

sys.path += ["examples", "../../examples"]  # yolo_data, yolo_loss
os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}  # Ultralytics need not look for the network

# %% tags=["remove_input"]
# Ultralytics imports torchvision where it can. Where torchvision was built for another PyTorch than the one at hand,
# that import fails; examples/torchvision_cpu.py mends it. Elsewhere this cell does nothing.
with contextlib.suppress(ImportError):
    import torchvision_cpu  # noqa: F401

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from flax import nnx
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from yolo_data import NAMES, drawn, shapes
from yolo_loss import detection_loss

import interop
import jaxnorm

jax.config.update("jax_platforms", "cpu")  # leave these two lines out where you have devices
jax.config.update("jax_num_cpu_devices", 8)

# %% [markdown]
# ## The network
#
# The first five layers of YOLO11n's backbone, and its `Detect` head on the level of eight pixels a cell: enough for
# large shapes in small images, with fewer layers to compile. For the whole model write
# `DetectionModel("yolo11n.yaml", nc=len(NAMES), verbose=False)`; nothing else changes.

# %%
whole = yaml_model_load("yolo11n.yaml")
part = {"nc": len(NAMES), "backbone": whole["backbone"][:5], "head": [[[4], 1, "Detect", ["nc"]]]}
SIZE, EACH, STEPS, DEVICES = 64, 2, 60, jax.device_count()

torch.manual_seed(0)
module = DetectionModel(whole | part, verbose=False)
strides = tuple(int(stride) for stride in module.stride)
for layer in module.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
        layer.momentum = 0.1  # Ultralytics' 0.03 is for thousands of steps

model = interop.from_torch(module.train(), torch.zeros(2, 3, SIZE, SIZE))
norms = [".".join(map(str, path)) for path, layer in nnx.iter_modules(model) if isinstance(layer, nnx.BatchNorm)]
print(f"{sum(x.size for x in interop.state_dict(model).values()):,} numbers, {len(norms)} BatchNorm layers")

# %% [markdown]
# The images are drawn: one to three circles, squares and triangles, no image twice.

# %%
tests = shapes(SIZE, 64, seed=1)
figure, axes = plt.subplots(1, 6, figsize=(10, 1.9), layout="constrained")
for i, axis in enumerate(axes):
    axis.imshow(tests["image"][i].transpose(1, 2, 0))
    for box in tests["boxes"][i][tests["mask"][i]]:
        axis.add_patch(plt.Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, color="black"))
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Two runs
#
# From the same weights, on the same images. Only the BatchNorm layers differ. The loss is Ultralytics' detection loss;
# with `axis_name` its divisor, the sum of the target scores, is that of all replicas, so that it is the loss of the
# whole batch in both runs.
#
# `replicate` gives each device a copy of the state. Gradients are summed over the devices, so the copies of the
# parameters stay equal. The copies of running statistics stay equal where they are synchronised.


# %%
def loss_fn(model, batch):
    losses = detection_loss(model(batch["image"]), batch, strides, axis_name="batch")
    return sum(losses.values()), losses


def train(model):
    rates = optax.warmup_cosine_decay_schedule(1e-4, 5e-3, STEPS // 10, STEPS)
    state = jaxnorm.replicate(jaxnorm.TrainState.create(model, optax.adam(rates), rng=jax.random.key(0)))
    step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn, clip_norm=10.0), how="pmap", axis_name="batch")
    losses, apart = [], []
    for batch in drawn(SIZE, DEVICES * EACH, STEPS, seed=0):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        layers = jaxnorm.replica_divergence(state.batch_stats)  # the largest difference, by layer; without those equal
        apart.append(np.median([layers.get(name, 0.0) for name in norms]))
    return state, losses, apart


runs = {
    "synchronised": train(jaxnorm.convert_sync_batchnorm(model, axis_name="batch")),
    "per replica": train(model),
}
for name, (state, losses, _) in runs.items():
    layers = jaxnorm.replica_divergence(state)
    print(f"{name}: loss {np.mean(losses[-10:]):.3f} (last 10 steps), {len(layers)} layers differ between replicas")

# %% [markdown]
# ## Evaluation
#
# In evaluation running statistics take the batch's place. Of the second run there are eight kinds of them, one for each
# replica: `unreplicate` refuses to choose. Each may be taken (`rank=`), or all may be pooled (`merge=True`).
# `recalibrate` throws them away and takes new ones from a pass over the training images.

# %%
graph = nnx.split(model)[0]


@jax.jit
def test_loss(arrays):
    found = nnx.merge(graph, arrays)
    found.eval()
    return sum(detection_loss(found(tests["image"]), tests, strides).values())


def tested(model):
    return float(test_loss(nnx.state(model)))


state, losses, _ = runs["per replica"]
pooled = jaxnorm.unreplicate(state, merge=True).model()
images = [batch["image"] for batch in drawn(SIZE, 64, 4, seed=0)]
recalibrated = jaxnorm.recalibrate(pooled, images)

ranks = [tested(jaxnorm.unreplicate(state, rank=rank).model()) for rank in range(DEVICES)]
results = {
    "synchronised": tested(jaxnorm.unreplicate(runs["synchronised"][0]).model()),
    "per replica, pooled": tested(pooled),
    "per replica, recalibrated": tested(recalibrated),
}
print(f"per replica, each replica's own: {min(ranks):.3f} to {max(ranks):.3f}")
for name, value in results.items():
    print(f"{name}: {value:.3f}")

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for (name, (_, values, apart)), colour in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
    left.plot(values, color=colour, label=name)
    middle.plot(apart, color=colour, label=name)
left.set(xlabel="step", ylabel="loss", title="In training")
middle.set(xlabel="step", ylabel="largest difference", title="Running statistics, the median layer")
left.legend()
middle.legend()
right.bar(range(3), results.values(), color=["tab:blue", "tab:orange", "tab:orange"])
right.plot(np.linspace(2.7, 3.3, DEVICES), ranks, "o", color="tab:orange")
right.set_xticks(range(4), ["synchro-\nnised", "pooled", "recali-\nbrated", "each\nreplica's"])
right.set(ylabel="loss", title=f"In evaluation, {len(tests['image'])} other images")
plt.show()

# %% [markdown]
# Read left and right together. A network that normalises by two images fits the training images better: their
# statistics tell it something of these two. In evaluation that is gone, and its loss rises, whichever running
# statistics it is given. With one replica's own it is a matter of chance by how much. New statistics from 256 training
# images help as little as pooling: the weights were trained for another function. Synchronised, training and evaluation
# are one function, and the two losses are close.
#
# So `recalibrate` is for running statistics that are wrong for weights that are right: an average of weights, a change
# of data. It does not undo training at two images.
#
# What to do instead:
#
# - Convert, as above, or train under `jit` with a sharded batch, where statistics are those of the whole batch always.
# - On many devices, synchronise in groups that are large enough: `convert_sync_batchnorm(model, "batch",
#   axis_index_groups=...)`.
# - Accumulating gradients does not help by itself: each microbatch is normalised by its own statistics
#   ([accumulation](../training.md#accumulation)).
#
# [YOLO](../yolo.md) has a whole model (YOLOv8n), mAP, the losses of the other tasks, and the way home: a file that
# `ultralytics.YOLO` opens.
