"""One training step, and one way to run it on many devices: under pmap, under shard_map, or under jit."""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxnorm import _checks as check
from jaxnorm._models import Collections, Definition, take_apart
from jaxnorm._typing import Array, Float, PRNGKeyArray, PyTree
from jaxnorm.ema import Ema, EmaState, refuse_other
from jaxnorm.global_arrays import place_like
from jaxnorm.loss_scale import LossScale
from jaxnorm.means import Mean, batch_size
from jaxnorm.nnx_frozen import FrozenBatchNorm
from jaxnorm.replicas import unreplicate

logger = logging.getLogger("jaxnorm")
AxisName = str | tuple[str, ...]
Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes, as one tree, with what it needs to know and does not change.

    ```python
    state = jaxnorm.TrainState.create(model, optax.adamw(1e-3), ema=jaxnorm.Ema(0.999), rng=jax.random.key(0))
    state.model(), state.ema_model()
    ```

    As with any JAX tree the leaves may also be shapes, shardings, or arrays with an axis of replicas in front.

    **Attributes:**

    - `params`: the parameters, as nested dicts: `nnx.Param`, Linen's "params".
    - `batch_stats`: running statistics: `nnx.BatchStat`, Linen's "batch_stats".
    - `variables`: all other variables of the model: buffers, frozen parameters.
    - `streams`: the random streams of an NNX model.
    - `opt_state`: the optimizer's state.
    - `ema_state`: the `EmaState`, or None.
    - `loss_scale`: the `LossScale`, or None.
    - `step`: the steps taken, skipped ones included: an int32 scalar.
    - `rng`: the key that the randomness of the steps is drawn from, or None.
    - `definition`: what stays of the model without its arrays; static, as are the next two.
    - `tx`: the optimizer.
    - `ema`: the `Ema`, or None.
    """

    params: PyTree
    batch_stats: PyTree
    variables: PyTree  # all other variables of the model: buffers, frozen parameters
    streams: PyTree  # random streams of an NNX model
    opt_state: PyTree
    ema_state: EmaState | None
    loss_scale: LossScale | None
    step: Any  # int32 scalar: steps taken, skipped ones included
    rng: Any  # key, or None
    definition: Definition = field(metadata={"static": True})
    tx: Optimizer = field(metadata={"static": True})
    ema: Ema | None = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        model: Any,
        tx: Optimizer,
        *,
        ema: Ema | None = None,
        rng: PRNGKeyArray | None = None,
        loss_scale: LossScale | None = None,
        opt_state: PyTree | None = None,
    ) -> "TrainState":
        """The state before the first step.

        **Arguments:**

        - `model`: an `nnx.Module`, one traced from PyTorch included; or Linen's `(module, variables)`. The state takes
          its arrays as they are; the module is not changed by training.
        - `tx`: any optax optimizer; of an NNX model it is given the `nnx.Param`s, as nested dicts.
        - `ema`: average parameters and running statistics.
        - `rng`: what all randomness of the steps is drawn from. Without one, an NNX model's own first stream is.
        - `loss_scale`: for float16, `LossScale.dynamic()`.
        - `opt_state`: the optimizer's state, where it is not a new one.

        **Returns:** the `TrainState`, its step 0.

        **Raises:**

        - `TypeError`: for arguments that are not these; of a torch optimizer it says what makes one of it.
        - `ValueError`: for Linen's variables without "params", and for an `ema` that cannot hold the model's dtypes.
        """
        if check.torch_object(tx):
            raise TypeError(
                "tx is an optax optimizer, and this is torch's: interop.optax_from_torch(optimizer) makes one"
            )
        for name in ("init", "update"):
            check.function(f"tx.{name} (tx is an optax optimizer)", getattr(tx, name, None))
        if ema is not None:
            check.instance("ema", ema, Ema, "a jaxnorm.Ema")
        if loss_scale is not None:
            check.instance("loss_scale", loss_scale, LossScale, "a jaxnorm.LossScale")
        if rng is not None:
            check.key("rng", rng)
        definition, collections = take_apart(model)
        if rng is None:
            keys = [x for x in jax.tree.leaves(collections.streams) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
            rng = keys[0].reshape(-1)[0] if keys else None
        state = cls(
            params=collections.params,
            batch_stats=collections.batch_stats,
            variables=collections.variables,
            streams=collections.streams,
            opt_state=tx.init(collections.params) if opt_state is None else opt_state,
            ema_state=None,
            loss_scale=loss_scale,
            step=jnp.zeros((), jnp.int32),
            rng=rng,
            definition=definition,
            tx=tx,
            ema=ema,
        )
        return state if ema is None else state.replace(ema_state=ema.init(_averaged(state)))

    def __repr__(self) -> str:
        """How much of what there is; no values but the step."""

        def count(tree: PyTree) -> str:
            leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
            return f"{len(leaves)} arrays of {sum(math.prod(x.shape) for x in leaves):,}"

        step = self.step
        known = hasattr(step, "shape") and not isinstance(step, jax.core.Tracer | jax.ShapeDtypeStruct)
        at = np.asarray(step).reshape(-1)[0] if known and getattr(step, "is_fully_addressable", True) else step
        parts = [f"step={at}", f"params={count(self.params)}", f"batch_stats={count(self.batch_stats)}"]
        parts += [f"variables={count(self.variables)}"] if jax.tree.leaves(self.variables) else []
        parts.append(f"opt_state={count(self.opt_state)}")
        parts += [f"ema={self.ema}, ema_state={count(self.ema_state)}"] if self.ema is not None else []
        parts += [f"loss_scale={self.loss_scale}"] if self.loss_scale is not None else []
        copies = f" in {step.shape[0]} copies" if getattr(step, "ndim", 0) else ""
        return f"TrainState({', '.join(parts)}){copies}"

    def replace(self, **changes: Any) -> "TrainState":
        """The state with some fields changed.

        **Arguments:**

        - `**changes`: the fields' new values, by their names.

        **Returns:** the new state.

        **Raises:** `TypeError` for a field that there is not.
        """
        return replace(self, **changes)

    def model(self) -> Any:
        """The model with this state's arrays, also of a replicated state.

        **Returns:** an `nnx.Module`, or Linen's `(module, variables)`.

        **Raises:** `ValueError` for replicas that differ, naming the layers.
        """
        return self.definition.rebuild(_collections(_single(self)))

    def ema_model(self) -> Any:
        """The model with the averaged arrays, beside the parameters wherever the average is kept.

        **Returns:** an `nnx.Module`, or Linen's `(module, variables)`.

        **Raises:** `ValueError` for a state without an EMA, and for replicas that differ.
        """
        state = _single(self)
        if self.ema is None or state.ema_state is None:
            raise ValueError("this TrainState has no EMA: create it with ema=jaxnorm.Ema(decay)")
        average = self.ema.value(state.ema_state)
        if self.ema.device is not None:
            average = place_like(average, _averaged(state))
        return self.definition.rebuild(_collections(state)._replace(**average))

    def averaged(self) -> "TrainState":
        """This state with the averaged arrays in the place of its own, and without an average: to evaluate.

        **Returns:** the new state, without an axis of replicas.

        **Raises:** `ValueError` for a state without an EMA, and for replicas that differ.
        """
        _, collections = take_apart(self.ema_model())
        arrays = collections._asdict()
        return _single(self).replace(**arrays, ema=None, ema_state=None)

    def with_ema_model(self, model: Any, *, updates: int | None = None) -> "TrainState":
        """The state with the arrays of a model as its average: one trained elsewhere, timm's `state_dict_ema`.

        **Arguments:**

        - `model`: the averaged model, of the same layers as the state's.
        - `updates`: the number of updates that the average has taken: AveragedModel's `n_averaged`, Ultralytics'
          `updates`. By default what this state's average has counted or, if that is nothing, its number of steps.

        **Returns:** the new state.

        **Raises:**

        - `TypeError`: for what is no model.
        - `ValueError`: where neither the argument nor the state says the number of updates and the next one's weight
          depends on it (equal weights, a warm-up, a schedule, `update_after_step`); for another model than the state's,
          a state without an EMA, one with an axis of replicas, and `updates` that is no whole number.
        """
        if self.ema is None or self.ema_state is None:
            raise ValueError("this TrainState has no EMA: create it with ema=jaxnorm.Ema(decay)")
        _, collections = take_apart(model)
        average = {name: getattr(collections, name) for name in ("params", "batch_stats", "variables")}
        if self.step.ndim:
            raise ValueError("with_ema_model takes the state as it is, without an axis of replicas: unreplicate(state)")
        refuse_other(average, _averaged(self))
        count = self.ema_state.count
        if updates is None:
            updates = int(count) or int(self.step)
            if not updates and self.ema.goes_by_count:
                raise ValueError("how many updates has this average taken? Its next one depends on it: give updates=")
            updates = max(updates, 1)  # not replaced by a copy, as at the first
        updates = check.whole("updates", updates)
        return self.replace(ema_state=self.ema.init(average)._replace(count=jnp.full_like(count, updates)))

    def apply_gradients(self, grads: PyTree) -> "TrainState":
        """One step of the optimizer. For loops of one's own.

        **Arguments:**

        - `grads`: the gradients, a tree like `params`.

        **Returns:** the state with new parameters and optimizer state, its step one more.

        **Raises:**

        - `TypeError`: for what is no tree of arrays.
        - `ValueError`: for a tree of another structure or other shapes than the parameters', naming what differs.
        """
        check.arrays("grads", grads)
        wanted, got = (_shapes(tree) for tree in (self.params, grads))
        wrong = sorted(path for path in wanted.keys() | got.keys() if wanted.get(path) != got.get(path))
        if wrong:
            raise ValueError(f"grads is a tree like the parameters; these differ: {', '.join(wrong)}")
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        return self.replace(params=optax.apply_updates(self.params, updates), opt_state=opt_state, step=self.step + 1)

    def update_ema(self) -> "TrainState":
        """Takes the present arrays into the average, which counts its own updates. For loops of one's own.

        Under `optax.MultiSteps` a microbatch that did not step the optimizer leaves the average as it is.

        **Returns:** the new state; this one, if it has no EMA.

        **Raises:** `ValueError` as `Ema.update`.
        """
        complete = [(s.mini_step == 0) & (s.gradient_step > 0) for s in _multi_steps(self.opt_state)]
        return self.averaging(functools.reduce(jnp.logical_or, complete).reshape(-1)[0] if complete else None)

    def averaging(self, taken: Any) -> "TrainState":
        """`update_ema` where `taken` holds.

        **Arguments:**

        - `taken`: a boolean scalar, which may be traced; None says that it holds.

        **Returns:** the new state; this one, if it has no EMA.

        **Raises:** `ValueError` as `Ema.update`.
        """
        if self.ema is None or self.ema_state is None:
            return self
        values = _averaged(self)
        if self.ema.device is not None and self.step.ndim:  # one average, of the first replica's arrays
            values = _first(values)
        count = optax.safe_increment(self.ema_state.count)
        return self.replace(ema_state=self.ema.update(values, self.ema_state, count, taken=taken))


LossFunction = Callable[[Any, Any], tuple[Float[Array, ""] | Mean, Mapping[str, Float[Array, ""] | Mean]]]
Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class TrainStep:
    """What `train_step` gives: (state, batch) -> (state, metrics), pure, for any transformation of JAX."""

    loss_fn: LossFunction
    axis_name: AxisName | None
    accumulate: int
    statistics: Literal["microbatch", "batch"]
    compute_dtype: Any
    clip_norm: float | None

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        check.instance("state", state, TrainState, "a jaxnorm.TrainState")
        check.arrays("batch", batch)
        size = batch_size(batch)
        if self.clip_norm is not None:
            _refuse_clipping_microbatches(state.opt_state)
        collections = _collections(state)._replace(params=_vary(state.params, self.axis_name))
        key = _step_key(state, self.axis_name)
        _warn_of_eval_mode(state.definition.rebuild(_collections(state)))
        scale = None if state.loss_scale is None else state.loss_scale.scale
        grads, sums, after = self._gradients(state.definition, collections, batch, key, size, scale)

        # Gradients, loss and metrics are totals over this replica; one reduction adds them over all.
        if self.axis_name is not None:
            grads, sums = jax.lax.psum(grads, self.axis_name), _psum_scalars(sums, self.axis_name)
        loss = sums["loss"]
        grads = jax.tree.map(lambda g: g * (size / loss.count).astype(g.dtype), grads)
        metrics = {name: mean.total / mean.count for name, mean in sums.items()}
        finite = None
        if scale is not None:
            grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
            metrics |= {"loss_scale": scale, "skipped": 1 - finite.astype(jnp.float32)}
        if self.clip_norm is not None:
            grads, metrics["grad_norm"] = _clip(grads, self.clip_norm)

        new = state.apply_gradients(grads)
        new = new.replace(batch_stats=after.batch_stats, variables=after.variables)
        if finite is not None and state.loss_scale is not None:
            new = _where(finite, new, state.replace(step=new.step))
            new = new.replace(loss_scale=state.loss_scale.update(finite))
        if state.ema is not None and state.ema.device is None:
            new = new.averaging(stepped(steps_of(state.opt_state), steps_of(new.opt_state)))
        return new, metrics

    def _gradients(
        self,
        definition: Definition,
        collections: Collections,
        batch: PyTree,
        key: PRNGKeyArray | None,
        size: int,
        scale: Array | None,
    ) -> tuple[PyTree, dict[str, Mean], Collections]:
        """Sums over the microbatches of d(total of the loss)/d(params) / size, of loss and metrics."""

        def differentiated(params: PyTree, before: Collections, part: PyTree, key: Any) -> Any:
            cast = self.compute_dtype
            used = before._replace(params=_cast(params, cast))
            model = definition.build(used, key)
            loss, metrics = _taken_apart(self.loss_fn(model, _cast(part, cast)))
            _refuse_whole_numbers(loss)
            sums = {name: Mean.taken(name, value, size) for name, value in {**metrics, "loss": loss}.items()}
            if "loss" in metrics:
                raise ValueError('the loss is reported as the metric "loss"; give yours another name')
            after = definition.collect(model)
            _refuse_new_structure(before, after)
            objective = sums["loss"].total / size
            return objective if scale is None else objective * scale, (sums, after)

        grad = jax.grad(differentiated, has_aux=True)
        if self.accumulate == 1 or self.statistics == "batch":
            grads, (sums, after) = grad(collections.params, collections, batch, key)
            return grads, sums, after

        k = self.accumulate
        if size % k:
            raise ValueError(f"accumulate={k} does not divide the {size} examples of a replica's batch; see pad_batch")
        # Microbatch i is examples i, i + k, i + 2k, ...: split so, a batch sharded over devices stays where it is,
        # and a microbatch is the same examples under pmap, shard_map and jit.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size // k, k, *x.shape[1:]), 0, 1), batch)

        def body(carry: Any, xs: Any) -> Any:
            i, part = xs
            grads, before = carry
            more, (sums, after) = grad(
                collections.params, before, part, None if key is None else jax.random.fold_in(key, i)
            )
            carried = before._replace(batch_stats=after.batch_stats, variables=after.variables)
            return (optax.tree.add(grads, more), carried), sums

        def scan(before: Collections) -> Any:
            carry = (optax.tree.zeros_like(collections.params), before)
            return jax.lax.scan(body, carry, (jnp.arange(k), parts))

        try:
            (grads, after), sums = scan(collections)
        except TypeError:
            # With check_vma, what a scan carries cannot become the replicas' own: statistics that are not synchronised
            # do. As without microbatches they are carried so, and `data_parallel` names their layers.
            own = None
            if self.axis_name is not None:
                own = self._own(grad, collections, jax.tree.map(lambda x: x[0], parts), key)
            if own is None:
                raise
            (grads, after), sums = scan(own)
        return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), after

    def _own(self, grad: Any, before: Collections, part: PyTree, key: PRNGKeyArray | None) -> Collections | None:
        """`before`, each replica's own where a microbatch makes it so; None where it makes nothing so."""
        _, (_, after) = grad(before.params, before, part, key)
        found = False

        def vary(old: Array, new: Array) -> Array:
            nonlocal found
            if varying_axes(new) <= varying_axes(old):
                return old
            found = True
            own: Array = _vary(old, self.axis_name)
            return own

        changed = {
            name: jax.tree.map(vary, getattr(before, name), getattr(after, name))
            for name in ("batch_stats", "variables")
        }
        return before._replace(**changed) if found else None


