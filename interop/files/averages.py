"""Which weights of a file are the trained ones and which their average: the formats of training frameworks.

A file may hold two sets of weights for the same names. Where each is, is known in this order: by a row of `FORMATS`; by
what an averaging module adds to a state dict (`WRAPPERS`); by the words of its name (`state_dict_ema`, `swa_model`).
What is not known so is an error: it is never settled by the order of a file's keys.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final, Literal, NoReturn

from interop.files.disk import CheckpointError

Role = Literal["model", "ema", "both"]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one framework writes its file.

    Attributes:
        framework: and the part of it that averages.
        model: the path of the trained weights, keys joined with '/'.
        ema: the path of their average.
        needs: what else a file of this kind has: paths, of which one is enough.
        flag: a path and the value that is there, if the framework says by a flag which of two ways it took.
        exchanged: whether the file's names suggest the opposite, so that there is no default.
        source: the code that writes it.
    """

    framework: str
    model: str
    ema: str
    needs: tuple[str, ...] = ()
    flag: tuple[str, bool] | None = None
    exchanged: bool = False
    source: str = ""


_COMPOSER = "state/algorithms/EMA/"

FORMATS: Final = (
    Format(
        "MMEngine's EMAHook", "ema_state_dict", "state_dict", ("meta/mmengine_version", "message_hub"),
        exchanged=True, source="mmengine/hooks/ema_hook.py, EMAHook._swap_ema_state_dict",
    ),
    Format(
        "Lightning's WeightAveraging", "current_model_state", "state_dict",
        exchanged=True, source="lightning/pytorch/callbacks/weight_averaging.py, on_save_checkpoint",
    ),
    Format(
        "Lightning's StochasticWeightAveraging", "state_dict",
        "callbacks/StochasticWeightAveraging/average_model_state",
        source="lightning/pytorch/callbacks/stochastic_weight_avg.py, state_dict",
    ),
    Format(
        "composer's EMA", f"{_COMPOSER}training_model", f"{_COMPOSER}ema_model",
        flag=(f"{_COMPOSER}ema_weights_active", True),  # then state/model is the average too
        exchanged=True, source="composer/algorithms/ema/ema.py, EMA.apply and state_dict",
    ),
    Format(
        "composer's EMA", "state/model", f"{_COMPOSER}ema_model",
        flag=(f"{_COMPOSER}ema_weights_active", False),  # then training_model is that of the last evaluation
        source="composer/algorithms/ema/ema.py, EMA.apply and state_dict",
    ),
    Format(
        "composer's SWA", "state/model", "state/algorithms/SWA/swa_model",
        source="composer/algorithms/swa/swa.py, SWA.state_dict",
    ),
    Format("timm", "state_dict", "state_dict_ema", source="timm/utils/checkpoint_saver.py, CheckpointSaver._save"),
    Format("torchvision's references", "model", "model_ema", source="references/classification/train.py, main"),
    Format("Ultralytics", "model", "ema", source="ultralytics/engine/trainer.py, BaseTrainer.save_model"),
    Format(
        "detectron2 and d2go (fvcore)", "model", "ema_state",
        source="fvcore/common/checkpoint.py, Checkpointer.save; d2go/modeling/ema.py, may_get_ema_checkpointer",
    ),
)  # fmt: skip
"""One row for each way; the first that fits a file holds for it. Other names are told by their words."""


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A module that holds an average, by what stands at the top of its state dict."""

    name: str
    ema: str  # the child with the average
    counters: frozenset[str]  # its own entries, of which one is enough
    model: str | None = None  # the child with the trained weights, if it holds them too
    source: str = ""


WRAPPERS: Final = (
    Wrapper(
        "AveragedModel", "module", frozenset({"n_averaged"}), source="torch/optim/swa_utils.py, AveragedModel.__init__"
    ),
    Wrapper(
        "MMEngine's BaseAveragedModel", "module", frozenset({"steps"}), source="mmengine/model/averaged_model.py"
    ),
    Wrapper(
        "ema_pytorch's EMA", "ema_model", frozenset({"initted", "step"}), "online_model",
        source="ema_pytorch/ema_pytorch.py, EMA.__init__",
    ),
)  # fmt: skip

COUNTERS: Final = frozenset({"n_averaged", "steps"})
"""What an averaging module has beside `module.*`."""

LISTS: Final = ("shadow_params", "collected_params")
"""Averages without names, in the order of `model.parameters()`: diffusers/training_utils.py, EMAModel.state_dict, and
torch_ema/ema.py, whose names these are."""

MODEL_KEYS: Final = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params")
_AVERAGE: Final = frozenset({"ema", "averaged", "average", "avg", "swa", "shadow", "polyak"})
_TRAINED: Final = frozenset({"raw", "current", "training", "online", "original", "backup", "non", "no", "without"})


def words(name: str) -> set[str]:
    """The words of a key: `EMAModel_state2` has ema, model and state."""
    return {word.lower() for word in re.findall(r"(?<![A-Z])(?:EMA|SWA)|[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def is_average(path: str) -> bool:
    """Whether a state dict of this name is an average of the model: `state_dict_ema`, `model_ema`, `swa`."""
    return bool(words(path) & _AVERAGE) and not _is_trained(path)


def _is_trained(path: str) -> bool:
    """Whether its name says that it is not the average: `current_model_state`, `non_ema_model`."""
    return bool(words(path.rpartition("/")[2]) & _TRAINED)


def wrapper_of(names: Iterable[str]) -> Wrapper | None:
    """The averaging module whose state dict, or whose children and buffers, these names are."""
    tops = {name.partition(".")[0] for name in names}
    for wrapper in WRAPPERS:
        children = {wrapper.ema, wrapper.model}
        if wrapper.ema in tops and tops & wrapper.counters and not tops - children - wrapper.counters:
            return wrapper
    return None


def peeled(names: Collection[str]) -> Collection[str]:
    """The names without what DistributedDataParallel, torch.compile and FSDP put before all of them."""
    for _ in range(8):
        tops = {name.partition(".")[0] for name in names}
        if len(tops) != 1 or not tops <= _AROUND or not all("." in name for name in names):
            break
        names = [name.partition(".")[2] for name in names]
    return names


_AROUND: Final = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
_MOST_BODIES: Final = 8  # places where an average might belong, of which one has to be the right one


class Sets:
    """The state dicts of a file, by what each of them is.

    Args:
        names: the entries of each by its path; of a pickled module its children and buffers are enough. Paths to one
            mapping have one list of entries, which is looked at once.
        ranks: 2 for a state dict, 1 for one of single numbers.
        pickled: the paths of pickled modules.
        at: what the file has at a path, None for nothing.
        lists: paths of averages without names.
        whole: paths of state dicts that are said to have the names of one model, whatever these look like.
        path: for messages.
    """

    def __init__(
        self, names: Mapping[str, Collection[str]], ranks: Mapping[str, int], pickled: Collection[str],
        at: Callable[[str], Any], lists: Collection[str], whole: Collection[str], path: Any,
    ) -> None:  # fmt: skip
        different = {id(entries): entries for entries in names.values()}
        bare = {key: peeled(entries) for key, entries in different.items()}
        self.names = {name: bare[id(entries)] for name, entries in names.items()}
        self._wrappers = {id(entries): wrapper_of(entries) for entries in bare.values()}
        self.ranks, self.pickled, self.lists, self.whole, self.path = ranks, pickled, lists, whole, path
        self.roles: dict[str, Role] = {name: self._role(name) for name in names}
        self.format = next((row for row in FORMATS if self._fits(row, at)), None)
        if self.format is not None:
            self.roles |= {self.format.model: "model", self.format.ema: "ema"}
        self.problem = self._problem()

    def _role(self, name: str) -> Role:
        wrapper = self._wrappers[id(self.names[name])]
        if wrapper is not None and wrapper.model is not None:
            tops = {entry.partition(".")[0] for entry in self.names[name]}
            return "both" if wrapper.model in tops else "ema"
        return "ema" if wrapper is not None or is_average(name) else "model"

    def _fits(self, row: Format, at: Callable[[str], Any]) -> bool:
        if row.model not in self.roles or row.ema not in self.roles or self.ranks[row.ema] < self.ranks[row.model]:
            return False
        if row.needs and all(at(path) is None for path in row.needs):
            return False
        return row.flag is None or at(row.flag[0]) is row.flag[1]

    def _problem(self) -> str:
        """Why it is not clear which is which, or nothing."""
        if self.format is not None:
            return ""
        # MMEngine's averaging module beside another state dict, without MMEngine's notes: exchanged or not.
        wrapper = wrapper_of(self.names.get("ema_state_dict", ()))
        if wrapper is not None and "steps" in wrapper.counters and "state_dict" in self.roles:
            return (
                "'ema_state_dict' is an averaging module of MMEngine, whose EMAHook puts the average into 'state_dict' "
                "and the trained weights there; nothing else in this file says that it was MMEngine's"
            )
        entries = {id(self.names[name]): frozenset(self.names[name]) for name in self._of("model")}
        same: dict[frozenset[str], list[str]] = {}
        for name in self._of("model"):
            same.setdefault(entries[id(self.names[name])], []).append(name)
        for names in same.values():
            trained = next(filter(_is_trained, names), None)
            if trained is not None and len(names) > 1:
                other = next(name for name in names if name != trained)
                return f"{other!r} may be an average of {trained!r}"
        return ""

    def _of(self, role: Role) -> list[str]:
        """The paths of one role. Single numbers beside state dicts (the state of a callback) are no average."""
        best = 0 if role == "model" else max(self.ranks.values(), default=0)
        return [name for name, found in self.roles.items() if found == role and self.ranks[name] >= best]

    def refuse(self, problem: str) -> NoReturn:
        """Raises an error that lists the file's state dicts and says what `which` may be."""
        unnamed = "".join(f"; {name!r} is an average without names" for name in self.lists)
        raise CheckpointError(
            self.path, f"{problem}; its state dicts: {self._listed()}{unnamed}; choose one by which=: 'model' (the "
            "trained weights), 'ema' (their average) or a name"
        )  # fmt: skip

    def _listed(self) -> str:
        marks = {"ema": " (an average)", "both": " (both)", "model": ""}
        named = [f"{name!r}{marks[self.roles[name]]}" for name in self.names if name]
        more = f" and {len(named) - 40} more" if len(named) > 40 else ""
        return (", ".join(named[:40]) or "none but the one it is ('')") + more

    def choose(self, which: str | None, inside: Callable[[str], bool]) -> str:
        """The path of the state dict to take; `inside` says whether one has an average among its own entries."""
        if which not in (None, "model", "ema"):
            if which in self.names:
                return which
            self.refuse(f"has no state dict {which!r}")
        models, averages, both = self._of("model"), self._of("ema"), self._of("both")
        row = self.format
        if which is None:
            if len(self.names) == 1 and set(both) <= set(self.whole):
                return next(iter(self.names))
            if row is not None and row.exchanged:
                self.refuse(f"is of {row.framework}: the average is {row.ema!r}, the trained weights are {row.model!r}")
        if self.problem and (which != "ema" or not averages):
            self.refuse(f"does not say which weights are the average: {self.problem}")
        if which == "ema":
            wanted = [row.ema] if row is not None and not averages[1:] else averages or both
            wanted = wanted or [name for name in models if inside(name)]
        elif which == "model":
            wanted = self._preferred(models) or both
        elif averages and any(name in self.pickled for name in self.names):
            wanted = averages
        else:
            wanted = self._preferred(models) or averages or both
        if not wanted:
            self.refuse(f"has no state dict for which={which!r}")
        best = max(self.ranks[name] for name in wanted)
        wanted = [name for name in wanted if self.ranks[name] == best]
        if len(wanted) > 1 and which in wanted:
            return which  # a key of that very name
        if len(wanted) > 1:
            self.refuse(f"has several state dicts: {', '.join(map(repr, wanted))}")
        if which is None and wanted[0] in both:
            self.refuse("holds the trained weights and their average")
        return wanted[0]

    def _preferred(self, models: list[str]) -> list[str]:
        if self.format is not None:
            return [self.format.model]
        usual = [name for name in models if name.rpartition("/")[2] in MODEL_KEYS]
        depth = min((name.count("/") for name in usual), default=0)
        return [name for name in usual if name.count("/") == depth] or models


