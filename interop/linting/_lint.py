"""lint: what looks wrong in a model or checkpoint, without running it."""

from __future__ import annotations

from typing import Any

from interop.linting.rules import RULES, Finding
from interop.linting.subject import subject

_ORDER = ("error", "warning", "info")


def lint(target: Any) -> list[Finding]:
    """What looks wrong in a model or a checkpoint, the worst first.

    ```python
    >>> for finding in interop.lint("model_best.pth.tar"):
    ...     print(finding.severity, finding.layer, finding.message)
    error bn1 1 of 64 channels have a negative running variance (17)
    ```

    Looked at are momentum, eps, running statistics, counters, scales, dtypes and memory; the rules, what each finding
    means and what to do are in `docs/lint.md`. Nothing is computed with the model and nothing is changed.

    **Arguments:**

    - `target`: a `torch.nn.Module`, a `flax.nnx.Module` (imported or hand-written), Linen variables, a
      `jaxnorm.TrainState`, a state dict of PyTorch's names, a `Checkpoint` or the path of one. Momentum, eps and modes
      are known of modules only, and of checkpoints of pickled modules.

    **Returns:** a list of `Finding`s, empty for a healthy model.

    **Raises:**

    - `TypeError`: for anything else.
    - `interop.CheckpointError`: if the path is no checkpoint that can be read.
    """
    seen = subject(target)
    findings = [finding for rule in RULES for finding in rule(seen)]
    return sorted(findings, key=lambda finding: _ORDER.index(finding.severity))
