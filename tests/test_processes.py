"""Two processes of four devices give the numbers of one of eight; and one that is missing or lost stops the others."""

import os

import jax
import numpy as np
import processes_worker
import pytest
from processes_worker import WAYS, Group, arrays, batches, loss_fn, make

import jaxnorm
from jaxnorm import Checkpoints, data_parallel, launch, replicate, train_step


def run(state, way, data, devices=None):
    how, _, more, replicated = WAYS[way]
    step = data_parallel(train_step(loss_fn), how=how, devices=devices, **more)
    state = replicate(state) if replicated else state
    for batch in data:
        state, metrics = step(state, batch)
    return state, metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes of four devices wrote; see in_every_way."""
    folder = tmp_path_factory.mktemp("processes")
    with Checkpoints(folder / "from_one") as checkpoints:
        checkpoints.save(2, run(make("batch"), "shard_map", batches(2))[0], {"position": 64})
    Group(processes_worker.in_every_way, folder, logs=folder).succeed()
    return folder


@pytest.fixture(scope="module")
def expected():
    """One process, one device, the whole batch."""
    return run(make(), "jit", batches(3), jax.devices()[:1])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", [*WAYS, "placed", "from_one"])
def test_the_same_numbers_in_two_processes(folder, expected, name):
    for rank in range(2):
        assert_same(np.load(folder / f"{name}{rank}.npz"), arrays(*expected))


def test_statistics_of_each_replica_are_pooled_over_processes(folder):
    state, _ = run(make(), "pmap", batches(3))
    merged = arrays(jaxnorm.unreplicate(state, merge=True), jaxnorm.replica_divergence(state))
    for rank in range(2):
        assert_same(np.load(folder / f"merged{rank}.npz"), merged)
        assert_same(np.load(folder / f"chosen{rank}.npz"), arrays(jaxnorm.unreplicate(state, rank=5), {}))
    with Checkpoints(folder / "replicated") as checkpoints:
        stored = checkpoints.restore(state.batch_stats).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), stored, state.batch_stats)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_a_checkpoint_of_two_processes_goes_on_in_one(folder, expected, devices):
    with Checkpoints(folder / "from_two") as checkpoints:
        step, state, data = checkpoints.restore(make("batch"))
    assert (step, data) == (2, {"position": 64})
    assert_same(arrays(*run(state, "shard_map", batches(3)[2:], jax.devices()[:devices])), arrays(*expected))


def test_those_that_have_joined_do_not_wait_for_ever(tmp_path):
    group = Group(processes_worker.absent, processes=2, missing=[1], logs=tmp_path)
    assert group.wait() == {0: 75}
    assert "process 0 of 2 has waited 2 s, and not all processes have joined" in group.output(0)


def test_where_there_is_no_cluster_it_is_one_process(tmp_path):
    Group(processes_worker.alone, processes=1, logs=tmp_path).succeed()


def test_slurm_tells_processes_who_they_are(tmp_path):
    Group(processes_worker.under_slurm, logs=tmp_path).succeed()


def test_an_exception_in_one_process_stops_the_others(tmp_path):
    group = Group(processes_worker.fail, devices=1, logs=tmp_path)
    statuses = group.wait()
    assert statuses[1] == 1 and statuses[0] != 0, statuses
    assert "this process has had enough" in group.output(1)


# The launcher, with programs that need no JAX


def launched(tmp_path, code, *options):
    program = tmp_path / "program.py"
    program.write_text("import os, signal, sys, time\nrank = os.environ['JAX_PROCESS_ID']\n" + code)
    return launch.main([*options, str(program), "--steps", "3"])


def test_the_launcher_forwards_output_with_the_process_number(tmp_path, capsys):
    code = "print(sys.argv[1:], [os.environ[f'JAX_{n}'] for n in ('NUM_PROCESSES', 'NUM_CPU_DEVICES', 'PLATFORMS')])"
    assert launched(tmp_path, code, "--processes", "2", "--devices", "4") == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines == [f"[{rank}] ['--steps', '3'] ['2', '4', 'cpu']" for rank in range(2)]


@pytest.mark.parametrize(
    "end, status, message",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by signal 9 (SIGKILL)"),
        ("sys.exit(3)", 3, "process 1 failed with exit status 3"),
    ],
)
def test_the_launcher_kills_all_when_one_dies_and_says_which(tmp_path, capsys, end, status, message):
    code = f"""
import pathlib
folder = pathlib.Path({str(tmp_path)!r})
if rank == "1":
    while len(list(folder.glob("pid*"))) < 2:
        time.sleep(0.01)
    print("going", flush=True)
    {end}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / ("pid" + rank)).write_text(str(os.getpid()))
time.sleep(1000)
"""
    assert launched(tmp_path, code, "--processes", "3") == status
    out, err = capsys.readouterr()
    assert "[1] going" in out and f"jaxnorm.launch: {message}; the others were stopped." in err
    for path in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_the_launcher_refuses_what_is_no_number(capsys):
    with pytest.raises(SystemExit):
        launch.main(["--processes", "0", "train.py"])
    assert "0 is not a number of 1 or more" in capsys.readouterr().err


def test_processes_with_other_numbers_of_examples_and_batches_evaluate_each_once(folder):
    data = {name: np.concatenate([batch[name] for batch in batches(2)])[:56] for name in ("x", "y")}
    expected = jaxnorm.evaluate(jaxnorm.eval_step(processes_worker.metrics_fn), make(None), [data])
    for rank in range(2):
        found = np.load(folder / f"evaluated{rank}.npz")
        assert found["examples"] == 56
        assert found["top2"] == expected["top2"]
        np.testing.assert_array_equal(found["confusion"], expected["confusion"])
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-13)
