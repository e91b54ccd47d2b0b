"""The counting and the cost model of benchmarks/scaling.py, against values worked out by hand."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import jaxnorm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import scaling
from scaling import Link, Network

# 10 us to begin, 1 us and 100 bytes/us inside a node of 4, 7 us and 10 bytes/us between nodes.
GPUS = Network("test", 10e-6, Link(1e-6, 100e6), Link(7e-6, 10e6), 4)
TORUS = Network("test", 10e-6, Link(1e-6, 100e6), Link(1e-6, 100e6), 1, axes=3)


@pytest.mark.parametrize(
    "operation, network, replicas, size, algorithm, microseconds",
    [
        # One node: 3 others, whose 200 bytes each come in; 2 doublings.
        # Twice around, three quarters of the bytes each time.
        (scaling.all_reduce, GPUS, 4, 200, "ring", 10 + 2 * 3 * 1 + 2 * 150 / 100),
        (scaling.all_reduce, GPUS, 4, 200, "tree", 10 + 2 * 2 * 1 + 2 * 150 / 100),
        # Four nodes: the ring crosses 3 times and makes 12 steps inside; the tree doubles twice in each.
        (scaling.all_reduce, GPUS, 16, 200, "ring", 10 + 2 * (3 * 7 + 12 * 1) + 2 * 15 / 16 * 200 / 10),
        (scaling.all_reduce, GPUS, 16, 200, "tree", 10 + 2 * (2 * 7 + 2 * 1) + 2 * 15 / 16 * 200 / 10),
        # 2x2x2 without wraparound: one hop an axis, one link each. 8x4x4: 4 + 2 + 2 hops, two links each.
        (scaling.all_reduce, TORUS, 128, 300, "torus", 10 + 2 * 8 + 2 * 127 / 128 * 300 / 600),
        (scaling.all_reduce, TORUS, 1, 200, "torus", 0),
    ],
)
def test_cost_of_one_collective(operation, network, replicas, size, algorithm, microseconds):
    assert operation(network, replicas, size, algorithm) * 1e6 == pytest.approx(microseconds, rel=1e-12)


def test_cost_of_a_step_takes_the_faster_algorithm():
    expected = (10 + 4 + 3) + (10 + 4 + 0.06)
    assert scaling.seconds([200, 4], GPUS, 4) * 1e6 == pytest.approx(expected)


def test_largest_group():
    found = [0] * 10  # 10 us and two latencies of each hop
    costs = {n: scaling.seconds(found, GPUS, n) for n in (2, 4, 8, 16, 32)}
    assert [round(cost * 1e6) for cost in costs.values()] == [120, 140, 280, 420, 560]
    assert scaling.largest_group(found, GPUS, 300e-4) == 8  # 1 % is 300 us
    assert scaling.largest_group(found, GPUS, 119e-4) is None
    assert scaling.largest_group(found, GPUS, 1.0) == 4096
    assert scaling.largest_group(found, GPUS, 419e-5, limit=0.1) == 8


def test_sides_of_a_torus():
    assert [scaling.sides(n, 3) for n in (1, 2, 8, 128, 4096)] == [
        *((1, 1, 1), (2, 1, 1), (2, 2, 2), (8, 4, 4), (16, 16, 16))
    ]
    with pytest.raises(ValueError, match="power of two"):
        scaling.sides(6, 3)


def test_a_layer_sends_what_the_guide_says():
    # One all-reduce of 2C words forward and one backward for each layer, in the compiled step.
    channels = 24
    layer = jaxnorm.nnx.BatchNorm(channels, axis_name="batch", use_running_average=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))

    def loss(x):
        return jnp.sum(nnx.merge(graph, state, copy=True)(x) ** 3)

    step = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch"), check_vma=False
    )
    text = jax.jit(step).lower(jnp.ones((8, 5, channels), jnp.float32)).compile().as_text()
    assert scaling.all_reduces(text, 4) == [2 * channels * 4] * 2


def test_other_collectives_are_refused():
    with pytest.raises(ValueError, match="no all-reduce: all-gather"):
        scaling.all_reduces("%a = f32[8]{0} all-gather(%b)", 2)


def test_synchronisation_is_what_the_other_step_lacks():
    assert scaling.synchronisation({"synchronised": {"8": [8, 12, 100]}, "per replica": {"8": [100]}}) == [8, 12]
    # One merged with the gradients', as XLA does with some of them.
    assert scaling.synchronisation({"synchronised": {"8": [8, 112]}, "per replica": {"8": [100]}}) == [20]
    assert scaling.synchronisation({"synchronised": {"8": [112]}, "per replica": {"8": [100]}}) == [12]
    # Two of BatchNorm's in one, which has taken 3 bytes of the gradients' as well.
    assert scaling.synchronisation({"synchronised": {"8": [19, 97]}, "per replica": {"8": [100]}}) == [16]


def test_report_and_plot(tmp_path):
    def of_model(layers):
        return {
            "layers": [layers, 64 * layers],
            "synchronised": {"8": [8 * 64] * 2 * layers + [10**6]},
            "per replica": {"8": [10**6]},
        }

    counted = {"ResNet-50": of_model(53), "YOLOv8n": of_model(57)}
    text = scaling.report(counted, 1000, "jax 0")
    assert "| ResNet-50 | synchronised | 8 | 107 | 1,054,272 |" in text
    assert "53 BatchNorm layers, 3,392 channels. Synchronisation adds 106 all-reduces (16.0 bytes a channel)" in text
    assert "| ResNet-50 | NVLink, InfiniBand | 32 | 32.0 ms |" in text
    scaling.plot(counted, 1000, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
