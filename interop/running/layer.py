"""A layer inside of an imported model: its place in the tree, and a call of it alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import interop.ops
from interop.ops.dtypes import default_float_of
from interop.ops.layout import plain
from interop.program.nodes import Node, Program, every_node, value_names
from interop.program.recorded import Recorded
from interop.program.regions import Region, entry_below, regions, state_read
from interop.running.evaluate import Context, computing, evaluate, resolved
from interop.running.places import module_at, variable
from interop.running.shapes import sizes_from
from jaxnorm.nnx_batch_norm import write


@dataclasses.dataclass(frozen=True)
class Place:
    """Which layer of which imported model."""

    recorded: Recorded
    path: str


class Layer(nnx.Module):
    """A layer of an imported model: its variables and layers under PyTorch's names.

        features = model.layer4[1].conv2(x)

    It is called with what the PyTorch layer was called with, and gives what that returned; in the model's mode, and by
    the record of its first call. `rngs` is what it draws from, where it draws. Children whose names are numbers go by
    index too, from the end as well.

    Raises:
        ValueError: where the record does not say how to: the layer is not called in this mode, or does nothing there;
            it takes or returns several values (which of its arguments they are is not recorded: call the layers inside
            of it); it reads what belongs to other layers.
    """

    def __init__(self, place: Place | None = None, *, training: bool = False):
        self._interop_place = place
        self.deterministic = not training

    def __getitem__(self, key: int | str) -> Any:
        """The child called `key`.

        Raises:
            IndexError, KeyError: where there is none.
        """
        children = vars(self)
        if isinstance(key, int) and not isinstance(key, bool):
            count = sum(name.isdecimal() for name in children)
            name = str(key + count if key < 0 else key)
            if name not in children:
                raise IndexError(f"{self._described()} has {count} layers called by numbers, and none at {key}")
            return children[name]
        if not isinstance(key, str) or not isinstance(children.get(key), nnx.Module | nnx.Variable):
            names = [name for name, child in children.items() if isinstance(child, nnx.Module | nnx.Variable)]
            raise KeyError(f"{self._described()} has no {key!r}; it has {', '.join(names) or 'nothing inside'}")
        return children[key]

    def __call__(self, *args: Any, rngs: nnx.Rngs | None = None) -> Any:
        place = self._interop_place
        if place is None:
            raise ValueError("this layer belongs to no imported model")
        model = place.recorded.model
        mode = "eval" if self.deterministic else "train"
        calls = regions(getattr(model, mode), place.path)
        if not calls:
            raise ValueError(
                f"{self._described()} does nothing in {mode} mode that was recorded: it is not called there, or gives "
                "what it takes"
            )
        call = calls[0]
        with default_float_of(model.default_dtype):
            return _run(self, place, mode, call, args, rngs)

    def __repr__(self) -> str:
        """The tree: names and shapes, no values."""
        return "\n".join(tree(self, type(self).__name__))

    def __str__(self) -> str:
        return repr(self)

    def _described(self) -> str:
        place = self._interop_place
        return "the layer" if place is None else f"{place.path or 'the model'!r} of {place.recorded.model.name}"


def _run(layer: Layer, place: Place, mode: str, call: Region, args: tuple[Any, ...], rngs: nnx.Rngs | None) -> Any:
    described = layer._described()
    if len(call.inputs) > 1 or len(call.outputs) != 1:
        raise ValueError(
            f"{described} reads {len(call.inputs)} values from around it and gives {len(call.outputs)}; which of its "
            "arguments and results each of them is was not recorded. Call the layers inside of it, or the model"
        )
    if len(args) != len(call.inputs):
        raise TypeError(f"{described} takes {len(call.inputs)} array, found {len(args)}")
    dtype = place.recorded.compute_dtype
    model = place.recorded.model
    program: Program = getattr(model, mode)
    values: dict[str, Any] = {
        name: computing(_array(arg, described), dtype) for name, arg in zip(call.inputs, args, strict=True)
    }
    shapes = {name: x.shape for name, x in values.items()}
    values |= sizes_from(model, mode, call, shapes)
    outside = sorted(name for name in state_read(program, call) if entry_below(model, name, place.path) is None)
    if outside:
        raise ValueError(f"{described} reads {', '.join(dict.fromkeys(outside))}, which lies outside of it")

    def state(name: str) -> jax.Array:
        return computing(variable(layer, str(entry_below(model, name, place.path)))[...], dtype)

    def inside(path: str) -> Any:
        return module_at(layer, path.removeprefix(f"{place.path}.") if place.path else path)

    nodes = [program.nodes[index] for index in call.nodes]
    if rngs is None and any(draws(node, model.torch) for node in nodes):
        raise ValueError(f"{described} draws random numbers: give it rngs=, a flax.nnx.Rngs")
    key: Callable[[], jax.Array] = rngs.dropout if rngs is not None else functools.partial(jax.random.key, 0)
    context = Context(program, state, inside, key, dtype, model.torch, masks={})
    for node in nodes:
        values[node.name] = evaluate(node, values, context)
    for name, value in program.updates.items():
        below = entry_below(model, name, place.path)
        if below is not None and all(part in values for part in value_names(value)):
            target = variable(layer, below)
            write(target, plain(resolved(value, values, context)).astype(target[...].dtype))
    return plain(values[call.outputs[0]])


def tree(layer: nnx.Module, title: str, depth: int = 0) -> Iterator[str]:
    """A line for each layer of an imported model: its name, its arrays' shapes, the settings of BatchNorm."""
    own, below = [], []
    for name, child in vars(layer).items():
        if isinstance(child, nnx.Variable):
            own.append(f"{name} {tuple(np.shape(child.get_value()))}")
        elif isinstance(child, nnx.Module) and not isinstance(child, nnx.Rngs):
            below.append((name, child))
    if isinstance(layer, nnx.BatchNorm):
        own = [f"{layer.num_features}, momentum={layer.momentum}, epsilon={layer.epsilon}"]
        own += [f"axis_name={layer.axis_name!r}"] if layer.axis_name is not None else []
        own += ["eval"] if layer.use_running_average else []
    elif not isinstance(layer, Layer):
        own = [f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}", *own]
    yield f"{'  ' * depth}{title}{': ' if own else ''}{', '.join(own)}"
    if all(name.isdecimal() for name, _ in below):
        below.sort(key=lambda item: int(item[0]))
    for name, child in below if isinstance(layer, Layer) else ():
        yield from tree(child, name, depth + 1)


def draws(node: Node, torch: str) -> bool:
    """Whether the node draws random numbers."""
    found = (interop.ops.lookup(each.operation, torch) for each in every_node([node]))
    return any(operation is not None and operation.random for operation in found)


def _array(value: Any, described: str) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{described} takes an array, found {type(value).__name__}") from error
