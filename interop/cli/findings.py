"""The findings of `interop.lint` as a table: what is said of many layers is said once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from interop.cli.output import shown, table
from interop.linting.rules import Finding

_NAMED = 3  # layers of a row that are named


def print_findings(findings: Sequence[Finding], source: str) -> None:
    """A row for each thing that was found, with all layers of which it is; or that there is nothing.

    Messages that differ in their numbers alone are one: the first is shown. `source` is what `jaxnorm inspect` takes.
    """
    if not findings:
        print("findings: none")
        return
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.rule, _without_numbers(finding.message)), []).append(finding)
    rows = [
        (severity, rule, _layers([f.layer for f in group]), _said(group))
        for (severity, rule, _), group in groups.items()
    ]
    table(("finding", "rule", "layer", "what"), rows, left=4)
    if any(len(group) > _NAMED for group in groups.values()):
        print(shown(f"every layer by its name: jaxnorm inspect {source} --json"))


def _layers(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _said(group: list[Finding]) -> str:
    first = group[0]
    text = first.message + ("" if first.suggested is None else f"; suggested: {first.suggested}")
    alike = all((f.message, f.suggested) == (first.message, first.suggested) for f in group)
    return text if alike else f"{text}; the others likewise, with numbers of their own"


def _without_numbers(message: str) -> str:
    """The message, with one sign for each number and for each list of them."""
    number = r"-?\d[\d.e+-]*(?:,\s*\d[\d.e+-]*)*(?:, \.\.\.)?"
    return re.sub(number, "#", message)
