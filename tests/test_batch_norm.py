"""What BatchNorm means: float64 parity with PyTorch, one device. Several devices: test_parallel.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxnorm

RNG = np.random.default_rng(0)
SHAPES = {"N C": (8, 6), "N C L": (4, 6, 5), "N C H W": (4, 6, 3, 5), "N C D H W": (2, 6, 3, 2, 5)}
LAYERS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}


def pair(ndim, momentum, affine=True, track=True, eps=1e-5):
    """A PyTorch layer with random state, and ours with the same. Momentum is PyTorch's."""
    theirs = LAYERS[ndim](6, momentum=momentum, affine=affine, track_running_stats=track, eps=eps).double()
    ours = jaxnorm.nnx.BatchNorm(
        6,
        axis=1,
        momentum=None if momentum is None else 1 - momentum,
        epsilon=eps,
        use_bias=affine,
        use_scale=affine,
        track_running_stats=track,
        count_batches=True,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    for name, torch_name in names.items():
        value = getattr(theirs, torch_name)
        assert (getattr(ours, name) is None) == (value is None)
        if value is not None:
            new = RNG.uniform(0.5, 2, 6)
            value.data = torch.tensor(new)
            getattr(ours, name)[...] = jnp.asarray(new)
    return theirs, ours


def assert_same(ours, theirs, tolerance=1e-12):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


def assert_same_state(ours, theirs):
    for name, torch_name in (("mean", "running_mean"), ("var", "running_var"), ("num_batches_tracked",) * 2):
        value = getattr(theirs, torch_name)
        assert (getattr(ours, name) is None) == (value is None)
        if value is not None:
            assert_same(getattr(ours, name)[...], value)


@pytest.mark.parametrize(
    ("shape", "momentum", "affine", "track"),
    [(shape, 0.1, True, True) for shape in SHAPES.values()]
    + [((4, 6, 3, 5), *rest) for rest in itertools.product([0.1, 0.99, 0.0, None], [True, False], [True, False])],
)
def test_training_steps_and_eval_are_pytorchs(shape, momentum, affine, track):
    theirs, ours = pair(len(shape), momentum, affine, track)

    graphdef, params, rest = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    def step(rest, x, dy):
        def forward(params, x):
            layer = nnx.merge(graphdef, params, rest, copy=True)
            return layer(x), nnx.state(layer, nnx.BatchStat)

        y, vjp, rest = jax.vjp(forward, params, x, has_aux=True)
        return y, vjp(dy), rest

    for _ in range(3):
        x, dy = RNG.standard_normal((2, *shape)) * 3 + 1
        tx = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        ty = theirs(tx)
        ty.backward(torch.tensor(dy))
        y, (grads, dx), rest = step(rest, jnp.asarray(x), jnp.asarray(dy))
        assert_same(y, ty)
        assert_same(dx, tx.grad)
        if affine:
            assert_same(grads["scale"][...], theirs.weight.grad)
            assert_same(grads["bias"][...], theirs.bias.grad)
        ours = nnx.merge(graphdef, params, rest)
        assert_same_state(ours, theirs)
    ours.eval()
    theirs.eval()
    x = RNG.standard_normal(shape)
    assert_same(ours(jnp.asarray(x)), theirs(torch.tensor(x)))
    assert_same_state(ours, theirs)


def test_eval_gradients_are_pytorchs():
    theirs, ours = pair(4, 0.1)
    theirs.eval()
    ours.eval()
    x, dy = RNG.standard_normal((2, 4, 6, 3, 5))
    tx = torch.tensor(x, requires_grad=True)
    theirs(tx).backward(torch.tensor(dy))
    graphdef, params, rest = nnx.split(ours, nnx.Param, ...)
    grads, dx = jax.vjp(lambda p, x: nnx.merge(graphdef, p, rest)(x), params, jnp.asarray(x))[1](jnp.asarray(dy))
    assert_same(dx, tx.grad)
    assert_same(grads["scale"][...], theirs.weight.grad)
    assert_same(grads["bias"][...], theirs.bias.grad)


def test_second_derivatives_are_pytorchs_double_backward():
    x, v, u = RNG.standard_normal((3, 4, 6, 3))
    scale, bias = RNG.standard_normal((2, 6))

    def torch_loss(x, scale, bias):
        y = torch.nn.functional.batch_norm(x, None, None, scale, bias, training=True)
        return (torch.tensor(v) * torch.sin(y)).sum()

    def loss(x, scale, bias):
        return (v * jnp.sin(jaxnorm.batch_norm(x, scale, bias, axis=1)[0])).sum()

    inputs = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
    first = torch.autograd.grad(torch_loss(*inputs), inputs, create_graph=True)
    directional = sum((g * torch.tensor(d)).sum() for g, d in zip(first, (u, scale, bias), strict=True))
    second = torch.autograd.grad(directional, inputs)
    arrays = tuple(map(jnp.asarray, (x, scale, bias)))
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    reverse_over_reverse = jax.grad(
        lambda *a: sum((g * d).sum() for g, d in zip(gradient(*a), (u, scale, bias), strict=True)), argnums=(0, 1, 2)
    )(*arrays)
    forward_over_reverse = jax.jvp(gradient, arrays, tuple(map(jnp.asarray, (u, scale, bias))))[1]
    for ours in (reverse_over_reverse, forward_over_reverse):
        for a, b in zip(ours, second, strict=True):
            assert_same(a, b, 1e-10)


def test_forward_mode_agrees_with_reverse_mode():
    x = jnp.asarray(RNG.standard_normal((6, 3)))
    f = lambda x: jaxnorm.batch_norm(x)[0]  # noqa: E731
    assert_same(jax.jacfwd(f)(x), np.asarray(jax.jacrev(f)(x)))
    y, linear = jax.linearize(f, x)
    assert_same(linear(x * 2), np.asarray(jax.jvp(f, (x,), (x * 2,))[1]))
    assert_same(y, np.asarray(f(x)))


def test_one_value_per_channel_is_an_error_as_in_pytorch():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        torch.nn.BatchNorm2d(6)(torch.zeros(1, 6, 1, 1))
    layer = jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected more than 1 value per channel.*\(1, 1, 1, 6\)"):
        layer(jnp.zeros((1, 1, 1, 6)))
    layer.eval()
    assert layer(jnp.zeros((1, 1, 1, 6))).shape == (1, 1, 1, 6)


def test_a_layer_without_running_statistics_normalises_with_the_batch_in_eval():
    theirs, ours = pair(4, 0.1)
    theirs.running_mean = theirs.running_var = None
    ours.mean, ours.var = nnx.data(None), nnx.data(None)
    theirs.eval()
    ours.eval()
    x = RNG.standard_normal((4, 6, 3, 5))
    assert_same(ours(jnp.asarray(x)), theirs(torch.tensor(x)))


def test_tracking_switched_off_keeps_the_statistics_but_evaluates_with_them():
    # torch/nn/modules/batchnorm.py: buffers that exist are used in eval, whatever track_running_stats says.
    theirs, ours = pair(4, 0.1)
    theirs.track_running_stats = ours.track_running_stats = False
    x = RNG.standard_normal((4, 6, 3, 5))
    assert_same(ours(jnp.asarray(x)), theirs(torch.tensor(x)))
    assert_same_state(ours, theirs)
    theirs.eval()
    ours.eval()
    assert_same(ours(jnp.asarray(x)), theirs(torch.tensor(x)))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_padding_that_a_mask_leaves_out_changes_nothing(axis):
    layer = [jaxnorm.nnx.BatchNorm(6, axis=axis, rngs=nnx.Rngs(0), param_dtype=jnp.float64) for _ in range(2)]
    shape = [8, 5, 7]
    shape[axis] = 6
    x = RNG.standard_normal(shape)
    batch = 1 if axis == 0 else 0
    padded = np.concatenate([x, np.full_like(x, np.nan)], batch)
    mask_shape = [1, 1, 1]
    mask_shape[batch] = padded.shape[batch]
    mask = (np.arange(padded.shape[batch]) < x.shape[batch]).reshape(mask_shape)
    y = layer[0](jnp.asarray(padded), mask=jnp.asarray(mask))
    assert_same(jnp.take(y, jnp.arange(x.shape[batch]), batch), np.asarray(layer[1](jnp.asarray(x))))
    assert_same(layer[0].mean[...], np.asarray(layer[1].mean[...]))
    assert_same(layer[0].var[...], np.asarray(layer[1].var[...]))


def test_gradients_of_masked_values_are_those_of_pytorch_on_the_kept_ones():
    x, dy = RNG.standard_normal((2, 8, 6))
    keep = np.arange(8) < 5
    tx = torch.tensor(x[keep], requires_grad=True)
    torch.nn.functional.batch_norm(tx, None, None, training=True).backward(torch.tensor(dy[keep]))
    padded = np.where(keep[:, None], x, 1e3)

    def kept_rows(x):
        return jnp.where(keep[:, None], jaxnorm.batch_norm(x, mask=jnp.asarray(keep[:, None]))[0], 0)

    dx = jax.vjp(kept_rows, jnp.asarray(padded))[1](jnp.asarray(np.where(keep[:, None], dy, 0)))[0]
    assert_same(dx[:5], tx.grad)
    np.testing.assert_array_equal(dx[5:], 0)


def test_a_batch_in_which_nothing_counts_leaves_the_running_statistics_alone():
    layer = jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    layer.mean[...] += 2
    layer(jnp.ones((4, 6)), mask=jnp.zeros((4, 1), bool))
    np.testing.assert_array_equal(layer.mean[...], 2)
    np.testing.assert_array_equal(layer.var[...], 1)
    layer(jnp.ones((4, 6)) * 5, mask=jnp.arange(4)[:, None] < 1)  # one value: it has a mean, and no variance
    assert_same(layer.mean[...], np.full(6, 2 * 0.99 + 5 * 0.01), 1e-6)
    np.testing.assert_array_equal(layer.var[...], 1)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.silu, jnp.tanh])
