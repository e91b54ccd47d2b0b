"""`torch.autograd.Function`: the user's own backward is the gradient in JAX too."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity_tools import assert_same_step, jax_step, normal, randomised, to_jax, torch_step

import interop
import jaxnorm


class Function(torch.nn.Module):
    """A function of one that is given, between a layer before and a layer after."""

    def __init__(self, function):
        super().__init__()
        self.before, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.after = torch.nn.Conv2d(4, 2, 3)
        self.slope = torch.nn.Parameter(torch.tensor([0.5]))
        self.function = function

    def forward(self, x):
        return self.after(self.function(self.norm(self.before(x)), self.slope))


class Swish(torch.autograd.Function):
    """Saves memory: its backward is the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Inherited(StraightThrough):
    """Has its forward and its backward from another."""


class Reversed(torch.autograd.Function):
    """Gradient reversal (Ganin & Lempitsky 2015), with a `setup_context`."""

    @staticmethod
    def forward(x, scale):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return -ctx.scale * grad, None


class Spike(torch.autograd.Function):
    """A step with a surrogate gradient (Neftci et al. 2019), once differentiable, whose slope learns too."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return (x > 0).to(x) * slope

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, slope = ctx.saved_tensors
        return grad * slope / (1 + (3 * x) ** 2), (grad * (x > 0)).sum().reshape(1)


class TwoOutputs(torch.autograd.Function):
    """Several outputs, of which one has no gradient; an input that needs none; attributes of ctx."""

    @staticmethod
    def forward(ctx, x, slope, count):
        ctx.x, ctx.count = x, count
        high = x.amax(1, keepdim=True)
        index = x.argmax(1)
        ctx.mark_non_differentiable(index)
        return x.floor(), high, index

    @staticmethod
    def backward(ctx, floor, high, index):
        assert ctx.needs_input_grad == (True, True, False)
        return floor * 2 + ctx.count * high * ctx.x.cos(), None, None


class Clipped(torch.autograd.Function):
    """Is its derivative as long as the incoming gradient is small."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.clamp(-0.1, 0.1)


class Saturated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Penalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-2 * ctx.saved_tensors[0].sign()


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        with torch.no_grad():  # as PyTorch runs it anyway
            return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class Inside(torch.autograd.Function):
    """Its backward calls another function with a backward of its own, as its forward does."""

    @staticmethod
    def forward(ctx, x):
        return StraightThrough.apply(x) * 3

    @staticmethod
    def backward(ctx, grad):
        return Reversed.apply(grad, 0.5) + grad.mean((2, 3), keepdim=True)


class Refined(torch.autograd.Function):
    """Calls its parent's forward."""

    @staticmethod
    def forward(ctx, x):
        return Saturated.forward(ctx, x) + 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 5


straight_through = StraightThrough.apply


class Rounding(torch.nn.Module):
    """A function bound when the class was made, in a submodule."""

    apply_to = StraightThrough.apply

    def forward(self, x):
        return type(self).apply_to(x)


def made_in_forward(x):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    return Doubled.apply(x)


def two_outputs(x, slope):
    floor, high, index = TwoOutputs.apply(x, slope, 3)
    return floor * slope + high * index[:, None]


