"""What torch.export would record wrongly, or not at all, replaced by what means the same while a module is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def rewritten() -> Iterator[None]:
    """For the time of a trace.

    - `x.data` is `x.detach()`. Both share x's memory and let no gradient through. They differ in what autograd notices
      of writing to them, which a recorded graph has no use for.
    - `F.instance_norm` writes running statistics though its schema does not say so, and torch.export loses them:
      they are written out, as in aten/src/ATen/native/Normalization.cpp (`instance_norm`).
    - `nn.Transformer` and its layers look whether a mask is the causal one (`_detect_is_causal_mask` in
      torch/nn/modules/transformer.py), a question about values. The answer is a hint: the mask is applied either way.
    """
    import torch
    from torch.nn.modules import transformer

    read = torch.Tensor.data.__get__

    class Rewriting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func == read:
                return args[0].detach()
            if func is torch.nn.functional.instance_norm:
                return _instance_norm(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        with Rewriting():
            yield
    finally:
        transformer._detect_is_causal_mask = detect


def _instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    import torch

    if use_input_stats and running_mean is not None:
        with torch.no_grad():  # each example's statistics, then the mean over the examples
            dims = list(range(2, input.ndim))
            for running, batch in (
                (running_mean, input.mean(dims)),
                (running_var, input.var(dims, correction=1)),
            ):
                running.copy_((1 - momentum) * running + momentum * batch.mean(0).to(running.dtype))
        running_mean = running_var = None
    return torch.nn.functional.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
