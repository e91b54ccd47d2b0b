"""The module in train mode and in eval mode, each made of the module as it was found."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interop.errors import TraceError
from interop.tracing import private
from interop.tracing.batch_norm import unshare
from interop.tracing.refusals import some
from interop.tracing.synchronised import is_batch_norm

if TYPE_CHECKING:
    import torch

    from interop.tracing.hooks import Hook
    from interop.tracing.snapshot import Snapshot

logger = logging.getLogger("interop")


class Modes:
    """Brings a module to one mode or the other, as often as it is recorded.

    Attributes:
        frozen: the layers that stay in eval mode while the module trains; known once it was in train mode.
        left_out: hooks that are no part of what is recorded.
    """

    def __init__(self, module: torch.nn.Module, found: Snapshot):
        self.found = found
        self.frozen: frozenset[str] = frozenset()
        self.left_out: list[Hook] = []
        self._module = module
        self._flags = {layer: layer.training for layer in module.modules()}
        self._training = module.training

    def enter(self, mode: str) -> None:
        """The module as it was found, then in this mode, ready to be recorded.

        In train mode, layers that are in eval mode count as frozen. A module that was found in eval mode keeps the
        layers that were in train mode all the same (dropout that samples in evaluation, say).

        Raises:
            TraceError: if going there changes what the module holds.
        """
        self.found.restore()
        if not self._training:
            self._switch("train")
        if mode == "train":
            self.frozen = frozenset(path for path, layer in self._module.named_modules() if not layer.training)
        else:
            self._switch("eval")
            if not self._training:
                for layer, training in self._flags.items():
                    layer.training = training
        for hook in self.left_out:
            del hook.table[hook.key]
        unshare(self._module)

    def report_sampling(self) -> None:
        """Warns of layers that are in train mode inside a module in eval mode."""
        names = [
            path
            for path, layer in self._module.named_modules()
            if self._flags.get(layer) and not self._training and not is_batch_norm(layer)
        ]
        if names:
            logger.warning(
                "in train mode at import inside a model in eval mode, and in its eval graph: %s", some(names)
            )

    def _switch(self, mode: str) -> None:
        own = [
            f"{type(layer).__qualname__}.{name} ({path or 'the module itself'})"
            for path, layer in self._module.named_modules()
            for name in ("train", "eval")
            if private.is_overridden(layer, name)
        ]
        before = self.found.contents() if own else None
        try:
            getattr(self._module, mode)()
        except Exception as error:
            raise TraceError(
                f"{type(self._module).__name__}.{mode}() fails: {type(error).__name__}: {error}"
            ) from error
        changed = [] if before is None else [*self._changed(before)]
        if changed:
            raise TraceError(
                f"{type(self._module).__name__}.{mode}() changes what the module holds: {some(changed)}. That is the "
                f"work of {some(own)}. An imported model has one state for both modes: import the module without that "
                "(adapters merged into their weights for good, or a train() and an eval() that set flags alone), and "
                "let forward compute from the state what a mode needs"
            )

    def _changed(self, before: Sequence[Mapping[Any, Any]]) -> list[str]:
        """The tensors, arrays and layers that are others than they were; what is no longer there is a cache that was
        dropped, where it is no parameter, buffer or layer."""
        import torch

        names = dict.fromkeys(name for name, _ in self.found.written())
        for name, table, old, new in self.found.changes(before):
            if table in ("parameter", "buffer") and isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
                moved = (old.shape, old.dtype) != (new.shape, new.dtype) or not torch.equal(old, new)
            else:
                moved = table in ("parameter", "buffer", "layer", "array") or isinstance(new, torch.Tensor)
            if moved:
                names[name] = None
        return list(names)
