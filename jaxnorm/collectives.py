"""What replicas tell one another: the sum over a named axis, or over parts of a batch, in every way to be parallel.

JAX's collectives differ in what they admit (read in `jax/_src/lax/parallel.py`, JAX 0.10):

| context                     | `axis_index_groups`                 |
|-----------------------------|-------------------------------------|
| `pmap`, `shard_map`         | `all_gather`, `psum`                |
| `shard_map`, check_vma=True | `all_gather` only; `psum` refuses   |
| `vmap(axis_name=...)`       | refused by both                     |

`Replicas.sum` admits groups in all three, and asks XLA for one collective.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from jaxnorm import _checks as check
from jaxnorm._typing import Array, Shaped

AxisName = Hashable | tuple[Hashable, ...]
Groups = tuple[tuple[int, ...], ...]


def axis_size(axis_name: AxisName) -> int:
    """The number of replicas along `axis_name`.

    Raises:
        TypeError: for what is no name of an axis.
        NameError: if the axis is not bound here, with what to do about it.
    """
    check.axis_name(axis_name)
    try:
        return int(lax.axis_size(axis_name))
    except NameError as error:
        raise NameError(
            f"axis name {axis_name!r} is not bound here: run the model inside jax.pmap(..., axis_name={axis_name!r}), "
            f"jax.shard_map over a mesh with an axis {axis_name!r}, or jax.vmap(..., axis_name={axis_name!r}); under a "
            "plain jit with sharded arrays statistics are global already and axis_name must be None "
            "(jaxnorm.revert_sync_batchnorm takes it off a model)"
        ) from error


def canonical_groups(axis_index_groups: Sequence[Sequence[int]] | None, size: int) -> Groups | None:
    """`axis_index_groups` as a tuple of tuples, checked to be a partition of `range(size)`; None for one group of all.

    Raises:
        ValueError: if an index is missing, repeated or out of range, or the groups differ in size.
    """
    if axis_index_groups is None:
        return None
    groups = check.groups(axis_index_groups)
    assert groups is not None
    indices = sorted(index for group in groups for index in group)
    if indices != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"axis_index_groups must put each of the replicas 0..{size - 1} into exactly one group, all groups of one "
            f"size; got {axis_index_groups!r}"
        )
    return None if len(groups) == 1 else groups


class Replicas(NamedTuple):
    """Who shares statistics: the replicas of an axis name, or equal parts of the batch, all or in groups; or nobody."""

    axis_name: AxisName | None = None
    groups: Groups | None = None
    parts_axis: int | None = None  # the axis of the arrays along which the parts of a batch lie

    @property
    def size(self) -> int:
        """How many share with one another."""
        if self.groups is not None:
            return len(self.groups[0])
        return 1 if self.axis_name is None else axis_size(self.axis_name)

    def sum(self, *arrays: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
        """Each array's sum over those who share: one collective, whose transpose is one."""
        if self.axis_name is not None:
            return _together(lambda x: _sum_over_axis(x, self.axis_name, self.groups), arrays)
        if self.groups is not None:
            return tuple(_sum_over_parts(x, self.parts_axis, self.groups) for x in arrays)
        return arrays

    def know(self, x: Any) -> bool:
        """Whether all of them are certain to hold the same value of `x`.

        A single program does (`jit`), and `shard_map` with check_vma=True knows which values vary. Under `pmap`, `vmap`
        and check_vma=False each replica has a value of its own, whatever it was meant to be.
        """
        if self.axis_name is None:
            return True
        return _is_checked(self.axis_name) and not _varying(x) & set(_axes(self.axis_name))


def under_automatic_sharding(f: Callable[..., Any], x: Shaped[Array, "..."]) -> Callable[..., Any]:
    """`f(x, ...) -> (array like x, replicated arrays)` with the mesh's explicit axes made automatic while it runs.

    In explicit sharding every intermediate shape must have a partition of its own; inside `f` XLA decides.
    """
    sharding = jax.typeof(x).sharding
    types = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = tuple(axis for axis, kind in types if kind == AxisType.Explicit)
    if not explicit:
        return f
    out = (sharding, NamedSharding(sharding.mesh, PartitionSpec()))
    return lambda *args: auto_axes(f, axes=explicit, out_sharding=out)(*args)


def _together(add: Any, arrays: tuple[Shaped[Array, "..."], ...]) -> tuple[Shaped[Array, "..."], ...]:
    """`add` of all arrays at once: real and imaginary parts side by side, in one array."""
    real = [part for x in arrays for part in ((x,) if jnp.isrealobj(x) else (x.real, x.imag))]
    added = add(jnp.concatenate([part.reshape(-1) for part in real]))
    ends = np.cumsum([part.size for part in real])[:-1]
    back = iter(part.reshape(x.shape) for part, x in zip(jnp.split(added, ends), real, strict=True))
    return tuple(next(back) if jnp.isrealobj(x) else lax.complex(next(back), next(back)) for x in arrays)


def _sum_over_axis(x: Shaped[Array, " n"], axis_name: AxisName | None, groups: Groups | None) -> Shaped[Array, " n"]:
    """Where `lax.psum` refuses groups it is an all-gather and a local sum, which transposes to one reduce-scatter."""
    if axis_size(axis_name) == 1 and not _varying(x) & set(_axes(axis_name)):
        return x  # with check_vma=True a collective of one still makes a value replicated
    if groups is None:
        return lax.psum(x, axis_name)
    if set(_axes(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes):  # shard_map or pmap, not vmap
        try:
            return lax.psum(x, axis_name, axis_index_groups=groups)
        except NotImplementedError:  # check_vma=True
            return lax.all_gather(x, axis_name, axis_index_groups=groups).sum(0)
    gathered = x[None]
    for axis in reversed(_axes(axis_name)):  # one by one: vmap does not gather over several axes
        gathered = lax.all_gather(gathered, axis)
        gathered = gathered.reshape(-1, *x.shape)
    return gathered[jnp.asarray(_members(groups))[lax.axis_index(axis_name)]].sum(0)


def _sum_over_parts(x: Shaped[Array, "..."], axis: int | None, groups: Groups) -> Shaped[Array, "..."]:
    members = _members(groups)
    return sum((jnp.take(x, members[:, i], axis) for i in range(members.shape[1])), jnp.zeros_like(x))


def _members(groups: Groups) -> np.ndarray:
    """For each replica those of its group."""
    members = np.empty((sum(map(len, groups)), len(groups[0])), np.int32)
    for group in groups:
        members[list(group)] = group
    return members


def _axes(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _varying(x: Any) -> set[Hashable]:
    """The mesh axes over which `x` may vary; none where that is not kept track of."""
    kind: Any = jax.typeof(x)
    return set(kind.vma if hasattr(kind, "vma") else kind.mat.varying)  # JAX 0.10 renamed it


def _is_checked(axis_name: AxisName) -> bool:
    """Whether JAX keeps track of what varies over the axis: the index along it does."""
    axes = _axes(axis_name)
    if not set(axes) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        return False
    return set(axes) <= _varying(lax.axis_index(axis_name))
