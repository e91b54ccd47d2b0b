"""A state on many devices: a copy for each, and back to one, with care where the copies differ."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnorm import _checks as check
from jaxnorm._typing import Array, PyTree
from jaxnorm.global_arrays import computed, is_own, own_copy, share


def replicate(tree: PyTree, devices: Sequence[jax.Device] | None = None, axis_name: str = "batch") -> PyTree:
    """A copy for each device, along a new first axis: what `data_parallel` takes under pmap and shard_map.

    An average that an `Ema` keeps elsewhere (`Ema.device`) stays there, once.

    **Arguments:**

    - `tree`: any tree of arrays, a `TrainState` for instance.
    - `devices`: by default those of all processes.
    - `axis_name`: the name of the mesh axis that the copies lie along.

    **Returns:** the tree, each array with an axis of replicas in front, one row on each device.

    **Raises:**

    - `TypeError`: for what is no tree of arrays, list of devices or name of an axis.
    - `ValueError`: for an empty list of devices.
    """
    check.arrays("tree", tree)
    check.instance("axis_name", axis_name, str, "the name of an axis")
    devices = check.devices(devices) or jax.devices()
    mesh = Mesh(np.array(devices), (axis_name,))
    tree, put_back = _without_placed_ema(tree)
    everywhere = share(tree, NamedSharding(mesh, PartitionSpec()))
    return put_back(jax.tree.map(_stack(NamedSharding(mesh, PartitionSpec(axis_name))), everywhere))


@functools.lru_cache(maxsize=8)
def _stack(sharding: NamedSharding) -> Any:
    # For one array, not for the tree: most arrays of a model have a shape in common, and XLA compiles each shape once.
    return jax.jit(lambda x: jnp.broadcast_to(x, (sharding.mesh.size, *x.shape)), out_shardings=sharding)


def unreplicate(tree: PyTree, *, merge: bool = False, rank: int | None = None) -> PyTree:
    """One state from the copies, on one device; the inverse of `replicate`.

    Copies that differ are an error that names the layers, unless you say what to do, by `merge` or `rank`.

    **Arguments:**

    - `tree`: a replicated tree, a `TrainState` for instance.
    - `merge`: pools the running statistics into those of all the replicas' examples together, of which each replica has
      seen equally many: the mean of the means, and the mean of the variances plus the variance of the means. Anything
      else that differs is still an error.
    - `rank`: takes the copy of that replica.

    **Returns:** the tree without the axis of replicas.

    **Raises:**

    - `TypeError`: for what is no tree of arrays.
    - `ValueError`: naming the layers that differ, and by how much; for a rank that no replica has; for arrays without
      an axis of replicas; for `merge` and `rank` together.
    """
    check.arrays("tree", tree)
    check.flag("merge", merge)
    rank = None if rank is None else check.whole("rank", rank)
    if merge and rank is not None:
        raise ValueError("give merge=True or rank=, not both")
    tree, put_back = _without_placed_ema(tree)
    if rank is not None:
        return put_back(_take(tree, rank))
    different = _differences(tree)
    if not different:
        return put_back(_take(tree, None))

    pooled = _statistics_pairs(tree) if merge else {}
    refused = {path: by for path, by in different.items() if path not in pooled}
    if refused:
        named = "\n".join(f"  {layer}: {by:.3g}" for layer, by in _by_layer(refused).items())
        hint = (
            "merge=True pools running statistics only, and these are not: the replicas went different ways (are the "
            "gradients reduced over all of them?). rank=0 takes the first replica's."
            if merge
            else "Synchronise the statistics (convert_sync_batchnorm), or choose: unreplicate(state, merge=True) "
            "pools running statistics, rank=0 takes the first replica's."
        )
        raise ValueError(f"the replicas differ (largest difference by layer):\n{named}\n{hint}")

    merged = {}
    for mean, var in {pooled[path] for path in different}:
        merged[mean], merged[var] = computed(_pool, (_leaf(tree, mean), _leaf(tree, var)))

    def choose(path: Path, x: Any) -> Any:
        return jax.device_put(merged[path], getattr(x, "sharding", None)) if path in merged else x

    return put_back(jax.tree_util.tree_map_with_path(choose, _take(tree, None)))


def replica_divergence(tree: PyTree) -> dict[str, float]:
    """The largest difference between replicas in each layer that has one: whether the replicas still hold the same
    state.

    A nan against a number counts as an infinite difference, a nan against a nan as none.

    **Arguments:**

    - `tree`: a replicated tree, a `TrainState` for instance.

    **Returns:** the largest absolute difference to the first replica by layer; empty when all copies are equal. Layers
    are named by their path in the model; entries of the optimizer and of the EMA by their path in the state.

    **Raises:**

    - `TypeError`: for what is no tree of arrays.
    - `ValueError`: for arrays without an axis of replicas.
    """
    check.arrays("tree", tree)
    return _by_layer(_differences(_without_placed_ema(tree)[0]))


def own_values(state: PyTree) -> PyTree:
    """A `TrainState` over several processes as this process has it, on one of its devices."""
    if jax.process_count() == 1:
        return state
    return _take(state, None) if state.step.ndim else own_copy(state)


def _without_placed_ema(tree: PyTree) -> tuple[PyTree, Any]:
    ema = getattr(tree, "ema", None)
    if ema is None or getattr(ema, "device", None) is None:
        return tree, lambda t: t
    kept = tree.ema_state
    return tree.replace(ema_state=None), lambda t: t.replace(ema_state=kept)


Path = tuple[Any, ...]


def _differences(tree: PyTree) -> dict[Path, float]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    _refuse_single(tree)
    # Arrays of one kind together: compiling a reduction for each of a thousand arrays takes longer than training does.
    alike: dict[Any, list[Any]] = {}
    for path, x in leaves:
        alike.setdefault((x.shape, x.dtype, getattr(x, "sharding", None)), []).append((path, x))
    found: dict[Path, float] = {}
    for group in alike.values():  # waiting for each: programs that communicate must not overtake one another
        by = np.asarray(computed(_largest_differences, [x for _, x in group]))
        found |= {path: float(b) for (path, _), b in zip(group, by, strict=True)}
    return {path: found[path] for path, _ in leaves if found[path] > 0}


def _refuse_single(tree: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = [path for path, x in leaves if not np.ndim(x)]
    if flat:
        raise ValueError(
            f"tree is not a replicated one: {jax.tree_util.keystr(flat[0]) or 'it'} has no axis of replicas; "
            "see replicate"
        )
    sizes = {np.shape(x)[0] for _, x in leaves}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"tree is not a replicated one: its arrays have first axes of lengths {sorted(sizes)}")


@jax.jit
def _largest_differences(arrays: list[Array]) -> Array:
    return jax.vmap(_largest_difference, in_axes=1)(jnp.stack(arrays, 1))


def _largest_difference(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    first = x[:1]
    same = x == first
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    if jnp.issubdtype(x.dtype, jnp.floating):  # bit for bit: XLA takes subnormal numbers for zero
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        same = (bits == bits[:1]) | (jnp.isnan(x) & jnp.isnan(first))
    wide = jnp.promote_types(x.dtype, jnp.float32) if floating else jnp.result_type(float)
    by = jnp.abs(x.astype(wide) - first.astype(wide)).astype(jnp.result_type(float))
    by = jnp.where(jnp.isnan(by), jnp.inf, jnp.maximum(by, jnp.finfo(by.dtype).tiny))
    return jnp.max(jnp.where(same, 0, by), initial=0)


def _by_layer(differences: dict[Path, float]) -> dict[str, float]:
    layers: dict[str, float] = {}
    for path, by in differences.items():
        layer = _layer(path)
        layers[layer] = max(by, layers.get(layer, 0.0))
    return layers


def _layer(path: Path) -> str:
    names = [_key(k) for k in path]
    if names[0] in ("params", "batch_stats", "variables", "streams"):
        names = names[1:]
    return ".".join(names[:-1] or names)


def _key(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _statistics_pairs(tree: PyTree) -> dict[Path, tuple[Path, Path]]:
    """For each running mean and variance, the paths of both."""
    pairs = {}
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    for path in paths:
        if "batch_stats" in map(_key, path[:-1]) and _key(path[-1]) == "mean":
            var = next((p for p in paths if p[:-1] == path[:-1] and _key(p[-1]) == "var"), None)
            if var is not None:
                pairs[path] = pairs[var] = (path, var)
    return pairs


def _leaf(tree: PyTree, path: Path) -> Array:
    return next(x for p, x in jax.tree_util.tree_leaves_with_path(tree) if p == path)


def _pool(parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """Mean and variance of a mixture in equal parts: the law of total variance."""
    means, variances = parts
    mean = jnp.mean(means, axis=0)
    return mean, jnp.mean(variances, axis=0) + jnp.mean(jnp.square(means - mean), axis=0)


def _take(tree: PyTree, rank: int | None) -> PyTree:
    """One replica's copy, on the device where it lies, or on one of this process; any replica's if rank is None."""
    _refuse_single(tree)
    sizes = {x.shape[0] for x in jax.tree.leaves(tree)}
    if rank is not None and sizes and not all(0 <= rank < n for n in sizes):
        raise ValueError(f"rank={rank} is not among the {min(sizes)} replicas")
    if rank is not None and not all(map(is_own, jax.tree.leaves(tree))):
        return computed(_rows, (tree, rank))  # the replica may be another process's: all of them ask for it together
    return jax.tree.map(lambda x: _row(x, rank), tree)


def _rows(asked: tuple[PyTree, Array]) -> PyTree:
    return jax.tree.map(lambda x: x[asked[1]], asked[0])


def _row(x: Any, rank: int | None) -> Any:
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        rows: Iterable[Any] = x.addressable_shards
        for shard in rows:
            start, stop, _ = shard.index[0].indices(x.shape[0])
            if rank is None or start <= rank < stop:
                return shard.data[0 if rank is None else rank - start]
    return x[rank or 0]
