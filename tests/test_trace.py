"""Tracing: what becomes of a PyTorch module, and that the module is left as it was."""

import collections
import copy
import dataclasses
import random
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from flax import nnx
from parity_tools import assert_same_step, jax_eval, jax_step, normal, randomised, relative, to_jax, torch_step
from torch.nn.utils import prune

import interop
import jaxnorm
from interop.conventions import torch_momentum
from interop.tracing import private


class Wrapped(torch.nn.Module):
    """A few layers, and a function of them."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def conv_bn(norm=torch.nn.BatchNorm2d, **flags):
    return randomised(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norm(4, **flags), torch.nn.ReLU()))


def snapshot(module):
    flags = [(path, layer.training, getattr(layer, "momentum", None)) for path, layer in module.named_modules()]
    arrays = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    hooks = [len(layer._forward_hooks) for layer in module.modules()]
    names = [sorted(vars(layer)) for layer in module.modules()]
    states = torch.get_rng_state().numpy(), np.random.get_state()[1:3]  # not random's: the types' checker draws from it
    return flags, arrays, hooks, names, states


def assert_untouched(module, before):
    after = snapshot(module)
    assert after[0] == before[0]
    assert after[2:4] == before[2:4]
    assert all((after[1][name] == value).all() for name, value in before[1].items())
    for state, expected in zip(after[4], before[4], strict=True):
        np.testing.assert_equal(state, expected)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_module_is_left_as_it_was(fails, training):
    def function(self, x):
        x = self.net(x)
        random.random(), np.random.rand(), torch.rand(1)
        return x * (2.0 if fails and float(x.sum()) > 0 else 1.0)

    module = Wrapped(function, net=conv_bn(momentum=None)).train(training)
    module.net[1].training = not training
    module.net.register_forward_hook(lambda *_: None)
    before = snapshot(module)
    forwards = private.batch_norm_class().forward, F.batch_norm
    if fails:
        with pytest.raises(interop.TraceError, match="Wrapped in train mode"):
            interop.from_torch(module, normal(2, 3, 8, 8))
    else:
        interop.from_torch(module, normal(2, 3, 8, 8))
    assert_untouched(module, before)
    assert forwards == (private.batch_norm_class().forward, F.batch_norm)


class OwnForward(torch.nn.BatchNorm2d):
    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return y * 2


NORMS = {
    "plain": torch.nn.BatchNorm2d,
    "cumulative": lambda n: torch.nn.BatchNorm2d(n, momentum=None),
    "no affine": lambda n: torch.nn.BatchNorm2d(n, affine=False, eps=1e-3, momentum=0.3),
    "no statistics": lambda n: torch.nn.BatchNorm2d(n, track_running_stats=False),
    "timm with activation": timm.layers.BatchNormAct2d,
    "own forward": OwnForward,
}


@pytest.mark.parametrize("kind", NORMS)
def test_every_kind_of_batch_norm_layer_is_one_node_and_computes_the_same(kind):
    module = randomised(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), NORMS[kind](4), torch.nn.Conv2d(4, 2, 1)))
    if module[1].num_batches_tracked is not None:
        module[1].num_batches_tracked.fill_(3)
    x = normal(4, 3, 8, 8)
    model = interop.from_torch(module.train(), x)
    assert [node.operation for node in model._interop.model.train.nodes].count("jaxnorm.batch_norm.default") == 1
    assert isinstance(getattr(model, "1"), jaxnorm.nnx.BatchNorm)
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)
    module.eval(), model.eval()
    assert relative(jax_eval(model, to_jax(x)), module(x).detach()) < 1e-9


def test_a_module_converted_to_sync_batch_norm_imports_without_a_gpu():
    plain, x = conv_bn().train(), normal(4, 3, 8, 8)
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert_same_step(jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(plain, x), 1e-9)


def test_layers_in_eval_inside_a_training_module_stay_frozen(caplog):
    module = torch.nn.Sequential(conv_bn(), torch.nn.Conv2d(4, 3, 1).double(), torch.nn.BatchNorm2d(3).double()).train()
    module[0].eval()
    x = normal(4, 3, 8, 8)
    model = interop.from_torch(module, x)
    assert "BatchNorm frozen at import: 1 layers" in caplog.text
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)
    model.eval()
    model.train()
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)


def test_a_module_imported_in_eval_mode_trains_after_train():
    module, x = conv_bn(momentum=0.3).eval(), normal(4, 3, 8, 8)
    model = interop.from_torch(module, x)
    assert getattr(model, "1").use_running_average
    model.train()
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module.train(), x), 1e-9)
    assert torch_momentum(getattr(model, "1").momentum) == 0.3


def test_a_shared_layer_counts_each_call():
    norm = torch.nn.BatchNorm2d(3)
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), norm)
    module, x = randomised(torch.nn.Sequential(block, block, norm)).train(), normal(4, 3, 5, 5)
    model = interop.from_torch(module, x)
    found = jax_step(model, to_jax(x))
    assert_same_step(found, torch_step(module, x), 1e-9)
    assert found.state["2.num_batches_tracked"] == 3


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, OwnForward])
def test_beside_a_shared_activation_batch_norm_is_one_node(kind):
    # As in Ultralytics' models. torch.export then calls stand-ins of the layers that are reached as attributes.
    class Block(torch.nn.Module):
        act = torch.nn.ReLU()

        def __init__(self):
            super().__init__()
            self.norm, self.act = kind(3), self.act

        def forward(self, x):
            return self.act(self.norm(x))

    module, x = randomised(torch.nn.Sequential(Block(), Block())).train(), normal(4, 3, 5, 5)
    model = interop.from_torch(module, x)
    assert [node.operation for node in model._interop.model.train.nodes].count("jaxnorm.batch_norm.default") == 2
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)


def test_no_gradient_flows_out_of_no_grad_and_detach():
    def function(self, x):
        x = self.net(x)
        with torch.no_grad():
            scale = x.mean()
        return x * scale + x.detach() ** 2

    module, x = Wrapped(function, net=conv_bn()).train(), normal(4, 3, 8, 8)
    assert_same_step(jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x), 1e-9)


def test_data_is_read_and_written_as_in_pytorch():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.scale = torch.nn.Parameter(torch.ones(3))
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            if self.training:
                self.mean.data.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)).data)
            y = (x - self.mean[:, None, None]) * self.weight[:, None, None]
            return y * (self.scale.data[:, None, None] + y.data.mean())

    module, x = Norm().double().train(), normal(4, 3, 5, 5)
    found = jax_step(interop.from_torch(module, x), to_jax(x))
    assert not found.grads.pop("scale").any()
    assert_same_step(found, torch_step(module, x), 1e-9)


@pytest.mark.parametrize("counts", [False, True])
def test_a_layer_with_a_forward_of_its_own_counts_as_that_forward_does(counts):
    class Own(torch.nn.BatchNorm2d):
        def forward(self, x):
            if counts and self.training:
                self.num_batches_tracked.add_(1)
            return torch.nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )

    module, x = randomised(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Own(4))).train(), normal(4, 3, 5, 5)
    found = jax_step(interop.from_torch(module, x), to_jax(x))
    assert_same_step(found, torch_step(module, x), 1e-9)
    assert found.state["1.num_batches_tracked"] == int(counts)


def test_functional_batch_norm_and_buffers_that_change():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(4, 3, 3, 3))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            flat = F.batch_norm(self.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
            if self.training:
                self.calls += 1
            x = F.conv2d(x, flat.reshape_as(self.weight))
            return F.batch_norm(x, self.mean, self.var, training=self.training)

    module, x = Module().double().train(), normal(4, 3, 8, 8)
    model = interop.from_torch(module, x)
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)


Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    extra: dict


def test_arguments_and_results_keep_their_structure():
    def function(self, x, pair, *, mask=None, flag=True):
        y = self.fc(x) + pair["a"]
        return Result(logits=y, extra={"pair": Pair(y * 2, [y, None, 3]), "mask": mask})

    module = Wrapped(function, fc=torch.nn.Linear(3, 2).double())
    x, pair, mask = normal(4, 3), {"a": normal(4, 2, seed=1)}, normal(4, seed=2)
    model = interop.from_torch(module, x, pair, mask=mask, flag=True)
    found = model(to_jax(x), {"a": to_jax(pair["a"])}, mask=to_jax(mask), flag=True)
    expected = module(x, pair, mask=mask).logits.detach()
    assert relative(found.logits, expected) < 1e-12
    assert relative(found.extra["pair"].left, 2 * expected) < 1e-12
    assert found.extra["pair"].right[1:] == [None, 3]
    assert len(jax.tree.leaves(found)) == 5


def test_calls_that_do_not_fit_are_clear_errors():
    module = Wrapped(lambda self, x, y, flag=True: self.fc(x) + y, fc=torch.nn.Linear(3, 2))
    module.forward = lambda x, y, flag=True: module.fc(x) + y
    model = interop.from_torch(module, torch.zeros(4, 3), torch.zeros(4, 2), flag=True)
    x, y = jnp.zeros((5, 3), jnp.float32), jnp.zeros((5, 2), jnp.float32)
    assert model(x, y=y, flag=True).shape == (5, 2)
    with pytest.raises(TypeError, match="takes these"):
        model(x)
    with pytest.raises(ValueError, match=r"traced with True here, and cannot take False"):
        model(x, y, flag=False)
    with pytest.raises(ValueError, match=r"expected the shape \(\w+, 3\), found \(5, 4\)"):
        model(jnp.zeros((5, 4), jnp.float32), y, flag=True)
    with pytest.raises(ValueError, match="expected the dtype float32, found int32"):
        model(jnp.zeros((5, 3), jnp.int32), y, flag=True)
    with pytest.raises(ValueError, match="is 5 here and 6 in"):
        model(jnp.zeros((6, 3), jnp.float32), y, flag=True)


def test_all_unsupported_operations_are_listed_with_their_layers():
    class First(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    class Second(torch.nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    module = Wrapped(lambda self, x: self.second(self.first(x)), first=First(), second=Second())
    with pytest.raises(NotImplementedError) as error:
        interop.from_torch(module, torch.zeros(4, 3))
    for part in ("bessel_j0", "first (", "airy_ai", "second (", "test_trace.py", "@interop.register"):
        assert part in str(error.value)


def test_randomness_differs_by_call_and_vanishes_in_eval():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()
    model = interop.from_torch(module, torch.zeros(2, 1000))
    x = jnp.ones((2, 1000), jnp.float32)
    step = nnx.jit(lambda model, x: model(x))
    first, second = step(model, x), step(model, x)
    assert (first != second).any()
    assert set(np.unique(first)) == {0.0, 2.0}
    model.eval()
    np.testing.assert_array_equal(step(model, x), x)


def test_replicas_draw_differently():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(50, affine=False), torch.nn.Dropout(0.5)).train()
    model = interop.from_torch(module, torch.zeros(4, 50))
    model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    graph, state = nnx.split(model)
    x = jnp.broadcast_to(normal(4, 50).numpy(), (2, 4, 50))
    first, second = jax.vmap(lambda x: nnx.merge(graph, state, copy=True)(x), axis_name="batch")(x)
    assert ((first == 0) != (second == 0)).any()


def test_one_compilation_serves_equal_models_and_every_step():
    module = conv_bn().float().train()
    first, second = (interop.from_torch(module, torch.zeros(2, 3, 8, 8)) for _ in range(2))
    traces = 0

    @nnx.jit
    def step(model, x):
        nonlocal traces
        traces += 1
        return model(x)

    x = jnp.zeros((2, 3, 8, 8), jnp.float32)
    for model in (first, first, second, nnx.clone(first)):
        step(model, x)
    assert traces == 1


def test_a_plain_network_runs_channels_last_with_one_transpose_in():
    module = torch.nn.Sequential(
        conv_bn().float(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 8, 3),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    model = interop.from_torch(module.train(), torch.zeros(2, 3, 16, 16))
    graph, state = nnx.split(model)
    text = str(
        jax.make_jaxpr(lambda s, x: nnx.merge(graph, s, copy=True)(x))(state, jnp.zeros((2, 3, 16, 16), jnp.float32))
    )
    assert text.count(" transpose[") == 1


def test_parameters_stay_float32_when_computing_in_bfloat16():
    module, x = conv_bn().float().train(), normal(4, 3, 8, 8, dtype=torch.float32)
    model = interop.from_torch(module, x, compute_dtype=jnp.bfloat16)
    y = model(to_jax(x))
    assert y.dtype == jnp.bfloat16
    assert {v.dtype.name for v in interop.state_dict(model).values()} == {"float32", "int64"}
    assert relative(y.astype(jnp.float32), module(x).detach()) < 3e-2


def test_tensors_made_of_sizes_do_not_widen_what_is_computed_in_bfloat16():
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_bn().float()

        def forward(self, x):
            y = self.net(x)
            ramp = torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)
            mask = torch.zeros(y.shape[0], 1, *y.shape[2:], dtype=y.dtype)
            mask[:, :, 1:] = 1
            first = torch.cat([y * ramp, y.new_ones(y.shape[0], 1, *y.shape[2:]), torch.rand_like(y) * 0], 1)
            return first * mask, (y.float().double() * 2).float() + ramp

    module, x = Padded().train(), normal(4, 3, 8, 8, dtype=torch.float32)
    model = interop.from_torch(module, x, compute_dtype=jnp.bfloat16)
    y, wide = model(to_jax(x))
    assert y.dtype == jnp.bfloat16
    assert wide.dtype == jnp.float32
    assert relative(y.astype(jnp.float32), module(x)[0].detach()) < 3e-2


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        # Before BatchNorm a bias has no gradient but its rounding.
        self.conv = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(width)
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, x):
        n = x.shape[0]
        first, second = self.norm(self.conv(x)).relu().chunk(2, 1)
        return x + self.drop(torch.cat([first.tanh(), second.sin()], 1).reshape(n, *x.shape[1:]))


@pytest.mark.parametrize("patterns", [[r"blocks\..*"], ["blocks"], [".*"], ["blocks.1", "blocks.2.norm", "head"]])
def test_layers_computed_again_change_nothing_but_what_is_kept(patterns):
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    blocks = torch.nn.Sequential(*(Block(4) for _ in range(3)))
    module = Wrapped(lambda self, x: self.head(self.blocks(x)), blocks=blocks, head=head)
    module, x = randomised(module).train(), to_jax(normal(4, 4, 6, 6))
    model, plain = (interop.from_torch(module, normal(4, 4, 6, 6)) for _ in range(2))
    model.checkpoint(*patterns)
    assert_same_step(jax_step(model, x), jax_step(plain, x), 1e-12)

    def calls(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda params: nnx.merge(graph, params, rest, copy=True)(x).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
        return str(jaxpr).count(" tanh ")

    assert calls(model) > calls(plain)  # forward, and again in the backward pass
    model.checkpoint()
    assert calls(model) == calls(plain)
    with pytest.raises(ValueError, match=r"'layers'.*'blocks', 'head'"):
        model.checkpoint("blocks", "layers")
    with pytest.raises(ValueError, match=r"'\*\.norm' is no regular expression"):
        model.checkpoint("*.norm")


def test_images_of_any_size_where_asked():
    module = torch.nn.Sequential(conv_bn().float(), torch.nn.AdaptiveAvgPool2d(1)).eval()
    model = interop.from_torch(module, torch.zeros(2, 3, 16, 16), dynamic_dims=(0, 2, 3))
    x = normal(3, 3, 20, 13, dtype=torch.float32)
    assert relative(model(to_jax(x)), module(x).detach()) < 1e-6


def test_one_example_is_enough_to_trace():
    model = interop.from_torch(torch.nn.Linear(3, 2), torch.zeros(1, 3))
    assert model(jnp.zeros((7, 3), jnp.float32)).shape == (7, 2)


def test_a_lazy_layer_and_a_thing_that_is_no_module_are_errors():
    with pytest.raises(ValueError, match=r"lazy layers.*weight"):
        interop.from_torch(torch.nn.LazyLinear(3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        interop.from_torch(copy.copy, torch.zeros(2, 3))


class OwnArithmetic(torch.nn.BatchNorm2d):
    """Normalises, tracks and counts without F.batch_norm."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * mean)
                self.running_var.mul_(0.9).add_(0.1 * var)
                self.num_batches_tracked += 1
        x = (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def test_a_batch_norm_layer_whose_arithmetic_is_its_own_counts(caplog):
    module = conv_bn(OwnArithmetic).train()
    before = snapshot(module)
    x = normal(4, 3, 6, 6)
    with caplog.at_level("WARNING", "interop"):
        model = interop.from_torch(module, x)
    assert "convert_sync_batchnorm has no effect on 1" in caplog.text
    assert_untouched(module, before)
    step = jax_step(model, to_jax(x))
    assert int(step.state["1.num_batches_tracked"]) == 1
    assert_same_step(step, torch_step(module, x), 1e-10)


def test_what_hooks_keep_in_lists_is_as_it_was():
    module = conv_bn()
    module.seen = [1]
    module[0].register_forward_hook(lambda layer, inputs, output: module.seen.append(output))
    interop.from_torch(module, normal(2, 3, 6, 6))
    assert module.seen == [1]


def test_torchscript_is_refused_by_name():
    module = torch.nn.Sequential(conv_bn(), torch.nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a deprecation
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.ReLU()))
        traced = torch.jit.trace(conv_bn().double().eval(), normal(2, 3, 6, 6))
    module[1] = scripted
    with pytest.raises(interop.TraceError, match=r"TorchScript cannot.*: 1 \(of the class Sequential\)\. Give"):
        interop.from_torch(module, normal(2, 3, 6, 6))
    for root in (scripted, traced):
        with pytest.raises(interop.TraceError, match=r"TorchScript.*: the module \(of the class Sequential\)\. Give"):
            interop.from_torch(root, normal(2, 3, 6, 6))


