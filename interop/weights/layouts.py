"""Every difference in array layout: what a Flax layer's variables are in PyTorch's layer of the same kind.

| layer | Flax | PyTorch |
|---|---|---|
| Dense, Linear | `kernel` (in, out) | `weight` (out, in) |
| DenseGeneral, LinearGeneral | `kernel` (in..., out...), `bias` (out...) | `weight` (out, in), `bias` (out): flat |
| Dense after a flatten | `kernel` (h w c, out): channels last | `weight` (out, c h w): channels first |
| Conv, grouped and depthwise too | `kernel` (k..., in / groups, out) | `weight` (out, in / groups, k...) |
| ConvTranspose | `kernel` (k..., in, out) | `weight` (in, out, k...), flipped along k |
| ConvTranspose(transpose_kernel=True) | `kernel` (k..., out, in) | `weight` (in, out, k...) |
| Embed | `embedding` | `weight` |
| LayerNorm, GroupNorm, InstanceNorm, RMSNorm | `scale`, `bias` | `weight`, `bias` |
| BatchNorm | `scale`, `bias`, `mean`, `var` | `weight`, `bias`, `running_mean`, `running_var` |
| PReLU | `negative_slope` () | `weight` (1,) |
| MultiHeadDotProductAttention, MultiHeadAttention | `query`, `key`, `value`, `out` | `in_proj_weight`, ... |
| LSTM, GRU and simple cells | Dense layers, for each gate or all | `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh` |

A layout is a rule for one layer: from the shapes of its variables to `Piece`s, each with a function to PyTorch and one
back. The two are inverses, bit for bit. `state_dict` finds the layouts by itself; for a layer that needs another one it
takes it from the caller: `layouts={r"classifier\\.0": interop.layouts.Linear(flattened=(512, 7, 7))}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np

from interop.conventions import TORCH_NAMES
from interop.errors import shown

Arrays = tuple[np.ndarray, ...]
Shapes = Mapping[str, tuple[int, ...]]
_MOST_AXES: Final = 64  # NumPy's limit


class Piece(NamedTuple):
    """Variables of a layer, and the entries of a state dict that hold the same numbers.

    **Attributes:**

    - `variables`: Flax's names in the layer: "kernel", "query.kernel".
    - `entries`: PyTorch's names in the layer: "weight", "in_proj_weight".
    - `to_torch`: a function from the variables' arrays to a tuple of the entries'.
    - `to_flax`: its inverse, bit for bit.
    """

    variables: tuple[str, ...]  # Flax's names in the layer: "kernel", "query.kernel"
    entries: tuple[str, ...]  # PyTorch's names in the layer: "weight", "in_proj_weight"
    to_torch: Callable[..., Arrays]
    to_flax: Callable[..., Arrays]


@runtime_checkable
class Layout(Protocol):
    """The rule for one layer: from the shapes of its variables to pieces of a state dict.

    The classes of `interop.layouts` are such rules, and so is any object with a method `pieces`.
    """

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """How the layer's variables are kept in PyTorch's state dict.

        **Arguments:**

        - `shapes`: the shape of each variable of the layer, by its name in Flax.

        **Returns:** the pieces, in the order of PyTorch's state dict. Variables that are in none keep their own rule or
        name.

        **Raises:** `ValueError` if the layer's variables are not what the rule is for.
        """
        ...


def same(*arrays: np.ndarray) -> Arrays:
    """The arrays as they are: both sides hold the same ones.

    **Arguments:**

    - `*arrays`: of either side.

    **Returns:** the arrays, as a tuple.

    **Raises:** nothing of its own.
    """
    return arrays


def _renamed(shapes: Shapes, names: Mapping[str, str]) -> list[Piece]:
    return [Piece((flax,), (torch,), same, same) for flax, torch in names.items() if flax in shapes]


def _expect(shapes: Shapes, name: str, axes: int, what: str) -> None:
    """Refuses an array with too many axes: a layer that scan or vmap made several layers of, say."""
    if name == "kernel" and name not in shapes:
        raise ValueError(f"{what} has a kernel; found {sorted(shapes)}")
    if len(shapes.get(name, (0,) * axes)) != axes:
        raise ValueError(
            f"{what} has a {name} of {axes} axes, found shape {shapes[name]} (layers stacked by scan or vmap have no "
            "counterpart in PyTorch: take them apart first)"
        )


def _number(what: str, value: Any, least: int = 1) -> None:
    """Refuses what is no number of axes."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_AXES:
        raise TypeError(f"{what} is an integer from {least} to {_MOST_AXES}, found {shown(value)}")


