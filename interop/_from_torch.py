"""from_torch: a PyTorch module as a trainable Flax module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx
from jax.typing import DTypeLike

from interop.program import versions
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

        model = interop.from_torch(torchvision.models.resnet18(), torch.zeros(2, 3, 224, 224))
        logits = model(images)                                # (N, 3, 224, 224), any N

    The module is recorded by `torch.export`, in both modes; it is left as it was. Arrays are copied. What its code
    does only for a batch of one is not in the record; the import warns where it sees such code.
    Numbers that its code reads from buffers, checks of values, masks and packed sequences: docs/values.md.

    Args:
        module: a `torch.nn.Module`. Its mode is the model's mode at first; layers in eval mode inside a training
            module stay frozen.
        example_inputs, example_kwargs: what the module is called with. Shapes and dtypes count, values do not.
        rngs: the `flax.nnx.Rngs` that dropout and its like draw from; `nnx.Rngs(0)` if None.
        compute_dtype: cast parameters and inputs to this type for the run (bfloat16, say); the model's own arrays
            stay as they are.
        dynamic_dims: the dimensions of every input that may vary; the batch by default, (0, 2, 3) for images of any
            size where the module allows it.

    Raises:
        interop.TraceError: if PyTorch cannot record the module, or if this torch is one in which what tracing needs
            has moved.
        NotImplementedError: for operations without a JAX function, all at once with the layers that use them; see
            `interop.register`.
        ValueError: for arrays that JAX, as configured, cannot hold (float64 without jax_enable_x64).
    """
    from interop.tracing.trace import trace

    versions.warn_untried()
    model, arrays = trace(module, example_inputs, example_kwargs, dynamic_dims)
    return TracedModule(model, arrays, training=module.training, rngs=rngs, compute_dtype=compute_dtype)
