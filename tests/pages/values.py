"""What docs/values.md takes for granted: its imports."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental import checkify
from page_reader import programs

import interop


def in_numbers_read_from_tensors(names):
    yield
    module, x = names["Cut"](), torch.randn(5, 8)
    np.testing.assert_allclose(names["model"](x.numpy()), module(x).detach(), atol=1e-5)
    assert names["model"](x.numpy()).shape == (5, 3)
    with pytest.raises(ValueError, match="width"):  # "refuse another one"
        interop.load_state_dict(names["model"], module.state_dict() | {"width": torch.tensor(2)})


def in_checks(names):
    yield
    assert np.isinf(names["model"](jnp.zeros((2, 3)))).all()  # "as the code does when nothing is wrong"
    yield
    module, get = programs("docs/values.md", "checks")
    line, said = re.search(r"# net\.py:(\d+): (.*)", get.text).groups()  # in a file that begins with the class
    assert f".md:{module.line - 1 + int(line)}: {said}" in names["error"].get()
