"""Arguments of a call, checked against those that a program was recorded with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.ops.dtypes import is_float, is_integer, jax_dtype
from interop.program import guards, structure
from interop.program.guards import Size
from interop.program.nodes import DType, Input, Program, Value


def bind(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The program's inputs by name. Positional arguments may be given by name, as in Python.

    Raises:
        TypeError: for arguments too many or too few, or of another structure.
        ValueError: for shapes or dtypes that the program was not recorded for, for sizes with which the model's code
            takes another branch than the one recorded, and for constants that differ.
    """
    positional, keywords = _arranged(program, args, kwargs)
    inputs = {item.name: item for item in program.inputs}
    problems: list[str] = []
    values: dict[str, jax.Array] = {}
    sizes: dict[str, tuple[Size, str]] = {}

    def leaf(described: Any, found: Any, path: str) -> None:
        if not isinstance(described, Value):
            same = found is described or (type(found) is type(described) and found == described)
            if not same:
                problems.append(f"{path}: the model was traced with {described!r} here, and cannot take {found!r}")
            return
        if not isinstance(found, (jax.Array, np.ndarray, np.generic, int, float, bool, list)):
            hint = " of torch: give jnp.asarray(tensor.numpy())" if hasattr(found, "detach") else ""
            problems.append(f"{path}: expected an array, found {type(found).__name__}{hint}")
            return
        array = jnp.asarray(found)
        problem = _mismatch(inputs[described.name], array, sizes, path)
        if problem:
            problems.append(f"{path}: {problem}")
        values[described.name] = array

    for (name, described), value in zip(positional, args_of(positional, args, kwargs), strict=True):
        structure.match(described, value, name, leaf, problems)
    for name, described in keywords:
        structure.match(described, kwargs[name], name, leaf, problems)
    if not problems:
        problems += _other_branches(program, {size: n for size, (n, _) in sizes.items()})
    if problems:
        raise ValueError("the call does not fit the traced model:\n  " + "\n  ".join(problems))
    return values


def takes(program: Program, name: str) -> bool:
    """Whether the program was recorded with an argument of that name."""
    return name in program.signature["names"] or name in program.signature["kwargs"]


def _other_branches(program: Program, sizes: Mapping[str, Size]) -> list[str]:
    shown = ", ".join(f"{item.name} is ({', '.join(map(str, item.shape))})" for item in program.inputs)
    return [
        f"the code of the model asks for sizes, and what was recorded is its branch for {guard}, where {shown}; found "
        f"{', '.join(f'{size} = {sizes[size]}' for size in sorted(guards.sizes_in(guard)))}. Import the module with "
        "example inputs of the sizes that it is to be called with"
        for guard in program.guards
        if not guards.holds(guard, sizes)
    ]


def args_of(positional: list[tuple[str, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The positional arguments, those given by name among them."""
    return [args[i] if i < len(args) else kwargs[name] for i, (name, _) in enumerate(positional)]


def _arranged(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The described positional and keyword arguments by name, once it is sure that each is given once."""
    described, by_name, names = program.signature["args"], program.signature["kwargs"], program.signature["names"]
    names = [*names, *(f"argument {i}" for i in range(len(names), len(described)))]
    positional = [(names[i], item) for i, item in enumerate(described)]
    # what was traced by name may also come by position
    for name in names[len(described) : len(args)]:
        if name in by_name:
            positional.append((name, by_name[name]))
    taken = {name for name, _ in positional}
    keywords = [(name, item) for name, item in by_name.items() if name not in taken]
    wanted = [*(name for name, _ in positional), *(name for name, _ in keywords)]
    given = [*(name for name, _ in positional[: len(args)]), *kwargs]
    if len(args) > len(positional) or sorted(given) != sorted(wanted):
        raise TypeError(
            f"the model was traced with the arguments {wanted}, and takes these; "
            f"found {len(args)} by position and {list(kwargs)} by name"
        )
    return positional, keywords


def _mismatch(expected: Input, array: jax.Array, sizes: dict[str, tuple[Size, str]], path: str) -> str | None:
    shown = "(" + ", ".join(map(str, expected.shape)) + ("," if len(expected.shape) == 1 else "") + ")"
    if array.ndim != len(expected.shape):
        return f"expected the shape {shown}, found {array.shape}"
    for size, n in zip(expected.shape, array.shape, strict=True):
        if isinstance(size, str) and size.isidentifier():
            first, where = sizes.setdefault(size, (n, path))
            if first != n:
                return f"the size {size} of {shown} is {n} here and {first} in {where}"
        elif isinstance(size, int) and n != size:
            return f"expected the shape {shown}, found {array.shape}{_turned(expected, array)}"
    wanted = jax_dtype(DType(expected.dtype))
    for kind in (is_float, is_integer, lambda dtype: dtype == jnp.bool_):
        if kind(wanted) != kind(array.dtype):
            images = array.dtype == jnp.uint8 and is_float(wanted)
            hint = (
                ": scale the images, x.astype(jnp.float32) / 255 and the model's own mean and deviation"
                if images
                else ""
            )
            return f"expected the dtype {expected.dtype}, found {array.dtype}{hint}"
    return None


def _turned(expected: Input, array: jax.Array) -> str:
    """What to do with images whose channels lie last."""
    shape = (array.shape[0], array.shape[-1], *array.shape[1:-1]) if array.ndim > 2 else ()
    fits = shape and all(isinstance(size, str) or n == size for size, n in zip(expected.shape, shape, strict=True))
    channels = expected.shape[1:2] and isinstance(expected.shape[1], int) and shape[1:2] == expected.shape[1:2]
    if not (fits or channels):
        return ""
    return ". PyTorch has channels at dimension 1, and these lie last: jnp.moveaxis(x, -1, 1)"
