"""From what a file holds to one state dict: training checkpoints, pickled models, prefixes of wrappers.

The state dicts that a file holds, and what is taken off their names; `state_dicts` chooses one:

| by | names |
|---|---|
| DistributedDataParallel, DataParallel, AveragedModel | begin with `module.` |
| torch.compile, FSDP, activation checkpointing | have `_orig_mod` and the like somewhere |
"""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import numpy as np

from interop.files.averages import COUNTERS, MODEL_KEYS, is_average
from interop.files.disk import CheckpointError
from interop.files.pickled_module import is_module
from interop.files.rebuild import Unsupported, finish
from interop.files.stand_ins import Global, Instance, name_of
from interop.files.tensors import Tensor

logger = logging.getLogger("interop")

_OTHER_WORDS: Final = frozenset({"optimizer", "optim", "optimizers", "scheduler", "schedulers", "scaler", "rng"})
WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_NAMESPACES: Final = ("argparse.Namespace", "types.SimpleNamespace")
_DEEPEST = 100
_LEVELS = 4  # of keys down to a state dict


@dataclasses.dataclass(frozen=True)
class InMemory:
    """An array that the pickle itself contained."""

    value: np.ndarray

    def array(self) -> np.ndarray:
        """The array, read only like all others."""
        view = self.value.view()
        view.flags.writeable = False
        return view


Entry = Tensor | InMemory
"""What becomes an array when it is asked for."""


@dataclasses.dataclass(frozen=True)
class StateDict:
    """One state dict out of a file, and what else the file says.

    `versions` are those of the modules that the state dict came from (`_metadata` of torch.nn.Module.state_dict), and
    `batch_norms` the flags of a pickled module's layers; both by the module's name, and empty if the file has none.
    `prefix` is the `module.` that was taken off all names.
    """

    entries: dict[str, Entry]
    metadata: dict[str, Any]
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    batch_norms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    prefix: str = ""


def strip_prefixes(entries: dict[str, Entry], path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, int], list[str]]:
    """Names as the bare model has them; notes (`n_averaged`) and the wrappers that were taken off."""
    notes: dict[str, int] = {}
    removed: list[str] = []
    while entries:
        names = [name for name in entries if name not in COUNTERS]
        if names and all(name.startswith("module.") for name in names):
            if len(names) < len(entries):
                notes |= {name: count(name, entries[name].array(), path) for name in entries if name in COUNTERS}
                removed.append("averaged model")
            removed.append("module.")
            entries = {name.removeprefix("module."): entries[name] for name in names}
            continue
        break
    for wrapper in WRAPPERS:
        pattern = re.compile(rf"(^|\.){wrapper}\.")
        if any(pattern.search(name) for name in entries):
            renamed: dict[str, Entry] = {}
            for name, entry in entries.items():
                new = pattern.sub(r"\1", name)
                if new in renamed:
                    raise CheckpointError(path, f"entry {name!r}: without {wrapper!r} there would be two of {new!r}")
                renamed[new] = entry
            entries = renamed
            removed.append(f"{wrapper}.")
            return _again(entries, notes, removed, path)
    return entries, notes, removed


def count(name: str, array: np.ndarray, path: pathlib.Path) -> int:
    try:
        return int(array.item())
    except (ValueError, TypeError, OverflowError):  # several numbers, NaN, complex ones, infinity
        found = array if array.ndim == 0 else f"an array of shape {array.shape}"
        raise CheckpointError(path, f"entry {name!r} is not a number of models but {found}") from None


def _again(
    entries: dict[str, Entry], notes: dict[str, int], removed: list[str], path: pathlib.Path
) -> tuple[dict[str, Entry], dict[str, int], list[str]]:
    entries, more_notes, more = strip_prefixes(entries, path)  # DDP around torch.compile, or the other way round
    return entries, notes | more_notes, removed + more


def versions(kept: Any) -> dict[str, int]:
    """The modules' versions in `state_dict._metadata`, `{module: {"version": number}}`, as far as it is that."""
    if not isinstance(kept, dict):
        return {}
    return {
        module: entry["version"]
        for module, entry in kept.items()
        if isinstance(module, str) and isinstance(entry, dict) and type(entry.get("version")) is int
    }


Value = TypeVar("Value")


def bare(by_module: dict[str, Value], removed: list[str]) -> dict[str, Value]:
    """The same by the names of modules that the bare model has; where a wrapper and the wrapped meet, the wrapped."""
    for step in removed:
        if step.endswith(".") and step[:-1] not in WRAPPERS:
            by_module = {
                f"{name}.".removeprefix(step).removesuffix("."): value
                for name, value in by_module.items()
                if f"{name}.".startswith(step)
            }
        elif step.endswith("."):
            pattern = re.compile(rf"(^|\.){re.escape(step)}")
            by_module = {pattern.sub(r"\1", f"{name}.").removesuffix("."): value for name, value in by_module.items()}
    return by_module


