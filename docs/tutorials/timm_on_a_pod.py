# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A timm model on a TPU pod
#
# A timm model is trained over many devices: imported once, its BatchNorm statistics synchronised, in bfloat16, with a
# learning rate that goes with the batch, an average of the weights (EMA), and checkpoints that a stopped run goes on
# from. Eight virtual devices on a CPU stand for the pod; the program is the one that the pod runs, and the last section
# says what changes there.

# %% tags=["remove_input"]
# timm imports torchvision. Where torchvision was built for another PyTorch than the one at hand, that import fails;
# examples/torchvision_cpu.py mends it. Elsewhere this cell does nothing.
# And Hugging Face's hub warns in notebooks that have no ipywidgets; nothing is loaded from it here.
import contextlib
import sys
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
sys.path += ["examples", "../../examples"]
with contextlib.suppress(ImportError):
    import torchvision_cpu  # noqa: F401

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import timm
import torch
from sklearn.datasets import load_digits

import interop
import jaxnorm

jax.config.update("jax_platforms", "cpu")  # leave these two lines out on the pod
jax.config.update("jax_num_cpu_devices", 8)

# %% [markdown]
# ## The model comes in
#
# Any name of timm's goes here, and `pretrained=True` too. `test_resnet` is one of the small models that timm tests
# itself with. `from_torch` records the module and copies its arrays: PyTorch and timm are needed no longer.

# %%
torch.manual_seed(0)
module = timm.create_model("test_resnet", num_classes=10)
model = interop.from_torch(module, torch.zeros(2, 3, 48, 48))
weights = interop.state_dict(model)
print(f"{len(weights)} arrays, {sum(array.size for array in weights.values()):,} numbers")

# %% [markdown]
# On the pod you want no torch at all. `interop.save(model, "resnet")` writes the recorded program and its arrays, once,
# on any machine that has torch; `interop.load("resnet")` reads them where there is none.
#
# ## The data
#
# scikit-learn's handwritten digits, 48 pixels wide. What counts is the shape of the function: **what a batch holds
# depends on its number alone**. So a run that goes on at step 30 sees the batches that it would have seen.

# %%
DEVICES, EACH, STEPS = jax.device_count(), 2, 60
BATCH = DEVICES * EACH
pixels, labels = load_digits(return_X_y=True)
images = (pixels.reshape(-1, 1, 8, 8) / 8 - 1).repeat(3, axis=1).repeat(6, axis=2).repeat(6, axis=3).astype(np.float32)
train, test = np.arange(1400), np.arange(1400, 1797)


def batch(number):
    chosen = np.random.default_rng(number).choice(train, BATCH, replace=False)
    return {"image": images[chosen], "label": labels[chosen]}


tests = [{"image": images[part], "label": labels[part]} for part in np.array_split(test, 4)]

# %% [markdown]
# ## The recipe
#
# - **Learning rate.** The rule of thumb is linear: k times the batch, k times the rate, after a warm-up
#   ([Goyal et al. 2017](https://arxiv.org/abs/1706.02677), section 2.1). Written down as a function of the batch, it
#   follows when the pod grows.
# - **bfloat16.** `compute_dtype` casts parameters and images for the run of the model. Parameters, optimizer, average
#   and running statistics stay float32; BatchNorm's sums are taken in float32 too. It is for accelerators, so it is
#   asked for on those only.
# - **EMA.** An average of parameters and running statistics, updated inside of the step. Here over about ten steps;
#   0.999 or more is usual where there are thousands.


# %%
def loss_fn(model, batch):
    logits = model(batch["image"]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def optimizer(batch_size):
    peak = 0.1 * batch_size / 16  # 0.1 is good at 16 images
    rates = optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS)
    return optax.sgd(rates, momentum=0.9, nesterov=True)


def begin(model):
    return jaxnorm.TrainState.create(model, optimizer(BATCH), ema=jaxnorm.Ema(0.9), rng=jax.random.key(0))


compute_dtype = None if jax.default_backend() == "cpu" else jnp.bfloat16
train_step = jaxnorm.train_step(loss_fn, compute_dtype=compute_dtype)

# %% [markdown]
# ## Training, stopped in the middle
#
# Under `shard_map` each device runs the model on its two images, and `convert_sync_batchnorm` makes the BatchNorm
# layers add their sums over the axis `"batch"`: all normalise by the statistics of 16 images.
#
# `Checkpoints` writes the whole state: parameters, running statistics, optimizer, average, random key. The loop asks
# for the latest checkpoint first, so the same program begins a run and goes on with it.

# %%
synchronised = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
folder = tempfile.TemporaryDirectory()
shard_map_step = jaxnorm.data_parallel(train_step, how="shard_map")


def run(until):
    state, losses = begin(synchronised), {}
    with jaxnorm.Checkpoints(pathlib.Path(folder.name) / "run", config={"batch": BATCH}) as checkpoints:
        taken = 0
        if checkpoints.latest() is not None:
            taken, state, _ = checkpoints.restore(state)
            print(f"goes on from step {taken}")
        while taken < until:
            state, metrics = shard_map_step(state, batch(taken))
            losses[taken] = float(metrics["loss"])
            taken += 1
            if taken % 15 == 0:
                checkpoints.save(taken, state)  # returns while files are being written
    return state, losses


state, losses = run(until=35)  # "killed" at step 35: what came after step 30 is lost
resumed_state, resumed = run(until=STEPS)
again = [step for step in losses if step in resumed]
print(f"steps {again} were taken twice; losses equal bit for bit: {all(losses[s] == resumed[s] for s in again)}")
losses |= resumed

