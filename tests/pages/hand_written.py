"""What docs/hand_written.md takes for granted: a PyTorch module, and models in Flax with and without its names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from page_reader import blocks

import interop
import jaxnorm

SAID = {block.section: block.text for block in blocks("docs/hand_written.md") if block.language == ""}


class Model(nnx.Module):
    def __init__(self, norm="bn1"):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        setattr(self, norm, jaxnorm.nnx.BatchNorm(4, momentum=0.9, count_batches=True, rngs=nnx.Rngs(0)))


class Stages(nnx.Module):
    def __init__(self):
        self.stage1_block0, self.stage1_block1 = Model("norm1"), Model("norm1")


class Vgg(nnx.Module):
    def __init__(self):
        self.classifier = nnx.List([nnx.Linear(512 * 7 * 7, 2, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.classifier[0](x.reshape(len(x), -1))


class Features(linen.Module):
    """Names of Linen's own making, in the order of the calls."""

    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = linen.Conv(8, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        return linen.Dense(4)(x.mean((1, 2)))


def torch_block():
    block = torch.nn.Sequential()
    block.conv1, block.bn1 = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
    torch.nn.init.normal_(block.bn1.running_mean)
    return block


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def in_weights_in_and_out_of_hand_written_flax_models(names):
    """Each call undoes the other bit for bit."""
    names |= {"model": Model(), "state_dict": torch_block().state_dict()}
    before = dict(names["state_dict"])
    yield
    same(names["state_dict"], before)
    assert (names["model"].bn1.mean[...] == before["bn1.running_mean"].numpy()).all()


def in_layouts(names):
    """PyTorch flattens channels first."""
    module = torch.nn.Module()
    module.classifier = torch.nn.Sequential(torch.nn.Linear(512 * 7 * 7, 2))
    names |= {"model": Vgg(), "state_dict": module.state_dict()}
    yield
    x = torch.randn(2, 512, 7, 7)
    expected = module.classifier(x.flatten(1)).detach()
    np.testing.assert_allclose(names["model"](x.permute(0, 2, 3, 1).numpy()), expected, atol=1e-5)


def in_names(names):
    module = torch.nn.Module()
    module.layer1 = torch.nn.Sequential(torch_block(), torch_block())
    names |= {"model": Stages(), "state_dict": module.state_dict()}
    yield
    assert (names["model"].stage1_block1.norm1.mean[...] == module.layer1[1].bn1.running_mean.numpy()).all()
    same(interop.state_dict(names["model"], names["rename"]), module.state_dict())


def in_suggest_rename(names):
    """The table is the one of the page."""
    network = torch.nn.Module()
    network.features = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        *(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8)),
    )
    network.head = torch.nn.Linear(8, 4)
    names |= {"module": Features(), "variables": Features().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))}
    names["state_dict"] = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    yield
    assert str(names["suggestion"]).strip() == SAID["suggest_rename"].strip()
    assert names["suggestion"].rename


def in_what_is_no_array(names):
    block = torch_block()
    block.bn1.eps = 0.3
    names |= {"model": Model(), "torch_module": block, "flax_model": Model()}
    yield
    said = json.loads(SAID["what-is-no-array"].replace(", ...}", "}"))
    assert names["config"]["bn1"] == said["bn1"]
    assert block.bn1.eps == 1e-5 and block.bn1.momentum == 0.1
