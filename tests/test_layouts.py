"""Every kind of layer: Flax computes what PyTorch computes with its weights, and the weights survive both journeys."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from parity_tools import FAST, normal, randomised

import interop
import jaxnorm
from interop.weights.names import named_variables

F64 = {"param_dtype": jnp.float64}
SPATIAL = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def rngs():
    return nnx.Rngs(0)


def channels_last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def explicit(module):
    """PyTorch's padding, spelled out."""
    return [(p, p) for p in module.padding]


def transposed(module):
    """Flax counts padding of a transposed convolution in the dilated input, PyTorch in the output."""
    return [
        (d * (k - 1) - p, d * (k - 1) - p + o)
        for k, p, o, d in zip(module.kernel_size, module.padding, module.output_padding, module.dilation, strict=True)
    ]


def conv(t):
    options = {"padding": explicit(t), "feature_group_count": t.groups, "use_bias": t.bias is not None, **F64}
    options |= {"strides": t.stride, "kernel_dilation": t.dilation}
    return (
        lambda: nnx.Conv(t.in_channels, t.out_channels, t.kernel_size, **options, rngs=rngs()),
        linen.Conv(t.out_channels, t.kernel_size, **options),
    )


def conv_transpose(transpose_kernel):
    def build(t):
        options = {
            "padding": transposed(t),
            "use_bias": t.bias is not None,
            "transpose_kernel": transpose_kernel,
            **F64,
        }
        options |= {"strides": t.stride, "kernel_dilation": t.dilation}
        return (
            lambda: nnx.ConvTranspose(t.in_channels, t.out_channels, t.kernel_size, **options, rngs=rngs()),
            linen.ConvTranspose(t.out_channels, t.kernel_size, **options),
        )

    return build


def dense(t):
    options = {"use_bias": t.bias is not None, **F64}
    return (lambda: nnx.Linear(t.in_features, t.out_features, **options, rngs=rngs())), linen.Dense(
        t.out_features, **options
    )


def embed(t):
    return (
        lambda: nnx.Embed(t.num_embeddings, t.embedding_dim, **F64, rngs=rngs()),
        linen.Embed(t.num_embeddings, t.embedding_dim, **F64),
    )


def batch_norm(t):
    options = {"momentum": 0.9, "count_batches": True, **F64}
    return (
        lambda: jaxnorm.nnx.BatchNorm(t.num_features, use_running_average=True, **options, rngs=rngs()),
        jaxnorm.linen.BatchNorm(use_running_average=True, force_float32_reductions=False, **options),
    )


def flax_batch_norm(t):
    return (lambda: nnx.BatchNorm(t.num_features, rngs=rngs())), linen.BatchNorm(use_running_average=True)


def layer_norm(t):
    return (
        lambda: nnx.LayerNorm(t.normalized_shape[0], epsilon=t.eps, use_fast_variance=False, **F64, rngs=rngs()),
        linen.LayerNorm(epsilon=t.eps, use_fast_variance=False, **F64),
    )


def rms_norm(t):
    return (lambda: nnx.RMSNorm(t.normalized_shape[0], epsilon=t.eps, **F64, rngs=rngs())), linen.RMSNorm(
        epsilon=t.eps, **F64
    )


def group_norm(t):
    options = {"num_groups": t.num_groups, "epsilon": t.eps, "use_fast_variance": False, **F64}
    return (lambda: nnx.GroupNorm(t.num_channels, **options, rngs=rngs())), linen.GroupNorm(**options)


def instance_norm(t):
    options = {"epsilon": t.eps, "use_fast_variance": False, **F64}
    return (lambda: nnx.InstanceNorm(t.num_features, **options, rngs=rngs())), linen.InstanceNorm(**options)


def prelu(t):
    return (lambda: nnx.PReLU(param_dtype=jnp.float64)), linen.PReLU(param_dtype=jnp.float64)


