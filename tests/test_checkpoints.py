"""A checkpoint is whole or none, holds every bit, and is refused where it does not belong."""

import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from page_reader import programs

import jaxnorm
from jaxnorm import Checkpoints, Ema, LossScale, TrainState, data_parallel, replicate, train_step


class Net(nnx.Module):
    def __init__(self, width=6):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.bn = jaxnorm.nnx.BatchNorm(width, axis_name="batch", count_batches=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(5))
        self.none = nnx.Variable(jnp.zeros((0, 3)))  # an array without values
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jax.nn.relu(self.bn(self.first(x)))))


def make(width=6, tx=None):
    return TrainState.create(
        Net(width),
        tx or optax.adam(0.1),
        ema=Ema(0.9, dtype=jnp.bfloat16),
        rng=jax.random.key(3),
        loss_scale=LossScale.dynamic(),
    )


def loss_fn(model, batch):
    return jnp.mean(model(batch) ** 2), {}


BATCH = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def step():
    return data_parallel(train_step(loss_fn), how="shard_map", donate=True)


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        yield checkpoints


def bits(tree):
    return [
        np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def assert_equal(a, b):
    for x, y in zip(bits(a), bits(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
    "step", [1.0, True, np.True_, -1, np.float32(2), "3", None, jnp.float32(3), jnp.arange(2), np.array([1]), b"4"]
)
def test_a_step_that_is_no_integer_from_0_on_is_refused(checkpoints, step):
    """Its name would be that of no checkpoint: `1.0` and `True` were written and never found."""
    with pytest.raises(ValueError, match="a step is an integer from 0 on, found"):
        checkpoints.save(step, {"a": jnp.ones(2)})
    assert checkpoints.steps() == [] and list(checkpoints.directory.iterdir()) == []


def test_every_integer_is_a_step(checkpoints):
    for step in (0, np.int64(1), jnp.int32(2), np.array(3), np.uint8(4)):
        checkpoints.save(step, {"a": jnp.full(2, float(step))})
        checkpoints.wait()
        assert checkpoints.latest() == step
        assert checkpoints.restore({"a": jnp.zeros(2)}, step).state["a"].tolist() == [float(step)] * 2
    with pytest.raises(ValueError, match="a step is an integer"):
        checkpoints.restore({"a": jnp.zeros(2)}, 4.0)


def test_every_bit_comes_back_and_training_goes_on_as_it_would_have(checkpoints, step):
    state, _ = step(make(), BATCH)
    checkpoints.save(1, state, {"position": 16, "seed": 2**40})
    before = bits(state)
    ahead, _ = step(state, BATCH)  # given the arrays that are being written, to overwrite
    checkpoints.wait()
    found = checkpoints.restore(make())
    assert found.step == 1 and found.data == {"position": 16, "seed": 2**40}
    for x, y in zip(bits(found.state), before, strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
    assert_equal(step(found.state, BATCH)[0], ahead)


def test_arrays_come_to_where_those_of_the_given_state_are(checkpoints):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split, shared = (NamedSharding(mesh, spec) for spec in (PartitionSpec("batch"), PartitionSpec()))
    x = jnp.arange(16.0).reshape(8, 2)
    tree = {"split": jax.device_put(x, split), "shared": jax.device_put(x, shared), "host": np.arange(3)}
    checkpoints.save(0, tree)
    checkpoints.wait()
    few = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("batch",)), PartitionSpec("batch"))
    like = {"split": jax.device_put(x * 0, few), "shared": x * 0, "host": np.zeros(3, int)}
    found = checkpoints.restore(like).state
    assert_equal(found, tree)
    assert found["split"].sharding == few and found["shared"].sharding == x.sharding


@pytest.fixture
def float32():
    """As JAX is by default: no dtype of 64 bits."""
    with jax.enable_x64(False):
        yield


def test_numpy_arrays_stay_numpys_in_the_dtype_they_have(checkpoints, float32):
    state = {
        "seen": np.array([2**40 + 5]),
        "loss": np.float64(1.123456789012345),
        "mask": np.array([True, False]),
        "half": np.ones(2, jnp.bfloat16),
        "small": np.arange(3, dtype=np.uint8),
    }
    checkpoints.save(0, state)
    checkpoints.wait()
    found = checkpoints.restore(jax.tree.map(np.zeros_like, state) | {"loss": np.float64(0)}).state
    for name, x in state.items():
        assert type(found[name]) is type(x) and found[name].dtype == x.dtype and np.array_equal(found[name], x)


def test_a_numpy_array_that_was_on_a_device_when_saved_is_taken_up(checkpoints, float32):
    fresh = {"scale": np.array([0.5, 1.5]), "count": 3}
    checkpoints.save(0, jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))(fresh))
    checkpoints.wait()
    found = checkpoints.restore(fresh).state
    assert found["scale"].dtype == np.float64 and found["scale"].tolist() == [1.5, 2.5] and int(found["count"]) == 4
    with pytest.raises(ValueError, match=r"array scale: float32\[2\] there, int64\[2\] here"):
        checkpoints.restore({**fresh, "scale": np.zeros(2, int)})


