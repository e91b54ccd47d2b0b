"""Exponential moving average of a whole model state: parameters, running statistics, counters."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Bool, Float, Int, PyTree
from jaxnorm.averaging import Schedule, after, decaying, equal_decay, warming

Placement: TypeAlias = Any  # "cpu", "pinned_host", a jax.Device, or a sharding


class EmaState(NamedTuple):
    """What an `Ema` remembers: the average, and how many updates it has taken.

    **Attributes:**

    - `count`: the updates so far, an int32 scalar.
    - `average`: a tree of the structure given to `Ema.init`; floating and complex entries averaged, all others the
      latest.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # updates so far
    average: PyTree  # the tree's structure; floating and complex entries averaged, all others the latest


@dataclass(frozen=True)
class Ema:
    """Exponential moving average over any tree of arrays.

        average <- decay * average + (1 - decay) * value        (floating and complex entries)
        average <- value                                        (integers, booleans, random keys)

    ```python
    ema = jaxnorm.Ema(0.9998, use_warmup=True)
    state = ema.init(variables)
    state = ema.update(variables, state, step)   # step counts from 1, as in timm's train.py
    averaged = ema.value(state)
    ```

    Averages count their own updates: `EmaState.count` is AveragedModel's `n_averaged` and Ultralytics' `updates`. In a
    `TrainState` the step of an update is its number, however many steps the optimizer took in between.

    The decay of a step is `timm.utils.ModelEmaV3.get_decay`'s, with s = max(0, step - update_after_step - 1):
    0 while s is 0 (the average is a copy); then `decay`, or with `use_warmup`
    `1 - (1 + s / warmup_gamma) ** -warmup_power` held between `min_decay` and `decay`. Without a step it is `decay`.

    Note the two conventions that look alike: optax calls `decay` what is kept; PyTorch's BatchNorm calls `momentum`
    what is replaced; `torch.lerp`, which timm uses, takes the weight `1 - decay`.

    **Rounding.** The arithmetic is `torch.lerp`'s (aten/src/ATen/native/Lerp.h): `a + w * (v - a)` for `w < 0.5`, else
    `v - (v - a) * (1 - w)`, in the average's dtype. So a copy is a copy to the bit and a constant stays constant to
    the bit, which `decay * a + (1 - decay) * v` (timm's ModelEmaV2, torchvision) gives only up to rounding. In
    float64 all of them agree to 1e-15 a step; in float32 to one unit in the last place, since compilers may contract
    the product and the sum to one rounding.

    **Arguments:**

    - `decay`: share kept, or a schedule s -> decay (any optax schedule).
    - `min_decay`, `update_after_step`, `use_warmup`, `warmup_gamma`, `warmup_power`: as above, timm's options of these
      names.
    - `device`: where the average lives. `None`: beside the values. `"cpu"`: the host's memory, updated there.
      `"pinned_host"`: host memory that the accelerator reads directly, updated by the accelerator. A `jax.Device`.
      A sharding: a `NamedSharding` splits each array along its first dimension that the mesh axis divides (arrays
      without one are replicated), so that N replicas hold 1/N of the average each.
    - `exclude_buffers`: average the parameters only and copy the rest. In NNX trees a parameter is an `nnx.Param`;
      in Linen variables, and other mappings that have a `"params"` entry, what is in that entry. For other trees
      give a function (path, entry) -> bool that says whether an entry is a buffer.
    - `dtype`: dtype of the averaged floating entries; `None` keeps each entry's. A bfloat16 average takes its
      updates with stochastic rounding, as timm's does, because most updates are below its resolution; a float16
      or float8 average cannot be held so and is refused: give `dtype=jnp.float32`.
    - `seed`: of the stochastic rounding. The same on all replicas, so that they round alike.
    - `integers`: `"copy"`, or `"average"`, which truncates the average toward zero, as
      `torch.optim.swa_utils.AveragedModel` does to integer buffers.
    - `counts_itself`: take the number of updates so far, plus one, where `update` is given no step.

    **Raises:** `TypeError`, `ValueError` for options of another kind or out of range; the methods say what they raise.
    """

    decay: float | Schedule = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    use_warmup: bool = False
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3
    device: Placement | None = None
    exclude_buffers: bool | Callable[[Any, Any], bool] = False
    dtype: Any = None
    seed: int = 0
    integers: Literal["copy", "average"] = "copy"
    counts_itself: bool = False

    def __post_init__(self) -> None:
        if not callable(self.decay):
            check.number("decay, the share kept (or a schedule),", self.decay, least=0, most=1)
        check.number("min_decay", self.min_decay, least=0, most=1)
        check.whole("update_after_step", self.update_after_step, least=-(2**31))
        check.number("warmup_gamma", self.warmup_gamma, above=0)
        check.number("warmup_power", self.warmup_power, least=0)
        check.whole("seed", self.seed, least=-(2**31))
        check.one_of("integers", self.integers, ("copy", "average"))
        for name in ("use_warmup", "counts_itself"):
            check.flag(name, getattr(self, name))
        if not callable(self.exclude_buffers):
            check.flag("exclude_buffers (or a function)", self.exclude_buffers)
        check.dtype("dtype", self.dtype)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype is a floating dtype; got {self.dtype}")
        if not (self.device is None or isinstance(self.device, jax.Device | Sharding)):
            check.one_of("device (or a jax.Device, or a sharding)", self.device, ("cpu", "pinned_host"))

    @classmethod
    def averaged_model(
        cls, decay: float | None = None, *, use_buffers: bool = False, device: Placement | None = None
    ) -> "Ema":
        """`torch.optim.swa_utils.AveragedModel`: equal weights (SWA), or with a `decay` its `get_ema_avg_fn(decay)`.

        The first update copies. It counts its own updates (`EmaState.count` is PyTorch's `n_averaged`); give no step.

        **Arguments:**

        - `decay`: the share kept; None weighs all updates alike.
        - `use_buffers`: average buffers too; False copies them. (PyTorch's option of that name.)
        - `device`: where the average lives, as for `Ema`.

        **Returns:** the `Ema`.

        **Raises:** `TypeError`, `ValueError` for options that are none, or out of range.
        """
        check.flag("use_buffers", use_buffers)
        return cls(
            decay=equal_decay if decay is None else decay,
            device=device,
            exclude_buffers=not use_buffers,
            integers="average",
            counts_itself=True,
        )

    @classmethod
    def torchvision(cls, decay: float, *, device: Placement | None = None) -> "Ema":
        """`ExponentialMovingAverage` of torchvision's `references/classification/utils.py`.

        Its training loop makes the average a copy during the warm-up epochs; here, `state._replace(count=...)` with
        zero does so.

        **Arguments:**

        - `decay`: the share kept.
        - `device`: where the average lives, as for `Ema`.

        **Returns:** the `Ema`; buffers are averaged too.

        **Raises:** `ValueError` for a decay that is not from 0 to 1, and for a device that is none.
        """
        return cls.averaged_model(decay, use_buffers=True, device=device)

    def init(self, tree: PyTree) -> EmaState:
        """The state before any update: a copy of `tree`, placed and cast.

        **Arguments:**

        - `tree`: any tree of arrays.

        **Returns:** the `EmaState`, its count 0.

        **Raises:**

        - `TypeError`: for what is no tree of arrays.
        - `ValueError`: for float16 and float8 entries without a `dtype`, which could not hold their updates; for a
          sharding that does not name one mesh axis.
        """
        check.arrays("tree", tree)
        self._refuse_narrow(tree)
        average = jax.tree.map(lambda x: _floating_as(jnp.array(x, copy=True), self.dtype), tree)
        return self._place(EmaState(jnp.zeros((), jnp.int32), average))

    def update(
        self,
        tree: PyTree,
        state: EmaState,
        step: Int[Array, ""] | int | None = None,
        *,
        taken: Bool[Array, ""] | bool | None = None,
    ) -> EmaState:
        """The state after `tree` is taken in.

        One compiled pass over the state. Placed elsewhere (`device`), values are sent there and the call returns at
        once; it is then made outside of `jax.jit`, which cannot span platforms.

        **Arguments:**

        - `tree`: of the structure and the shapes given to `init`.
        - `state`: what `init` or the last update gave.
        - `step`: the number of this update, counted from 1: `state.count + 1`, say, which is what `TrainState` gives.
          Without one the decay is `decay`, or goes by the average's own count (`counts_itself`).
        - `taken`: where it is False, the state stays as it is; None says True.

        **Returns:** the new `EmaState`.

        **Raises:**

        - `TypeError`: for what is no tree of arrays, and a state that is no `EmaState`.
        - `ValueError`: for a tree of another structure or other shapes than that given to `init`; for a schedule
          without a step; under `jit` with a `device`; and where `exclude_buffers=True` cannot tell parameters from
          buffers.
        """
        self._check(state)
        check.arrays("tree", tree)
        step = step if step is None else check.array("step", step, shape=())
        taken = taken if taken is None else check.array("taken", taken, shape=()).astype(bool)
        if self.device is None:
            return _update(self, tree, state, step, taken)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((tree, state))):
            raise ValueError(
                f"an Ema with device={self.device!r} is updated outside of compiled functions: call its update after "
                "the compiled step. data_parallel does so."
            )
        if step is not None:  # a number may come from the model's device, which is not the average's
            step = jax.device_put(jnp.asarray(step), state.count.sharding)
        if taken is not None:
            taken = jax.device_put(taken if jax.process_count() == 1 else np.asarray(taken), state.count.sharding)
        shardings = jax.tree.map(lambda x: x.sharding, state.average)
        if self.device == "pinned_host":  # computed by the accelerator, kept by the host
            near = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings)
            tree, average = jax.device_put(tree, near), jax.device_put(state.average, near)
            updated = _update(self, tree, EmaState(state.count, average), step, taken)
            return EmaState(updated.count, jax.device_put(updated.average, shardings))
        return _update(self, jax.device_put(tree, shardings), state, step, taken)

    def value(self, state: EmaState) -> PyTree:
        """The averaged tree, in the structure given to `init`, where the average lives.

        **Arguments:**

        - `state`: what `init` or the last update gave.

        **Returns:** the tree; before any update a copy of the one given to `init`.

        **Raises:** `TypeError` for a state that is no `EmaState`.
        """
        self._check(state)
        return state.average

    def get_decay(self, step: Int[Array, ""] | int | None = None) -> Float[Array, ""]:
        """The share kept at a step; timm's `ModelEmaV3.get_decay`.

        **Arguments:**

        - `step`: counted from 1; None for `decay` itself.

        **Returns:** a floating scalar from 0 to 1.

        **Raises:**

        - `TypeError`: for a step that is no number.
        - `ValueError`: for a step that is no scalar, and for a schedule without a step.
        """
        return 1 - self._weight(step if step is None else check.array("step", step, shape=()))

    def _check(self, state: Any) -> None:
        check.instance("state", state, EmaState, "what Ema.init gave, an EmaState")

    @property
    def goes_by_count(self) -> bool:
        """Whether an update's weight depends on how many there were, beyond the first, which copies."""
        return callable(self.decay) or self.use_warmup or self.update_after_step > 0

    def _weight(self, step: Int[Array, ""] | int | None) -> Float[Array, ""]:
        if step is None:
            if callable(self.decay):
                raise ValueError("a decay schedule needs the step: update(tree, state, step)")
            return jnp.asarray(1 - self.decay, jnp.result_type(float))
        share = decaying(self.decay)
        if self.use_warmup:
            share = warming(share, self.warmup_gamma, self.warmup_power, self.min_decay)
        return jnp.asarray(after(self.update_after_step, share)(step))

    def _place(self, state: EmaState) -> EmaState:
        if self.device is None:
            return state
        if self.device == "cpu":
            return jax.device_put(state, jax.local_devices(backend="cpu")[0])
        if self.device == "pinned_host":
            there = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state.average)
            return EmaState(state.count, jax.device_put(state.average, there))
        if isinstance(sharding := self.device, NamedSharding):
            return jax.device_put(state, jax.tree.map(lambda x: _split(sharding, x.shape), state))
        return jax.device_put(state, self.device)

    def _refuse_narrow(self, tree: PyTree) -> None:
        dtypes = {
            jax.tree_util.keystr(path): jnp.dtype(self.dtype or jnp.result_type(x))
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if jnp.issubdtype(jnp.result_type(x), jnp.floating)
        }
        narrow = {name: d for name, d in dtypes.items() if jnp.finfo(d).bits < 32 and d != jnp.bfloat16}
        if narrow:
            raise ValueError(
                "an average of so few bits cannot hold its updates, which round to nothing: give Ema "
                f"dtype=jnp.float32. Entries: {', '.join(f'{name} ({d})' for name, d in narrow.items())}"
            )


