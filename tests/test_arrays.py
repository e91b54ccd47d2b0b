"""Arrays of NumPy, JAX and PyTorch as each other's: every dtype, bit for bit, and shared where nothing can go wrong."""

import collections

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import interop
from interop import dtypes
from interop.arrays import to_numpy

NAMES = [name for name in dtypes.TORCH if hasattr(torch, name)]


def bits(name):
    size = dtypes.TORCH[name].itemsize
    return (np.arange(24 * size) % 2 if name == "bool" else np.arange(24 * size)).astype(np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_goes_to_torch_and_comes_back_bit_for_bit(name):
    array = bits(name).view(dtypes.TORCH[name]).reshape(2, 3, 4)
    for given in (array, array.T, array[::-1, ::2], array[0, 0, 0], array[:0]):
        tensor = interop.to_torch(given)
        assert str(tensor.dtype) == f"torch.{name}" and tuple(tensor.shape) == given.shape
        back = to_numpy(tensor)
        assert back.dtype == given.dtype and back.tobytes() == given.tobytes()


def test_memory_is_shared_with_what_may_be_written_and_with_nothing_else():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        array = np.zeros(3, dtype)
        interop.to_torch(array)[0] = 1
        assert array[0] == 1
        array.flags.writeable = False
        interop.to_torch(array)[1] = 1
        assert array[1] == 0
    array = jnp.zeros(3, jnp.bfloat16)
    tensor = interop.to_torch(array)
    tensor[0] = 1
    assert array[0] == 0 and tensor.dtype is torch.bfloat16


def test_trees_keep_their_order_and_what_is_no_array():
    Pair = collections.namedtuple("Pair", "first second")
    tree = {"z": np.ones(2), "a": [jnp.ones(1), (3, "text", None)], "p": Pair(np.float32(2), torch.ones(1))}
    found = interop.to_torch(tree)
    assert list(found) == ["z", "a", "p"] and found["a"][1] == (3, "text", None)
    assert (
        type(found["p"]) is Pair and found["p"].first.dtype is torch.float32 and found["p"].second is tree["p"].second
    )


def test_a_model_in_bfloat16_is_exported_to_pytorch():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).bfloat16()
    model = interop.from_torch(module, torch.zeros(2, 3, 6, 6, dtype=torch.bfloat16))
    state = interop.to_torch(interop.state_dict(model))
    torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).bfloat16().load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_what_torch_has_no_dtype_for_is_named():
    with pytest.raises(TypeError, match="torch has no dtype str"):
        interop.to_torch({"x": np.asarray(["a"])})
