"""The EMA is timm's, torchvision's and PyTorch's, wherever it is kept and however it is run."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from timm.utils.model_ema import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from jaxnorm import Ema, TrainState


def _torch_model(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)).to(dtype)


def _tree(model):
    """Parameters and buffers apart, as Linen variables are."""
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    return {"params": params, "batch_stats": {name: jnp.asarray(b.numpy()) for name, b in model.named_buffers()}}


def _flat(tree):
    return {name: np.asarray(x) for part in tree.values() for name, x in part.items()}


def _change(model, generator):
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point():
                x += torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
            else:
                x += 3


def _largest_difference(expected, average):
    got = _flat(average)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].dtype == x.numpy().dtype, name
    return max(np.abs(got[name] - x.numpy()).max() for name, x in expected.items())


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.99},
        {"decay": 0.99, "update_after_step": 100},
        {"decay": 0.999, "use_warmup": True},
        {"decay": 0.98, "use_warmup": True, "warmup_gamma": 7.0, "warmup_power": 0.75, "update_after_step": 10},
        {"decay": 0.9, "use_warmup": True, "min_decay": 0.5},
        {"decay": 0.3},  # the other branch of torch.lerp
        {"decay": 0.99, "exclude_buffers": True},
    ],
    ids=str,
)
def test_equals_timm_model_ema_v3_over_1000_steps(options):
    model = _torch_model()
    theirs, ours = ModelEmaV3(model, **options), Ema(**options)
    state = ours.init(_tree(model))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 1001):
        _change(model, generator)
        theirs.update(model, step)
        state = ours.update(_tree(model), state, step)
        assert float(ours.get_decay(step)) == pytest.approx(theirs.get_decay(step), abs=1e-15)
        if step in (1, 2, 3, 11, 12, 101, 102, 1000):
            assert _largest_difference(theirs.module.state_dict(), ours.value(state)) < 1e-12
    assert int(state.count) == 1000
    if not options.get("exclude_buffers"):
        before = np.asarray(state.average["batch_stats"]["1.running_mean"])
        assert np.abs(before - model[1].running_mean.numpy()).max() > 1e-3  # statistics are averaged, not copied


def test_without_a_step_the_decay_is_constant_as_in_timm():
    model = _torch_model()
    theirs, ours = ModelEmaV3(model, decay=0.9, use_warmup=True), Ema(0.9, use_warmup=True)
    state = ours.init(_tree(model))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        _change(model, generator)
        theirs.update(model)
        state = ours.update(_tree(model), state)
    assert _largest_difference(theirs.module.state_dict(), state.average) < 1e-12


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_equals_pytorch_averaged_model(decay, use_buffers):
    model = _torch_model()
    avg_fn = None if decay is None else get_ema_avg_fn(decay)
    theirs = AveragedModel(model, avg_fn=avg_fn, use_buffers=use_buffers)
    ours = Ema.averaged_model(decay, use_buffers=use_buffers)
    state = ours.init(_tree(model))
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        _change(model, generator)
        theirs.update_parameters(model)
        state = ours.update(_tree(model), state)
    assert int(state.count) == int(theirs.n_averaged)
    # PyTorch truncates averaged counters; one rounding apart, truncation may differ by one.
    expected = theirs.module.state_dict()
    got = {name: torch.as_tensor(np.array(x)) for name, x in _flat(state.average).items()}
    counter = "1.num_batches_tracked"
    assert abs(int(got[counter]) - int(expected[counter])) <= 1
    got.pop(counter), expected.pop(counter)
    assert max((got[name] - x).abs().max() for name, x in expected.items()) < 1e-12


def test_equals_torchvision_exponential_moving_average():
    """Its class (references/classification/utils.py) is this AveragedModel; the reset is its training loop's."""
    model = _torch_model()
    decay = 0.98
    theirs = AveragedModel(
        model, "cpu", lambda averaged, value, _: decay * averaged + (1 - decay) * value, use_buffers=True
    )
    ours = Ema.torchvision(decay)
    state = ours.init(_tree(model))
    generator = torch.Generator().manual_seed(1)
    for i in range(200):
        _change(model, generator)
        theirs.update_parameters(model)
        state = ours.update(_tree(model), state)
        if i < 50:
            theirs.n_averaged.fill_(0)
            state = state._replace(count=jnp.zeros_like(state.count))
    expected = {k: v for k, v in theirs.module.state_dict().items() if "num_batches" not in k}
    got = _flat(state.average)
    assert max(np.abs(got[name] - x.numpy()).max() for name, x in expected.items()) < 1e-12


def test_multi_avg_fn_of_pytorch_is_the_same_average():
    model = _torch_model()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    ours = Ema.averaged_model(0.95)
    state = ours.init(_tree(model))
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        _change(model, generator)
        theirs.update_parameters(model)
        state = ours.update(_tree(model), state)
    assert _largest_difference(theirs.module.state_dict(), state.average) < 1e-12


