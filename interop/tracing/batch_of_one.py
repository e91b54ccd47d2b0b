"""A batch of one: torch.export records what code does with several examples, and with one it may do something else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.answers import Answers
from interop.tracing.rewrites import rewritten

if TYPE_CHECKING:
    import sympy
    import torch

logger = logging.getLogger("interop")


def report_single(
    module: torch.nn.Module,
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plain: Callable[[Any], Any],
) -> None:
    """Warns if `module` calls other functions for one example than for two (`if x.shape[0] == 1`), or returns other
    shapes than the exported program (`x.squeeze()`).

    The calls compute shapes alone (FakeTensorMode). Where they fail nothing is said: then PyTorch fails too, or the
    module looks at values.

    Args:
        args, kwargs: of the call that was exported.
        plain: makes pytrees of the module's results, as it did for the export.
    """
    import torch

    recorded = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    leaves, spec = private.flatten((args, dict(kwargs)))
    inputs = [recorded.get(name) for name in exported.graph_signature.user_inputs]
    batches = [_symbols(x).get(0) for x in inputs]
    if not any(batches) or len(inputs) != len(leaves):
        return
    # What the sizes that vary are when there is one example.
    sizes = {
        symbol: leaf.shape[dim] for leaf, x in zip(leaves, inputs, strict=True) for dim, symbol in _symbols(x).items()
    }
    sizes |= {batch: 1 for batch in batches if batch}
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def call(count: int) -> tuple[list[str], list[list[int | torch.SymInt]]]:
        few = [leaf[:count] if batch else leaf for leaf, batch in zip(leaves, batches, strict=True)]
        with private.shapes_alone() as fake, torch.no_grad():
            state = {name: fake.from_tensor(tensor) for name, tensor in own.items()}
            fakes = [fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in few]
            positional, keywords = private.unflatten(fakes, spec)
            with rewritten(Answers()), _calls() as names:
                results = plain(torch.func.functional_call(module, state, positional, keywords))
        return names, [list(x.shape) for x in private.flatten(results)[0] if isinstance(x, torch.Tensor)]

    try:
        names, shapes = call(1)
        # What the first call leaves in caches the second does not compute: so once more before anything is said.
        branches = names != call(2)[0] and call(1)[0] != call(2)[0]
    except Exception as error:
        logger.debug("not tried with a batch of one: %s", error)
        return
    results = [recorded.get(name) for name in exported.graph_signature.user_outputs]
    expected = [
        [private.expression(n).xreplace(sizes) if isinstance(n, torch.SymInt) else n for n in x.shape]
        for x in results
        if isinstance(x, torch.Tensor)
    ]
    if any(getattr(n, "free_symbols", None) for shape in expected for n in shape):  # depends on values
        expected = shapes
    if branches or shapes != expected:
        does = f"returns {shapes} where the imported model returns {expected}" if shapes != expected else "branches"
        logger.warning(
            "given a batch of one, %s %s: the imported model treats one example as it treats several",
            type(module).__name__,
            does,
        )


def _symbols(tensor: object) -> dict[int, sympy.Symbol]:
    """The symbols of a tensor's varying sizes, by dimension."""
    import torch

    shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
    symbols = {dim: private.expression(size) for dim, size in enumerate(shape) if isinstance(size, torch.SymInt)}
    return {dim: symbol for dim, symbol in symbols.items() if symbol.is_symbol}


@contextlib.contextmanager
def _calls() -> Iterator[list[str]]:
    """The names of the functions of torch that are called, in order."""
    from torch.overrides import TorchFunctionMode

    names: list[str] = []

    class Listing(TorchFunctionMode):
        def __torch_function__(
            self,
            function: Callable[..., Any],
            types: Collection[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            names.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    with Listing():
        yield names
