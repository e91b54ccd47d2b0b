"""The ResNets of examples/: weights of torchvision and timm load with no rename, and compute the same in both modes."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resnet
import safetensors.torch
import timm
import torch
import torchvision
from flax import nnx
from parity_tools import FAST, Step, assert_same_step, normal, randomised, relative, torch_step
from resnet import Architecture, LinenResNet, NnxResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

import interop
import jaxnorm
from interop.weights import _state_dict, nnx_tree

IMAGES = normal(3, 3, 32, 32)
X = jnp.asarray(IMAGES.permute(0, 2, 3, 1).numpy())
SMALL = {
    "basic": Architecture(False, (1, 2)),
    "bottleneck": Architecture(True, (1, 2)),
    "grouped": Architecture(True, (1, 2), groups=4, group_width=16),
}


@functools.cache
def in_torch(name):
    """torchvision's network of that architecture, two stages of it, with statistics and scales that are no defaults."""
    of = SMALL[name]
    torch.manual_seed(0)
    block = Bottleneck if of.bottleneck else BasicBlock
    options = {"num_classes": 10, "groups": of.groups, "width_per_group": of.group_width}
    module = torchvision.models.ResNet(block, [*of.depths, 1, 1], **options)
    module.layer3, module.layer4 = torch.nn.Sequential(), torch.nn.Sequential()
    module.fc = torch.nn.Linear(128 * block.expansion, 10)
    return randomised(module)


def in_nnx(name):
    of = SMALL[name]
    blank = nnx.eval_shape(lambda: NnxResNet(of, 10, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    return interop.load_state_dict(blank, in_torch(name).state_dict())


def in_linen(name):
    module = LinenResNet(SMALL[name], 10, param_dtype=jnp.float64)
    return interop.load_state_dict((module, abstract(module)), in_torch(name).state_dict())


def abstract(module):
    return jax.eval_shape(module.init, jax.random.key(0), X)


def step_of(model):
    """Loss, gradients and state of a training step, and the outputs in eval mode, of NNX's or Linen's network."""
    weights = normal(3, 10).numpy()
    if isinstance(model, tuple):
        module, variables = model

        def apply(params, rest, train):
            return module.apply({"params": params, **rest}, X, train=train, mutable=["batch_stats"])

        def whole(params, rest):
            return module, {"params": params, **rest}

        params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    else:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def apply(params, rest, train):
            model = nnx.merge(graph, params, rest, copy=True)
            model.train() if train else model.eval()
            return model(X), nnx.state(model, nnx.Not(nnx.Param))

        def whole(params, rest):
            return nnx.merge(graph, params, rest, copy=True)

    def loss(params):
        y, after = apply(params, rest, True)
        return (y * weights).sum(), after

    def run(params):
        return jax.value_and_grad(loss, has_aux=True)(params), apply(params, rest, False)[0]

    ((value, after), grads), outputs = jax.jit(run, compiler_options=FAST)(params)
    found = interop.state_dict(whole(grads, rest))
    grads = {n: g for n, g in found.items() if not n.rpartition(".")[2].startswith(("running", "num_"))}
    return Step(float(value), grads, interop.state_dict(whole(params, after))), outputs


@pytest.mark.parametrize("flax", [in_nnx, in_linen])
@pytest.mark.parametrize("name", SMALL)
def test_a_network_computes_what_torchvisions_computes_in_both_modes(name, flax):
    module = in_torch(name)
    found, outputs = step_of(flax(name))
    assert relative(outputs, module.eval()(IMAGES).detach()) < 1e-9
    expected = torch_step(module.train(), IMAGES)
    assert found.grads.keys() == expected.grads.keys()
    assert_same_step(Step(found.loss, found.grads, {n: found.state[n] for n in expected.state}), expected, 1e-9)


@pytest.mark.parametrize("flax", [in_nnx, in_linen])
def test_a_network_goes_home_bit_for_bit_as_files_and_as_a_training_state(flax, tmp_path):
    module, model = in_torch("basic"), flax("basic")
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    for i, target in enumerate((model, state)):
        for ending in (".pth", ".safetensors"):
            path = tmp_path / f"{i}{ending}"
            interop.save_checkpoint(path, target)
            other = copy.deepcopy(module)
            for value in other.state_dict().values():
                value.zero_()
            arrays = torch.load(path) if ending == ".pth" else safetensors.torch.load_file(path)
            other.load_state_dict(arrays, strict=True)
            for name, value in module.state_dict().items():
                assert torch.equal(value, other.state_dict()[name]), name


def test_a_training_state_takes_a_state_dict():
    state = jaxnorm.TrainState.create(in_linen("basic"), optax.sgd(0.1))
    given = {k: np.asarray(v) + 1 for k, v in in_torch("basic").state_dict().items()}
    loaded = interop.load_state_dict(state, given)
    for name, value in interop.state_dict(loaded).items():
        np.testing.assert_array_equal(value, given[name])
    replicated = jaxnorm.replicate(state)
    with pytest.raises(ValueError, match="the state is replicated"):
        interop.load_state_dict(replicated, given)


@pytest.mark.parametrize("name", resnet.ARCHITECTURES)
def test_every_architecture_is_torchvisions(name):
    with torch.device("meta"):
        module = getattr(torchvision.models, name)()
    stages = (module.layer1, module.layer2, module.layer3, module.layer4)
    block = module.layer1[0]
    bottleneck, groups = hasattr(block, "conv3"), block.conv2.groups
    width = block.conv2.out_channels // groups
    assert resnet.ARCHITECTURES[name] == Architecture(bottleneck, tuple(map(len, stages)), groups, width)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_torchvisions_and_timms_networks_have_the_same_entries(name):
    with torch.device("meta"):
        expected, theirs = (
            {n: tuple(v.shape) for n, v in module.state_dict().items()}
            for module in (getattr(torchvision.models, name)(), timm.create_model(name))
        )
    assert theirs == expected
    model = nnx.eval_shape(lambda: resnet.nnx_resnet(name, rngs=nnx.Rngs(0)))
    assert shapes(model) == expected
    module = resnet.linen_resnet(name)
    assert shapes((module, jax.eval_shape(module.init, jax.random.key(0), X))) == expected


def shapes(model):
    tree = _state_dict.opened(model)
    return {e: s for part in nnx_tree.parts(tree) for e, s in zip(part.entries, part.shapes, strict=True)}
