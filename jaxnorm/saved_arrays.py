"""What a checkpoint holds of each leaf: its kind, its array as it is written, and how it comes back."""

import json
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import _checks as check
from jaxnorm.global_arrays import host, is_key, is_own

_NUMPY = (np.ndarray, np.generic)


def step_of(step: Any) -> int:
    """The step as Python's integer: its digits are the name of a directory, which `steps` looks for."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        what = f"{step!r:.80} ({type(step).__name__})"
        hint = "; of a replicated state give jaxnorm.unreplicate(state).step" if getattr(step, "ndim", 0) else ""
        raise ValueError(f"a step is an integer from 0 on, found {what}{hint}")
    return number


def as_json(title: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back. Raises TypeError for what JSON cannot hold."""
    check.instance(title, value, Mapping, "a mapping that JSON can hold")
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{title} is what JSON can hold: numbers, strings, lists, dicts of these; {error}") from error


def kinds_of(arrays: Mapping[str, Any]) -> dict[str, str]:
    """`float32[64, 3, 7, 7]` of each; of a random key its generator."""
    return {
        name: f"{x.dtype if isinstance(x, _NUMPY) else jnp.result_type(x)}{list(np.shape(x))}"
        for name, x in arrays.items()
    }


def to_save(name: str, x: Any) -> Any:
    """The array that orbax is given. Raises ValueError for what it cannot store."""
    try:
        jnp.result_type(x)  # of what JAX has no dtype for, orbax has none either
        x = np.asarray(x) if isinstance(x, _NUMPY) else jax.random.key_data(x) if is_key(x) else jnp.asarray(x)
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"{name} cannot be stored: {error}. A state is a tree of arrays, NumPy's for numbers beyond JAX's dtypes; "
            "texts and the like go into data or config."
        ) from error
    return host(x) if jax.process_count() > 1 and is_own(x) else x  # orbax writes it once, from process 0


def place_of(x: Any) -> Any:
    """Where and as what orbax is to read it: as `x` is."""
    import orbax.checkpoint as ocp

    sharding = getattr(x, "sharding", None)
    if sharding is None or (jax.process_count() > 1 and is_own(x)):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=jax.random.key_data(x).sharding if is_key(x) else sharding)


def placed(found: Any, x: Any) -> Any:
    """What was read, in the place and form of `x`."""
    if found is None:
        return x  # no values
    if isinstance(x, _NUMPY):
        return np.asarray(found, x.dtype)[() if isinstance(x, np.generic) else ...]
    if is_key(x):
        found = jax.random.wrap_key_data(found, impl=jax.random.key_impl(x))
    sharding = getattr(x, "sharding", None)
    return found if isinstance(found, jax.Array) and found.sharding == sharding else jax.device_put(found, sharding)


def reason_of(error: BaseException) -> str:
    """The innermost cause, which is the one that names the file and the system's error."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = str(error).partition(" [tensorstore_spec=")[0].strip() or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"  # what it was about, and the system's error
