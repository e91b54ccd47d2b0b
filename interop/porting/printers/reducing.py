"""Sums, means, maxima, norms, softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from interop.porting.printers.elementwise import jnp_type
from interop.porting.printers.registry import prints
from interop.porting.terms import binary, call, index, method, tuple_of
from interop.porting.values import Tensor, Writer, plain_order


def axes_of(x: Tensor, dims: Any) -> Any:
    """The axes of dimensions, as one number or a tuple; None for all."""
    if dims is None or (isinstance(dims, Sequence) and not len(dims)):
        return None
    axes = sorted(x.axis(dim) for dim in ([dims] if isinstance(dims, int) else dims))
    axes = [axis - x.ndim if axis == x.ndim - 1 else axis for axis in axes]
    return axes[0] if len(axes) == 1 else tuple_of(axes)


def order_without(x: Tensor, dims: Any, keepdim: bool) -> tuple[int, ...]:
    """The order that is left after a reduction."""
    gone = range(x.ndim) if dims is None or (isinstance(dims, Sequence) and not len(dims)) else dims
    gone = [gone] if isinstance(gone, int) else gone
    gone = {dim % x.ndim for dim in gone}
    if keepdim:
        return x.order
    left = [dim for dim in range(x.ndim) if dim not in gone]
    return tuple(left.index(dim) for dim in x.order if dim not in gone)


def solid(w: Writer, x: Tensor) -> Tensor:
    """The tensor with all its axes."""
    return x if x.vector is None else Tensor(w.plain(x), x.seen, plain_order(x.ndim))


def _reduced(name: str) -> Callable[..., Tensor]:
    def printer(w: Writer, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        x = solid(w, x)
        how = {"keepdims": True} if keepdim else {}
        axes = axes_of(x, dims)
        term = method(x.term, name, *(() if axes is None else (axes,)), **how)
        if dtype is not None and dtype.name != x.seen.dtype:
            term = method(method(x.term, "astype", jnp_type(dtype)), name, *(() if axes is None else (axes,)), **how)
        return w.tensor(term, order_without(x, dims, keepdim))

    return printer


for _torch, _jax in {"mean": "mean", "sum": "sum", "amax": "max", "amin": "min", "any": "any", "all": "all"}.items():
    prints(f"aten.{_torch}.default", f"aten.{_torch}.dim", f"aten.{_torch}.dim_IntList", f"aten.{_torch}.dims")(
        _reduced(_jax)
    )


@prints("aten.max.default", "aten.min.default")
def extreme(w: Writer, x: Tensor) -> Tensor:
    return w.tensor(method(x.term, "max" if "max" in w.node.operation else "min"))


@prints("aten.max.dim", "aten.min.dim")
def extreme_of_dim(w: Writer, x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    what = "max" if "max" in w.node.operation else "min"
    how = {"keepdims": True} if keepdim else {}
    order = order_without(x, dim, keepdim)
    value = w.tensor(method(x.term, what, x.axis(dim), **how), order, 0)
    return value, w.tensor(method(x.term, f"arg{what}", x.axis(dim), **how), order, 1)


@prints("aten.argmax.default", "aten.argmin.default")
def argmax(w: Writer, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    what = "argmax" if "max" in w.node.operation else "argmin"
    if dim is None:
        return w.tensor(method(w.plain(x), what))
    how = {"keepdims": True} if keepdim else {}
    return w.tensor(method(x.term, what, x.axis(dim), **how), order_without(x, dim, keepdim))


@prints("aten.var.correction", "aten.std.correction", "aten.var.dim", "aten.std.dim")
def var(
    w: Writer, x: Tensor, dims: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    name = w.node.operation.split(".")[1]
    ddof = (1 if unbiased else 0) if correction is None else correction
    how: dict[str, Any] = {"ddof": ddof} if ddof else {}
    how |= {"keepdims": True} if keepdim else {}
    return w.tensor(method(x.term, name, axes_of(x, dims), **how), order_without(x, dims, keepdim))


@prints("aten.var_mean.correction", "aten.std_mean.correction")
def var_mean(
    w: Writer, x: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    ddof = 1 if correction is None else correction
    how: dict[str, Any] = {"keepdims": True} if keepdim else {}
    order = order_without(x, dims, keepdim)
    name = "std" if "std" in w.node.operation else "var"
    spread = method(x.term, name, axes_of(x, dims), **({"ddof": ddof} if ddof else {}), **how)
    return w.tensor(spread, order, 0), w.tensor(method(x.term, "mean", axes_of(x, dims), **how), order, 1)


@prints("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def softmax(w: Writer, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    axis = x.axis(dim)
    how = {} if axis == x.ndim - 1 else {"axis": axis}
    term = x.term
    if hasattr(dtype, "name") and dtype.name != x.seen.dtype:
        term = method(term, "astype", jnp_type(dtype))
    name = "nnx.log_softmax" if "log" in w.node.operation else "nnx.softmax"
    return w.tensor(call(name, term, **how), x.order)


@prints("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
def vector_norm(
    w: Writer, x: Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    x = solid(w, x)
    how = {"keepdims": True} if keepdim else {}
    axes = axes_of(x, dims)
    if order == 2:
        squares = method(binary("**", x.term, 2), "sum", *(() if axes is None else (axes,)), **how)
        return w.tensor(call("jnp.sqrt", squares), order_without(x, dims, keepdim))
    if order == 1:
        return w.tensor(method(call("jnp.abs", x.term), "sum", axes, **how), order_without(x, dims, keepdim))
    return w.tensor(call("jnp.linalg.norm", x.term, order, axis=axes, **how), order_without(x, dims, keepdim))


@prints("aten.cumsum.default")
def cumsum(w: Writer, x: Tensor, dim: int, **_: Any) -> Tensor:
    return w.tensor(call("jnp.cumsum", x.term, axis=x.axis(dim)), x.order)


@prints("aten.topk.default")
def topk(w: Writer, x: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> Any:
    array = Tensor(w.arranged(x, x.order), x.seen, x.order)
    if x.axis(dim) != x.ndim - 1 or not largest:
        from interop.porting.values import Unprintable

        raise Unprintable("topk along another dimension than the last")
    both = w.kept(call("jax.lax.top_k", array.term, k), x)
    return tuple(w.tensor(index(both.term, i), x.order, i) for i in range(2))
