"""`torch.autograd.Function` in a traced module: is its own backward the derivative of its forward?

torch.export records the forward alone, and the gradient in JAX is that of the forward's operations. That is the same
for a function that is there to save memory, and another for one that is there to change the gradient.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

_TOLERANCE = 1e-3  # relative, in the inputs' own dtype: a straight-through estimator is off by 1
# Of the inputs, of the gradients that come back: what is clipped differs where numbers are large, what is added where
# they are 0.
_SIZES = ((1.0, 1.0), (1.0, 100.0), (1.0, 0.0), (100.0, 1.0), (0.0, 1.0))


class CustomGradientError(ValueError):
    """A function whose own backward is not the derivative of its forward."""


@contextlib.contextmanager
def checked_gradients() -> Iterator[None]:
    """For the time of a trace: a function is called on random numbers of the same shapes, with its own backward and
    with that of its forward's operations; where the gradients differ the trace stops.

    `torch.utils.checkpoint` with `use_reentrant=True`, a function that calls others with their gradients, is the plain
    call of these.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes
    from torch.utils.checkpoint import CheckpointFunction

    function = torch.autograd.Function.__dict__["apply"].__func__
    code = function.__code__
    original = types.FunctionType(code, function.__globals__, "apply", function.__defaults__, function.__closure__)
    checked: set[Any] = set()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            run, _, *given = args
            return run(*given)
        call = (cls, *map(_description, args))
        with _gradients_as_they_are():
            if call not in checked and not cls.__module__.startswith("torch."):
                checked.add(call)
                with torch._C.DisableTorchFunction(), _disable_current_modes():
                    _refuse_other_gradients(cls, lambda *a: original(cls, *a, **kwargs), args)
            return original(cls, *args, **kwargs)

    _calls.append(apply)
    function.__code__ = _redirected()  # and not another attribute: `f = MyFunction.apply` may have been read long ago
    try:
        yield
    finally:
        function.__code__ = code
        _calls.pop()


_calls: list[Any] = []  # who gets the calls of `Function.apply` now


def _redirected() -> types.CodeType:
    """The code of a function that passes its call on. It has the free variable of the code that it stands in for, and
    that code's globals, not ours."""
    __class__ = None
    apply = lambda cls, *args, **kwargs: (  # noqa: E731
        __class__ and __import__("sys").modules["interop._torch_custom_gradients"]._calls[-1](cls, *args, **kwargs)
    )
    return apply.__code__


@contextlib.contextmanager
def _gradients_as_they_are() -> Iterator[None]:
    """PyTorch runs a function's forward without gradients, so that `torch.no_grad()` means nothing inside; in a graph
    it would."""
    import torch

    switch = torch._C._set_grad_enabled
    torch._C._set_grad_enabled = lambda _: None
    try:
        yield
    finally:
        torch._C._set_grad_enabled = switch


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else n.node.hint for n in x.shape)


def _description(x: Any) -> Any:
    """What tells calls apart."""
    import torch

    return (_shape(x), x.dtype) if isinstance(x, torch.Tensor) else repr(x)


def _refuse_other_gradients(cls: Any, apply: Any, args: tuple[Any, ...]) -> None:
    import torch

    name = f"{cls.__module__}.{cls.__qualname__}"

    def gradients(function: Any, size: float, slope: float) -> list[Any]:
        generator = torch.Generator().manual_seed(0)

        def draw(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if not x.is_floating_point():
                return torch.zeros(_shape(x), dtype=x.dtype)
            return (size * torch.randn(_shape(x), dtype=x.dtype, generator=generator)).requires_grad_()

        with torch.enable_grad():
            values = [draw(x) for x in args]
            results = function(*[x.clone() if isinstance(x, torch.Tensor) else x for x in values])
            results = [y for y in (results if isinstance(results, (tuple, list)) else [results]) if _differentiable(y)]
            inputs = [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]
            weights = [slope * torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in results]
            if not results or not inputs:
                return [torch.zeros_like(x) for x in inputs]
            found = torch.autograd.grad(results, inputs, weights, allow_unused=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]

    pairs: list[tuple[Any, Any]] = []
    try:
        for sizes in _SIZES:
            own, recorded = gradients(apply, *sizes), gradients(lambda *a: _forward(cls, a), *sizes)
            pairs += zip(own, recorded, strict=True)
    except Exception as error:
        raise CustomGradientError(
            f"{name} has a backward of its own, which is lost when its forward is recorded; whether it is the "
            f"derivative of the forward could not be tried on random numbers ({type(error).__name__}: {error})"
        ) from error
    for a, b in pairs:
        finite = a.isfinite() & b.isfinite()
        a, b = a[finite], b[finite]
        if not torch.linalg.vector_norm(a - b) <= _TOLERANCE * torch.linalg.vector_norm(a).clamp(min=1e-30):
            raise CustomGradientError(
                f"{name} has a backward of its own that is not the derivative of its forward. It would be lost: write "
                "the function with operations whose derivative it is (x + (f(x) - x).detach() for a straight-through "
                "estimator), or as a torch.library.custom_op with a JAX function of its own (jax.custom_vjp), "
                "registered by interop.register"
            )


def _differentiable(y: Any) -> bool:
    import torch

    return isinstance(y, torch.Tensor) and y.requires_grad


class _Context:
    """What a forward may do with its `ctx`, without effect."""

    needs_input_grad = (True,) * 64

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_dirty(self, *_: Any) -> None: ...

    def mark_non_differentiable(self, *_: Any) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def _forward(cls: Any, args: tuple[Any, ...]) -> Any:
    """The forward's operations, seen by autograd."""
    import torch

    if cls.setup_context is torch.autograd.Function.setup_context:
        return cls.forward(_Context(), *args)
    return cls.forward(*args)