def test_a_schedule_gives_the_decay():
    schedule = optax.linear_schedule(0.5, 0.9, 10)
    ema = Ema(schedule, update_after_step=2)
    value = np.arange(12.0)
    state, expected = ema.init({"x": jnp.asarray(0.0)}), 0.0
    for step in range(1, 13):
        since = max(0, step - 3)
        decay = 0.0 if since == 0 else float(schedule(since))
        expected = decay * expected + (1 - decay) * value[step - 1]
        state = ema.update({"x": jnp.asarray(value[step - 1])}, state, step)
        assert float(state.average["x"]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="needs the step"):
        ema.update({"x": jnp.asarray(1.0)}, state)


def test_float32_is_torch_lerp_to_one_unit_in_the_last_place():
    model = _torch_model(torch.float32)
    theirs, ours = ModelEmaV3(model, decay=0.9), Ema(0.9)
    state = ours.init(_tree(model))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 4):
        _change(model, generator)
        before = copy.deepcopy(theirs.module.state_dict())
        state = state._replace(
            average={k: {n: jnp.asarray(before[n].numpy()) for n in v} for k, v in _tree(model).items()}
        )
        theirs.update(model, step)
        state = ours.update(_tree(model), state, step)
        for name, x in theirs.module.state_dict().items():
            got = _flat(state.average)[name]
            # One unit of the larger operand: the product and the sum may be rounded once or twice.
            unit = np.spacing(np.maximum(np.abs(before[name].numpy()), np.abs(x.numpy())).astype(np.float32))
            assert (np.abs(got - x.numpy()) <= 2 * unit).all(), name


def test_a_copy_and_a_constant_are_exact():
    x = {"x": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
    ema = Ema(0.9)
    state = ema.update(x, ema.init(jax.tree.map(jnp.zeros_like, x)), 1)  # the first step copies
    for step in range(2, 50):
        state = ema.update(x, state, step)
    np.testing.assert_array_equal(state.average["x"], x["x"])


def test_bfloat16_parameters_with_a_float32_average():
    values = jnp.linspace(0.5, 1, 64, dtype=jnp.bfloat16)
    ema = Ema(0.999, dtype=jnp.float32)
    state = ema.init({"x": values, "n": jnp.asarray(1)})
    state = state._replace(average={**state.average, "x": jnp.zeros(64, jnp.float32)})
    for _ in range(100):
        state = ema.update({"x": values, "n": jnp.asarray(2)}, state)
    assert state.average["x"].dtype == jnp.float32
    assert state.average["n"] == 2
    np.testing.assert_allclose(state.average["x"], (1 - 0.999**100) * np.asarray(values, np.float32), rtol=1e-4)


def test_a_bfloat16_average_takes_small_updates_in_expectation():
    values = jnp.ones(20_000, jnp.bfloat16)
    ema = Ema(0.999)
    state = ema.init({"x": jnp.zeros_like(values)})
    for _ in range(400):
        state = ema.update({"x": values}, state)
    assert state.average["x"].dtype == jnp.bfloat16
    assert float(jnp.mean(state.average["x"].astype(float))) == pytest.approx(1 - 0.999**400, abs=2e-3)


@pytest.mark.parametrize("decay", [None, 0.3, 0.9])
def test_complex_parameters_are_averaged_as_by_pytorch(decay):
    values = np.random.default_rng(0).normal(size=(5, 3, 2)) @ [1, 1j]
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.tensor(values[0]))})
    theirs = AveragedModel(module, avg_fn=None if decay is None else get_ema_avg_fn(decay))
    ours = Ema.averaged_model(decay, use_buffers=True)  # this tree tells no buffers apart
    state = ours.init({"w": jnp.asarray(values[0])})
    for value in values:
        module["w"].data.copy_(torch.tensor(value))
        theirs.update_parameters(module)
        state = ours.update({"w": jnp.asarray(value)}, state)
    assert state.average["w"].dtype == complex
    np.testing.assert_allclose(state.average["w"], theirs.module["w"].detach(), rtol=1e-14)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_entries_of_another_shape_are_refused_by_name(device):
    ema = Ema(0.5, device=device)
    state = ema.init({"w": jnp.zeros(3), "n": jnp.zeros(2, int)})
    with pytest.raises(ValueError, match=r"\['n'\] has shape \(1,\), its average \(2,\); \['w'\] has shape \(1,\)"):
        ema.update({"w": jnp.ones(1), "n": jnp.ones(1, int)}, state, 5)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8_is_refused_as_float16_is(dtype):
    with pytest.raises(ValueError, match=r"dtype=jnp\.float32.*\['w'\] \(float8"):
        Ema(0.99).init({"w": jnp.ones(2, dtype), "n": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"\['n'\] \(float8"):
        Ema(0.99, dtype=dtype).init({"n": jnp.ones(2)})
    state = Ema(0.9, dtype=jnp.float32).init({"w": jnp.ones(2, dtype)})
    state = Ema(0.9, dtype=jnp.float32).update({"w": jnp.zeros(2, dtype)}, state)
    np.testing.assert_allclose(state.average["w"], 0.9, rtol=1e-6)


def test_float16_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"dtype=jnp\.float32.*\['w'\]"):
        Ema(0.99).init({"w": jnp.ones(2, jnp.float16), "n": jnp.ones(2)})
    Ema(0.99, dtype=jnp.float32).init({"w": jnp.ones(2, jnp.float16)})


