"""Arrays that are in no state dict, and functions that neither jnp nor nnx has, in the Flax source of a model."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

import interop
from interop.porting import helpers
from interop.porting.tables import table
from interop.porting.terms import expression, name

pytestmark = pytest.mark.once
sizes = st.integers(1, 12)


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def last(x):
    return jnp.asarray(x.movedim(1, -1).numpy())


@pytest.mark.parametrize(
    "weights, reference",
    [
        (helpers.bicubic, lambda x, size: F.interpolate(x, size, mode="bicubic")),
        (helpers.edge_to_edge, lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=True)),
        (helpers.windows, F.adaptive_avg_pool2d),
    ],
)
@settings(max_examples=25, deadline=None)
@given(old=st.tuples(sizes, sizes), new=st.tuples(sizes, sizes))
def test_resampled(weights, reference, old, new):
    x = image(2, 3, *old)
    with jax.enable_x64(True):
        found = helpers.resampled(last(x), new, weights)
        np.testing.assert_allclose(np.moveaxis(found, -1, 1), reference(x, new).numpy(), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(5, 9), st.integers(5, 9)), kernel=st.tuples(*[st.integers(1, 3)] * 2),
       stride=st.tuples(*[st.integers(1, 3)] * 2), padding=st.tuples(*[st.integers(0, 1)] * 2),
       dilation=st.tuples(*[st.integers(1, 2)] * 2))  # fmt: skip
def test_unfolded(size, kernel, stride, padding, dilation):
    x = image(2, 3, *size)
    with jax.enable_x64(True):
        found = helpers.unfolded(last(x), kernel, stride, padding, dilation)
        np.testing.assert_array_equal(found, F.unfold(x, kernel, dilation, padding, stride).mT.numpy())


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(4, 9), st.integers(4, 9)), kernel=st.tuples(*[st.integers(1, 3)] * 2),
       stride=st.tuples(*[st.integers(1, 3)] * 2), padding=st.tuples(*[st.integers(0, 1)] * 2))  # fmt: skip
def test_folded(size, kernel, stride, padding):
    columns = F.unfold(image(2, 3, *size), kernel, padding=padding, stride=stride)
    with jax.enable_x64(True):
        found = helpers.folded(jnp.asarray(columns.mT.numpy()), size, kernel, stride, padding)
        expected = F.fold(columns, size, kernel, padding=padding, stride=stride)
        np.testing.assert_allclose(np.moveaxis(found, -1, 1), expected.numpy(), rtol=1e-12, atol=1e-12)


def offsets(height, width, stride=1):
    """(rows, columns) from each position to each other one."""
    places = [(i, j) for i in range(height) for j in range(width)]
    firsts = [(i, j) for i, j in places if i % stride == j % stride == 0]
    return np.array([[(a - c, b - d) for c, d in places] for a, b in firsts])


@pytest.mark.parametrize("height, width", [(3, 3), (2, 5)])
def test_relative_positions(height, width):
    """Each offset has a number of its own, those of the next row after those of this one."""
    rows, columns = np.moveaxis(offsets(height, width), -1, 0)
    expected = (rows + height - 1) * (2 * width - 1) + columns + width - 1
    np.testing.assert_array_equal(helpers.relative_positions(height, width), expected)
    with_token = helpers.relative_positions(height, width, True)
    np.testing.assert_array_equal(with_token[1:, 1:], expected)
    count = expected.max() + 1
    assert set(with_token[0, 1:]) == {count} and set(with_token[1:, 0]) == {count + 1} and with_token[0, 0] == count + 2


@pytest.mark.parametrize("height, width, stride", [(3, 4, 1), (4, 6, 2), (5, 5, 2)])
def test_distances(height, width, stride):
    rows, columns = np.abs(np.moveaxis(offsets(height, width, stride), -1, 0))
    np.testing.assert_array_equal(helpers.distances(height, width, stride), rows * width + columns)


@pytest.mark.parametrize("shift", [(1, 1), (2, 1)])
def test_shifted_windows(shift):
    """Positions of a rolled image see one another in a window where they were neighbours before it was rolled."""
    height, width, (h, w) = 9, 6, (3, 3)
    y, x = np.indices((height, width))
    y, x = (np.roll(axis, [-n for n in shift], (0, 1)) for axis in (y, x))
    cut = [axis.reshape(3, h, 2, w).swapaxes(1, 2).reshape(-1, h * w) for axis in (y, x)]
    near = [np.abs(axis[:, :, None] - axis[:, None, :]) < 3 for axis in cut]
    expected = np.where(near[0] & near[1], 0.0, -100.0)
    np.testing.assert_array_equal(helpers.shifted_windows(height, width, (h, w), shift, -100.0), expected)


def source(array):
    found = table(array, name(f"jnp.{array.dtype}"))
    return found and ast.unparse(expression(found, ast.Name))


def value(text):
    return np.asarray(eval(text, {**vars(helpers), "jnp": jnp}))


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(st.sampled_from([np.int32, np.float32]), arrays.array_shapes(max_dims=3, max_side=12)))
def test_a_table_is_the_array_bit_for_bit(array):
    text = source(array)
    assert text is not None and len(text) < 2600 and "\n" not in text
    found = value(text)
    assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array, expected",
    [
        (helpers.relative_positions(7, 7), "relative_positions(7, 7)"),
        (helpers.relative_positions(4, 6, True), "relative_positions(4, 6, True)"),
        (helpers.relative_positions(5, 5).reshape(-1), "relative_positions(5, 5).reshape(-1)"),
        (helpers.distances(7, 7), "distances(7, 7)"),
        (helpers.distances(14, 14, 2), "distances(14, 14, 2)"),
        (helpers.shifted_windows(14, 21, (7, 7), (3, 3), -100.0), "shifted_windows(14, 21, (7, 7), (3, 3), -100.0)"),
        (np.tile(np.float32([[1, 2, 1], [2, 4, 2]]) / 16, (32, 1, 1, 1)), "broadcast_to(jnp.array([[0.0625"),
    ],
)
def test_tables_are_written_as_what_makes_them(array, expected):
    array = array.astype(np.int32 if array.dtype.kind == "i" else np.float32)
    text = source(array)
    assert expected in text and value(text).tobytes() == array.tobytes()


def test_what_is_too_long_to_write_is_none():
    assert table(np.random.default_rng(0).random((40, 40)), name("jnp.float64")) is None


class Bias(nn.Module):
    """A function of an array that another module has."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, places):
        return self.second(torch.relu(self.first(places))).squeeze(-1)