FUNCTIONS = {
    "saves memory": lambda x, _: Swish.apply(x),
    "straight through": lambda x, _: StraightThrough.apply(x),
    "bound before": lambda x, _: straight_through(x),
    "in a submodule": lambda x, _: Rounding()(x),
    "inherited": lambda x, _: Inherited.apply(x),
    "made in forward": lambda x, _: made_in_forward(x),
    "reversed": lambda x, _: Reversed.apply(x, 0.5),
    "surrogate": lambda x, slope: Spike.apply(x, slope),
    "several outputs": two_outputs,
    "clipped": lambda x, _: Clipped.apply(x),
    "saturated": lambda x, _: Saturated.apply(x),
    "reads its input": lambda x, _: Penalised.apply(x),
    "twice, otherwise": lambda x, slope: Scaled.apply(x, 1.0) + Scaled.apply(x * slope, -0.1),
    "of a part": lambda x, _: torch.cat([StraightThrough.apply(x[:, :2]), x[:, 2:].relu_()], 1),
    "inside of each other": lambda x, _: Inside.apply(x),
    "refined": lambda x, _: Refined.apply(x),
    "checkpoint, reentrant": lambda x, _: torch.utils.checkpoint.checkpoint(straight_through, x, use_reentrant=True),
    "checkpoint": lambda x, _: torch.utils.checkpoint.checkpoint(straight_through, x, use_reentrant=False),
    "in no_grad": lambda x, slope: x * slope + torch.no_grad()(lambda: StraightThrough.apply(x))(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_training_step_has_the_gradients_of_the_users_own_backward(name):
    torch.manual_seed(0)
    module, x = randomised(Function(FUNCTIONS[name])), normal(4, 3, 7, 7)
    before = vars(StraightThrough)["forward"]
    model = interop.from_torch(module, x)
    assert vars(StraightThrough)["forward"] is before
    assert "__init_subclass__" not in vars(torch.autograd.Function)
    expected = torch_step(module, x)
    expected.grads = {n: g for n, g in expected.grads.items() if n != "before.bias"}  # 0 but for rounding
    assert_same_step(jax_step(model, to_jax(x)), expected, 1e-12)


def test_the_backward_is_in_the_saved_model_and_can_be_recomputed(tmp_path):
    module, x = randomised(Function(FUNCTIONS["surrogate"])), normal(4, 3, 7, 7)
    expected = jax_step(interop.from_torch(module, x), to_jax(x))
    interop.save(interop.from_torch(module, x), tmp_path / "model")
    loaded = interop.load(tmp_path / "model")
    assert_same_step(jax_step(loaded, to_jax(x)), expected, 1e-15)
    loaded.checkpoint()
    loaded.checkpoint("before", "norm", "after")
    assert_same_step(jax_step(loaded, to_jax(x)), expected, 1e-15)


def test_a_backward_under_a_channels_last_layout_and_a_compute_dtype():
    module, x = randomised(Function(FUNCTIONS["surrogate"])).float(), normal(4, 3, 7, 7).float()
    model = interop.from_torch(module, x, compute_dtype=jnp.bfloat16)
    gradient = nnx.grad(lambda model: jnp.square(model(to_jax(x)).astype(jnp.float32)).mean())(model)
    gradients = jax.tree.leaves(gradient)
    assert gradients and all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in gradients)


def test_second_derivatives_go_through_a_backward_as_pytorchs_do():
    module, x = torch.nn.Sequential(torch.nn.Linear(3, 3)), normal(4, 3).requires_grad_()
    module.forward = lambda x: Penalised.apply(x**3)
    model = interop.from_torch(copy.deepcopy(module), x.detach())

    def penalty(x):
        return jnp.square(jax.grad(lambda x: jnp.sin(model(x)).sum())(x)).sum()

    (first,) = torch.autograd.grad(module.forward(x).sin().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), x)
    np.testing.assert_allclose(jax.grad(penalty)(to_jax(x)), expected.numpy(), rtol=1e-10)


def test_replicas_have_the_gradients_of_one_device():
    module, x = randomised(Function(FUNCTIONS["surrogate"])), normal(8, 3, 7, 7)
    expected = jax_step(interop.from_torch(module, x), to_jax(x))
    model = jaxnorm.convert_sync_batchnorm(interop.from_torch(module, x), axis_name="batch")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, weights):
        y = nnx.merge(graph, params, rest, copy=True)(x)
        return (y * weights).sum()

    weights = normal(8, 2, 3, 3).numpy()
    split = [a.reshape(4, 2, *a.shape[1:]) for a in (to_jax(x), jnp.asarray(weights))]
    gradients = jax.pmap(jax.grad(loss), axis_name="batch", in_axes=(None, 0, 0), devices=jax.devices()[:4])(
        params, *split
    )
    slope = np.asarray(jax.tree.leaves(gradients["slope"])[0]).sum(0)
    np.testing.assert_allclose(slope, expected.grads["slope"], rtol=1e-10)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.round_()

    @staticmethod
    def backward(ctx, grad):
        return grad


class ByValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.sum() > 0 else 2 * grad


class WrongShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad.sum(0)


@pytest.mark.parametrize("function", [InPlace, ByValues, WrongShape])
def test_a_backward_that_cannot_be_recorded_is_an_error_that_shows_how_to_register_one(function):
    module = Function(lambda x, _: function.apply(x * 1))
    advice = r"has a backward of its own (.|\n)*torch\.library\.custom_op(.|\n)*interop\.register"
    with pytest.raises(interop.TraceError, match=f"{function.__name__} {advice}"):
        interop.from_torch(module, torch.zeros(2, 3, 7, 7))
