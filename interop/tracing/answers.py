"""What Python asks of the values of tensors while a module is recorded, and what it is told.

- The value, where that is known (`known.py`): `int(self.width)`, `x[:, : self.width]`, `if self.flag:`.
- The truth with which the code goes on, where it only checks (`checks.py`): `assert (x > 0).all()`.
- What PyTorch says for all else: an error where code branches by values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.checks import Checks, asked, asking_frame, line_of
from interop.tracing.known import Known

if TYPE_CHECKING:
    import torch

StandIns = dict[Callable[..., Any], Callable[..., Any]]
# Functions that take sizes, of a tensor or a new one.
_SIZED = frozenset((
    "view", "reshape", "expand", "repeat", "unflatten", "narrow", "split", "chunk", "roll", "topk", "tile",
    "zeros", "ones", "empty", "full", "rand", "randn", "arange", "linspace", "new_zeros", "new_ones",
    "new_empty", "new_full", "eye", "__getitem__", "__setitem__",
))  # fmt: skip


class Answers:
    """The answers of one trace of `module`, whose tensors have their values when this is made; None: nothing is known.

    Attributes:
        known: the values that were told.
        checks: the checks that were passed.
        failed: the errors of those that asked for values which are not known.
    """

    def __init__(self, module: torch.nn.Module | None = None) -> None:
        self.known = None if module is None else Known(module)
        self.checks = Checks()
        self.failed: list[Exception] = []

    @property
    def read(self) -> dict[str, str]:
        return {} if self.known is None else self.known.read

    def stand_ins(self) -> StandIns:
        """What is called in place of PyTorch's functions."""
        import torch

        tensor: Any = torch.Tensor
        numbers = (tensor.item, tensor.tolist, tensor.__int__, tensor.__float__, tensor.__index__, tensor.__complex__)
        reading: tuple[Callable[..., Any], ...] = (*numbers, tensor.numpy, tensor.__array__)
        return {
            **{function: self._reading(function) for function in reading},
            **dict.fromkeys((tensor.__bool__, torch.is_nonzero, tensor.is_nonzero), self._truth),
            **dict.fromkeys((torch.equal, tensor.equal), self._comparing(torch.equal)),
            **dict.fromkeys((torch.allclose, tensor.allclose), self._comparing(torch.allclose)),
            **dict.fromkeys(private.assertions(), self._assert),
        }

    def sizes(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a function with numbers in place of the tensors that are its sizes."""
        import torch

        if getattr(function, "__name__", "") not in _SIZED:
            return args
        first = args[:1] if args and isinstance(args[0], torch.Tensor) and args[0].ndim else ()
        return (*first, *map(self._number, args[len(first) :]))

    def truth_of_symbol(self) -> bool | None:
        """The truth of a number that depends on values."""
        question = asked()
        if question is not None:
            self.checks.drop(question.line)
        return None if question is None else question.answer

    def _value(self, tensor: Any) -> Any:
        import torch

        if self.known is None or not isinstance(tensor, torch.Tensor):
            return None
        return self.known.value(tensor, line_of(asking_frame()))

    def _reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            value = self._value(tensor)
            if value is None:
                try:
                    return function(tensor, *args, **kwargs)
                except Exception as error:
                    self.failed.append(error)
                    raise
            with private.outside_the_trace():
                return function(value, *args, **kwargs)

        return read

    def _truth(self, tensor: torch.Tensor) -> bool:
        value = self._value(tensor)
        if value is not None:
            with private.outside_the_trace():
                return bool(value)
        question = asked()
        if question is None or tensor.numel() != 1:
            return bool(tensor)
        self.checks.record(tensor.bool(), question.answer, question.line)
        return question.answer

    def _comparing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def compare(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
            values = self._value(a), self._value(b)
            if values[0] is not None and values[1] is not None:
                with private.outside_the_trace():
                    return bool(function(*values, *args, **kwargs))
            question = asked()
            if question is None:
                return bool(function(a, b, *args, **kwargs))
            same = torch.isclose(a, b, *args, **kwargs) if function is torch.allclose else a == b
            self.checks.record(same.all(), question.answer, question.line)
            return question.answer

        return compare

    def _assert(self, condition: Any, message: object = "") -> None:
        """torch._assert."""
        import torch

        line = line_of(asking_frame())
        if not isinstance(condition, torch.Tensor):
            if isinstance(condition, torch.SymBool):
                self.checks.drop(line)
            elif not condition:
                raise AssertionError(message)
            return
        value = self._value(condition)
        if value is None:
            self.checks.record(condition.bool(), True, line)
        elif not value:
            raise AssertionError(message)

    def _number(self, item: Any) -> Any:
        """A tensor that is one known integer as that integer, in slices, tuples and lists too."""
        import torch

        if isinstance(item, slice):
            return slice(*(self._number(part) for part in (item.start, item.stop, item.step)))
        if type(item) in (tuple, list):
            return type(item)(self._number(part) for part in item)
        if not isinstance(item, torch.Tensor) or item.ndim or item.is_floating_point() or item.dtype == torch.bool:
            return item
        value = self._value(item)
        return item if value is None else int(value)