@dataclasses.dataclass(frozen=True)
class Inner:
    """An average among the entries of one state dict: a module that has its average as a child, or as buffers.

    `pairs` gives the entry with the average for each entry of the model that has one; `head` is what the names of the
    average's entries begin with; `body`, if not empty, what all other names begin with.
    """

    head: str
    pairs: dict[str, str]
    body: str


def find_inner(names: Collection[str]) -> Inner | None:
    """The average that a module holds beside the model: `ema_model.*` beside `model.*`, a deep copy or an averaging
    module; or CompVis' LitEma, whose buffers `model_ema.*` have the parameters' names without dots
    (https://github.com/CompVis/latent-diffusion, ldm/modules/ema.py).

    None where there is none, or where the names of the one and the other do not fit together in one way alone.
    """
    heads = {top for top in (name.partition(".")[0] for name in names if "." in name) if is_average(top)}
    if len(heads) != 1:
        return None
    head = next(iter(heads)) + "."
    inner = {name.removeprefix(head): name for name in names if name.startswith(head)}
    others = [name for name in names if not name.startswith(head)]
    wrapper = wrapper_of(inner)
    if wrapper is not None:
        child = wrapper.ema + "."
        inner = {name.removeprefix(child): full for name, full in inner.items() if name.startswith(child)}
    else:
        inner = {name: full for name, full in inner.items() if name not in ("decay", "num_updates")}
    if not inner or not others:
        return None
    return _matched(head, inner, others, lambda name: name) or _matched(
        head, inner, others, lambda name: name.replace(".", "")
    )


