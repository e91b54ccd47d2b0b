"""What arguments are to be, said at the door: errors that name the argument, what is expected, and what was given."""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_LARGEST = 2**31 - 1  # of int32


def whole(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int from `least` to the largest of int32.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= _LARGEST:
        most = "" if not isinstance(value, int) or value <= _LARGEST else f", up to {_LARGEST}"
        raise ValueError(f"{name} is a whole number, {least} or more{most}; got {shown(value)}")
    return int(value)


def number(
    name: str,
    value: Any,
    *,
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
) -> float:
    """`value` as a finite float within the bounds.

    Raises:
        ValueError: for anything else.
    """
    try:
        if isinstance(value, bool | str | bytes | np.ndarray | jax.Array):  # numbers of Python's or NumPy's: static
            raise ValueError
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise OverflowError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    inside = (least is None or found >= least) and (above is None or found > above) and (most is None or found <= most)
    if not (inside and math.isfinite(found)):
        words = (("from", least), ("above", above), ("up to", most))
        bounds = [f"{word} {bound:g}" for word, bound in words if bound is not None]
        raise ValueError(f"{' '.join([f'{name} is a finite number', *bounds])}; got {shown(value)}")
    return found


def array(name: str, value: Any, *, shape: tuple[int, ...] | None = None) -> jax.Array:
    """`value` as an array of numbers.

    Raises:
        TypeError: for what is none.
        ValueError: for another shape.
    """
    found = value
    if not isinstance(value, jax.Array):
        try:
            if value is None or isinstance(value, str | bytes):
                raise TypeError
            found = jnp.asarray(value)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"{name} is an array of numbers; got {shown(value)}") from None
    if not (jnp.issubdtype(found.dtype, jnp.number) or found.dtype == bool):
        raise TypeError(f"{name} is an array of numbers; its dtype is {found.dtype}")
    if shape is not None and found.shape != shape:
        raise ValueError(f"{name} has shape {found.shape}, expected {shape}")
    return found


def key(name: str, value: Any) -> None:
    """Raises `TypeError` for what is no key of random numbers."""
    dtype = getattr(value, "dtype", None)
    words = isinstance(value, jax.Array | np.ndarray) and dtype == np.uint32 and value.shape in ((2,), (4,))
    if not words and not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"{name} is a key of random numbers, jax.random.key(0); got {shown(value)}")


def devices(value: Any) -> list[jax.Device] | None:
    """`devices` as a list; None for none given.

    Raises:
        TypeError: for what is no list of devices.
        ValueError: for an empty list.
    """
    if value is None:
        return None
    found = list(value) if isinstance(value, list | tuple | np.ndarray) else [None]
    if not all(isinstance(device, jax.Device) for device in found):
        raise TypeError(f"devices is a list of jax.Device; got {shown(value)}")
    if not found:
        raise ValueError("devices is a list of one device or more; got none")
    return found


def arrays(name: str, tree: Any) -> None:
    """Raises `TypeError` for a tree with leaves that are no arrays, naming them."""
    wrong = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = jax.tree_util.keystr(path) or "it"
        if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
            continue
        if hasattr(x, "detach") and hasattr(x, "numpy"):
            wrong.append(f"{where} is a torch tensor: give tensor.numpy()")
        elif np.asarray(x).dtype.kind not in "biufcV":
            wrong.append(f"{where} is {shown(x)}")
    if wrong or tree is None:
        raise TypeError(f"{name} is a tree of arrays; {', '.join(wrong[:5]) or 'got None'}")


def axes(name: str, value: Any) -> tuple[int, ...]:
    """An axis, or several, as a tuple.

    Raises:
        ValueError: for anything else.
    """
    found = (value,) if isinstance(value, int | np.integer) else value
    if isinstance(found, list | tuple) and all(
        isinstance(a, int | np.integer) and not isinstance(a, bool) for a in found
    ):
        return tuple(int(a) for a in found)
    raise ValueError(f"{name} must name an axis, or several, by whole numbers; got {shown(value)}")


