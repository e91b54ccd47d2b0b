"""A model out of a run: without its optimizer, while the run goes on, nothing in its directory changed."""

import os
import re
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import _checks as check
from jaxnorm._models import take_apart
from jaxnorm.global_arrays import is_key, named_leaves
from jaxnorm.saved_arrays import kinds_of, placed, reason_of, step_of

COLLECTIONS = ("params", "batch_stats", "variables")
AVERAGE = "ema_state/average/"
"""What the names of the average's arrays begin with, in a checkpoint of a `TrainState`."""


class RestoredModel(NamedTuple):
    """What `restore_model` gives.

    **Attributes:**

    - `step`: the checkpoint's step.
    - `model`: the model with the run's arrays, of the kind that was given: an `nnx.Module`, or Linen's
      `(module, variables)`.
    - `data`: where the reading of the data stood, as given to `Checkpoints.save`.
    """

    step: int
    model: Any  # of the kind that was given
    data: dict[str, Any]  # where the reading of the data stood


def restore_model(
    directory: str | os.PathLike[str], model: Any, *, step: Any = None, average: bool = False
) -> RestoredModel:
    """A model with the arrays that a run of `Checkpoints` saved, without its optimizer; orbax reads them (extra `pod`).

    ```python
    step, trained, _ = jaxnorm.restore_model("runs/a", model)
    _, averaged, _ = jaxnorm.restore_model("runs/a", model, average=True)
    ```

    Of the checkpoint's `TrainState` only the model's arrays are read, whatever the optimizer was, and nothing in the
    directory is changed: the run may go on. Every process reads all arrays. What was frozen in the run and is not in
    the model, or the other way round, is found by its path.

    **Arguments:**

    - `directory`: what `Checkpoints` was given.
    - `model`: an `nnx.Module`, imported or by hand, or Linen's `(module, variables)`, of the same layers. It is not
      changed. Random streams are its own.
    - `step`: of which checkpoint; the last one by default.
    - `average`: the model that the run's `Ema` kept, as `TrainState.ema_model` gives it.

    **Returns:** the `RestoredModel`: `step`, `model`, `data`.

    **Raises:**

    - `FileNotFoundError`: if there is no such checkpoint.
    - `TypeError`: for what is no path or no model.
    - `ValueError`: naming every array that differs, if it is of another model; for a step that is none, and where there
      is no average, or no `TrainState`.
    - `OSError`: if its files cannot be read.
    """
    check.flag("average", average)
    definition, collections = take_apart(model)
    wanted = named_leaves({name: getattr(collections, name) for name in COLLECTIONS})
    with SavedRun(directory, step) as run:
        places = _matched(run, wanted, AVERAGE if average else "")
        read = run.read(places[name] for name, x in wanted.items() if np.size(x))
        data = run.data
    leaves = [_placed(read.get(places[name]), x, run.kinds[places[name]]) for name, x in wanted.items()]
    structure = jax.tree.structure({name: getattr(collections, name) for name in COLLECTIONS})
    arrays = jax.tree.unflatten(structure, leaves)
    return RestoredModel(run.step, definition.rebuild(collections._replace(**arrays)), data)