def test_shapes_that_depend_on_values_are_refused_in_training_and_named_in_eval(caplog):
    chosen = Wrapped(lambda self, x: self.net(x)[x[:, 0] > 0], net=torch.nn.Linear(3, 3))
    with pytest.raises(interop.TraceError, match=r"train mode has shapes that depend on values.*\n.*test_trace\.py"):
        interop.from_torch(chosen, torch.zeros(4, 3))
    net = torch.nn.Linear(3, 3).double()
    after = Wrapped(lambda self, x: self.net(x) if self.training else self.net(x)[x[:, 0] > 0], net=net)
    with caplog.at_level("WARNING", "interop"):
        model = interop.from_torch(after.eval(), normal(4, 3))
    assert "in eval mode has shapes that depend on values" in caplog.text
    x = normal(4, 3, seed=1)
    np.testing.assert_allclose(model(to_jax(x)), after(x).detach(), rtol=1e-12)


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float32), jnp.zeros((2, 3))])
def test_example_inputs_that_are_no_tensors_are_named(array):
    with pytest.raises(interop.TraceError, match=r"example inputs are torch.Tensors.*\[0\]\[0\] is a"):
        interop.from_torch(torch.nn.Linear(3, 3), array)


def test_tensors_without_values_are_named():
    with pytest.raises(interop.TraceError, match="meta device have no values: weight, bias"):
        interop.from_torch(torch.nn.Linear(3, 3, device="meta"), torch.zeros(2, 3))


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*torch.ao")
def test_quantised_layers_are_named():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    quantised = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(interop.TraceError, match=r"objects of PyTorch's C\+\+, .*: 0._packed_params. Import the"):
        interop.from_torch(quantised, torch.zeros(2, 3))


