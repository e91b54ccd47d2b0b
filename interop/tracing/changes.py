"""What one call of a module changes in Python, where a graph does not see it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interop.tracing import private
from interop.tracing.settings import random_states
from interop.tracing.snapshot import Change, Snapshot

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("interop")
_NUMBERS = (bool, int, float, complex)


class Changes:
    """Watches one call, and says afterwards what the record of it lacks.

    A recorded call begins with the state, and what it changes is state: parameters and buffers. What else a call leaves
    for the next one is lost. That is refused where the call itself shows that the next one would read it, and nothing
    to speak of where it is a cache, made of sizes and numbers alone.
    """

    def __init__(self, module: torch.nn.Module, found: Snapshot) -> None:
        self._module, self._found = module, found
        self._changes: list[Change] = []
        self._computed: set[str] = set()
        self._draws: set[str] = set()

    def watched(self, call: Callable[[], Any]) -> Any:
        """What `call()` gives."""
        import torch

        before, drawn = self._found.contents(), random_states()
        result = call()
        self._changes = list(self._found.changes(before))
        self._computed |= {c.name for c in self._changes if isinstance(c.new, torch.Tensor) and _of_values(c.new)}
        self._draws |= {name for name, state in random_states().items() if state != drawn[name]}
        return self._moved(result, before)

    def _moved(self, result: Any, before: Sequence[Mapping[Any, Any]]) -> Any:
        """Writes what the call bound to a buffer's name (`self.mean = ...`) into that buffer.

        It is done after the call, which may go on to read what the name meant before; results that are the old buffer,
        or a view of it, are copied first. torch.export itself follows assignments to the root's own buffers alone, and
        not those of inputs or of other buffers (`register_buffer_assignment_hook` in
        torch/_functorch/_aot_autograd/utils.py): it is shown an assignment of what is written.
        """
        import torch

        def follows(old: Any, new: Any) -> bool:
            tensors = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
            return tensors and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)

        bound = [change for change in self._changes if change.table == "buffer" and follows(change.old, change.new)]
        if not bound:
            return result
        old = {private.storage(change.old) for change in bound}
        leaves, spec = private.flatten(result)
        leaves = [x.clone() if isinstance(x, torch.Tensor) and private.storage(x) in old else x for x in leaves]
        news = [change.new.clone() for change in bound]
        with torch.no_grad():
            for change, new in zip(bound, news, strict=True):
                change.old.copy_(new)
                if self._module._buffers.get(change.name) is change.new:
                    setattr(self._module, change.name, new)
        self._found.rebind({change.name for change in bound}, before)
        self._changes = [change for change in self._changes if change not in bound]
        return private.unflatten(leaves, spec)

    def report(self, exported: torch.export.ExportedProgram, mode: str) -> None:
        """Warns of what the exported program may lack.

        Raises:
            ValueError: for tensors that the program reads, and the code replaced.
        """
        import torch

        read = {private.storage(x) for x in exported.constants.values() if isinstance(x, torch.Tensor)}
        written = set(exported.graph_signature.buffers_to_mutate.values())
        lost, frozen = [], []
        for name, table, old, new in self._changes:
            if table in ("parameter", "buffer"):
                lost += [name] if name not in written else []
            elif isinstance(old, torch.Tensor):  # one that is not read is a cache
                lost += [name] if name in exported.constants or private.storage(old) in read else []
            elif isinstance(new, torch.Tensor):
                frozen += [name] if name in self._computed else []
            elif table == "array" or (isinstance(old, _NUMBERS) and isinstance(new, _NUMBERS) and old != new):
                frozen += [name]
        if lost:
            raise ValueError(
                f"forward replaces tensors that it reads: {', '.join(sorted(lost))}. The next call would not see it. "
                "Make them buffers (register_buffer) of one shape and dtype, and write to them (self.x.copy_(y), or "
                "self.x = y)"
            )
        if frozen:
            logger.warning(
                "forward in %s mode sets %s, which the imported model does not: each of its calls is like the first "
                "one after import. A buffer (register_buffer) would change from call to call",
                mode,
                ", ".join(sorted(frozen)),
            )
        if self._draws:
            logger.warning(
                "forward in %s mode draws from %s, and what it drew at import is used in every call of the imported "
                "model; torch.rand would draw anew",
                mode,
                " and ".join(sorted(self._draws)),
            )


def _of_values(tensor: torch.Tensor) -> bool:
    """Whether it was computed from what inputs, parameters or buffers hold, and not from their sizes alone."""
    import torch

    waiting = private.graph_nodes([tensor])
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        base = str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""
        if not isinstance(node.meta.get("val"), torch.Tensor) or base.startswith("new_") or base.endswith("_like"):
            continue
        if node.op == "placeholder":
            return True
        new = [item for item in node.all_input_nodes if item not in seen]
        seen.update(new)
        waiting += new
    return False