class SavedRun:
    """One checkpoint of a run, to be read only.

    Attributes:
        step: which one it is.
        kinds: `float32[64, 3, 7, 7]` of each array, by its name in the state.
        data: where the reading of the data stood.
    """

    def __init__(self, directory: str | os.PathLike[str], step: Any = None) -> None:
        import orbax.checkpoint as ocp
        from etils import epath  # type: ignore[import-untyped]

        check.instance("directory", directory, str | os.PathLike, "a path")
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        if not path or not self.directory.is_dir():
            raise FileNotFoundError(f"no run in {path!r}: it is no directory")
        # no CheckpointManager: nothing is made, moved or cleared away, since the run may be writing
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        steps = sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))
        self.step = (steps[-1] if steps else 0) if step is None else step_of(step)
        if self.step not in steps:
            self.close()
            there = f"it has those of steps {steps}" if steps else "it has none"
            which = "" if step is None else f" of step {self.step}"
            raise FileNotFoundError(f"no checkpoint{which} in {self.directory}: {there}")
        run = self._restore(run=ocp.args.JsonRestore()).run
        self.kinds: dict[str, str] = run["arrays"]
        self.data: dict[str, Any] = run["data"]

    @property
    def has_average(self) -> bool:
        """Whether the state had an `Ema`."""
        return any(name.startswith(AVERAGE) for name in self.kinds)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Arrays by their names in the state; those without values are in no checkpoint."""
        import orbax.checkpoint as ocp

        taken = list(names)
        if not taken:
            return {}
        items = ocp.args.PyTreeRestore(
            item=dict.fromkeys(taken, 0),
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in taken},
            partial_restore=True,
        )
        return dict(self._restore(state=items).state)

    def close(self) -> None:
        """Ends the reading."""
        self._reader.close()

    def __enter__(self) -> "SavedRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _restore(self, **items: Any) -> Any:
        import orbax.checkpoint as ocp

        try:
            return self._reader.restore(self.directory / str(self.step), args=ocp.args.Composite(**items))
        except Exception as error:
            self.close()
            raise OSError(
                f"the checkpoint {self.directory / str(self.step)} cannot be read: {reason_of(error)}. Was it copied "
                "or deleted in part?"
            ) from error


def _matched(run: SavedRun, wanted: dict[str, Any], head: str) -> dict[str, str]:
    """The name in the checkpoint for each of the model's arrays."""
    where = f"the checkpoint {run.directory / str(run.step)}"
    if not any(name.startswith("params/") for name in run.kinds):
        raise ValueError(f"{where} is of no jaxnorm.TrainState: its arrays are {', '.join(list(run.kinds)[:4])}, ...")
    if head and not run.has_average:
        raise ValueError(f"{where} has no average: its TrainState was made without ema=")
    there = [name for name in run.kinds if name.removeprefix(head).startswith(tuple(f"{c}/" for c in COLLECTIONS))]
    there = [name for name in there if name.startswith(head)]
    here = kinds_of(wanted)
    found, lines = {}, []
    for name, kind in here.items():
        collection, _, path = name.partition("/")
        places = [f"{head}{c}/{path}" for c in (collection, *COLLECTIONS)]  # a frozen parameter is a variable
        found[name] = next((place for place in places if place in run.kinds), "")
        saved = run.kinds.get(found[name], "absent")
        if saved != kind and not (head and _both_floating(saved, kind)):  # an Ema may have a dtype of its own
            lines.append(f"  {path}: {saved} there, {kind} here")
    lines += [f"  {name}: {run.kinds[name]} there, absent here" for name in sorted({*there} - {*found.values()})]
    if lines:
        there_and_here = [(_parts(run.kinds.get(place, "")), _parts(here[name])) for name, place in found.items()]
        replicated = all(dtype == own and shape[1:] == size for (dtype, shape), (own, size) in there_and_here)
        hint = "\nIt has an axis of replicas: take it up with Checkpoints.restore, then jaxnorm.unreplicate"
        raise ValueError(f"{where} is of another model; these differ:\n" + "\n".join(lines) + hint * replicated)
    return found


def _both_floating(saved: str, kind: str) -> bool:
    (dtype, shape), (own, size) = _parts(saved), _parts(kind)
    return shape == size and "float" in dtype and "float" in own


def _parts(kind: str) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of `float32[64, 3]`."""
    dtype, _, shape = kind.partition("[")
    return dtype, tuple(map(int, re.findall(r"\d+", shape)))


def _placed(found: Any, x: Any, kind: str) -> Any:
    """What was read on the device of `x`, an average in its own dtype; what has no values is in no checkpoint."""
    if is_key(x):
        return placed(found, x)
    return jax.device_put(np.zeros(x.shape, jnp.dtype(_parts(kind)[0])) if found is None else found, x.sharding)
