"""Two sums in one pass: the same sums whatever the axes, and what one pass saves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

import jaxnorm
from interop.program.versions import release
from jaxnorm import hlo
from jaxnorm.sums import two_sums


@examples(40)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 7, 12, 16, 48]), min_size=1, max_size=4), st.data())
def test_they_are_the_sums_over_any_axes(shape, data):
    axes = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(shape)))))))
    a, b = np.random.default_rng(0).standard_normal((2, *shape))
    for found, given_ in zip(two_sums(jnp.asarray(a), jnp.asarray(b), axes), (a, b), strict=True):
        np.testing.assert_allclose(found, given_.sum(axes, keepdims=True), rtol=1e-12, atol=1e-12)


def test_outside_jit_a_second_call_compiles_nothing(caplog):
    x = jnp.ones((16, 5, 5, 3))
    step = jax.value_and_grad(lambda x: jaxnorm.batch_norm(x)[0].sum())
    step(x)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        step(x)
    assert not [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]


def test_an_infinite_value_stays_in_its_own_sum():
    a, b = np.ones((2, 64, 3))
    a[5, 1], b[6, 2] = np.inf, np.nan
    found = two_sums(jnp.asarray(a), jnp.asarray(b), (0,))
    np.testing.assert_array_equal(found[0][0], [64, np.inf, 64])
    np.testing.assert_array_equal(found[1][0], [64, 64, np.nan])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_only_a_cpu_takes_them_in_steps(platform):
    def lowered(platform):
        x = jax.ShapeDtypeStruct((64, 8), jnp.float32)
        return jax.export.export(jax.jit(lambda x: two_sums(x, x * x, (0,))), platforms=[platform])(x).mlir_module()

    of_pairs = r"stablehlo.reduce\(.* init: .*\), \(.* init: "
    assert re.search(of_pairs, lowered("cpu"))
    assert not re.search(of_pairs, lowered(platform))


@pytest.mark.skipif(release(jax.__version__) < (0, 10, 2), reason="older compilers join other passes of both layers")
@pytest.mark.parametrize("mode", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(16, 28, 28, 32), (1, 40, 40, 16), (6, 15, 15, 32)])
def test_a_layer_moves_fewer_bytes_than_flax_s(shape, dtype, mode):
    x = jnp.ones(shape, dtype)

    def accessed(layer):
        variables = layer.init(jax.random.key(0), x)

        def forward(x):
            return layer.apply(variables, x, mutable=["batch_stats"])

        def both(x, dy):
            y, vjp, updated = jax.vjp(forward, x, has_aux=True)
            return y, vjp(dy), updated

        function, inputs = (forward, [x]) if mode == "forward" else (both, [x, x])
        text = jax.jit(function).lower(*inputs).compile().as_text()
        return sum(map(sum, hlo.operations(text).values())) / x.nbytes

    ours, flax = (kind(use_running_average=False, dtype=dtype) for kind in (jaxnorm.linen.BatchNorm, linen.BatchNorm))
    assert accessed(ours) < 0.9 * accessed(flax)