torch.manual_seed(0)
LAYERS = {
    "Linear": (torch.nn.Linear(5, 3), dense, (2, 5)),
    "Linear without bias": (torch.nn.Linear(5, 3, bias=False), dense, (2, 4, 5)),
    "Embedding": (torch.nn.Embedding(7, 4), embed, None),
    "BatchNorm1d": (torch.nn.BatchNorm1d(6), batch_norm, (4, 6)),
    "BatchNorm2d": (torch.nn.BatchNorm2d(6), batch_norm, (4, 6, 3, 2)),
    "LayerNorm": (torch.nn.LayerNorm(6, eps=1e-3), layer_norm, (4, 6)),
    "RMSNorm": (torch.nn.RMSNorm(6, eps=1e-3), rms_norm, (4, 6)),
    "GroupNorm": (torch.nn.GroupNorm(3, 6), group_norm, (4, 6, 3, 2)),
    "InstanceNorm2d": (torch.nn.InstanceNorm2d(6, affine=True), instance_norm, (4, 6, 3, 2)),
    "PReLU": (torch.nn.PReLU(), prelu, (4, 6)),
}
for _axes, _size in SPATIAL.items():
    _conv, _back = getattr(torch.nn, f"Conv{_axes}d"), getattr(torch.nn, f"ConvTranspose{_axes}d")
    _kernel = (3, 2, 4)[:_axes]
    LAYERS |= {
        f"Conv{_axes}d": (_conv(4, 6, _kernel, stride=2, padding=1, dilation=1), conv, (2, 4, *_size)),
        f"Conv{_axes}d, grouped": (_conv(4, 6, _kernel, groups=2, bias=False), conv, (2, 4, *_size)),
        f"Conv{_axes}d, depthwise": (_conv(4, 8, _kernel, groups=4, dilation=1, padding=1), conv, (2, 4, *_size)),
        f"ConvTranspose{_axes}d": (
            _back(4, 4, _kernel, stride=2, padding=1, output_padding=1),
            conv_transpose(False),
            (2, 4, *_size),
        ),
        f"ConvTranspose{_axes}d, transpose_kernel": (
            _back(4, 3, _kernel, stride=2, dilation=1, bias=False),
            conv_transpose(True),
            (2, 4, *_size),
        ),
    }


def perturbed(module):
    """In float64, no array of zeros or ones; statistics that are some."""
    module = randomised(copy.deepcopy(module))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=i))
    for name, buffer in module.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(5)
    return module