# %% [markdown]
# ## The same under jit
#
# Under `jit` there are no replicas to see: one program, one batch, and XLA splits it over the devices. Statistics are
# those of the whole batch without any conversion. `data_parallel` refuses a converted model here.
#
# The two programs add in another order. In float32 the first losses are equal to seven digits, and training makes more
# of the rounding with each step. In float64 the losses of these two runs are 1e-14 apart at step 11 (the module
# `.double()`, JAX with `jax_enable_x64`); [DDP and SyncBatchNorm to JAX](ddp_to_jax.py) shows such a run.

# %%
jit_step = jaxnorm.data_parallel(train_step, how="jit")
state, jit_losses = begin(model), []
for number in range(STEPS):
    state, metrics = jit_step(state, batch(number))
    jit_losses.append(float(metrics["loss"]))
apart = {number: f"{abs(losses[number] - jit_losses[number]):.0e}" for number in (0, 1, 5, 10, 20, 40)}
print(f"first loss {jit_losses[0]:.4f}; the two runs differ, by step: {apart}")

# %% [markdown]
# ## What synchronisation is for
#
# Without the conversion each device normalises by its own two images, and keeps running statistics of its own. The
# state then has a copy for each device (`replicate`); a shared one would be an error, since the copies come to differ.

# %%
own = jaxnorm.replicate(begin(model))
own_losses = []
for number in range(STEPS):
    own, metrics = shard_map_step(own, batch(number))
    own_losses.append(float(metrics["loss"]))
print(f"{len(jaxnorm.replica_divergence(own.batch_stats))} layers have statistics that differ between replicas")

# %% [markdown]
# Evaluation counts every image once, whatever the devices divide. `averaged()` is the model that the EMA keeps. The
# running statistics of the third run have to be pooled first.


# %%
def metrics_fn(model, batch):
    return {"accuracy": model(batch["image"]).argmax(-1) == batch["label"]}


evaluation = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn))
accuracies = {
    "synchronised": jaxnorm.evaluate(evaluation, resumed_state.averaged(), tests)["accuracy"],
    "per replica": jaxnorm.evaluate(evaluation, jaxnorm.unreplicate(own, merge=True).averaged(), tests)["accuracy"],
}
print(", ".join(f"{name}: {accuracy:.1%} of {len(test)} test images" for name, accuracy in accuracies.items()))


# %%
def smooth(values):
    return [np.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for values, label, style in (
    (list(losses.values()), "shard_map, synchronised (stopped, resumed from step 30)", {"color": "tab:blue"}),
    (jit_losses, "jit: statistics of the whole batch", {"color": "tab:green", "linestyle": "--"}),
    (own_losses, "shard_map, each replica's own statistics", {"color": "tab:orange"}),
):
    axes.plot(smooth(values), label=label, **style)
axes.axvline(30, color="grey", linewidth=1, linestyle=":")
axes.set(xlabel="step", ylabel="training loss, mean of 5 steps", ylim=(0, None))
axes.set_title(f"{DEVICES} devices, {EACH} images each")
axes.legend(loc="lower left", fontsize="small")
plt.show()

# %% [markdown]
# The first two are the same training, rounded differently. The third is another function: each layer normalises by two
# images, so what an image becomes depends on its one neighbour; and in evaluation, where running statistics take the
# batch's place, the network is one that was never trained.
#
# ## What changes on the real pod
#
# A pod runs one process a host, and all of them run this program. Four lines change:
#
# | here | on the pod |
# |---|---|
# | `jax_platforms`, `jax_num_cpu_devices` | `jaxnorm.join_processes()`, before anything else of JAX |
# | `timm.create_model`, `interop.from_torch` | `interop.load("resnet")`: no torch |
# | `batch(number)`, `tests` are whole | this process's part of them; of a batch to train on, all parts equal |
# | a temporary folder | one that all processes see: `gs://bucket/run` |
#
# `donate=True` in `data_parallel` lets the step overwrite the state that it is given, which halves the state's memory.
# To try the many processes out on one machine before renting a pod, here two of four devices each:
#
# ```
# python -m jaxnorm.launch --processes 2 --devices 4 train.py
# ```
#
# and on a Cloud TPU:
#
# ```
# gcloud compute tpus tpu-vm ssh NAME --worker=all --command="python train.py"
# ```
#
# [Many processes](../pods.md) has the lines for SLURM and GKE, what happens when a process dies, and `examples/pod.py`,
# a whole program. The checkpoints above are taken up on any number of devices and processes.
#
# Before renting, ask the TPU's compiler, which runs on any machine (`pip install libtpu`). For this model at its own
# size of 160 pixels, [the command line's page](../command_line.md#plan) has (a column left out):
#
# ```
# $ jaxnorm plan timm:test_resnet --topology v5e:2x4 --topology v5e:4x4 --batch 1024
# timm:test_resnet, input 3x160x160, bfloat16, momentum
#
# topology  batch  fits               memory     step  examples/s   statistics         collectives  largest batch
# v5e:2x4   1,024   yes  345.1 MB of 17.2 GB  4.76 ms     214,916  9.6% + 2.8%  25, 950.5 kB, 6.0%         51,584
# v5e:4x4   1,024   yes  339.2 MB of 17.2 GB  4.64 ms     220,770  9.8% + 3.4%  25, 950.5 kB, 7.2%         52,480
# ```
#
# So twice the devices gain nothing at this batch: scale the batch with the pod, and the learning rate with the batch.
