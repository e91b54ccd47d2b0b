"""Hooks of the module that is imported: those that only observe never stand in the way, others count."""

import copy

import pytest
import torch
from parity_tools import assert_same_step, jax_step, normal, randomised, to_jax, torch_step

import interop


def network():
    return randomised(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())).train()


def observing(seen):
    def array(layer, inputs, output):
        seen.append(output.detach().numpy().copy())

    def mean(layer, inputs, output):
        if output.detach().mean() > 1e9:
            raise OverflowError
        seen.append(f"{output.mean():.3f}")

    def size(layer, inputs):
        seen.append(float(inputs[0].detach().abs().max()))

    return array, mean, size


@pytest.mark.parametrize("training", [True, False])
def test_hooks_that_only_observe_are_no_part_of_the_model(caplog, training):
    module, x, seen = network().train(training), normal(4, 3, 5, 5), []
    plain = copy.deepcopy(module)
    array, mean, size = observing(seen)
    module[0].register_forward_hook(array)
    module[1].register_forward_hook(mean)
    module[1].register_forward_hook(lambda layer, inputs, output: output * 2)
    plain[1].register_forward_hook(lambda layer, inputs, output: output * 2)
    module[1].register_forward_pre_hook(size)
    hooks = [list(table) for layer in module for table in (layer._forward_hooks, layer._forward_pre_hooks)]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = interop.from_torch(module, x)
    assert "hooks that only observe" in caplog.text
    assert hooks == [list(table) for layer in module for table in (layer._forward_hooks, layer._forward_pre_hooks)]
    assert all((before[name] == value).all() for name, value in module.state_dict().items())
    assert_same_step(jax_step(model, to_jax(x)), torch_step(plain, x), 1e-9)
    seen.clear()
    module(x)
    assert len(seen) == 3


def test_a_hook_that_takes_part_and_cannot_be_recorded_is_an_error():
    module, x = network(), normal(4, 3, 5, 5)
    module[0].register_forward_hook(lambda layer, inputs, output: output * float(output.detach().numpy().mean()))
    with pytest.raises(interop.TraceError, match="Sequential"):
        interop.from_torch(module, x)


def test_a_hook_that_writes_or_sets_takes_part():
    from interop.tracing.hooks import observers

    module, x = network(), normal(4, 3, 5, 5)
    module[0].register_forward_hook(lambda layer, inputs, output: [None, output.add_(1)][0])
    module[0].register_forward_hook(lambda layer, inputs, output: None)
    module[1].register_forward_pre_hook(lambda layer, inputs: setattr(layer, "scale", inputs[0].mean()))
    module[2].register_forward_hook(lambda layer, inputs, output, given=[]: given.append(output.sum().item()))
    assert [hook.path for hook in observers(module, (x,), {})] == ["0", "2"]


def test_hooks_on_gradients_are_named(caplog):
    module, x = network(), normal(4, 3, 5, 5)
    module[0].weight.register_hook(lambda grad: grad * 2)
    module[0].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    module[2].register_full_backward_hook(lambda layer, given, grads: None)
    interop.from_torch(module, x)
    assert "hooks on gradients are no part of the imported model (2, 0.weight, 0.bias)" in caplog.text


def test_a_hook_on_the_gradient_of_an_input_is_refused():
    class Halved(torch.nn.Module):
        def forward(self, x):
            x.register_hook(lambda grad: grad / 2)
            return x * 1

    lost = r"test_hooks\.py:\d+: x\.register_hook(.|\n)*a hook on the gradient of a parameter, an input or a view"
    with pytest.raises(interop.TraceError, match=lost):
        interop.from_torch(torch.nn.Sequential(Halved(), torch.nn.Conv2d(3, 4, 3)), torch.zeros(4, 3, 5, 5))


def reversed_gradient(x):
    x.register_hook(lambda grad: -0.5 * grad)
    return x.tanh() + x**2


def clipped_and_looked_at(x):
    x.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    x.register_hook(lambda grad: None)
    return x * 3


@pytest.mark.parametrize("function", [reversed_gradient, clipped_and_looked_at])
def test_a_hook_on_the_gradient_of_a_result_is_recorded(function):
    class Hooked(torch.nn.Module):
        def forward(self, x):
            return function(x)

    module, x = torch.nn.Sequential(*network(), Hooked()).double().train(), normal(4, 3, 5, 5)
    assert_same_step(jax_step(interop.from_torch(module, x), to_jax(x)), torch_step(module, x), 1e-10)