class Unknown:
    def __init__(self, first, second):
        self.first, self.second = first, second


def test_a_result_of_unknown_type_is_named():
    module = Wrapped(lambda self, x: {"pair": Unknown(self.net(x), x)}, net=torch.nn.Linear(3, 3))
    with pytest.raises(interop.TraceError, match=r"train mode\n.*: it returns a \S*Unknown\nResults are"):
        interop.from_torch(module, torch.zeros(2, 3))


def test_control_flow_that_depends_on_values_is_an_error_with_the_modules_line():
    def forward(self, x):
        y = self.net(x)
        return y if torch.isfinite(y).all() else y.clamp(-1, 1)

    with pytest.raises(interop.TraceError, match=r"at tests/test_trace\.py:\d+: return y if torch\.isfinite\(y\)\.all"):
        interop.from_torch(Wrapped(forward, net=torch.nn.Linear(3, 3)), torch.zeros(2, 3))


class CountsItself(torch.nn.BatchNorm2d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        moments = self.running_mean, self.running_var
        return F.batch_norm(x, *moments, self.weight, self.bias, self.training, self.momentum, self.eps)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, CountsItself])
def test_statistics_move_where_nothing_uses_the_output(kind):
    def forward(self, x):
        x = self.norm(self.conv(x))
        self.head(x)
        self.norm(2 * x)
        return 3 * x

    head = torch.nn.Sequential(torch.nn.Conv2d(4, 5, 1), kind(5), torch.nn.ReLU(), kind(5))
    module = randomised(Wrapped(forward, conv=torch.nn.Conv2d(3, 4, 3, bias=False), norm=kind(4), head=head)).train()
    x = normal(2, 3, 6, 6)
    step = jax_step(interop.from_torch(module, x), to_jax(x))
    assert_same_step(step, torch_step(module, x), 1e-12)
    assert step.state["norm.num_batches_tracked"] == 2 and step.state["head.3.num_batches_tracked"] == 1


