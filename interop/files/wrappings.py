"""From what a file holds to one state dict: training checkpoints, pickled models, prefixes of wrappers.

| written by | what the file holds |
|---|---|
| `torch.save(model.state_dict())` | the state dict itself |
| timm, `CheckpointSaver` | `state_dict`, `state_dict_ema`, `optimizer`, `epoch`, `arch`, `args`, ... |
| torchvision's references | `model`, `model_ema` (`n_averaged`, `module.*`), `optimizer`, `epoch`, `args`, ... |
| Ultralytics | `model` and `ema`, each None or a pickled module; `train_args`, `date`, ... |
| DistributedDataParallel, DataParallel, AveragedModel | names begin with `module.` |
| torch.compile, FSDP, activation checkpointing | `_orig_mod` and the like somewhere in the names |
"""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import numpy as np

from interop.files.disk import CheckpointError
from interop.files.pickled_module import batch_norms, collect, is_module
from interop.files.rebuild import Unsupported, finish
from interop.files.stand_ins import Global, Instance, name_of
from interop.files.tensors import Tensor

logger = logging.getLogger("interop")

_MODEL_KEYS: Final = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params")
_EMA_WORDS: Final = frozenset({"ema", "averaged", "swa"})
_OTHER_WORDS: Final = frozenset({"optimizer", "optim", "optimizers", "scheduler", "schedulers", "scaler", "rng"})
_WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_NAMESPACES: Final = ("argparse.Namespace", "types.SimpleNamespace")
_DEEPEST = 100
_LEVELS = 3  # of keys down to a state dict


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
    """

    entries: dict[str, Entry]
    metadata: dict[str, Any]
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    batch_norms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def unwrap(value: Any, which: str | None, path: pathlib.Path) -> StateDict:
    """The state dict in `value`.

    Args:
        value: what the file holds, with stand-ins for tensors and objects.
        which: "model" for the trained weights, "ema" for their average, or the name of one of the file's state dicts
            (`metadata["choices"]`). None takes the model, as torchvision does, but the average where whole modules are
            pickled, as Ultralytics does.
        path: for messages.

    Raises:
        CheckpointError: if there is no state dict or no such one, if several could be meant, if an entry is no array.
    """
    choices = _choices(value)
    if not choices:
        raise CheckpointError(path, f"has no state dict: {_describe(value)}")
    name = _choose(choices, which, path)
    chosen = choices[name]
    unwrapped = [name] if name else []
    layers: dict[str, dict[str, Any]] = {}
    if is_module(chosen):
        unwrapped.append(f"pickled {chosen.cls}")
        found, layers = collect(chosen, path), batch_norms(chosen, path)
    else:
        found = {str(key): finish(item) for key, item in _as_dict(chosen).items()}
    entries, rest = _entries(found, path)
    entries, notes, prefixes = strip_prefixes(entries, path)
    metadata: dict[str, Any] = {}
    if name:
        tops = {choice.partition("/")[0] for choice in choices}
        metadata = {str(key): plain(item, path) for key, item in _as_dict(value).items() if key not in tops}
    metadata |= notes
    if rest:
        metadata["not_arrays"] = {key: plain(item, path) for key, item in rest.items()}
    metadata |= {"which": name, "choices": sorted(choices) if name else [], "unwrapped": unwrapped + prefixes}
    if metadata["unwrapped"]:
        others = ", ".join(choice for choice in choices if choice != name) or "nothing"
        logger.info("%s: unwrapped %s; not taken: %s", path, ", ".join(metadata["unwrapped"]), others)
    if rest:
        logger.warning("%s: %d entries of the state dict are no arrays: %s", path, len(rest), ", ".join(list(rest)[:8]))
    attributes = chosen.attributes if isinstance(chosen, Instance) else getattr(chosen, "__dict__", {})
    kept = versions(attributes.get("_metadata"))
    return StateDict(entries, metadata, _bare(kept, prefixes), _bare(layers, prefixes))


def strip_prefixes(entries: dict[str, Entry], path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, int], list[str]]:
    """Names as the bare model has them; notes (`n_averaged`) and the wrappers that were taken off."""
    notes: dict[str, int] = {}
    removed: list[str] = []
    while entries:
        names = [name for name in entries if name != "n_averaged"]
        if names and all(name.startswith("module.") for name in names):
            if "n_averaged" in entries:
                notes["n_averaged"] = _count(entries["n_averaged"].array(), path)
                removed.append("averaged model")
            removed.append("module.")
            entries = {name.removeprefix("module."): entries[name] for name in names}
            continue
        break
    for wrapper in _WRAPPERS:
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
    for wrapper in _WRAPPERS:
        without = [re.sub(rf"(^|\.){wrapper}\.", r"\1", name) for name in bare]
        if without != bare:
            return bare_names(without)
    return bare


def _count(array: np.ndarray, path: pathlib.Path) -> int:
    try:
        return int(array.item())
    except (ValueError, TypeError, OverflowError):  # several numbers, NaN, complex ones, infinity
        found = array if array.ndim == 0 else f"an array of shape {array.shape}"
        raise CheckpointError(path, f"entry 'n_averaged' is not a number of models but {found}") from None


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


def _bare(by_module: dict[str, Value], removed: list[str]) -> dict[str, Value]:
    """The same by the names of modules that the bare model has; where a wrapper and the wrapped meet, the wrapped."""
    for step in removed:
        if step == "module.":
            by_module = {
                name.removeprefix("module").removeprefix("."): value
                for name, value in by_module.items()
                if f"{name}.".startswith("module.")
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


def _is_tensor(value: Any) -> bool:
    return isinstance(finish(value), Tensor | Unsupported | np.ndarray | np.generic)


def _as_dict(value: Any) -> Any:
    """What an object of a dict's subclass holds, or a namespace; any other value as it is."""
    if not isinstance(value, Instance):
        return value
    return value.attributes if str(value.cls) in _NAMESPACES else value.items or value


