"""What a training step would take on a slice of TPUs: memory, time and traffic, before one is rented."""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from jaxnorm import _checks as check
from jaxnorm import hlo
from jaxnorm._batch_norm import SCOPE as LAYER
from jaxnorm._typing import PyTree
from jaxnorm.means import batch_size
from jaxnorm.moments import SCOPE
from jaxnorm.parallel import traced
from jaxnorm.topologies import Topology, topology
from jaxnorm.train import TrainState, TrainStep

# What a step reads and writes while the unit for matrix products works costs it no time of its own.
_PRODUCTS = ("convolution", "dot")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `total` is what the compiler reserves: arrays padded to its tiles, the program too."""

    parameters: int
    optimizer: int
    average: int  # of an EMA
    other: int  # running statistics and what else the model keeps
    batch: int
    temporary: int | None  # activations, gradients; None where the program does not fit
    total: int
    available: int


@dataclass(frozen=True)
class Traffic:
    """Collectives of one step, the bytes that a replica gives to them, and seconds if they are waited for."""

    number: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found: memory, time and traffic of one training step.

    Where the step does not fit, what it takes but memory is None: cycles, seconds, examples and collectives.

    **Attributes:**

    - `topology`: the name of the slice, as given.
    - `devices`: how many it has.
    - `batch`: the number of examples, over all devices.
    - `fits`: whether the step fits into the devices' memory.
    - `largest_batch`: the examples of which memory would last, by a straight line through this batch.
    - `memory`: bytes on one device: `parameters`, `optimizer`, `average` (of an EMA), `other` (running statistics and
      what else the model keeps), `batch`, `temporary` (activations, gradients), `total` (what the compiler reserves:
      arrays padded to its tiles, the program too) and `available`.
    - `cycles`: libtpu's estimate for the whole step.
    - `statistics_cycles`: those of operations that take BatchNorm's sums and hold no convolution or matrix product: a
      sum that is taken while a convolution writes its result costs nothing.
    - `seconds`: `cycles / clock` and the collectives' time: what a step takes at best.
    - `examples_per_second`: `batch / seconds`.
    - `collectives`: those of one step: their `number`, the `bytes` that a replica gives to them, and `seconds` if they
      are waited for.
    - `statistics`: the part of `collectives` that BatchNorm sends, with what the compiler has merged into one with it.
    - `compile_seconds`: what compiling took here.
    """

    topology: str
    devices: int
    batch: int  # examples, over all devices
    fits: bool
    largest_batch: int | None  # of which memory would last, by a straight line through this one
    memory: Memory
    cycles: int | None
    statistics_cycles: int | None
    seconds: float | None
    examples_per_second: float | None
    collectives: Traffic | None
    statistics: Traffic | None
    compile_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, for JSON.

        **Returns:** a dict by the attributes' names, memory and traffic as dicts.

        **Raises:** nothing of its own.
        """
        return asdict(self)


def plan(
    step: TrainStep,
    state: TrainState,
    batch: PyTree,
    topology: str | Topology,
    *,
    how: str = "jit",
) -> Plan:
    """Compiles a training step for TPUs that are not there, and reads what it will take.

    ```python
    step = jaxnorm.train_step(loss_fn, compute_dtype=jnp.bfloat16)
    batch = {"image": jax.ShapeDtypeStruct((2048, 3, 224, 224), jnp.float32), ...}
    found = jaxnorm.plan(step, state, batch, "v5e:4x4")
    found.fits, found.memory.total, found.seconds
    ```

    The estimates are libtpu's own (`estimated_cycles` in the compiled program); they hold computation and its traffic
    with memory, not the waiting for a host, for data or for stragglers. So `seconds` is what a step takes at best.
    Compiling takes minutes for a large model, and needs libtpu (`pip install 'jaxnorm[tpu]'`) but no TPU.

    **Arguments:**

    - `step`: what `train_step` gave.
    - `state`: a `TrainState`, of arrays or of `jax.ShapeDtypeStruct`s in their place.
    - `batch`: a tree of arrays or `jax.ShapeDtypeStruct`s, examples along the first axes: the global batch.
    - `topology`: a generation and its sides: "v5e:2x4", "v5e:16x16", "v5p:2x2x4", "v6e:4x4".
    - `how`: "jit" or "shard_map", as for `data_parallel`; the state is donated.

    **Returns:** the `Plan`.

    **Raises:**

    - `TypeError`: for arguments of another kind.
    - `ValueError`: for an unknown topology, for another `how`, for a batch that the devices do not divide, for a
      replicated state, and under "jit" for a model whose layers have an axis name.
    - `ImportError`: where libtpu is not installed.
    - `jax.errors.JaxRuntimeError`: for what else than memory the compiler complains of.
    """
    check.instance("step", step, TrainStep, "what train_step gave")
    check.instance("state", state, TrainState, "a jaxnorm.TrainState")
    check.arrays("batch", batch)
    check.one_of("how", how, ("jit", "shard_map"))
    place = topology if isinstance(topology, Topology) else _topology(topology)
    lowered = traced(step, how, state, batch, place.devices).lower()
    size, devices = batch_size(batch), len(place.devices)
    begun = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = _out_of_memory(error)
        memory = _memory(state, batch, devices, None, needed, available)
        largest = _largest(memory, size, devices)
        seconds = time.perf_counter() - begun
        return Plan(place.name, devices, size, False, largest, memory, None, None, None, None, None, None, seconds)
    seconds = time.perf_counter() - begun
    text, analysis = compiled.as_text() or "", compiled.memory_analysis()
    assert analysis is not None  # libtpu has one
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )
    memory = _memory(state, batch, devices, analysis.temp_size_in_bytes, total, place.chip.memory)
    found = hlo.collectives(text, devices)
    cycles = hlo.cycles(text)
    collectives = _traffic(found, place)
    step_seconds = cycles / place.chip.clock + collectives.seconds
    return Plan(
        topology=place.name,
        devices=devices,
        batch=size,
        fits=True,
        largest_batch=_largest(memory, size, devices),
        memory=memory,
        cycles=cycles,
        statistics_cycles=hlo.cycles(text, of=SCOPE, but_with=_PRODUCTS),
        seconds=step_seconds,
        examples_per_second=size / step_seconds,
        collectives=collectives,
        statistics=_traffic([one for one in found if LAYER in one.name], place),
        compile_seconds=seconds,
    )


_topology = topology  # the function, where an argument has its name


def _traffic(found: list[hlo.Collective], place: Topology) -> Traffic:
    return Traffic(len(found), sum(one.bytes for one in found), sum(place.all_reduce(one.bytes) for one in found))


def _memory(
    state: TrainState, batch: PyTree, devices: int, temporary: int | None, total: int, available: int
) -> Memory:
    average = None if state.ema is not None and state.ema.device is not None else state.ema_state
    return Memory(
        parameters=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        average=_bytes(average),
        other=_bytes((state.batch_stats, state.variables)),
        batch=_bytes(batch) // devices,
        temporary=temporary,
        total=total,
        available=available,
    )


def _bytes(tree: PyTree) -> int:
    return sum(int(np.prod(np.shape(x))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _largest(memory: Memory, size: int, devices: int) -> int:
    """Parameters and the like stay, the rest grows with the batch."""
    fixed = memory.parameters + memory.optimizer + memory.average + memory.other
    per_device = size // devices
    return max(0, int((memory.available - fixed) * per_device / (memory.total - fixed))) * devices


# "the total memory required for HLO temporaries (52.24G) exceeds available HBM (15.75G)" and, of other parts of the
# compiler, "Used 20.00G of 15.75G hbm".
_USED = re.compile(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"
)


def _out_of_memory(error: Exception) -> tuple[int, int]:
    """The bytes needed and available, of the compiler's complaint. Anything else that it complains of is raised."""
    match = _USED.search(str(error))
    if match is None:
        raise error
    needed, needed_unit, available, available_unit = filter(None, match.groups())
    return _parsed(needed, needed_unit), _parsed(available, available_unit)


def _parsed(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