def axis_name(value: Any) -> None:
    """Raises `TypeError` for what cannot be the name of an axis."""
    if isinstance(value, int | float | jax.Array | np.ndarray) or not isinstance(value, Hashable):
        raise TypeError(f"axis_name is the name of an axis, or a tuple of names; got {shown(value)}")
    if isinstance(value, tuple):
        for one in value:
            axis_name(one)


def groups(value: Any) -> tuple[tuple[int, ...], ...] | None:
    """`axis_index_groups` as tuples, which can be part of a compiled function's key.

    Raises:
        ValueError: for what is no list of lists of whole numbers.
    """
    if value is None:
        return None
    try:
        rows = [list(group) for group in value]
        if not rows or not all(
            isinstance(i, int | np.integer) and not isinstance(i, bool) for row in rows for i in row
        ):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"axis_index_groups is a list of lists of replicas, [[0, 1], [2, 3]]; got {shown(value)}"
        ) from None
    return tuple(tuple(int(i) for i in row) for row in rows)


def dtype(name: str, value: Any, *, inexact: bool = False) -> None:
    """Raises `TypeError` for what is no dtype of numbers, or of inexact ones; None is none given."""
    if value is None:
        return
    try:
        found = None if isinstance(value, np.ndarray | jax.Array) else jnp.dtype(value)
    except (TypeError, ValueError):
        found = None
    if found is None or not jnp.issubdtype(found, jnp.inexact if inexact else jnp.number):
        kind = "floating or complex numbers" if inexact else "numbers"
        raise TypeError(f"{name} is a dtype of {kind}; got {shown(value) if found is None else found}")


_FLAGS = ("use_bias", "use_scale", "track_running_stats", "count_batches", "force_float32_reductions")


def layer(options: Mapping[str, Any]) -> None:
    """Raises `TypeError` and `ValueError` for what a BatchNorm layer cannot be made of, by the names of its fields."""
    for name, value in options.items():
        if name in ("epsilon", "correction") or (name == "momentum" and value is not None):
            number(name, value, least=0 if name == "epsilon" else None)
        elif name in ("dtype", "param_dtype"):
            if value is None and name == "param_dtype":
                raise TypeError("param_dtype is a dtype of floating or complex numbers; got None")
            dtype(name, value, inexact=True)
        elif name in ("promote_dtype", "bias_init", "scale_init") or (name == "activation" and value is not None):
            function(name, value)
        elif name in _FLAGS or (name == "use_running_average" and value is not None):
            flag(name, value)
        elif name == "axis":
            axes(name, value)
        elif name == "axis_name":
            axis_name(value)
        elif name == "axis_index_groups":
            groups(value)
        elif name.endswith("_metadata"):
            instance(name, value, Mapping, "a mapping of names")


def flag(name: str, value: Any) -> bool:
    """`value`, True or False.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is True or False; got {shown(value)}")
    return bool(value)


def function(name: str, value: Any) -> None:
    """Raises `TypeError` for what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} is a function; got {shown(value)}")


def instance(name: str, value: Any, kind: Any, described: str) -> None:
    """Raises `TypeError` for a value that is no instance of `kind`, a type, a tuple or a union of them."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {described}; got {shown(value)}{_instead(name, value)}")


def _instead(name: str, value: Any) -> str:
    """What to do, where something near was given."""
    if name == "state" and isinstance(value, nnx.Module | tuple):
        return ". Make one of the model: TrainState.create(model, tx)"
    return ""


def torch_object(value: Any) -> bool:
    """Whether a value is PyTorch's, which is not imported to tell."""
    return any(cls.__module__.split(".")[0] == "torch" for cls in type(value).__mro__)


def pattern(name: str, value: Any) -> re.Pattern[str]:
    """A regular expression, compiled.

    Raises:
        TypeError: for what is no text.
        ValueError: for text that is no regular expression.
    """
    instance(name, value, str, "regular expressions of paths, as text")
    try:
        return re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression of paths: {error}") from error


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises `ValueError` for a value that is not among the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {' or '.join(map(repr, choices))}; got {shown(value)}")


def shown(value: Any) -> str:
    """A few words on a value of any kind."""
    return f"{value!r:.80}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
