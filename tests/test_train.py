"""One step, the same numbers in every way to be parallel, and PyTorch's."""

import copy
import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jaxnorm
from jaxnorm import Ema, LossScale, Mean, TrainState, data_parallel, pad_batch, replicate, train_step, unreplicate

WAYS = {
    "jit": ("jit", None, {}, False),
    "pmap": ("pmap", "batch", {}, True),
    "shard_map": ("shard_map", "batch", {}, False),
    "shard_map, replicated": ("shard_map", "batch", {}, True),
    "shard_map, check_vma=False": ("shard_map", "batch", {"check_vma": False}, True),
}


class Net(nnx.Module):
    def __init__(self, axis_name=None, dropout=0.0, dtype=jnp.float64):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 6, param_dtype=dtype, rngs=rngs)
        self.bn = jaxnorm.nnx.BatchNorm(
            6, axis_name=axis_name, momentum=0.9, param_dtype=dtype, count_batches=True, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout, rngs=nnx.Rngs(5))
        self.last = nnx.Linear(6, 3, param_dtype=dtype, rngs=rngs)
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))  # neither parameter nor statistics

    def __call__(self, x, mask=None):
        self.seen[...] += 1
        return self.last(self.dropout(jax.nn.relu(self.bn(self.first(x), mask=mask))))


class LinenNet(flax.linen.Module):
    axis_name: str | None = None
    dropout: float = 0.0

    @flax.linen.compact
    def __call__(self, x, mask=None):
        x = flax.linen.Dense(6, param_dtype=jnp.float64)(x)
        x = jaxnorm.linen.BatchNorm(
            use_running_average=False, axis_name=self.axis_name, momentum=0.9, param_dtype=jnp.float64
        )(x, mask=mask)
        x = flax.linen.Dropout(self.dropout, deterministic=False)(jax.nn.relu(x))
        return flax.linen.Dense(3, param_dtype=jnp.float64)(x)


def make(kind, axis_name=None, dropout=0.0):
    if kind == "nnx":
        return Net(axis_name, dropout)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = LinenNet().init(keys, jnp.zeros((2, 4)))
    return LinenNet(axis_name, dropout), jax.tree.map(lambda x: x.astype(jnp.float64), variables)


def batches(n, size=32):
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(size, 4)), "y": rng.integers(0, 3, size)} for _ in range(n)]


def loss_fn(model, batch):
    logits = model(batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def masked_loss_fn(model, batch):
    logits = model(batch["x"], mask=batch["mask"][:, None])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return Mean.of(losses, batch["mask"]), {"accuracy": Mean.of(logits.argmax(-1) == batch["y"], batch["mask"])}


def run(model, way, data, loss=loss_fn, ema=None, tx=None, **options):
    how, _, more, replicated = WAYS[way]
    state = TrainState.create(model, tx or optax.sgd(0.1, momentum=0.9), ema=ema, rng=jax.random.key(3))
    step = data_parallel(train_step(loss, **options), how=how, **more)
    state = replicate(state) if replicated else state
    for batch in data:
        state, metrics = step(state, batch)
    return unreplicate(state) if replicated else state, metrics


def arrays(state, metrics=()):
    return jax.tree.map(
        np.asarray, [state.params, state.batch_stats, state.variables, state.opt_state, state.ema_state, metrics]
    )


def assert_close(a, b, rtol=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-13), a, b)


@functools.cache
def on_one_view(kind):
    """Accumulation, clipping, EMA; uneven true counts, with a replica that has no true example at all."""
    data = batches(3)
    for i, batch in enumerate(data):
        batch["mask"] = np.random.default_rng(i).random(32) < 0.7
        batch["mask"][8:12] = False
    options = {"ema": Ema(0.9), "clip_norm": 0.5, "accumulate": 2, "loss": masked_loss_fn}
    return data, options, arrays(*run(make(kind), "jit", data, **options))


@pytest.mark.parametrize("kind, way", [(k, w) for k in ("nnx", "linen") for w in WAYS if w != "jit"][:6])
def test_the_same_numbers_in_every_way(kind, way):
    data, options, expected = on_one_view(kind)
    assert_close(expected, arrays(*run(make(kind, WAYS[way][1]), way, data, **options)))


