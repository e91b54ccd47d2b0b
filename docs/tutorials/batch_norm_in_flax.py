# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # BatchNorm in NNX with vmap, scan and remat, and in Linen
#
# BatchNorm is the layer that changes its own state when it is called. JAX's transformations take pure functions, so
# each of them raises a question: whose batch is normalised, where do the running statistics go, and how often do they
# move?
#
# Here are the answers, each as a few lines that run: `jaxnorm.nnx.BatchNorm` and `jaxnorm.linen.BatchNorm` under `jit`,
# `vmap`, `scan` and `remat`, with masks, and what their running variance is beside Flax's. The layers have Flax's names
# and arguments; all that is said of transformations holds for Flax's own layers as well, unless it says otherwise.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from flax import errors, linen, nnx
from torch.utils.checkpoint import checkpoint

import jaxnorm

# Eight parts of a batch, 16 examples of 3 channels each. The parts have other means, as shards of sorted data have.
generator = np.random.default_rng(0)
parts = jnp.asarray(generator.normal(size=(8, 16, 3)) + np.arange(8)[:, None, None], jnp.float32)
batch = parts.reshape(128, 3)


def off(a, b):
    return f"{float(jnp.abs(jnp.asarray(a) - jnp.asarray(b)).max()):.0e}"


# %% [markdown]
# ## NNX: the layer has its state
#
# In training the layer normalises by the batch and moves `mean` and `var`; in eval mode it normalises by these. A
# module that is passed to `nnx.jit` comes back changed. `momentum` is the share that is kept, Flax's convention: 0.9
# here is PyTorch's 0.1.


# %%
def new(**options):
    return jaxnorm.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0), **options)


norm = new()
y = nnx.jit(lambda norm, x: norm(x))(norm, batch)
print("training: output", y.mean(0).round(3), "with variance", y.var(0).round(3))
print("running mean", norm.mean[...], "of the batch's", batch.mean(0))

theirs = torch.nn.BatchNorm1d(3, momentum=0.1)
theirs(torch.tensor(np.asarray(batch)))
print("differs from PyTorch's running mean by", off(norm.mean[...], theirs.running_mean.numpy()))
print("and its running variance by", off(norm.var[...], theirs.running_var.numpy()))

norm.eval()
print("eval: output", norm(batch).mean(0), "- one step is not enough for running statistics")

# %% [markdown]
# `model.train()` and `model.eval()` set the flag `use_running_average` on all layers below. It is a Python value, so
# `nnx.jit` compiles one program for each mode.
#
# ## Linen: the state is returned
#
# A Linen module changes nothing. Its running statistics are the collection `batch_stats`, which comes back where
# `mutable` names it, and which you put in the place of the old one. Forget `mutable`, and Flax says so; forget the last
# line, and nobody does: the model trains, and its eval mode normalises by 0 and 1.

# %%
layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.9)
variables = layer.init(jax.random.key(0), batch)
try:
    layer.apply(variables, batch)
except errors.ModifyScopeVariableError as error:
    print(str(error).split(" (")[0])

y, updates = layer.apply(variables, batch, mutable=["batch_stats"])
variables = {**variables, **updates}
print("differs from NNX by", off(variables["batch_stats"]["var"], norm.var[...]))

# %% [markdown]
# `jaxnorm.TrainState` and `jaxnorm.train_step` do this for either kind of model.
#
# ## vmap: lanes that share a batch
#
# Under `vmap` a layer sees one lane. With `axis_name` it takes the statistics of all lanes together, as replicas do
# under `pmap` or `shard_map`: sums and counts are added over the axis. The result is the same in every lane, so that
# the layer can stay one layer (`in_axes=None`):

# %%
whole = new()
whole(batch)

norm = new(axis_name="batch")
y = nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0), axis_name="batch")(norm, parts)
print("NNX, vmap with axis_name: differs from the whole batch by", off(norm.var[...], whole.var[...]))

layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.9, axis_name="batch")
variables = layer.init(jax.random.key(0), batch)
run = jax.vmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="batch", out_axes=(0, None))
y, updates = run(parts)
print("Linen, the same:", off(updates["batch_stats"]["var"], whole.var[...]))

# %% [markdown]
# Without `axis_name` each lane has statistics of its own, and one layer cannot hold eight. NNX says so, and under plain
# `jax.vmap`, which knows nothing of the layer's state, too:

# %%
for name, transform in (
    ("nnx.vmap", lambda norm: nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0))(norm, parts)),
    ("jax.vmap", lambda norm: jax.vmap(lambda x: norm(x))(parts)),
):
    try:
        transform(new())
    except (ValueError, errors.TraceContextError) as error:
        print(f"{name}: {type(error).__name__}: {str(error).split(' (')[0]}")