class Called(torch.nn.BatchNorm1d):
    """Calls F.batch_norm with arguments that are not those of BatchNorm's forward."""

    def __init__(self, *arguments):
        super().__init__(3)
        self.arguments = arguments

    def forward(self, x):
        *moments, training, momentum = self.arguments
        moments = [moment and getattr(self, moment) for moment in moments]
        return F.batch_norm(x, *moments, self.weight, self.bias, training, momentum, self.eps)


def norm_and(function, kind=torch.nn.BatchNorm1d):
    """A linear layer, then `function(self, x)`, which calls the BatchNorm layers `self.bn` and `self.teacher`."""

    def forward(self, x):
        return function(self, self.fc(x))

    layers = dict(fc=torch.nn.Linear(4, 3, bias=False), bn=kind(3), teacher=kind(3))
    return randomised(Wrapped(forward, **layers))


def parametrized(change, function=lambda self, x: self.bn(x)):
    module = norm_and(function)
    change(module.bn)
    return module.double()


def pruned(bn):
    prune.l1_unstructured(bn, "weight", amount=1)
    bn.weight = bn.weight.detach()  # computed by each forward; only leaves can be copied


def weight_of_its_own(self, x):
    self.bn.weight = self.teacher.weight.exp()
    return self.bn(x)