def torch_net(net):
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
    ).double()
    values = [net.first.kernel[...].T, net.first.bias[...], None, None, net.last.kernel[...].T, net.last.bias[...]]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            if value is not None:
                parameter.copy_(torch.tensor(np.asarray(value)))
    return module


def assert_equals_torch(state, module, rtol=1e-9):
    params, stats = state.params, state.batch_stats
    pairs = {
        "0.weight": params["first"]["kernel"].T,
        "0.bias": params["first"]["bias"],
        "1.weight": params["bn"]["scale"],
        "1.bias": params["bn"]["bias"],
        "1.running_mean": stats["bn"]["mean"],
        "1.running_var": stats["bn"]["var"],
        "1.num_batches_tracked": stats["bn"]["num_batches_tracked"],
        "3.weight": params["last"]["kernel"].T,
        "3.bias": params["last"]["bias"],
    }
    for name, expected in module.state_dict().items():
        np.testing.assert_allclose(pairs[name], expected, rtol=rtol, atol=1e-12, err_msg=name)


def torch_step(module, optimizer, parts, clip_norm=None):
    """The loop of PyTorch's users: gradients accumulate over the parts, weighted by their share."""
    optimizer.zero_grad()
    total = sum(len(y) for _, y in parts)
    for x, y in parts:
        loss = torch.nn.functional.cross_entropy(module(torch.tensor(x)), torch.tensor(y), reduction="sum")
        (loss / total).backward()
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_equals_pytorch_with_accumulation_and_clipping(accumulate):
    net, data = Net(), batches(5)
    module = torch_net(net)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for batch in data:  # microbatch i is examples i, i + k, ...
        torch_step(module, optimizer, [(batch["x"][i::accumulate], batch["y"][i::accumulate]) for i in range(accumulate)], 0.3)  # fmt: skip  # noqa: E501
    state, metrics = run(net, "jit", data, accumulate=accumulate, clip_norm=0.3)
    assert_equals_torch(state, module)
    assert float(metrics["grad_norm"]) > 0.3
    assert int(state.variables["seen"]) == 5 * accumulate


def test_statistics_of_the_whole_accumulated_batch():
    whole = arrays(*run(Net(), "jit", batches(3)))
    together = arrays(*run(Net(), "jit", batches(3), accumulate=4, statistics="batch"))
    assert_close(whole, together)


@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_a_padded_last_batch_is_the_unpadded_one_in_pytorch(way):
    net, batch = Net(WAYS[way][1]), batches(1, 21)[0]
    module = torch_net(net)
    torch_step(module, torch.optim.SGD(module.parameters(), 0.1, momentum=0.9), [(batch["x"], batch["y"])])
    padded = pad_batch(batch, 32)
    padded["x"][21:], padded["y"][21:] = 1e3, 2  # whatever stands there
    state, _ = run(net, way, [padded], masked_loss_fn)
    assert_equals_torch(state, module)


def test_frozen_parameters_and_other_variables_are_carried():
    class Frozen(nnx.Variable):
        pass

    net = Net()
    net.first.kernel = Frozen(net.first.kernel[...])
    state, _ = run(net, "jit", batches(2), ema=Ema(0.5))
    np.testing.assert_array_equal(state.variables["first"]["kernel"], net.first.kernel[...])
    assert "kernel" not in state.params["first"]
    assert isinstance(state.model().first.kernel, Frozen)
    assert int(state.model().seen[...]) == int(state.ema_model().seen[...]) == 2


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_randomness_differs_by_replica_and_step_and_starts_anew_from_the_state(kind):
    def loss_fn(model, batch):
        logits = model(batch["x"])
        return jnp.mean(logits**2), {"logits": jnp.mean(logits)}

    x = {"x": np.tile(np.random.default_rng(0).normal(size=(4, 4)), (8, 1))}  # all replicas see the same
    step = train_step(loss_fn, axis_name="batch")

    def mean_logits(state, x):  # of each replica, before the reduction
        model = state.definition.build(
            jaxnorm._models.Collections(state.params, state.batch_stats, state.variables, state.streams),
            jaxnorm.train._step_key(state, "batch"),
        )
        return jnp.mean(model(x))

    state = TrainState.create(make(kind, "batch", dropout=0.5), optax.sgd(0.0), rng=jax.random.key(3))
    seen = []
    for state_at in (state, state.replace(step=state.step + 1)):
        each = jax.pmap(mean_logits, axis_name="batch")(replicate(state_at), x["x"].reshape(8, 4, 4))
        assert len(set(np.asarray(each).tolist())) == 8
        seen.append(each)
    assert not np.isclose(seen[0], seen[1]).any()

    run_step = data_parallel(step, how="pmap")
    state = replicate(state)
    first, _ = run_step(state, x)
    _, expected = run_step(first, x)
    _, again = run_step(replicate(unreplicate(first)), x)
    assert float(expected["logits"]) == float(again["logits"])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.streams, first.streams))


