"""Names that the two sides choose differently: one rule, used in both directions.

A rename goes from the names of a state dict to those of the model. `load_state_dict` uses it as it is, `state_dict`
backwards; what is not exactly invertible for the names at hand is an error in both.

| `rename` | backwards |
|---|---|
| mapping of names | the inverse mapping |
| list of pairs (pattern, replacement) for `re.sub`, applied in order | the inverse pairs in reverse order |
| function | none: for loading only |
| pair of functions, to the model's names and to PyTorch's | the second one |

A pair's inverse follows from the pair if the pattern is made of plain text, escaped characters (`\\.`), `^`, `$` and
capturing groups that the replacement uses once each: `(r"layer(\\d)\\.(\\d+)", r"block\\1_\\2")`. For any other pattern
give the way back too: (pattern, replacement, pattern back, replacement back).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from interop.errors import shown

Name = Callable[[str], str]
Rename = Name | Mapping[str, str] | Sequence[Any]
"""See above. As a type, a sequence is of pairs (or fours) of strings, or of two functions."""


class Renaming:
    """A rename, ready for use in both directions."""

    def __init__(self, rename: Rename | None) -> None:
        self._there: Name
        self._back: Name | None
        if rename is None:
            self._there = self._back = _unchanged
        elif isinstance(rename, Mapping):
            if wrong := [pair for pair in rename.items() if not all(isinstance(one, str) for one in pair)]:
                raise TypeError(
                    f"names that rename gives have to be strings, as those it takes, found {shown(wrong[0])}"
                )
            _refuse_collisions(rename.items())
            inverse = {new: old for old, new in rename.items()}
            self._there = lambda name: rename.get(name, name)
            self._back = lambda name: inverse.get(name, name)
        elif callable(rename):
            self._there, self._back = _named(rename), None
        elif not isinstance(rename, Sequence) or isinstance(rename, str | bytes):
            raise TypeError(
                f"rename is a list of pairs (pattern, replacement), a mapping or a function; found {shown(rename)}"
            )
        elif len(rename) == 2 and all(callable(one) for one in rename):
            self._there, self._back = map(_named, rename)
        else:
            pairs = [_pair(pair) for pair in rename]
            self._there = _substitution([(pattern, new) for pattern, new, _, _ in pairs])
            self._back = _substitution([(pattern, new) for _, _, pattern, new in reversed(pairs)])

    def to_model(self, names: Iterable[str]) -> dict[str, str]:
        """The model's name for each name of a state dict.

        Raises:
            ValueError: if several become one, or one would not come back.
        """
        renamed = {name: self._there(name) for name in names}
        _refuse_collisions(renamed.items())
        if self._back is not None:
            _refuse_one_way(renamed, self._back)
        return renamed

    def to_torch(self, names: Iterable[str]) -> dict[str, str]:
        """PyTorch's name for each name of the model.

        Raises:
            ValueError: if several become one, if one would not come back, or for a function alone.
        """
        if self._back is None:
            raise ValueError(
                "rename is a function to the model's names, and the way back is wanted: give a pair of functions, "
                "(to the model's names, to PyTorch's), a mapping, or a list of pairs of patterns"
            )
        renamed = {name: self._back(name) for name in names}
        _refuse_collisions(renamed.items())
        _refuse_one_way(renamed, self._there)
        return renamed


def _unchanged(name: str) -> str:
    return name


def _named(function: Callable[[str], Any]) -> Name:
    """The caller's function, whose errors say for which name it failed."""

    def rename(name: str) -> str:
        try:
            new = function(name)
        except Exception as error:
            raise ValueError(f"rename fails for {name!r}: {type(error).__name__}: {error}") from error
        if not isinstance(new, str):
            raise TypeError(f"names that rename gives have to be strings, found {shown(new)} for {name!r}")
        return new

    return rename


def _substitution(pairs: Sequence[tuple[str, str]]) -> Name:
    compiled = [(re.compile(pattern), new) for pattern, new in pairs]

    def rename(name: str) -> str:
        for pattern, new in compiled:
            try:
                name = pattern.sub(new, name)
            except (re.error, IndexError) as error:
                raise ValueError(f"rename {(pattern.pattern, new)!r}: {error}") from None
        return name

    return rename


def _refuse_collisions(pairs: Iterable[tuple[str, str]]) -> None:
    by_new: dict[str, list[str]] = {}
    for old, new in pairs:
        by_new.setdefault(new, []).append(old)
    problems = [f"  {new!r} from {', '.join(map(repr, olds))}" for new, olds in by_new.items() if len(olds) > 1]
    if problems:
        raise ValueError("\n".join(["several keys are renamed to one:", *problems]))


def _refuse_one_way(renamed: Mapping[str, str], back: Name) -> None:
    problems = [
        f"  {old!r} becomes {new!r}, which goes back to {back(new)!r}"
        for old, new in renamed.items()
        if back(new) != old
    ]
    if problems:
        raise ValueError(
            "\n".join(["rename has no inverse for these names (anchor the patterns with ^ or $):", *problems])
        )