def in_eval_and_back(self, x):
    y = self.bn(x)
    self.bn.eval()
    with torch.no_grad():
        z = self.bn(x * 2 + 1)
    self.bn.train(self.training)
    return y + z


def without_tracking(self, x):
    self.bn.track_running_stats = False
    y = self.bn(x + 1)
    self.bn.track_running_stats = True
    return y + self.bn(x)


def other_flags(self, x):
    self.bn.momentum, self.bn.eps = 0.5, 0.1
    return self.bn(x)


def decayed_before(self, x):
    with torch.no_grad():
        self.bn.running_mean.mul_(0.5).add_(1)
    return self.bn(x)


def read_around(self, x):
    y = self.bn(x - self.bn.running_mean)
    with torch.no_grad():
        moved = self.bn.running_mean * self.bn.running_var
    return y + moved


def a_teacher_that_follows(self, x):
    y = self.bn(x)
    with torch.no_grad():
        for mine, its in zip(self.teacher.buffers(), self.bn.buffers(), strict=True):
            mine.copy_(its)
    return y + self.teacher(x)


def a_function_before(self, x):
    y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=self.training)
    return y + self.bn(x)


def with_other_tensors(self, x):
    tensors = {name: tensor * 1.5 + 0.1 for name, tensor in self.bn.named_parameters()}
    tensors |= {name: self.bn.get_buffer(name) * 1.5 for name in ("running_mean", "running_var")}
    return torch.func.functional_call(self.bn, tensors, (x,))


def unseen(write):
    """`write(bn, values)` without gradients, then the layer."""

    def function(self, x):
        with torch.no_grad():
            write(self.bn, self.teacher.weight * 1.5 + 0.1)
        return self.bn(x)

    return function


def set_data(bn, values):
    bn.bias.data = values


def between_two_calls(self, x):
    y = self.bn(x)
    with torch.no_grad():
        self.bn.weight.view(-1)[1:].mul_(0.5)
    return y + self.bn(2 * x)


def hooked(attach):
    def function(self, x):
        return self.bn(x)

    module = norm_and(function)
    attach(module)(lambda *_: [None, module.bn.weight.data.mul_(0.5)][0])
    return module


def of_one_buffer(module):
    """Weight and bias are views of a buffer, as in fused optimizers."""
    module.register_buffer("flat", torch.rand(6, dtype=torch.float64))
    module.bn.weight.data, module.bn.bias.data = module.flat[:3], module.flat[3:]
    return module


WRITTEN = {
    "weight copied": lambda: norm_and(unseen(lambda bn, values: bn.weight.copy_(values))),
    "weight set": lambda: norm_and(unseen(lambda bn, values: bn.weight.set_(values.clone()))),
    "weight an output": lambda: norm_and(unseen(lambda bn, values: torch.exp(values, out=bn.weight))),
    "bias's data replaced": lambda: norm_and(unseen(set_data)),
    "loaded": lambda: norm_and(unseen(lambda bn, values: bn.load_state_dict({"weight": values}, strict=False))),
    "weight written between": lambda: norm_and(between_two_calls),
    "weight written, own forward": lambda: norm_and(between_two_calls, lambda n: CountsItself1d(n)),
    "in its hook": lambda: hooked(lambda module: module.bn.register_forward_pre_hook),
    "in its sibling's hook": lambda: hooked(lambda module: module.fc.register_forward_hook),
    "in the root's hook": lambda: hooked(lambda module: module.register_forward_pre_hook),
    "of one buffer, unwritten": lambda: of_one_buffer(norm_and(lambda self, x: self.bn(x))),
}

BEYOND_THE_NODE = {
    "frozen by its call": lambda: norm_and(lambda self, x: self.bn(x), lambda _: Called(*MOMENTS, False, 0.0)),
    "training by its call": lambda: norm_and(lambda self, x: self.bn(x), lambda _: Called(*MOMENTS, True, 0.5)),
    "without statistics": lambda: norm_and(lambda self, x: self.bn(x), lambda _: Called(None, None, True, 0.1)),
    "pruned": lambda: parametrized(pruned),
    "parametrized": lambda: parametrized(
        lambda bn: torch.nn.utils.parametrize.register_parametrization(bn, "weight", torch.nn.Softplus())
    ),
    "weight of its own": lambda: parametrized(lambda bn: delattr(bn, "weight"), weight_of_its_own),
    "other tensors": lambda: norm_and(with_other_tensors),
    "in eval and back": lambda: norm_and(in_eval_and_back),
    "without tracking": lambda: norm_and(without_tracking),
    "other flags": lambda: norm_and(other_flags),
    "decayed before": lambda: norm_and(decayed_before),
    "cumulative": lambda: norm_and(in_eval_and_back, lambda n: torch.nn.BatchNorm1d(n, momentum=None)),
    "read around": lambda: norm_and(read_around),
    "read around, own forward": lambda: norm_and(read_around, lambda n: CountsItself1d(n)),
    "a teacher that follows": lambda: norm_and(a_teacher_that_follows),
    "a function before": lambda: norm_and(a_function_before),
}
MOMENTS = "running_mean", "running_var"