def test_without_rng_an_nnx_model_draws_from_its_own_seed():
    def loss(seed):
        net = Net()
        net.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))
        state = TrainState.create(net, optax.sgd(0.1))
        return float(data_parallel(train_step(loss_fn), how="jit")(state, batches(1)[0])[1]["loss"])

    assert loss(1) == loss(1) != loss(2)


def test_bfloat16_compute_keeps_parameters_and_statistics():
    seen = {}

    def loss_fn(model, batch):
        seen["x"], seen["kernel"] = batch["x"].dtype, model.first.kernel.dtype
        logits = model(batch["x"])
        return jnp.mean(logits**2), {}

    state, metrics = run(Net(dtype=jnp.float32), "jit", batches(2), loss_fn, compute_dtype=jnp.bfloat16)
    assert seen == {"x": jnp.bfloat16, "kernel": jnp.bfloat16}
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state[0].trace))} == {jnp.dtype("float32")}
    assert state.batch_stats["bn"]["mean"].dtype == jnp.float32
    assert metrics["loss"].dtype == jnp.float32
    exact, _ = run(Net(dtype=jnp.float32), "jit", batches(2), loss_fn)
    difference = optax.tree.norm(optax.tree.sub(exact.params, state.params)) / optax.tree.norm(exact.params)
    assert 0 < float(difference) < 0.01


def test_loss_scaling_changes_no_number_and_overflow_skips_the_step():
    net, data = Net(), batches(3)
    expected, _ = run(net, "jit", data)
    single = TrainState.create(net, optax.sgd(0.1, momentum=0.9), rng=jax.random.key(3), loss_scale=LossScale.dynamic())
    step = data_parallel(train_step(loss_fn), how="jit")
    for batch in data:
        single, metrics = step(single, batch)
        assert float(metrics["loss_scale"]) == 2.0**16
        assert float(metrics["skipped"]) == 0
    assert_close(arrays(expected)[:2], arrays(single)[:2])

    overflowing = {**data[0], "x": np.where(np.arange(32)[:, None] == 3, np.inf, data[0]["x"])}
    skipped, metrics = step(single, overflowing)
    assert float(metrics["skipped"]) == 1
    assert float(skipped.loss_scale.scale) == 2.0**15
    assert int(skipped.step) == int(single.step) + 1
    jax.tree.map(np.testing.assert_array_equal, arrays(single), arrays(skipped))


def test_the_scale_moves_as_in_pytorch():
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], 0.0)
    ours = LossScale.dynamic(8.0)
    for finite in [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1]:
        theirs.scale(parameter.sum() * (1.0 if finite else float("inf"))).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours = ours.update(jnp.asarray(bool(finite)), interval=3)
        assert float(ours.scale) == theirs.get_scale()


def test_float16_trains_where_unscaled_gradients_vanish():
    def loss_fn(model, batch):
        logits = model(batch["x"])
        return jnp.mean((logits * jnp.float16(1e-4)) ** 2).astype(jnp.float32) * 1e-3, {}

    def kernel_change(loss_scale):
        net = Net(dtype=jnp.float32)
        state = TrainState.create(net, optax.sgd(1.0), loss_scale=loss_scale)
        after, _ = data_parallel(train_step(loss_fn, compute_dtype=jnp.float16), how="jit")(state, batches(1)[0])
        return float(optax.tree.norm(optax.tree.sub(after.params["last"], state.params["last"])))

    assert kernel_change(None) == 0
    assert kernel_change(LossScale.dynamic()) > 0