@pytest.mark.parametrize("leaf", [2**40, "a text", np.array(["a text"]), np.array([None])], ids=str)
def test_leaves_that_cannot_be_stored_are_refused_by_name(leaf, checkpoints, float32):
    with pytest.raises(ValueError, match=r"^a/b cannot be stored: .*data or config"):
        checkpoints.save(0, {"a": {"b": leaf}, "c": jnp.ones(2)})
    assert checkpoints.latest() is None


def test_two_leaves_of_one_name_are_refused(checkpoints):
    with pytest.raises(ValueError, match=r"one name a/b: \['a'\]\['b'\] and \['a/b'\]"):
        checkpoints.save(0, {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(2)}})


@pytest.mark.parametrize("tree", [{"x": np.zeros((0, 3)), "y": jnp.zeros(0)}, {}], ids=["empty arrays", "no arrays"])
def test_a_state_without_values_is_saved_like_any_other(tree, checkpoints):
    checkpoints.save(0, tree, {"position": 1})
    checkpoints.wait()
    found = checkpoints.restore(tree)
    assert_equal(found.state, tree)
    assert found.data == {"position": 1}
    with pytest.raises(ValueError, match=r"array z: absent there, float64\[1\] here"):
        checkpoints.restore({**tree, "z": np.ones(1)})


def test_the_last_ones_are_kept(checkpoints):
    assert checkpoints.latest() is None and checkpoints.steps() == []
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*run: it has none"):
        checkpoints.restore({})
    for step in (0, 3, 7):
        checkpoints.save(step, {"x": jnp.full(3, step)})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 7] and checkpoints.latest() == 7
    assert checkpoints.restore({"x": jnp.zeros(3, int)}, step=3).state["x"].tolist() == [3, 3, 3]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 0 in .*run: it has those of steps \[3, 7\]"):
        checkpoints.restore({"x": jnp.zeros(3, int)}, step=0)
    with pytest.raises(ValueError, match=r"has a checkpoint of step 7, and this is step 7"):
        checkpoints.save(7, {"x": jnp.zeros(3)})


def test_another_run_is_refused_by_the_names_of_what_differs(tmp_path):
    with Checkpoints(tmp_path, config={"rate": 0.1, "layers": [1, 2]}) as checkpoints:
        checkpoints.save(1, make())
    with (
        Checkpoints(tmp_path, config={"rate": 0.2, "batch": 8}) as checkpoints,
        pytest.raises(ValueError, match="is of another run; these differ") as error,
    ):
        checkpoints.restore(make(7, optax.sgd(0.1, momentum=0.9)))
    lines = str(error.value).splitlines()[1:]
    assert lines[:3] == [
        "  config batch: absent there, 8 here",
        "  config layers: [1, 2] there, absent here",
        "  config rate: 0.1 there, 0.2 here",
    ]
    assert "  array params/bn/scale: float32[6] there, float32[7] here" in lines
    assert "  array opt_state/0/mu/first/kernel: float32[4, 6] there, absent here" in lines
    assert "  array opt_state/0/trace/first/kernel: absent there, float32[4, 7] here" in lines
    assert not any("last/bias" in line and "params" in line for line in lines)  # equal in both
    with Checkpoints(tmp_path, config={"rate": 0.1, "layers": [1, 2]}) as checkpoints:
        other_dtype = jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, make())
        with pytest.raises(ValueError, match=r"array params/bn/scale: float32\[6\] there, float16\[6\] here"):
            checkpoints.restore(other_dtype)
        with pytest.raises(ValueError, match=r"array step: int32\[\] there, int32\[8\] here"):
            checkpoints.restore(replicate(make()))