class CountsItself1d(CountsItself):
    _check_input_dim = torch.nn.BatchNorm1d._check_input_dim


@pytest.mark.parametrize("case", BEYOND_THE_NODE)
def test_a_batch_norm_layer_that_does_more_than_its_own_forward_computes_the_same(case):
    module, x = BEYOND_THE_NODE[case]().train(), normal(6, 4)
    before = snapshot(module)
    model = interop.from_torch(module, x)
    assert_untouched(module, before)
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)
    module.eval(), model.eval()
    assert relative(jax_eval(model, to_jax(x)), copy.deepcopy(module)(x).detach()) < 1e-9


@pytest.mark.parametrize("case", WRITTEN)
def test_a_batch_norm_layer_reads_what_forward_wrote(case, caplog):
    module = WRITTEN[case]().train()
    before = snapshot(module)
    model = interop.from_torch(module, normal(6, 4))
    assert_untouched(module, before)
    assert ("forward writes to parameters that train (bn." in caplog.text) == ("unwritten" not in case)
    for training in (True, True, False):
        module.train(training), model.train() if training else model.eval()
        x = normal(6, 4, seed=int(training))
        assert relative(model(to_jax(x)), module(x).detach()) < 1e-9
        found = interop.state_dict(model)
        assert all(relative(found[name], value) < 1e-9 for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("hold", "target", "names"),
    [
        (of_one_buffer, lambda self: self.flat, "bn.bias, bn.weight, flat"),
        (lambda m: setattr(m, "alias", m.bn.weight.data), lambda self: self.alias, "alias, bn.weight"),
        (lambda m: setattr(m, "tied", torch.nn.Parameter(m.fc.weight.data)), lambda self: self.tied, "fc.weight"),
        (lambda m: setattr(m, "scale", torch.ones(3).double()), lambda self: self.scale, "the tensor scale, which"),
        (lambda m: setattr(m, "scales", [torch.ones(3).double()]), lambda self: self.scales[0], "neither a parameter"),
    ],
)
def test_what_is_written_beside_the_state_is_refused(hold, target, names):
    def function(self, x):
        with torch.no_grad():
            target(self).mul_(2)
        return self.bn(x) * getattr(self, "scale", getattr(self, "scales", [1])[0])

    module = norm_and(function)
    hold(module)
    with pytest.raises(interop.TraceError, match=names):
        interop.from_torch(module, normal(6, 4))


@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_settings_that_are_tensors_are_refused(name):
    module = conv_bn()
    setattr(module[1], name, torch.tensor(0.1))
    with pytest.raises(
        interop.TraceError, match=rf"settings of BatchNorm layers are numbers: 1\.{name} is a torch\.Tensor"
    ):
        interop.from_torch(module, normal(2, 3, 8, 8))


def test_a_cumulative_average_without_a_counter_does_not_move():
    module, x = norm_and(lambda self, x: self.bn(x)).train(), normal(6, 4)
    module.bn.momentum = module.bn.num_batches_tracked = None
    assert_same_step(jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x), 1e-9)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, OwnForward, timm.layers.BatchNormAct2d])
def test_a_model_that_is_one_batch_norm_layer(kind, tmp_path):
    module, x = randomised(kind(3)).train(), normal(4, 3, 5, 5)
    model = interop.from_torch(module, x)
    assert_same_step(jax_step(model, to_jax(x)), torch_step(module, x), 1e-9)
    interop.save(model, tmp_path)
    module.eval(), model.eval()
    assert relative(jax_eval(model, to_jax(x)), module(x).detach()) < 1e-9
    assert_same_step(jax_step(interop.load(tmp_path), to_jax(x)), torch_step(module.train(), x), 1e-9)


class ScaledByName(torch.nn.BatchNorm2d):
    def __init__(self, n, name):
        super().__init__(n)
        self.register_parameter(name, torch.nn.Parameter(torch.ones(())))
        self.name = name

    def forward(self, x):
        return super().forward(x) * getattr(self, self.name)


@pytest.mark.parametrize("name", ["axis", "scale", "mean"])
def test_a_name_that_a_layer_of_jaxnorm_has_itself_is_refused(name):
    with pytest.raises(ValueError, match=rf"the name '1\.{name}' is taken.*Rename it"):
        interop.from_torch(conv_bn(lambda n: ScaledByName(n, name)), normal(2, 3, 6, 6))


