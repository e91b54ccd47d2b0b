"""Derivatives where there is none: at corners, limits, ties and zeros each operation has that of the torch at hand.

Every case of `test_every_operation` is taken again with numbers that lie on such places. PyTorch's choices there have
changed between versions; `interop.ops.registry` says how an operation has several rules.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity_tools import FAST
from test_every_operation import CASES, CUBE, SQUARE, X, Y, _id, named
from test_ops import call, to_torch, torch_operation

# Where the activations of PyTorch have corners, and where powers, roots, quotients and logarithms end.
CORNERS = np.asarray([-6, -3, -1, -0.5, 0, 0.5, 1, 3, 6, 25])


def cycle(values, start):
    return lambda shape: np.resize(np.roll(values, -start), shape)


# What takes the place of the floating-point arrays of a case, one function of a shape for each array in turn.
FILLS = {
    "zeros": [np.zeros],
    "ones": [np.ones],
    "corners": [cycle(CORNERS, 0), cycle(CORNERS, 3)],
    "the same corners": [cycle(CORNERS, 0)],
    "ties": [cycle(np.asarray([0.0, 1.0]), 0), cycle(np.asarray([0.0, 1.0, 1.0]), 0)],
}

POWERS = (0, 0.5, 1, 2, 3, float("inf"), -float("inf"))
MORE = [
    *[case for p in (0, 0.5, 1, 1.5, 2, 3, -1, -0.5) for case in named("pow.Tensor_Scalar", X, p)],
    *[case for base in (0, 0.0, 1, 2.5) for case in named("pow.Scalar", base, X)],
    *named("pow.Tensor_Tensor float_power.Tensor_Tensor", X, Y),
    *named("clamp_min clamp_max", X, 0.5),
    *named("clamp clip", X, -1, 3),
    *named("clamp clip", X, 1, 1),
    *named("clamp clip", X, 3.0, -1.0),
    *named("clamp", X, None, 1),
    *named("clamp.Tensor", X, Y, None),
    *named("clamp.Tensor", X, None, Y),
    *named("clamp.Tensor", X, Y[0], Y[:1] + 1),
    *named("hardtanh", X, -0.5, 6),
    *named("threshold", X, 0, 1.0),
    *[case for p in POWERS for case in [*named("norm.Scalar", X, p), *named("linalg_vector_norm", CUBE, p, [1])]],
    *[case for p in (0.0, 0.5, 1.0, 2.0, 3.0, float("inf")) for case in named("cdist", CUBE, CUBE[:, :2], p)],
    *named("max.dim min.dim median.dim amax amin", CUBE, 1),
    *named("amax amin", CUBE, [0, 2], True),
    *named("topk", CUBE, 2, 1, True),
    *named("sort", CUBE, 1, False),
    *named("sort.stable", CUBE, stable=True, dim=1, descending=True),
    *named("prod.dim_int cumprod logcumsumexp", CUBE, 0),
    *named("logsumexp", CUBE, [1]),
    *named("linalg_norm", SQUARE, 1, [1, 2]),
    *named("linalg_norm", SQUARE, float("inf"), [1, 2]),
]  # fmt: skip


# Numbers at which the difference is one of rounding, and no choice.
ELSEWHERE = {
    "aten.digamma.default": ("corners", "the same corners"),  # at a pole PyTorch has 1e31, and we infinity
    "aten.special_digamma.default": ("corners", "the same corners"),
    "aten.linalg_inv.default": tuple(FILLS),  # of matrices that are singular but for rounding
    "aten.inverse.default": tuple(FILLS),
}


def _is_float(x):
    return isinstance(x, jax.Array) and x.dtype == jnp.float64


def _leaves(tree):
    return jax.tree.flatten(list(tree), is_leaf=lambda x: not isinstance(x, list))


def at_corners(args, fill):
    """The arguments of a case with other numbers in its floating-point arrays."""
    leaves, tree = _leaves(args)
    fills = itertools.cycle(FILLS[fill])
    return jax.tree.unflatten(tree, [jnp.asarray(next(fills)(x.shape)) if _is_float(x) else x for x in leaves])


def torch_gradients(name, args, options):
    """Which of PyTorch's results have a derivative, and the gradients of a fixed combination of them.

    None where there are none: for integers, or numbers at which PyTorch refuses (a singular matrix, say).
    """
    leaves, tree = _leaves(args)
    tensors = [to_torch(x) for x in leaves]
    inputs = [tensor.requires_grad_() for x, tensor in zip(leaves, tensors, strict=True) if _is_float(x)]
    options = {key: to_torch(value) for key, value in options.items()}
    try:
        results = torch_operation(name)(*jax.tree.unflatten(tree, tensors), **options)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        derived = [i for i, y in enumerate(results) if y.requires_grad and y.is_floating_point()]
        results = [results[i] for i in derived]
        found = torch.autograd.grad(results, inputs, [weights(y) for y in results], allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return [], None
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return derived, [gradient.numpy(force=True) for gradient in found]


def weights(y):
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)


def jax_gradients(name, args, options, derived):
    """A function that gives the gradients of the same combination, of other numbers in the floating-point arrays."""
    leaves, tree = _leaves(args)
    places = [i for i, x in enumerate(leaves) if _is_float(x)]

    def combined(values):
        filled = list(leaves)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        results = call(name, *jax.tree.unflatten(tree, filled), **options)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        return [results[i] for i in derived]

    def run(values):
        results, derive = jax.vjp(combined, values)
        of = [weights(torch.empty(y.shape, dtype=getattr(torch, y.dtype.name))) for y in results]
        return derive([jnp.asarray(weight.numpy()) for weight in of])[0]

    compiled = jax.jit(run, compiler_options=FAST)
    return lambda other: compiled([x for x in _leaves(other)[0] if _is_float(x)])


def _spectral(name, args, _):
    """A norm by singular values: where they are equal their vectors are any."""
    return name == "aten.linalg_norm.default" and args[1:2] == (2,)


PLACED = [case for case in [*CASES, *MORE] if any(map(_is_float, _leaves(case[1])[0])) and not _spectral(*case)]


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of what it deprecates
@pytest.mark.parametrize(("name", "args", "options"), PLACED, ids=_id)
def test_derivatives_where_there_is_none_are_pytorchs(name, args, options):
    options = {key: value for key, value in options.items() if key not in ("gradients", "tolerance", "dtypes")}
    derived, _ = torch_gradients(name, args, options)
    if not derived:
        return
    gradients = jax_gradients(name, args, options, derived)
    for fill in FILLS:
        filled = at_corners(args, fill)
        _, expected = torch_gradients(name, filled, options)
        if expected is None or fill in ELSEWHERE.get(name, ()):
            continue
        for found, wanted in zip(gradients(filled), expected, strict=True):
            np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-9, atol=1e-9, err_msg=fill)


EXTREMA = [
    *named("amax amin max min median nanmedian", X),
    *named("amax amin", X, [0]),
    *named("max.dim min.dim", X, 0),
    *[case for p in (float("inf"), -float("inf")) for case in named("linalg_vector_norm", X, p, [0])],
    *named("cdist", X, X + 1, float("inf")),
]


@pytest.mark.parametrize(("name", "args", "options"), EXTREMA, ids=_id)
def test_the_extremum_of_what_is_computed_has_its_derivative(name, args, options):
    """Compiled so that the elements are computed once to find the extremum and again to find what equals it."""

    def normalised(x, xp):
        centred = x - x.mean(0)
        return centred * ((centred**2).mean(0) + 1e-5) ** -0.5 * xp.ones_like(x) * 1.1 + 0.1

    def ours(x):
        found = call(name, normalised(x, jnp), *args[1:], **options)
        return ((found[0] if isinstance(found, (tuple, list)) else found) ** 2).sum()

    def theirs(x):
        found = torch_operation(name)(normalised(x, torch), *map(to_torch, args[1:]), **options)
        return ((found if isinstance(found, torch.Tensor) else found[0]) ** 2).sum()

    gradient = jax.jit(jax.grad(ours), compiler_options=FAST)
    for seed in range(12):
        x = np.random.default_rng(seed).normal(size=(17, X.shape[-1]))
        leaf = torch.from_numpy(x).requires_grad_()
        (wanted,) = torch.autograd.grad(theirs(leaf), leaf)
        np.testing.assert_allclose(np.asarray(gradient(jnp.asarray(x))), wanted.numpy(), rtol=1e-9, atol=1e-9)