# %% [markdown]
# ## Statistics of each lane: what goes wrong
#
# One can give each lane its own: `nnx.StateAxes` says that `BatchStat` has an axis of lanes and all else has none. For
# an ensemble, where each lane is a model, that is right. For lanes that are parts of one batch it is wrong, and it is
# what replicas have without synchronisation. `momentum=0` keeps nothing of the past, so that the statistics are the
# batch's:

# %%
axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})


@nnx.vmap(in_axes=0, out_axes=axes)
def lanes_of(_):
    return jaxnorm.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))


lanes = lanes_of(jnp.arange(8))
nnx.vmap(lambda norm, x: norm(x), in_axes=(axes, 0))(lanes, parts)
together = jaxnorm.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
together(batch)
print("shapes of var and scale:", lanes.var[...].shape, lanes.scale[...].shape)

# %%
figure, axes_ = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, lane, whole_batch, title in (
    (axes_[0], lanes.mean[:, 0], together.mean[0], "mean"),
    (axes_[1], lanes.var[:, 0], together.var[0], "variance"),
):
    axis.bar(range(8), lane, color="tab:red", alpha=0.6, label="of each lane")
    axis.axhline(float(lane.mean()), color="tab:red", linestyle="--", label="mean of the lanes'")
    axis.axhline(float(whole_batch), color="tab:blue", label="of the whole batch")
    axis.set_title(f"{title} of channel 0")
    axis.set_xlabel("lane")
axes_[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# In training each lane normalises its own mean away: what tells the parts from each other is gone. In eval mode no
# lane's statistics are right, and their mean is not either: the variance of the whole is the mean of the lanes'
# variances *plus* the variance between their means. (`jaxnorm.unreplicate(state, merge=True)` pools replicas so.)
#
# ## Masks, and lanes of other sizes
#
# A mask says which values count, in the batch and in the running statistics; the others may be anything. With
# `axis_name` lanes weigh what they count. Flax's layer takes the mean of the lanes' means, and lets a lane of 2
# examples weigh as much as one of 16:

# %%
mask = jnp.arange(16)[None, :, None] < jnp.array([16, 16, 16, 16, 16, 16, 16, 2])[:, None, None]
counted = batch[mask.reshape(128)]


def masked(norm):
    nnx.vmap(lambda norm, x, m: norm(x, mask=m), in_axes=(None, 0, 0), axis_name="batch")(norm, parts, mask)
    return norm.mean[...]


options = {"momentum": 0.0, "axis_name": "batch", "rngs": nnx.Rngs(0)}
print("true mean", counted.mean(0))
print("jaxnorm  ", masked(jaxnorm.nnx.BatchNorm(3, **options)))
print("Flax     ", masked(nnx.BatchNorm(3, use_running_average=False, **options)))

# %% [markdown]
# ## scan: layers on top of each other
#
# Layers of one shape can be one scan over stacked arrays, which compiles one layer instead of many. Parameters and
# running statistics get an axis of layers in front; each layer moves its own. `count_batches=True` adds PyTorch's
# counter, which makes it easy to see how often.


# %%
class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = jaxnorm.nnx.BatchNorm(3, momentum=0.9, count_batches=True, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))


@nnx.split_rngs(splits=4)
@nnx.vmap
def make(rngs):
    return Block(rngs=rngs)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def forward(x, block):
    return block(x)


blocks = make(nnx.Rngs(0))
one_by_one = [nnx.clone(jax.tree.map(lambda a, i=i: a[i], blocks)) for i in range(4)]

scanned = forward(batch, blocks)
expected = batch
for block in one_by_one:
    expected = block(expected)
print("shape of the running variances", blocks.norm.var[...].shape, "- batches", blocks.norm.num_batches_tracked[...])
print("output differs from the loop's by", off(scanned, expected))
print("statistics by", off(blocks.norm.var[...], jnp.stack([block.norm.var[...] for block in one_by_one])))

# %% [markdown]
# In Linen `nn.scan` is told which collections have the axis of layers:


# %%
class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = linen.Dense(3)(x)
        x = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.9, count_batches=True)(x)
        return linen.relu(x), None


def stack(block):
    axes = {"params": 0, "batch_stats": 0}
    return linen.scan(block, variable_axes=axes, split_rngs={"params": True}, length=4)()


model = stack(LinenBlock)
variables = model.init(jax.random.key(0), batch, None)
_, updates = model.apply(variables, batch, None, mutable=["batch_stats"])
statistics = updates["batch_stats"]["BatchNorm_0"]
print(statistics["var"].shape, "- batches", statistics["num_batches_tracked"])

# %% [markdown]
# ## remat: computed twice, moved once
#
# `nnx.remat`, Linen's `nn.remat` and `jax.checkpoint` compute a block again in the backward pass instead of keeping its
# activations. The second computation gives gradients only: the running statistics that you get are those of the first.
# `torch.utils.checkpoint` runs the module's code a second time, and its BatchNorm layers move twice.