def test_a_fused_activation_is_the_activation_after_the_layer(activation):
    x, dy = jnp.asarray(RNG.standard_normal((2, 4, 3, 5, 6)))
    fused = jax.vjp(lambda x: jaxnorm.batch_norm(x, activation=activation)[0], x)
    apart = jax.vjp(lambda x: activation(jaxnorm.batch_norm(x)[0]), x)
    assert_same(fused[0], np.asarray(apart[0]))
    assert_same(fused[1](dy)[0], np.asarray(apart[1](dy)[0]))


def test_the_backward_pass_keeps_the_input_once_and_not_what_the_activation_sees():
    x = jnp.zeros((8, 16, 16, 32), jnp.bfloat16)

    def kept(f):
        _, vjp = jax.eval_shape(lambda x: jax.vjp(f, x), x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp) if leaf.size >= x.size)

    assert kept(lambda x: jaxnorm.batch_norm(x)[0]) == x.nbytes
    assert kept(lambda x: jaxnorm.batch_norm(x, activation=jax.nn.silu)[0]) == x.nbytes
    assert kept(lambda x: jax.nn.silu(jaxnorm.batch_norm(x)[0])) > x.nbytes


def test_parameters_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"scale has shape \(5,\), expected \(6,\)"):
        jaxnorm.batch_norm(jnp.ones((4, 6)), jnp.ones(5))
    with pytest.raises(ValueError, match=r"mask of shape \(3, 1\) does not broadcast"):
        jaxnorm.batch_norm(jnp.ones((4, 6)), mask=jnp.ones((3, 1), bool))