@pytest.mark.parametrize("way, placement", [("jit", "cpu"), ("pmap", "pinned_host"), ("shard_map", "sharded")])
def test_an_average_kept_elsewhere_is_the_same(way, placement):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    data, options, expected = on_one_view("nnx")
    options = {**options, "ema": Ema(0.9, device=sharded if placement == "sharded" else placement)}
    state, _ = run(Net(WAYS[way][1]), way, data, **options)
    assert_close(expected, arrays(state, expected[-1]))
    np.testing.assert_array_equal(state.ema_model().bn.mean[...], state.ema_state.average["batch_stats"]["bn"]["mean"])


def test_loss_and_metrics_take_one_reduction():
    state = TrainState.create(Net(), optax.sgd(0.1))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    spec = jax.sharding.PartitionSpec
    step = jax.shard_map(
        train_step(loss_fn, axis_name="batch"),
        mesh=mesh,
        in_specs=(spec(), spec("batch")),
        out_specs=spec(),
        check_vma=False,
    )
    lines = str(jax.make_jaxpr(step)(state, batches(1)[0])).splitlines()
    assert sum("= psum" in line for line in lines) == len(jax.tree.leaves(state.params)) + 1


def test_the_state_is_a_tree_that_compiles_once():
    traces = []

    def counted(model, batch):
        traces.append(1)
        return loss_fn(model, batch)

    step = data_parallel(train_step(counted), how="jit")
    state = TrainState.create(Net(), optax.sgd(0.1), ema=Ema(0.9))
    for batch in batches(3):
        state, _ = step(state, batch)
    assert len(traces) == 1
    restored = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(jax.device_get(state)))
    step(jax.device_put(restored), batches(1)[0])
    assert len(traces) == 1


def test_donation_overwrites_the_state():
    step = data_parallel(train_step(loss_fn), how="shard_map", donate=True)
    net = Net("batch")
    state = TrainState.create(copy.deepcopy(net), optax.sgd(0.1, momentum=0.9), ema=Ema(0.9))
    expected, _ = data_parallel(train_step(loss_fn), how="shard_map")(state, batches(1)[0])
    got, _ = step(state, batches(1)[0])
    assert_close(arrays(expected), arrays(got), 1e-15)
    got, _ = step(got, batches(1)[0])


def test_errors_say_what_to_do():
    batch, tx = batches(1)[0], optax.sgd(0.1)
    plain, synced = TrainState.create(Net(), tx), TrainState.create(Net("batch"), tx)
    ways = {how: data_parallel(train_step(loss_fn), how=how) for how in ("pmap", "shard_map", "jit")}
    with pytest.raises(ValueError, match=r'how="jit" has none.*revert_sync_batchnorm'):
        ways["jit"](synced, batch)
    with pytest.raises(ValueError, match=r"unreplicate\(state\) first"):
        ways["jit"](replicate(plain), batch)
    with pytest.raises(ValueError, match=r"replicate\(state\) first"):
        ways["pmap"](plain, batch)
    with pytest.raises(ValueError, match=r"would differ, in: bn\. Synchronise"):
        ways["shard_map"](plain, batch)
    with pytest.raises(ValueError, match=r"over 8 replicas; entry \['x'\] has shape \(30, 4\)\. pad_batch"):
        ways["jit"](plain, {"x": batch["x"][:30], "y": batch["y"][:30]})
    with pytest.raises(ValueError, match="accumulate=3 does not divide the 4 examples"):
        data_parallel(train_step(loss_fn, accumulate=3), how="shard_map")(synced, batch)
    with pytest.raises(ValueError, match=r"'loss' is a scalar.*got shape \(32, 3\)"):
        data_parallel(train_step(lambda m, b: (m(b["x"]), {})), how="jit")(plain, batch)
    with pytest.raises(ValueError, match="cannot be padded to 8"):
        pad_batch(batch, 8)
    with pytest.raises(TypeError, match=r"an nnx\.Module or Linen's"):
        TrainState.create(lambda x: x, tx)
    with pytest.raises(ValueError, match="how is"):
        data_parallel(train_step(loss_fn), how="vmap")
