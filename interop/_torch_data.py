"""`x.data` while a module is traced: `x.detach()`, since torch.export cannot record the attribute.

Both share x's memory and let no gradient through. They differ in what autograd notices of writing to them, which a
recorded graph has no use for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def data_is_detached() -> Iterator[None]:
    """For the time of a trace."""
    import torch

    read = torch.Tensor.data.__get__

    class Detached(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0].detach() if func == read else func(*args, **(kwargs or {}))

    with Detached():
        yield