def test_nnx_modules_are_trees_too():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ema = Ema(0.9, exclude_buffers=True)
    state = ema.init(model)
    model.scale[...], model.mean[...] = jnp.full(3, 2.0, jnp.float32), jnp.full(3, 5.0, jnp.float32)
    state = ema.update(model, state)
    np.testing.assert_allclose(state.average.scale[...], 1.1, rtol=1e-6)
    np.testing.assert_array_equal(state.average.mean[...], 5)
    with pytest.raises(ValueError, match="Give exclude_buffers a function"):
        ema.init({"a": jnp.ones(2)}), ema.update({"a": jnp.ones(2)}, ema.init({"a": jnp.ones(2)}))


def test_another_tree_is_refused():
    ema = Ema(0.9)
    state = ema.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="not the one this average was made for"):
        ema.update({"b": jnp.ones(2)}, state)


@pytest.mark.parametrize(
    "option", [{"decay": 1.1}, {"min_decay": -1.0}, {"device": "gpu0"}, {"dtype": jnp.int32}], ids=str
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Ema(**{"decay": 0.9, **option})


def _placements():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    return {
        "cpu": "cpu",
        "pinned_host": "pinned_host",
        "device": jax.devices()[3],
        "sharded": NamedSharding(mesh, PartitionSpec("batch")),
    }


@pytest.mark.parametrize("placement", ["cpu", "pinned_host", "device", "sharded"])
def test_placement_changes_no_number(placement):
    rng = np.random.default_rng(0)
    trees = [
        {"w": jnp.asarray(rng.normal(size=(3, 16))), "b": jnp.asarray(rng.normal(size=5)), "n": jnp.asarray(i)}
        for i in range(5)
    ]
    here, there = Ema(0.9, use_warmup=True), Ema(0.9, use_warmup=True, device=_placements()[placement])
    a, b = here.init(trees[0]), there.init(trees[0])
    for step, tree in enumerate(trees, 1):
        a, b = here.update(tree, a, step), there.update(tree, b, jnp.asarray(step))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a.average), jax.device_get(b.average))
    sharding = b.average["w"].sharding
    if placement == "pinned_host":
        assert sharding.memory_kind == "pinned_host"
    if placement == "device":
        assert sharding.device_set == {jax.devices()[3]}
    if placement == "sharded":
        assert {shard.data.shape for shard in b.average["w"].addressable_shards} == {(3, 2)}
        assert b.average["b"].sharding.is_fully_replicated  # 5 does not divide by 8


def test_placed_elsewhere_inside_jit_says_what_to_do():
    ema = Ema(0.9, device="cpu")
    state = ema.init({"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="outside of compiled functions"):
        jax.jit(lambda x, s: ema.update({"x": x}, s))(jnp.ones(2), state)


def test_runs_under_jit_pmap_and_shard_map():
    ema = Ema(0.9)
    x = jnp.arange(16.0).reshape(8, 2)
    expected = np.asarray(0.9 * x + 0.1 * (x + 1))

    def update(x):
        return ema.update({"x": x + 1}, ema.init({"x": x})).average["x"]

    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split = PartitionSpec("batch")
    for run in (
        jax.jit(update),
        jax.pmap(update),
        jax.shard_map(update, mesh=mesh, in_specs=split, out_specs=split),
    ):
        np.testing.assert_allclose(run(x), expected, rtol=1e-15)


def test_a_train_state_swaps_the_average_in_and_out():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    state = TrainState.create(model, optax.sgd(0.1), ema=Ema(0.5))
    state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params)).update_ema()
    state = state.replace(step=state.step + 5).update_ema()
    np.testing.assert_allclose(state.model().scale[...], 2)
    np.testing.assert_allclose(state.ema_model().scale[...], 2)  # step 0 copies
    with pytest.raises(ValueError, match="has no EMA"):
        TrainState.create(model, optax.sgd(0.1)).ema_model()