def plain(value: Any, path: pathlib.Path) -> Any:
    """Metadata as ordinary values: tensors as arrays, namespaces as dicts; what has no such form stays a stand-in."""
    memo: dict[int, Any] = {}

    def convert(value: Any, depth: int) -> Any:
        value = finish(value)
        if id(value) in memo:
            return memo[id(value)]
        if depth > _DEEPEST:
            raise CheckpointError(path, "is nested more deeply than a checkpoint")
        if isinstance(value, Tensor):
            if problem := value.problem():
                raise CheckpointError(path, f"a tensor beside the state dict: {problem}")
            memo[id(value)] = value.array()
            return memo[id(value)]
        if isinstance(value, Instance) and not is_module(value):
            cls = str(value.cls)
            if cls in _NAMESPACES:
                value = value.attributes
            elif cls.startswith("pathlib.") and value.args and all(isinstance(part, str) for part in value.args):
                return str(pathlib.PurePosixPath(*value.args))
            elif cls == "torch.device":
                return ":".join(str(part) for part in value.args if isinstance(part, str | int))
            else:
                return value
        if isinstance(value, dict):
            result: Any = {}
            memo[id(value)] = result
            for key, item in value.items():
                result[key] = convert(item, depth + 1)
            return result
        if isinstance(value, list):
            result = []
            memo[id(value)] = result
            result.extend(convert(item, depth + 1) for item in value)
            return result
        if isinstance(value, tuple):
            memo[id(value)] = result = tuple(convert(item, depth + 1) for item in value)
            return result
        return value

    return convert(value, 0)


def is_tensor(value: Any) -> bool:
    return isinstance(finish(value), Tensor | Unsupported | np.ndarray | np.generic)


def as_dict(value: Any) -> Any:
    """What an object of a dict's subclass holds, a namespace, or a list of pairs of a name and a dict (composer's
    algorithms: composer/core/state.py, State.state_dict); any other value as it is."""
    if isinstance(value, list) and 0 < len(value) < 100 and all(_is_named(item) for item in value):
        return dict(value)
    if not isinstance(value, Instance):
        return value
    return value.attributes if str(value.cls) in _NAMESPACES else value.items or value


def _is_named(item: Any) -> bool:
    return (
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict | Instance)
    )


def rank_of(value: Any) -> int:
    """2 for a state dict (or a module), 1 for one of single numbers, which may be results as well, 0 for none."""
    if is_module(value):
        return 2
    items = as_dict(value)
    if not isinstance(items, dict) or not all(isinstance(key, str) for key in items):
        return 0
    ranks = (1 if getattr(finish(item), "shape", None) == () else 2 for item in items.values() if is_tensor(item))
    return max(ranks, default=0)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def choices_in(value: Any, depth: int = 0) -> dict[str, Any]:
    """All state dicts in the value, by their keys joined with '/'; the name is empty if it is one itself.

    A mapping that holds state dicts is not one itself: tensors beside them are other things, such as the best loss. It
    is one after all where the names of its own arrays have dots, as those of modules in modules do, or where it holds
    arrays and the mappings in it only single numbers. A module's `_extra_state` is never a state dict.
    """
    items = as_dict(value)
    found: dict[str, Any] = {}
    if isinstance(items, dict) and depth < _LEVELS and (depth == 0 or len(items) < 1000):
        for key, item in items.items():
            if isinstance(key, str) and not _words(key) & _OTHER_WORDS and not key.endswith("_extra_state"):
                inner = choices_in(item, depth + 1)
                found |= {f"{key}/{name}" if name else key: state for name, state in inner.items()}
    rank = rank_of(value)
    if rank == 0 or any(name in MODEL_KEYS or is_average(name) for name in found):
        return found
    dotted = rank == 2 and found and any("." in key and rank_of({key: item}) == 2 for key, item in items.items())
    return {"": value} if dotted or rank > max(map(rank_of, found.values()), default=0) else found


def entries_of(found: dict[str, Any], path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries that are arrays, and the others. Raises with all entries that are broken."""
    entries: dict[str, Entry] = {}
    rest: dict[str, Any] = {}
    problems: list[str] = []
    for name, item in found.items():
        if isinstance(item, Tensor):
            if problem := item.problem():
                problems.append(f"entry {name!r}: {problem}")
            entries[name] = item
        elif isinstance(item, np.ndarray | np.generic):
            entries[name] = InMemory(np.asarray(item))
        elif isinstance(item, Unsupported):
            problems.append(f"entry {name!r} is no array: {item.reason}")
        else:
            rest[name] = item
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(path, "; ".join(problems[:8]) + more)
    if not entries:
        raise CheckpointError(path, "has no tensors in its state dict")
    return entries, rest


def describe(value: Any) -> str:
    if isinstance(value, Mapping):
        kinds = [f"{name_of(key)}: {_kind(item)}" for key, item in list(value.items())[:8]]
        return f"a mapping of {len(value)} entries ({', '.join(kinds)})"
    return f"the file holds {_kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, Global | Instance):
        return str(value)
    return "a tensor" if is_tensor(value) else type(value).__name__
