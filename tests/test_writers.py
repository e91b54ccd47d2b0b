"""Writers of one path at once, and writers that are ended: a reader finds the old or the new, whole, and no litter."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

import interop
from interop import CheckpointError, load_checkpoint, save_checkpoint
from interop.files import replacing


def arrays(value: float) -> dict[str, np.ndarray]:
    return {f"layer{i}.weight": np.full((16, 16), value, np.float32) for i in range(6)}


def value(checkpoint) -> float:
    """The one number that all six arrays hold: a mixture has two."""
    found = {float(x) for array in checkpoint.values() for x in array.flat}
    assert len(found) == 1 and len(checkpoint) == 6, found
    return found.pop()


def listed(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@contextlib.contextmanager
def at_once(*tasks):
    """Runs the tasks in threads (a lock of a file is the open file's, so threads meet as processes do)."""
    problems: list[BaseException] = []
    barrier = threading.Barrier(len(tasks) + 1)

    def run(task):
        barrier.wait()
        try:
            task()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        barrier.wait()
        yield
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems, problems


@pytest.mark.parametrize("limits", [(2000, 2000), (2000, 3000), (2000, None), (None, None)])
def test_two_writers_of_one_path_leave_one_checkpoint(tmp_path, limits):
    for i in range(12):
        path = tmp_path / str(i) / "model.safetensors"
        path.parent.mkdir()
        tasks = [
            lambda number=number, limit=limit: save_checkpoint(path, arrays(number), max_shard_size=limit)  # noqa: B023
            for number, limit in enumerate(limits)
        ]
        with at_once(*tasks):
            pass
        last = value(load_checkpoint(path))
        assert last in (0.0, 1.0)
        index = path.with_name("model.safetensors.index.json")
        files = {path.name}
        if index.exists():
            files = {index.name, *json.loads(index.read_text())["weight_map"].values()}
        assert set(listed(path.parent)) == files


def test_a_reader_beside_a_writer_finds_a_whole_checkpoint(tmp_path):
    path, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    save_checkpoint(path, arrays(0), max_shard_size=2000)

    def write():
        for i in range(30):
            save_checkpoint(path, arrays(i), max_shard_size=2000)

    seen = set()
    with at_once(write, lambda: seen.update(value(load_checkpoint(index)) for _ in range(60))):
        pass
    assert value(load_checkpoint(path)) == 29.0


def test_the_first_files_have_the_usual_names_and_later_ones_no_others_name(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, arrays(1), max_shard_size=3000)
    usual = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert listed(tmp_path) == [*usual, "model.safetensors.index.json"]
    save_checkpoint(path, arrays(2), max_shard_size=3000)
    assert len(listed(tmp_path)) == 4 and not set(usual) & set(listed(tmp_path))
    assert all(name.endswith(usual[i][5:]) for i, name in enumerate(sorted(listed(tmp_path)[:3])))
    assert value(load_checkpoint(path)) == 2.0


def _left_by_an_ended_writer(path, stem: str = "model"):
    """What one that was killed before the rename of the index leaves: files, and the index under its temporary name."""
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        (path.parent / name).write_bytes(b"half of i")
    index = path.with_name(f".{path.name}.index.json.{'0123456789abcdef'}.tmp")
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    path.with_name(f".{path.name}.{'fedcba9876543210'}.tmp").write_bytes(b"half")


@pytest.mark.parametrize("stem", ["model", "model-0123456789abcdef"])
@pytest.mark.parametrize("limit", [3000, None])
def test_what_ended_writers_left_is_cleared_by_the_next(tmp_path, stem, limit):
    path = tmp_path / "model.safetensors"
    _left_by_an_ended_writer(path, stem)
    others = [  # of nobody that is known to have ended, or of another path
        "model-finetune-00001-of-00002.safetensors", "model.safetensors.tmp", ".model.safetensors.backup12.tmp",
        "model2-00001-of-00002.safetensors", ".model2.safetensors.0123456789abcdef.tmp", "notes.txt",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_bytes(b"theirs")
    save_checkpoint(path, arrays(1), max_shard_size=limit)
    assert value(load_checkpoint(path)) == 1.0
    found = set(listed(tmp_path)) - set(others)
    expected = {path.name} if limit is None else {"model.safetensors.index.json"}
    if limit is not None:
        expected |= set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert found == expected
    assert all((tmp_path / name).read_bytes() == b"theirs" for name in others)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_the_files_of_a_writer_at_work_stay(tmp_path, name):
    path = tmp_path / name
    with replacing.temporary(path) as one, replacing.temporary(tmp_path / f"{name}.index.json") as index:
        shard = tmp_path / "model-00001-of-00001.safetensors"
        shard.write_bytes(b"theirs")
        index.path.write_text(json.dumps({"weight_map": {"a": shard.name}}))
        _left_by_an_ended_writer(path, "model-0123456789abcdef")
        save_checkpoint(path, arrays(1))
        if path.suffix == ".safetensors":
            save_checkpoint(path, arrays(2), max_shard_size=3000)
        assert one.path.exists() and index.path.exists() and shard.read_bytes() == b"theirs"
    assert not one.path.exists()


def test_an_index_from_elsewhere_removes_nothing_but_arrays(tmp_path):
    (tmp_path / "train.py").write_text("pass")
    index = {"weight_map": {"a": "train.py", "b": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / f".model.safetensors.index.json.{'a' * 16}.tmp").write_text(json.dumps(index))
    save_checkpoint(tmp_path / "model.safetensors", arrays(1))
    assert listed(tmp_path) == ["model.safetensors", "train.py"]


def test_a_killed_process_leaves_the_old_checkpoint_and_the_next_save_clears_up(tmp_path, model):
    path, folder = tmp_path / "model.safetensors", tmp_path / "artifact"
    save_checkpoint(path, arrays(1), max_shard_size=3000)
    interop.save(model, folder)
    code = """
        import os, signal, sys, threading
        import numpy as np, interop
        path, folder, which = sys.argv[1:]
        def killed(old, new, replace=os.replace):  # as by the system, at the very last moment
            if str(new).endswith("index.json" if which == "shards" else "program.json"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)
        os.replace = killed
        if which == "shards":
            arrays = {f"layer{i}.weight": np.full((16, 16), 2, np.float32) for i in range(6)}
            interop.save_checkpoint(path, arrays, max_shard_size=3000)
        else:
            interop.save(interop.load(folder), folder)
    """
    for which in ("shards", "artifact"):
        arguments = [sys.executable, "-c", textwrap.dedent(code), str(path), str(folder), which]
        root = os.path.dirname(os.path.dirname(interop.__file__))
        done = subprocess.run(arguments, env=os.environ | {"PYTHONPATH": root}, check=False)
        assert done.returncode == -signal.SIGKILL
    assert value(load_checkpoint(path)) == 1.0
    assert len(listed(tmp_path)) > 5 and len(listed(folder)) > 2
    interop.load(folder)
    save_checkpoint(path, arrays(3), max_shard_size=3000)
    interop.save(model, folder)
    assert value(load_checkpoint(path)) == 3.0
    assert len(listed(tmp_path)) == 5 and listed(folder) == ["model.safetensors", "program.json"]


@contextlib.contextmanager
def full_disk(size: int):
    """No file may become longer than this."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("size", [100, 1500])  # of the index, of a file
def test_a_full_disk_leaves_the_old_files_of_a_sharded_checkpoint(tmp_path, size):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, arrays(1), max_shard_size=3000)
    before = listed(tmp_path)
    with full_disk(size), pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(path, arrays(2), max_shard_size=3000)
    assert listed(tmp_path) == before and value(load_checkpoint(path)) == 1.0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8))
    return interop.from_torch(module, torch.zeros(2, 3))


def filled(model, number: float):
    interop.load_state_dict(model, {n: np.full_like(x, number) for n, x in interop.state_dict(model).items()})
    return model


def number(folder) -> float:
    found = {float(x) for array in interop.state_dict(interop.load(folder)).values() for x in array.flat}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("size", [300, 2000])  # of the arrays, of the program
def test_a_full_disk_leaves_the_old_artifact(tmp_path, model, size):
    interop.save(filled(model, 1), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2000 < (tmp_path / "program.json").stat().st_size
    with full_disk(size), pytest.raises(CheckpointError, match="cannot be written"):
        interop.save(filled(model, 2), tmp_path)
    assert number(tmp_path) == 1.0 and listed(tmp_path) == ["model.safetensors", "program.json"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
def test_an_artifact_is_the_old_or_the_new_one_wherever_a_save_ends(tmp_path, model, monkeypatch, at, kind):
    interop.save(filled(model, 1), tmp_path)
    calls = []

    def failing(old, new, replace=os.replace):
        calls.append(new)
        if len(calls) == at:
            raise kind("the end")
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with contextlib.suppress(CheckpointError, KeyboardInterrupt):
            interop.save(filled(model, 2), tmp_path)
    assert number(tmp_path) == (1.0 if at == 1 else 2.0)
    interop.save(filled(model, 3), tmp_path)
    assert number(tmp_path) == 3.0 and listed(tmp_path) == ["model.safetensors", "program.json"]


def test_two_writers_of_one_artifact_leave_one(tmp_path, model):
    other = interop.from_torch(torch.nn.Linear(3, 8), torch.zeros(2, 3))  # another program
    models = [filled(model, 1), filled(other, 2)]
    for i in range(6):
        with at_once(*[lambda m=m: interop.save(m, tmp_path / str(i)) for m in models]):  # noqa: B023
            pass
        assert number(tmp_path / str(i)) in (1.0, 2.0)
        assert listed(tmp_path / str(i)) == ["model.safetensors", "program.json"]


def test_arrays_of_another_save_of_the_same_program_are_an_error(tmp_path, model):
    for name in "ab":
        interop.save(filled(model, ord(name)), tmp_path / name)
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match="or to another save of it"):
        interop.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("there", [True, False])
def test_saving_through_a_link_writes_its_target(tmp_path, name, there):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / name, tmp_path / name
    if there:
        save_checkpoint(real, arrays(1))
        real.chmod(0o640)
    link.symlink_to(real)
    save_checkpoint(link, arrays(2))
    assert link.is_symlink() and not real.is_symlink()
    assert value(load_checkpoint(real)) == value(load_checkpoint(link)) == 2.0
    assert listed(tmp_path) == [name, "store"] and listed(tmp_path / "store") == [name]
    assert not there or real.stat().st_mode & 0o777 == 0o640


def test_saving_several_files_through_a_link_writes_them_beside_its_target(tmp_path):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "model.safetensors", tmp_path / "latest.safetensors"
    save_checkpoint(real, arrays(1))
    link.symlink_to(real)
    save_checkpoint(link, arrays(2), max_shard_size=3000)
    assert listed(tmp_path) == [link.name, "store"]
    assert value(load_checkpoint(real)) == value(load_checkpoint(link)) == 2.0
    save_checkpoint(link, arrays(3))
    assert link.is_symlink() and value(load_checkpoint(link)) == 3.0 and listed(tmp_path / "store") == [real.name]


def test_an_artifact_is_saved_through_a_link(tmp_path, model):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    interop.save(filled(model, 4), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and number(tmp_path / "real") == 4.0


def test_an_artifact_that_cannot_be_written_is_an_error_that_names_it(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot be a folder"):
        interop.save(model, tmp_path / "file")