class Parts(nn.Module):
    """Tables in no state dict, a part that is written to, patches out of images and back, resampling, RMSNorm."""

    def __init__(self):
        super().__init__()
        self.bias, self.conv, self.head = Bias(), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.norm, self.batch_norm = nn.RMSNorm(4), nn.BatchNorm2d(4)
        index = torch.from_numpy(helpers.relative_positions(4, 4))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("places", torch.stack([index % 7 - 3.0, (index // 7 - 3.0) ** 2], -1), persistent=False)
        self.table = nn.Parameter(torch.randn(49))

    def forward(self, x):
        x = self.batch_norm(self.conv(x))
        columns = F.unfold(x, 3, padding=1, stride=2)
        x = x + F.fold(columns, x.shape[2:], 3, padding=1, stride=2)
        x = F.interpolate(F.adaptive_avg_pool2d(x, 5), (4, 4), mode="bicubic")
        x = F.interpolate(
            F.interpolate(x, (7, 3), mode="bilinear", antialias=True), (4, 4), mode="bicubic", antialias=True
        )
        tokens = x.flatten(2).transpose(1, 2)
        scores = tokens @ tokens.mT + self.table[self.index] + self.bias(self.places)
        tokens = self.norm(scores.softmax(-1) @ tokens)
        tokens[:, 0] = tokens[:, 1] * 2
        tokens[:, 2:5, :2] = 0.5
        tokens = tokens + F.rms_norm(tokens, (4,))
        return self.head(tokens) + F.one_hot(torch.arange(16) % 3, 3)


def test_a_model_of_all_these():
    torch.manual_seed(0)
    text = interop.flax_source(Parts(), torch.zeros(3, 3, 8, 8), name="parts")  # within 1e-8, or an error
    assert "relative_positions(4, 4)" in text and text.count("def relative_positions(") == 1
    assert "def distances(" not in text  # only the functions that it calls
    assert "self.bias(self.places[...])" in text
    assert re.search(r"\.at\[:, 0\]\.set\(", text)
    names = {"__name__": "ported"}
    exec(text, names)
    assert names["parts"](rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 3))).shape == (2, 16, 3)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("numbers", torch.rand(60, 60), persistent=False)

    def forward(self, x):
        return x @ self.numbers


def test_a_table_without_an_expression_is_named():
    with pytest.raises(interop.PortError, match="numbers, 3600 numbers that are in no state dict"):
        interop.flax_source(Noise(), torch.zeros(2, 60))


def test_flax_own_batch_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.2), nn.ReLU(), nn.BatchNorm2d(4))
    text = interop.flax_source(net, torch.zeros(3, 3, 8, 8), name="net", plain=True)
    assert "jaxnorm" not in text and "partial(nnx.BatchNorm" in text
    assert "running variance takes in the biased variance" in text
    names = {"__name__": "ported"}
    exec(text, names)
    model = names["net"](rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="no place for 2 counters"):
        interop.load_state_dict(model, net.state_dict())
    assert not any("num_batches_tracked" in key for key in interop.state_dict(model))
    model.train()
    x = image(3, 3, 8, 8)
    with torch.no_grad():
        expected = net(x.float()).numpy()
    np.testing.assert_allclose(np.moveaxis(model(last(x.float())), -1, 1), expected, rtol=1e-4, atol=1e-5)
    batch = net[0](x.float()).var((0, 2, 3), correction=0).detach().numpy()
    np.testing.assert_allclose(interop.state_dict(model)["1.running_var"], 0.8 + 0.2 * batch, rtol=1e-5)


def test_flax_own_batch_norm_has_no_cumulative_average():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(interop.PortError, match=r"no momentum=None, which a layer has: leave out plain=True"):
        interop.flax_source(net, torch.zeros(3, 3), plain=True)


class Sequences(nn.Module):
    """Two layers both ways; the last state of one as the first of another; steps first; without biases."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)
        self.gru, self.rnn = nn.GRU(10, 3), nn.RNN(3, 3, nonlinearity="relu", bias=False)
        self.batch_norm = nn.BatchNorm1d(3)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        y, last = self.gru(y.transpose(0, 1))
        y, _ = self.rnn(y, last)
        return self.batch_norm(y[-1]), h.sum(0) + c[0]


def test_recurrent_layers():
    torch.manual_seed(0)
    text = interop.flax_source(Sequences(), torch.zeros(3, 6, 4), name="sequences")  # within 1e-8, or an error
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert classes == ["LSTM", "GRU", "RNN", "Sequences"] and text.count("reverse=True,") == 2
    assert not re.search(r"return \([^()]*\)$", text, re.M)  # tuples as people write them
