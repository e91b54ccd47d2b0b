"""`jaxnorm.linen.BatchNorm` and `jaxnorm.nnx.BatchNorm` in the place of Flax's: fields, variables, transforms."""

import dataclasses
import inspect
import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxnorm

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((8, 4, 6)) * 2 + 1)


def flax_and_ours(kind, **fields):
    """Flax's layer and ours, told to track the variance as Flax does, each as `f(x, **call) -> y, batch statistics`."""
    if kind == "linen":
        layers = [linen.BatchNorm(**fields), jaxnorm.linen.BatchNorm(**fields, correction=0)]

        def run(layer):
            variables = layer.init(jax.random.key(0), X, use_running_average=False)
            return variables, lambda v, x, **call: layer.apply(v, x, mutable=["batch_stats"], **call)

        (variables, theirs), (_, ours) = map(run, layers)
        join = lambda v: lambda f: lambda x, **call: f(v, x, **call)  # noqa: E731
        return tuple(join(variables)(f) for f in (theirs, ours))
    layers = [cls(6, **fields, rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, jaxnorm.nnx.BatchNorm)]
    layers[1].correction = 0

    def call(layer):
        def f(x, **options):
            y = layer(x, **options)
            return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

        return f

    return tuple(map(call, layers))


def test_layers_initialise_under_jit_and_eval_shape_as_outside():
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, axis_name="batch")
    plain = layer.init(jax.random.key(0), X)
    jitted = jax.jit(layer.init)(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)
    assert jax.tree.map(jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), X)) == jax.tree.map(jnp.shape, plain)
    made = nnx.jit(lambda: jaxnorm.nnx.BatchNorm(6, momentum=None, rngs=nnx.Rngs(0)))()
    assert made.num_batches_tracked[...] == 0 and made.var[...].shape == (6,)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "use_bias", "use_scale"),
    [
        *itertools.product([None, jnp.float32, jnp.bfloat16], [jnp.float32, jnp.bfloat16], [True], [True]),
        (None, jnp.float32, False, True),
        (None, jnp.float32, True, False),
        (None, jnp.float32, False, False),
    ],
)
def test_outputs_dtypes_and_statistics_are_flaxs(kind, dtype, param_dtype, use_bias, use_scale):
    fields = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": use_bias, "use_scale": use_scale, "momentum": 0.7}
    theirs, ours = flax_and_ours(kind, **fields)
    mask = jnp.arange(8)[:, None, None] < 5
    for x in (X.astype(jnp.float32), X.astype(jnp.bfloat16)):
        for call in (
            {"use_running_average": False},
            {"use_running_average": True},
            {"use_running_average": False, "mask": mask},
        ):
            (y, state), (expected, expected_state) = ours(x, **call), theirs(x, **call)
            assert y.dtype == expected.dtype
            tolerance = 2**-7 if jnp.bfloat16 in (y.dtype, param_dtype, dtype, x.dtype) else 1e-6
            np.testing.assert_allclose(np.float64(y), np.float64(expected), rtol=tolerance, atol=4 * tolerance)
            assert jax.tree.structure(state) == jax.tree.structure(expected_state)
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axis", [-1, 0, 1, 2, -2])
def test_channels_along_any_axis(axis):
    size = X.shape[axis]
    layers = [cls(size, axis=axis, rngs=nnx.Rngs(0)) for cls in (nnx.BatchNorm, jaxnorm.nnx.BatchNorm)]
    np.testing.assert_allclose(*(layer(X.astype(jnp.float32)) for layer in layers), rtol=1e-6, atol=1e-6)


def test_every_field_and_default_of_flax_is_there():
    theirs = {f.name: f for f in dataclasses.fields(linen.BatchNorm)}
    ours = {f.name: f for f in dataclasses.fields(jaxnorm.linen.BatchNorm)}
    for name, field in theirs.items():
        assert ours[name].default == field.default or (ours[name].default is field.default), name
    theirs = inspect.signature(nnx.BatchNorm.__init__).parameters
    ours = inspect.signature(jaxnorm.nnx.BatchNorm.__init__).parameters
    for name, parameter in theirs.items():
        if name not in ("bias_init", "scale_init"):  # functions made anew each time
            assert ours[name].default == parameter.default, name


def test_a_flax_checkpoint_loads_unchanged():
    theirs, ours = linen.BatchNorm(use_running_average=True), jaxnorm.linen.BatchNorm(use_running_average=True)
    saved = theirs.init(jax.random.key(0), X)
    saved = jax.tree.map(lambda a: a + jnp.arange(6.0), saved)
    loaded = flax.serialization.from_bytes(ours.init(jax.random.key(1), X), flax.serialization.to_bytes(saved))
    np.testing.assert_allclose(ours.apply(loaded, X), theirs.apply(saved, X), rtol=1e-6)
    theirs, ours = nnx.BatchNorm(6, rngs=nnx.Rngs(0)), jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(1))
    state = jax.tree.map(lambda a: a + jnp.arange(6.0), nnx.state(theirs))
    nnx.update(ours, state)
    nnx.update(theirs, state)
    np.testing.assert_allclose(ours(X, use_running_average=True), theirs(X, use_running_average=True), rtol=1e-6)


def test_the_running_variance_is_unbiased_unless_told_otherwise():
    for correction in (0, 1):
        layer = jaxnorm.nnx.BatchNorm(6, momentum=0.0, correction=correction, rngs=nnx.Rngs(0))
        layer(X)
        np.testing.assert_allclose(layer.var[...], X.var((0, 1), ddof=correction), rtol=1e-6)


