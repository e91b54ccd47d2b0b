"""What torch.export would record wrongly, or not at all, replaced by what means the same while a module is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.answers import Answers, StandIns
from interop.tracing.caught import UnrecordedError
from interop.tracing.recurrent import Recurrent
from interop.tracing.unsized import Unsized

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def rewritten(answers: Answers) -> Iterator[None]:
    """For the time of a trace, in which `answers` tells what Python asks of values.

    - `x.data` is `x.detach()`. Both share x's memory and let no gradient through. They differ in what autograd notices
      of writing to them, which a recorded graph has no use for. `x.data = y` writes y to it.
    - `torch.inference_mode()` is `torch.no_grad()`, which a graph can express.
    - `F.instance_norm` writes running statistics though its schema does not say so, and torch.export loses them:
      they are written out, as in aten/src/ATen/native/Normalization.cpp (`instance_norm`).
    - `nn.Transformer` and its layers look whether a mask is the causal one, a question about values. The answer is a
      hint: the mask is applied either way.
    - Recurrent layers are one operation each (`recurrent.py`).
    - `torch.distributions` does not validate its arguments, which is a question about values too.
    - A hook on the gradient of a tensor inside `forward` is the backward of a function that gives the tensor again; one
      on a parameter, an input or a view is refused.
    """
    import torch

    stand_ins: StandIns = {
        torch.Tensor.data.__get__: torch.Tensor.detach,
        torch.Tensor.data.__set__: _assign_data,
        torch.nn.functional.instance_norm: _instance_norm,
        torch.Tensor.register_hook: _hooked,
        torch.Tensor.register_post_accumulate_grad_hook: _refuse_hook,
        **Recurrent(answers.checks).stand_ins(),
        **answers.stand_ins(),
        **Unsized(answers.checks).stand_ins(),
    }
    inference_mode = torch.inference_mode
    entered, left = inference_mode.__enter__, inference_mode.__exit__

    def enter(self: torch.inference_mode) -> None:
        self.outside = torch.is_grad_enabled()
        private.set_grad_enabled(not self.mode)

    def leave(self: torch.inference_mode, *_: object) -> None:
        private.set_grad_enabled(self.outside)

    class Rewriting(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Collection[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            return stand_ins.get(func, func)(*answers.sizes(func, args), **(kwargs or {}))

    inference_mode.__enter__, inference_mode.__exit__ = enter, leave
    try:
        with (
            private.causal_masks_believed(),
            private.arguments_of_distributions_believed(),
            private.packed_sizes_believed(),
            private.symbolic_truth(answers.truth_of_symbol),
            Rewriting(),
        ):
            yield
    finally:
        inference_mode.__enter__, inference_mode.__exit__ = entered, left


def _hooked(tensor: torch.Tensor, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> _Handle:
    """What follows reads the tensor as the result of a function whose backward is the hook."""
    import torch

    class Hooked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            changed = hook(gradient)
            return gradient if changed is None else changed

    if tensor.is_leaf or private.is_view(tensor):
        _refuse_hook()
    tensor.copy_(Hooked.apply(tensor))
    return _Handle()


class _Handle:
    """Of a hook that is in the record."""

    def remove(self) -> None:
        raise UnrecordedError("a hook that forward registers on the gradient of a tensor is recorded: it stays")


def _refuse_hook(*_: object) -> None:
    raise UnrecordedError(
        "a hook on the gradient of a parameter, an input or a view inside forward is lost when the forward is "
        "recorded. Leave it out at import if it only observes, and write what changes the gradient as an operation"
    )


def _assign_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
        raise UnrecordedError(
            f"assigns a {value.dtype} of shape {tuple(value.shape)} to the .data of a {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}: a recorded tensor keeps its shape and dtype"
        )
    tensor.detach().copy_(value)


def _instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    import torch

    if use_input_stats and running_mean is not None:
        with torch.no_grad():  # each example's statistics, then the mean over the examples
            dims = list(range(2, input.ndim))
            for running, batch in (
                (running_mean, input.mean(dims)),
                (running_var, input.var(dims, correction=1)),
            ):
                running.copy_((1 - momentum) * running + momentum * batch.mean(0).to(running.dtype))  # type: ignore[operator, union-attr]
        running_mean = running_var = None
    return torch.nn.functional.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
