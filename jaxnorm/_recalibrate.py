"""Running statistics from a pass over data: those of the population, not a moving average of batches'."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _checks as check
from jaxnorm._models import Collections, LinenDefinition, NnxDefinition, take_apart
from jaxnorm.moments import Moments, merge, moments
from jaxnorm.progress import shown
from jaxnorm.replicas import unreplicate
from jaxnorm.sync import SyncBatchNorm, unshared_statistics
from jaxnorm.train import TrainState

Forward = Callable[[Any, Any], Any]
Path = tuple[Any, ...]
Record = Callable[[Path, Moments], None]


def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    layer_by_layer: bool = False,
    progress: bool = False,
) -> Any:
    """The model with the mean and variance of every BatchNorm layer's input over all `batches`.

    ```python
    model = jaxnorm.recalibrate(model, loader)
    ```

    The moments of all batches are merged (Chan's formula), so batches may be uneven: the result is that of their
    examples taken together, up to what the layers before do. Compare:

    - `torch.optim.swa_utils.update_bn` averages the batches' means and variances as if all were equal in size, and
      leaves out the variance between their means.
    - fvcore's precise BN (`fvcore/nn/precise_bn.py`) weighs by batch size and adds that variance, from sums of squares.

    In one pass a layer sees what the layers before it make of each batch *normalised by its own statistics*, as in the
    two above. `layer_by_layer` sets the layers in the order in which they are called, a pass for each, with all those
    before it at their final statistics: those of exactly the inputs that the layer is given in eval mode.

    **Arguments:**

    - `model`: an `nnx.Module`, Linen's `(module, variables)`, or a `TrainState`; it is not changed. Other layers run as
      they are set: give a model in eval mode for no dropout. Axis names are not used: the whole batch is one.
    - `batches`: of whatever `forward` takes. For `layer_by_layer` something that can be run through again.
    - `forward`: `(model, batch) -> anything`; calls the model. By default on the batch itself, or on the first entry of
      a tuple or list, as in PyTorch. Masks that it hands to BatchNorm layers count.
    - `layer_by_layer`: a pass for each layer instead of one for all, as above.
    - `progress`: show a bar (with tqdm, where it is installed).

    **Returns:** what was given, with `mean` and `var` set (`var` unbiased where the layer tracks it so), and
    `num_batches_tracked`, where there is one, the number of batches.

    **Warns:** `UserWarning` for buffers that a module names by `unshared_statistics()`: they stay as they are.

    **Raises:**

    - `TypeError`: for what is no model, no function or nothing that gives batches, and where the batches can be run
      through only once and `layer_by_layer` needs more.
    - `ValueError`: where there is no batch, or no layer with running statistics.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes) or not getattr(batches, "ndim", 1):
        raise TypeError(f"batches is what gives batches, such as a list or a loader; got {check.shown(batches)}")
    for name, value in (("layer_by_layer", layer_by_layer), ("progress", progress)):
        check.flag(name, value)
    if forward is not None:
        check.function("forward", forward)
    if isinstance(model, TrainState):
        state = unreplicate(model) if model.step.ndim else model
        rebuilt = recalibrate(state.model(), batches, forward=forward, layer_by_layer=layer_by_layer, progress=progress)
        return state.replace(batch_stats=take_apart(rebuilt)[1].batch_stats)
    if layer_by_layer and isinstance(batches, Iterator):
        raise TypeError("layer_by_layer goes through the batches once for each layer: give a list or a loader")

    unshared = unshared_statistics(model) if isinstance(model, nnx.Module) else []
    definition, collections = take_apart(model)
    collect = _collector(definition, forward or _first_entry)
    corrections: dict[Path, float] = {}

    def run(described: str, *, batch_mode: bool) -> tuple[dict[Path, Moments], int]:
        total, count = None, 0
        for batch in shown(batches, described, progress):
            found = collect(collections, batch, batch_mode, corrections)
            total = found if total is None else _merge_all(total, found)
            count += 1
        if total is None:
            raise ValueError("there are no batches to take statistics from")
        if not total:
            own = f"; it moves others by arithmetic of its own: {', '.join(unshared)}" if unshared else ""
            raise ValueError(f"the model called no BatchNorm layer with running statistics{own}")
        return total, count

    if unshared:
        warnings.warn(
            f"left as they are, since the model moves them by arithmetic of its own: {', '.join(unshared)}",
            UserWarning,
            stacklevel=2,
        )
    if not layer_by_layer:
        total, count = run("recalibrate", batch_mode=True)
        done = list(total)
    else:
        done, count = [], 0
        while True:
            described = f"recalibrate, layer {len(done) + 1}"
            total, count = run(described, batch_mode=False)
            order = list(corrections)  # in the order of the calls
            layer = next(path for path in order if path not in done)
            done.append(layer)
            collections = _with_statistics(collections, {layer: total[layer]}, corrections, count)
            if len(done) == len(order):
                return definition.rebuild(collections)
    return definition.rebuild(_with_statistics(collections, total, corrections, count))