def test_no_derivative_flows_into_running_statistics():
    layer = jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))

    def moved(x):
        _, updated = layer.apply(variables, x, mutable=["batch_stats"])
        return sum(leaf.sum() for leaf in jax.tree.leaves(updated))

    np.testing.assert_array_equal(jax.grad(moved)(jnp.arange(12.0).reshape(4, 3)), 0)


def test_an_activation_that_reads_something_else_sees_it_as_it_is():
    """`nnx.PReLU` is one object whose slope changes; so is a closure over a list."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
    slopes = [0.0]

    def leaky(y):
        return jnp.where(y > 0, y, slopes[0] * y)

    prelu = nnx.PReLU(0.0, param_dtype=x.dtype)
    for slope in (0.25, -1.0):
        slopes[0] = slope
        prelu.negative_slope[...] = jnp.full_like(prelu.negative_slope[...], slope)
        y, _ = jaxnorm.batch_norm(x)
        expected = np.where(y > 0, y, slope * y)
        for activation in (leaky, prelu):
            np.testing.assert_allclose(jaxnorm.batch_norm(x, activation=activation)[0], expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integers_are_not_rounded_in_silence(dtype):
    x = jnp.arange(12).reshape(4, 3).astype(dtype)
    row = jnp.ones(3)
    for call in (lambda **how: jaxnorm.batch_norm(x, **how)[0], lambda **how: jaxnorm.normalize(x, row, row, **how)):
        with pytest.raises(TypeError, match="rounded: give dtype"):
            call()
        with pytest.raises(TypeError, match="dtype of floating"):
            call(dtype=jnp.int32)
        assert call(dtype=jnp.float32).dtype == jnp.float32
    expected, _ = jaxnorm.batch_norm(x.astype(jnp.float64))
    np.testing.assert_allclose(jaxnorm.batch_norm(x, dtype=jnp.float64)[0], expected, rtol=1e-6)