def test_a_checkpoint_that_was_cut_short_is_none(tmp_path):
    tree = {"x": jnp.asarray(np.random.default_rng(0).normal(size=1000))}  # does not compress: most of the largest file
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
    # As a killed save leaves them: under the name that orbax writes to, all or in part.
    for name, whole in (("2.orbax-checkpoint-tmp", True), ("3.orbax-checkpoint-tmp", False)):
        shutil.copytree(tmp_path / "1", tmp_path / name)
        if not whole:
            shutil.rmtree(tmp_path / name / "state")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert [p.name for p in tmp_path.iterdir()] == ["1"]  # and the disk has its room again
        checkpoints.save(2, tree)
        checkpoints.wait()
        assert_equal(checkpoints.restore(tree).state, tree)
        # One that someone copied or deleted in part is an error, not numbers.
        largest = max((p for p in (tmp_path / "2/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        with pytest.raises(OSError, match=r"/2 cannot be read: .*The others here: \[1\]; give restore one's step"):
            checkpoints.restore(tree)
        assert_equal(checkpoints.restore(tree, step=1).state, tree)


NOISE = {"w": np.random.default_rng(0).normal(size=(300, 300))}  # 720 kB that do not compress


def test_where_a_file_cannot_be_written_the_last_good_checkpoint_stands(checkpoints, tmp_path):
    tree = {"w": jnp.asarray(NOISE["w"])}
    checkpoints.save(1, tree)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(2, tree)
        with pytest.raises(OSError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = tmp_path / "run"
    assert str(error.value).startswith(f"the checkpoint of step 2 was not written to {run}: ")
    assert "File too large" in str(error.value)
    assert str(error.value).endswith(f"the last good one is {run / '1'}")
    assert [p.name for p in run.iterdir()] == ["1"] and checkpoints.latest() == 1
    assert_equal(checkpoints.restore(tree).state, tree)
    checkpoints.save(3, tree)  # there is room again
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_the_last_good_checkpoint_stands(small_disk):
    tree = {"w": jnp.asarray(NOISE["w"])}
    checkpoints = Checkpoints(small_disk / "run", keep=9)
    with pytest.raises(OSError, match="No space left on device") as error:
        for step in range(1, 9):  # the error of a save is the next call's
            checkpoints.save(step, tree)
        checkpoints.wait()
    steps = checkpoints.steps()
    assert steps and f"the checkpoint of step {steps[-1] + 1} was not written to {small_disk / 'run'}" in str(
        error.value
    )
    assert str(error.value).endswith(f"the last good one is {small_disk / 'run' / str(steps[-1])}")
    assert_equal(checkpoints.restore(tree).state, tree)
    checkpoints.close()


def test_what_is_no_json_and_no_number_of_checkpoints(tmp_path, checkpoints):
    with pytest.raises(TypeError, match="config is what JSON can hold"):
        Checkpoints(tmp_path, config={"rate": jnp.ones(())})
    with pytest.raises(TypeError, match="data is what JSON can hold"):
        checkpoints.save(1, {"x": jnp.ones(3)}, {"position": np.int64(3)})
    with pytest.raises(ValueError, match="keep is a whole number, 1 or more; got 0"):
        Checkpoints(tmp_path, keep=0)


def test_importing_the_package_does_not_import_orbax():
    code = (
        "import sys, jaxnorm; print(sorted(m for m in sys.modules if m.partition('.')[0] in ('orbax', 'tensorstore')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert pathlib.Path(jaxnorm.__file__).exists()


# a model out of a run


@pytest.fixture
def run(tmp_path, step):
    """A run of two steps, of which both are saved; and its state after each."""
    states, state = {}, make()
    with Checkpoints(tmp_path / "run") as checkpoints:
        for count in (1, 2):
            state, _ = step(state, BATCH)
            checkpoints.save(count, state, {"position": 16 * count})
            checkpoints.wait()
            states[count] = jax.tree.map(jnp.copy, state)
    return tmp_path / "run", states


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))


def test_a_model_comes_out_of_a_run_without_its_optimizer(run):
    directory, states = run
    step, model, data = jaxnorm.restore_model(directory, Net())
    assert step == 2 and data == {"position": 32}
    assert_equal(arrays(model), arrays(states[2].model()))
    step, model, data = jaxnorm.restore_model(directory, Net(), step=1)
    assert step == 1 and data == {"position": 16}
    assert_equal(arrays(model), arrays(states[1].model()))
    assert_equal(arrays(jaxnorm.restore_model(directory, Net(), average=True).model), arrays(states[2].ema_model()))


def test_what_was_frozen_in_a_run_is_found_by_its_path(run):
    class Frozen(nnx.Variable):
        pass

    model = Net()
    model.first.kernel = Frozen(model.first.kernel[...])
    found = jaxnorm.restore_model(run[0], model).model
    assert_equal(arrays(found), arrays(run[1][2].model()))
    assert isinstance(found.first.kernel, Frozen)


def test_reading_a_model_leaves_a_run_as_it_is(run):
    """Also what is being written just then, which the run's own restart would clear away."""
    directory = run[0]
    unfinished = directory / "3.orbax-checkpoint-tmp-7"
    unfinished.mkdir()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert jaxnorm.restore_model(directory, Net()).step == 2
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_a_model_of_another_run_is_refused_by_the_names_of_what_differs(run, tmp_path):
    directory, states = run
    with pytest.raises(ValueError, match=r"first/kernel: float32\[4, 6\] there, float32\[4, 7\] here") as error:
        jaxnorm.restore_model(directory, Net(7))
    assert "opt_state" not in str(error.value) and "axis of replicas" not in str(error.value)
    model = Net()
    del model.last
    with pytest.raises(ValueError, match=r"params/last/kernel: float32\[6, 3\] there, absent here"):
        jaxnorm.restore_model(directory, model)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* it has those of steps \[1, 2\]"):
        jaxnorm.restore_model(directory, Net(), step=5)
    with pytest.raises(FileNotFoundError, match="no run in"):
        jaxnorm.restore_model(tmp_path / "nowhere", Net())
    assert not (tmp_path / "nowhere").exists()
    for name, state in (
        ("replicas", replicate(states[2])),
        ("plain", states[2].replace(ema=None, ema_state=None)),
        ("tree", {"a": jnp.ones(3)}),
    ):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, state)
    with pytest.raises(ValueError, match=r"axis of replicas: take it up with Checkpoints.restore"):
        jaxnorm.restore_model(tmp_path / "replicas", Net())
    with pytest.raises(ValueError, match="has no average"):
        jaxnorm.restore_model(tmp_path / "plain", Net(), average=True)
    with pytest.raises(ValueError, match=r"of no jaxnorm.TrainState: its arrays are a"):
        jaxnorm.restore_model(tmp_path / "tree", Net())


def test_a_damaged_checkpoint_is_an_error_that_names_it(run):
    directory = run[0]
    shutil.rmtree(directory / "2" / "state" / "d", ignore_errors=True)
    for path in (directory / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(OSError, match=r"run/2 cannot be read: "):
        jaxnorm.restore_model(directory, Net())
    assert jaxnorm.restore_model(directory, Net(), step=1).step == 1


def test_the_page_about_pods_takes_a_model_out_of_a_run(run, tmp_path, monkeypatch):
    """The program of docs/pods.md, "A model out of a run"."""
    (program,) = programs("docs/pods.md", "a-model-out-of-a-run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(run[0])
    monkeypatch.chdir(tmp_path)
    names = {"jaxnorm": jaxnorm, "model": Net()}
    program.run(names)
    assert names["step"] == 2
    assert_equal(arrays(names["trained"]), arrays(run[1][2].model()))
    assert_equal(arrays(names["averaged"]), arrays(run[1][2].ema_model()))