@pytest.mark.parametrize("name", ["set_attributes", "_program", "deterministic"])
def test_a_name_that_the_model_has_itself_is_refused(name):
    layer = Wrapped(lambda self, x: getattr(self, name)(x), **{name: torch.nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=rf"the name '{name}' is taken.*Rename it"):
        interop.from_torch(layer, torch.zeros(2, 3))
    parameter = Wrapped(lambda self, x: x * getattr(self, name), **{name: torch.nn.Parameter(torch.ones(3))})
    with pytest.raises(ValueError, match=rf"the name '{name}' is taken.*Rename it"):
        interop.from_torch(parameter, torch.zeros(2, 3))


def test_a_name_that_switches_modes_is_refused_at_any_depth():
    net = Wrapped(lambda self, x: x * self.deterministic, deterministic=torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"the name '0\.deterministic' is taken"):
        interop.from_torch(torch.nn.Sequential(net), torch.zeros(2, 3))


def through_data(self, x):
    y = self.fc(x) * 2
    y.data.mul_(3)
    return y * y


def through_a_view_of_detach(self, x):
    y = self.fc(x) * 2
    d = y.detach()
    d[:, 1:].neg_()
    return y * d


def part_without_gradients(self, x):
    y = self.fc(x) * 2
    with torch.no_grad():
        mean = y.mean()
        y[:, 0] = mean
    return y * y * mean


def clamped_weight(self, x):
    with torch.no_grad():
        self.fc.weight.clamp_(-0.1, 0.1)
    return self.fc(x)


def assigned_data(self, x):
    self.fc.weight.data = torch.renorm(self.fc.weight.data, 2, 0, 0.3)
    return self.fc(x)


def masked_by_infinity(self, x):
    y = self.fc(x) * 1
    y.data.masked_fill_(x > 0, -float("inf"))
    return torch.softmax(y, 1) * x


def filled_afterwards(self, x):
    with torch.no_grad():
        y = torch.zeros_like(x)
    y[:, 1:] = self.fc(x)[:, 1:]
    return y * y


def inference_mode(self, x):
    with torch.inference_mode():
        y = self.fc(x)
    return x * self.fc.bias + y


def complex_result(self, x):
    y = self.fc(x)
    with torch.no_grad():
        z = torch.fft.fft(y)
    return (z * y).real


def reentrant_checkpoint(self, x):
    y = torch.utils.checkpoint.checkpoint(lambda x: self.fc(x).tanh(), self.fc(x), use_reentrant=True)
    return self.fc(y)


@pytest.mark.parametrize(
    "function",
    [
        through_data,
        through_a_view_of_detach,
        part_without_gradients,
        clamped_weight,
        assigned_data,
        masked_by_infinity,
        filled_afterwards,
        inference_mode,
        complex_result,
        reentrant_checkpoint,
    ],
)
def test_gradients_are_those_that_autograd_sees(function):
    module, x = Wrapped(function, fc=torch.nn.Linear(3, 3)).double().train(), normal(4, 3)
    found, expected = jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x)
    found.state["fc.weight"] = expected.state["fc.weight"]  # `jax_step` returns parameters as they were before
    assert_same_step(found, expected, 1e-9)


def layer_twice(self, x):
    with torch.no_grad():
        target = self.norm(self.fc(x * 2))
    return self.norm(self.fc(x)) * target


def layer_in_a_switch(self, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    target = self.norm(x).tanh()
    torch.set_grad_enabled(before)
    return self.fc(x) * target


def gradients_inside(self, x):
    with torch.no_grad():
        target = self.norm(x)
        with torch.enable_grad():
            more = self.norm(x)
    return self.fc(x) * target * more


@pytest.mark.parametrize("function", [layer_twice, layer_in_a_switch, gradients_inside])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_norm_layer_without_gradients_gives_its_weights_none(function, frozen):
    module, x = Wrapped(function, fc=torch.nn.Linear(3, 3), norm=torch.nn.BatchNorm1d(3)).double().train(), normal(4, 3)
    module.norm.train(not frozen)
    found, expected = jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x)
    for name in dict(module.named_parameters()):
        wanted = expected.grads.get(name)
        wanted = np.zeros_like(found.grads[name]) if wanted is None else wanted.numpy()
        np.testing.assert_allclose(found.grads[name], wanted, rtol=1e-10, atol=1e-12, err_msg=name)


def test_data_of_another_shape_is_refused():
    def forward(self, x):
        self.fc.bias.data = x.sum()
        return self.fc(x)

    with pytest.raises(interop.TraceError, match=r"test_trace\.py:\d+: self\.fc\.bias\.data = (.|\n)*keeps its shape"):
        interop.from_torch(Wrapped(forward, fc=torch.nn.Linear(3, 3)), torch.zeros(4, 3))


def replaces_an_attribute(self, x):
    self.total = self.total + x.detach().mean(0)
    return self.fc(x) + self.total


def test_tensors_that_are_read_and_replaced_are_refused():
    module = Wrapped(replaces_an_attribute, fc=torch.nn.Linear(3, 3))
    module.total = torch.zeros(3)
    with pytest.raises(interop.TraceError, match=r"Wrapped in train mode: forward replaces tensors.*: total\. "):
        interop.from_torch(module, torch.zeros(4, 3))


