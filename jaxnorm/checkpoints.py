"""Checkpoints of a run over many processes: written in the background, whole or not at all, taken up anywhere."""

import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnorm import _checks as check
from jaxnorm._typing import PyTree
from jaxnorm.global_arrays import is_own, named_leaves, refuse_different
from jaxnorm.saved_arrays import as_json, kinds_of, place_of, placed, reason_of, step_of, to_save


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives.

    **Attributes:**

    - `step`: the checkpoint's step.
    - `state`: the tree, its arrays placed as those of `like`.
    - `data`: where the reading of the data stood, as given to `save`.
    """

    step: int
    state: PyTree
    data: dict[str, Any]  # where the reading of the data stood, as given to `save`


class Checkpoints:
    """The checkpoints of one run, in one directory that all its processes see. Written by orbax (extra `pod`).

    ```python
    with jaxnorm.Checkpoints("runs/a", config={"learning_rate": 0.1}) as checkpoints:
        step, data = 0, {"seed": 0, "position": 0}
        if checkpoints.latest() is not None:
            step, state, data = checkpoints.restore(state)
        while step < steps:
            ...
            checkpoints.save(step, state, data)
    ```

    `save` copies the arrays off the devices and returns; files are written in the background, each process writing its
    own parts of sharded arrays. A checkpoint has a name of its own only when all of it is written (a rename; on object
    stores a marker), so one that was cut short is never read, and is cleared away at the next start.

    All processes make the same calls in the same order. The state is any tree of arrays: a `TrainState`, whose random
    key, counters, EMA and optimizer are in it. Arrays over the devices of several processes are saved as they are; an
    array of one process alone must hold the same values in all of them. NumPy arrays stay NumPy's, in the dtype they
    have; Python numbers become arrays, in the dtype JAX gives them. Saved as it is (not replicated), a state can be
    taken up on any number of devices and processes; one with an axis of replicas, on as many replicas.

    **Arguments:**

    - `directory`: made where it is missing. With several processes a file system that all of them share, or `gs://`.
    - `config`: what else has to be the same when the run is taken up: anything that JSON can hold.
    - `keep`: the number of checkpoints kept; the oldest are deleted after a new one is complete.
    - `timeout`: seconds after which a save counts as failed, if another process does not finish its part.

    **Raises:**

    - `TypeError`: for a directory that is no path, and a config that JSON cannot hold.
    - `ValueError`: where processes do not see one directory; for an empty path, and for `keep` and `timeout` that are
      no whole numbers from 1.
    - `OSError`: from `save`, `wait` and `close` where a checkpoint could not be written (full disk, quota, no
      permission), with its path and the last good one. The error of a save in the background is raised by the next of
      these calls, in the process that met it. Where there are several, let it end the program: the others wait for this
      one's part, until they are ended with it (`join_processes`) or `timeout` is over.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        keep: int = 3,
        timeout: int = 600,
    ) -> None:
        import orbax.checkpoint as ocp
        from etils import epath  # type: ignore[import-untyped]
        from orbax.checkpoint.checkpoint_managers import preservation_policy

        keep = check.whole("keep", keep, least=1)
        timeout = check.whole("timeout", timeout, least=1)
        check.instance("directory", directory, str | os.PathLike, "a path")
        if not os.fspath(directory):
            raise ValueError("directory is a path; got an empty one")
        self.config = as_json("config", {} if config is None else config)
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if "://" not in path:  # on object stores orbax does it, in the background
                self._clear("*")
        _refuse_separate_directories(self.directory)
        self._pending: int | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                cleanup_tmp_directories="://" in path,
                async_options=ocp.AsyncOptions(timeout_secs=timeout, barrier_sync_fn=_meeting()),
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order.

        **Returns:** a list of integers, empty if there is none.

        **Raises:** nothing of its own.
        """
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the last complete checkpoint, the same in all processes.

        **Returns:** the step, `None` if there is none.

        **Raises:** nothing of its own.
        """
        steps = self.steps()
        latest = steps[-1] if steps else -1
        if jax.process_count() > 1:  # network file systems show a new directory to some sooner than to others
            from jax.experimental import multihost_utils

            latest = int(multihost_utils.broadcast_one_to_all(np.int32(latest)))
        return None if latest < 0 else latest

    def save(self, step: Any, state: PyTree, data: Mapping[str, Any] | None = None) -> None:
        """Begins to write a checkpoint, after the one before is complete. The state may be donated afterwards.

        **Arguments:**

        - `step`: an integer from 0 on, also NumPy's or a JAX array of no dimensions (`state.step`).
        - `state`: any tree of arrays, a `TrainState` for instance.
        - `data`: where the reading of the data stands, in numbers and strings: a seed and a position, say.

        **Raises:**

        - `OSError`: where this checkpoint or the one before could not be written, see the class.
        - `ValueError`: for another step, if there is a checkpoint of this step or a later one, if an array of one
          process alone is not the same in all, or for leaves that cannot be stored: texts, numbers too large.
        - `TypeError`: for `data` that JSON cannot hold.
        """
        import orbax.checkpoint as ocp

        step = step_of(step)
        self.wait()
        latest = self._manager.latest_step()
        if latest is not None and latest >= step:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {latest}, and this is step {step}. To go on from an "
                "earlier one, delete those after it, or give the new run a directory of its own."
            )
        arrays = named_leaves(state)
        values = {name: to_save(name, x) for name, x in arrays.items() if np.size(x)}
        refuse_different({name: x for name, x in arrays.items() if is_own(x)})
        run = {"config": self.config, "data": as_json("data", {} if data is None else data), "arrays": kinds_of(arrays)}
        items = {"run": ocp.args.JsonSave(run)}
        if values:
            items["state"] = ocp.args.PyTreeSave(values)
        self._pending = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._failure(error) from None  # orbax has logged where it happened

    def wait(self) -> None:
        """Returns when all checkpoints begun are complete.

        **Raises:** `OSError` where one could not be written, see the class.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from None  # orbax has logged where it happened
        self._pending = None

    def restore(self, like: PyTree, step: Any = None) -> Restored:
        """A checkpoint, the last one by default, with its arrays placed as those of `like` are.

        **Arguments:**

        - `like`: a tree with the structure, shapes and dtypes of the one that was saved, on the devices where the
          arrays are to be: the `TrainState` before the first step, say. It is not changed.
        - `step`: of which checkpoint; None for the last one.

        **Returns:** a named tuple: `step`, `state` (like `like`), and the `data` that was given to `save`.

        **Raises:**

        - `FileNotFoundError`: if there is none, or none of that step.
        - `ValueError`: for a step that is none, and naming all that differs, if it is one of another model, optimizer
          or config.
        - `OSError`: if its files cannot be read.
        """
        import orbax.checkpoint as ocp

        step = self.latest() if step is None else step_of(step)
        if step is None or step not in self.steps():
            there = f"it has those of steps {self.steps()}" if self.steps() else "it has none"
            raise FileNotFoundError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {self.directory}: {there}"
            )
        wanted = named_leaves(like)
        run = self._read(step, run=ocp.args.JsonRestore()).run
        kinds = kinds_of(wanted)
        # A NumPy array may have been on a device when it was saved, in the dtype that JAX gave it there.
        kinds |= kinds_of(jax.eval_shape(lambda x: x, wanted)).items() & run["arrays"].items()
        self._refuse_other(step, run, kinds)
        places = {name: place_of(x) for name, x in wanted.items() if np.size(x)}
        found = {}
        if places:
            items = ocp.args.PyTreeRestore(item=dict.fromkeys(places, 0), restore_args=places)
            found = self._read(step, state=items).state
        leaves = [placed(found.get(name), x) for name, x in wanted.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), run["data"])

    def close(self) -> None:
        """Waits for what is being written, and ends. A `with` block does so at its end.

        **Raises:** `OSError` where a checkpoint could not be written, see the class.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error the other processes may not come to finish the checkpoint with this one.
        if error is None or jax.process_count() == 1:
            self.close()

    def _read(self, step: int, **items: Any) -> Any:
        import orbax.checkpoint as ocp

        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            others = [s for s in self.steps() if s != step]
            raise OSError(
                f"the checkpoint {self.directory / str(step)} cannot be read: {reason_of(error)}. Was it copied or "
                f"deleted in part? The others here: {others or 'none'}; give restore one's step, or delete this one."
            ) from error

    def _failure(self, error: Exception) -> OSError:
        """What to tell; and what was written in vain is cleared away, so that a full disk has room again."""
        step, self._pending = self._pending, None
        if jax.process_index() == 0:
            self._clear(str(step))
        steps = [s for s in self.steps() if s != step]
        good = f"the last good one is {self.directory / str(steps[-1])}" if steps else "there is none before it"
        return OSError(f"the checkpoint of step {step} was not written to {self.directory}: {reason_of(error)}; {good}")

    def _clear(self, step: str) -> None:
        for left in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            left.rmtree(missing_ok=True)

    def _refuse_other(self, step: int, run: dict[str, Any], kinds: dict[str, str]) -> None:
        lines = []
        for title, saved, now in (("config", run["config"], self.config), ("array", run["arrays"], kinds)):
            for name in sorted(saved.keys() | now.keys()):
                if saved.get(name, _ABSENT) != now.get(name, _ABSENT):
                    lines.append(f"  {title} {name}: {saved.get(name, _ABSENT)} there, {now.get(name, _ABSENT)} here")
        if lines:
            raise ValueError(
                f"the checkpoint {self.directory / str(step)} is of another run; these differ:\n" + "\n".join(lines)
            )


