"""NNX modules and Linen modules as one thing: a definition that does not change, and collections of arrays that do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxnorm import _checks as check
from jaxnorm._typing import Array, PRNGKeyArray, PyTree


class Collections(NamedTuple):
    """A model's arrays, by what a training step does with them. Nested dicts, keyed as the model is."""

    params: PyTree  # differentiated: nnx.Param, Linen's "params"
    batch_stats: PyTree  # running statistics: nnx.BatchStat, Linen's "batch_stats"
    variables: PyTree  # all other variables: carried, and updated by the forward pass
    streams: PyTree  # NNX's random streams: re-keyed for each step, never advanced


class NnxDefinition:
    """What stays of an NNX module when its arrays are taken out: its `nnx.GraphDef`.

    Hashed once, since it is compared at every call of a compiled step.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.graphdef = nnx.split(model)[0]
        self._hash = hash(self.graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, NnxDefinition) and self._hash == other._hash and self.graphdef == other.graphdef
        )

    def build(self, collections: Collections, key: PRNGKeyArray | None) -> Any:
        """The model a loss function calls; its randomness is a function of `key` alone."""
        streams = collections.streams if key is None else _rekey(collections.streams, key)
        return self.rebuild(collections._replace(streams=streams))

    def collect(self, model: Any) -> Collections:
        """The arrays of a model that `build` made, after it has been called."""
        filters = (nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Intermediate, ...)
        states: Any = nnx.split(model, *filters)[1:]
        params, batch_stats, streams, _, variables = states
        return Collections(*map(nnx.to_pure_dict, (params, batch_stats, variables, streams)))

    def rebuild(self, collections: Collections) -> nnx.Module:
        """The model as the user gave it, with these arrays."""
        return nnx.merge(self.graphdef, *collections)


class LinenDefinition:
    """A Linen module. A loss function gets it bound to its variables, callable as an NNX module is."""

    def __init__(self, module: linen.Module) -> None:
        self.module = module

    def __hash__(self) -> int:
        return hash(self.module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinenDefinition) and self.module == other.module

    def sort(self, variables: Any) -> Collections:
        """Linen's variables by what a training step does with them; intermediates are left out."""
        others = {name: variables[name] for name in variables if name not in ("params", "batch_stats")}
        others.pop("intermediates", None)
        return Collections(variables["params"], variables.get("batch_stats", {}), others, {})

    def build(self, collections: Collections, key: PRNGKeyArray | None) -> Any:
        """The module bound to its variables; its randomness is a function of `key` alone."""
        variables = self._variables(collections)
        mutable = [name for name in variables if name != "params"]
        # Linen draws from the stream "params" where a stream of the asked name is missing, so one key serves all.
        return self.module.bind(variables, rngs=None if key is None else {"params": key}, mutable=mutable)

    def collect(self, model: Any) -> Collections:
        """The arrays of a bound module, after it has been called."""
        return self.sort(model.variables)

    def rebuild(self, collections: Collections) -> tuple[linen.Module, dict[str, Any]]:
        """The module and its variables, as the user gave them."""
        return self.module, self._variables(collections)

    def _variables(self, collections: Collections) -> dict[str, Any]:
        variables = {"params": collections.params, **collections.variables}
        return {**variables, "batch_stats": collections.batch_stats} if collections.batch_stats else variables


Definition = NnxDefinition | LinenDefinition


def take_apart(model: Any) -> tuple[Definition, Collections]:
    """A model's definition and its arrays. `model` is an `nnx.Module`, or Linen's `(module, variables)`."""
    definition: Definition
    if isinstance(model, nnx.Module):
        definition = NnxDefinition(model)
        collections = definition.collect(model)
    elif isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module):
        module, variables = model
        if "params" not in variables:
            raise ValueError(f'Linen variables have a "params" collection; these have {sorted(variables)}')
        linen_definition = LinenDefinition(module)
        definition, collections = linen_definition, linen_definition.sort(variables)
    else:
        hint = ": import it first, interop.from_torch(module, example)" if check.torch_object(model) else ""
        raise TypeError(
            f"model: expected an nnx.Module or Linen's (module, variables); got {type(model).__name__}{hint}"
        )
    return definition, jax.tree.map(jnp.asarray, collections)


def _rekey(streams: PyTree, key: PRNGKeyArray) -> PyTree:
    """Every stream with a key of its own drawn from `key`; counters as they were."""
    leaves, structure = jax.tree.flatten(streams)
    return jax.tree.unflatten(structure, [_like(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)])


def _like(x: Array, key: PRNGKeyArray) -> Array:
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    # A stream may hold several keys (nnx.split_rngs), and of another implementation than the given key's.
    bits = jax.random.bits(key, (*x.shape, *jax.random.key_data(x).shape[x.ndim :]), jnp.uint32)
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
