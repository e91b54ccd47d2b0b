"""Operations that treat all dimensions alike."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from interop.porting.looking import Seen, Size
from interop.porting.printers.registry import prints
from interop.porting.terms import Term, binary, call, compare, index, local, method, name, unary
from interop.porting.values import Tensor, Unprintable, Writer
from interop.program.nodes import DType

_NAMED = {
    "relu": "nnx.relu", "silu": "nnx.silu", "sigmoid": "nnx.sigmoid", "tanh": "jnp.tanh", "hardswish": "nnx.hard_swish",
    "hardsigmoid": "nnx.hard_sigmoid", "relu6": "nnx.relu6", "exp": "jnp.exp", "sqrt": "jnp.sqrt", "abs": "jnp.abs",
    "log": "jnp.log", "rsqrt": "lax.rsqrt", "softplus": "nnx.softplus", "sin": "jnp.sin", "cos": "jnp.cos",
    "floor": "jnp.floor", "ceil": "jnp.ceil", "round": "jnp.round", "erf": "lax.erf", "sign": "jnp.sign",
    "log_sigmoid": "nnx.log_sigmoid", "reciprocal": "jnp.reciprocal", "square": "jnp.square", "log1p": "jnp.log1p",
    "expm1": "jnp.expm1", "logical_not": "jnp.logical_not", "bitwise_not": "jnp.invert", "isnan": "jnp.isnan",
    "selu": "nnx.selu", "mish": "jax.nn.mish", "log2": "jnp.log2",
}  # fmt: skip


def _named(function: str) -> Callable[..., Tensor]:
    def printer(w: Writer, x: Tensor) -> Tensor:
        return w.elementwise(lambda x: call(function, x), x)

    return printer


for _operation, _function in _NAMED.items():
    prints(f"aten.{_operation}.default")(_named(_function))


@prints("aten.clone.default", "aten.alias.default", "aten.contiguous.default", "aten.lift_fresh_copy.default",
        "aten.detach_.default", "aten.lift.default", "aten.view_as_real.none")  # fmt: skip
def same(w: Writer, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


@prints("aten.detach.default")
def detach(w: Writer, x: Tensor) -> Tensor:
    return w.elementwise(lambda x: call("lax.stop_gradient", x), x)


@prints("aten.neg.default")
def neg(w: Writer, x: Tensor) -> Tensor:
    return w.elementwise(lambda x: unary("-", x), x)


@prints("aten.gelu.default")
def gelu(w: Writer, x: Tensor, approximate: str = "none") -> Tensor:
    return w.elementwise(lambda x: call("nnx.gelu", x, approximate=approximate == "tanh"), x)


@prints("aten.leaky_relu.default")
def leaky_relu(w: Writer, x: Tensor, slope: Any = 0.01) -> Tensor:
    return w.elementwise(lambda x: call("nnx.leaky_relu", x, slope), x)


@prints("aten.elu.default")
def elu(w: Writer, x: Tensor, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> Tensor:
    if scale != 1 or input_scale != 1:
        raise Unprintable("elu with scales")
    return w.elementwise(lambda x: call("nnx.elu", x, alpha), x)


@prints("aten.celu.default")
def celu(w: Writer, x: Tensor, alpha: Any = 1.0) -> Tensor:
    return w.elementwise(lambda x: call("nnx.celu", x, alpha), x)


@prints("aten.hardtanh.default", "aten.clamp.default", "aten.clamp.Tensor")
def clamp(w: Writer, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if w.node.operation == "aten.hardtanh.default":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
        if (low, high) == (0, 6):
            return w.elementwise(lambda x: call("nnx.relu6", x), x)
    if high is None:
        return maximum(w, x, low)
    if low is None:
        return minimum(w, x, high)
    return w.elementwise(lambda x, low, high: call("jnp.clip", x, low, high), x, low, high)


@prints("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(w: Writer, x: Tensor, low: Any) -> Tensor:
    return maximum(w, x, low)


@prints("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(w: Writer, x: Tensor, high: Any) -> Tensor:
    return minimum(w, x, high)


def _number(x: Any) -> bool:
    return not isinstance(x, Tensor)


def _two(sign: str) -> Callable[..., Any]:
    def printer(w: Writer, a: Any, b: Any, *, alpha: Any = 1) -> Any:
        if _number(a) and _number(b):
            return calculated(sign, a, b)

        def build(a: Any, b: Any) -> Any:
            return binary(sign, a, b if alpha == 1 else binary("*", alpha, b))

        return w.elementwise(build, a, b)

    return printer


for _operation, _sign in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items():
    prints(f"aten.{_operation}.Tensor", f"aten.{_operation}.Scalar")(_two(_sign))
prints("aten.remainder.Scalar", "aten.remainder.Tensor")(_two("%"))
prints("aten.floor_divide.default")(_two("//"))
for _operation, _sign in {"and": "&", "or": "|", "xor": "^"}.items():
    prints(f"aten.bitwise_{_operation}.Tensor", f"aten.logical_{_operation}.default", f"aten.__{_operation}__.Tensor")(
        _two(_sign)
    )


@prints("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(w: Writer, a: Tensor, b: Any, alpha: Any = 1) -> Any:
    return w.elementwise(lambda a, b: binary("-", b, a if alpha == 1 else binary("*", alpha, a)), a, b)


@prints("aten.div.Tensor_mode")
def div_mode(w: Writer, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "trunc":
        return w.elementwise(lambda a, b: call("jnp.trunc", binary("/", a, b)), a, b)
    return w.elementwise(lambda a, b: binary("//" if rounding_mode == "floor" else "/", a, b), a, b)


def _compared(sign: str) -> Callable[..., Any]:
    def printer(w: Writer, a: Any, b: Any) -> Any:
        return w.elementwise(lambda a, b: compare(sign, a, b), a, b)

    return printer


for _operation, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    prints(f"aten.{_operation}.Tensor", f"aten.{_operation}.Scalar")(_compared(_sign))


@prints("aten.maximum.default", "aten.max.other")
def maximum(w: Writer, a: Any, b: Any) -> Tensor:
    return w.elementwise(lambda a, b: call("jnp.maximum", a, b), a, b)


@prints("aten.minimum.default", "aten.min.other")
def minimum(w: Writer, a: Any, b: Any) -> Tensor:
    return w.elementwise(lambda a, b: call("jnp.minimum", a, b), a, b)


@prints("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(w: Writer, a: Any, b: Any) -> Any:
    if b == 0.5 and isinstance(a, Tensor):
        return w.elementwise(lambda a: call("jnp.sqrt", a), a)
    if isinstance(b, float) and b.is_integer():
        b = int(b)
    return w.elementwise(lambda a, b: binary("**", a, b), a, b)


@prints("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(w: Writer, condition: Tensor, a: Any, b: Any) -> Tensor:
    return w.elementwise(lambda c, a, b: call("jnp.where", c, a, b), condition, a, b)


@prints("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(w: Writer, x: Tensor, mask: Tensor, value: Any) -> Tensor:
    return w.elementwise(lambda x, mask, value: call("jnp.where", mask, value, x), x, mask, value)


@prints("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(w: Writer, a: Tensor, b: Tensor, weight: Any) -> Tensor:
    return w.elementwise(lambda a, b, t: binary("+", a, binary("*", t, binary("-", b, a))), a, b, weight)


@prints("aten.addcmul.default")
def addcmul(w: Writer, x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    def build(x: Any, a: Any, b: Any) -> Any:
        product = binary("*", a, b)
        return binary("+", x, product if value == 1 else binary("*", value, product))

    return w.elementwise(build, x, a, b)


@prints("aten.threshold.default")
def threshold(w: Writer, x: Tensor, at: Any, value: Any) -> Tensor:
    return w.elementwise(lambda x: call("jnp.where", compare(">", x, at), x, value), x)


@prints("aten.glu.default")
def glu(w: Writer, x: Tensor, dim: int = -1) -> Tensor:
    return w.tensor(call("nnx.glu", x.term, axis=x.axis(dim)), x.order)


@prints("aten.prelu.default")
def prelu(w: Writer, x: Tensor, weight: Tensor) -> Tensor:
    if weight.state is None:
        raise Unprintable("prelu with a computed weight")
    slope = Tensor(
        weight.term, Seen((1,) + weight.shape + (1,) * (x.ndim - 2), weight.seen.dtype), tuple(range(x.ndim)), 1
    )
    if weight.shape == (1,):
        slope = weight
    return w.elementwise(lambda x, a: call("jnp.where", compare(">", x, 0), x, binary("*", a, x)), x, slope)


def jnp_type(dtype: DType | str) -> Term:
    """`jnp.float32`; `int` for int64, which is as wide as jax has it."""
    found = dtype.name if isinstance(dtype, DType) else dtype
    return name({"bool": "jnp.bool_", "int64": "int"}.get(found, f"jnp.{found}"))


def type_like(x: Any, dtype: str) -> Any:
    """An element type as a term: that of the tensor at hand, where it has it."""
    if isinstance(x, Tensor) and x.seen.dtype == dtype and dtype.startswith(("float", "bfloat")):
        return Term("attribute", (x.term, "dtype"))
    return jnp_type(dtype)


@prints("aten._to_copy.default", "aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.type_as.default",
        "aten.to.other", "aten.to.prim_Device")  # fmt: skip
def to(w: Writer, x: Tensor, *_: Any, **__: Any) -> Tensor:
    wanted = w.seen_here().dtype
    if wanted == x.seen.dtype:
        return x
    counted = _counted(w, x)
    if counted is not None and wanted.startswith("float"):
        return w.tensor(call("jnp.arange", *counted, dtype=jnp_type(wanted)))
    return w.elementwise(lambda x: method(x, "astype", jnp_type(wanted)), x)


def _counted(w: Writer, x: Tensor) -> tuple[Any, ...] | None:
    """What a tensor counts from and to, if it is `jnp.arange`'s."""
    step = next((step for step in w.steps if x.term == local(step.local)), None)
    if step is None or not isinstance(step.term, Term) or step.term.kind != "call":
        return None
    function, arguments, _ = step.term.parts
    return arguments if function == name("jnp.arange") else None