# %%
block = Block(rngs=nnx.Rngs(0))
nnx.grad(lambda block: (nnx.remat(lambda block, x: block(x))(block, batch) ** 2).mean())(block)
print("nnx.remat:", block.norm.num_batches_tracked[...])

module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
(checkpoint(module, torch.tensor(np.asarray(batch)), use_reentrant=False) ** 2).mean().backward()
print("torch.utils.checkpoint:", module[1].num_batches_tracked.item())

graph, params, rest = nnx.split(Block(rngs=nnx.Rngs(0)), nnx.Param, ...)


@jax.checkpoint
def loss(params, rest, x):
    model = nnx.merge(graph, params, rest)
    return (model(x) ** 2).mean(), nnx.state(model, nnx.BatchStat)


_, moved = jax.grad(loss, has_aux=True)(params, rest, batch)
print("jax.checkpoint of a function that returns the state:", moved["norm"]["num_batches_tracked"][...])

# %% [markdown]
# scan and remat go together: that is how deep models fit into memory.


# %%
@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def frugal(x, block):
    return nnx.remat(lambda block, x: block(x))(block, x)


blocks = make(nnx.Rngs(0))
nnx.grad(lambda blocks: (frugal(batch, blocks) ** 2).mean())(blocks)
print("NNX, scan and remat:", blocks.norm.num_batches_tracked[...])

model = stack(linen.remat(LinenBlock))
variables = model.init(jax.random.key(0), batch, None)


def linen_loss(params):
    (y, _), updates = model.apply({**variables, "params": params}, batch, None, mutable=["batch_stats"])
    return (y**2).mean(), updates


_, updates = jax.grad(linen_loss, has_aux=True)(variables["params"])
print("Linen, scan and remat:", updates["batch_stats"]["BatchNorm_0"]["num_batches_tracked"])

# %% [markdown]
# ## Biased or unbiased
#
# Both frameworks normalise a batch of n values by its biased variance, the mean of the squared deviations. What goes
# into the *running* variance differs: Flax takes the biased one, PyTorch and jaxnorm n / (n - 1) times that. The
# expectation of the biased one is (n - 1) / n of the true variance, and no number of steps makes up for it. Here both
# run over 400 batches of normal numbers of variance 1:

# %%
sizes = [2, 3, 4, 8, 16, 64]


def running_variance(norm, size):
    batches = jax.random.normal(jax.random.key(size), (400, size, 64))
    steps = nnx.scan(lambda norm, x: (norm, norm(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    nnx.jit(steps)(norm, batches)
    return float(norm.var[...].mean())


options = {"momentum": 0.98, "rngs": nnx.Rngs(0)}
unbiased = [running_variance(jaxnorm.nnx.BatchNorm(64, **options), n) for n in sizes]
biased = [running_variance(nnx.BatchNorm(64, use_running_average=False, **options), n) for n in sizes]
as_flax = running_variance(jaxnorm.nnx.BatchNorm(64, correction=0, **options), sizes[0])

figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
smooth = np.geomspace(2, 64, 100)
axis.axhline(1, color="grey", linestyle=":", label="true variance")
axis.plot(smooth, 1 - 1 / smooth, color="tab:red", linewidth=0.8, label="(n - 1) / n")
axis.scatter(sizes, unbiased, color="tab:blue", label="jaxnorm, as PyTorch")
axis.scatter(sizes, biased, color="tab:red", marker="s", label="Flax")
axis.set_xscale("log", base=2)
axis.set_xticks(sizes, sizes)
axis.set_ylim(0.4, 1.1)
axis.set_xlabel("n, values of a channel in a batch")
axis.set_ylabel("running variance")
axis.legend()
plt.show()

print("n = 2: Flax", round(biased[0], 4), "- jaxnorm with correction=0", round(as_flax, 4))

# %% [markdown]
# n counts batch and positions: 32 images of 7x7 are 1568 values, where the two agree to a thousandth. It matters where
# n is small: vectors instead of images, few examples a device, the last stages of a network on small inputs. Then a
# model that was trained in PyTorch and goes on in Flax slowly changes its eval outputs. `correction=0` does as Flax
# does, for models that come from there.
#
# ## To remember
#
# - NNX layers change in place, Linen's statistics come back by `mutable=["batch_stats"]`.
# - Lanes or replicas that are parts of one batch need `axis_name`. Statistics by lane are for ensembles.
# - Under `scan` statistics are stacked; under `remat` they move once.
# - PyTorch's running variance is unbiased, Flax's is not. [BatchNorm over replicas](../batch_norm.md) has all
#   differences.