def _flag(what: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{what} is True or False, found {shown(value)}")


@dataclass(frozen=True)
class Same:
    """The same arrays on both sides; names as given, or unchanged.

    **Arguments:**

    - `names`: a mapping from Flax's names to PyTorch's.

    **Raises:** `TypeError` for what is no such mapping.
    """

    names: Mapping[str, str] = field(default_factory=dict)  # Flax's name to PyTorch's

    def __post_init__(self) -> None:
        named = isinstance(self.names, Mapping)
        if not named or not all(isinstance(one, str) for pair in self.names.items() for one in pair):
            raise TypeError(f"Same: names is a mapping from Flax's names to PyTorch's, found {shown(self.names)}")

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """One piece for each variable.

        **Arguments:**

        - `shapes`: of the layer's variables, by their names in Flax.

        **Returns:** the pieces.

        **Raises:** nothing of its own.
        """
        return _renamed(shapes, {name: self.names.get(name, name) for name in shapes})


@dataclass(frozen=True)
class Linear:
    """Dense, DenseGeneral, Linear, LinearGeneral <-> `nn.Linear`.

        kernel (in..., out...) <-> weight (out, in);    bias (out...) <-> bias (out)

    **Arguments:**

    - `inputs`: how many leading axes of the kernel are inputs; they are flattened in that order.
    - `outputs`: how many axes come after them.
    - `flattened`: the shape that was flattened to be the layer's input, in PyTorch's order: (channels, height, width).
      PyTorch flattens channels first, Flax channels last, so that the inputs come in another order. PyTorch's VGG has
      (512, 7, 7), its AlexNet (256, 6, 6).

    **Raises:** `TypeError` for arguments that are no numbers of axes, or no shape.
    """

    inputs: int = 1
    outputs: int = 1
    flattened: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _number("Linear: inputs", self.inputs)
        _number("Linear: outputs", self.outputs, least=0)
        shape = self.flattened
        if shape is not None and not (
            isinstance(shape, tuple | list) and shape and all(type(size) is int and size > 0 for size in shape)
        ):
            raise TypeError(f"Linear: flattened is a shape, (channels, height, width), found {shown(shape)}")

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight`, and `bias` if there is one.

        **Arguments:**

        - `shapes`: of the layer's variables, `kernel` and `bias`.

        **Returns:** the pieces.

        **Raises:** `ValueError` for a kernel that is missing, arrays of another number of axes, and a `flattened` shape
        that is not the kernel's inputs.
        """
        split = self.inputs
        _expect(shapes, "kernel", split + self.outputs, "this Dense layer")
        _expect(shapes, "bias", self.outputs, "this Dense layer")
        shape = shapes["kernel"]
        rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
        channels, *spatial = self.flattened or (rows,)
        if channels * math.prod(spatial) != rows:
            raise ValueError(f"{self.flattened} flattened are not the kernel's {rows} inputs")

        def to_torch(kernel: np.ndarray) -> Arrays:
            kernel = np.moveaxis(kernel.reshape(*spatial, channels, columns), (-1, -2), (0, 1))
            return (kernel.reshape(columns, rows),)

        def to_flax(weight: np.ndarray) -> Arrays:
            weight = np.moveaxis(weight.reshape(columns, channels, *spatial), (0, 1), (-1, -2))
            return (weight.reshape(shape),)

        found = [Piece(("kernel",), ("weight",), to_torch, to_flax)]
        if "bias" in shapes:
            found.append(
                Piece(("bias",), ("bias",), lambda x: (x.reshape(columns),), lambda x: (x.reshape(shape[split:]),))
            )
        return found


@dataclass(frozen=True)
class Conv:
    """Conv <-> `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with any groups.

        kernel (k..., in / groups, out) <-> weight (out, in / groups, k...)

    **Arguments:**

    - `spatial`: the number of spatial axes; that of the kernel if None.

    **Raises:** `TypeError` for what is no number of axes.
    """

    spatial: int | None = None

    def __post_init__(self) -> None:
        if self.spatial is not None:
            _number("Conv: spatial", self.spatial)

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight`, and `bias` if there is one.

        **Arguments:**

        - `shapes`: of the layer's variables, `kernel` and `bias`.

        **Returns:** the pieces.

        **Raises:** `ValueError` for a kernel that is missing, and arrays of another number of axes.
        """
        axes = _spatial(self.spatial, shapes, "a Conv layer")
        back = (*range(2, axes + 2), 1, 0)  # (out, in, k...) -> (k..., in, out)
        there = (axes + 1, axes, *range(axes))
        kernel = Piece(
            ("kernel",), ("weight",), lambda x: (np.transpose(x, there),), lambda x: (np.transpose(x, back),)
        )
        return [kernel, *_renamed(shapes, {"bias": "bias"})]


@dataclass(frozen=True)
class ConvTranspose:
    """ConvTranspose <-> `nn.ConvTranspose1d`, `2d`, `3d`.

        kernel (k..., in, out) <-> weight (in, out, k...), flipped along k
        kernel (k..., out, in) <-> weight (in, out, k...)                       (transpose_kernel)

    PyTorch's layer is the transpose of a convolution with its weight; Flax's convolves with its kernel unless
    `transpose_kernel` is set, so that the kernel is the weight turned around (jax.lax.conv_transpose).

    **Arguments:**

    - `transpose_kernel`: Flax's option.
    - `spatial`: the number of spatial axes; that of the kernel if None.

    **Raises:** `TypeError` for what is neither True nor False, and no number of axes.
    """

    transpose_kernel: bool = False
    spatial: int | None = None

    def __post_init__(self) -> None:
        _flag("ConvTranspose: transpose_kernel", self.transpose_kernel)
        if self.spatial is not None:
            _number("ConvTranspose: spatial", self.spatial)

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight`, and `bias` if there is one.

        **Arguments:**

        - `shapes`: of the layer's variables, `kernel` and `bias`.

        **Returns:** the pieces.

        **Raises:** `ValueError` for a kernel that is missing, and arrays of another number of axes.
        """
        axes = _spatial(self.spatial, shapes, "a ConvTranspose layer")
        order = (axes + 1, axes) if self.transpose_kernel else (axes, axes + 1)
        there = (*order, *range(axes))
        back = tuple(int(axis) for axis in np.argsort(there))
        spatial = tuple(range(2, axes + 2))

        def turned(weight: np.ndarray) -> np.ndarray:
            return weight if self.transpose_kernel else np.flip(weight, spatial)

        kernel = Piece(
            ("kernel",),
            ("weight",),
            lambda x: (turned(np.transpose(x, there)),),
            lambda x: (np.transpose(turned(x), back),),
        )
        return [kernel, *_renamed(shapes, {"bias": "bias"})]


def _spatial(given: int | None, shapes: Shapes, what: str) -> int:
    axes = max(len(shapes.get("kernel", ())) - 2, 1) if given is None else given
    _expect(shapes, "kernel", axes + 2, what)
    _expect(shapes, "bias", 1, what)
    return axes


@dataclass(frozen=True)
class Embed:
    """Embed <-> `nn.Embedding`: `embedding` <-> `weight`, the same array."""

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight`.

        **Arguments:**

        - `shapes`: of the layer's variables, `embedding`.

        **Returns:** the piece.

        **Raises:** `ValueError` for an array that has not two axes.
        """
        _expect(shapes, "embedding", 2, "an Embed layer")
        return _renamed(shapes, {"embedding": "weight"})


@dataclass(frozen=True)
class Norm:
    """LayerNorm, GroupNorm, InstanceNorm, RMSNorm <-> PyTorch's layers of these names: `scale`, `bias` <-> `weight`,
    `bias`.

    **Arguments:**

    - `channels_last`: needed where scale and bias have several axes: whether the last one is the channels', which
      PyTorch has first. A LayerNorm of (height, width, channels) is one of (channels, height, width) there.

    **Raises:** `TypeError` for what is neither True, False nor None.
    """

    channels_last: bool | None = None

    def __post_init__(self) -> None:
        if self.channels_last is not None:
            _flag("Norm: channels_last", self.channels_last)

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight` and `bias`, as far as there are such.

        **Arguments:**

        - `shapes`: of the layer's variables, `scale` and `bias`.

        **Returns:** the pieces.

        **Raises:** `ValueError` where they have several axes and `channels_last` does not say which is the channels'.
        """
        if self.channels_last is None and any(len(shapes.get(name, ())) > 1 for name in ("scale", "bias")):
            raise ValueError(
                f"scale and bias of several axes {shapes.get('scale', shapes.get('bias'))}: are the channels last? Say "
                "so by layouts={name: interop.layouts.Norm(channels_last=True)}, or False for the same shape in PyTorch"
            )
        found = _renamed(shapes, {"scale": "weight", "bias": "bias"})
        if not self.channels_last:
            return found
        return [
            piece._replace(to_torch=lambda x: (np.moveaxis(x, -1, 0),), to_flax=lambda x: (np.moveaxis(x, 0, -1),))
            for piece in found
        ]


@dataclass(frozen=True)
class BatchNorm:
    """BatchNorm <-> `nn.BatchNorm1d`, `2d`, `3d`, `nn.SyncBatchNorm`.

        scale, bias, mean, var <-> weight, bias, running_mean, running_var

    The same arrays; the counter `num_batches_tracked` is int64 in PyTorch.
    """

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """What there is of weight, bias, running_mean, running_var, num_batches_tracked.

        **Arguments:**

        - `shapes`: of the layer's variables, by their names in Flax.

        **Returns:** the pieces.

        **Raises:** `ValueError` for arrays of another number of axes.
        """
        counter = Piece(
            ("num_batches_tracked",), ("num_batches_tracked",), lambda x: (x.astype(np.int64, copy=False),), same
        )
        for name in TORCH_NAMES:
            _expect(shapes, name, 0 if name == "num_batches_tracked" else 1, "a BatchNorm layer")
        found = _renamed(shapes, TORCH_NAMES)
        return [counter if piece.variables == counter.variables else piece for piece in found]


@dataclass(frozen=True)
class PReLU:
    """PReLU <-> `nn.PReLU` with one slope: `negative_slope` of shape () <-> `weight` of shape (1,)."""

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`weight`.

        **Arguments:**

        - `shapes`: of the layer's variables, `negative_slope`.

        **Returns:** the piece.

        **Raises:** `ValueError` for a slope that is no scalar.
        """
        _expect(shapes, "negative_slope", 0, "a PReLU layer")
        return [Piece(("negative_slope",), ("weight",), lambda x: (x.reshape(1),), lambda x: (x.reshape(()),))]


@dataclass(frozen=True)
class Attention:
    """MultiHeadDotProductAttention, MultiHeadAttention <-> `nn.MultiheadAttention`.

    PyTorch stacks the three projections' weights in `in_proj_weight` if all have as many inputs as outputs, and keeps
    `q_proj_weight`, `k_proj_weight` and `v_proj_weight` otherwise; `in_proj_bias` is always stacked
    (torch/nn/modules/activation.py). Where PyTorch has no such layer (other features in than out, fewer heads for keys
    and values) each projection is a Linear layer of its own.
    """

    def pieces(self, shapes: Shapes) -> list[Piece]:
        """`in_proj_weight` or the three weights, `in_proj_bias`, `out_proj.weight`, `out_proj.bias`.

        **Arguments:**

        - `shapes`: of the layer's variables, `query.kernel`, `out.bias` and the like.

        **Returns:** the pieces; none where PyTorch has no such layer.

        **Raises:** `ValueError` for an `out.bias` that has not one axis.
        """
        if not is_attention(shapes):
            return []
        inputs, heads, size = shapes["query.kernel"]
        width = heads * size
        kernels = [shapes[f"{name}.kernel"] for name in _PROJECTIONS]
        out = shapes["out.kernel"]
        if inputs != width or out[-1] != width or any(shape[1:] != (heads, size) for shape in kernels):
            return []

        def weight(kernel: np.ndarray) -> np.ndarray:
            return kernel.reshape(-1, width).T

        def kernel(weight: np.ndarray) -> np.ndarray:
            return weight.T.reshape(-1, heads, size)

        names = tuple(f"{name}.kernel" for name in _PROJECTIONS)
        biases = tuple(f"{name}.bias" for name in _PROJECTIONS)
        if all(shape[0] == width for shape in kernels):
            found = [
                Piece(
                    names,
                    ("in_proj_weight",),
                    lambda *x: (np.concatenate([weight(one) for one in x]),),
                    lambda x: tuple(kernel(one) for one in np.split(x, 3)),
                )
            ]
        else:
            entries = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            found = [
                Piece((name,), (entry,), lambda x: (weight(x),), lambda x: (kernel(x),))
                for name, entry in zip(names, entries, strict=True)
            ]
        if all(name in shapes for name in biases):
            found.append(
                Piece(
                    biases,
                    ("in_proj_bias",),
                    lambda *x: (np.concatenate([one.reshape(-1) for one in x]),),
                    lambda x: tuple(one.reshape(heads, size) for one in np.split(x, 3)),
                )
            )
        last = {name.removeprefix("out."): shape for name, shape in shapes.items() if name.startswith("out.")}
        for piece in Linear(inputs=2).pieces(last):
            (variable,), (entry,) = piece.variables, piece.entries
            found.append(piece._replace(variables=(f"out.{variable}",), entries=(f"out_proj.{entry}",)))
        return found


_PROJECTIONS = ("query", "key", "value")


def is_attention(shapes: Shapes) -> bool:
    """Whether variables with these names and shapes are those of an attention layer of Flax.

    **Arguments:**

    - `shapes`: the shape of each variable, by its name in the layer.

    **Returns:** True or False.

    **Raises:** nothing of its own.
    """
    kernels: list[tuple[int, ...]] = [shapes.get(f"{name}.kernel", ()) for name in (*_PROJECTIONS, "out")]
    if any(len(shape) != 3 for shape in kernels):
        return False
    query, key, value, out = kernels
    return bool(out[:2] == query[1:] and key[1:] == value[1:] and key[2] == query[2])
