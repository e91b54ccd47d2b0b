"""One PyTorch module against its import: what several tests compare."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import interop
from interop.tracing import private
from interop.weights.names import named_variables

FAST = {"xla_backend_optimization_level": 0}  # compiling takes longer than running here


def randomised(module, seed=0):
    """The module in float64 with statistics, scales and biases that are neither 0 nor 1."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)

    def draw(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, private.batch_norm_class()):
                for tensor, low, high in (
                    (layer.weight, 0.5, 1.5),
                    (layer.bias, -0.5, 0.5),
                    (layer.running_mean, -0.5, 0.5),
                    (layer.running_var, 0.5, 1.5),
                ):
                    if tensor is not None:
                        tensor.copy_(draw(tensor, low, high))
    return module


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def to_jax(tensor):
    return jnp.asarray(tensor.detach().numpy())


def relative(found, expected, floor=0.0):
    """Norm of the difference over the norm of what is expected. Infinities that are the same do not differ."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    same = np.isinf(expected) & (found == expected)
    found, expected = np.where(same, 0, found), np.where(same, 0, expected)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), floor, 1e-300)


def flat(result):
    """The floating tensors of a nested result, in order."""
    if isinstance(result, dict):  # jax.jit sorts the keys
        result = [result[key] for key in sorted(result, key=str)]
    if isinstance(result, (list, tuple)):
        return [leaf for item in result for leaf in flat(item)]
    return [result] if hasattr(result, "shape") else []


@dataclasses.dataclass
class Step:
    """What one training step gives: the loss, gradients by name, and the state dict after the forward pass."""

    loss: float
    grads: dict
    state: dict


def torch_step(module, *inputs, **keywords):
    """One step of PyTorch; the loss is a fixed random combination of all outputs."""
    module = copy.deepcopy(module)
    loss = sum((y * normal(*y.shape, seed=i)).sum() for i, y in enumerate(flat(module(*inputs, **keywords))))
    loss.backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return Step(loss.item(), grads, module.state_dict())


def jax_step(model, *inputs, **keywords):
    """The same step of the imported model."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, rest, inputs, keywords):
        model = nnx.merge(graph, params, rest, copy=True)
        outputs = flat(model(*inputs, **keywords))
        loss = sum((y * normal(*y.shape, seed=i).numpy()).sum() for i, y in enumerate(outputs))
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=FAST)
    (loss, after), grads = step(params, rest, inputs, keywords)
    gradients = dict(named_variables(nnx.merge(graph, grads, rest, copy=True)))
    grads = {n: v[...] for n, v in gradients.items() if isinstance(v, nnx.Param)}
    return Step(float(loss), grads, interop.state_dict(nnx.merge(graph, params, after, copy=True)))


def jax_eval(model, *inputs, **keywords):
    graph, state = nnx.split(model)

    def call(state, inputs, keywords):
        return nnx.merge(graph, state, copy=True)(*inputs, **keywords)

    return jax.jit(call, compiler_options=FAST)(state, inputs, keywords)


def assert_same_step(found, expected, tolerance):
    """Loss, gradients and state agree. A gradient that is 0 but for rounding is held against the typical one."""
    assert abs(found.loss - expected.loss) <= tolerance * abs(expected.loss)
    floor = 1e-3 * float(np.median([np.linalg.norm(g) for g in expected.grads.values()]))
    wrong = {n: relative(found.grads[n], g, floor) for n, g in expected.grads.items()}
    assert max(wrong.values()) < tolerance, sorted(wrong.items(), key=lambda item: -item[1])[:5]
    assert list(found.state) == list(expected.state)
    wrong = {n: relative(found.state[n], v) for n, v in expected.state.items()}
    assert max(wrong.values()) < tolerance, sorted(wrong.items(), key=lambda item: -item[1])[:5]
