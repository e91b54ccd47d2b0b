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
from scaling import Collective, Link, Network

# 10 us to begin, 1 us and 100 bytes/us inside a node of 4, 7 us and 10 bytes/us between nodes.
GPUS = Network("test", 10e-6, Link(1e-6, 100e6), Link(7e-6, 10e6), 4)
TORUS = Network("test", 10e-6, Link(1e-6, 100e6), Link(1e-6, 100e6), 1, axes=3)


@pytest.mark.parametrize(
    "operation, network, replicas, size, algorithm, microseconds",
    [
        # One node: 3 others, whose 200 bytes each come in; 2 doublings.
        (scaling.all_gather, GPUS, 4, 200, "ring", 10 + 3 * 1 + 600 / 100),
        (scaling.all_gather, GPUS, 4, 200, "tree", 10 + 2 * 1 + 600 / 100),
        # Twice around, three quarters of the bytes each time.
        (scaling.all_reduce, GPUS, 4, 200, "ring", 10 + 2 * 3 * 1 + 2 * 150 / 100),
        (scaling.all_reduce, GPUS, 4, 200, "tree", 10 + 2 * 2 * 1 + 2 * 150 / 100),
        # Four nodes: the ring crosses 3 times and makes 12 steps inside; the tree doubles twice in each.
        (scaling.all_gather, GPUS, 16, 200, "ring", 10 + 3 * 7 + 12 * 1 + 15 * 200 / 10),
        (scaling.all_gather, GPUS, 16, 200, "tree", 10 + 2 * 7 + 2 * 1 + 15 * 200 / 10),
        (scaling.all_reduce, GPUS, 16, 200, "ring", 10 + 2 * (3 * 7 + 12 * 1) + 2 * 15 / 16 * 200 / 10),
        (scaling.all_reduce, GPUS, 16, 200, "tree", 10 + 2 * (2 * 7 + 2 * 1) + 2 * 15 / 16 * 200 / 10),
        # 2x2x2 without wraparound: one hop an axis, one link each. 8x4x4: 4 + 2 + 2 hops, two links each.
        (scaling.all_gather, TORUS, 8, 300, "torus", 10 + 3 + 7 * 300 / 300),
        (scaling.all_gather, TORUS, 128, 300, "torus", 10 + 8 + 127 * 300 / 600),
        (scaling.all_reduce, TORUS, 128, 300, "torus", 10 + 2 * 8 + 2 * 127 / 128 * 300 / 600),
        (scaling.all_gather, GPUS, 1, 200, "ring", 0),
        (scaling.all_reduce, TORUS, 1, 200, "torus", 0),
    ],
)
def test_cost_of_one_collective(operation, network, replicas, size, algorithm, microseconds):
    assert operation(network, replicas, size, algorithm) * 1e6 == pytest.approx(microseconds, rel=1e-12)


def test_cost_of_a_step_takes_the_faster_algorithm():
    found = [Collective("all-gather", 200), Collective("all-reduce", 200), Collective("all-reduce", 4)]
    expected = (10 + 2 + 6) + (10 + 4 + 3) + (10 + 4 + 0.06)
    assert scaling.seconds(found, GPUS, 4) * 1e6 == pytest.approx(expected)


def test_largest_group():
    found = [Collective("all-gather", 0)] * 10  # 10 us and a hop's latency each
    costs = {n: scaling.seconds(found, GPUS, n) for n in (2, 4, 8, 16, 32)}
    assert [round(cost * 1e6) for cost in costs.values()] == [110, 120, 190, 260, 330]
    assert scaling.largest_group(found, GPUS, 200e-4) == 8  # 1 % is 200 us
    assert scaling.largest_group(found, GPUS, 110e-4) is None  # under, not at
    assert scaling.largest_group(found, GPUS, 1.0) == 4096
    assert scaling.largest_group(found, GPUS, 260e-5, limit=0.1) == 8


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
    assert [one[:2] for one in scaling.collectives(text, 4)] == [
        ("all-reduce", 2 * channels * 4),
        ("all-reduce", 2 * channels * 4),
    ]


def test_synchronisation_is_what_the_other_step_lacks():
    gather, reduce, shared = Collective("all-gather", 8), Collective("all-reduce", 8), Collective("all-reduce", 100)
    counted = {"synchronised": {"8": [gather, reduce, shared]}, "per replica": {"8": [shared]}}
    assert scaling.synchronisation(counted) == [gather, reduce]
    merged = Collective("all-reduce", 108)  # as XLA does with some of them
    counted = {"synchronised": {"8": [gather, merged]}, "per replica": {"8": [shared]}}
    assert scaling.synchronisation(counted) == [gather, reduce]
    # Two of BatchNorm's in one, which has taken 3 bytes of the gradients' as well.
    parts = [gather, Collective("all-reduce", 19), Collective("all-reduce", 97)]
    counted = {"synchronised": {"8": parts}, "per replica": {"8": [shared]}}
    assert scaling.synchronisation(counted) == [gather, Collective("all-reduce", 16)]


def test_report_and_plot(tmp_path):
    def of_model(layers):
        sizes = [8 * 64] * layers
        gradients = ["all-reduce", 10**6]
        both = [["all-gather", n] for n in sizes] + [["all-reduce", n] for n in sizes]
        return {
            "layers": [layers, 64 * layers],
            "synchronised": {"8": [*both, gradients]},
            "per replica": {"8": [gradients]},
        }

    counted = {"ResNet-50": of_model(53), "YOLOv8n": of_model(57)}
    text = scaling.report(counted, 1000, "jax 0")
    assert "| ResNet-50 | synchronised | 8 | 53 | 27,136 | 54 | 1,027,136 |" in text
    assert "53 BatchNorm layers, 3,392 channels. Synchronisation adds 53 all-gathers (8.0 bytes a channel)" in text
    assert "| ResNet-50 | NVLink, InfiniBand | 32 | 32.0 ms |" in text
    scaling.plot(counted, 1000, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