_ABSENT = "absent"


def _meeting() -> Any:
    """orbax's barrier for the end of a save, but for a process whose own part has failed.

    orbax would have it wait, before it tells its error, for the others; and these wait for its part: both for
    `timeout` seconds (CheckpointManager._finalize and _background_wait_for_commit_futures, at different barriers).
    """
    import orbax.checkpoint as ocp

    meet = ocp.multihost.get_barrier_sync_fn()

    def unless_failed(*, key: str, timeout_ms: int) -> None:
        if sys.exc_info()[0] is None:
            meet(key=key, timeout_ms=timeout_ms)

    return unless_failed


def _refuse_separate_directories(directory: Any) -> None:
    """A directory on each machine's own disk would have a part of each checkpoint on each."""
    if jax.process_count() == 1 or "://" in str(directory):
        return
    from jax.experimental import multihost_utils

    token = int(multihost_utils.broadcast_one_to_all(np.random.default_rng().integers(2**31, dtype=np.int32)))
    mark = directory / f".seen-by-all-{token}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("mark written")
    seen = multihost_utils.process_allgather(np.asarray(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not np.all(seen):
        raise ValueError(
            f"{directory} is not one directory for all processes: what process 0 writes there, these do not see: "
            f"{[i for i, yes in enumerate(seen) if not yes]}. Give a directory on a file system that they share."
        )
