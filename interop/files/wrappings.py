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
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import numpy as np

from interop.files.averages import COUNTERS, MODEL_KEYS, is_average
from interop.files.budget import Budget
from interop.files.disk import CheckpointError
from interop.files.metadata import NAMESPACES
from interop.files.pickled_module import is_module
from interop.files.rebuild import Unsupported, finish
from interop.files.stand_ins import Called, Global, Instance, name_of
from interop.files.tensors import Tensor

logger = logging.getLogger("interop")

_OTHER_WORDS: Final = frozenset({"optimizer", "optim", "optimizers", "scheduler", "schedulers", "scaler", "rng"})
WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LEVELS = 4  # of keys down to a state dict
_MOST_WRAPPERS = 16  # around each other


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
    while (names := [name for name in entries if name not in COUNTERS]) and (
        times := min(_times(name, "module.") for name in names)
    ):
        if times > _MOST_WRAPPERS or len(removed) > _MOST_WRAPPERS:
            raise CheckpointError(path, f"its names begin with 'module.' {times} times, which no wrapper writes")
        if len(names) < len(entries):
            notes |= {name: count(name, entries[name].array(), path) for name in entries if name in COUNTERS}
            removed.append("averaged model")
        removed += ["module."] * times
        entries = {name[times * len("module.") :]: entries[name] for name in names}
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


def bare_names(names: Iterable[str]) -> list[str]:
    """The names as `load_checkpoint` gives them: without those of wrappers."""
    bare = list(names)
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    for wrapper in WRAPPERS:
        without = [re.sub(rf"(^|\.){wrapper}\.", r"\1", name) for name in bare]
        if without != bare:
            return bare_names(without)
    return bare


def _times(text: str, prefix: str) -> int:
    """How often a text begins with a prefix."""
    position = 0
    while text.startswith(prefix, position):
        position += len(prefix)
    return position // len(prefix)


def count(name: str, array: np.ndarray, path: pathlib.Path) -> int:
    try:
        return int(array.item())
    except (ValueError, TypeError, OverflowError):  # several numbers, NaN, complex ones, infinity
        found = array if array.ndim == 0 else f"an array of shape {array.shape}"
        raise CheckpointError(path, f"entry {name!r} is not a number of models but {found}") from None


def _again(
    entries: dict[str, Entry], notes: dict[str, int], removed: list[str], path: pathlib.Path
) -> tuple[dict[str, Entry], dict[str, int], list[str]]:
    if len(removed) > _MOST_WRAPPERS:
        raise CheckpointError(path, f"its names have more than {_MOST_WRAPPERS} wrappers around each other")
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


def is_tensor(value: Any) -> bool:
    return isinstance(finish(value), Tensor | Unsupported | np.ndarray | np.generic)


def as_dict(value: Any) -> Any:
    """What an object of a dict's subclass holds, a namespace, or a list of pairs of a name and a dict (composer's
    algorithms: composer/core/state.py, State.state_dict); any other value as it is."""
    if isinstance(value, list) and 0 < len(value) < 100 and all(_is_named(item) for item in value):
        return dict(value)
    if not isinstance(value, Instance):
        return value
    return value.attributes if str(value.cls) in NAMESPACES else value.items or value


def _is_named(item: Any) -> bool:
    return (
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict | Instance)
    )


def _rank(items: dict[Any, Any]) -> int:
    """The rank of a mapping (`Search.rank`) by the arrays that are its own."""
    if not all(isinstance(key, str) for key in items):
        return 0
    ranks = (1 if getattr(finish(item), "shape", None) == () else 2 for item in items.values() if is_tensor(item))
    return max(ranks, default=0)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


class Search:
    """Finds the state dicts in a value. What is found of a shared mapping is kept, and each name is charged."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._ranks: dict[int, int] = {}
        self._found: dict[tuple[int, int], dict[str, Any]] = {}

    def rank(self, value: Any) -> int:
        """2 for a state dict (or module), 1 for one of single numbers, which may be results as well, 0 for none."""
        items = as_dict(value)
        if not isinstance(items, dict):
            return 2 if is_module(value) else 0
        if id(value) not in self._ranks:
            self.budget.spend(memory=100, steps=3 * len(items))
            self._ranks[id(value)] = 2 if is_module(value) else _rank(items)
        return self._ranks[id(value)]

    def choices(self, value: Any, depth: int = 0) -> dict[str, Any]:
        """All state dicts in the value, by their keys joined with '/'; the name is empty if it is one itself.

        A mapping that holds state dicts is not one itself: tensors beside them are other things, such as the best loss.
        It is one after all where the names of its own arrays have dots, as those of modules in modules do, or where it
        holds arrays and the mappings in it only single numbers. A module's `_extra_state` is never a state dict.
        """
        items = as_dict(value)
        if not isinstance(items, dict) and not is_module(value):
            return {}
        if (id(value), depth) not in self._found:
            self._found[id(value), depth] = self._choices(value, items, depth)
        return self._found[id(value), depth]

    def _choices(self, value: Any, items: Any, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if isinstance(items, dict) and depth < _LEVELS and (depth == 0 or len(items) < 1000):
            for key, item in items.items():
                if not isinstance(key, str):
                    continue
                self.budget.spend(steps=1 + len(key) // 8)
                if not isinstance(as_dict(item), dict | Instance) or key.endswith("_extra_state"):
                    continue
                if _words(key) & _OTHER_WORDS:
                    continue
                inner = self.choices(item, depth + 1)
                self.budget.spend(len(inner) * (150 + len(key)) + sum(map(len, inner)), 10 * len(inner))
                found |= {f"{key}/{name}" if name else key: state for name, state in inner.items()}
        rank = self.rank(value)
        self.budget.spend(steps=30 * len(found) + sum(map(len, found)) // 8)  # for what their names say
        if rank == 0 or any(name in MODEL_KEYS or is_average(name) for name in found):
            return found
        dotted = rank == 2 and found and any("." in key and _rank({key: item}) == 2 for key, item in items.items())
        return {"": value} if dotted or rank > max(map(self.rank, found.values()), default=0) else found


def entries_of(found: dict[str, Any], path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries that are arrays, and the others. Raises with all entries that are broken."""
    entries: dict[str, Entry] = {}
    rest: dict[str, Any] = {}
    problems: list[str] = []
    wrong = 0
    for name, item in found.items():
        problem = None
        if isinstance(item, Tensor):
            found_problem = item.problem()
            problem = found_problem and f": {found_problem}"
            entries[name] = item
        elif isinstance(item, np.ndarray | np.generic):
            entries[name] = InMemory(np.asarray(item))
        elif isinstance(item, Unsupported):
            problem = f" is no array: {item.reason}"
        elif isinstance(item, Called) and not name.endswith("_extra_state"):
            problem = f" may be an array, but asks to call the function {item.cls}, which is not done"
        else:
            rest[name] = item
        if problem is not None:
            wrong += 1
            if wrong <= 8:
                problems.append(f"entry {name_of(name)}{problem}")
    if problems:
        raise CheckpointError(path, "; ".join(problems) + (f" (and {wrong - 8} more)" if wrong > 8 else ""))
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
