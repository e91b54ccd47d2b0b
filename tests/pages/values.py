"""What docs/values.md takes for granted: its imports. The model is compared with the PyTorch module."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import checkify
from page_reader import programs

import interop

CLASS, GET = programs("docs/values.md", "checks")


def in_numbers_read_from_tensors(names):
    yield
    module, x = names["Cut"](), torch.randn(5, 8)
    np.testing.assert_allclose(names["model"](x.numpy()), module(x).detach(), atol=1e-5)
    assert names["model"](x.numpy()).shape == (5, 3)
    with pytest.raises(ValueError, match="width"):
        interop.load_state_dict(names["model"], module.state_dict() | {"width": torch.tensor(2)})


def in_checks(names):
    yield
    assert np.isinf(names["model"](jnp.zeros((2, 3)))).all()  # as the code does when nothing is wrong
    yield
    place, said = re.search(r"# net\.py:(\d+): (.*)", GET.text).groups()  # as if the class began a file
    assert re.search(rf":{int(place) + CLASS.line - 1}: {re.escape(said)}", names["error"].get())
    with pytest.raises(checkify.JaxRuntimeError, match="isfinite"):
        names["error"].throw()