# Sizes and other numbers, which are computed here and now.


def calculated(sign: str, a: Any, b: Any) -> Any:
    """The number that Python would compute."""
    numbers: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    numbers |= {"/": operator.truediv, "//": operator.floordiv, "%": operator.mod, "**": operator.pow}
    if isinstance(a, Size) or isinstance(b, Size):
        raise Unprintable("a number that is computed from the batch's size")
    return numbers[sign](a, b)


@prints("operator.add", "operator.sub", "operator.mul", "operator.floordiv", "operator.truediv", "operator.neg",
        "operator.mod", "operator.pow", "math.ceil", "math.floor", "math.trunc", "builtins.max", "builtins.min",
        "operator.eq", "operator.ne", "operator.lt", "operator.le", "operator.gt", "operator.ge", "operator.and_",
        "aten.sym_size.int", "aten.numel.default", "aten.sym_numel.default", "torch.sym_float", "torch.sym_int",
        "torch.sym_max", "torch.sym_min", "torch.sym_not", "math.sqrt", "torch._sym_sqrt", "builtins.round",
        "aten.item.default.none")  # fmt: skip
def number(w: Writer, *_: Any, **__: Any) -> Any:
    return w.seen[w.node.name]


@prints("operator.getitem")
def getitem(w: Writer, x: Any, which: Any) -> Any:
    if isinstance(x, Tensor):
        return w.tensor(index(w.plain(x), which))
    return x[which]
