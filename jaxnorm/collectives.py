"""What replicas tell one another: gather and sum over a named axis, in every way to be parallel.

JAX's collectives differ in what they admit (read in `jax/_src/lax/parallel.py`, JAX 0.10):

| context                     | `axis_index_groups`                 | a gathered value counts as replicated if   |
|-----------------------------|-------------------------------------|--------------------------------------------|
| `pmap`, `shard_map`         | `all_gather`, `psum`                | always                                     |
| `shard_map`, check_vma=True | `all_gather` only; `psum` refuses   | gathered with `to="invarying"` (no groups) |
| `vmap(axis_name=...)`       | refused by both                     | always                                     |

The functions here admit groups in all three and ask XLA for one collective each.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from jaxnorm._typing import Array, Shaped

AxisName = Hashable | tuple[Hashable, ...]
Groups = tuple[tuple[int, ...], ...]


# The axis name under which the parts of a globally viewed batch run as replicas.
GLOBAL_VIEW = "jaxnorm: parts of the global batch"


def axis_size(axis_name: AxisName) -> int:
    """The number of replicas along `axis_name`.

    Raises:
        NameError: if the axis is not bound here, with what to do about it.
    """
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
    groups = tuple(tuple(int(index) for index in group) for group in axis_index_groups)
    indices = sorted(index for group in groups for index in group)
    if indices != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"axis_index_groups must put each of the replicas 0..{size - 1} into exactly one group, all groups of one "
            f"size; got {axis_index_groups!r}"
        )
    return None if len(groups) == 1 else groups


def gather_replicas(
    x: Shaped[Array, "..."], axis_name: AxisName, groups: Groups | None
) -> Shaped[Array, "replicas ..."]:
    """The arrays of all replicas of this replica's group, stacked along a new first axis: one all-gather."""
    if _alone(x, axis_name):
        return x[None]
    if _is_mesh_axis(axis_name):
        if groups is not None:
            return lax.all_gather(x, axis_name, axis_index_groups=groups)
        return lax.all_gather(x, axis_name, to="invarying")
    gathered = x[None]
    for axis in reversed(_axes(axis_name)):  # one by one: vmap does not gather over several axes
        gathered = lax.all_gather(gathered, axis)
        gathered = gathered.reshape(-1, *x.shape)
    if axis_name == GLOBAL_VIEW:
        gathered = _replicated(gathered, like=x)
    return gathered if groups is None else gathered[_own_group(axis_name, groups)]


def sum_replicas(x: Shaped[Array, "..."], axis_name: AxisName, groups: Groups | None) -> Shaped[Array, "..."]:
    """The sum over this replica's group: one all-reduce, which transposes to one all-reduce.

    Where `lax.psum` refuses groups it is an all-gather and a local sum, which transposes to one reduce-scatter.
    """
    if _alone(x, axis_name):
        return x
    if groups is None:
        return lax.psum(x, axis_name)
    if _is_mesh_axis(axis_name):
        try:
            return lax.psum(x, axis_name, axis_index_groups=groups)
        except NotImplementedError:  # shard_map with check_vma=True
            pass
    return gather_replicas(x, axis_name, groups).sum(0)


def global_view_replicas(x: Shaped[Array, "..."], batch_axis: int) -> int:
    """How many parts a batch that `jit` sees whole is cut into, so that no part spans two devices.

    The mesh is part of a traced array's type, its partition under automatic sharding is not: there each device of the
    mesh counts, which at worst cuts a device's part in several.
    """
    sharding = jax.typeof(x).sharding
    automatic = [axis for axis, kind in _axis_types(sharding.mesh).items() if kind == AxisType.Auto]
    devices = math.prod(sharding.mesh.shape[axis] for axis in automatic)
    return math.gcd(devices, x.shape[batch_axis])


def under_automatic_sharding(f: Callable[..., Any], x: Shaped[Array, "..."]) -> Callable[..., Any]:
    """`f(x, ...) -> (array like x, replicated arrays)` with the mesh's explicit axes made automatic while it runs.

    In explicit sharding every intermediate shape must have a partition of its own; inside the operation XLA decides.
    """
    sharding = jax.typeof(x).sharding
    explicit = tuple(axis for axis, kind in _axis_types(sharding.mesh).items() if kind == AxisType.Explicit)
    if not explicit:
        return f
    out = (sharding, NamedSharding(sharding.mesh, PartitionSpec()))
    return lambda *args: auto_axes(f, axes=explicit, out_sharding=out)(*args)


def _axis_types(mesh: Any) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _replicated(gathered: Shaped[Array, "..."], like: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`gathered` on every device, which makes XLA gather the parts once instead of reducing over them twice."""
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty or AxisType.Auto not in mesh.axis_types:
        return gathered
    spec = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (gathered.ndim - 1))
    return lax.with_sharding_constraint(gathered, NamedSharding(mesh, spec))


def _axes(axis_name: AxisName) -> tuple[Hashable, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _is_mesh_axis(axis_name: AxisName) -> bool:
    """Whether the axis comes from `shard_map` or `pmap` (a `shard_map` itself since JAX 0.8) and not from `vmap`."""
    return set(_axes(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def _alone(x: Shaped[Array, "..."], axis_name: AxisName) -> bool:
    """Whether there is nobody to tell. (With check_vma=True a collective of one still makes a value replicated.)"""
    kind: Any = jax.typeof(x)
    varying = kind.vma if hasattr(kind, "vma") else kind.mat.varying  # JAX 0.10 renamed it
    return axis_size(axis_name) == 1 and not varying & set(_axes(axis_name))


def _own_group(axis_name: AxisName, groups: Groups) -> Shaped[Array, " replicas"]:
    members = np.empty((sum(map(len, groups)), len(groups[0])), np.int32)
    for group in groups:
        members[list(group)] = group
    return jnp.asarray(members)[lax.axis_index(axis_name)]
