"""A training step over many devices: one way to run it under pmap, under shard_map, or under jit."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxnorm import _checks as check
from jaxnorm._typing import PyTree
from jaxnorm.evaluation import EvalStep, ParallelEvaluation
from jaxnorm.global_arrays import share
from jaxnorm.memory_layouts import PreferredLayouts
from jaxnorm.replicas import _layer, own_values
from jaxnorm.train import Metrics, TrainState, TrainStep, stepped, steps_of, varying_axes, with_axis


def data_parallel(
    step: TrainStep | EvalStep,
    how: str = "shard_map",
    *,
    axis_name: str = "batch",
    devices: Sequence[jax.Device] | None = None,
    donate: bool = False,
    check_vma: bool = True,
) -> Callable[[TrainState, PyTree], Any]:
    """`train_step`'s step over devices: (state, global batch) -> (state, metrics). The same numbers in all three ways.

    `eval_step`'s likewise: (state, global batch) -> totals of the metrics, for `evaluate`. There the state may be
    replicated or not in all three, and `donate` and `check_vma` have no part.

    ```python
    step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="pmap", axis_name="batch")
    state = jaxnorm.replicate(state)
    state, metrics = step(state, batch)
    ```

    | `how` | state | a replica sees | statistics |
    |---|---|---|---|
    | `"pmap"` | replicated (`replicate`) | its part of the batch, and `axis_name` | of its part, unless synchronised |
    | `"shard_map"` | as it is, or replicated | the same | the same |
    | `"jit"` | as it is | there are no replicas: the whole batch | of the whole batch, always |

    **Arguments:**

    - `step`: what `train_step` or `eval_step` gave.
    - `how`: "pmap", "shard_map" or "jit", see the table.
    - `axis_name`: the replicas' axis; the name the model's BatchNorm layers synchronise over.
    - `devices`: by default all processes'.
    - `donate`: let the step overwrite the state it is given, which is then gone: half the memory. The arrays of the
      model that the state was made from go with it.
    - `check_vma`: shard_map's proof that what the replicas share is equal on all of them. Without it nothing proves
      that, so the state must be replicated, and `unreplicate` does the check.

    **Several processes** (`join_processes`). Each calls the step with its own part of the global batch, all parts equal
    in size: the batch of process p is for the replicas on its devices. A state as it is may be any array that all
    processes have alike; `replicate` makes copies for the replicas of all processes. Loss and metrics are everyone's.
    pmap is then shard_map without `check_vma`, which is what JAX makes of it.

    Where the sum over replicas happens. In all three the loss differentiated is the replica's total divided by a number
    that all replicas share, and its gradient with respect to the replica's own copy of the parameters:

    - pmap, and shard_map without `check_vma`: JAX transposes `psum` to `psum`, so synchronised layers send cotangents
      to all replicas; the parameters' gradients are each replica's part, and `train_step` adds them with one `psum`.
    - shard_map with `check_vma`: JAX would add the gradients of shared parameters itself, and adding them again would
      count each replica N times. `train_step` first makes the parameters the replica's own (`pcast`), and then adds.
    - jit: one loss of one batch; XLA puts in the same sum where the batch is split.

    **Returns:** a function (state, batch) -> (state, metrics), metrics a dict of floating scalars; of an `eval_step`
    (state, batch) -> totals, which `evaluate` takes. The batch is a tree of arrays, examples along the first axes.

    **Raises:** here for its arguments, and the function when it is called:

    - `TypeError`: for arguments of another kind.
    - `ValueError`: for another `how`, an empty list of devices, a batch that the devices do not divide (see
      `pad_batch`), a state that should or should not be replicated, under jit for a model whose layers have an axis
      name (statistics are global there already: convert the model back), and under shard_map with a state as it is, for
      running statistics that differ between replicas.
    """
    check.instance("step", step, TrainStep | EvalStep, "what train_step or eval_step gave")
    check.one_of("how", how, ("pmap", "shard_map", "jit"))
    check.instance("axis_name", axis_name, str, "the name of an axis")
    check.flag("donate", donate)
    check.flag("check_vma", check_vma)
    devices = check.devices(devices)
    if isinstance(step, EvalStep):
        return ParallelEvaluation(step, how, devices, axis_name)
    if how == "pmap" and jax.process_count() > 1:
        # jax.pmap's own arrays are each process's by themselves: neither saved nor compared as one state.
        return _ShardMap(step, axis_name, devices, donate, check_vma=False, how='how="pmap"')
    if how == "pmap":
        return _Pmap(step, axis_name, devices, donate)
    if how == "shard_map":
        return _ShardMap(step, axis_name, devices, donate, check_vma)
    return _Jit(step, axis_name, devices, donate)


def traced(
    step: TrainStep,
    how: str,
    state: TrainState,
    batch: PyTree,
    devices: Sequence[jax.Device],
    axis_name: str = "batch",
) -> jax.stages.Traced:
    """`data_parallel`'s program for arrays of these shapes, not yet lowered, on devices that need not be there.

    `how` is "jit" or "shard_map"; the state is donated.

    Raises:
        ValueError: for a batch that the devices do not divide.
    """
    kinds: dict[str, Any] = {"jit": _Jit, "shard_map": partial(_ShardMap, check_vma=True)}
    check.instance("step", step, TrainStep, "what train_step gave")
    check.one_of("how", how, tuple(kinds))
    check.instance("state", state, TrainState, "a jaxnorm.TrainState")
    check.arrays("batch", batch)
    return kinds[how](step, axis_name, devices, donate=True).trace(state, batch)


class _Parallel:
    """Splits the batch, keeps an average that lives elsewhere out of the compiled step, and updates it after."""

    def __init__(self, step: TrainStep, axis_name: str, devices: Sequence[jax.Device] | None, donate: bool) -> None:
        self.devices = list(devices) if devices is not None else jax.devices()
        self.mesh = Mesh(np.array(self.devices), (axis_name,))
        self.axis_name = axis_name
        self.step = with_axis(step, axis_name)
        self.donate = (0,) if donate else ()

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        check.instance("state", state, TrainState, "a jaxnorm.TrainState")
        check.arrays("batch", batch)
        self.check(state)
        batch = self.split(batch)
        if state.ema is None or state.ema.device is None:
            return self.run(state, batch)
        average = state.ema_state
        where = state.ema.device
        before = _own_steps(state)
        state, metrics = self.run(state.replace(ema_state=None), batch)
        # An average on this process's own device takes this process's own copy of the values.
        values = state if isinstance(where, Sharding) else own_values(state)
        taken = stepped(before, _own_steps(state))
        return state.replace(ema_state=values.replace(ema_state=average).averaging(taken).ema_state), metrics

    def compiled_for(self, function: Any, state: PartitionSpec) -> PreferredLayouts:
        split, shared = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((self.axis_name,), ()))
        return PreferredLayouts(
            function, state=NamedSharding(self.mesh, state), batch=split, more=shared, donate=bool(self.donate)
        )

    def trace(self, state: TrainState, batch: PyTree) -> jax.stages.Traced:
        self.refuse_replicated(state, "a plan")
        if state.ema is not None and state.ema.device is not None:
            state = state.replace(ema_state=None)
        self.check_batch(batch, len(self.devices))
        return self.program().trace(state, batch)

    def program(self) -> PreferredLayouts:
        """The compiled function of a state as it is."""
        raise NotImplementedError

    def check(self, state: TrainState) -> None:
        raise NotImplementedError

    def run(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        raise NotImplementedError

    def split(self, batch: PyTree) -> PyTree:
        sharding = NamedSharding(self.mesh, PartitionSpec(self.axis_name))
        self.check_batch(batch, len(self.mesh.local_devices))
        if jax.process_count() > 1:
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
        return jax.device_put(batch, sharding)

    def check_batch(self, batch: PyTree, replicas: int) -> None:
        of = " of this process" if jax.process_count() > 1 else ""
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            if not np.ndim(x) or np.shape(x)[0] % replicas:
                raise ValueError(
                    f"the batch is split along its first axis over {replicas} replicas{of}; entry "
                    f"{jax.tree_util.keystr(path) or 'of the batch'} has shape {np.shape(x)}. pad_batch fills up a "
                    "last batch and marks its true examples."
                )

    def refuse_replicated(self, state: TrainState, how: str) -> None:
        if state.step.ndim:
            raise ValueError(f"{how} takes the state as it is, without an axis of replicas: unreplicate(state) first")

    def refuse_single(self, state: TrainState, how: str) -> None:
        if state.step.shape != (len(self.devices),):
            raise ValueError(
                f"{how} takes a state with a copy for each of its {len(self.devices)} replicas: replicate(state) "
                f"first (state.step has shape {state.step.shape})"
            )


class _Pmap(_Parallel):
    def __init__(self, step: TrainStep, axis_name: str, devices: Sequence[jax.Device] | None, donate: bool) -> None:
        super().__init__(step, axis_name, devices, donate)
        self.compiled = jax.pmap(
            self.step, axis_name=axis_name, devices=self.devices, donate_argnums=self.donate, out_axes=(0, None)
        )

    def check(self, state: TrainState) -> None:
        self.refuse_single(state, 'how="pmap"')

    def split(self, batch: PyTree) -> PyTree:
        n = len(self.devices)
        self.check_batch(batch, n)
        return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)

    def run(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        return self.compiled(state, batch)


class _ShardMap(_Parallel):
    def __init__(
        self,
        step: TrainStep,
        axis_name: str,
        devices: Sequence[jax.Device] | None,
        donate: bool,
        check_vma: bool,
        how: str = 'how="shard_map"',
    ) -> None:
        super().__init__(step, axis_name, devices, donate)
        self.check_vma = check_vma
        self.how = how
        split, shared = PartitionSpec(axis_name), PartitionSpec()
        self.shared = NamedSharding(self.mesh, shared)

        def of_copies(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
            state, metrics = self.step(jax.tree.map(lambda x: x[0], state), batch)
            return jax.tree.map(lambda x: x[None], state), metrics

        def of_one(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
            state, metrics = self.step(state, batch)
            self.refuse_varying(state)
            return state, metrics

        def compiled(function: Any, spec: PartitionSpec) -> Any:
            mapped = jax.shard_map(
                function, mesh=self.mesh, in_specs=(spec, split), out_specs=(spec, shared), check_vma=check_vma
            )
            return self.compiled_for(mapped, spec)

        self.copies, self.one = compiled(of_copies, split), compiled(of_one, shared)

    def check(self, state: TrainState) -> None:
        if state.step.ndim or not self.check_vma:
            unchecked = not self.check_vma and "shard_map" in self.how
            self.refuse_single(state, self.how + (" with check_vma=False" if unchecked else ""))

    def run(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        if state.step.ndim:
            return self.copies(state, batch)
        return self.one(_everywhere(state, self.shared), batch)

    def program(self) -> PreferredLayouts:
        return self.one

    def refuse_varying(self, state: TrainState) -> None:
        names = {
            _layer(path) for path, x in jax.tree_util.tree_leaves_with_path(state) if self.axis_name in varying_axes(x)
        }
        if names:
            raise ValueError(
                f"after the step the replicas' states would differ, in: {', '.join(sorted(names))}. Synchronise the "
                f'layers (convert_sync_batchnorm(model, axis_name="{self.axis_name}")), or keep a state for each '
                "replica: replicate(state) before the first step."
            )


class _Jit(_Parallel):
    def __init__(self, step: TrainStep, axis_name: str, devices: Sequence[jax.Device] | None, donate: bool) -> None:
        super().__init__(step, axis_name, devices, donate)
        self.step = with_axis(step, None)
        self.shared = NamedSharding(self.mesh, PartitionSpec())
        self.compiled = self.compiled_for(self.step, PartitionSpec())

    def program(self) -> PreferredLayouts:
        return self.compiled

    def check(self, state: TrainState) -> None:
        self.refuse_replicated(state, 'how="jit"')

    def run(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        with _without_axes():
            return self.compiled(_everywhere(state, self.shared), batch)

    def trace(self, state: TrainState, batch: PyTree) -> jax.stages.Traced:
        with _without_axes():
            return super().trace(state, batch)


@contextlib.contextmanager
def _without_axes() -> Iterator[None]:
    """Says of a model whose layers have an axis name that `jit` binds none."""
    try:
        yield
    except NameError as error:
        if "unbound axis name" not in str(error) and "is not bound here" not in str(error):
            raise
        raise ValueError(
            f'the model reduces over an axis of replicas ({error}), and how="jit" has none: it sees the whole '
            "batch, so statistics are global already. Take the axis name off its layers with "
            'jaxnorm.revert_sync_batchnorm(model), or use how="shard_map".'
        ) from error


def _own_steps(state: TrainState) -> list[jax.Array]:
    """`steps_of`, each as a new number on a device of this process: the state may be donated."""
    return [steps.addressable_data(0).reshape(-1)[0] for steps in steps_of(state.opt_state)]


def _everywhere(state: TrainState, sharding: NamedSharding) -> TrainState:
    """The state on every device; after the first step it is there already."""
    if state.step.sharding == sharding:
        return state
    return share(state, sharding)
