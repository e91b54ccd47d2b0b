"""What docs/values.md takes for granted: its imports. The model is compared with the PyTorch module."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import checkify

import interop


def in_numbers_read_from_tensors(names):
    yield
    module, x = names["Cut"](), torch.randn(5, 8)
    np.testing.assert_allclose(names["model"](x.numpy()), module(x).detach(), atol=1e-5)
    assert names["model"](x.numpy()).shape == (5, 3)
    with pytest.raises(ValueError, match="width"):
        interop.load_state_dict(names["model"], module.state_dict() | {"width": torch.tensor(2)})


def in_checks(names):
    yield
    np.testing.assert_array_equal(names["model"](jnp.asarray([0.0, 1.0])), [np.inf, 1])  # "as when nothing is wrong"
    yield
    line, _, code = names["error"].get().partition(": ")
    assert line.startswith("docs/values.md:") or "values.md:" in line
    assert code.startswith("if not torch.isfinite(y).all():")
    with pytest.raises(checkify.JaxRuntimeError, match="isfinite"):
        names["error"].throw()
