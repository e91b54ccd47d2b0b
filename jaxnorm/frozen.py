"""convert_frozen_batchnorm and its inverse: a model's BatchNorm layers with everything about them fixed.

detectron2's `FrozenBatchNorm2d.convert_frozen_batchnorm` (detectron2/layers/batch_norm.py) for Flax.
"""

from typing import Any

from flax import linen, nnx

import jaxnorm.nnx
from jaxnorm.nnx_frozen import Frozen, FrozenBatchNorm
from jaxnorm.sync import map_layers, rebuilt

# Whose call in eval mode is FrozenBatchNorm's.
_KNOWN = {cls.__call__ for cls in (nnx.BatchNorm, jaxnorm.nnx.BatchNorm, jaxnorm.nnx.BatchRenorm)}


def convert_frozen_batchnorm(model: Any) -> Any:
    """The model with every BatchNorm layer frozen: its scale and bias do not train, its statistics do not move.

    The model comes back as a copy whose BatchNorm layers are `jaxnorm.nnx.FrozenBatchNorm`. It shares its other
    variables with `model`, and the statistics; scale and bias are new variables (`interop.Frozen`, with the values
    of now). So do imported models: state dicts have the same entries before and after, `model.train()` leaves the
    layers frozen, and `interop.save` keeps them so. Make optimizers and `TrainState`s afterwards. Parameters of other
    layers train on: `interop.freeze` freezes these.

    Layers stay shared where they were. Converting again changes nothing. `interop.unfreeze` lets their scale and bias
    train again, and leaves the statistics fixed.

    **Arguments:**

    - `model`: an NNX module, also one of `interop.from_torch`.

    **Returns:** the converted copy.

    **Raises:** `TypeError` if `model` is no NNX module, and for a BatchNorm layer with a `__call__` of its own, whose
    arithmetic is not known; it is named.

    **Warns:** `UserWarning` if the model has no BatchNorm layer.
    """
    _refuse_linen("convert_frozen_batchnorm", model)
    turned: dict[int, Frozen] = {}

    def freeze(layer: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(layer, FrozenBatchNorm):
            return layer
        kind = type(layer)
        if kind.__call__ not in _KNOWN:
            raise TypeError(
                f"model: the layer {'.'.join(map(str, path))!r} is a {kind.__name__}, with a __call__ of its own: what "
                "it would be when frozen is not known. Set its use_running_average to True, and freeze its parameters "
                "by interop.freeze"
            )
        if kind is nnx.BatchNorm:
            layer = rebuilt(jaxnorm.nnx.BatchNorm, layer, correction=0)
        found = {name: getattr(layer, name) for name in ("scale", "bias")}
        before = tuple((name, type(variable)) for name, variable in found.items() if variable is not None)
        for name, variable in found.items():
            if variable is not None and not isinstance(variable, Frozen):
                made = Frozen(variable.get_value(), **variable.get_metadata())
                setattr(layer, name, turned.setdefault(id(variable), made))
        layer.__class__ = FrozenBatchNorm  # of a copy, which keeps all that the layer had for the way back
        layer.before_freeze = kind, before
        return layer

    return map_layers(freeze, model, frozen=True)


def revert_frozen_batchnorm(model: Any) -> Any:
    """The inverse of `convert_frozen_batchnorm`: its layers as they were before, with the values of now.

    Scale and bias that were parameters are parameters again. A layer's mode is the one that `model.train()` or
    `model.eval()` set last. Layers that were built as `jaxnorm.nnx.FrozenBatchNorm` stay.

    **Arguments:**

    - `model`: an NNX module.

    **Returns:** the model with its layers unfrozen, a copy.

    **Raises:** `TypeError` if `model` is no NNX module.

    **Warns:** `UserWarning` if it has no BatchNorm layer.
    """
    _refuse_linen("revert_frozen_batchnorm", model)
    turned: dict[int, nnx.Variable[Any]] = {}

    def thaw(layer: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(layer, FrozenBatchNorm) or layer.before_freeze is None:
            return layer
        kind, before = layer.before_freeze
        for name, cls in before:
            variable = getattr(layer, name)
            if cls is not type(variable):
                made = cls(variable.get_value(), **variable.get_metadata())
                setattr(layer, name, turned.setdefault(id(variable), made))
        del layer.before_freeze
        layer.__class__ = jaxnorm.nnx.BatchNorm if kind is nnx.BatchNorm else kind
        return rebuilt(kind, layer) if kind is nnx.BatchNorm else layer

    return map_layers(thaw, model, frozen=True)


def _refuse_linen(name: str, model: Any) -> None:
    if isinstance(model, linen.Module):
        raise TypeError(
            f"model: jaxnorm.{name} is for NNX modules; got the Linen module {type(model).__name__}. A Linen module "
            "says which layers it has: build it with jaxnorm.linen.FrozenBatchNorm, and give it the weights by "
            "interop.load_state_dict"
        )