def _first_entry(model: Any, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


@jax.jit
def _merge_all(a: dict[Path, Moments], b: dict[Path, Moments]) -> dict[Path, Moments]:
    return {path: merge(a[path], b[path]) for path in a}


def _with_statistics(
    collections: Collections, found: dict[Path, Moments], corrections: dict[Path, float], count: int
) -> Collections:
    stats = jax.tree.map(lambda x: x, collections.batch_stats)  # a copy of the dicts
    for path, of_layer in found.items():
        layer = functools.reduce(lambda tree, key: tree[key], path, stats)
        variance = of_layer.variance(corrections[path])
        layer["mean"], layer["var"] = of_layer.mean.astype(layer["mean"].dtype), variance.astype(layer["var"].dtype)
        if "num_batches_tracked" in layer:
            layer["num_batches_tracked"] = jnp.asarray(count, layer["num_batches_tracked"].dtype)
    return collections._replace(batch_stats=stats)


@functools.lru_cache(maxsize=16)
def _collector(definition: NnxDefinition | LinenDefinition, forward: Forward) -> Callable[..., dict[Path, Moments]]:
    """(collections, batch, batch_mode, corrections) -> the moments of each layer's input; compiled.

    `corrections` is filled with {layer: correction of its running variance}, in the order of the calls. Kept from one
    recalibration to the next, so that a model is compiled once.
    """
    run = _run_nnx if isinstance(definition, NnxDefinition) else _run_linen

    @functools.cache
    def compiled(batch_mode: bool) -> Any:
        order: dict[Path, float] = {}

        def traced(collections: Collections, batch: Any) -> list[Moments]:
            found: dict[Path, Moments] = {}
            heard: dict[Path, float] = {}

            def record(path: Path, of_layer: Moments, correction: float) -> None:
                heard[path] = correction
                found[path] = merge(found[path], of_layer) if path in found else of_layer

            run(definition, collections, forward, batch, batch_mode, record)
            order.clear()  # where that fails, what was heard before still goes with the programs compiled before
            order.update(heard)
            return [found[path] for path in order]

        return jax.jit(traced), order

    def collect(
        collections: Collections, batch: Any, batch_mode: bool, corrections: dict[Path, float]
    ) -> dict[Path, Moments]:
        check.arrays("each of batches", batch)
        function, order = compiled(batch_mode)
        found = function(collections, batch)
        corrections.update(order)
        return dict(zip(order, found, strict=True))

    return collect


def _run_nnx(
    definition: Any, collections: Collections, forward: Forward, batch: Any, batch_mode: bool, record: Any
) -> None:
    model = definition.rebuild(collections)
    for path, layer in list(nnx.iter_graph(model)):
        if not isinstance(layer, nnx.BatchNorm) or isinstance(layer, jaxnorm.nnx.FrozenBatchNorm):
            continue
        layer.axis_name = layer.axis_index_groups = None
        if layer.mean is not None:
            # The model was built for this trace and is thrown away after it: its layers may be told to listen.
            layer.__class__ = _listening(type(layer))
            object.__setattr__(layer, "_heard", functools.partial(record, path))
            object.__setattr__(layer, "_batch_mode", batch_mode)
    forward(model, batch)


@functools.cache
def _listening(kind: type) -> type:
    """The same layer, telling the moments of its input, and normalising with the batch's or the running statistics."""

    def call(
        self: Any, x: Any, use_running_average: Any = None, *, mask: Any = None, axis: Any = None, **limits: Any
    ) -> Any:
        found = moments(x, self.axis if axis is None else axis, mask=mask)
        self._heard(found, float(getattr(self, "correction", 0)))
        axes = {} if axis is None else {"axis": axis}
        return kind.__call__(self, x, use_running_average=not self._batch_mode, mask=mask, **axes, **limits)

    return type(kind.__name__, (kind,), {"__call__": call})


def _run_linen(
    definition: Any, collections: Collections, forward: Forward, batch: Any, batch_mode: bool, record: Any
) -> None:
    def listen(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        frozen = isinstance(layer, jaxnorm.linen.FrozenBatchNorm)
        if frozen or not isinstance(layer, linen.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        x, kwargs = args[0], {**kwargs, "use_running_average": not batch_mode}
        if layer.use_running_average is not None or layer.axis_name is not None:
            # The same layer without these; it comes by here again.
            fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
            fields |= {"use_running_average": None, "axis_name": None, "axis_index_groups": None, "parent": layer.scope}
            del fields["name"]
            return type(layer)(**fields)(x, **kwargs)
        if layer.has_variable("batch_stats", "mean"):
            found = moments(x, layer.axis, mask=kwargs.get("mask"))
            record(layer.path, found, float(getattr(layer, "correction", 0)))
        return call(x, **kwargs)

    module = definition.module
    if isinstance(module, SyncBatchNorm):
        module = module.inner
    with linen.intercept_methods(listen):
        forward(LinenDefinition(module).build(collections, None), batch)
