"""Every way to be parallel gives the numbers of one device with the whole batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.hlo import outside_branches

RNG = np.random.default_rng(0)
X, DY = (jnp.asarray(a) for a in RNG.standard_normal((2, 16, 3, 5, 6)) * 2 + 1)
SCALE, BIAS = (jnp.asarray(a) for a in RNG.standard_normal((2, 6)))
GROUPS = [None, [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 3, 5, 6], [1, 2, 4, 7]], [[i] for i in range(8)]]
COLLECTIVE = re.compile(r"= (\S+|\([^)]*\)) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")


def step(x, dy, axis_name=None, groups=None):
    """Output, the gradients of sum(y * dy) that this program sees, and the statistics."""

    def forward(x, scale, bias):
        y, moments = jaxnorm.batch_norm(x, scale, bias, axis_name=axis_name, axis_index_groups=groups)
        return y, (moments.mean, moments.variance(correction=1))

    y, vjp, statistics = jax.vjp(forward, x, SCALE, BIAS, has_aux=True)
    return y, *vjp(dy), *statistics


def expected(groups=None):
    """One device: each group's part of the batch by itself. Parameter gradients summed, statistics by group."""
    parts = [[2 * i + j for i in group for j in (0, 1)] for group in groups or [range(8)]]
    y, dx = np.empty(X.shape), np.empty(X.shape)
    scale, bias = np.zeros(6), np.zeros(6)
    means, variances = np.empty((8, 6)), np.empty((8, 6))
    for group, rows in zip(groups or [range(8)], parts, strict=True):
        part = [np.asarray(a) for a in step(X[np.array(rows)], DY[np.array(rows)])]
        y[rows], dx[rows] = part[:2]
        scale, bias = scale + part[2], bias + part[3]
        means[list(group)], variances[list(group)] = part[4:]
    return y, dx, scale, bias, means, variances


def replicas(a):
    return a.reshape(8, 2, *a.shape[1:])


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("batch",), axis_types=(kind,))


def assert_same(got, groups=None, summed=False):
    """`summed`: the parameter gradients are summed over replicas already (or there is only one program)."""
    names = ("y", "dx", "dscale", "dbias", "mean", "variance")
    for name, a, b in zip(names, got, expected(groups), strict=True):
        a = np.asarray(a)
        if name in ("y", "dx"):
            a = a.reshape(X.shape)
        elif name in ("dscale", "dbias") and not summed:
            a = a.reshape(8, 6).sum(0)
        np.testing.assert_allclose(np.broadcast_to(a, b.shape), b, rtol=1e-10, atol=1e-10, err_msg=name)


def named(groups):
    return lambda x, dy: step(x, dy, "batch", groups)


@pytest.mark.parametrize("groups", GROUPS)
def test_pmap(groups):
    assert_same(jax.pmap(named(groups), axis_name="batch")(replicas(X), replicas(DY)), groups)


@pytest.mark.parametrize("groups", GROUPS)
def test_vmap(groups):
    assert_same(jax.vmap(named(groups), axis_name="batch")(replicas(X), replicas(DY)), groups)
    jitted_inside = jax.vmap(jax.jit(named(groups)), axis_name="batch")
    assert_same(jitted_inside(replicas(X), replicas(DY)), groups)


@pytest.mark.parametrize("groups", GROUPS)
def test_shard_map_unchecked(groups):
    mapped = jax.shard_map(
        lambda x, dy: tuple(a[None] for a in named(groups)(x, dy)),
        mesh=mesh(),
        in_specs=P("batch"),
        out_specs=P("batch"),
        check_vma=False,
    )
    assert_same(jax.jit(mapped)(X, DY), groups)


@pytest.mark.parametrize("groups", GROUPS)
def test_shard_map_checked_sums_the_gradients_of_replicated_parameters(groups):
    # Statistics shared by all are typed as replicated: P() is accepted. With groups they differ, so P("batch").
    shared = P() if groups is None else P("batch")

    def local(x, dy):
        y, dx, scale, bias, mean, variance = named(groups)(x, dy)
        stack = (lambda a: a) if groups is None else (lambda a: a[None])
        return y, dx, scale, bias, stack(mean), stack(variance)

    mapped = jax.shard_map(
        local, mesh=mesh(), in_specs=P("batch"), out_specs=(P("batch"), P("batch"), P(), P(), shared, shared)
    )
    assert_same(jax.jit(mapped)(X, DY), groups, summed=True)


