"""Evaluation over devices and processes: every example counts once, however the batches divide."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, PyTree
from jaxnorm.global_arrays import own_copy, share
from jaxnorm.means import Mean, batch_size, pad_batch
from jaxnorm.metrics import Confusion
from jaxnorm.progress import shown
from jaxnorm.replicas import unreplicate
from jaxnorm.train import TrainState, _cast, _collections

MetricsFunction = Callable[[Any, Any], Mapping[str, Any]]
Totals = dict[str, Any]  # of one batch, over all devices: Mean, or counts of a Confusion
_EXAMPLES = "examples"


@dataclass(frozen=True)
class EvalStep:
    """What `eval_step` gives: (state, batch) -> totals of the metrics over the batch, pure."""

    metrics_fn: MetricsFunction
    axis_name: str | None
    mask: str
    compute_dtype: Any

    def __call__(self, state: TrainState, batch: PyTree) -> Totals:
        check.instance("state", state, TrainState, "a jaxnorm.TrainState")
        check.arrays("batch", batch)
        size = batch_size(batch)
        collections = _collections(state)
        collections = collections._replace(params=_cast(collections.params, self.compute_dtype))
        model = state.definition.build(collections, None)
        if isinstance(model, nnx.Module):
            model.eval()
        found = self.metrics_fn(model, _cast(batch, self.compute_dtype))
        if not isinstance(found, Mapping):
            raise TypeError(f"metrics_fn gives a mapping of names to metrics; it gave {check.shown(found)}")
        if _EXAMPLES in found:
            raise ValueError(f"the number of examples is reported as {_EXAMPLES!r}; give your metric another name")
        true = self._true(batch, size)
        totals: Totals = {name: _totals(name, value, true) for name, value in found.items()}
        totals[_EXAMPLES] = jnp.sum(true, dtype=jnp.result_type(int))
        return totals if self.axis_name is None else jax.lax.psum(totals, self.axis_name)

    def _true(self, batch: PyTree, size: int) -> Bool[Array, " examples"]:
        given = batch.get(self.mask) if isinstance(batch, Mapping) else None
        return jnp.ones(size, bool) if given is None else jnp.asarray(given, bool).reshape(size)


def eval_step(
    metrics_fn: MetricsFunction, *, axis_name: str | None = None, mask: str = "mask", compute_dtype: Any = None
) -> EvalStep:
    """A pure function (state, batch) -> totals of the metrics: the model in eval mode, every true example once.

    ```python
    def metrics_fn(model, batch):
        logits = model(batch["image"])
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
            "top5": jaxnorm.in_top_k(logits, batch["label"], 5),
            "confusion": jaxnorm.Confusion.of(logits, batch["label"]),
        }

    step = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn))
    results = jaxnorm.evaluate(step, state, loader)             # {"loss": 0.71, "top5": 0.93, ..., "examples": 50000}
    results = jaxnorm.evaluate(step, state.averaged(), loader)  # of the EMA
    ```

    A metric is one value for each example, an array of shape (examples, ...), and not their mean: what is padding is
    left out here. Bools and integers are added up as integers. A metric over other things than examples (pixels, boxes)
    is a `Mean` of scalars, `Mean.of(values, batch["mask"])`: there padding is yours to leave out.

    **Arguments:**

    - `metrics_fn`: `(model, batch) -> {name: metric}`. The model is the `nnx.Module`, in eval mode, or the Linen module
      bound to its variables (call it with your `train=False`); what its calls change is dropped.
    - `axis_name`: the axis to add up over; set by `data_parallel`.
    - `mask`: the entry of the batch that marks true examples, where there is one; see `pad_batch`.
    - `compute_dtype`: as for `train_step`.

    **Returns:** a function (state, batch) -> totals: a dict of a `Mean` or a matrix of counts for each metric, and the
    number of true examples as `examples`. The batch is a tree of arrays, examples along the first axes.

    **Raises:** here for its options, and the function when it is called:

    - `TypeError`: for arguments of another kind, and a `metrics_fn` that gives no mapping.
    - `ValueError`: for metrics that are not one value an example, and for one that is called `examples`.
    """
    check.function("metrics_fn", metrics_fn)
    check.axis_name(axis_name)
    check.instance("mask", mask, str, "the name of an entry")
    check.dtype("compute_dtype", compute_dtype)
    return EvalStep(metrics_fn, axis_name, mask, compute_dtype)


def evaluate(step: Any, state: TrainState, batches: Iterable[Any], *, progress: bool = False) -> dict[str, Any]:
    """The metrics of a state over all batches: exact means over their examples, each counted once.

    Batches are filled up (`pad_batch`) to the size of the largest so far and to what the devices divide, with what is
    padding marked: the last one may be shorter. Totals of a batch are added on the device, those of all batches here,
    in 64 bits. With several processes each gives its own batches, of the same size; one may have fewer than another.

    **Arguments:**

    - `step`: `data_parallel(eval_step(...))`, or an `eval_step` alone, for one device.
    - `state`: a `TrainState`; `state.averaged()` for the model that its `Ema` keeps. Replicated is as good as not where
      the replicas agree; where their running statistics differ, say which count: `unreplicate(state, merge=True)`.
    - `batches`: mappings of names to arrays, examples along the first axes.
    - `progress`: show a bar (with tqdm, where it is installed).

    **Returns:** each metric's mean over all examples, a float, or an array where the metric has more axes; a confusion
    matrix as int64 counts; and `examples`, their number.

    **Raises:**

    - `TypeError`: for what is no step or state, and for batches that are no mappings of names to arrays.
    - `ValueError`: where there is no example, for replicas that differ, by layer, and for labels outside of a confusion
      matrix.
    """
    check.instance("state", state, TrainState, "a jaxnorm.TrainState")
    described = "an iterable of mappings of names to arrays"
    check.instance("batches", None if hasattr(batches, "shape") else batches, Iterable, described)
    check.flag("progress", progress)
    if isinstance(step, EvalStep):
        step = ParallelEvaluation(step, "jit", jax.devices()[:1] if jax.process_count() == 1 else None)
    check.instance("step", step, ParallelEvaluation, "data_parallel(eval_step(...))")
    sums: dict[str, Any] = {}
    waiting: list[Totals] = []
    for batch in step.filled(shown(batches, "evaluating", progress)):
        waiting.append(step(state, batch))
        if len(waiting) > 2:  # the device is two batches ahead
            _add(sums, waiting.pop(0))
    for totals in waiting:
        _add(sums, totals)
    examples = int(sums.pop(_EXAMPLES, 0))
    if not examples:
        raise ValueError("there is no example to evaluate: the batches are empty")
    results: dict[str, Any] = {}
    for name, value in sums.items():
        if isinstance(value, Mean):
            mean = np.asarray(value.total, np.float64) / np.asarray(value.count, np.float64)
            results[name] = float(mean) if mean.ndim == 0 else mean
            continue
        if value.sum() != examples:
            outside = examples - value.sum()
            raise ValueError(f"{name}: {outside} labels are outside of the matrix's {len(value)} classes")
        results[name] = value
    return {**results, _EXAMPLES: examples}


class ParallelEvaluation:
    """An `EvalStep` over devices: (state, global batch) -> totals, on every process. See `data_parallel`.

    Its statistics are the running ones, so there is nothing to synchronise but the totals: one program sees the whole
    batch (`jit`), or each replica its part, and the axis name that layers without running statistics need.
    """

    def __init__(
        self, step: EvalStep, how: str, devices: Sequence[jax.Device] | None, axis_name: str = "batch"
    ) -> None:
        self.mask = step.mask
        self.devices = list(devices) if devices is not None else jax.devices()
        mesh = Mesh(np.array(self.devices), (axis_name,))
        self.shared, self.split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (axis_name,)))
        self.local = len(mesh.local_devices)
        function: Any = step
        if how != "jit":
            parallel = EvalStep(step.metrics_fn, axis_name, step.mask, step.compute_dtype)
            specs = PartitionSpec(), PartitionSpec(axis_name)
            function = jax.shard_map(parallel, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        self.compiled = jax.jit(function, out_shardings=self.shared)
        self._last: tuple[TrainState, TrainState] | None = None

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> Totals:
        check.instance("state", state, TrainState, "a jaxnorm.TrainState")
        check.arrays("batch", batch)
        if self._last is None or self._last[0] is not state:
            self._last = state, self._placed(state)
        if (size := batch_size(batch)) % self.local:
            raise ValueError(
                f"a batch of {size} examples is split over {self.local} replicas: jaxnorm.evaluate fills batches up, "
                "or pad_batch"
            )
        if jax.process_count() > 1:
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.split, np.asarray(x)), batch)
        else:
            batch = jax.device_put(batch, self.split)
        return self.compiled(self._last[1], batch)

    def _placed(self, state: TrainState) -> TrainState:
        """The arrays that evaluation reads, on every device; what only training needs is left behind."""
        if state.step.ndim:
            try:
                state = unreplicate(state)
            except ValueError as error:
                error.add_note("to evaluate, say which of the replicas' statistics count")
                raise
        state = state.replace(opt_state=(), ema=None, ema_state=None, loss_scale=None)
        return share(state, self.shared)

    def filled(self, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The batches, marked, and filled up to one size; as many as the process with most has."""
        size, last = 0, None
        for batch in _in_step(batches):
            if batch is not None:
                check.instance("each of batches", batch, Mapping, "a mapping of names to arrays")
                last = batch
            if not size and _largest(int(last is None)):  # in all processes, so that none waits for another
                raise ValueError("each process gives at least one batch, and one has none")
            assert last is not None
            wanted = -(-batch_size(last) // self.local) * self.local
            size = max(size, _largest(wanted))
            marked = self._marked(last, size)
            yield marked if batch is not None else {**marked, self.mask: np.zeros(size, bool)}

    def _marked(self, batch: Mapping[str, Any], size: int) -> dict[str, Any]:
        if self.mask not in batch:
            return pad_batch(batch, size, self.mask)
        rest = {name: x for name, x in batch.items() if name != self.mask}
        padded = pad_batch(rest, size, self.mask)
        given = np.asarray(batch[self.mask], bool).reshape(-1)
        return {**padded, self.mask: padded[self.mask] & np.resize(given, size)}


def _in_step(batches: Iterable[Any]) -> Iterator[Mapping[str, Any] | None]:
    """The batches; with several processes, None for as long as another one has more."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not _largest(int(batch is not None)):
            return
        yield batch


def _largest(value: int) -> int:
    """Over the processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.asarray(value))))


