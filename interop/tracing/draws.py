"""Random numbers that are the same in PyTorch and JAX: `interop.ops.draws`, and the same of PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from interop.ops.draws import middles
from interop.program.nodes import Program, every_node
from interop.tracing import private

if TYPE_CHECKING:
    from torch import Tensor

OTHER = ("randint", "randint_like", "randperm", "exponential", "rrelu", "multinomial")
"""Operations that draw in ways that are not covered."""


def uncovered(program: Program) -> list[str]:
    """The program's operations whose draws would differ."""
    return sorted({node.operation for node in every_node(program.nodes) if node.operation.split(".")[1:2][0] in OTHER})


@contextlib.contextmanager
def same_draws(torch: ModuleType) -> Iterator[None]:
    """For the time of a comparison, in PyTorch and in JAX: Bernoulli variables are 1 (dropout drops nothing), uniform
    ones lie in the middle and normal ones at the mean."""

    def full(size: Sequence[int], value: float, kwargs: Mapping[str, Any]) -> Tensor:
        return torch.full(size, value, **{key: kwargs[key] for key in ("dtype", "device") if key in kwargs})

    class Fixed(private.dispatch_mode()):  # type: ignore[misc,unused-ignore]
        def __torch_dispatch__(
            self,
            function: Callable[..., Any],
            types: Collection[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            match function.__name__.partition(".")[0]:
                case "bernoulli_":
                    return args[0].fill_(1)
                case "bernoulli":
                    return torch.ones_like(args[0])
                case "native_dropout":
                    return args[0] / (1 - args[1]), torch.ones_like(args[0], dtype=torch.bool)
                case "rand":
                    return full(args[0], 0.5, kwargs)
                case "randn":
                    return full(args[0], 0.0, kwargs)
                case "rand_like":
                    return torch.full_like(args[0], 0.5, dtype=kwargs.get("dtype"))
                case "randn_like":
                    return torch.zeros_like(args[0], dtype=kwargs.get("dtype"))
                case "uniform_":
                    low = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
                    high = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
                    return args[0].fill_((low + high) / 2)
                case "normal_":
                    return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("mean", 0.0))
            return function(*args, **kwargs)

    with Fixed(), middles():
        yield
