"""Which example of a batch a value's elements belong to, followed through a program of JAX.

A value that has a batch axis has `Rows(axis, outer, inner)`: its element at index i along `axis` depends on the example
(i // inner) % B, and on no other. A reshape of (B, T, C) to (B * T, C) turns Rows(0) into Rows(0, inner=T), one of
(T, B, C) to (T * B, C) into Rows(0, outer=T). What depends on several examples at once, a mean over the batch say, is
`Mixed`, and so is what comes out of an operation that is not known here: nothing is guessed.

The rules are those of JAX's primitives (jax/_src/lax), of which there are few, and not of PyTorch's operations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one example each, along one axis of outer * B * inner."""

    axis: int
    outer: int = 1
    inner: int = 1


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Elements that depend on several examples; `why` is the operation that brought them together."""

    why: str


Of = Rows | Mixed | None  # None: depends on no example
Rule = Callable[[core.JaxprEqn, Sequence[Of], int], Sequence[Of]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _names(
    """abs acos acosh add and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg nextafter not
    optimization_barrier or polygamma population_count pow pvary real reduce_precision regularized_incomplete_beta rem
    round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeta"""
)
_REDUCTIONS = _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor")
_ALONG = _names("cumlogsumexp cummax cummin cumprod cumsum")
_WINDOWS = _names("reduce_window reduce_window_max reduce_window_min reduce_window_sum")
_MATRICES = _names("cholesky eig eigh householder_product lu lu_pivots_to_permutation qr svd triangular_solve")
_SCATTERS = _names(
    "scatter scatter-add scatter-max scatter-min scatter-mul scatter_add scatter_max scatter_min scatter_mul"
)


def follow(
    jaxpr: core.Jaxpr,
    given: Sequence[Of],
    size: int,
    see: Callable[[core.JaxprEqn, Of], None],
    at: Callable[[core.JaxprEqn], str],
) -> list[Of]:
    """What the results of a program are made of, given that of its arguments, for `size` examples.

    `see` is called with every `BATCH_NORM_INPUT` and what its argument is made of; its result is taken to be the same.
    `at` says where an operation is, for `Mixed`.
    """
    known: dict[core.Var, Of] = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> Of:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        found = [read(atom) for atom in eqn.invars]
        results: Sequence[Of]
        if eqn.primitive is BATCH_NORM_INPUT:
            see(eqn, found[0])
            results = [found[0]]
        else:
            here = at(eqn)
            inner = functools.partial(follow, size=size, see=see, at=functools.partial(_given, here))
            inside = _inside(eqn, found, inner)
            results = inside if inside is not None else _results(eqn, found, size)
            results = [Mixed(here) if one is _APART else one for one in results]
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _given(place: str, eqn: core.JaxprEqn) -> str:
    """Inside of an operation, where that operation is."""
    return place


def _marker() -> core.Primitive:
    primitive = core.Primitive("batch_norm_input")
    primitive.def_abstract_eval(lambda x, **_: x)
    return primitive


BATCH_NORM_INPUT = _marker()
"""Stands for a BatchNorm layer while its input is looked for; an operation of no effect."""


def _results(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    mixed = next((one for one in found if isinstance(one, Mixed)), None)
    if mixed is not None or all(one is None for one in found):
        return [mixed] * len(eqn.outvars)
    rule = _same if eqn.primitive.name in _ELEMENTWISE else _RULES.get(eqn.primitive.name)
    return rule(eqn, found, size) if rule else [_APART] * len(eqn.outvars)


def _joined(found: Sequence[Of]) -> Of:
    """Of values that are combined element by element."""
    kinds = {one for one in found if one is not None}
    mixed = next((one for one in kinds if isinstance(one, Mixed)), None)
    if mixed is not None or len(kinds) < 2:
        return mixed or next(iter(kinds), None)
    return _APART


_APART = Mixed("")  # here; `follow` says where


def shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _same(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    if eqn.primitive.multiple_results and len(eqn.invars) == len(eqn.outvars):  # optimization_barrier
        return list(found)
    return [_joined(found)] * len(eqn.outvars)


def _moved(axis_of: Callable[[core.JaxprEqn, int], int | None]) -> Rule:
    """A rule for one tensor (the first argument): where its axis goes, or None where its rows meet."""

    def rule(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
        first, *others = found
        if not isinstance(first, Rows) or any(one is not None for one in others):
            return [_APART] * len(eqn.outvars)
        axis = axis_of(eqn, first.axis)
        return [_APART if axis is None else dataclasses.replace(first, axis=axis)] * len(eqn.outvars)

    return rule


def _squeezed(dims: Sequence[int], axis: int) -> int | None:
    return None if axis in dims else axis - sum(dim < axis for dim in dims)


def _broadcast(eqn: core.JaxprEqn, axis: int) -> int | None:
    to = int(eqn.params["broadcast_dimensions"][axis])
    return to if eqn.params["shape"][to] == shape_of(eqn.invars[0])[axis] else None


def _expanded(eqn: core.JaxprEqn, axis: int) -> int | None:
    dims = set(eqn.params["dimensions"])
    return [n for n in range(len(shape_of(eqn.outvars[0]))) if n not in dims][axis]


def _whole(eqn: core.JaxprEqn, axis: int) -> int | None:
    """Pads and slices: rows stay where all of them stay."""
    if eqn.primitive.name == "pad":
        return axis if tuple(eqn.params["padding_config"][axis]) == (0, 0, 0) else None
    return axis if shape_of(eqn.outvars[0])[axis] == shape_of(eqn.invars[0])[axis] else None


def _window(eqn: core.JaxprEqn, axis: int) -> int | None:
    params = eqn.params
    one = params["window_dimensions"][axis] == 1 and params["window_strides"][axis] == 1
    dilations = (params.get("base_dilation"), params.get("window_dilation"))
    whole = tuple(params["padding"][axis]) == (0, 0) and all(d is None or d[axis] == 1 for d in dilations)
    return axis if one and whole else None


def _reshaped(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    rows = found[0]
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if not isinstance(rows, Rows) or eqn.params.get("dimensions") is not None:
        return [_APART]
    # Row-major, the elements are (outer, B, inner) of these sizes; B has to lie whole within one axis.
    outer = math.prod(before[: rows.axis]) * rows.outer
    inner = rows.inner * math.prod(before[rows.axis + 1 :])
    for axis, length in enumerate(after):
        above, below = math.prod(after[:axis]), math.prod(after[axis + 1 :])
        if not above or not below or outer % above or inner % below:
            continue
        if outer // above * size * (inner // below) == length:
            return [Rows(axis, outer // above, inner // below)]
    return [_APART]


def _concatenated(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    dimension = eqn.params["dimension"]
    rows = [one for one in found if isinstance(one, Rows)]
    if any(one.axis != dimension for one in rows):
        return [_joined(found)]
    if len(rows) < len(found) or len({one.inner for one in rows}) > 1:
        return [_APART]
    return [Rows(dimension, sum(one.outer for one in rows), rows[0].inner)]


def _split(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    rows = found[0]
    if not isinstance(rows, Rows):
        return [_APART] * len(eqn.outvars)
    if eqn.params["axis"] != rows.axis:
        return [rows] * len(eqn.outvars)
    return [_part(rows, sum(eqn.params["sizes"][:n]), length, size) for n, length in enumerate(eqn.params["sizes"])]


def _sliced(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    rows, params = found[0], eqn.params
    if not isinstance(rows, Rows):
        return [_APART]
    start, end = params["start_indices"][rows.axis], params["limit_indices"][rows.axis]
    if params["strides"] is not None and params["strides"][rows.axis] != 1:
        return [_APART]
    return [_part(rows, start, end - start, size)]


def _part(rows: Rows, start: int, length: int, size: int) -> Of:
    """Rows of a part of the axis, which has to be whole batches."""
    block = size * rows.inner
    return (
        dataclasses.replace(rows, outer=length // block) if start % block == 0 == length % block and length else _APART
    )


def _updated(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    """dynamic_update_slice."""
    operand, update, *indices = found
    rows = _joined([operand, update])
    if any(one is not None for one in indices) or not isinstance(rows, Rows):
        return [_APART]
    return [rows if shape_of(eqn.invars[0])[rows.axis] == shape_of(eqn.invars[1])[rows.axis] else _APART]


def _product(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    """dot_general: batch axes, then the left's free axes, then the right's."""
    (contracted, batched) = eqn.params["dimension_numbers"]
    ndims = [len(shape_of(atom)) for atom in eqn.invars]
    results: list[Of] = []
    for side, rows in enumerate(found):
        if not isinstance(rows, Rows):
            continue
        if rows.axis in contracted[side]:
            return [_APART]
        if rows.axis in batched[side]:
            axis = list(batched[side]).index(rows.axis)
        else:
            taken = {*contracted[side], *batched[side]}
            axis = len(batched[side]) + [n for n in range(ndims[side]) if n not in taken].index(rows.axis)
            axis += 0 if side == 0 else ndims[0] - len(contracted[0]) - len(batched[0])
        results.append(dataclasses.replace(rows, axis=axis))
    return [_joined(results)]


def _convolved(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    rows, kernel = found
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(rows, Rows) or kernel is not None or eqn.params["batch_group_count"] != 1:
        return [_APART]
    return [dataclasses.replace(rows, axis=numbers.out_spec[0]) if rows.axis == numbers.lhs_spec[0] else _APART]


def _gathered(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    operand, indices = found
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shapes = [shape_of(atom) for atom in eqn.invars]
    places = [n for n in range(len(shape_of(eqn.outvars[0]))) if n not in numbers.offset_dims]  # of the indices' axes
    if isinstance(indices, Rows):
        if indices.axis >= len(shapes[1]) - 1:
            return [_APART]
        result = dataclasses.replace(indices, axis=places[indices.axis])
        if isinstance(operand, Rows):
            pairs = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
            same = dataclasses.replace(operand, axis=0) == dataclasses.replace(indices, axis=0)
            return [result if same and pairs.get(operand.axis) == indices.axis else _APART]
        return [result]
    assert isinstance(operand, Rows)
    if operand.axis in numbers.operand_batching_dims:
        axis = numbers.start_indices_batching_dims[list(numbers.operand_batching_dims).index(operand.axis)]
        return [dataclasses.replace(operand, axis=places[axis])]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if operand.axis in gone or sizes[operand.axis] != shapes[0][operand.axis]:
        return [_APART]
    kept = [n for n in range(len(shapes[0])) if n not in gone]
    return [dataclasses.replace(operand, axis=numbers.offset_dims[kept.index(operand.axis)])]


def _scattered(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    operand, indices, updates = found
    numbers = eqn.params["dimension_numbers"]
    shapes = [shape_of(atom) for atom in eqn.invars]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [n for n in range(len(shapes[0])) if n not in gone]
    if indices is not None:
        return [_APART]
    if isinstance(updates, Rows):
        if updates.axis not in numbers.update_window_dims:
            return [_APART]
        at = kept[list(numbers.update_window_dims).index(updates.axis)]
        moved = dataclasses.replace(updates, axis=at)
        whole = shapes[2][updates.axis] == shapes[0][at]
        return [moved if whole and operand in (None, moved) else _APART]
    assert isinstance(operand, Rows)
    if operand.axis in gone:
        return [_APART]
    window = numbers.update_window_dims[kept.index(operand.axis)]
    return [operand if shapes[2][window] == shapes[0][operand.axis] else _APART]


def _last_axes(count: Callable[[core.JaxprEqn], int]) -> Rule:
    """Operations on the last axes, for each index of those before."""

    def rule(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
        rows = _joined(found)
        least = min(len(shape_of(atom)) for atom, one in zip(eqn.invars, found, strict=True) if one is not None)
        ok = isinstance(rows, Rows) and rows.axis < least - count(eqn)
        return [rows if ok else _APART] * len(eqn.outvars)

    return rule


def _sorted(eqn: core.JaxprEqn, found: Sequence[Of], size: int) -> Sequence[Of]:
    rows = _joined(found)
    apart = not isinstance(rows, Rows) or rows.axis == eqn.params["dimension"]
    return [_APART if apart else rows] * len(eqn.outvars)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCTIONS, _moved(lambda eqn, axis: _squeezed(eqn.params["axes"], axis))),
    **dict.fromkeys(_ALONG, _moved(lambda eqn, axis: None if eqn.params["axis"] == axis else axis)),
    **dict.fromkeys(_WINDOWS, _moved(_window)),
    **dict.fromkeys(_MATRICES, _last_axes(lambda eqn: 2)),
    "broadcast_in_dim": _moved(_broadcast),
    "expand_dims": _moved(_expanded),
    "squeeze": _moved(lambda eqn, axis: _squeezed(eqn.params["dimensions"], axis)),
    "transpose": _moved(lambda eqn, axis: list(eqn.params["permutation"]).index(axis)),
    "rev": _moved(lambda eqn, axis: None if axis in eqn.params["dimensions"] else axis),
    "pad": _moved(_whole),
    "dynamic_slice": _moved(_whole),
    "dynamic_update_slice": _updated,
    "reshape": _reshaped,
    "concatenate": _concatenated,
    "split": _split,
    "slice": _sliced,
    "dot_general": _product,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
    **dict.fromkeys(_SCATTERS, _scattered),
    "top_k": _last_axes(lambda eqn: 1),
    "fft": _last_axes(lambda eqn: len(eqn.params["fft_lengths"])),
    "sort": _sorted,
}


Follow = Callable[[core.Jaxpr, Sequence[Of]], list[Of]]


def _inside(eqn: core.JaxprEqn, found: Sequence[Of], follow: Follow) -> Sequence[Of] | None:
    """Of an operation that holds programs; None if it holds none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scanned(eqn, found, follow)
    if name == "while":
        return _looped(eqn, found, follow)
    if name == "cond":
        index, *given = found
        branches = [follow(branch.jaxpr, given) for branch in params["branches"]]
        return [_joined(results) if index is None else _APART for results in zip(*branches, strict=True)]
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    jaxpr = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    return follow(jaxpr, found) if isinstance(jaxpr, core.Jaxpr) and len(jaxpr.invars) == len(found) else None