def train_step(
    loss_fn: LossFunction,
    *,
    axis_name: AxisName | None = None,
    accumulate: int = 1,
    statistics: Literal["microbatch", "batch"] = "microbatch",
    compute_dtype: Any = None,
    clip_norm: float | None = None,
) -> TrainStep:
    """A pure function (state, batch) -> (state, metrics): gradients, optimizer, running statistics, EMA.

    ```python
    def loss_fn(model, batch):
        logits = model(batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss.mean(), {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    step = jaxnorm.data_parallel(jaxnorm.train_step(loss_fn), how="pmap", axis_name="batch")
    state, metrics = step(state, batch)
    ```

    Loss, gradients and metrics are means over the *global* batch. Where `loss_fn` gives scalars they are means over
    the batch that it was given, and all those batches are equal in size; where it gives `Mean`s, the totals and the
    counts are added up over microbatches and replicas, so that padding and unequal counts are exact.

    Randomness is a function of the state's `rng`, the step, the replica (not under jit, where there is none) and the
    microbatch. It is drawn anew from these at each step, so a state taken up again goes on as it would have.

    **Arguments:**

    - `loss_fn`: `(model, batch) -> (loss, metrics)`. The model is the `nnx.Module`, or the Linen module bound to its
      variables; both are called as `model(x, ...)`, and what their calls change is kept.
    - `axis_name`: the axis to reduce over; set by `data_parallel`.
    - `accumulate`: number of microbatches that a replica's batch is split into. One after the other, so the
      activations of one are in memory at a time.
    - `statistics`: with `accumulate`, `"microbatch"`: each microbatch is normalised by its own statistics and moves the
      running ones, as in PyTorch. `"batch"`: by those of the whole batch. Each layer then needs all microbatches
      at once, so they go through together: the numbers are those of `accumulate=1`, and so is the memory, but for
      blocks that are computed again (`model.checkpoint` of an imported model, `nnx.remat`).
    - `compute_dtype`: parameters and floating entries of the batch are cast to it for `loss_fn` (bfloat16, float16);
      the parameters kept, their gradients and the running statistics stay in their own dtypes.
    - `clip_norm`: largest global norm of the gradients, by the rule of `torch.nn.utils.clip_grad_norm_`; applied after
      the reduction and the unscaling. Adds the metric `grad_norm`, the norm before. Under `optax.MultiSteps` it is an
      error, since each microbatch's gradients would be clipped.

    With a `LossScale` in the state, the loss is scaled for the gradients and these are unscaled; a step with a
    gradient that is not finite changes nothing but the scale and the step count (`torch.amp.GradScaler` would keep
    the running statistics, too, of a forward pass that may have overflowed). Metrics `loss_scale`, `skipped`.

    **Returns:** a function (state, batch) -> (state, metrics). The batch is a tree of arrays, examples along the first
    axes; metrics are a dict of floating scalars, `loss` among them.

    **Raises:** here for its options, and the function when it is called:

    - `TypeError`: for arguments of another kind, and for what `loss_fn` gives that is no pair of a loss and metrics.
    - `ValueError`: for options out of range, where the batch cannot be split, for a loss that is no floating scalar, a
      metric that is called `loss`, `clip_norm` under `optax.MultiSteps`, and where the forward pass adds variables or
      changes their shapes.
    """
    check.function("loss_fn", loss_fn)
    check.axis_name(axis_name)
    check.whole("accumulate", accumulate, least=1)
    check.one_of("statistics", statistics, ("microbatch", "batch"))
    check.dtype("compute_dtype", compute_dtype)
    if clip_norm is not None:
        check.number("clip_norm", clip_norm, above=0)
    return TrainStep(loss_fn, axis_name, accumulate, statistics, compute_dtype, clip_norm)


