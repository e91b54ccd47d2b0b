"""What a compiled program's text (HLO) says: which computations a step runs through, and which it only may."""

import math
import re

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([%\w.\-]+))")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)")


def computations(text: str) -> dict[str, str]:
    """The text of each computation by its name."""
    found: dict[str, list[str]] = {}
    lines = found.setdefault("", [])  # what stands before the first
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found.setdefault(header[1], [])
        lines.append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def outside_branches(text: str) -> str:
    """The program without the computations that only a branch of a `lax.cond` runs."""
    parts = computations(text)
    left = {name for part in parts.values() for match in _BRANCHES.finditer(part) for name in _names(match)}
    new = left
    while new:
        called = {name for part in new for match in _CALLED.finditer(parts.get(part, "")) for name in _names(match)}
        new = called - left
        left = left | new
    return "\n".join(part for name, part in parts.items() if name not in left)


def _names(match: re.Match[str]) -> list[str]:
    return [name.strip().removeprefix("%") for group in match.groups() if group for name in group.split(",")]


_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<result>\(.*?\)|\S+) (?P<kind>[\w\-]+)\((?P<operands>.*?)\)(?:, |$)"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]")
# Of a conditional the branch that is not taken is left out, and the other one only hands on what it was given.
_FREE = {"conditional", "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def operations(text: str) -> dict[str, list[int]]:
    """{kind: bytes read and written by each} of the operations that a step runs one after the other: those of the entry
    computation, and of what it calls but does not fuse. Branches of a `lax.cond` are left out."""
    parts = computations(outside_branches(text))
    sizes = {
        match[1]: array_bytes(match[2])
        for part in parts.values()
        for match in re.finditer(r"%?([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\(", part)
    }
    entry = next(name for name, part in parts.items() if part.startswith("ENTRY"))
    found: dict[str, list[int]] = {}
    waiting = [entry]
    while waiting:
        for line in parts[waiting.pop()].splitlines():
            match = _OPERATION.match(line)
            if match is None or match["kind"] in _FREE:
                continue
            if match["kind"] in ("call", "while"):
                waiting += [name for called in _CALLED.finditer(line) for name in _names(called) if name in parts]
                continue
            read = sum(sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", match["operands"]))
            found.setdefault(match["kind"], []).append(read + array_bytes(match["result"]))
    return found


def array_bytes(shape: str) -> int:
    """The bytes of an array, or of a tuple of arrays."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * (8 if kind == "pred" else int(bits)) // 8
        for kind, bits, dims in _SHAPE.findall(shape)
    )