def _scanned(eqn: core.JaxprEqn, found: Sequence[Of], follow: Follow) -> Sequence[Of]:
    params = eqn.params
    consts, carries = params["num_consts"], params["num_carry"]

    def one_step(of: Of) -> Of:
        if not isinstance(of, Rows):
            return of
        return dataclasses.replace(of, axis=of.axis - 1) if of.axis else _APART

    given = [*found[:consts]], [one_step(of) for of in found[consts + carries :]]
    results = _fixed(
        lambda carry: follow(params["jaxpr"].jaxpr, [*given[0], *carry, *given[1]]), found[consts : consts + carries]
    )
    stacked = [dataclasses.replace(y, axis=y.axis + 1) if isinstance(y, Rows) else y for y in results[carries:]]
    return [*results[:carries], *stacked]


def _looped(eqn: core.JaxprEqn, found: Sequence[Of], follow: Follow) -> Sequence[Of]:
    params = eqn.params
    conditions, consts = params["cond_nconsts"], params["body_nconsts"]
    constants, carry = found[conditions : conditions + consts], found[conditions + consts :]
    results = _fixed(lambda carry: follow(params["body_jaxpr"].jaxpr, [*constants, *carry]), carry)
    (asked,) = follow(params["cond_jaxpr"].jaxpr, [*found[:conditions], *results])
    return results if asked is None else [_APART] * len(results)


def _fixed(body: Callable[[Sequence[Of]], list[Of]], carry: Sequence[Of]) -> list[Of]:
    """The body's results for a carry that it leaves as it is."""
    while True:
        results = body(carry)
        after = [_joined([old, new]) for old, new in zip(carry, results, strict=False)]
        if after == list(carry):
            return [*after, *results[len(after) :]]
        carry = after


def broadcastable(rows: Rows, shape: Sequence[int], mask: jax.Array) -> jax.Array:
    """A mask of examples as one of `rows`, broadcastable to a value of this shape."""
    along = jnp.tile(jnp.repeat(mask, rows.inner), rows.outer)
    return along.reshape([-1 if axis == rows.axis else 1 for axis in range(len(shape))])