def _pair(pair: object) -> tuple[str, str, str, str]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or not all(isinstance(one, str) for one in pair):
        raise TypeError(
            f"rename is a list of pairs (pattern, replacement), a mapping or a function; found {shown(pair)}"
        )
    for pattern in pair[::2]:
        check_pattern(pattern, "rename")
    if len(pair) == 4:
        pattern, new, pattern_back, new_back = pair
        return pattern, new, pattern_back, new_back
    if len(pair) != 2:
        raise TypeError(f"a pair is (pattern, replacement), or both with those of the way back; found {pair!r}")
    pattern, new = pair
    return pattern, new, *inverse(pattern, new)


def check_pattern(pattern: str, what: str) -> None:
    """Raises ValueError if a text is no pattern of `re`."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}: {pattern!r:.200} is no pattern: {error}") from None


def inverse(pattern: str, replacement: str) -> tuple[str, str]:
    """The pattern and the replacement that undo `re.sub(pattern, replacement, ...)`.

        >>> inverse(r"^layer(\\d)\\.", r"stage_\\1/")
        ('^stage_(\\\\d)/', 'layer\\\\g<1>.')

    Raises:
        ValueError: if the pattern has more than plain text, ^, $ and groups, or the replacement does not use each group
            once.
    """
    start, end = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    texts, groups, names = _parsed(pattern, pattern[1 if start else 0 : len(pattern) - (1 if end else 0)])
    used: list[int] = []
    back = ""
    for text, group in _template(replacement, names):
        back += re.escape(text)
        if group is not None:
            used.append(group)
            back += groups[group - 1] if 0 < group <= len(groups) else ""
    if sorted(used) != list(range(1, len(groups) + 1)):
        raise ValueError(
            f"rename {(pattern, replacement)!r}: the inverse needs each group of the pattern once in the replacement; "
            "use it so, or give (pattern, replacement, pattern back, replacement back)"
        )
    new = texts[0].replace("\\", r"\\")
    for number, text in enumerate(texts[1:], 1):
        new += rf"\g<{used.index(number) + 1}>" + text.replace("\\", r"\\")
    return "^" * start + back + "$" * end, new


def _parsed(whole: str, pattern: str) -> tuple[list[str], list[str], dict[str, int]]:
    """The plain texts around the groups of a pattern, the groups without names, and the numbers of the names."""
    re.compile(whole)
    texts: list[str] = [""]
    groups: list[str] = []
    names: dict[str, int] = {}
    i = 0
    while i < len(pattern):
        character = pattern[i]
        if character == "\\" and not pattern[i + 1].isalnum():
            texts[-1] += pattern[i + 1]
            i += 2
        elif character == "(" and (pattern[i + 1] != "?" or pattern[i + 2 : i + 4] == "P<"):
            end = _closing(pattern, i)
            inner = pattern[i + 1 : end]
            if named := re.match(r"\?P<(\w+)>", inner):
                names[named[1]] = len(groups) + 1
                inner = inner[named.end() :]
            nested = re.compile(f"({inner})").groups > 1 or re.search(r"\\[1-9]", inner)
            if nested or pattern[end + 1 : end + 2] in ("*", "+", "?", "{"):
                raise _not_invertible(whole, pattern[i : end + 2])
            groups.append(f"({inner})")
            texts.append("")
            i = end + 1
        elif character in r"\.^$*+?{}[]|()":
            raise _not_invertible(whole, pattern[i : i + 2])
        else:
            texts[-1] += character
            i += 1
    return texts, groups, names


def _closing(pattern: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth, i, in_class = 0, start, False
    while True:
        character = pattern[i]
        if character == "\\":
            i += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
            i += pattern[i + 1] == "]"
        elif character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return i
        i += 1


def _not_invertible(pattern: str, part: str) -> ValueError:
    return ValueError(
        f"rename pattern {pattern!r}: {part!r} has no inverse. Escape what is meant as it stands (\\.), put the rest "
        "in groups that the replacement uses, or give (pattern, replacement, pattern back, replacement back)"
    )


def _template(replacement: str, names: Mapping[str, int]) -> Iterable[tuple[str, int | None]]:
    """The replacement as texts, each with the number of the group that follows it."""
    text, i = "", 0
    for reference in re.finditer(r"\\(\d{1,2}|g<(\w+)>|.)", replacement):
        text += replacement[i : reference.start()]
        i = reference.end()
        what = reference[2] or reference[1]
        if reference[2] is None and not what.isdigit():
            if what != "\\":
                raise ValueError(
                    f"rename replacement {replacement!r}: \\{what} is none of \\1, \\g<1>, \\g<name>, \\\\"
                )
            text += "\\"
            continue
        number = int(what) if what.isdigit() else names.get(what, 0)
        yield text, number
        text = ""
    yield text + replacement[i:], None