def _totals(name: str, value: Any, true: Bool[Array, " examples"]) -> Any:
    if isinstance(value, Confusion):
        return value.counts(true)
    if isinstance(value, Mean):
        return Mean.taken(name, value, true.size)
    value = check.array(f"the metric {name!r}", value)
    if not value.ndim or value.shape[0] != true.size:
        raise ValueError(
            f"the metric {name!r} is one value an example, shape ({true.size}, ...), not their mean, or a "
            f"jaxnorm.Mean; got shape {value.shape}"
        )
    counted = true.reshape(-1, *[1] * (value.ndim - 1))
    whole = value.dtype == bool or jnp.issubdtype(value.dtype, jnp.integer)
    dtype = jnp.result_type(int) if whole else jnp.promote_types(value.dtype, jnp.float32)
    # Not value * mask: what stands in padded entries may be inf or nan.
    return Mean(jnp.sum(jnp.where(counted, value, 0), 0, dtype=dtype), jnp.sum(true, dtype=jnp.result_type(int)))


def _add(sums: dict[str, Any], totals: Totals) -> None:
    """Adds one batch's totals in 64 bits."""

    def wide(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

    for name, value in jax.tree.map(wide, own_copy(totals), is_leaf=lambda x: isinstance(x, jax.Array)).items():
        if name not in sums:
            sums[name] = value
        else:
            sums[name] = jax.tree.map(np.add, sums[name], value)
