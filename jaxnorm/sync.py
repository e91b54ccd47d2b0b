"""convert_sync_batchnorm and its inverse: which replicas a model's BatchNorm layers share statistics with.

PyTorch's `torch.nn.SyncBatchNorm.convert_sync_batchnorm` for Flax. Only the sharing changes: parameters, statistics,
momentum, epsilon, dtypes, metadata, shared layers and each layer's own train/eval flag stay as they are.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from flax import linen, nnx

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _checks as check
from jaxnorm.collectives import AxisName


def convert_sync_batchnorm(
    model: Any, axis_name: AxisName, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Any:
    """The model with every BatchNorm layer sharing statistics over the replicas of `axis_name`.

    PyTorch's `torch.nn.SyncBatchNorm.convert_sync_batchnorm` for Flax. Only the sharing changes: parameters,
    statistics, momentum, epsilon, dtypes, metadata, shared layers and each layer's own train/eval flag stay as they
    are. Converting again to the same axis changes nothing.

    **Arguments:**

    - `model`: an NNX or Linen module.
    - `axis_name`: the axis of `pmap`, `shard_map` or `vmap`, or a tuple of axes. Under `jit` with sharded arrays no
      conversion is needed.
    - `axis_index_groups`: groups of replicas that share statistics, `[[0, 1], [2, 3]]`; None for all.

    **Returns:** of an NNX model a copy that shares its variables with `model`, as from `nnx.view`: Flax's BatchNorm
    layers are replaced by `jaxnorm.nnx.BatchNorm` (which keep tracking Flax's biased variance), jaxnorm's own get the
    axis name. Of a Linen model a module that runs the original with its layers synchronised, on the original's
    variables.

    **Raises:**

    - `TypeError`: if `model` is neither, or `axis_name` no name.
    - `ValueError`: for `axis_index_groups` that are no groups.

    **Warns:** `UserWarning` if the model has no BatchNorm layer (a Linen model says so when it is called), and for the
    buffers that stay each replica's own: those that a module names by a method `unshared_statistics()`, as models of
    `interop` do for what forward computes from the batch by its own arithmetic.
    """
    check.axis_name(axis_name)
    groups = check.groups(axis_index_groups)
    if isinstance(model, linen.Module):
        inner = model.inner if isinstance(model, SyncBatchNorm) else model
        return SyncBatchNorm(inner, axis_name, groups)

    def synchronise(layer: Any) -> Any:
        before = getattr(layer, "before_sync", None) or (type(layer), layer.axis_name, layer.axis_index_groups)
        if type(layer) is nnx.BatchNorm:
            layer = rebuilt(jaxnorm.nnx.BatchNorm, layer, correction=0)
        layer.before_sync = before
        layer.axis_name, layer.axis_index_groups = axis_name, groups
        return layer

    mapped = map_layers(lambda layer, _: synchronise(layer), model)
    if unshared := unshared_statistics(model):
        warnings.warn(
            f"not synchronised, since the model moves them by arithmetic of its own: {', '.join(unshared)}. Under an "
            "axis name each replica moves its own; under jit with a sharded batch they are the whole batch's",
            UserWarning,
            stacklevel=2,
        )
    return mapped


def unshared_statistics(model: Any) -> list[str]:
    """What modules say that they keep of a batch beside the statistics of BatchNorm layers, by path."""
    found = []
    for path, module in nnx.iter_graph(model):
        named = getattr(type(module), "unshared_statistics", None)
        if named is not None:
            found += [".".join(map(str, (*path, name))) for name in named(module)]
    return found


def revert_sync_batchnorm(model: Any) -> Any:
    """The inverse of `convert_sync_batchnorm`: every BatchNorm layer as it was before, or with statistics of its own.

    Parameters, statistics and flags are those of the model now. Layers that were built with an axis name, not
    converted, lose it.

    **Arguments:**

    - `model`: an NNX or Linen module.

    **Returns:** of an NNX model a copy that shares its variables with `model`; of a converted Linen model the original
    module, of another one a module that runs it without axis names.

    **Raises:** `TypeError` if `model` is neither an NNX nor a Linen module.

    **Warns:** `UserWarning` if an NNX model has no BatchNorm layer.
    """
    if isinstance(model, linen.Module):
        return model.inner if isinstance(model, SyncBatchNorm) else SyncBatchNorm(model, None, None)

    def revert(layer: Any) -> Any:
        kind, axis, groups = getattr(layer, "before_sync", None) or (type(layer), None, None)
        if kind is nnx.BatchNorm:
            layer = rebuilt(kind, layer)
        else:
            layer.before_sync = None
        layer.axis_name, layer.axis_index_groups = axis, groups
        return layer

    return map_layers(lambda layer, _: revert(layer), model)


class SyncBatchNorm(linen.Module):
    """Runs `inner`, on `inner`'s own variables, with its BatchNorm layers synchronised over `axis_name`.

    Every method of `inner` is at hand: `model.apply(variables, x, method="encode")`.
    """

    inner: linen.Module
    axis_name: AxisName | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None

    def setup(self) -> None:
        linen.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run_method("__call__", *args, **kwargs)

    def run_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`inner`'s method of that name, with synchronised layers."""
        found: list[str] = []
        with linen.intercept_methods(_interceptor(self.axis_name, self.axis_index_groups, found)):
            result = getattr(self.inner, name)(*args, **kwargs)
        if name == "__call__" and not found:
            warnings.warn(f"{type(self.inner).__name__} has no BatchNorm layer to convert", stacklevel=3)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not callable(getattr(type(vars(self).get("inner")), name, None)):
            return super().__getattr__(name)

        def method(module: SyncBatchNorm, *args: Any, **kwargs: Any) -> Any:
            return module.run_method(name, *args, **kwargs)

        return MethodType(method, self)  # bound, since Linen calls methods given by name on a bound copy


def _interceptor(axis_name: AxisName | None, groups: Any, found: list[str]) -> Callable[..., Any]:
    """Runs each Linen BatchNorm layer that shares its statistics otherwise as one that shares them so.

    The paths of the layers go into `found`.
    """

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        frozen = isinstance(layer, jaxnorm.linen.FrozenBatchNorm)
        if frozen or not isinstance(layer, linen.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        found.append("/".join(layer.path))
        if (layer.axis_name, layer.axis_index_groups) == (axis_name, groups):
            return call(*args, **kwargs)
        fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name not in ("parent", "name")}
        kind: Any = type(layer)
        if kind is linen.BatchNorm:
            kind, fields["correction"] = jaxnorm.linen.BatchNorm, 0
        fields |= {"axis_name": axis_name, "axis_index_groups": groups}
        return kind(**fields, parent=layer.scope)(*args, **kwargs)

    return intercept


def map_layers(change: Callable[[Any, tuple[Any, ...]], Any], model: Any, *, frozen: bool = False) -> Any:
    """A copy of the model with what `change(layer, path)` makes of each BatchNorm layer, of frozen ones if wanted.

    Raises:
        TypeError: if `model` is no NNX module.
    """
    if not isinstance(model, nnx.Module):
        hint = ": import it first, interop.from_torch(module, example)" if check.torch_object(model) else ""
        raise TypeError(f"model: expected a flax.nnx.Module or a flax.linen.Module, got {type(model).__name__}{hint}")
    found = 0

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        nonlocal found
        if not isinstance(node, nnx.BatchNorm) or (isinstance(node, jaxnorm.nnx.FrozenBatchNorm) and not frozen):
            return node
        found += 1
        changed = change(node, path)
        if isinstance(changed, jaxnorm.nnx.BatchNorm):
            changed.layer_name = ".".join(map(str, path))  # for errors
        return changed

    mapped = nnx.recursive_map(visit, model)
    if not found and not unshared_statistics(model):
        warnings.warn(f"{type(model).__name__} has no BatchNorm layer to convert", UserWarning, stacklevel=3)
    return mapped


def rebuilt(kind: type[nnx.BatchNorm], layer: nnx.BatchNorm, **changes: Any) -> Any:
    """A layer of another class with the same fields, on the same variables."""
    names = inspect.signature(kind.__init__).parameters
    fields = {name: value for name, value in vars(layer).items() if name in names}
    made = kind(**fields, **changes, rngs=nnx.Rngs(0))
    for name in ("mean", "var", "scale", "bias"):
        setattr(made, name, getattr(layer, name))
    return made
