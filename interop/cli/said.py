"""What a checkpoint says beside its weights, for a reader: its settings whole, everything else in a line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from interop.cli.output import shown
from interop.cli.values import brief
from interop.files.averages import find_inner
from interop.files.checkpoint import Checkpoint, load_checkpoint
from interop.files.disk import CheckpointError

_OURS = ("which", "choices", "unwrapped")  # what the reader adds: shown as the state dicts that there are
_MOST = 400  # settings of one dict that are shown
_LONG = 200  # characters of one value


def lines(metadata: Mapping[str, Any]) -> Iterator[str]:
    """The metadata as lines of printable text: dicts of settings (`args`) with all values, others by their keys."""
    for key, value in metadata.items():
        if key in _OURS or value is None or (isinstance(value, str | list) and not value):
            continue
        if not _is_settings(value):
            yield shown(f"{key}: {_cut(brief(value))}")
            continue
        items = [f"{name}={_cut(_setting(item))}" for name, item in list(value.items())[:_MOST]]
        items += [f"and {len(value) - _MOST} more"] * (len(value) > _MOST)
        text = shown(f"{key}: {', '.join(items)}")
        yield from textwrap.wrap(text, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _is_settings(value: object) -> bool:
    """Whether most of what a dict has are numbers and texts, as in a program's arguments."""
    if not isinstance(value, dict) or not value:
        return False
    return 2 * sum(map(_is_plain, value.values())) > len(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 20 and all(map(_is_plain_scalar, value))
    return _is_plain_scalar(value)


def _is_plain_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _setting(value: object) -> str:
    if isinstance(value, list | tuple) and _is_plain(value):
        return f"[{', '.join(map(brief, value))}]"
    return brief(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


class StateDict(NamedTuple):
    """One of the state dicts that a file has."""

    name: str
    which: list[str]  # what --which may be, to get it
    taken: bool


def state_dicts(checkpoint: Checkpoint) -> list[StateDict]:
    """The state dicts of a file, and how each is asked for; none where the file is one, without an average in it.

    What `model` and `ema` mean is found by asking for them.
    """
    choices, taken = checkpoint.metadata["choices"], checkpoint.metadata["which"]
    if len(choices) < 2 and find_inner(list(checkpoint)) is None and not checkpoint.metadata.get("n_averaged"):
        return []
    meant: dict[str, list[str]] = {name: [] for name in choices or [taken]}
    for word in ("model", "ema"):
        try:
            meant[load_checkpoint(checkpoint.path, word).metadata["which"]].append(word)
        except CheckpointError:  # the file has none, or does not say which it is
            continue
    return [
        StateDict(name, words if name in ("", *words) else [*words, name], name == taken)
        for name, words in meant.items()
    ]
