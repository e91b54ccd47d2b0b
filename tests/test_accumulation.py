"""Several microbatches, one update: PyTorch's numbers, in one call of the step or in one for each microbatch."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from page_reader import programs
from torch.optim.swa_utils import AveragedModel

import interop
import jaxnorm
from jaxnorm import Ema, TrainState, data_parallel, replicate, train_step, unreplicate

CALLS, K, SIZE = 7, 3, 16  # the last update has one of its microbatches yet
RATES = np.array([0.3, 0.2, 0.1, 0.05])  # of each update


def net():
    first = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU())
    second = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU())
    return torch.nn.Sequential(first, second, torch.nn.Linear(5, 3)).double()


def imported(module, axis_name=None):
    model = interop.from_torch(copy.deepcopy(module), torch.zeros(2, 4, dtype=module[2].weight.dtype))
    model.train()
    return model if axis_name is None else jaxnorm.convert_sync_batchnorm(model, axis_name=axis_name)


def batches(n, size=SIZE):
    rng = np.random.default_rng(0)
    return [{"image": rng.normal(size=(size, 4)), "label": rng.integers(0, 3, size)} for _ in range(n)]


def loss_fn(model, batch):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}


def multi_steps(k, tx):
    return optax.MultiSteps(tx, k, accumulator_dtype=jnp.float64)


def torch_loop(module, microbatches, k, clip=0.4):
    """The loop of PyTorch's users: scheduler, average and clipping at each update. Gives module, average, norms."""
    optimizer = torch.optim.SGD(module.parameters(), 1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: RATES[min(n, 3)])
    average, norms = AveragedModel(module, use_buffers=True), []
    for i, batch in enumerate(microbatches):
        logits = module(torch.tensor(batch["image"]))
        (torch.nn.functional.cross_entropy(logits, torch.tensor(batch["label"])) / k).backward()
        if i % k == k - 1:
            norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            average.update_parameters(module)
    return average, norms


def clip_to(largest):
    """`torch.nn.utils.clip_grad_norm_`: by norm + 1e-6, where optax divides by the norm."""

    def update(grads, state, params=None):
        return optax.tree.scale(jnp.minimum(1, largest / (optax.tree.norm(grads) + 1e-6)), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def sgd():
    return optax.sgd(lambda n: jnp.asarray(RATES)[jnp.minimum(n, 3)], momentum=0.9)


def assert_equal(model, module, rtol=1e-10):
    ours, theirs = interop.state_dict(model), module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=rtol, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("how", ["jit", "pmap", "shard_map"])
def test_microbatches_in_calls_of_their_own_are_pytorchs_loop(how):
    """BatchNorm at each microbatch, over all devices; schedule, average, clipping and momentum at each update."""
    module, axis = net(), None if how == "jit" else "batch"
    tx = multi_steps(K, optax.chain(clip_to(0.4), sgd()))
    state = TrainState.create(imported(module, axis), tx, ema=Ema.averaged_model(use_buffers=True))
    step = data_parallel(train_step(loss_fn), how)
    state = replicate(state) if how == "pmap" else state
    for batch in batches(CALLS):
        state, _ = step(state, batch)
    state = unreplicate(state) if how == "pmap" else state
    average, norms = torch_loop(module, batches(CALLS), K)
    assert min(norms) > 0.4
    assert_equal(state.model(), module)
    assert_equal(state.ema_model(), average.module)
    assert int(state.ema_state.count) == int(average.n_averaged) == CALLS // K
    assert int(state.step) == int(module[0][1].num_batches_tracked) == CALLS


def test_one_call_of_k_microbatches_is_k_calls():
    module, whole = net(), batches(2, K * SIZE)
    once = TrainState.create(imported(module), sgd(), ema=Ema(0.9))
    step = jax.jit(train_step(loss_fn, accumulate=K))
    for batch in whole:
        once, _ = step(once, batch)
    often = TrainState.create(imported(module), multi_steps(K, sgd()), ema=Ema(0.9))
    step = jax.jit(train_step(loss_fn))
    for batch in whole:
        for i in range(K):
            often, _ = step(often, jax.tree.map(lambda x: x[i::K], batch))  # noqa: B023
    for method in (TrainState.model, TrainState.ema_model):
        a, b = interop.state_dict(method(once)), interop.state_dict(method(often))
        for name, expected in a.items():
            np.testing.assert_allclose(b[name], expected, rtol=1e-11, atol=1e-13, err_msg=name)
    assert int(once.ema_state.count) == int(often.ema_state.count) == 2


def test_a_checkpoint_between_two_microbatches_goes_on_with_the_same_bits(tmp_path):
    start = TrainState.create(imported(net()), multi_steps(K, sgd()), ema=Ema(0.9))
    step, data = jax.jit(train_step(loss_fn)), batches(6)
    whole = start
    for taken, batch in enumerate(data):
        if taken == 4:
            with jaxnorm.Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(4, whole)
        whole, _ = step(whole, batch)
    with jaxnorm.Checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore(start).state
    for batch in data[4:]:
        again, _ = step(again, batch)
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves((s.params, s.opt_state, s.ema_state)) for s in (whole, again)))  # fmt: skip  # noqa: E501


