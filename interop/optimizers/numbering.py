"""Whose state is number 7 of an optimizer's state dict: names of parameters by their numbers.

PyTorch numbers an optimizer's parameters in the order in which it was given them, which need not be the module's. So
the order is taken from the first of these that says it: the names that the user gives or the file has, the tensors of a
live optimizer, shapes that only one parameter has. Where none of them does, it is an error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    import torch

    Optimizer: TypeAlias = torch.optim.Optimizer | Mapping[str, Any]  # or its state dict
    # Which parameter is which: the module, or the names in order.
    Names: TypeAlias = torch.nn.Module | Iterable[str] | None

HOW = (
    "Give names=: the torch module, or the parameters' names in the order in which the optimizer was given them "
    "(an optimizer made from named_parameters() has them)"
)


def opened(optimizer: Any) -> Mapping[str, Any]:
    """The optimizer's state dict.

    Raises:
        TypeError: for what is neither an optimizer nor a state dict.
        ValueError: for a state dict that `torch.optim.Optimizer.state_dict` does not give.
    """
    if not isinstance(optimizer, Mapping) and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer is a torch optimizer or its state dict; got {type(optimizer).__name__}")
    source = optimizer if isinstance(optimizer, Mapping) else optimizer.state_dict()
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if key not in source:
            raise ValueError(
                f"the optimizer's state dict has no {key!r}; it has {', '.join(map(str, source))}. Give the whole of "
                "what optimizer.state_dict() returned"
            )
        if not isinstance(source[key], kind):
            raise ValueError(f"{key!r} of the optimizer's state dict is a {kind.__name__}; got {source[key]!r:.100}")
    bare = [str(g) for g, group in enumerate(source["param_groups"]) if not _has_numbers(group)]
    if bare:
        raise ValueError(
            f"groups without the numbers of their parameters ('params'): {', '.join(bare)}. Give what "
            "optimizer.state_dict() returned"
        )
    numbers = Counter(number for group in source["param_groups"] for number in group["params"])
    repeated = [str(number) for number, times in numbers.items() if times > 1]
    if repeated:
        raise ValueError(f"the optimizer's groups have these parameters more than once: {', '.join(repeated)}")
    unknown = [str(index) for index in source["state"] if _number(index) not in numbers]
    if unknown:
        raise ValueError(f"the optimizer's state dict has the state of parameters in no group: {', '.join(unknown)}")
    bare = [str(index) for index, entries in source["state"].items() if not isinstance(entries, Mapping)]
    if bare:
        raise ValueError(
            f"the optimizer's state dict has no mapping of entries for these parameters: {', '.join(bare)}"
        )
    return source


def _has_numbers(group: Any) -> bool:
    numbers = group.get("params") if isinstance(group, Mapping) else None
    return isinstance(numbers, Sequence) and all(isinstance(number, int) for number in numbers)


def _number(key: Any) -> int | None:
    """Of a state's key, which JSON makes a text."""
    return int(key) if isinstance(key, int) or (isinstance(key, str) and key.isdecimal()) else None


def tensors(optimizer: Any) -> list[Any] | None:
    """The parameters of a live optimizer, in the order of their numbers; None of a state dict."""
    if isinstance(optimizer, Mapping):
        return None
    return [p for group in optimizer.param_groups for p in group["params"]]


