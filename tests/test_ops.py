"""Every operation against PyTorch over its argument space: values, shapes, dtypes, and derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from parity_tools import FAST

import interop.ops
from interop.ops.layout import Laid, elementwise, plain
from interop.program.nodes import DType

FEW = examples(12)


def call(name, *args, key=None, **kwargs):
    """The operation on plain arrays, as a program calls it."""
    operation = interop.ops.lookup(name, torch.__version__)
    if operation.random:
        kwargs["key"] = jax.random.key(0) if key is None else key
    if operation.layout == "elementwise":
        return elementwise(operation.function, args, kwargs)
    result = operation.function(*args, **kwargs)
    return [plain(x) for x in result] if isinstance(result, (tuple, list)) else plain(result)


def torch_operation(name):
    library, operation, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, library), operation), overload)


def to_torch(value):
    if isinstance(value, jax.Array):
        return torch.from_numpy(np.array(value))
    if isinstance(value, DType):
        return getattr(torch, value.name)
    return [to_torch(item) for item in value] if isinstance(value, list) else value


def check(name, *args, gradients=True, tolerance=1e-12, dtypes=True, **kwargs):
    """Values, dtypes and (for float64 inputs) gradients of a fixed combination of the results."""
    leaves, tree = jax.tree.flatten(list(args), is_leaf=lambda x: x is None or isinstance(x, DType))
    differentiable = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and x.dtype == jnp.float64]
    tensors = [to_torch(x) for x in leaves]
    for i in differentiable:
        tensors[i].requires_grad_(gradients)
    expected = torch_operation(name)(*jax.tree.unflatten(tree, tensors), **{k: to_torch(v) for k, v in kwargs.items()})
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]

    def run(*values):
        filled = list(leaves)
        for i, value in zip(differentiable, values, strict=True):
            filled[i] = value
        found = call(name, *jax.tree.unflatten(tree, filled), **kwargs)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    weights = [
        torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape) if y.requires_grad else None for y in expected
    ]
    backward = gradients and bool(differentiable) and any(w is not None for w in weights)
    if any(type(y.grad_fn).__name__ == "NotImplemented" for y in expected):  # this PyTorch has no derivative of it
        backward = False

    def run_and_derive(*values):
        found, derive = jax.vjp(run, *values) if backward else (run(*values), None)
        if not backward:
            return found, ()
        pairs = itertools.zip_longest(found, weights)
        return found, derive([cotangent(y, w) for y, w in pairs])

    def cotangent(y, weight):
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            return np.zeros(y.shape, jax.dtypes.float0)
        return jnp.zeros_like(y) if weight is None else jnp.asarray(weight.numpy())

    found, grads = jax.jit(run_and_derive, compiler_options=FAST)(*(leaves[i] for i in differentiable))
    for y, wanted in zip(found, expected, strict=False):
        wanted = wanted.detach().resolve_conj()
        assert y.shape == tuple(wanted.shape)
        if dtypes:
            assert y.dtype.name == str(wanted.dtype).removeprefix("torch.")
        np.testing.assert_allclose(np.asarray(y), wanted.numpy(), rtol=tolerance, atol=tolerance)
    if not backward:
        return
    sum((y * w).sum() for y, w in zip(expected, weights, strict=True) if w is not None).backward()
    for i, grad in zip(differentiable, grads, strict=True):
        wanted = tensors[i].grad
        wanted = np.zeros(grad.shape) if wanted is None else wanted.numpy()
        np.testing.assert_allclose(np.asarray(grad), wanted, rtol=1e-9, atol=1e-9)


def draw(*shape, seed=0, low=-2.0, high=2.0):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape))


def whole(*shape, seed=0, low=-5, high=6):
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape))


CORNERS = jnp.asarray([-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 25.0])


ACTIVATIONS = (
    "relu hardtanh relu6 hardsigmoid hardswish leaky_relu elu selu celu gelu silu mish softplus log_sigmoid hardshrink "
    "softshrink sigmoid tanh"
)
FUNCTIONS = "abs exp expm1 sin cos erf square neg sign floor ceil round trunc atan sinh asinh isnan logical_not frac"


@pytest.mark.parametrize("name", (ACTIVATIONS + " " + FUNCTIONS).split())
def test_functions_of_one_element(name):
    check(f"aten.{name}.default", CORNERS)
    check(f"aten.{name}.default", draw(3, 4, seed=1))


@pytest.mark.parametrize(
    "name", ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "logit", "acosh"]
)
def test_functions_of_positive_elements(name):
    low, high = (0.1, 0.9) if name == "logit" else (1.1, 3.0)
    check(f"aten.{name}.default", draw(3, 4, low=low, high=high))


@pytest.mark.parametrize("name", ["exp", "sqrt", "sigmoid", "abs", "floor", "neg", "sin", "relu"])
def test_functions_of_one_integer(name):
    check(f"aten.{name}.default", jnp.abs(whole(3, 4)), tolerance=1e-6)


def test_gelu_by_tanh():
    check("aten.gelu.default", draw(20), approximate="tanh", tolerance=1e-10)


SCALARS = (2, -3, 0, 1, 1.5, -0.5, True, False)
DTYPES = ("float64", "float32", "int64", "int32", "uint8", "bool", "bfloat16", "float16")
SHAPES = [((2, 3), (2, 3)), ((2, 3), (3,)), ((4, 1, 3), (2, 1)), ((2, 3), ()), ((), (2,)), ((), ()), ((0, 3), (3,))]
TWO_TENSORS = (
    "add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Tensor remainder.Tensor fmod.Tensor floor_divide.default "
    "maximum.default minimum.default fmax.default lt.Tensor eq.Tensor atan2.default xlogy.Tensor copysign.Tensor "
    "float_power.Tensor_Tensor where.self"
)
WITH_A_NUMBER = (
    "add.Tensor sub.Tensor rsub.Scalar mul.Tensor div.Tensor pow.Tensor_Scalar remainder.Scalar fmod.Scalar "
    "floor_divide.Scalar lt.Scalar eq.Scalar xlogy.Scalar_Other copysign.Scalar float_power.Tensor_Scalar "
    "clamp_min.default clamp_max.default bitwise_and.Scalar bitwise_left_shift.Tensor_Scalar"
)
AFTER_A_NUMBER = "pow.Scalar remainder.Scalar_Tensor float_power.Scalar bitwise_or.Scalar_Tensor"


def check_promotion(name, cases):
    """Values and dtypes of all cases, compiled together; without those that PyTorch refuses (a difference of booleans,
    an integer to a negative power)."""
    accepted, expected = [], []
    for args in cases:
        try:
            wanted = torch_operation(f"aten.{name}")(*(_torch(x) if isinstance(x, jax.Array) else x for x in args))
        except RuntimeError:
            continue
        accepted.append(args)
        expected.append(wanted)
    arrays = [[x for x in args if isinstance(x, jax.Array)] for args in accepted]

    def run(arrays):
        filled = map(iter, arrays)
        return [
            call(f"aten.{name}", *(next(given) if isinstance(x, jax.Array) else x for x in args))
            for given, args in zip(filled, accepted, strict=True)
        ]

    for args, found, wanted in zip(accepted, jax.jit(run, compiler_options=FAST)(arrays), expected, strict=True):
        shown = f"{name} of {[(x.dtype.name, x.shape) if isinstance(x, jax.Array) else x for x in args]}"
        assert found.dtype.name == str(wanted.dtype).removeprefix("torch."), shown
        assert found.shape == tuple(wanted.shape), shown
        np.testing.assert_allclose(
            np.asarray(found, np.float64),
            wanted.double().numpy(),
            rtol=ROUNDING.get(found.dtype.name, 0),
            err_msg=shown,
        )


ROUNDING = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def operand(shape, dtype, seed):
    return jnp.asarray((np.abs(np.random.default_rng(seed).integers(-5, 6, shape)) + 1).astype(jnp.dtype(dtype)))


@pytest.mark.filterwarnings("ignore")  # of divisions by 0
@pytest.mark.parametrize("name", TWO_TENSORS.split())
def test_types_of_two_tensors_are_promoted_as_in_pytorch(name):
    condition = [jnp.asarray(True)] if name == "where.self" else []
    check_promotion(
        name,
        [
            (*condition, operand(a, first, 1), operand(b, second, 2))
            for first, second in itertools.product(DTYPES, DTYPES)
            for a, b in (SHAPES if first == second else SHAPES[3:6])  # a scalar tensor counts less than others
        ],
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_A_NUMBER.split())
def test_types_of_a_tensor_and_a_number_are_promoted_as_in_pytorch(name):
    cases = itertools.product(DTYPES, SCALARS, [(3,), ()])
    check_promotion(name, [(operand(shape, dtype, 1), scalar) for dtype, scalar, shape in cases])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AFTER_A_NUMBER.split())
def test_types_of_a_number_and_a_tensor_are_promoted_as_in_pytorch(name):
    cases = itertools.product(DTYPES, SCALARS, [(3,), ()])
    check_promotion(name, [(scalar, operand(shape, dtype, 1)) for dtype, scalar, shape in cases])


def check_exactly(name, *args, **kwargs):
    """Values and dtype to the last bit."""
    check(f"aten.{name}", *args, gradients=False, tolerance=0, **kwargs)


@pytest.mark.parametrize("exponent", [True, False])
def test_a_boolean_to_the_power_of_one_is_a_boolean(exponent):
    check_exactly("pow.Tensor_Scalar", jnp.asarray([True, False]), exponent)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8"])
def test_integers_to_negative_powers(dtype):
    bases, powers = (
        jnp.asarray([1, -1, -1, 2, -3, 0]).astype(dtype),
        jnp.asarray([-3, -3, -2, -1, -63, -1]).astype(dtype),
    )
    check_exactly("pow.Tensor_Tensor", bases, powers)
    for base in (1, -1, 2, 0):
        check_exactly("pow.Scalar", base, powers)


@pytest.mark.parametrize("alpha", [0, 1, False, True])
def test_a_multiple_of_a_boolean_is_added(alpha):
    check_exactly("add.Tensor", jnp.asarray([True, False, False]), jnp.asarray([True, True, False]), alpha=alpha)


@pytest.mark.parametrize("value", [-3, 300])
def test_an_integer_that_the_type_does_not_hold_wraps_around(value):
    x, place = jnp.asarray([1, 0, 3], jnp.uint8), jnp.asarray([1])
    for name, args in (
        ("fill.Scalar", (value,)),
        ("masked_fill.Scalar", (x > 0, value)),
        ("constant_pad_nd.default", ([1, 1], value)),
        ("scatter.value", (0, place, value)),
        ("index_fill.int_Scalar", (0, place, value)),
        ("threshold.default", (1, value)),
    ):
        try:
            torch_operation(f"aten.{name}")(_torch(x), *(to_torch(y) for y in args))
        except RuntimeError:
            continue  # some take no number beyond the type's
        check_exactly(name, x, *args)


def test_results_have_the_type_of_their_tensors():
    """A weight without dimensions, a multiple of integers, a step between integers."""
    x, y, weight = operand((3,), "float32", 1), operand((3,), "float32", 2), jnp.asarray(0.25)
    check("aten.lerp.Tensor", x, y, weight, gradients=False, tolerance=1e-6)
    check("aten.lerp.Tensor", x.astype(jnp.uint8), y.astype(jnp.uint8), weight, gradients=False, tolerance=1e-6)
    check_exactly("addcmul.default", *(whole(3, seed=i) for i in range(3)), value=1.5)
    for dtype in ("int64", "uint8", "bool"):
        check_exactly("heaviside.default", whole(3, 4).astype(dtype), whole(3, 4, seed=1).astype(dtype))


def _torch(x):
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(x.astype(jnp.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("mode", [None, "floor", "trunc"])
@pytest.mark.parametrize("make", [draw, whole])
def test_division_rounds_as_asked(mode, make):
    divisor = jnp.where(make(3, 4, seed=2) == 0, 1, make(3, 4, seed=2))
    check(
        "aten.div.Tensor_mode",
        make(3, 4),
        divisor,
        rounding_mode=mode,
        gradients=mode is None,
        tolerance=1e-6 if make is whole else 1e-12,
    )


@pytest.mark.parametrize("limits", [(-1.0, 1.0), (None, 0.5), (-0.5, None), (3, 3)])
def test_clamps_gradient_at_its_limits_is_that_of_the_torch_at_hand(limits):
    check("aten.clamp.default", CORNERS, *limits)


def test_derivatives_where_there_is_a_choice():
    """At equal elements, at limits, and at what is no number."""
    twice, nan = jnp.asarray([1.0, 2.0, 2.0, 0.5, -3.0]), jnp.asarray([jnp.nan, 0.0, 0.3, 2.0, -1.0])
    for name in ("fmax", "fmin"):
        check(f"aten.{name}.default", twice, jnp.asarray([1.0, 2.0, 1.5, jnp.nan, -3.0]))
    check("aten.copysign.Tensor", jnp.asarray([0.0, -0.0, 1.0, -2.0]), jnp.asarray([-1.0, 1.0, -1.0, 0.0]))
    check("aten.clamp.default", nan, -0.5, 1.5)
    check("aten.clamp_min.default", nan, 0)
    check("aten.logit.default", jnp.asarray([0.25, 0.75, 0.5, 0.1]), 0.25)
    check("aten.pow.Tensor_Tensor", jnp.asarray([0.0, 0.0, 3.0, 2.0]), jnp.asarray([0.0, 2.0, 0.0, -1.5]))
    check("aten.rrelu.default", jnp.asarray([-1.0, 0.0, 2.0]), 0.1, 0.3, False)
    for p in (-1, -2.0):
        check("aten.linalg_vector_norm.default", jnp.asarray([[0.0, 2.0], [1.0, -2.0]]), p, [1])


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_medians(name):
    x = jnp.asarray([[2.0, 1.0, 2.0, 3.0], [4.0, 0.0, 5.0, -1.0], [2.0, 2.0, 6.0, 7.0]])
    some = x.at[0, 1].set(jnp.nan).at[0, 3].set(jnp.nan).at[:, 2].set(jnp.nan)
    check(f"aten.{name}.default", x)
    check(f"aten.{name}.default", x.astype(int))
    check(f"aten.{name}.default", some, gradients=name == "nanmedian")
    for y, dim, keepdim in (
        (x[1:, :], 1, False),
        (some[:, :2], 0, True),
        (some, 1, False),
        (jnp.asarray(1.5), 0, True),
    ):
        check(f"aten.{name}.dim", y, dim, keepdim)


def test_cross_entropy_of_saturated_probabilities_has_finite_gradients():
    p, target = draw(5, low=0.1, high=0.9), draw(5, seed=1, low=0, high=1)
    for weight, reduction in itertools.product((None, draw(5, low=0.1).astype(jnp.float32)), range(3)):
        check("aten.binary_cross_entropy.default", p, target, weight, reduction)
    x = torch.tensor([20.0, -200.0, 1.0], requires_grad=True)
    torch.nn.functional.binary_cross_entropy(torch.sigmoid(x), torch.tensor([1.0, 0.0, 1.0])).backward()
    found = jax.grad(
        lambda x: call("aten.binary_cross_entropy.default", jax.nn.sigmoid(x), jnp.asarray([1.0, 0.0, 1.0]))
    )(jnp.asarray(x.detach().numpy()))
    np.testing.assert_allclose(found, x.grad, rtol=1e-5)


@pytest.mark.parametrize("power", [2, 0.5, -1, 3, 1.7, 0])
def test_powers(power):
    check("aten.pow.Tensor_Scalar", draw(3, low=0.1), power)


def test_addition_of_multiples():
    check("aten.add.Tensor", draw(2, 3), draw(3, seed=1), alpha=2.5)
    check("aten.addcmul.default", draw(2, 3), draw(3, seed=1), draw(2, 1, seed=2), value=0.5)
    check("aten.lerp.Scalar", draw(3), draw(3, seed=1), 0.3)
    check("aten.where.self", draw(3, 4) > 0, draw(3, 4), draw(4, seed=1))
    check("aten.masked_fill.Scalar", draw(3, 4), draw(4, seed=1) > 0, -1.0)


CONV = st.tuples(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([1, 2]),
)


@FEW
@given(CONV)
def test_convolutions(arguments):
    spatial, groups, kernel, stride, padding, dilation, bias, multiplier = arguments
    x, weight = draw(2, 4, *[7] * spatial), draw(4 * multiplier, 4 // groups, *[kernel] * spatial, seed=1)
    b = draw(4 * multiplier, seed=2) if bias else None
    args = [[n] * spatial for n in (stride, padding, dilation)]
    check(f"aten.conv{spatial}d.default", x, weight, b, *args, groups)
    check("aten.convolution.default", x, weight, b, *args, False, [0] * spatial, groups)


@FEW
@given(CONV, st.integers(0, 1))
def test_transposed_convolutions(arguments, extra):
    spatial, groups, kernel, stride, padding, dilation, bias, multiplier = arguments
    extra = min(extra, max(stride, dilation) - 1)
    padding = min(padding, dilation * (kernel - 1))
    x, weight = draw(2, 4, *[5] * spatial), draw(4, 4 * multiplier // groups, *[kernel] * spatial, seed=1)
    b = draw(4 * multiplier, seed=2) if bias else None
    args = [[n] * spatial for n in (stride, padding, extra)]
    name = f"aten.conv_transpose{spatial}d.{'default' if spatial == 1 else 'input'}"
    check(name, x, weight, b, *args, groups, [dilation] * spatial)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_convolutions_with_named_padding(padding, kernel):
    check("aten.conv2d.padding", draw(2, 4, 7, 6), draw(4, 2, kernel, kernel), None, [1, 1], padding, [2, 1], 2)


def test_convolution_of_one_example_and_of_none():
    check("aten.conv2d.default", draw(4, 7, 6), draw(4, 1, 3, 3), draw(4), [2, 2], [1, 1], [1, 1], 4)
    check("aten.conv2d.default", draw(0, 4, 7, 6), draw(4, 4, 3, 3))


def test_grouped_convolutions_are_those_of_xla():
    """The formulation for CPUs against lax.conv_general_dilated."""
    from interop.ops import convolution

    x, weight = draw(2, 9, 8, 12), draw(24, 3, 3, 2, seed=1)
    for groups, kernel in ((4, weight), (12, draw(24, 1, 3, 2, seed=1))):
        found = convolution._convolution(x, kernel, (2, 1), ((1, 0), (2, 1)), (1, 2), groups)
        expected = jax.lax.conv_general_dilated(
            x, kernel, (2, 1), [(1, 0), (2, 1)], rhs_dilation=(1, 2), feature_group_count=groups,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 12])
def test_grouped_convolutions_keep_one_input_for_the_backward_pass(groups):
    """Not one for each of the 25 positions in the kernel."""
    x, weight = draw(2, 12, 20, 20), draw(24, 12 // groups, 5, 5, seed=1)
    _, vjp = jax.vjp(lambda x, w: call("aten.conv2d.default", x, w, None, 1, 2, 1, groups), x, weight)
    kept = sum(leaf.size for leaf in jax.tree.leaves(vjp))
    assert kept < 2 * 12 * 24 * 24 + weight.size + 200  # the padded input, the kernel, some indices


@pytest.mark.parametrize("groups", [4, 12])
def test_grouped_convolutions_have_second_and_forward_derivatives(groups):
    x, weight = draw(2, 12, 8, 9), draw(24, 12 // groups, 3, 2, seed=1)

    def whole(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 1), [(1, 1), (0, 0)], feature_group_count=groups, dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    def ours(x, w):
        return call("aten.conv2d.default", x, w, None, [2, 1], [1, 0], 1, groups)

    def second(f):
        gradient = jax.grad(lambda args: (f(*args) ** 3).sum())
        return jax.jvp(gradient, ((x, weight),), ((jnp.cos(x), jnp.sin(weight)),))

    for a, b in zip(jax.tree.leaves(second(ours)), jax.tree.leaves(second(whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [4, 12])
def test_grouped_convolutions_are_chosen_where_they_run(groups, monkeypatch):
    """A machine with an accelerator that runs a program on its CPU."""
    x, weight = draw(2, 12, 8, 9), draw(24, 12 // groups, 3, 2, seed=1)

    def gradients(x, weight):
        y = call("aten.conv2d.default", x, weight, None, [2, 1], [1, 0], [1, 1], groups)
        return jax.grad(lambda x, w: (call("aten.conv2d.default", x, w, None, 1, 1, 1, groups) ** 2).sum(), (0, 1))(
            x, weight
        ), y

    expected = jax.jit(gradients)(x, weight)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lowered = jax.jit(lambda *args: gradients(*args)).lower(x, weight)
    assert "stablehlo.convolution" not in lowered.as_text()
    found = lowered.compile(compiler_options=FAST)(x, weight)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    exported = jax.export.export(jax.jit(lambda *args: gradients(*args)), platforms=["cuda"])(x, weight)
    assert "stablehlo.convolution" in exported.mlir_module()


POOL = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.booleans(), st.integers(5, 8), st.integers(6, 7)
)


@FEW
@given(POOL, st.integers(1, 2))
def test_max_pooling(arguments, dilation):
    kernel, stride, padding, ceil, h, w = arguments
    padding = min(padding, kernel // 2)
    check(
        "aten.max_pool2d_with_indices.default",
        draw(2, 3, h, w),
        [kernel] * 2,
        [stride] * 2,
        [padding] * 2,
        [dilation] * 2,
        ceil,
    )
    check(
        "aten.max_pool2d.default",
        jnp.round(draw(2, 3, h, w)),
        [kernel] * 2,
        [stride] * 2,
        [padding] * 2,
        [dilation] * 2,
        ceil,
    )


@FEW
@given(POOL, st.booleans(), st.sampled_from([None, 3]))
def test_average_pooling(arguments, include, divisor):
    kernel, stride, padding, ceil, h, w = arguments
    padding = min(padding, kernel // 2)
    check(
        "aten.avg_pool2d.default", draw(2, 3, h, w), [kernel] * 2, [stride] * 2, [padding] * 2, ceil, include, divisor
    )


@pytest.mark.parametrize("size", [[1, 1], [2, 3], [7, 6], [5, 4], [9, 8]])
def test_adaptive_pooling(size):
    check("aten.adaptive_avg_pool2d.default", draw(2, 3, 7, 6), size)
    check("aten.adaptive_max_pool2d.default", draw(2, 3, 7, 6), size)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"), list(itertools.product((1, 2, 3), (1, 2), (1, 2), (0, 1)))
)
def test_windows_as_columns_and_back(kernel, stride, dilation, padding):
    args = [[n] * 2 for n in (kernel, dilation, padding, stride)]
    x = draw(2, 3, 7, 6)
    check("aten.im2col.default", x, *args)
    columns = torch.ops.aten.im2col(to_torch(x), *args)
    check("aten.col2im.default", jnp.asarray(columns.numpy()), [7, 6], *args)


REDUCED = pytest.mark.parametrize("dim", [None, [0], [-1], [1, 2], [0, -1]])


@REDUCED
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    "name", ["sum.dim_IntList", "mean.dim", "amax.default", "linalg_vector_norm.default", "logsumexp.default"]
)
def test_reductions(name, dim, keepdim):
    dims = [0, 1, 2] if dim is None and name.split(".")[0] in ("amax", "logsumexp") else dim
    args = (2.0, dims, keepdim) if name.startswith("linalg") else (dims, keepdim)
    check(f"aten.{name}", draw(2, 3, 4), *args)


@REDUCED
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
def test_variances(name, dim, keepdim, correction):
    check(f"aten.{name}.correction", draw(2, 3, 4), dim, correction=correction, keepdim=keepdim)


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, float("inf")])
def test_norms_of_zero_have_no_nan(p):
    check("aten.linalg_vector_norm.default", jnp.asarray([[0.0, 0.0], [1.0, -2.0]]), p, [1])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_along_one_dimension(dim):
    x = draw(3, 4, 5)
    for name in (
        "softmax.int",
        "log_softmax.int",
        "cumsum.default",
        "max.dim",
        "min.dim",
        "argmax.default",
        "sort.default",
        "median.dim",
    ):
        check(f"aten.{name}", x, dim)
    check("aten.topk.default", x, 2, dim)
    check("aten.cumprod.default", x, dim)
    check("aten.sum.dim_IntList", whole(3, 4, 5), [dim])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention(causal, mask):
    if causal and mask:
        return
    q, k, v = (draw(2, 3, 5, 4, seed=i) for i in range(3))
    attn_mask = None if mask is None else draw(5, 5, seed=3) > 0 if mask == "bool" else draw(5, 5, seed=3)
    check("aten.scaled_dot_product_attention.default", q, k, v, attn_mask, 0.0, causal, tolerance=1e-9)


def test_linear_algebra():
    check("aten.linear.default", draw(2, 3, 4), draw(5, 4, seed=1), draw(5, seed=2))
    check("aten.matmul.default", draw(2, 3, 4), draw(4, 5, seed=1))
    check("aten.matmul.default", draw(4), draw(2, 4, 5, seed=1))
    check("aten.addmm.default", draw(5), draw(3, 4), draw(4, 5, seed=1), beta=0.5, alpha=2)
    check("aten.baddbmm.default", draw(2, 3, 5), draw(2, 3, 4), draw(2, 4, 5, seed=1))
    check("aten.einsum.default", "b i d, b j d -> b i j", [draw(2, 3, 4), draw(2, 5, 4, seed=1)])
    check("aten.bilinear.default", draw(2, 3), draw(2, 4), draw(5, 3, 4), draw(5))
    check(
        "aten._cdist_forward.default", draw(2, 3, 4), draw(2, 5, 4, seed=1), 2.0, None, gradients=False, tolerance=1e-6
    )


def test_normalisation():
    x, weight, bias = draw(2, 6, 4, 5), draw(6, seed=1), draw(6, seed=2)
    check("aten.layer_norm.default", x, [4, 5], draw(4, 5, seed=1), draw(4, 5, seed=2), 1e-5)
    check("aten.group_norm.default", x, 3, weight, bias, 1e-5)
    check("aten.instance_norm.default", x, weight, bias, None, None, True, 0.1, 1e-5, False)
    check("aten.rms_norm.default", x, [5], draw(5, seed=1), None)
    for training in (False, True):
        mean, var = draw(6, seed=3), draw(6, seed=4, low=0.5)
        args = (weight, bias, mean, var, training, 0.1, 1e-5)
        wanted = torch.ops.aten._native_batch_norm_legit_functional(*map(to_torch, (x, *args)))
        found = call("aten._native_batch_norm_legit_functional.default", x, *args)
        for index in (0, 3, 4):
            np.testing.assert_allclose(found[index], wanted[index].numpy(), rtol=1e-9, atol=1e-9)
    check("aten.native_channel_shuffle.default", x, 3, gradients=False)


def test_shapes():
    x = draw(2, 3, 4, 5)
    check("aten.permute.default", x, [0, -1, 1, 2])
    check("aten.transpose.int", x, 1, -1)
    check("aten.view.default", x, [2, -1, 5])
    check("aten.flatten.using_ints", x, 1, 2)
    check("aten.unflatten.int", x, 2, [2, -1])
    check("aten.squeeze.dim", x[:, :1], 1)
    check("aten.squeeze.default", x[:1])
    check("aten.unsqueeze.default", x, -1)
    check("aten.expand.default", x[:, :1], [7, 2, -1, 4, 5])
    check("aten.repeat.default", x, [2, 1, 1, 1, 3])
    check("aten.repeat_interleave.self_int", x, 2, 1)
    check("aten.cat.default", [x, draw(2, 2, 4, 5, seed=1)], 1)
    check("aten.cat.default", [x, jnp.zeros((0,))], 1)
    check("aten.stack.default", [x, x], -1)
    check("aten.slice.Tensor", x, 2, -3, 100, 2)
    check("aten.select.int", x, -1, -2)
    check("aten.split.Tensor", x, 2, -1)
    check("aten.split_with_sizes.default", x, [1, 2], 1)
    check("aten.chunk.default", x, 3, -1)
    check("aten.unbind.int", x, 1)
    check("aten.flip.default", x, [1, -1])
    check("aten.roll.default", x, [1, -2], [2, 3])
    check("aten.roll.default", x, [3])
    check("aten.unfold.default", x, -1, 3, 2)
    check("aten.constant_pad_nd.default", x, [1, -1, 2, 0], 0.5)
    for mode in ("reflect", "replicate", "circular"):
        check("aten.pad.default", x, [1, 2, 2, 1], mode)
    check("aten.as_strided.default", draw(12), [2, 3], [5, 2], 1)
    check("aten.meshgrid.indexing", [draw(2), draw(3)], indexing="xy")


@pytest.mark.parametrize(
    "size", [[6, 4, 5], [2, 3, 20], [2, 60], [24, 5], [120], [2, 3, 2, 2, 5], [2, 1, 3, 4, 5], [3, 2, 4, 5]]
)
def test_a_view_is_the_same_in_every_layout(size):
    x = draw(2, 3, 4, 5)
    view = interop.ops.lookup("aten.view.default", torch.__version__).function
    orders = list(itertools.permutations(range(4)))

    def run(x):
        return [plain(view(Laid(jnp.transpose(x, order), order), size)) for order in orders]

    for order, found in zip(orders, jax.jit(run, compiler_options=FAST)(x), strict=True):
        np.testing.assert_array_equal(found, x.reshape(size), err_msg=f"{order}")


@FEW
@given(st.permutations(range(4)), st.integers(-4, 3))
def test_dimensions_are_the_programs_in_every_layout(order, dim):
    x = draw(2, 3, 4, 5)
    kept = Laid(jnp.transpose(x, order), tuple(order))

    def both(name, *args):
        function = interop.ops.lookup(name, torch.__version__).function
        found, expected = function(kept, *args), function(x, *args)
        for a, b in zip(*(y if isinstance(y, (tuple, list)) else [y] for y in (found, expected)), strict=True):
            np.testing.assert_allclose(plain(a), plain(b), rtol=1e-12)

    both("aten.sum.dim_IntList", [dim], False)
    both("aten.mean.dim", [dim, (dim + 1) % 4] if dim >= 0 else [dim], True)
    both("aten.softmax.int", dim)
    both("aten.select.int", dim, 1)
    both("aten.slice.Tensor", dim, 1, None)
    both("aten.unsqueeze.default", dim)
    both("aten.split.Tensor", 2, dim)
    both("aten.flip.default", [dim])
    both("aten.transpose.int", dim, 0)
    both("aten.constant_pad_nd.default", [1, 0, 0, 2])


@pytest.mark.parametrize("name", ["aten.to.other", "aten.type_as.default"])
def test_the_type_of_another_tensor_comes_without_its_shape_or_order(name):
    other = Laid(jnp.zeros((2, 3, 4, 5), jnp.float32), (0, 2, 3, 1))
    for x in (jnp.asarray(1.5), draw(5), Laid(draw(2, 4, 3), (0, 2, 1))):
        found = plain(call(name, x, other))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, plain(x), rtol=1e-6)


def test_reading_and_writing_by_index():
    x = draw(4, 5, 3)
    rows, columns = jnp.asarray([0, -1, 2]), jnp.asarray([1, 1, 4])
    check("aten.index.Tensor", x, [rows, columns])
    check("aten.index.Tensor", x, [None, columns])
    check("aten.index.Tensor", x, [rows, None, jnp.asarray([0, 1, 2])])
    for accumulate in (False, True):
        check("aten.index_put.default", x, [rows, columns], draw(3, 3, seed=1), accumulate)
    check("aten.index_put.default", x, [x[..., 0] > 0], jnp.asarray(7.0), gradients=False)
    check("aten.index_select.default", x, 1, columns)
    index = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 5, 2)))
    check("aten.gather.default", x, 0, index)
    check("aten.scatter_add.default", x, 0, index, draw(3, 5, 2, seed=1))
    check("aten.scatter.value", x, 0, index, 2.0)
    check("aten.embedding.default", draw(6, 3), whole(2, 4, low=0, high=6), 2)
    check("aten.slice_scatter.default", x, draw(4, 2, 3, seed=1), 1, 1, 4, 2)
    check("aten.select_scatter.default", x, draw(4, 3, seed=1), 1, -2)
    check("aten.tril.default", x, 1)
    check("aten.diagonal.default", x, 1, 0, 2)
    check("aten.masked_fill.Scalar", x, x > 0, 1.0)


@pytest.mark.filterwarnings(r"ignore:index_reduce\(\) is in beta")
@pytest.mark.parametrize("reduce", ["sum", "mean", "prod", "amax", "amin"])
@pytest.mark.parametrize("include", [True, False])
def test_reducing_by_index(reduce, include):
    """With one zero and with two among the factors of a product, and of integers."""
    x, index = draw(3, 4).at[0, 1].set(0), jnp.asarray([[0, 0, 2, 0], [0, 0, 1, 2], [0, 0, 1, 0], [2, 0, 1, 2]])
    source = draw(4, 4, seed=1).at[1, 0].set(0).at[0, 2].set(0).at[2, 2].set(0).at[1, 2].set(0)
    check("aten.scatter_reduce.two", x, 0, index, source, reduce, include_self=include)
    check("aten.scatter_reduce.two", whole(3, 4), 0, index, whole(4, 4, seed=1), reduce, include_self=include)
    if reduce != "sum":
        rows = jnp.asarray([2, 0, 2])
        check("aten.index_reduce.default", x, 1, rows, draw(3, 3, seed=2), reduce, include_self=include)


def test_writing_at_flat_places():
    for accumulate in (False, True):
        check("aten.put.default", draw(3, 4), jnp.asarray([[0, -1], [5, 2]]), draw(2, 2, seed=1), accumulate)


def test_searching_rows():
    rows, x = jnp.sort(draw(2, 3, 7), -1), draw(2, 3, 4, seed=1)
    check("aten.searchsorted.Tensor", rows, x, gradients=False)
    check("aten.searchsorted.Tensor", rows[0, 0], x, right=True, gradients=False)
    check("aten.searchsorted.Scalar", rows[0, 0], 0.3, out_int32=True, gradients=False)
    mixed = draw(2, 3, 7, seed=2)
    check("aten.searchsorted.Tensor", mixed, x, sorter=jnp.argsort(mixed, -1), gradients=False)


def test_truth_of_bytes_is_a_byte():
    for name in ("all", "any"):
        check(f"aten.{name}.default", whole(3, 4, low=0).astype(jnp.uint8))
        check(f"aten.{name}.dim", whole(3, 4, low=0).astype(jnp.uint8), 1)
        check(f"aten.{name}.dim", whole(3, 4, low=0), 1)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_distances(p):
    x = draw(5, 3).at[4].set(draw(5, 3)[1])
    check("aten.pdist.default", x, p)
    check("aten._pdist_forward.default", x, p, gradients=False)
    check("aten.dist.default", x, draw(5, 3, seed=1), p)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@FEW
@given(
    SIZES,
    st.booleans(),
    st.sampled_from(["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]),
)
def test_resizing_by_weights(size, corners, name):
    if "_aa" in name and size[1] == 1:
        return  # PyTorch 2.13 repeats the first row there
    check(f"aten.{name}.default", draw(2, 3, 5, 4), list(size), corners, None, None, tolerance=1e-9)


@FEW
@given(SIZES, st.sampled_from(["upsample_nearest2d", "_upsample_nearest_exact2d"]))
def test_resizing_to_the_nearest(size, name):
    check(f"aten.{name}.default", draw(2, 3, 5, 4), list(size), None, None)


FACTORS = [round(0.1 * i, 1) for i in range(3, 40)] + [1 / 3, 2 / 3, 1.25]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("other", [(), (3,), (130,), (1, 1)])
def test_the_nearest_is_pytorchs_to_the_rounding(exact, dtype, other, monkeypatch):
    """Positions that are whole but for a rounding, in ATen's kernels: of one dimension, of small and large images."""
    picked = []
    monkeypatch.setattr(interop.ops.resize, "_picked", lambda array, axis, index: picked.append(index) or array)
    name = f"aten.{'_upsample_nearest_exact' if exact else 'upsample_nearest'}{len(other) + 1}d.vec"
    sizes = [(n, [*other, out], None) for n in (2, 10, 14, 20, 26, 33) for out in (6, 10, 12, 22, 41, 46, 55)]
    scaled = [(n, None, [1.0] * len(other) + [s]) for n in (2, 3, 5, 6, 10, 20, 33, 60) for s in FACTORS if n * s >= 1]
    for n, size, factors in sizes + scaled:
        x = np.broadcast_to(np.arange(n, dtype=dtype), (1, 1, *other, n)).copy()
        expected = torch_operation(name)(torch.from_numpy(x), size, factors).flatten(0, -2)
        call(name, jnp.asarray(x), size, factors)
        np.testing.assert_array_equal(picked[-1], expected[0], err_msg=f"{n} {size} {factors}")


