"""Evaluation counts every example once: over devices, uneven batches, averages; and its metrics are scikit-learn's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from page_reader import programs
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

import interop
import jaxnorm
from jaxnorm import evaluation

WAYS = ("pmap", "shard_map", "jit")
CLASSES = 5


class Net(nnx.Module):
    def __init__(self, axis_name=None):
        draw = np.random.default_rng(0).normal
        self.first = nnx.Param(jnp.asarray(draw(size=(4, 6))))
        self.bn = jaxnorm.nnx.BatchNorm(6, axis_name=axis_name, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.bn.mean[...], self.bn.var[...] = jnp.asarray(draw(size=6)), jnp.asarray(draw(size=6)) ** 2 + 1
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.last = nnx.Param(jnp.asarray(draw(size=(6, CLASSES))))

    def __call__(self, x):
        return self.drop(jnp.tanh(self.bn(x @ self.first[...]))) @ self.last[...]


def data(count, seed=1):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(count, 4)), "y": rng.integers(0, CLASSES, count)}


def cut(batch, *sizes):
    ends = np.cumsum(sizes)
    assert ends[-1] == len(batch["y"])
    return [{name: x[end - n : end] for name, x in batch.items()} for n, end in zip(sizes, ends, strict=True)]


def metrics_fn(model, batch):
    logits = model(batch["x"])
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]),
        "top1": jaxnorm.in_top_k(logits, batch["y"]),
        "top3": jaxnorm.in_top_k(logits, batch["y"], 3),
        "probabilities": jax.nn.softmax(logits),
        "pixels": jaxnorm.Mean.of(jnp.abs(batch["x"]), batch["mask"]),
        "confusion": jaxnorm.Confusion.of(logits, batch["y"]),
    }


def expected_of(model, batch):
    """The whole data set at once, by NumPy and scikit-learn."""
    h = batch["x"] @ model.first[...]
    h = (h - model.bn.mean[...]) / np.sqrt(model.bn.var[...] + 1e-5) * model.bn.scale[...] + model.bn.bias[...]
    logits = np.tanh(h) @ model.last[...]
    logits = np.asarray(logits)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = range(CLASSES)
    return {
        "loss": -np.log(probabilities[np.arange(len(logits)), batch["y"]]).mean(),
        "top1": (logits.argmax(1) == batch["y"]).mean(),
        "top3": top_k_accuracy_score(batch["y"], logits, k=3, labels=labels),
        "probabilities": probabilities.mean(0),
        "pixels": np.abs(batch["x"]).mean(),
        "confusion": confusion_matrix(batch["y"], logits.argmax(1), labels=labels),
        "examples": len(logits),
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-13, err_msg=name)
    assert found["confusion"].dtype == np.int64


@pytest.mark.parametrize("how", WAYS)
def test_every_example_counts_once_however_the_batches_divide(how):
    """53 examples in batches of 24, 24 and 5, on eight devices; the model is in train mode and left as it was."""
    axis = None if how == "jit" else "batch"
    state = jaxnorm.TrainState.create(Net(axis), optax.sgd(0.1))
    before = jax.tree.map(np.asarray, (state.params, state.batch_stats, state.variables))
    step = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn), how=how)
    batch = data(53)
    expected = expected_of(Net(), batch)
    assert_equal(jaxnorm.evaluate(step, state, cut(batch, 24, 24, 5)), expected)
    assert_equal(jaxnorm.evaluate(step, state, iter(cut(batch, 3, 40, 10)), progress=True), expected)
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.batch_stats, state.variables))
    assert_equal(jaxnorm.evaluate(step, jaxnorm.replicate(state), cut(batch, 24, 29)), expected)


def test_one_device_is_enough():
    batch = data(11)
    state = jaxnorm.TrainState.create(Net(), optax.sgd(0.1))
    assert_equal(jaxnorm.evaluate(jaxnorm.eval_step(metrics_fn), state, cut(batch, 7, 4)), expected_of(Net(), batch))


def test_the_average_is_evaluated_by_itself():
    state = jaxnorm.TrainState.create(Net(), optax.sgd(0.5), ema=jaxnorm.Ema(0.9))
    train = jaxnorm.data_parallel(jaxnorm.train_step(lambda m, b: (jnp.square(m(b["x"])).mean(), {})), how="jit")
    for _ in range(3):
        state, _ = train(state, data(16))
    step = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn))
    batch = data(20, seed=3)
    found = jaxnorm.evaluate(step, state.averaged(), cut(batch, 16, 4))
    assert_equal(found, expected_of(state.ema_model(), batch))
    assert found["loss"] != jaxnorm.evaluate(step, state, cut(batch, 16, 4))["loss"]
    with pytest.raises(ValueError, match="has no EMA"):
        jaxnorm.TrainState.create(Net(), optax.sgd(0.5)).averaged()


def test_statistics_of_each_replica_are_refused_by_layer():
    state = jaxnorm.replicate(jaxnorm.TrainState.create(Net(), optax.sgd(0.5)))
    train = jaxnorm.data_parallel(jaxnorm.train_step(lambda m, b: (jnp.square(m(b["x"])).mean(), {})), how="pmap")
    state, _ = train(state, data(32))
    step = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn), how="pmap")
    with pytest.raises(ValueError, match="bn") as error:
        jaxnorm.evaluate(step, state, [data(8)])
    assert "which of the replicas' statistics count" in "".join(error.value.__notes__)
    merged = jaxnorm.unreplicate(state, merge=True)
    assert_equal(jaxnorm.evaluate(step, merged, [data(8)]), expected_of(merged.model(), data(8)))


def test_an_imported_model_is_pytorchs():
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(), torch.nn.Linear(6, 5)
    )
    module = module.double().train()
    state = jaxnorm.TrainState.create(interop.from_torch(module, torch.zeros(2, 4).double()), optax.sgd(0.1))
    batch = data(13)
    found = jaxnorm.evaluate(jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn)), state, cut(batch, 8, 5))
    logits = module.eval()(torch.tensor(batch["x"]))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["y"]))
    np.testing.assert_allclose(found["loss"], loss.detach(), rtol=1e-12)
    assert found["top1"] == (logits.argmax(1).numpy() == batch["y"]).mean()


def test_a_linen_model_is_evaluated():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dense(CLASSES)(jaxnorm.linen.BatchNorm(use_running_average=not train)(x))

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)), train=True)
    state = jaxnorm.TrainState.create((model, variables), optax.sgd(0.1))
    step = jaxnorm.eval_step(lambda m, batch: {"loss": m(batch["x"], train=False).sum(1)})
    found = jaxnorm.evaluate(jaxnorm.data_parallel(step), state, cut(data(9), 8, 1))
    np.testing.assert_allclose(
        found["loss"], model.apply(variables, jnp.asarray(data(9)["x"]), train=False).sum(1).mean(), rtol=1e-6
    )


def test_true_examples_that_a_batch_marks_are_those_that_count():
    batch = data(12) | {"mask": np.arange(12) % 3 > 0}
    state = jaxnorm.TrainState.create(Net(), optax.sgd(0.1))
    step = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn))
    true = {name: x[batch["mask"]] for name, x in data(12).items()}
    assert_equal(jaxnorm.evaluate(step, state, [batch]), expected_of(Net(), true))


def test_what_stands_in_padding_counts_nowhere():
    def bad_where_padded(model, batch):
        return {"a": jnp.where(batch["mask"], model(batch["x"])[:, 0], jnp.nan)}

    state = jaxnorm.TrainState.create(Net(), optax.sgd(0.1))
    step = jaxnorm.data_parallel(jaxnorm.eval_step(bad_where_padded))
    assert np.isfinite(jaxnorm.evaluate(step, state, [data(3)])["a"])


def test_counts_are_integers_beyond_what_float32_tells_apart():
    """2^24 + 1 is no float32; totals over batches are added in 64 bits."""
    sums = {}
    for _ in range(3):
        totals = {"top1": jaxnorm.Mean(jnp.asarray(2**24 + 1, jnp.int32), jnp.asarray(2**30, jnp.int32))}
        evaluation._add(sums, totals)
    assert sums["top1"].total == 3 * (2**24 + 1) and sums["top1"].count == 3 * 2**30
    assert sums["top1"].total.dtype == np.int64


@pytest.mark.parametrize(
    "metrics, message",
    [
        (lambda m, b: {"loss": m(b["x"]).mean()}, "the metric 'loss' is one value an example"),
        (lambda m, b: {"loss": m(b["x"]).sum(0)}, "the metric 'loss' is one value an example"),
        (lambda m, b: m(b["x"]).mean(), "metrics_fn gives a mapping"),
        (lambda m, b: {"examples": b["y"]}, "give your metric another name"),
        (lambda m, b: {"a": jaxnorm.in_top_k(m(b["x"]), jax.nn.one_hot(b["y"], CLASSES))}, "one-hot labels"),
        (lambda m, b: {"a": jaxnorm.in_top_k(m(b["x"]), b["y"], 6)}, "k is 6, of 5 classes"),
        (lambda m, b: {"a": jaxnorm.Confusion.of(m(b["x"])[:, :2], b["y"])}, "labels are outside of the matrix's 2"),
    ],
)
def test_metrics_that_are_none_are_refused(metrics, message):
    state = jaxnorm.TrainState.create(Net(), optax.sgd(0.1))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        jaxnorm.evaluate(jaxnorm.eval_step(metrics), state, [data(8)])


def test_what_cannot_be_evaluated_is_refused():
    state = jaxnorm.TrainState.create(Net(), optax.sgd(0.1))
    step = jaxnorm.data_parallel(jaxnorm.eval_step(metrics_fn))
    with pytest.raises(ValueError, match="there is no example"):
        jaxnorm.evaluate(step, state, [])
    with pytest.raises(TypeError, match="eval_step"):
        jaxnorm.evaluate(jaxnorm.data_parallel(jaxnorm.train_step(lambda m, b: (0.0, {}))), state, [data(8)])
    with pytest.raises(ValueError, match="split over 8 replicas"):
        step(state, data(7))


def test_ranks_are_those_of_top_k():
    """Ties by the lower class, as jax.lax.top_k; no number has no rank."""
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.integers(0, 4, (200, 7)), float), rng.integers(0, 7, 200)
    for k in (1, 2, 7):
        expected = (jax.lax.top_k(logits, k)[1] == labels[:, None]).any(1)
        np.testing.assert_array_equal(jaxnorm.in_top_k(logits, jnp.asarray(labels), k), expected)
    assert not jaxnorm.in_top_k(jnp.full((1, 3), jnp.nan), jnp.zeros(1, int), 3)[0]
    assert not jaxnorm.in_top_k(jnp.ones((1, 3)), jnp.asarray([3]), 3)[0]


def test_the_page_about_training_evaluates():
    """The program of docs/training.md, "Evaluation", on the digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    model = nnx.Linear(64, 10, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1), ema=jaxnorm.Ema(0.9))
    loader = [{"image": images[i : i + 500], "label": labels[i : i + 500]} for i in range(0, 1797, 500)]
    names = {"jaxnorm": jaxnorm, "optax": optax, "state": state, "loader": loader}
    (program,) = programs("docs/training.md", "evaluation")
    program.run(names)
    logits = np.asarray(model(jnp.asarray(images)))
    assert names["results"]["examples"] == 1797
    assert names["results"]["top5"] == top_k_accuracy_score(labels, logits, k=5)
    np.testing.assert_array_equal(names["results"]["confusion"], confusion_matrix(labels, logits.argmax(1)))
    assert names["averaged"]["loss"] == names["results"]["loss"]