def _taken_apart(result: Any) -> tuple[Any, Mapping[str, Any]]:
    """What a loss function gave."""
    if isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, metrics = result
        for name, value in {"loss": loss, **metrics}.items():
            if not isinstance(value, Mean):
                check.array(f"what loss_fn gives as {name!r} (or a Mean)", value)
        return loss, metrics
    raise TypeError(f"loss_fn gives a pair, the loss and a mapping of metrics; it gave {check.shown(result)}")


def _refuse_whole_numbers(loss: Any) -> None:
    total = loss.total if isinstance(loss, Mean) else jnp.asarray(loss)
    if not jnp.issubdtype(total.dtype, jnp.floating):
        raise ValueError(f"the loss is {total.dtype}, which has no gradient: a loss is a floating number")


def _warn_of_eval_mode(model: Any) -> None:
    """Training in which no BatchNorm layer sees its batch is a mistake, but for a model that is frozen on purpose."""
    if not isinstance(model, nnx.Module):
        return
    layers = [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, nnx.BatchNorm)]
    norms = [layer for layer in layers if not isinstance(layer, FrozenBatchNorm)]
    if norms and all(layer.use_running_average for layer in norms):
        logger.warning(
            "all %d BatchNorm layers are in eval mode in this training step: model.train() before TrainState.create, "
            "unless they are frozen on purpose",
            len(norms),
        )