def _rank(value: Any) -> int:
    """2 for a state dict (or a module), 1 for one of single numbers, which may be results as well, 0 for none."""
    if is_module(value):
        return 2
    items = _as_dict(value)
    if not isinstance(items, dict) or not all(isinstance(key, str) for key in items):
        return 0
    ranks = (1 if getattr(finish(item), "shape", None) == () else 2 for item in items.values() if _is_tensor(item))
    return max(ranks, default=0)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def is_average(name: str) -> bool:
    """Whether a state dict of this name is an average of the model: `state_dict_ema`, `model_ema`, `swa`."""
    return bool(_words(name) & _EMA_WORDS)


def _choices(value: Any, depth: int = 0) -> dict[str, Any]:
    """All state dicts in the value, by their keys joined with '/'; the name is empty if it is one itself.

    A mapping that holds state dicts is not one itself: tensors beside them are other things, such as the best loss. It
    is one after all where the names of its own arrays have dots, as those of modules in modules do, or where it holds
    arrays and the mappings in it only single numbers. A module's `_extra_state` is never a state dict.
    """
    items = _as_dict(value)
    found: dict[str, Any] = {}
    if isinstance(items, dict) and depth < _LEVELS and (depth == 0 or len(items) < 1000):
        for key, item in items.items():
            if isinstance(key, str) and not _words(key) & _OTHER_WORDS and not key.endswith("_extra_state"):
                inner = _choices(item, depth + 1)
                found |= {f"{key}/{name}" if name else key: state for name, state in inner.items()}
    rank = _rank(value)
    if rank == 0 or any(name in _MODEL_KEYS or is_average(name) for name in found):
        return found
    dotted = rank == 2 and found and any("." in key and _rank({key: item}) == 2 for key, item in items.items())
    return {"": value} if dotted or rank > max(map(_rank, found.values()), default=0) else found


def _choose(choices: Mapping[str, Any], which: str | None, path: pathlib.Path) -> str:
    listed = ", ".join(repr(name) for name in choices if name) or "none but the one it is"
    averages = [name for name in choices if is_average(name)]
    models = [name for name in choices if name not in averages]
    preferred = [name for name in models if name in _MODEL_KEYS] or models
    if which is not None and which in choices:
        return which
    if which == "ema":
        wanted = averages
    elif which == "model":
        wanted = preferred
    elif which is not None:
        raise CheckpointError(path, f"has no state dict {which!r}; its state dicts: {listed}")
    elif averages and any(is_module(item) for item in choices.values()):
        wanted = averages
    else:
        wanted = preferred or averages
    if not wanted:
        raise CheckpointError(path, f"has no state dict for which={which!r}; its state dicts: {listed}")
    best = max(_rank(choices[name]) for name in wanted)
    wanted = [name for name in wanted if _rank(choices[name]) == best]
    if len(wanted) > 1:
        raise CheckpointError(path, f"has several state dicts: {listed}; choose one by which=")
    return wanted[0]


def _entries(found: dict[str, Any], path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, Any]]:
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


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        kinds = [f"{name_of(key)}: {_kind(item)}" for key, item in list(value.items())[:8]]
        return f"a mapping of {len(value)} entries ({', '.join(kinds)})"
    return f"the file holds {_kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, Global | Instance):
        return str(value)
    return "a tensor" if _is_tensor(value) else type(value).__name__
