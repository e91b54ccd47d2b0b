"""A `torch.autograd.Function`'s own backward, recorded beside its forward.

torch.export records a forward pass. So that a gradient of the user's own is in the record too, `backward` is called
right after `forward`, on stand-ins for the gradients of its outputs (`jaxnorm::gradient_of`), and one operation
(`jaxnorm::custom_gradient`) holds both ends. `nested` then takes what depends on the stand-ins out of the list of
nodes: it becomes that operation's `Backward`, which `interop.running.custom_gradient` runs as a `jax.custom_vjp`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from interop.program.nodes import Backward, Node, value_names
from interop.program.operations import CUSTOM_GRADIENT
from interop.tracing import private

if TYPE_CHECKING:
    import torch


class Context:
    """The `ctx` of one call: what forward leaves there for backward."""

    saved_tensors: tuple[torch.Tensor | None, ...] = ()
    writes = False  # into its inputs

    def __init__(self, args: Iterable[object] = ()):
        self.needs_input_grad = tuple(is_differentiable(x) for x in args)
        self.constant: list[object] = []  # outputs that have no gradient

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_dirty(self, *_: object) -> None:
        self.writes = True

    def mark_non_differentiable(self, *outputs: object) -> None:
        self.constant += outputs

    def set_materialize_grads(self, _: bool) -> None: ...


def is_differentiable(x: object) -> bool:
    import torch

    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def takes_context(cls: type[torch.autograd.Function]) -> bool:
    """Whether forward's first argument is `ctx`; a class with a `setup_context` gets it there."""
    import torch

    return cls.setup_context is torch.autograd.Function.setup_context


@functools.cache
def _operations() -> tuple[Callable[..., torch.Tensor], Callable[..., list[torch.Tensor]]]:
    import torch

    def only_recorded(*_: object) -> Any:
        raise RuntimeError("a part of a traced graph, which cannot run in PyTorch")

    library = functools.partial(torch.library.custom_op, mutates_args=())
    gradient_of = library("jaxnorm::gradient_of", only_recorded, schema="(Tensor y) -> Tensor")
    gradient_of.register_fake(torch.empty_like)
    custom_gradient = library(
        "jaxnorm::custom_gradient",
        only_recorded,
        schema="(Tensor[] inputs, Tensor[] outputs, Tensor[] gradients, Tensor[] results) -> Tensor[]",
    )
    custom_gradient.register_fake(lambda inputs, outputs, gradients, results: [torch.empty_like(y) for y in outputs])
    return gradient_of, custom_gradient


def recorded_call(
    cls: type[torch.autograd.Function], args: tuple[Any, ...], forward: Callable[..., Any]
) -> torch.Tensor | tuple[Any, ...]:
    """What the function gives for `args`, with its backward in the record.

    Gradients that backward does not give (None) are none. The gradient of an output that has none (an integer, or one
    that is marked so) is zeros, as PyTorch's is.
    """
    import torch

    gradient_of, custom_gradient = _operations()
    context = Context(args)
    with private.grad_mode_kept():
        if takes_context(cls):
            result = forward(context, *args)
        else:
            result = forward(*args)
            cls.setup_context(context, args, result)
        if context.writes:
            raise ValueError("forward writes into its inputs (mark_dirty)")
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        places = [
            n for n, y in enumerate(outputs) if is_differentiable(y) and all(y is not x for x in context.constant)
        ]
        stand_ins = [gradient_of(outputs[n]) for n in places]
        gradients = [torch.zeros_like(y) if isinstance(y, torch.Tensor) else None for y in outputs]
        for n, stand_in in zip(places, stand_ins, strict=True):
            gradients[n] = stand_in
        found = cls.backward(context, *gradients)
    found = found if isinstance(found, (tuple, list)) else (found,)
    if len(found) < len(args) or any(g is not None for g in found[len(args) :]):
        raise ValueError(f"backward gives {len(found)} gradients for {len(args)} arguments")
    pairs = [(x, g) for x, g in zip(args, found, strict=False) if isinstance(g, torch.Tensor) and is_differentiable(x)]
    for x, gradient in pairs:
        if gradient.shape != x.shape:
            raise ValueError(f"backward gives a gradient of shape {list(gradient.shape)} for one of {list(x.shape)}")
    if places:
        inputs, results = [x for x, _ in pairs], [gradient.to(x.dtype) for x, gradient in pairs]
        given = custom_gradient(inputs, [outputs[n] for n in places], stand_ins, results)
        for n, y in zip(places, given, strict=True):
            outputs[n] = y
    return tuple(outputs) if isinstance(result, (tuple, list)) else outputs[0]


def nested(nodes: list[Node]) -> list[Node]:
    """The nodes of a record with every backward inside of its `custom_gradient`, in order."""
    if not any(node.operation == CUSTOM_GRADIENT for node in nodes):
        return nodes
    kept: list[Node] = []
    for node in nodes:
        if node.operation == CUSTOM_GRADIENT:
            inputs, outputs, stand_ins, results = node.args
            gradients = tuple(value_names(stand_ins))
            inside, depending = [], set(gradients)
            for earlier in kept:
                if any(name in depending for name in value_names((earlier.args, earlier.kwargs))):
                    depending.add(earlier.name)
                    inside.append(earlier)
            names = {one.name for one in inside}.union(gradients)
            kept = [one for one in kept if one.name not in names]
            node = dataclasses.replace(node, args=(inputs, outputs, Backward(gradients, tuple(inside), tuple(results))))
        kept.append(node)
    return kept
