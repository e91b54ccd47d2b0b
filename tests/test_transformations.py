"""The layer inside JAX's transformations, in every way to be parallel: the numbers of one device, unwrapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from parity_tools import FAST

import jaxnorm

# Channels 0 and 1 lie far from the shift, so that the second look is taken.
X, V, DY = (jnp.asarray(a) for a in np.random.default_rng(0).standard_normal((3, 16, 3, 4)))
X = X + jnp.asarray([100.0, -7.0, 0.0, 0.1])
SCALE, BIAS = jnp.asarray([1.0, 0.5, -2.0, 0.1]), jnp.asarray([0.0, 0.3, 1.0, -1.0])


def twice(layer, x):
    return layer(layer(x))


def scan(layer, x):
    return lax.scan(lambda x, _: (layer(x), None), x, None, length=2)[0]


def while_loop(layer, x):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, layer(c[1])), (0, x))[1]


def cond(layer, x):
    return lax.cond(jnp.asarray(DY).sum() < 1e9, lambda x: layer(layer(x)), lambda x: layer(x), x)


def custom_vjp(layer, x):
    wrapped = jax.custom_vjp(lambda x: twice(layer, x))
    wrapped.defvjp(lambda x: jax.vjp(lambda x: twice(layer, x), x), lambda vjp, dy: vjp(dy))
    return wrapped(x)


def over_models(layer, x):
    return jax.vmap(lambda factor: twice(lambda x: layer(x, factor), x))(jnp.ones(2)).mean(0)


WRAPPED = {
    "plain": twice,
    "checkpoint": lambda layer, x: twice(jax.checkpoint(layer), x),
    "scan": scan,
    "cond": cond,
    "while": while_loop,
    "inner jit": lambda layer, x: twice(jax.jit(layer), x),
    "custom_vjp": custom_vjp,
    "vmap over models": over_models,
}


def quantities(wrapped, axis_name, x, v, dy, only):
    def layer(x, factor=1.0):
        y, _ = jaxnorm.batch_norm(x, SCALE * factor, BIAS, axis_name=axis_name, shift=jnp.zeros(4))
        return jnp.sin(y)

    def f(x):
        return wrapped(layer, x)

    def gradient(x):
        return jax.vjp(f, x)[1](dy)[0]

    found = {
        "value": lambda: f(x),
        "jvp": lambda: jax.jvp(f, (x,), (v,))[1],
        "gradient": lambda: gradient(x),
        "hessian-vector product": lambda: jax.jvp(gradient, (x,), (v,))[1],
    }
    return {name: found[name]() for name in only}


def in_parts(f):
    def run(*arrays):
        found = f(*(a.reshape(8, 2, *a.shape[1:]) for a in arrays))
        return jax.tree.map(lambda a: a.reshape(X.shape), found)

    return run


def jit(f):
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,)), P("batch"))
    return lambda *arrays: jax.jit(f, compiler_options=FAST)(*jax.device_put(arrays, sharding))


def shard_map(f, check_vma):
    mesh, spec = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,)), P("batch")
    inner = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.jit(inner, compiler_options=FAST)


WAYS = {
    "jit": (None, jit),
    "shard_map": ("batch", lambda f: shard_map(f, True)),
    "shard_map, check_vma=False": ("batch", lambda f: shard_map(f, False)),
    "pmap": ("batch", lambda f: in_parts(jax.pmap(f, axis_name="batch"))),
    "vmap": ("batch", lambda f: in_parts(jax.jit(jax.vmap(f, axis_name="batch"), compiler_options=FAST))),
}
ALL = ("value", "jvp", "gradient", "hessian-vector product")
ONLY = {"while": ALL[:2], "custom_vjp": ("value", "gradient")}  # JAX has no others of these


@pytest.fixture(scope="module")
def expected():
    return jax.jit(lambda *a: quantities(twice, None, *a, ALL))(X, V, DY)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRAPPED)
def test_the_numbers_are_those_of_one_device(name, way, expected):
    axis_name, parallel = WAYS[way]
    only = ONLY.get(name, ALL)
    found = parallel(lambda *a: quantities(WRAPPED[name], axis_name, *a, only))(X, V, DY)
    for quantity in only:
        np.testing.assert_allclose(
            found[quantity], expected[quantity], rtol=1e-9, atol=1e-10, err_msg=f"{quantity}: {name}, {way}"
        )