def test_tuples_of_axis_names():
    grid = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for check in (True, False):
        mapped = jax.shard_map(
            lambda x, dy: step(x, dy, ("a", "b"))[:2],
            mesh=grid,
            in_specs=P(("a", "b")),
            out_specs=P(("a", "b")),
            check_vma=check,
        )
        for got, wanted in zip(jax.jit(mapped)(X, DY), expected(), strict=False):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)
    nested = jax.vmap(jax.vmap(lambda x, dy: step(x, dy, ("a", "b"))[0], axis_name="b"), axis_name="a")
    y = nested(X.reshape(4, 2, 2, *X.shape[1:]), DY.reshape(4, 2, 2, *X.shape[1:]))
    np.testing.assert_allclose(y.reshape(X.shape), expected()[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("groups", GROUPS)
def test_global_view_under_jit(kind, groups):
    sharded = [jax.device_put(a, NamedSharding(mesh(kind), P("batch"))) for a in (X, DY)]
    y, dx, scale, bias, mean, variance = jax.jit(lambda x, dy: step(x, dy, None, groups))(*sharded)
    wanted = expected(groups)
    for got, value in zip((y, dx, scale, bias), wanted, strict=False):
        np.testing.assert_allclose(got, value, rtol=1e-10, atol=1e-10)
    assert y.sharding.spec[0] == "batch"
    # The statistics are those of all groups together: what running statistics are to estimate.
    np.testing.assert_allclose(mean, X.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(variance, X.var((0, 1, 2), ddof=1), rtol=1e-10)


def test_global_view_of_a_batch_that_devices_do_not_divide():
    x = X[:12]
    y = jax.jit(lambda x: jaxnorm.batch_norm(x)[0])(jax.device_put(x, NamedSharding(mesh(), P())))
    np.testing.assert_allclose(y, jaxnorm.batch_norm(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["pmap", "vmap", "shard_map", "jit"])
def test_uneven_and_empty_shards_are_the_unpadded_batch(how):
    kept = np.array([2, 0, 1, 2, 2, 0, 1, 2])  # rows of each replica that count
    mask = np.arange(2)[None] < kept[:, None]
    rows = X.reshape(8, 2, -1, 6)[mask].reshape(-1, 6)
    padded = jnp.where(mask[:, :, None, None, None], replicas(X), 1e6)

    def local(x, mask, axis_name):
        y, moments = jaxnorm.batch_norm(x, axis_name=axis_name, mask=mask[:, None, None, None])
        return y, moments.mean, moments.variance(), jnp.broadcast_to(moments.count, 6)

    named = lambda x, mask: local(x, mask, "batch")  # noqa: E731
    if how == "pmap":
        y, *found = jax.pmap(named, axis_name="batch")(padded, mask)
    elif how == "vmap":
        y, *found = jax.vmap(named, axis_name="batch")(padded, jnp.asarray(mask))
    else:
        whole, flat_mask = padded.reshape(X.shape), jnp.asarray(mask.reshape(16))
        if how == "jit":
            whole, flat_mask = (jax.device_put(a, NamedSharding(mesh(), P("batch"))) for a in (whole, flat_mask))
            y, *found = jax.jit(lambda x, m: local(x, m, None))(whole, flat_mask)
        else:
            mapped = jax.shard_map(named, mesh=mesh(), in_specs=P("batch"), out_specs=(P("batch"), P(), P(), P()))
            y, *found = jax.jit(mapped)(whole, flat_mask)
    normal = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y).reshape(8, 2, -1, 6)[mask].reshape(-1, 6), normal, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(found, (rows.mean(0), rows.var(0), len(rows)), strict=True):
        np.testing.assert_allclose(np.asarray(got).reshape(-1, 6)[0], wanted, rtol=1e-10)


def test_one_value_on_each_replica_is_fine_and_one_in_all_is_an_error():
    x = X[:8, :1, :1]
    y = jax.pmap(lambda x: jaxnorm.batch_norm(x, axis_name="i")[0], axis_name="i")(x.reshape(8, 1, 1, 1, 6))
    np.testing.assert_allclose(y.reshape(8, 6), (x[:, 0, 0] - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5))
    alone = lambda x: jaxnorm.batch_norm(x, axis_name="i", axis_index_groups=[[i] for i in range(8)])[0]  # noqa: E731
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        jax.pmap(alone, axis_name="i")(x.reshape(8, 1, 1, 1, 6))


def test_second_derivatives_over_replicas_are_those_of_one_device():
    def loss(x, axis_name):
        y = jaxnorm.batch_norm(x, SCALE, BIAS, axis_name=axis_name)[0]
        total = jnp.sin(y).sum()
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    def curvature(x, v, axis_name):
        return jax.jvp(jax.grad(lambda x: loss(x, axis_name)), (x,), (v,))[1]

    mapped = jax.shard_map(
        lambda x, v: curvature(x, v, "batch"), mesh=mesh(), in_specs=P("batch"), out_specs=P("batch")
    )
    np.testing.assert_allclose(mapped(X, DY), curvature(X, DY, None), rtol=1e-9, atol=1e-10)


def collectives(compiled):
    """Those of a step whose shift was near the mean: the others stand in a branch."""
    return [(kind, shape) for shape, kind in COLLECTIVE.findall(outside_branches(compiled.as_text()))]


def numbers(shape):
    sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape)]
    return sum(sizes)


@pytest.mark.parametrize("masked", [False, True])
def test_one_collective_forward_and_one_backward_of_two_numbers_for_each_channel(masked):
    mask = jnp.ones((2, 1, 1, 1), bool) if masked else None
    x = jnp.asarray(replicas(X), jnp.float32)

    def forward(x):
        y, moments = jaxnorm.batch_norm(x, axis_name="batch", mask=mask)
        return y, moments.mean

    def backward(x, dy):
        return jax.vjp(lambda x: forward(x)[0], x)[1](dy)[0]

    forward_only = collectives(jax.pmap(forward, axis_name="batch").lower(x).compile())
    assert [(kind, numbers(shape)) for kind, shape in forward_only] == [("all-reduce", 2 * 6 + masked)]
    both = collectives(jax.pmap(backward, axis_name="batch").lower(x, x).compile())
    assert [(kind, numbers(shape)) for kind, shape in both] == [("all-reduce", 2 * 6 + masked), ("all-reduce", 2 * 6)]


def test_no_collective_in_eval_and_none_for_one_replica():
    layer = jaxnorm.nnx.BatchNorm(6, axis_name="batch", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)

    def run(x, eval_mode):
        layer = nnx.merge(graphdef, state, copy=True)
        return layer(x, use_running_average=eval_mode), layer.mean[...]

    evaluated = jax.pmap(lambda x: run(x, True), axis_name="batch").lower(replicas(X)).compile()
    assert collectives(evaluated) == []
    alone = jax.pmap(lambda x: run(x, False), axis_name="batch", devices=jax.devices()[:1]).lower(X[None]).compile()
    assert collectives(alone) == []


def test_global_view_needs_no_more_collectives_than_flax():
    sharding = NamedSharding(mesh(), P("batch"))
    x = jax.device_put(jnp.asarray(X, jnp.float32), sharding)

    def count(layer):
        variables = layer.init(jax.random.key(0), X)

        def loss(params, x):
            y, updated = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (y * jnp.cos(x)).sum(), (y, updated)

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        forward = jax.jit(lambda x: loss(variables["params"], x)[1], out_shardings=(sharding, None))
        compiled = forward.lower(x).compile(), gradients.lower(variables["params"], x).compile()
        return [len(collectives(c)) for c in compiled]

    ours = count(jaxnorm.linen.BatchNorm(use_running_average=False))
    flax = count(linen.BatchNorm(use_running_average=False))
    assert all(a <= b for a, b in zip(ours, flax, strict=True)), (ours, flax)


@pytest.mark.parametrize(
    ("groups", "message"),
    [([[0, 1], [2, 3]], "exactly one group"), ([[0, 1, 2], [3, 4, 5, 6, 7]], "all groups of one size")],
)
def test_groups_that_are_no_partition_are_an_error(groups, message):
    with pytest.raises(ValueError, match=message):
        jax.pmap(named(groups), axis_name="batch")(replicas(X), replicas(DY))


def test_groups_that_do_not_divide_the_batch_are_an_error():
    with pytest.raises(ValueError, match="names 3 replicas, which do not divide the batch of 16"):
        jaxnorm.batch_norm(X, axis_index_groups=[[0], [1], [2]])