@functools.partial(jax.jit, static_argnums=0)
def _update(ema: Ema, tree: PyTree, state: EmaState, step: Any, taken: Any) -> EmaState:
    count = optax.safe_increment(state.count)
    if step is None and ema.counts_itself:
        step = count
    weight = ema._weight(step)

    refuse_other(tree, state.average)
    values, structure = jax.tree.flatten(tree)
    averages = jax.tree.leaves(state.average)
    buffers = _buffers(tree, ema.exclude_buffers)
    updated = list(values)
    inexact = []
    for i, (average, value) in enumerate(zip(averages, values, strict=True)):
        if buffers[i]:
            updated[i] = _floating_as(value, average.dtype)
        elif average.dtype == jnp.bfloat16:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(ema.seed), state.count), i)
            updated[i] = _stochastic_bfloat16(_lerp(_float32(average), _float32(value), weight), key)
        elif jnp.issubdtype(average.dtype, jnp.inexact):
            inexact.append(i)
        elif ema.integers == "average" and jnp.issubdtype(average.dtype, jnp.integer):
            updated[i] = _lerp(_float32(average), _float32(value), weight).astype(average.dtype)
    for i, average in zip(
        inexact, _lerp_all([averages[i] for i in inexact], [values[i] for i in inexact], weight), strict=True
    ):
        updated[i] = average
    if taken is not None:
        count = jnp.where(taken, count, state.count)
        updated = [jnp.where(taken, new, old) for new, old in zip(updated, averages, strict=True)]
    return EmaState(count, jax.tree.unflatten(structure, updated))