def test_metadata_of_parameters_is_kept():
    layer = jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0), scale_metadata={"role": "gain"}, bias_metadata={"role": "shift"})
    assert (layer.scale.role, layer.bias.role) == ("gain", "shift")


def test_train_eval_and_view_switch_the_flag():
    layer = jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    layer.eval()
    assert layer.use_running_average is True
    layer.train()
    assert layer.use_running_average is False
    assert nnx.view(layer, use_running_average=True).use_running_average is True
    layer.use_running_average = None
    with pytest.raises(ValueError, match=r"BatchNorm layer \(6 features\): use_running_average is None"):
        layer(X)


def test_init_of_a_layer_with_an_axis_name_needs_no_axis_and_one_row_is_enough():
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, axis_name="batch")
    variables = layer.init(jax.random.key(0), X[0, :1])
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_the_linen_layer_trains_as_the_nnx_layer_does(momentum):
    ours = jaxnorm.nnx.BatchNorm(6, momentum=momentum, rngs=nnx.Rngs(0))
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=momentum)
    variables = layer.init(jax.random.key(0), X)
    for shift in range(3):
        y, updated = layer.apply(variables, X + shift**2, mutable=["batch_stats"])
        variables = {**variables, **updated}
        np.testing.assert_allclose(y, ours(X + shift**2), rtol=1e-12, atol=1e-15)
    for name, value in variables["batch_stats"].items():
        np.testing.assert_allclose(value, getattr(ours, name)[...], rtol=1e-6)
    assert ("num_batches_tracked" in variables["batch_stats"]) == (momentum is None)


def test_complex_input_is_normalised_as_flax_does():
    x = jnp.asarray(RNG.standard_normal((8, 6)) + 1j * RNG.standard_normal((8, 6)) + 2)
    fields = {"use_running_average": False, "dtype": jnp.complex128}
    theirs, ours = linen.BatchNorm(**fields), jaxnorm.linen.BatchNorm(**fields, correction=0)
    variables = theirs.init(jax.random.key(0), x)
    expected, expected_state = theirs.apply(variables, x, mutable=["batch_stats"])
    y, state = ours.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs, param_dtype=jnp.float64)
        self.norm = jaxnorm.nnx.BatchNorm(6, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.linear(x)))


def gradients(model, x, wrap=lambda f: f):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        return (wrap(lambda p, x: nnx.merge(graphdef, p, rest, copy=True)(x))(params, x) ** 2).sum()

    return jax.grad(loss)(params, x)


def test_checkpoint_changes_no_gradient():
    model = Block(nnx.Rngs(0))
    for a, b in zip(*map(jax.tree.leaves, (gradients(model, X), gradients(model, X, jax.checkpoint))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_vmap_over_models():
    models = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    y = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, X)
    one = nnx.merge(nnx.graphdef(models), jax.tree.map(lambda a: a[1], nnx.state(Block(nnx.Rngs(0)) and models)))
    expected = nnx.clone(one)
    expected.norm.mean[...], expected.norm.var[...] = jnp.zeros(6), jnp.ones(6)
    np.testing.assert_allclose(y[1], expected(X), rtol=1e-12)
    np.testing.assert_allclose(models.norm.mean[1], expected.norm.mean[...], rtol=1e-12)


def test_scan_over_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Block(rngs)

    blocks = make(nnx.Rngs(0))
    single = [nnx.clone(jax.tree.map(lambda a, i=i: a[i], blocks)) for i in range(3)]

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
        return block(x)

    y, expected = run(X, blocks), X
    for block in single:
        expected = block(expected)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    for i, block in enumerate(single):
        np.testing.assert_allclose(blocks.norm.var[i], block.norm.var[...], rtol=1e-12)


def test_a_donated_state_trains():
    model = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, X)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0


def test_tracing_a_deep_model_takes_time_in_proportion_to_its_layers(monkeypatch):
    """A tracer that is asked for its sharding walks through the whole trace to word its error."""
    asked = []
    layers = nnx.List([jaxnorm.nnx.BatchNorm(6, count_batches=True, rngs=nnx.Rngs(0)) for _ in range(3)])

    def through(state, x):
        layers = nnx.merge(graph, state, copy=True)
        for layer in layers:
            x = layer(x)
        return nnx.state(layers)

    graph, state = nnx.split(layers)
    original = jax.core.Tracer.sharding
    monkeypatch.setattr(jax.core.Tracer, "sharding", property(lambda t: (asked.append(t), original.fget(t))))
    nnx.update(layers, jax.jit(through)(state, X))
    assert len(asked) == 0
    assert [int(layer.num_batches_tracked[...]) for layer in layers] == [1, 1, 1]
    expected = 0.01 * np.asarray(X, np.float64).mean((0, 1))
    np.testing.assert_allclose(layers[0].mean[...], expected, rtol=1e-6, atol=1e-9)


def test_hessians_are_symmetric_and_agree_in_both_orders():
    x = jnp.asarray(RNG.standard_normal((4, 2)))
    loss = lambda x: jnp.sin(jaxnorm.batch_norm(x)[0]).sum()  # noqa: E731
    hessian = jax.hessian(loss)(x).reshape(8, 8)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    np.testing.assert_allclose(hessian, jax.jacrev(jax.jacrev(loss))(x).reshape(8, 8), atol=1e-12)