def _refuse_clipping_microbatches(opt_state: PyTree) -> None:
    if _multi_steps(opt_state):
        raise ValueError(
            "clip_norm clips the gradients of each call: under optax.MultiSteps each microbatch's, not the update's. "
            "Clip what it adds up, optax.MultiSteps(optax.chain(optax.clip_by_global_norm(clip_norm), tx), k); or let "
            "one call take all microbatches, train_step(accumulate=k, clip_norm=...)"
        )


def _shapes(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def with_axis(step: TrainStep, axis_name: AxisName | None) -> TrainStep:
    """The same step, reduced over another axis."""
    return replace(step, axis_name=axis_name)


def _collections(state: TrainState) -> Collections:
    return Collections(state.params, state.batch_stats, state.variables, state.streams)


def _averaged(state: TrainState) -> dict[str, PyTree]:
    return {"params": state.params, "batch_stats": state.batch_stats, "variables": state.variables}


def _multi_steps(opt_state: PyTree) -> list[optax.MultiStepsState]:
    """The states of all `optax.MultiSteps` in an optimizer's state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
    return [x for x in nodes if isinstance(x, optax.MultiStepsState)]


def steps_of(opt_state: PyTree) -> list[Array]:
    """The steps that each `optax.MultiSteps` has taken, microbatches that were only added up not counted."""
    return [state.gradient_step for state in _multi_steps(opt_state)]


def stepped(before: list[Array], after: list[Array]) -> Array | None:
    """Whether the optimizer took a step between two `steps_of`; None if it takes one at each call."""
    taken = [old != new for old, new in zip(before, after, strict=True)]
    return functools.reduce(jnp.logical_or, taken) if taken else None


def _single(state: TrainState) -> TrainState:
    if state.step.ndim == 0:
        return state
    return unreplicate(state)


def _step_key(state: TrainState, axis_name: AxisName | None) -> PRNGKeyArray | None:
    if state.rng is None:
        return None
    key = jax.random.fold_in(state.rng, state.step)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _vary(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    """The parameters as each replica's own.

    Under shard_map with check_vma, the gradient with respect to something all replicas share is summed over them by
    JAX; with respect to something each has of its own, and under pmap and shard_map without check_vma always, it is
    not. Made the replicas' own, the gradients are summed in one place in all three: in `TrainStep.__call__`.
    """
    if axis_name is None:
        return tree
    names = (axis_name,) if isinstance(axis_name, str) else axis_name

    def vary(x: Array) -> Array:
        missing = tuple(name for name in names if name not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def varying_axes(x: Array) -> frozenset[str]:
    """The axes of shard_map, with check_vma, along which the replicas' values of `x` may differ."""
    kind = jax.typeof(x)
    # JAX 0.10 moved the attribute `vma` into `mat` ("manual axis type").
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying


def _psum_scalars(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Loss and metrics in one collective, not in two each."""
    leaves, structure = jax.tree.flatten(tree)
    total = jax.lax.psum(jnp.stack([x.astype(jnp.result_type(*leaves)) for x in leaves]), axis_name)
    return jax.tree.unflatten(structure, [total[i].astype(x.dtype) for i, x in enumerate(leaves)])


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _clip(grads: PyTree, largest: float) -> tuple[PyTree, Array]:
    norm = optax.tree.norm(grads)
    return optax.tree.scale(jnp.minimum(1, largest / (norm + 1e-6)), grads), norm


def _where(condition: Array, new: TrainState, old: TrainState) -> TrainState:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


def _refuse_new_structure(before: Collections, after: Collections) -> None:
    for old, new in ((before.batch_stats, after.batch_stats), (before.variables, after.variables)):
        kinds = [
            {jax.tree_util.keystr(p): (x.shape, x.dtype) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (old, new)
        ]
        changed = sorted(name for name in kinds[0].keys() | kinds[1].keys() if kinds[0].get(name) != kinds[1].get(name))
        if changed:
            lines = [f"  {name}: {kinds[0].get(name, 'absent')} -> {kinds[1].get(name, 'absent')}" for name in changed]
            raise ValueError("the forward pass changed variables in shape, dtype or number:\n" + "\n".join(lines))