class Moved(torch.nn.Module):
    """A module that moves its buffers by assignment, and whose function may read what they were."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("other", torch.randn(3))

    def forward(self, x):
        return self.function(self, x)


def moves(self, x):
    self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
    return x - self.mean


def moves_twice_and_keeps_the_old(self, x):
    old = self.mean
    self.mean = old + x.mean(0)
    self.mean = self.mean * 2
    return x * old + self.mean


def exchanges(self, x):
    self.mean, self.other = self.other, self.mean
    return x * self.mean - self.other


def moves_by_its_table(self, x):
    self._buffers["mean"] = torch.lerp(self.mean, x.detach().mean(0), 0.1)
    return x - self.mean


def takes_what_it_is_given(self, x):
    with torch.no_grad():
        self.mean = x[0]
        self.other = self.mean
    return x - self.mean + self.other.cos()


def writes_and_moves(self, x):
    self.mean.mul_(2)
    self.mean = self.mean + 1
    self.mean.add_(x.detach().sum(0))
    return x * self.mean.clone()


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def gives_the_old_one(self, x):
    old = self.mean
    self.mean = x.detach().mean(0)
    return old + x, old


@pytest.mark.parametrize(
    "function",
    [
        moves,
        moves_twice_and_keeps_the_old,
        exchanges,
        moves_by_its_table,
        takes_what_it_is_given,
        writes_and_moves,
        gives_the_old_one,
    ],
)
@pytest.mark.parametrize("times", [0, 1, 2])
def test_buffers_moved_by_assignment(function, times):
    """In the root (0), in a submodule called once or twice."""
    torch.manual_seed(0)

    def forward(self, x):
        for _ in range(times):
            found = self.inner[0](x)
            x = found[0] * found[1] if isinstance(found, tuple) else found
        return (self.norm(x), found[1]) if isinstance(found, tuple) else self.norm(x)

    module = Wrapped(forward, inner=torch.nn.ModuleList([Moved(function)]), norm=torch.nn.BatchNorm1d(3))
    module, x = (module if times else module.inner[0]).double().train(), normal(4, 3)
    inner = module.inner[0] if times else module
    model = interop.from_torch(module, x)
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        expected = module(leaf)
        (wanted,) = torch.autograd.grad((first(expected) ** 3).sum(), leaf)
        inner.mean, inner.other = inner.mean.detach(), inner.other.detach()
        graph, state = nnx.split(model)

        def gradient(x, state=state, graph=graph):
            return jax.grad(lambda x: (first(nnx.merge(graph, state, copy=True)(x)) ** 3).sum())(x)

        np.testing.assert_allclose(np.asarray(gradient(to_jax(x))), wanted.numpy(), atol=1e-10)
        found = model(to_jax(x))
        np.testing.assert_allclose(np.asarray(first(found)), first(expected).detach().numpy(), atol=1e-12)
        if isinstance(expected, tuple):
            np.testing.assert_allclose(np.asarray(found[1]), expected[1].detach().numpy(), atol=1e-12)
        for name, value in interop.state_dict(model).items():
            np.testing.assert_allclose(value, module.state_dict()[name].numpy(), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("new", [lambda x: x.mean(), lambda x: x.mean(0).float(), lambda x: x.detach()])
def test_a_buffer_bound_to_another_kind_of_tensor_is_refused(new):
    def forward(self, x):
        self.mean = new(x)
        return x - self.mean

    module = torch.nn.Sequential(Moved(forward), torch.nn.BatchNorm1d(3)).double().train()
    with pytest.raises(
        interop.TraceError, match=r"forward replaces tensors.*: 0\.mean\. (.|\n)*of one shape and dtype"
    ):
        interop.from_torch(module, normal(4, 3))


def test_numbers_that_change_and_numbers_drawn_in_python_are_named(caplog):
    def forward(self, x):
        self.calls += 1
        self.cache = x.new_ones(3)  # replaced before it is read
        self.size = tuple(x.shape)
        keep = random.random() < 2 and np.random.rand() < 2
        return self.fc(x) * self.calls * self.cache if keep else x

    module = Wrapped(forward, fc=torch.nn.Linear(3, 3))
    module.calls, module.cache, module.size = 0, torch.zeros(0), None
    interop.from_torch(module, torch.zeros(4, 3))
    assert "forward in train mode sets calls, which" in caplog.text
    assert "draws from numpy.random and random" in caplog.text
    assert module.calls == 0


def test_layers_in_train_mode_inside_a_model_in_eval_mode_stay_so(caplog):
    module = torch.nn.Sequential(torch.nn.Linear(3, 100), torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)).eval()
    module[1].train()
    model = interop.from_torch(module, torch.zeros(4, 3))
    assert "inside a model in eval mode, and in its eval graph: 1" in caplog.text
    operations = [node.operation for node in model._interop.model.eval.nodes]
    assert sum("dropout" in operation for operation in operations) == 1
    interop.from_torch(module.train(), torch.zeros(4, 3)).eval()


class Caching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        if "table" not in self.cache:
            self.cache["table"] = torch.arange(4.0) * 2
        return x + self.cache["table"]


@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize(
    ("function", "does"),
    [
        (lambda self, x: self.fc(x).squeeze(), r"returns \[\[4\]\] where the imported model returns \[\[1, 4\]\]"),
        (lambda self, x: self.fc(x) * 2 if x.size(0) == 1 else self.fc(x), "branches"),
        (lambda self, x: self.fc(x if x.shape[0] > 1 else x + 1), "branches"),
        (lambda self, x: self.fc(x).flatten(1), None),
        (lambda self, x: self.caching(self.fc(x)), None),
    ],
)
def test_what_a_module_does_with_one_example_alone_is_reported(function, does, examples, caplog):
    module = Wrapped(function, fc=torch.nn.Linear(3, 4), caching=Caching())
    interop.from_torch(module, torch.zeros(examples, 3))
    reports = [record.getMessage() for record in caplog.records if "batch of one" in record.getMessage()]
    assert len(reports) == (does is not None)
    if does is not None:
        assert re.match(f"given a batch of one, Wrapped {does}: ", reports[0])


def test_sizes_that_vary_too_are_no_difference(caplog):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU())
    interop.from_torch(module, torch.zeros(2, 3, 9, 12), dynamic_dims=(0, 2, 3))
    interop.from_torch(Wrapped(lambda self, x, y: (x + y, y)), torch.zeros(3, 5), torch.zeros(3, 5))
    assert not [record for record in caplog.records if "batch of one" in record.getMessage()]
