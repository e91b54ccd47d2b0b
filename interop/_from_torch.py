"""from_torch: a PyTorch module as a trainable Flax module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx
from jax.typing import DTypeLike

from interop.program import versions
from interop.running.dtypes import refuse_other_dtypes
from interop.running.module import TracedModule

if TYPE_CHECKING:
    import torch


def from_torch(
    module: torch.nn.Module,
    *example_inputs: Any,
    rngs: nnx.Rngs | None = None,
    compute_dtype: DTypeLike | None = None,
    dynamic_dims: Sequence[int] = (0,),
    **example_kwargs: Any,
) -> TracedModule:
    """A trainable Flax NNX module that computes what a PyTorch module does, in train and in eval mode, with the
    module's own names.

    ```python
    model = interop.from_torch(torchvision.models.resnet18(), torch.zeros(2, 3, 224, 224))
    logits = model(images)                                # (N, 3, 224, 224), any N
    ```

    The module is recorded by `torch.export`, in both modes, and as its original where `torch.compile` was at work. It
    is left as it was, with all that it reaches, random states and PyTorch's switches; that takes a copy of its tensors
    for the time of the import. Arrays are copied. What its code does only for a batch of one is not in the record; the
    import warns where it sees such code. Numbers that its code reads from buffers, checks of values, masks and packed
    sequences: docs/values.md.

    A recorded call changes the module's buffers and parameters as PyTorch's does, once. PyTorch runs what
    `torch.utils.checkpoint` calls a second time in its backward pass, so that BatchNorm layers in there move their
    statistics and counters twice a step; the imported model does so once, as without checkpoints.

    **Arguments:**

    - `module`: a `torch.nn.Module`. Its mode is the model's mode at first; layers in eval mode inside a training module
      stay frozen.
    - `*example_inputs`, `**example_kwargs`: what the module is called with. Shapes and dtypes count, values do not.
    - `rngs`: the `flax.nnx.Rngs` that dropout and its like draw from; `nnx.Rngs(0)` if None.
    - `compute_dtype`: cast parameters and inputs to this type for the run (bfloat16, say); the model's own arrays stay
      as they are.
    - `dynamic_dims`: the dimensions of every input that may vary; the batch by default, (0, 2, 3) for images of any
      size where the module allows it.

    **Returns:** the `TracedModule`. Its arrays have PyTorch's names, layouts and dtypes (64-bit integers become 32-bit
    ones unless jax_enable_x64 is set).

    **Raises:**

    - `TypeError`: for what is no module, and for example inputs that its forward does not take.
    - `interop.TraceError`: if PyTorch cannot record the module, if what it does cannot be said by a graph over one
      state (`train()` or `eval()` that write weights, tensors that forward replaces), or if this torch is one in which
      what tracing needs has moved.
    - `NotImplementedError`: for operations without a JAX function, all at once with the layers that use them; see
      `interop.register`.
    - `ValueError`: for arrays that JAX, as configured, cannot hold (float64 without jax_enable_x64), for lazy layers
      without a shape, and for dimensions and dtypes that are none.

    **Warns:** `UserWarning` for entries of the state dict that are no parameters or buffers (`get_extra_state`), which
    the imported model does not have.
    """
    from interop.tracing.trace import trace

    if not isinstance(rngs, nnx.Rngs | None):
        raise TypeError(f"rngs is a flax.nnx.Rngs or None, found {type(rngs).__module__}.{type(rngs).__qualname__}")
    refuse_other_dtypes(compute_dtype)
    versions.warn_untried()
    model, arrays = trace(module, example_inputs, example_kwargs, dynamic_dims)
    return TracedModule(model, arrays, training=module.training, rngs=rngs, compute_dtype=compute_dtype)