def test_clipping_microbatches_each_is_refused():
    state = TrainState.create(imported(net()), optax.chain(multi_steps(K, sgd()).gradient_transformation()))
    with pytest.raises(ValueError, match=r"clip_norm .* each microbatch.*optax\.MultiSteps.*clip_by_global_norm"):
        train_step(loss_fn, clip_norm=1.0)(state, batches(1)[0])


def test_layers_that_are_not_synchronised_are_named_with_microbatches_too():
    state = TrainState.create(imported(net()), sgd())
    with pytest.raises(ValueError, match=r"states would differ, in: .*0.*1.*1.*1.*Synchronise the layers"):
        data_parallel(train_step(loss_fn, accumulate=2), "shard_map")(state, batches(1, 32)[0])


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_statistics_of_the_whole_batch_with_blocks_computed_again_are_pytorchs_of_one_batch(how):
    module = net()
    model = imported(module, None if how == "jit" else "batch")
    model.checkpoint("[01]")
    state = TrainState.create(model, sgd(), ema=Ema.averaged_model(use_buffers=True))
    step = data_parallel(train_step(loss_fn, accumulate=2, statistics="batch", clip_norm=0.4), how)
    for batch in batches(3):
        state, _ = step(state, batch)
    average, _ = torch_loop(module, batches(3), 1)
    assert_equal(state.model(), module)
    assert_equal(state.ema_model(), average.module)
    assert int(module[0][1].num_batches_tracked) == 3


def test_the_page_about_training_accumulates():
    """The programs of docs/training.md, "Accumulation": one after the other, of the same examples."""
    module = net().float()
    whole = {k: v.astype(np.float32) if k == "image" else v for k, v in batches(1, 64)[0].items()}
    model = imported(module, "batch")
    names = {"jaxnorm": jaxnorm, "optax": optax, "model": model, "loss_fn": loss_fn, "rates": sgd_rates}
    names |= {"loader": [whole], "small_loader": [{k: v[i::4] for k, v in whole.items()} for i in range(4)]}
    optimizer = torch.optim.SGD(module.parameters(), RATES[0], momentum=0.9)
    for i in range(4):
        logits = module(torch.tensor(whole["image"][i::4]))
        (torch.nn.functional.cross_entropy(logits, torch.tensor(whole["label"][i::4])) / 4).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    *two, virtual = programs("docs/training.md", "accumulation")
    for block in two:
        block.run(names)
        assert_equal_in_float32(names["state"].model(), module)
    virtual.run(names)
    assert int(names["state"].model()[0][1].num_batches_tracked[...]) == 1


def sgd_rates(n):
    return jnp.asarray(RATES, jnp.float32)[jnp.minimum(n, 3)]


def assert_equal_in_float32(model, module):
    for name, expected in module.state_dict().items():
        np.testing.assert_allclose(interop.state_dict(model)[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