def given_names(optimizer: Any, names: Any) -> list[str] | None:
    """PyTorch's names in the order of the numbers, from the user, the file or the live optimizer; None if none says."""
    source, live = opened(optimizer), tensors(optimizer)
    groups = source["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    recorded = None
    if groups and all(group.get("param_names") for group in groups):
        recorded = [name for group in groups for name in group["param_names"]]
    if hasattr(names, "named_parameters"):
        of_module = {name: p for name, p in names.named_parameters()}
        if live is not None:
            by_identity = {id(p): name for name, p in of_module.items()}
            strange = sum(id(p) not in by_identity for p in live)
            if strange:
                raise ValueError(f"{strange} of the optimizer's parameters are not the given module's")
            return [by_identity[id(p)] for p in live]
        strangers = sorted(set(recorded or ()) - of_module.keys())
        if strangers:
            raise ValueError(
                f"the optimizer's state dict has the names of its parameters, and the module has none of the name "
                f"{', '.join(strangers)}. Give names=: a list of the module's names in the order of these"
            )
        names = recorded or list(of_module)
    elif names is None:
        names = recorded
    elif isinstance(names, str) or not isinstance(names, Iterable) or not getattr(names, "ndim", 1):
        raise TypeError(f"names is the torch module, or the names of the parameters in order; got {names!r:.100}")
    if names is None:
        return None
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names is the torch module, or the names of the parameters in order; got {names!r:.100}")
    if len(names) != count:
        raise ValueError(f"{len(names)} names for the optimizer's {count} parameters")
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise ValueError(f"names has these more than once: {', '.join(repeated)}")
    return names


def proven_names(optimizer: Any, values: Mapping[str, np.ndarray]) -> list[str]:
    """The names in the order of the numbers, by what tells the parameters of the model (`values`) apart.

    A live optimizer's tensors have the values that the imported model has; a state's arrays have a shape. Parameters
    that neither tells apart must be ones that it makes no difference to exchange: in one group, with equal state.

    Raises:
        ValueError: where that leaves more than one order, or none.
    """
    source, live = opened(optimizer), tensors(optimizer)
    numbers = [number for group in source["param_groups"] for number in group["params"]]
    states = {_number(key): entries for key, entries in source["state"].items()}
    alike = {
        number: (g, tuple(sorted((entry, _digest(x)) for entry, x in states.get(number, {}).items())))
        for g, group in enumerate(source["param_groups"])
        for number in group["params"]
    }
    if live is not None:
        found = _matched(
            dict(zip(numbers, map(_digest, live), strict=True)), {n: _digest(x) for n, x in values.items()}, alike
        )
        if found is not None:
            return [found[number] for number in numbers]
        shapes: dict[int, Any] = {number: tuple(p.shape) for number, p in zip(numbers, live, strict=True)}
    else:
        shapes = {number: _shape(states.get(number, {})) for number in numbers}
    found = _matched(shapes, {name: x.shape for name, x in values.items()}, alike)
    if found is None:
        raise ValueError(
            f"whose parameters are these? The optimizer's {len(numbers)} parameters have no names, and neither values "
            f"nor shapes tell them apart among the model's {len(values)}. {HOW}"
        )
    return [found[number] for number in numbers]


def _matched(
    marks: Mapping[int, Hashable], candidates: Mapping[str, Hashable], alike: Mapping[int, Hashable]
) -> dict[int, str] | None:
    """The one name of each number, by equal marks; None if there are more ways that make a difference.

    Numbers whose mark is None (no state) take the names that are left.
    """
    by_mark: dict[Hashable, list[str]] = {}
    for name, mark in candidates.items():
        by_mark.setdefault(mark, []).append(name)
    wanted: dict[Hashable, list[int]] = {}
    for number, mark in marks.items():
        wanted.setdefault(mark, []).append(number)
    if None in wanted:
        by_mark[None] = [name for name in candidates if candidates[name] not in wanted]
    found: dict[int, str] = {}
    for mark, these in wanted.items():
        names = by_mark.get(mark, [])
        if len(names) != len(these) or len({alike[number] for number in these}) > 1:
            return None
        found |= dict(zip(these, names, strict=True))
    return found


def _shape(entries: Mapping[str, Any]) -> tuple[int, ...] | None:
    """That of the parameter, of which a momentum or a square has an array; a count is a scalar."""
    shapes = {
        tuple(np.shape(numpy(x)))
        for entry, x in entries.items()
        if entry not in ("step", "mu_product") and x is not None
    }
    if len(shapes) > 1:
        shapes.discard(())  # a number beside arrays like the parameter
    return shapes.pop() if len(shapes) == 1 else None


def _digest(x: Any) -> bytes:
    """Equal for equal shapes and values, whatever the dtype that holds them, as JAX would."""
    array = numpy(x)
    if array.dtype.kind in "biufcV":
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes() + str(array.shape).encode(), digest_size=16).digest()


def numpy(x: torch.Tensor | ArrayLike) -> np.ndarray:
    """The values of a tensor, a bfloat16 one's as float32; anything else as NumPy takes it."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    return x.float().numpy() if str(x.dtype) == "torch.bfloat16" else x.numpy()
