"""convert_sync_batchnorm and its inverse: what a layer had it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxnorm

X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 3, 6)), jnp.float32)


class Net(nnx.Module):
    """Flax's layers and ours, in a list, in a dict, one shared, one frozen in eval."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.BatchNorm(6, momentum=0.8, epsilon=1e-3, rngs=rngs, scale_metadata={"role": "gain"}),
                jaxnorm.nnx.BatchNorm(6, momentum=None, activation=jax.nn.relu, rngs=rngs),
                nnx.BatchNorm(6, dtype=jnp.float32, param_dtype=jnp.bfloat16, use_bias=False, rngs=rngs),
            ]
        )
        self.named = nnx.Dict({"shared": self.layers[0]})
        self.layers[2].use_running_average = True

    def __call__(self, x):
        for layer in [*self.layers, self.named["shared"]]:
            x = layer(x)
        return x


def run(model, x, how):
    graphdef, state = nnx.split(model)

    def forward(x):
        model = nnx.merge(graphdef, state, copy=True)
        return model(x), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    if how == "one device":
        return forward(x)
    y, statistics = jax.pmap(forward, axis_name="batch")(x.reshape(8, 2, *x.shape[1:]))
    return y.reshape(x.shape), jax.tree.map(lambda a: a[0], statistics)


def test_replicas_of_the_converted_model_are_the_model_on_the_whole_batch():
    model = Net(nnx.Rngs(0))
    converted = jaxnorm.convert_sync_batchnorm(model, "batch")
    for got, expected in zip(
        jax.tree.leaves(run(converted, X, "replicas")), jax.tree.leaves(run(model, X, "one device")), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_conversion_keeps_what_a_layer_had_and_leaves_the_original_alone():
    model = Net(nnx.Rngs(0))
    converted = jaxnorm.convert_sync_batchnorm(model, "batch", [[0, 1], [2, 3]])
    assert type(model.layers[0]) is nnx.BatchNorm and model.layers[1].axis_name is None
    assert converted.named["shared"] is converted.layers[0]
    fields = ("momentum", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "axis", "use_running_average")
    for before, after in zip(model.layers, converted.layers, strict=True):
        assert type(after) is jaxnorm.nnx.BatchNorm
        assert (after.axis_name, after.axis_index_groups) == ("batch", ((0, 1), (2, 3)))
        assert [getattr(after, f) for f in fields] == [getattr(before, f) for f in fields]
        for name in ("scale", "bias", "mean", "var"):
            assert getattr(after, name) is getattr(before, name)
    assert converted.layers[0].scale.role == "gain"
    assert converted.layers[0].correction == 0  # Flax's running variance stays Flax's
    assert converted.layers[1].activation is jax.nn.relu
    assert [layer.use_running_average for layer in converted.layers] == [False, False, True]


def test_converting_twice_changes_nothing_and_reverting_gives_the_original_back():
    model = Net(nnx.Rngs(0))
    once = jaxnorm.convert_sync_batchnorm(model, "batch")
    twice = jaxnorm.convert_sync_batchnorm(once, "batch")
    assert nnx.graphdef(once) == nnx.graphdef(twice)
    reverted = jaxnorm.revert_sync_batchnorm(twice)
    assert [type(layer) for layer in reverted.layers] == [type(layer) for layer in model.layers]
    assert [layer.axis_name for layer in reverted.layers] == [None] * 3
    assert reverted.named["shared"] is reverted.layers[0]
    for got, expected in zip(
        jax.tree.leaves(run(reverted, X, "one device")), jax.tree.leaves(run(model, X, "one device")), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_train_and_eval_still_reach_converted_layers():
    converted = jaxnorm.convert_sync_batchnorm(Net(nnx.Rngs(0)), "batch")
    converted.eval()
    assert all(layer.use_running_average for layer in converted.layers)
    converted(X)  # no axis needed: eval is no matter of replicas


def test_a_converted_model_without_its_axis_says_which_layer_and_what_to_do():
    converted = jaxnorm.convert_sync_batchnorm(Net(nnx.Rngs(0)), "batch")
    with pytest.raises(
        NameError, match=r"axis name 'batch' is not bound[\s\S]*\nin BatchNorm layer 'layers\.0' \(6 features\)"
    ):
        converted(X)
    linen_model = jaxnorm.convert_sync_batchnorm(LinenNet(), "batch")
    variables = linen_model.init(jax.random.key(0), X)
    with pytest.raises(
        NameError, match=r"axis name 'batch' is not bound[\s\S]*revert_sync[\s\S]*\nin BatchNorm layer '.*BatchNorm_1'"
    ):
        linen_model.apply(variables, X, mutable=["batch_stats"])


def test_a_model_without_batchnorm_is_returned_with_a_warning():
    with pytest.warns(UserWarning, match="Linear has no BatchNorm layer"):
        model = jaxnorm.convert_sync_batchnorm(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), "batch")
    assert isinstance(model, nnx.Linear)


def test_a_linen_model_without_batchnorm_warns_when_it_is_called():
    model = jaxnorm.convert_sync_batchnorm(linen.Dense(3), "batch")
    with pytest.warns(UserWarning, match="Dense has no BatchNorm layer"):
        variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    assert variables["params"]["kernel"].shape == (3, 3)


def test_what_is_no_model_is_an_error():
    with pytest.raises(TypeError, match=r"expected a flax.nnx.Module or a flax.linen.Module, got dict"):
        jaxnorm.convert_sync_batchnorm({}, "batch")


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(x)  # frozen
        x = linen.BatchNorm(use_running_average=False, momentum=0.8)(linen.Dense(6, param_dtype=jnp.float64)(x))
        return jaxnorm.linen.BatchNorm(use_running_average=False, name="own")(x)

    def encode(self, x):
        return self(x) * 2


@pytest.mark.parametrize("method", ["__call__", "encode"])
def test_a_linen_model_runs_synchronised_on_its_own_variables(method):
    model = LinenNet()
    variables = model.init(jax.random.key(0), X)
    converted = jaxnorm.convert_sync_batchnorm(model, "batch")
    assert jax.tree.structure(converted.init(jax.random.key(0), X)) == jax.tree.structure(variables)

    def forward(x):
        return converted.apply(variables, x, mutable=["batch_stats"], method=method)

    y, updated = jax.pmap(forward, axis_name="batch")(X.reshape(8, 2, 3, 6))
    expected, expected_updated = model.apply(variables, X, mutable=["batch_stats"], method=method)
    np.testing.assert_allclose(y.reshape(X.shape), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(expected_updated), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-6, atol=1e-6)
    assert jaxnorm.revert_sync_batchnorm(converted) is model


def test_a_converted_linen_model_is_a_submodule_like_any_other():
    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return jaxnorm.convert_sync_batchnorm(LinenNet(), "batch")(x)

    model = Outer()
    variables = model.init(jax.random.key(0), X)
    y, _ = jax.pmap(lambda x: model.apply(variables, x, mutable=["batch_stats"]), axis_name="batch")(
        X.reshape(8, 2, 3, 6)
    )
    assert y.shape == (8, 2, 3, 6)
