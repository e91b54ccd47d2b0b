"""One state dict out of a file: the one that is asked for, or the only one that can be meant, as the model has it."""

import logging
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from interop.files import averages
from interop.files.averages import COUNTERS, LISTS, Sets
from interop.files.budget import Budget
from interop.files.disk import CheckpointError
from interop.files.metadata import Metadata, said
from interop.files.pickled_module import batch_norms, collect, is_module
from interop.files.rebuild import finish
from interop.files.stand_ins import Instance
from interop.files.wrappings import (
    WRAPPERS,
    Entry,
    Search,
    StateDict,
    as_dict,
    bare,
    count,
    describe,
    entries_of,
    is_tensor,
    strip_prefixes,
    versions,
)

logger = logging.getLogger("interop")


def unwrap(value: Any, which: str | None, path: pathlib.Path, budget: Budget, prefix: str | None = None) -> StateDict:
    """The state dict in `value`.

    Args:
        value: what the file holds, with stand-ins for tensors and objects.
        which: "model" for the trained weights, "ema" for their average, or the name of one of the file's state dicts
            (`metadata["choices"]`), which is taken as it is. None takes the model, as torchvision does, but the average
            where whole modules are pickled, as Ultralytics does.
        path: for messages.
        budget: what the search is charged to.
        prefix: what all names of a file's one state dict have before the model's own, if the file says so.

    Raises:
        CheckpointError: if there is no state dict or no such one, if several could be meant, if an entry is no array.
    """
    search = Search(budget)
    choices = search.choices(value)
    lists = list(_lists(value, budget))
    if not choices:
        unnamed = "".join(f"; {name!r} is an average without names, in the order of the parameters" for name in lists)
        raise CheckpointError(path, f"has no state dict: {describe(value)}{unnamed}")
    marks = {name: mark for name, chosen in choices.items() if (mark := _said(_metadata(chosen))) is not None}
    if prefix is not None and len(choices) == 1:
        marks[next(iter(choices))] = prefix
    sets = Sets(
        _all_names(choices, budget),
        {name: search.rank(chosen) for name, chosen in choices.items()},
        {name for name, chosen in choices.items() if is_module(chosen)},
        lambda place: _at(value, place),
        lists,
        marks,
        path,
    )
    name = sets.choose(which, lambda name: _has_inner(choices[name], path, budget))
    chosen = choices[name]
    unwrapped = [name] if name else []
    layers: dict[str, dict[str, Any]] = {}
    if is_module(chosen):
        unwrapped.append(f"pickled {chosen.cls}")
        found, layers = collect(chosen, path, budget), batch_norms(chosen, path, budget)
    else:
        found = {str(key): finish(item) for key, item in as_dict(chosen).items()}
    budget.spend(memory=200 * len(found), steps=10 * len(found))
    entries, rest = entries_of(found, path)
    kept = _metadata(chosen)
    mark = marks.get(name)
    wrapper = averages.wrapper_of(entries)
    if mark == "" and which in ("model", "ema") and wrapper is not None and wrapper.model is None:
        mark = f"{wrapper.ema}."  # a model that is an average, of which the weights are asked for
    if mark is not None:
        entries, notes, prefixes = _without(entries, mark, path)
    else:
        entries, notes, prefixes = strip_prefixes(entries, path)
    if which == "model" and notes and sets.format is None:
        sets.refuse(f"has no trained weights: {name or 'its one state dict'!r} is their average")
    if which in (None, "model", "ema"):
        entries, more, steps = _of_both(entries, which, sets, name, whole=mark is not None)
        notes |= more
        if steps and mark is None:
            entries, more, inner = strip_prefixes(entries, path)
            notes, steps = notes | more, steps + inner
        prefixes += steps
    metadata: dict[str, Any] = {}
    plain = Metadata(path, budget).plain
    if name:
        tops = {choice.partition("/")[0] for choice in choices}
        metadata = {said(key): plain(item) for key, item in as_dict(value).items() if key not in tops}
    metadata |= notes
    if rest:
        metadata["not_arrays"] = {key: plain(item) for key, item in rest.items()}
    metadata |= {"which": name, "choices": sorted(choices) if name else [], "unwrapped": unwrapped + prefixes}
    if metadata["unwrapped"]:
        others = ", ".join(choice for choice in choices if choice != name) or "nothing"
        logger.info("%s: unwrapped %s; not taken: %s", path, ", ".join(metadata["unwrapped"]), others)
    if rest:
        logger.warning("%s: %d entries of the state dict are no arrays: %s", path, len(rest), ", ".join(list(rest)[:8]))
    outer = "".join(prefixes) if all(step == "module." for step in prefixes) else ""
    return StateDict(entries, metadata, bare(versions(kept), prefixes), bare(layers, prefixes), outer)