def refuse_other(tree: PyTree, average: PyTree) -> None:
    """Raises `ValueError` for a tree of another structure, or with entries of other shapes, than the average has."""
    got: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(average)
    if not got == expected:
        raise ValueError(f"the tree is not the one this average was made for: got {got}, expected {expected}")
    unlike = [
        f"{jax.tree_util.keystr(path)} has shape {jnp.shape(value)}, its average {jnp.shape(of)}"
        for (path, value), of in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(average), strict=True)
        if jnp.shape(value) != jnp.shape(of)
    ]
    if unlike:
        raise ValueError(f"the tree is not the one this average was made for: {'; '.join(unlike)}")


def _lerp_all(averages: list[Any], values: list[Any], weight: Any) -> list[Any]:
    return [_lerp(a, v, weight) for a, v in zip(averages, optax.tree.cast_like(values, averages), strict=True)]


def _lerp(average: Any, value: Any, weight: Any) -> Any:
    """`torch.lerp(average, value, weight)`, its two branches included."""
    weight = weight.astype(average.real.dtype)
    difference = value - average
    return jnp.where(weight < 0.5, average + weight * difference, value - difference * (1 - weight))


def _stochastic_bfloat16(x: Any, key: Any) -> Any:
    """Round float32 up or down to bfloat16 with probability equal to the part cut off (timm's rule)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (jax.random.bits(key, x.shape, jnp.uint32) >> 16)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _float32(x: Any) -> Any:
    return x.astype(jnp.float32)


def _floating_as(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x


def _split(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    axes = [axis for axis in sharding.spec if axis is not None]
    if len(axes) != 1:
        raise ValueError(f"an Ema's sharding names one mesh axis, e.g. PartitionSpec('batch'); got {sharding.spec}")
    names = axes[0] if isinstance(axes[0], tuple) else (axes[0],)
    size = 1
    for name in names:
        size *= sharding.mesh.shape[name]
    for i, length in enumerate(shape):
        if length and length % size == 0:
            return NamedSharding(sharding.mesh, PartitionSpec(*[None] * i, axes[0]))
    return NamedSharding(sharding.mesh, PartitionSpec())


def _buffers(tree: PyTree, exclude: bool | Callable[[Any, Any], bool]) -> list[bool]:
    """For each leaf, whether it is a buffer that is copied."""
    if exclude is False:
        return [False] * len(jax.tree.leaves(tree))
    if callable(exclude):
        return [bool(exclude(path, x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if any(isinstance(x, nnx.Variable) for _, x in found):
        flags = []
        for _, x in found:
            flags += [isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param)] * len(jax.tree.leaves(x))
        return flags
    if hasattr(tree, "keys") and "params" in tree:
        return [getattr(path[0], "key", None) != "params" for path, _ in found]
    raise ValueError(
        "exclude_buffers=True cannot tell parameters from buffers here: the tree has neither nnx.Variables nor a "
        '"params" entry. Give exclude_buffers a function (path, entry) -> bool.'
    )