def assert_same_arrays(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def assert_flax_survives(target, blank, **options):
    """Flax -> PyTorch -> Flax, bit for bit: the same state dict out of a model that has only been given one."""
    given = interop.state_dict(target, **options)
    loaded = interop.load_state_dict(blank, given, **options)
    variables = (lambda x: jax.tree.leaves(nnx.state(x))) if isinstance(target, nnx.Module) else jax.tree.leaves
    before, after = variables(target), variables(loaded)
    for a, b in zip(before, after, strict=True):
        if hasattr(a, "dtype"):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def abstract(build, *args):
    """A model without values: initial ones take longer to compile than all the rest."""
    return nnx.eval_shape(lambda: build(*args))


def run(model, *inputs):
    """The model's output, compiled: at this size faster than operation by operation."""
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return jax.jit(lambda s, x: nnx.merge(graph, s)(*x), compiler_options=FAST)(state, inputs)
    return jax.jit(lambda v, x: model[0].apply(v, *x), compiler_options=FAST)(model[1], inputs)


def blanked(model):
    model = copy.deepcopy(model)
    for _, variable in named_variables(model):
        variable.set_value(threes(variable.get_value()))
    return model


def threes(like):
    return jnp.asarray(np.full(like.shape, 3, like.dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_pytorchs_computes_with_its_weights(name):
    module, build, shape = LAYERS[name]
    module = perturbed(module).eval()
    x = normal(*shape) if shape else torch.tensor([[1, 6, 0], [3, 3, 2]])
    moved = shape is not None and len(shape) > 2 and not isinstance(module, torch.nn.Linear)
    expected = module(x).detach().numpy()
    inputs = jnp.asarray(channels_last(x) if moved else x.numpy())
    build_nnx, linen_layer = build(module)
    nnx_layer = abstract(build_nnx)
    state_dict = module.state_dict()

    model = interop.load_state_dict(nnx_layer, state_dict)
    variables = jax.eval_shape(linen_layer.init, jax.random.key(0), inputs)
    linen_model = interop.load_state_dict((linen_layer, variables), state_dict, inputs=inputs)
    for y in (run(model, inputs), run(linen_model, inputs)):
        y = np.moveaxis(np.asarray(y), -1, 1) if moved else np.asarray(y)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)

    # Exported to PyTorch, bit for bit, and the other way round.
    assert_same_arrays(interop.state_dict(model), state_dict)
    assert_same_arrays(interop.state_dict(linen_model, inputs=inputs), state_dict)
    assert_flax_survives(nnx_layer, blanked(nnx_layer))
    zeros = jax.tree.map(threes, linen_model[1])
    assert_flax_survives(linen_model, (linen_layer, zeros), inputs=inputs)


def test_flaxs_own_batch_norm_goes_home_strictly_and_leaves_counters_out_with_a_warning():
    module = perturbed(torch.nn.BatchNorm2d(6)).float().eval()
    x = normal(4, 6, 3, 2).float()
    build_nnx, linen_layer = flax_batch_norm(module)
    nnx_layer = build_nnx()
    variables = jax.eval_shape(linen_layer.init, jax.random.key(0), jnp.zeros((4, 3, 2, 6)))
    for target in (nnx_layer, (linen_layer, variables)):
        with pytest.warns(UserWarning, match="no place for 1 counters of batches"):
            model = interop.load_state_dict(target, module.state_dict())
        home = interop.state_dict(model)
        assert list(home) == ["weight", "bias", "running_mean", "running_var"]
        other = torch.nn.BatchNorm2d(6).eval()
        other.load_state_dict({k: torch.tensor(v) for k, v in home.items()}, strict=True)
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


def attend(query, key, value, **_):
    """Flax's default in NNX takes the softmax in float32 (jax.nn.dot_product_attention)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


ATTENTIONS = {
    "self": (torch.nn.MultiheadAttention(6, 2, batch_first=True), (6, 6)),
    "cross": (torch.nn.MultiheadAttention(6, 3, kdim=5, vdim=5, batch_first=True), (6, 5)),
    "without bias": (torch.nn.MultiheadAttention(6, 2, bias=False, batch_first=True), (6, 6)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_computes_what_pytorchs_computes_with_its_weights(name):
    module, widths = ATTENTIONS[name]
    module = perturbed(module).eval()
    q, kv = normal(2, 4, widths[0]), normal(2, 7, widths[1], seed=1)
    expected = module(q, kv, kv)[0].detach().numpy()
    options = {
        "num_heads": module.num_heads,
        "use_bias": module.in_proj_bias is not None,
        "attention_fn": attend,
        **F64,
    }
    q, kv = jnp.asarray(q.numpy()), jnp.asarray(kv.numpy())
    layer = abstract(
        lambda: nnx.MultiHeadAttention(in_features=6, in_kv_features=widths[1], decode=False, **options, rngs=rngs())
    )
    model = interop.load_state_dict(layer, module.state_dict())
    np.testing.assert_allclose(run(model, q, kv), expected, rtol=1e-12, atol=1e-12)
    assert_same_arrays(interop.state_dict(model), module.state_dict())
    assert_flax_survives(model, blanked(model))

    layer = linen.MultiHeadDotProductAttention(**options)
    variables = jax.eval_shape(layer.init, jax.random.key(0), q, kv)
    model = interop.load_state_dict((layer, variables), module.state_dict(), inputs=(q, kv))
    np.testing.assert_allclose(run(model, q, kv), expected, rtol=1e-12, atol=1e-12)
    assert_same_arrays(interop.state_dict(model, inputs=(q, kv)), module.state_dict())
    assert_flax_survives(model, (layer, jax.tree.map(threes, model[1])), inputs=(q, kv))
    assert_same_arrays(interop.state_dict(model[1]), module.state_dict())  # told by names


def test_attention_that_pytorch_does_not_have_is_four_linear_layers():
    layer = nnx.MultiHeadAttention(
        4, 8, num_kv_heads=2, decode=False, kernel_init=jax.nn.initializers.ones, rngs=rngs()
    )
    found = {name: value.shape for name, value in interop.state_dict(layer).items()}
    assert found["query.weight"] == (8, 8) and found["key.weight"] == (4, 8) and found["out.bias"] == (8,)
    assert_flax_survives(layer, blanked(layer))


CELLS = {
    "LSTM": (torch.nn.LSTMCell, [nnx.LSTMCell, nnx.OptimizedLSTMCell, linen.LSTMCell, linen.OptimizedLSTMCell]),
    "GRU": (torch.nn.GRUCell, [nnx.GRUCell, linen.GRUCell]),
    "RNN": (torch.nn.RNNCell, [nnx.SimpleCell, linen.SimpleCell]),
}


@pytest.mark.parametrize(("kind", "cell"), [(k, c) for k, (_, cells) in CELLS.items() for c in cells])
def test_a_recurrent_cell_computes_what_pytorchs_computes_with_its_weights(kind, cell):
    module = perturbed(CELLS[kind][0](5, 4))
    if cell is nnx.GRUCell:
        state = module.state_dict()
        with pytest.raises(ValueError, match="bias_hh of the n gate"):
            interop.load_state_dict(abstract(lambda: cell(5, 4, rngs=rngs())), state)
        with torch.no_grad():
            module.bias_hh[8:] = 0
    x, h, c = normal(3, 5), normal(3, 4, seed=1), normal(3, 4, seed=2)
    carry = (jnp.asarray(c.numpy()), jnp.asarray(h.numpy())) if kind == "LSTM" else jnp.asarray(h.numpy())
    expected = module(x, (h, c)) if kind == "LSTM" else (module(x, h),)
    x = jnp.asarray(x.numpy())
    state = module.state_dict()
    if issubclass(cell, nnx.Module):
        options = {**F64, **({"dtype": jnp.float64} if kind == "RNN" else {})}
        model = interop.load_state_dict(abstract(lambda: cell(5, 4, **options, rngs=rngs())), state)
        options, blank = {}, blanked(model)
    else:
        layer = cell(4, **F64)
        options = {"inputs": (carry, x)}
        model = interop.load_state_dict(
            (layer, jax.eval_shape(layer.init, jax.random.key(0), carry, x)), state, **options
        )
        blank = (layer, jax.tree.map(threes, model[1]))
    found = run(model, carry, x)[0]
    found = found[::-1] if kind == "LSTM" else (found,)
    for y, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-12, atol=1e-12)

    home = interop.state_dict(model, **options)
    for name in ("weight_ih", "weight_hh"):
        assert home[name].tobytes() == state[name].numpy().tobytes()
    gates = np.split(home["bias_ih"] + home["bias_hh"], home["bias_ih"].size // 4)
    sums = np.split((state["bias_ih"] + state["bias_hh"]).numpy(), len(gates))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(gates, sums, strict=True))  # rounded once, nothing more
    other = CELLS[kind][0](5, 4).double()
    other.load_state_dict({k: torch.tensor(v) for k, v in home.items()}, strict=True)
    again = interop.state_dict(interop.load_state_dict(blank, other.state_dict(), **options), **options)
    assert_same_arrays(again, home)
    assert_flax_survives(model, blank, **options)


def test_a_gru_in_linen_keeps_the_two_biases_of_its_n_gate_apart():
    module = perturbed(torch.nn.GRUCell(5, 4))
    layer = linen.GRUCell(4, **F64)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4)), jnp.zeros((1, 5)))
    home = interop.state_dict(interop.load_state_dict(variables, module.state_dict()))
    for name in ("bias_ih", "bias_hh"):
        assert home[name][8:].tobytes() == getattr(module, name)[8:].detach().numpy().tobytes()
    assert not home["bias_hh"][:8].any()


def test_a_bias_of_minus_zero_survives():
    ones = jax.nn.initializers.ones
    cell = nnx.LSTMCell(2, 2, kernel_init=ones, recurrent_kernel_init=ones, rngs=rngs())
    for gate in (cell.hi, cell.hf, cell.hg, cell.ho):
        gate.bias[...] = jnp.asarray([-0.0, 1e-30], "float32")
    assert_flax_survives(cell, blanked(cell))


@pytest.mark.parametrize("hidden", [1, 2])
def test_stacked_pytorch_lstms_load_by_a_rename_that_inverts(hidden):
    module = perturbed(torch.nn.LSTM(3, 4, num_layers=hidden, batch_first=True))
    cells = [abstract(lambda i=i: nnx.OptimizedLSTMCell(4 if i else 3, 4, **F64, rngs=rngs())) for i in range(hidden)]
    model = nnx.Sequential(*(nnx.RNN(cell, rngs=rngs()) for cell in cells))
    rename = [(r"^(\w+_\w+)_l(\d+)$", r"\2.cell.\1")]
    interop.load_state_dict(model, module.state_dict(), rename)
    x = normal(2, 6, 3)
    np.testing.assert_allclose(model(jnp.asarray(x.numpy())), module(x)[0].detach().numpy(), rtol=1e-12, atol=1e-12)
    home = interop.state_dict(model, rename)
    assert set(home) == set(module.state_dict())
    torch.nn.LSTM(3, 4, num_layers=hidden).double().load_state_dict({k: torch.tensor(v) for k, v in home.items()})


def test_a_dense_layer_of_several_axes_is_pytorchs_on_flattened_ones():
    module = perturbed(torch.nn.Linear(6, 20))
    layer = abstract(lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), **F64, rngs=rngs()))
    model = interop.load_state_dict(layer, module.state_dict())
    x = normal(7, 2, 3)
    expected = module(x.flatten(1)).detach().numpy().reshape(7, 4, 5)
    np.testing.assert_allclose(model(jnp.asarray(x.numpy())), expected, rtol=1e-12, atol=1e-12)
    assert_same_arrays(interop.state_dict(model), module.state_dict())
    linen_layer = linen.DenseGeneral((4, 5), axis=(-2, -1), **F64)
    variables = jax.eval_shape(linen_layer.init, jax.random.key(0), jnp.zeros((7, 2, 3)))
    assert_same_arrays(interop.state_dict(interop.load_state_dict(variables, module.state_dict())), module.state_dict())


class Classifier(nnx.Module):
    """Features, a flatten and a Dense layer, as AlexNet and VGG have them."""

    def __init__(self):
        self.features = nnx.Sequential(nnx.Conv(3, 4, (3, 3), padding=1, **F64, rngs=rngs()))
        self.classifier = nnx.List([nnx.Linear(4 * 5 * 6, 7, **F64, rngs=rngs())])

    def __call__(self, x):
        x = self.features(x)
        return self.classifier[0](x.reshape(x.shape[0], -1))


def test_a_dense_layer_after_a_flatten_takes_channels_first_weights_if_told_so():
    module = perturbed(
        torch.nn.ModuleDict(
            {
                "features": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1)),
                "classifier": torch.nn.Sequential(torch.nn.Linear(120, 7)),
            }
        )
    )
    x = normal(2, 3, 5, 6)
    expected = module["classifier"](module["features"](x).flatten(1)).detach().numpy()
    layouts = {r"classifier\.0": interop.layouts.Linear(flattened=(4, 5, 6))}
    model = interop.load_state_dict(abstract(Classifier), module.state_dict(), layouts=layouts)
    np.testing.assert_allclose(run(model, jnp.asarray(channels_last(x))), expected, rtol=1e-12, atol=1e-12)
    assert_same_arrays(interop.state_dict(model, layouts=layouts), module.state_dict())
    with pytest.raises(ValueError, match=r"\(4, 5, 5\) flattened are not the kernel's 120 inputs"):
        interop.state_dict(model, layouts={"classifier.0": interop.layouts.Linear(flattened=(4, 5, 5))})
    with pytest.raises(ValueError, match="'head' is no layer of the model"):
        interop.state_dict(model, layouts={"head": interop.layouts.Linear()})
    with pytest.raises(ValueError, match=r"'classifier.0' has several"):
        interop.state_dict(model, layouts={"classifier.0": interop.layouts.Linear(), ".*0": interop.layouts.Same()})


JITTED = linen.jit(linen.Dense)
LIFTED = {
    "RNN": (lambda: linen.RNN(linen.LSTMCell(4)), {"LSTMCell_0.weight_ih", "LSTMCell_0.weight_hh"}),
    "Bidirectional": (
        lambda: linen.Bidirectional(linen.RNN(linen.LSTMCell(4)), linen.RNN(linen.GRUCell(4))),
        {"LSTMCell_0.weight_ih", "LSTMCell_0.weight_hh", "GRUCell_0.weight_ih", "GRUCell_0.weight_hh"},
    ),
    "remat": (lambda: linen.remat(linen.Dense)(4, name="fc"), {"fc.weight"}),
    "jit": (lambda: linen.Sequential([JITTED(3, name="fc"), JITTED(3, name="again")]), {"fc.weight", "again.weight"}),
    "WeightNorm": (lambda: linen.WeightNorm(linen.Dense(4, name="fc")), {"fc.weight"}),
}


@pytest.mark.parametrize("name", LIFTED)
def test_a_lifted_layer_is_seen_at_its_place_and_not_at_the_root(name):
    lifted, weights = LIFTED[name]

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return lifted()(x @ self.param("kernel", jax.nn.initializers.normal(), (3, 3), jnp.float32))

    x = jnp.ones((2, 5, 3), jnp.float32)
    variables = Model().init(jax.random.key(0), x)
    home = interop.state_dict((Model(), variables), inputs=x)
    assert {entry for entry in home if "weight" in entry} == weights
    np.testing.assert_array_equal(home["kernel"], variables["params"]["kernel"])
    if "fc.weight" in weights:
        dense = next(tree["fc"] for tree in (variables["params"], *variables["params"].values()) if "fc" in tree)
        np.testing.assert_array_equal(home["fc.weight"].T, dense["kernel"])


def test_layers_stacked_by_vmap_are_refused():
    stacked = nnx.vmap(lambda keys: nnx.Linear(2, 3, rngs=nnx.Rngs(keys)))(jax.random.split(jax.random.key(0), 4))
    with pytest.raises(ValueError, match=r"kernel of 2 axes, found shape \(4, 2, 3\)"):
        interop.state_dict(nnx.Dict(stacked=stacked))


def test_a_norm_of_several_axes_has_to_be_told():
    module = perturbed(torch.nn.LayerNorm((4, 5, 6)))
    layer = linen.LayerNorm(1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3), use_fast_variance=False, **F64)
    variables = {"norm": layer.init(jax.random.key(0), jnp.zeros((2, 5, 6, 4)))["params"]}
    state = {f"norm.{k}": v for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match="are the channels last"):
        interop.load_state_dict({"params": variables}, state)
    layouts = {"norm": interop.layouts.Norm(channels_last=True)}
    loaded = interop.load_state_dict({"params": variables}, state, layouts=layouts)
    x = normal(2, 4, 5, 6)
    found = layer.apply({"params": loaded["params"]["norm"]}, channels_last(x))
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), module(x).detach().numpy(), rtol=1e-12, atol=1e-12)
    assert_same_arrays(interop.state_dict(loaded, layouts=layouts), state)