@pytest.mark.parametrize("factors", [[2.0, 2.0], [1.5, 0.7]])
def test_resizing_by_factors(factors):
    check("aten.upsample_nearest2d.vec", draw(2, 3, 5, 4), None, factors)
    check("aten.upsample_bilinear2d.vec", draw(2, 3, 5, 4), None, False, factors, tolerance=1e-9)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_grid_sampling(mode, padding, corners):
    check(
        "aten.grid_sampler.default",
        draw(2, 3, 5, 4),
        draw(2, 6, 7, 2, seed=1, low=-1.3, high=1.3),
        mode,
        padding,
        corners,
        tolerance=1e-9,
    )


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", [1, 2])
def test_the_border_of_a_grid_has_no_gradient(padding, corners):
    """The identity, with which a spatial transformer begins, has its outer points there."""
    theta = jnp.asarray([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    grid = call("aten.affine_grid_generator.default", theta, [1, 3, 5, 4], True)
    check("aten.grid_sampler.default", draw(1, 3, 5, 4), grid, 0, padding, corners, tolerance=1e-9)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("mode", [0, 1])
def test_grid_sampling_of_volumes(mode, padding, corners):
    x, grid = draw(2, 3, 4, 5, 3), draw(2, 3, 2, 4, 3, seed=1, low=-1.3, high=1.3)
    check("aten.grid_sampler.default", x, grid, mode, padding, corners, tolerance=1e-9)


def test_pixel_shuffles():
    check("aten.pixel_shuffle.default", draw(2, 8, 3, 4), 2)
    check("aten.pixel_unshuffle.default", draw(2, 2, 4, 6), 2)


def test_factories():
    for n in (5, 6):
        check("aten.fft_fftfreq.default", n, 0.5, dtype=DType("float64"))
        check("aten.fft_rfftfreq.default", n)
    check("aten.full.default", [2, 3], 7)
    check("aten.full.default", [2], 1.5)
    check("aten.arange.start_step", 1, 10, 3)
    check("aten.arange.default", 4, dtype=DType("float32"))
    check("aten.linspace.default", 0, 1, 5, dtype=DType("float64"))
    check("aten.zeros.default", [2], dtype=DType("bool"))
    check("aten.full_like.default", whole(2, 3), 4)
    check("aten.zero.default", draw(2, 3), gradients=False)
    check("aten.new_ones.default", draw(2), [3])
    check("aten._to_copy.default", draw(3), dtype=DType("int32"), gradients=False)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first", "bias"),
    [(1, False, False, True), (2, True, True, True), (2, False, True, False)],
)
def test_recurrent_layers(kind, layers, bidirectional, batch_first, bias):
    module = getattr(torch.nn, kind)(
        4, 3, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    ).double()
    params = [jnp.asarray(p.detach().numpy()) for p in module.parameters()]
    states = [draw(layers * (1 + bidirectional), 2, 3, seed=i) for i in (1, 2)]
    name = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[kind]
    hx = states if kind == "LSTM" else states[0]
    x = draw(2, 5, 4) if batch_first else draw(5, 2, 4)
    check(f"aten.{name}.input", x, hx, params, bias, layers, 0.0, False, bidirectional, batch_first, tolerance=1e-9)


def test_dropout_keeps_the_mean_and_draws_by_key():
    x = jnp.ones((400, 400))
    first, second = (call("aten.dropout.default", x, 0.3, True, key=jax.random.key(i)) for i in range(2))
    assert abs(float(first.mean()) - 1) < 0.02
    assert abs(float((first == 0).mean()) - 0.3) < 0.01
    assert (first != second).any()
    np.testing.assert_array_equal(call("aten.dropout.default", x, 0.3, False), x)
    assert (call("aten.native_dropout.default", x, 1.0, True)[0] == 0).all()


def test_what_is_drawn_has_no_derivative():
    x = draw(4, low=0.5)
    for name, args in (("normal.Tensor_float", (2.0,)), ("normal.Tensor_Tensor", (x,)), ("poisson.default", ())):
        derivative = jax.grad(lambda x, name=name, args=args: call(f"aten.{name}", x, *args).sum())(x)
        np.testing.assert_array_equal(derivative, 0)


def test_a_registered_operation_is_called_by_its_name():
    @interop.register("mylib::twice")
    def twice(x):
        return 2 * x

    assert interop.ops.lookup("mylib.twice.default", torch.__version__).function is twice
    with pytest.raises(ValueError, match="library::operation"):
        interop.register("twice")(twice)
    with pytest.raises((ValueError, TypeError), match="layout"):
        interop.register("mylib::thrice", layout="other")


def test_a_number_of_a_tensor_has_no_gradient():
    """aten._local_scalar_dense: x.item()."""
    x = jnp.asarray([[3.5]])
    assert call("aten._local_scalar_dense.default", x).shape == ()
    assert float(jax.grad(lambda x: call("aten._local_scalar_dense.default", x) * x.sum())(x)[0, 0]) == 3.5
