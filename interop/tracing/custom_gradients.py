"""`torch.autograd.Function` in a traced module: is its own backward the derivative of its forward?

torch.export records the forward alone, and the gradient in JAX is that of the forward's operations. That is the same
for a function that is there to save memory, and another for one that is there to change the gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from interop.tracing import private

if TYPE_CHECKING:
    import torch

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

    Every class has another `forward` for that time, for that is where PyTorch ends up however a function is called:
    `Ste.apply`, or an `apply` that was bound before the import. So has a class that is made in that time.

    `torch.utils.checkpoint` with `use_reentrant=True`, a function that calls others with their gradients, is the plain
    call of these.
    """
    import torch

    function = torch.autograd.Function
    calls = _Calls()
    replaced: list[tuple[type[torch.autograd.Function], staticmethod[..., Any] | None]] = []

    def watch(cls: type[torch.autograd.Function]) -> None:
        own = vars(cls).get("forward")
        replaced.append((cls, own))
        cls.forward = staticmethod(calls.of(cls, cls.forward))

    def watch_new(cls: type[torch.autograd.Function], /, **kwargs: Any) -> None:
        super(function, cls).__init_subclass__(**kwargs)
        if not cls.__module__.startswith("torch."):  # torch makes one for each custom operation, which stays whole
            watch(cls)

    for cls in _subclasses(function):
        if cls is private.checkpoint_function() or not cls.__module__.startswith("torch."):
            watch(cls)
    function.__init_subclass__ = classmethod(watch_new)
    try:
        yield
    finally:
        del function.__init_subclass__
        for cls, own in reversed(replaced):
            if own is None:
                del cls.forward
            else:
                cls.forward = own


def _subclasses(cls: type[torch.autograd.Function]) -> list[type[torch.autograd.Function]]:
    """All of them, each once, a class before those that inherit from it are looked at."""
    found: dict[type[torch.autograd.Function], None] = {}
    waiting = [cls]
    while waiting:
        for below in waiting.pop().__subclasses__():
            if below not in found:
                found[below] = None
                waiting.append(below)
    return list(found)


class _Calls:
    """The calls of functions with a backward of their own during one trace."""

    def __init__(self) -> None:
        self._checked: set[tuple[object, ...]] = set()
        self._trying = False
        self._running: list[type[torch.autograd.Function]] = []

    def of(self, cls: type[torch.autograd.Function], original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that stands in for the class's own."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            by_a_subclass = bool(self._running) and self._running[-1] is not cls and issubclass(self._running[-1], cls)
            if self._trying or by_a_subclass:  # super().forward(...) is part of a function that is checked whole
                return original(*args, **kwargs)
            given = args[1:] if _takes_context(cls) else args
            if cls is private.checkpoint_function():
                run, _, *inputs = given
                with _gradients_on():
                    return run(*inputs)
            self._check(cls, given)
            self._running.append(cls)
            try:
                # PyTorch runs a forward without gradients, so that `torch.no_grad()` means nothing inside; in a graph
                # it would.
                with private.grad_mode_kept():
                    return original(*args, **kwargs)
            finally:
                self._running.pop()

        return forward

    def _check(self, cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> None:
        call = (cls, *map(_description, args))
        if call in self._checked:
            return
        self._checked.add(call)
        self._trying = True
        try:
            with private.outside_the_trace():
                _refuse_other_gradients(cls, args)
        finally:
            self._trying = False


@contextlib.contextmanager
def _gradients_on() -> Iterator[None]:
    """As outside the function that turned them off, and not recorded."""
    import torch

    before = torch.is_grad_enabled()
    _switch(True)
    try:
        yield
    finally:
        _switch(before)


def _switch(mode: bool) -> None:
    with private.outside_the_trace():
        private.set_grad_enabled(mode)


def _takes_context(cls: type[torch.autograd.Function]) -> bool:
    """Whether forward's first argument is `ctx`; a class with a `setup_context` gets it there."""
    import torch

    return cls.setup_context is torch.autograd.Function.setup_context


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else private.example_size(n) for n in x.shape)


def _description(x: object) -> tuple[tuple[int, ...], torch.dtype] | str:
    """What tells calls apart."""
    import torch

    return (_shape(x), x.dtype) if isinstance(x, torch.Tensor) else repr(x)


def _refuse_other_gradients(cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> None:
    import torch

    name = f"{cls.__module__}.{cls.__qualname__}"

    def gradients(function: Callable[..., Any], size: float, slope: float) -> list[torch.Tensor]:
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

    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for sizes in _SIZES:
            own, recorded = gradients(cls.apply, *sizes), gradients(lambda *a: _forward(cls, a), *sizes)
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


def _differentiable(y: object) -> bool:
    import torch

    return isinstance(y, torch.Tensor) and y.requires_grad


class _Context:
    """What a forward may do with its `ctx`, without effect."""

    needs_input_grad = (True,) * 64

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_dirty(self, *_: object) -> None: ...

    def mark_non_differentiable(self, *_: object) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def _forward(cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    """The forward's operations, seen by autograd."""
    with private.grad_mode_kept():
        return cls.forward(_Context(), *args) if _takes_context(cls) else cls.forward(*args)
