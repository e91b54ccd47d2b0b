"""Two sums over the same axes, in one pass over whatever both are computed from.

XLA for a GPU or TPU fuses two sums of one input into one kernel. XLA for a CPU reads the input once for each, and makes
a float32 copy of a bfloat16 one first; a single reduction of pairs is not vectorised (JAX 0.10, measured: 35 ms for two
sums of 16x112x112x64 float32, 7 ms one after the other). So there the sums are taken in steps, 16 rows at a time:

    pairs[i] = sum over 16 rows of complex(a, b)      one array, so that it fits into the output's buffer
    then the real and the imaginary parts             a 16th of the rows

LLVM unrolls a loop over 16 rows and vectorises the one around it (3 ms for float32 and 2 ms for bfloat16, where the two
sums took 29).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from jaxnorm._typing import Array, Float, Inexact

_ROWS = 16  # of complex numbers; from about 24 on LLVM no longer unrolls
_ROWS_OF_REALS = 32
_FEWEST = 4  # with less than that the steps gain nothing


def two_sums(
    a: Float[Array, "..."], b: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`a.sum(axes, keepdims=True), b.sum(axes, keepdims=True)` of two arrays of one shape."""

    def apart(a: Float[Array, "..."], b: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return a.sum(axes, keepdims=True), b.sum(axes, keepdims=True)

    # Of neighbouring axes the one or more that divide best; as one axis they cost nothing.
    run = max(_runs(axes), key=lambda run: _divisor(_size(a, run), _ROWS), default=())
    rows = _size(a, run)
    if _divisor(rows, _ROWS) < _FEWEST:
        return apart(a, b)
    first, rest = a.shape[: run[0]], a.shape[run[-1] + 1 :]
    left = tuple(axis if axis <= run[0] else axis - len(run) + 1 for axis in axes if axis not in run[1:])
    kept = [1 if axis in axes else n for axis, n in enumerate(a.shape)]

    def fold(x: Inexact[Array, "..."], rows: int, most: int) -> Inexact[Array, "..."]:
        step = _divisor(rows, most)
        return x.reshape(*first, step, rows // step, *rest)

    def together(a: Float[Array, "..."], b: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        pairs = fold(lax.complex(a, b), rows, _ROWS).sum(run[0])
        parts = [fold(part, pairs.shape[run[0]], _ROWS_OF_REALS) for part in (pairs.real, pairs.imag)]
        zero = jnp.zeros((), a.dtype)
        sums = lax.reduce(parts, [zero, zero], lambda x, y: [x[0] + y[0], x[1] + y[1]], (run[0],))
        s1, s2 = (part.sum(left).reshape(kept) for part in sums)
        return s1, s2

    return lax.platform_dependent(a, b, cpu=together, default=apart)


def _runs(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Ascending axes, neighbours together: (0, 2, 3) as (0,), (2, 3)."""
    runs: list[tuple[int, ...]] = []
    for axis in axes:
        if runs and runs[-1][-1] == axis - 1:
            runs[-1] += (axis,)
        else:
            runs.append((axis,))
    return runs


def _size(x: Float[Array, "..."], axes: Sequence[int]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return max(d for d in range(1, most + 1) if n % d == 0)