def _of_both(
    entries: dict[str, Entry], which: str | None, sets: Sets, name: str, whole: bool
) -> tuple[dict[str, Entry], dict[str, Any], list[str]]:
    """Where one state dict has the trained weights and their average: the one that is asked for, under the model's
    names; notes; and what was taken off the names."""
    wrapper = averages.wrapper_of(entries)
    if wrapper is not None and wrapper.model is not None and not (whole and which is None):
        tops = {entry.partition(".")[0] for entry in entries}
        child = wrapper.model if which == "model" else wrapper.ema
        if child not in tops:
            sets.refuse(f"has no trained weights: {wrapper.name} holds the average alone")
        if which is None and wrapper.model in tops:
            sets.refuse(f"holds the trained weights and their average ({wrapper.name})")
        taken = {key.removeprefix(f"{child}."): item for key, item in entries.items() if key.startswith(f"{child}.")}
        counters = {
            f"{name}/{key}" if name else key: item.array() for key, item in entries.items() if key in wrapper.counters
        }
        return taken, counters, [f"{child}."]
    if which is None or sets.roles[name] == "ema":
        return entries, {}, []
    if averages.has_mmcv_buffers(entries):
        sets.refuse(
            "does not say which weights are the average: MMCV's EMAHook leaves them in 'ema_*' if the file was saved "
            "after an iteration, and exchanges the two if it was saved after an epoch"
        )
    inner = averages.find_inner(entries)
    if inner is None:
        return entries, {}, []
    taken = {key: item for key, item in entries.items() if not key.startswith(inner.head)}
    notes = {}
    if which == "ema":
        notes = {"not_averaged": [key.removeprefix(inner.body) for key in taken if key not in inner.pairs]}
        taken = {key: entries[inner.pairs.get(key, key)] for key in taken}
    return (
        {key.removeprefix(inner.body): item for key, item in taken.items()},
        notes,
        [inner.body or f"without {inner.head}"],
    )


def _has_inner(chosen: Any, path: pathlib.Path, budget: Budget) -> bool:
    """Whether a state dict has an average among its own entries."""
    names = averages.peeled(collect(chosen, path, budget) if is_module(chosen) else _names(chosen))
    budget.spend(steps=20 * len(names))
    return averages.find_inner(names) is not None or averages.has_mmcv_buffers(names)


def _all_names(choices: Mapping[str, Any], budget: Budget) -> dict[str, list[str]]:
    """The entries of each state dict; one list where several paths lead to one mapping."""
    lists: dict[int, list[str]] = {}
    for chosen in choices.values():
        budget.spend(steps=60)  # for what its path says
        if id(chosen) not in lists:
            lists[id(chosen)] = _names(chosen)
            budget.spend(memory=70 * len(lists[id(chosen)]), steps=20 * len(lists[id(chosen)]))
    return {name: lists[id(chosen)] for name, chosen in choices.items()}


def _names(chosen: Any) -> list[str]:
    """The entries of a state dict; of a pickled module its buffers and children."""
    if not is_module(chosen):
        return [str(key) for key in as_dict(chosen)]
    fields = chosen.attributes
    return [str(name) for name in [*fields["_parameters"], *fields["_buffers"]]] + [f"{m}." for m in fields["_modules"]]


def _at(value: Any, place: str) -> Any:
    """What lies at a path of keys, None for nothing."""
    for step in place.split("/"):
        value = as_dict(value)
        if not isinstance(value, dict) or step not in value:
            return None
        value = value[step]
    return value


def _lists(value: Any, budget: Budget, depth: int = 0) -> Iterator[str]:
    """The paths of averages that are lists of tensors."""
    items = as_dict(value)
    if isinstance(items, dict) and depth < 2 and len(items) < 1000:
        budget.spend(steps=len(items))
        for key, item in items.items():
            if isinstance(item, list | tuple) and key in LISTS and item and all(map(is_tensor, item)):
                yield str(key)
            elif isinstance(key, str):
                yield from (f"{key}/{name}" for name in _lists(item, budget, depth + 1))


PREFIX: Final = "jaxnorm.prefix"
"""Where a file of ours says what its names have before the model's own, if they look as if a wrapper had made them."""


def looks_wrapped(names: Collection[str]) -> bool:
    """Whether a reader would take something off these names, or take them for those of two sets of weights."""
    wrapper = averages.wrapper_of(names)
    return (
        all(name.startswith("module.") for name in names)
        or any(f".{wrapped}." in f".{name}" for name in names for wrapped in WRAPPERS)
        or wrapper is not None
    )


def _metadata(chosen: Any) -> Any:
    """What torch.nn.Module.state_dict has put beside the entries."""
    attributes = chosen.attributes if isinstance(chosen, Instance) else getattr(chosen, "__dict__", {})
    return attributes.get("_metadata")


def _said(kept: Any) -> str | None:
    """The prefix that a state dict's `_metadata` names."""
    root = kept.get("") if isinstance(kept, dict) else None
    prefix = root.get(PREFIX) if isinstance(root, dict) else None
    return prefix if isinstance(prefix, str) else None


def _without(
    entries: dict[str, Entry], prefix: str, path: pathlib.Path
) -> tuple[dict[str, Entry], dict[str, Any], list[str]]:
    """The entries without a prefix that all of them have, but for an averaging module's counters."""
    if not prefix:
        return entries, {}, []
    notes = {name: count(name, entries[name].array(), path) for name in entries if name in COUNTERS}
    named = {name.removeprefix(prefix): item for name, item in entries.items() if name not in notes}
    if not all(name.startswith(prefix) for name in entries if name not in notes):
        raise CheckpointError(path, f"its names do not all begin with {prefix!r}, as it says")
    return named, notes, [*(["averaged model"] if notes else []), prefix]
