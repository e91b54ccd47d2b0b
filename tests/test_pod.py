"""Faults: examples/pod.py computes the same however often it was killed, and no process waits for a lost one.

The moments are drawn anew in each run of the tests; a failure prints the seed.
"""

import os
import random
import re
import signal
import time

import processes_worker
import pytest
from processes_worker import Group

import jaxnorm

pytestmark = pytest.mark.once

OPTIONS = ("--save-every", "3", "--log-every", "1", "--batch", "8")
FOR_EVER = 10**6  # steps: until it is stopped


class Runs:
    """Starts of the example, one after the other, on one folder of checkpoints."""

    def __init__(self, folder):
        self.folder, self.checkpoints, self.starts = folder, folder / "checkpoints", 0

    def start(self, steps, *, processes=2, devices=2, heartbeat=20, first=(processes_worker.train,)):
        self.starts += 1
        logs = self.folder / f"start{self.starts}"
        logs.mkdir(parents=True)
        arguments = ("--out", str(self.folder), "--steps", str(steps), "--heartbeat-timeout", str(heartbeat), *OPTIONS)
        return Group(*first, *arguments, processes=processes, devices=devices, logs=logs)

    def finish(self, steps, **where):
        """Runs to the end, and gives what it says of its state: a checksum of every bit."""
        group = self.start(steps, heartbeat=600, **where)  # on a busy machine a process may seem silent
        group.succeed()
        return re.search(rf"^done: step {steps}, state ([0-9a-f]{{8}})$", group.output(0), re.MULTILINE)[1]

    def latest(self):
        """The last complete checkpoint, by its name alone."""
        return max((int(p.name) for p in self.checkpoints.glob("*") if p.name.isdecimal()), default=0)

    def cut_short(self):
        return list(self.checkpoints.glob("*.orbax-checkpoint-tmp*"))


def until(condition, group):
    while not condition():
        assert all(p.is_alive() for p in group.processes.values()), group.output()
        time.sleep(0.002)


def until_step(number, group):
    until(lambda: len(re.findall(r"^step ", group.output(0), re.MULTILINE)) >= number, group)


def test_killed_again_and_again_a_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    draw = random.Random(seed)
    runs = Runs(tmp_path / "killed")

    # One process finds the disk full at the second checkpoint: it says so, and the first stands.
    full = draw.randrange(2)
    group = runs.start(FOR_EVER, first=(processes_worker.train_until_the_disk_is_full, full))
    assert 0 not in group.wait().values(), group.output()
    assert runs.latest() == 3
    error = re.search(r"^OSError: (the checkpoint of step .*)$", group.output(full), re.MULTILINE)[1]
    assert error.startswith(f"the checkpoint of step 6 was not written to {runs.checkpoints}: "), error
    assert "File too large" in error and error.endswith(f"; the last good one is {runs.checkpoints}/3"), error

    # Killed in the middle of a file of a checkpoint, either process.
    killed = draw.randrange(2)
    group = runs.start(FOR_EVER, first=(processes_worker.train_until_killed_while_writing, killed))
    statuses = group.wait()
    assert statuses[killed] == -signal.SIGXFSZ and statuses[1 - killed] != 0, (statuses, group.output())
    assert runs.cut_short() and runs.latest() == 3

    # kill -9 at a drawn moment.
    group, steps, seconds = runs.start(FOR_EVER), draw.randrange(8), draw.uniform(0, 0.1)
    until_step(steps, group)
    time.sleep(seconds)
    killed = draw.randrange(2)
    group.kill(killed)
    statuses = group.wait()
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] != 0, statuses

    # SIGTERM to one process, as schedulers send it: all save what they have, at the same step.
    group, steps = runs.start(FOR_EVER, heartbeat=600), draw.randrange(1, 6)
    until_step(steps, group)
    group.kill(draw.randrange(2), signal.SIGTERM)
    assert set(group.wait().values()) == {75}, group.output()
    saved = int(re.search(r"was told to stop \(SIGTERM\): saved at step (\d+)", group.output(0))[1])
    assert runs.latest() == saved

    # To the end: on as many devices, and then on one process that has them all.
    undisturbed = Runs(tmp_path / "undisturbed")
    end = saved + draw.randrange(1, 4)
    assert runs.finish(end) == undisturbed.finish(end)
    assert not runs.cut_short()
    one = {"processes": 1, "devices": 4}
    assert runs.finish(end + 4, **one) == undisturbed.finish(end + 4, **one)
    with jaxnorm.Checkpoints(runs.checkpoints) as ours, jaxnorm.Checkpoints(undisturbed.checkpoints) as theirs:
        assert ours.latest() == theirs.latest() == end + 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_or_falls_silent_stops_the_other(tmp_path, number, lost):
    group = Group(processes_worker.work_together, devices=1, logs=tmp_path)
    until(lambda: group.output(1 - lost).count("working") > 2, group)
    group.kill(lost, number)
    other = group.processes[1 - lost]
    other.join(400)  # not group.wait(), which would wait for the silent one
    status = other.exitcode
    group.processes[lost].kill()
    group.wait()
    assert status not in (None, 0), group.output()