def _matched(
    head: str, inner: Mapping[str, str], others: Collection[str], spelled: Callable[[str], str]
) -> Inner | None:
    """The one prefix of `others` under which all names of the average are found, as they are spelled there."""
    longest = max(inner, key=len)
    bodies = {body for name in others if (body := _before(name, longest, spelled)) is not None}
    if len(bodies) > _MOST_BODIES:
        return None
    found = []
    for body in bodies:
        ours = [(spelled(name.removeprefix(body)), name) for name in others if name.startswith(body)]
        spellings = dict(ours)
        if len(spellings) == len(ours) and all(name in spellings for name in inner):
            pairs = {spellings[name]: full for name, full in inner.items()}
            found.append(Inner(head, pairs, body if all(name.startswith(body) for name in others) else ""))
    return found[0] if len(found) == 1 else None


def _before(name: str, wanted: str, spelled: Callable[[str], str]) -> str | None:
    """What stands in `name` before `wanted` as it is spelled, whole steps of the path; None if it does not end so."""
    place, left = len(name), len(wanted)
    while place and left:
        place -= 1
        left -= len(spelled(name[place]))
    body = name[:place]
    return body if spelled(name[place:]) == wanted and (not body or body.endswith(".")) else None


def has_mmcv_buffers(names: Collection[str]) -> bool:
    """Whether MMCV's EMAHook has put a second value of each parameter into the state dict: `ema_backbone_conv1_weight`.

    Saved after an epoch these are the trained weights, saved after an iteration the average (mmcv/runner/hooks/ema.py:
    `after_train_epoch` exchanges them, and checkpoints are written after it).
    """
    second = [name for name in names if name.startswith("ema_") and "." not in name]
    if not second:
        return False
    first = {"ema_" + name.replace(".", "_") for name in names if "." in name}
    return all(name in first for name in second)
