"""Values that every process has, as arrays over the devices of all processes; and back."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxnorm._typing import PyTree


def share(tree: PyTree, sharding: Sharding) -> PyTree:
    """The tree on the devices of `sharding`, which may belong to several processes.

    Arrays of this process alone must hold the same values in all processes; no one says whose would count otherwise.

    **Raises:** `ValueError` naming the arrays that differ between processes.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    leaves, structure = jax.tree.flatten(tree)
    own = [i for i, x in enumerate(leaves) if is_own(x)]
    refuse_different({name: x for name, x in named_leaves(tree).items() if is_own(x)})
    for i, x in enumerate(leaves):
        leaves[i] = _shared(x, sharding) if i in set(own) else jax.device_put(x, sharding)
    return jax.tree.unflatten(structure, leaves)


def place_like(tree: PyTree, model: PyTree) -> PyTree:
    """Arrays of this process alone, the same in all processes, where the arrays of `model` are."""

    def place(x: Any, y: Any) -> Any:
        return jax.device_put(x, y.sharding) if y.sharding.is_fully_addressable else _shared(x, y.sharding)

    return jax.tree.map(place, tree, model)


def is_own(x: Any) -> bool:
    """Whether no other process knows of this array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def own_copy(tree: PyTree) -> PyTree:
    """Arrays that all devices of all processes hold whole, as arrays of one device of this process."""
    return jax.tree.map(lambda x: x if is_own(x) else x.addressable_data(0), tree)


def computed(function: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """`function(tree)`, where arrays may lie on the devices of several processes: the same in each of them."""
    spread = [x for x in jax.tree.leaves(tree) if not is_own(x)]
    if not spread:
        return function(tree)
    return own_copy(_everywhere(function, NamedSharding(spread[0].sharding.mesh, PartitionSpec()))(tree))


@functools.lru_cache(maxsize=32)
def _everywhere(function: Callable[[PyTree], PyTree], sharding: NamedSharding) -> Any:
    return jax.jit(function, out_shardings=sharding)


def refuse_different(arrays: dict[str, Any]) -> None:
    """One message between the processes, however many arrays there are."""
    if jax.process_count() == 1 or not arrays:
        return
    from jax.experimental import multihost_utils

    sums = np.array([zlib.crc32(np.ascontiguousarray(host(x)).tobytes()) for x in arrays.values()], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(sums))
    different = [name for name, same in zip(arrays, (everyone == everyone[0]).all(0), strict=True) if not same]
    if different:
        raise ValueError(
            "every process must come with the same values, and these differ between processes: "
            f"{', '.join(different)}. Start all of them from one seed, or from one checkpoint."
        )


def host(x: Any) -> np.ndarray:
    """An array in the host's memory; a random key as its words."""
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its path, `params/conv1/kernel`."""
    leaves: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(
                f"two leaves have the one name {name}: {jax.tree_util.keystr(paths[name])} and "
                f"{jax.tree_util.keystr(path)}. Rename one of them."
            )
        leaves[name], paths[name] = x, path
    return leaves


def _shared(x: Any, sharding: Sharding) -> jax.Array:
    value = host(x)
    array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(x)) if is_key(x) else array
