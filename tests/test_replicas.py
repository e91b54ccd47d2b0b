"""To many replicas and back: equal copies come back as they were, different ones never by accident."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm
from jaxnorm import Ema, TrainState, data_parallel, replica_divergence, replicate, train_step, unreplicate


class Net(nnx.Module):
    def __init__(self):
        self.block = nnx.List([jaxnorm.nnx.BatchNorm(3, momentum=0.0, param_dtype=jnp.float64, rngs=nnx.Rngs(0))])
        self.out = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.out(self.block[0](x))


def loss_fn(model, batch):
    return jnp.mean(model(batch) ** 2), {}


def trained(ema=None):
    """A state whose running statistics differ between replicas; momentum 0 keeps the last batch's."""
    state = replicate(TrainState.create(Net(), optax.sgd(0.1, momentum=0.9), ema=ema, rng=jax.random.key(0)))
    batch = np.random.default_rng(0).normal(size=(64, 3)) * np.arange(1, 65)[:, None]
    state, _ = data_parallel(train_step(loss_fn), how="pmap")(state, batch)
    return state, batch


def test_there_and_back_is_the_identity():
    state = TrainState.create(Net(), optax.adam(0.1), ema=Ema(0.9), rng=jax.random.key(7))
    there = replicate(state)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(there)} == {8}
    assert replica_divergence(there) == {}
    back = unreplicate(there)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and len(b.sharding.device_set) == 1
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_some_devices_and_plain_variables():
    variables = {"params": {"w": np.arange(3.0)}, "n": np.asarray(3)}
    there = replicate(variables, devices=jax.devices()[2:4], axis_name="data")
    assert there["params"]["w"].shape == (2, 3)
    back = unreplicate(there)
    np.testing.assert_array_equal(back["params"]["w"], variables["params"]["w"])
    with pytest.raises(ValueError, match=r"\['n'\] has no axis of replicas"):
        replica_divergence(variables)


def test_divergence_is_named_by_layer_and_measured():
    state, _ = trained(Ema(0.9))
    divergence = replica_divergence(state)
    assert set(divergence) == {"block.0", "ema_state.average.batch_stats.block.0"}
    mean, var = (np.asarray(state.batch_stats["block"][0][k]) for k in ("mean", "var"))
    assert divergence["block.0"] == pytest.approx(max(np.abs(mean - mean[0]).max(), np.abs(var - var[0]).max()))


def test_the_smallest_difference_counts_and_equal_nans_do_not():
    x = np.ones((8, 3), np.float32)
    x[5, 1] = np.nextafter(np.float32(1), np.float32(2))
    assert list(replica_divergence({"a": {"w": x}})) == ["a"]
    tiny = np.zeros((8, 1), np.float32)
    tiny[3] = np.finfo(np.float32).smallest_subnormal
    assert list(replica_divergence({"a": {"w": tiny}})) == ["a"]
    nan = np.full((8, 2), np.nan)
    assert replica_divergence({"a": {"w": nan}}) == {}
    nan[2] = 1
    assert replica_divergence({"a": {"w": nan}}) == {"a": np.inf}
    assert replica_divergence({"a": {"n": np.arange(8)}}) == {"a": 7.0}


def test_diverged_replicas_are_refused_unless_told():
    state, _ = trained()
    with pytest.raises(ValueError, match=r"(?s)replicas differ.*block\.0: .*merge=True.*rank=0"):
        unreplicate(state)
    with pytest.raises(ValueError, match="replicas differ"):
        state.model()
    for rank in (0, 5):
        one = unreplicate(state, rank=rank)
        np.testing.assert_array_equal(
            one.batch_stats["block"][0]["mean"], np.asarray(state.batch_stats["block"][0]["mean"])[rank]
        )
    with pytest.raises(ValueError, match="rank=8 is not among the 8"):
        unreplicate(state, rank=8)
    with pytest.raises(ValueError, match="not both"):
        unreplicate(state, rank=0, merge=True)


def test_merge_pools_within_and_between():
    """All replicas' examples together; exact where each replica's variance is the biased one."""
    state, batch = trained(Ema(0.0))
    for layer in state.batch_stats["block"].values():  # 8 examples each
        layer["var"] = layer["var"] * 7 / 8
    merged = unreplicate(state, merge=True)
    assert len({leaf.device for leaf in jax.tree.leaves(merged)}) == 1  # so that the merged model runs
    stats = merged.batch_stats["block"][0]
    np.testing.assert_allclose(stats["mean"], batch.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], batch.var(0), rtol=1e-12)
    means_of_variances = np.asarray(state.batch_stats["block"][0]["var"]).mean(0)
    assert (batch.var(0) > 1.01 * means_of_variances).all()  # averaging the variances would lose this
    np.testing.assert_allclose(merged.ema_state.average["batch_stats"]["block"][0]["mean"], batch.mean(0), rtol=1e-12)


def test_merge_refuses_what_has_no_pooled_value():
    state, _ = trained()
    kernel = state.params["out"]["kernel"]
    state.params["out"]["kernel"] = kernel.at[3].add(1.0)
    with pytest.raises(ValueError, match=r"(?s)  out: 1\n.*pools running statistics only"):
        unreplicate(state, merge=True)


def test_linen_variables_as_flax_loops_hold_them():
    module = flax.linen.BatchNorm(use_running_average=False, momentum=0.5)
    variables = replicate(module.init(jax.random.key(0), jnp.ones((4, 2))))
    x = np.random.default_rng(0).normal(size=(8, 4, 2)).astype(np.float32)
    _, updates = jax.pmap(lambda v, x: module.apply(v, x, mutable=["batch_stats"]))(variables, x)
    merged = unreplicate({**variables, **updates}, merge=True)
    np.testing.assert_allclose(merged["batch_stats"]["mean"], 0.5 * x.mean((0, 1)), atol=1e-6)


def test_an_average_kept_on_the_host_stays_there_once():
    state = TrainState.create(Net(), optax.sgd(0.1), ema=Ema(0.9, device="cpu"))
    there = replicate(state)
    assert there.ema_state is state.ema_state
    assert there.ema_state.average["params"]["out"]["kernel"].shape == (3, 2)
    assert unreplicate(there).ema_state is state.ema_state
