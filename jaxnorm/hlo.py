"""What a compiled program's text (HLO) says: which operations a step runs, what they cost, what replicas send."""

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([%\w.\-]+))")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")


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
    branches = {name for part in parts.values() for match in _BRANCHES.finditer(part) for name in _names(match)}
    entry = {name for name, part in parts.items() if part.startswith("ENTRY")}
    left = _reached(parts, branches) - _reached(parts, entry)
    return "\n".join(part for name, part in parts.items() if name not in left)


def _reached(parts: dict[str, str], start: set[str]) -> set[str]:
    """These computations and those that they call, but as branches."""
    reached, new = set(start), set(start)
    while new:
        new = {name for part in new for match in _CALLED.finditer(parts.get(part, "")) for name in _names(match)}
        new -= reached
        reached |= new
    return reached


def _names(match: re.Match[str]) -> list[str]:
    return [name.strip().removeprefix("%") for group in match.groups() if group for name in group.split(",")]


_WHILE = re.compile(r" while\(%?(?P<operand>[\w.\-]+)\).*?condition=%?(?P<condition>[\w.\-]+)")
_COUNTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BELOW = re.compile(r"ROOT .* compare\(%?(?P<counter>[\w.\-]+), %?(?P<limit>[\w.\-]+)\), direction=LT")


def runs(parts: dict[str, str]) -> dict[str, int]:
    """How often a step runs each computation that the entry one reaches: the body of a loop as often as it goes round.

    A loop whose length is not known before it runs (`jax.lax.while_loop`) counts once.
    """
    found: dict[str, int] = {}
    waiting = [(name, 1) for name, part in parts.items() if part.startswith("ENTRY")]
    while waiting:
        name, times = waiting.pop()
        found[name] = found.get(name, 0) + times
        for line in parts[name].splitlines():
            again = times * _rounds(line, parts[name], parts) if " while(" in line else times
            waiting += [
                (called, again) for match in _CALLED.finditer(line) for called in _names(match) if called in parts
            ]
    return found


def _rounds(line: str, part: str, parts: dict[str, str]) -> int:
    """How often a loop goes round. Where XLA does not write it, a scan's loop shows it: from a constant to a limit."""
    if counted := _COUNTED.search(line):
        return int(counted[1])
    loop = _WHILE.search(line)
    condition = parts.get(loop["condition"], "") if loop else ""
    below = _BELOW.search(condition)
    if loop is None or below is None:
        return 1
    limit, index = _constant(below["limit"], condition), re.search(rf"%?{below['counter']} = .*index=(\d+)", condition)
    carried = re.search(rf"%?{loop['operand']} = .* tuple\((.*?)\)(?:, |$)", part, re.M)
    if limit is None or index is None or carried is None:
        return 1
    first = _constant(re.findall(r"%([\w.\-]+)", carried[1])[int(index[1])], part)
    return 1 if first is None else max(limit - first, 0)


def _constant(name: str, part: str) -> int | None:
    """The whole number that an operation of this computation has, a copy of it too."""
    while found := re.search(rf"%?{re.escape(name)} = \S+ (constant|copy)\(%?([\w.\-]+)\)", part):
        if found[1] == "constant":
            return int(found[2])
        name = found[2]
    return None


_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<result>\(.*?\)|\S+) (?P<kind>[\w\-]+)\((?P<operands>.*?)\)(?:, |$)"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]")
# Of a conditional the branch that is not taken is left out, and the other one only hands on what it was given.
_FREE = {"conditional", "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def operations(text: str) -> dict[str, list[int]]:
    """{kind: bytes read and written by each} of the operations that a step runs one after the other: those of the entry
    computation, and of what it calls but does not fuse, in a loop each time. Branches of a `lax.cond` are left out."""
    parts = computations(outside_branches(text))
    times = runs(parts)
    sizes = {
        match[1]: array_bytes(match[2])
        for part in parts.values()
        for match in re.finditer(r"%?([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\(", part)
    }
    entry = next(name for name, part in parts.items() if part.startswith("ENTRY"))
    found: dict[str, list[int]] = {}
    waiting, seen = [entry], {entry}
    while waiting:
        name = waiting.pop()
        for line in parts[name].splitlines():
            match = _OPERATION.match(line)
            if match is None or match["kind"] in _FREE:
                continue
            if match["kind"] in ("call", "while"):
                new = {called for found in _CALLED.finditer(line) for called in _names(found)} & parts.keys() - seen
                waiting, seen = waiting + sorted(new), seen | new
                continue
            read = sum(sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", match["operands"]))
            found.setdefault(match["kind"], []).extend([read + array_bytes(match["result"])] * times[name])
    return found


def array_bytes(shape: str) -> int:
    """The bytes of an array, or of a tuple of arrays."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    return [
        math.prod(int(n) for n in dims.split(",") if n) * (8 if kind == "pred" else int(bits)) // 8
        for kind, bits, dims in _SHAPE.findall(shape)
    ]


class Collective(NamedTuple):
    """One collective of a compiled program."""

    kind: str  # "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute"
    bytes: int  # what a replica gives
    name: str = ""  # the operation of the JAX program that it comes from


_COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
    r'(?:.*?op_name="(?P<name>[^"]*)")?'
)


def collectives(text: str, replicas: int) -> list[Collective]:
    """The collectives of one program in its order, in a loop each time; those of a branch that a step need not take are
    left out."""
    parts = computations(outside_branches(text))
    times = runs(parts)
    found = []
    for name, match in ((name, match) for name, part in parts.items() for match in _COLLECTIVE.finditer(part)):
        kind, sizes = match["kind"], _sizes(match["result"])
        size = sum(sizes)
        if kind == "all-gather":
            # all-gather-start gives (what went in, what comes out); all-gather what comes out.
            size = (sum(sizes[len(sizes) // 2 :]) if match["start"] else size) // replicas
        elif kind == "reduce-scatter":
            size *= replicas
        found += [Collective(kind, size, match["name"] or "")] * times.get(name, 1)
    return found


_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")


def cycles(text: str, of: str = "", but_with: tuple[str, ...] = ()) -> int:
    """The cycles that a TPU's compiler estimates for the operations of a step: of a loop each time that it goes round,
    of a `lax.cond` no branch.

    `of` takes only those in which the name of some operation contains it (`jax.named_scope`), `but_with` none in which
    one of these HLO operations is fused: what is computed beside a convolution costs no time of its own. The estimate
    is of computation and of its traffic with memory, not of waiting for other replicas.
    """
    parts = computations(outside_branches(text))
    times = runs(parts)
    total = 0
    for name, part in parts.items():
        for line in part.splitlines():
            if not (match := _CYCLES.search(line)):
                continue
            fused = "\n".join([line, *(parts.get(name, "") for name in _CALLS.findall(line))])
            if of in fused and not any(f" {kind}(" in fused for kind in but_with):
                total += int(match[1]) * times.get(name, 1)
    return total
