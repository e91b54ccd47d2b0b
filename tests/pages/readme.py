"""What README.md takes for granted: its imports, and a small model of timm's where it downloads ResNet-50's weights."""

import types

import numpy as np
import safetensors.torch
import timm as everything
import torch
from flax import nnx

import interop
import jaxnorm


def create_model(name: str, *, pretrained: bool) -> torch.nn.Module:
    assert pretrained and everything.models.is_model_pretrained(name)
    return everything.create_model("test_resnet")


timm = types.SimpleNamespace(create_model=create_model)


def in_jaxnorm(names):
    yield
    layers = [layer for _, layer in nnx.iter_graph(names["model"]) if isinstance(layer, jaxnorm.nnx.BatchNorm)]
    assert layers and all(layer.axis_name == "batch" for layer in layers)
    file = safetensors.torch.load_file("resnet50_finetuned.safetensors")
    everything.create_model("test_resnet").load_state_dict(file, strict=True)
    for name, value in interop.state_dict(names["model"]).items():
        np.testing.assert_array_equal(file[name], value, err_msg=name)
