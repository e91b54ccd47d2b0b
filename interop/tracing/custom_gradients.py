"""`torch.autograd.Function` in a traced module: is its own backward the derivative of its forward?

torch.export records the forward alone, and the gradient in JAX is that of the forward's operations. That is the same
for a function that is there to save memory, and it is left at that. It is another for one that is there to change the
gradient: its backward is recorded too (`own_backward.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.own_backward import Context, recorded_call, takes_context

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-3  # relative, in the inputs' own dtype: a straight-through estimator is off by 1
# Of the inputs, of the gradients that come back: what is clipped differs where numbers are large, what is added where
# they are 0.
_SIZES = ((1.0, 1.0), (1.0, 100.0), (1.0, 0.0), (100.0, 1.0), (0.0, 1.0))


class CustomGradientError(ValueError):
    """A function whose own backward can neither be left out nor recorded."""


@contextlib.contextmanager
def checked_gradients() -> Iterator[None]:
    """For the time of a trace: a function is called on random numbers of the same shapes, with its own backward and
    with that of its forward's operations. Where the gradients differ, or that cannot be tried, its backward is recorded
    too.

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
        self._own: dict[tuple[object, ...], bool] = {}  # whether a call needs its own backward
        self._trying = False
        self._running: list[type[torch.autograd.Function]] = []

    def of(self, cls: type[torch.autograd.Function], original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that stands in for the class's own."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            by_a_subclass = bool(self._running) and self._running[-1] is not cls and issubclass(self._running[-1], cls)
            if self._trying or by_a_subclass:  # super().forward(...) is part of a function that is checked whole
                return original(*args, **kwargs)
            given = args[1:] if takes_context(cls) else args
            if cls is private.checkpoint_function():
                run, _, *inputs = given
                with _gradients_on():
                    return run(*inputs)
            own = self._needs_its_own(cls, given)
            self._running.append(cls)
            try:
                if own:
                    return _recorded(cls, given, original)
                # PyTorch runs a forward without gradients, so that `torch.no_grad()` means nothing inside; in a graph
                # it would.
                with private.grad_mode_kept():
                    return original(*args, **kwargs)
            finally:
                self._running.pop()

        return forward

    def _needs_its_own(self, cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> bool:
        call = (cls, *map(_description, args))
        if call not in self._own:
            self._trying = True
            try:
                with private.outside_the_trace():
                    self._own[call] = _other_gradients(cls, args)
            finally:
                self._trying = False
        return self._own[call]


def _recorded(cls: type[torch.autograd.Function], args: tuple[Any, ...], forward: Callable[..., Any]) -> Any:
    try:
        return recorded_call(cls, args, forward)
    except Exception as error:
        name = f"{cls.__module__}.{cls.__qualname__}"
        raise CustomGradientError(
            f"{name} has a backward of its own that is not the derivative of its forward, and it cannot be recorded "
            f"({type(error).__name__}: {error}). Write the function as an operation with a JAX function of its own:\n"
            + _REGISTERED.format(name=cls.__name__.lower())
        ) from error


_REGISTERED = """
    @torch.library.custom_op("mine::{name}", mutates_args=())
    def {name}(x: torch.Tensor) -> torch.Tensor: ...                # forward; call it in place of .apply
    {name}.register_fake(lambda x: torch.empty_like(x))             # shapes
    {name}.register_autograd(backward, setup_context=setup_context) # torch.library.register_autograd

    @jax.custom_vjp
    def in_jax(x): ...                                              # the same forward on a jax.Array
    in_jax.defvjp(lambda x: (in_jax(x), x), lambda saved, grad: (...,))
    interop.register("mine::{name}")(in_jax)
"""


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


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else private.example_size(n) for n in x.shape)


def _description(x: object) -> tuple[tuple[int, ...], torch.dtype] | str:
    """What tells calls apart."""
    import torch

    return (_shape(x), x.dtype) if isinstance(x, torch.Tensor) else repr(x)


def _other_gradients(cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> bool:
    """Whether its backward gives others than its forward's operations have; True where that cannot be tried."""
    import torch

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
    except Exception:
        return True
    return any(_differ(*pair) for pair in pairs)


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    return not torch.linalg.vector_norm(a - b) <= _TOLERANCE * torch.linalg.vector_norm(a).clamp(min=1e-30)


def _differentiable(y: object) -> bool:
    import torch

    return isinstance(y, torch.Tensor) and y.requires_grad


def _forward(cls: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
    """The forward's operations, seen by autograd."""
    with private.grad_mode_kept():
        return cls.forward(Context(args), *args) if takes_context(cls) else cls.forward(*args)
