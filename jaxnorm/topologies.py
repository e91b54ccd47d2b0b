"""TPUs that are not there: their devices, for ahead-of-time compiling, and what is known of them.

libtpu compiles for any slice on a machine that has none. `topology("v5e:4x4")` is a slice by its generation and shape.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies

from jaxnorm import _checks as check


@dataclass(frozen=True)
class Chip:
    """One device of a generation, as JAX counts devices.

    Memory, bandwidth and arithmetic are those that JAX's kernels are planned with
    (`jax/_src/pallas/mosaic/tpu_info.py`, JAX 0.10). `clock` makes a cycle of libtpu's estimate a second: `operations`
    by the operations of a cycle, 131,072 on v5e, 262,144 on v5p and 524,288 on v6e (of these libtpu 0.0.42 counts 88,
    90 and 70 % for a bfloat16 product of 8192x8192 matrices). `link` is the bandwidth of one link of the interconnect
    in one direction (https://jax-ml.github.io/scaling-book/tpus).
    """

    memory: int  # bytes
    bandwidth: float  # of the memory, bytes/s
    operations: float  # bfloat16, 1/s
    clock: float  # Hz
    link: float  # bytes/s


CHIPS = {
    "v5e": Chip(17_200_000_000, 8.2e11, 1.97e14, 1.5e9, 4.5e10),
    "v5p": Chip(103_000_000_000, 2.46e12, 4.59e14, 1.75e9, 9e10),
    "v6e": Chip(34_400_000_000, 1.64e12, 9.2e14, 1.75e9, 9e10),
}

# A hop of the interconnect takes about 1 us, and a collective some 5 us before its first:
# https://jax-ml.github.io/scaling-book/sharding
HOP = 1e-6
BEGIN = 5e-6

# What libtpu asks of its surroundings where it finds no TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes hold of no device
}


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs: `v5e:4x4`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple[jax.Device, ...]

    def all_reduce(self, size: int) -> float:
        """Seconds until all replicas have the sum of `size` bytes: around each axis of the torus, all axes at once.

        Axes shorter than 4 have no link from the last device to the first.
        """
        lengths = [side for side in self.shape if side > 1]
        if not lengths:
            return 0.0
        replicas = math.prod(lengths)
        hops = sum(side // 2 if side >= 4 else side - 1 for side in lengths)
        links = sum(2 if side >= 4 else 1 for side in lengths)
        return BEGIN + 2 * hops * HOP + 2 * size * (replicas - 1) / replicas / (links * self.chip.link)


def topology(name: str) -> Topology:
    """The slice of that name, `GENERATION:SIDES`: `v5e:2x4`, `v5e:16x16`, `v5p:2x2x4`.

    Raises:
        ValueError: for a name of another form, a generation that is not known, or sides that libtpu does not offer.
        ImportError: where libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name) if isinstance(name, str) else None
    if match is None or match[1] not in CHIPS:
        raise ValueError(
            f"topology={check.shown(name)} is no TPU topology: expected a generation ({', '.join(CHIPS)}) and its "
            "sides, such as v5e:4x4 or v5p:2x2x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for TPUs needs libtpu: pip install 'jaxnorm[tpu]'")
    with _surroundings():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
        except Exception as error:  # a JaxRuntimeError or, before 0.11, a ValueError
            raise ValueError(f"libtpu offers no topology {name!r}: {str(error).splitlines()[0]}") from error
    shape = tuple(int(side) for side in match[2].split("x"))
    return Topology(name, CHIPS[match[1]], shape, tuple(np.ravel(found.devices)))


@contextmanager
def _surroundings() -> Iterator[None]:
    """The environment that libtpu is loaded in, put back afterwards."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
