"""The door of from_torch: what it takes, what it says of what it does not take, and that what it takes goes home."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity_tools import normal, randomised, relative, to_jax

import interop

# PyTorch warns of itself when its compiler is imported, and of a dtype that it has.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.head, self.function = torch.nn.Linear(4, 2), torch.sin

    def forward(self, x):
        return self.head(self.function(self.stem(x)).mean((2, 3)))


def compiled_child(module):
    module.stem = torch.compile(module.stem)
    return module


def compiled_in_place(module):
    module.stem.compile()
    module.compile()
    return module


def compiled_function(module):
    module.function = torch.compile(torch.sin, backend="aot_eager")
    return module


def compiled_forward(module):
    module.forward = torch.compile(module.forward)
    return module


def called_before(module):
    module = torch.compile(module, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Guards may run slower")  # of Python 3.13.0
        module(normal(4, 3, 6, 6))
    return module


COMPILED = [torch.compile, compiled_child, compiled_in_place, compiled_function, compiled_forward, called_before]


@pytest.mark.parametrize("how", COMPILED, ids=lambda how: how.__name__)
def test_what_was_compiled_is_traced_as_its_original_and_goes_home(how):
    module, x = how(randomised(Net()).train()), normal(4, 3, 6, 6)
    plain = Net().double()
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
    model = interop.from_torch(module, x)
    assert len(model._interop.model.batch_norms) == 1
    assert list(interop.state_dict(model)) == list(module.state_dict())
    assert relative(model(to_jax(x)), plain(x).detach()) < 1e-12
    module.load_state_dict(interop.to_torch(interop.state_dict(model)), strict=True)
    after = zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(relative(a.detach().numpy(), b.detach()) < 1e-12 for a, b in after)


def test_a_graph_module_is_a_module_like_another():
    def graph():
        return torch.fx.symbolic_trace(randomised(Net())).train()

    module, x = graph(), normal(4, 3, 6, 6)
    code, seen = module.code, []
    module.register_forward_hook(lambda layer, given, output: seen.append(output.shape))
    model = interop.from_torch(module, x)
    assert model._interop.model.batch_norms[0].path == "stem.1" and module.code == code and seen == []
    assert list(interop.state_dict(model)) == list(module.state_dict())
    for _ in range(2):
        assert relative(model(to_jax(x)), module(x).detach()) < 1e-12
    model.eval()
    assert relative(model(to_jax(x)), module.eval()(x).detach()) < 1e-12
    assert all(relative(interop.state_dict(model)[name], x) < 1e-12 for name, x in module.state_dict().items())


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("make", [Wrapped, lambda: torch.compile(Wrapped().module)])
def test_a_model_in_a_wrapper_comes_home_by_a_file(make, ending, tmp_path):
    module, path = make(), tmp_path / f"model.{ending}"
    model = interop.from_torch(module, torch.zeros(2, 3))
    model(np.ones((2, 3), np.float32))
    interop.save_checkpoint(path, model)
    if ending == "pth":
        module.load_state_dict(torch.load(path), strict=True)
    again = interop.load_state_dict(interop.from_torch(make(), torch.zeros(2, 3)), interop.load_checkpoint(path))
    expected = interop.state_dict(model)
    assert list(interop.state_dict(again)) == list(expected)
    assert all((value == expected[name]).all() for name, value in interop.state_dict(again).items())


def test_extra_state_is_said_to_be_lost():
    class Versioned(torch.nn.BatchNorm1d):
        def get_extra_state(self):
            return {"version": 7}

    with pytest.warns(UserWarning, match=r"extra state, say\): 0\._extra_state, 1\.0\._extra_state\. Add it to"):
        interop.from_torch(torch.nn.Sequential(Versioned(3), torch.nn.Sequential(Versioned(3))), torch.zeros(2, 3))


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


class Table(torch.nn.Linear):
    def __init__(self, table):
        super().__init__(3, 2)
        self.register_buffer("table", table)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.uint16, torch.uint32])
def test_a_buffer_of_a_rare_dtype_goes_home_bit_for_bit(dtype):
    table = torch.arange(8, dtype=torch.uint8).view(dtype)
    found = interop.state_dict(interop.from_torch(Table(table), torch.zeros(2, 3)))["table"]
    assert (found.view(np.uint8) == table.view(torch.uint8).numpy()).all()


@pytest.mark.parametrize("dtype", ["int4", "uint7", "complex32", "float4_e2m1fn_x2"])
def test_a_dtype_that_no_array_has_is_named(dtype):
    table = torch.empty(4, dtype=getattr(torch, dtype))
    with pytest.raises(interop.TraceError, match=rf"NumPy and JAX do not have: table is {dtype}\."):
        interop.from_torch(Table(table), torch.zeros(2, 3))


class Unfinished(torch.nn.Module):
    def __init__(self): ...


class Failing(torch.nn.Linear):
    def eval(self):
        raise KeyError("key")


LINEAR, X = torch.nn.Linear(3, 2), torch.zeros(2, 3)
nested = []
nested.append(nested)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: interop.from_torch(torch.nn.Linear, X), TypeError, "found the class Linear: make one"),
        (lambda: interop.from_torch(Unfinished(), X), TypeError, r"Unfinished is no whole.*does not call super"),
        (lambda: interop.from_torch(LINEAR), TypeError, r"Linear\.forward.*missing a required argument: 'input'"),
        (lambda: interop.from_torch(LINEAR, X, X), TypeError, "too many positional arguments"),
        (lambda: interop.from_torch(LINEAR, other=X), TypeError, "missing a required argument: 'input'"),
        (lambda: interop.from_torch(LINEAR, None), interop.TraceError, "must be Tensor, not NoneType"),
        (lambda: interop.from_torch(LINEAR, object()), interop.TraceError, "Unsupported input type"),
        (lambda: interop.from_torch(LINEAR, nested), ValueError, "contain themselves"),
        (lambda: interop.from_torch(LINEAR, X[:, :2]), interop.TraceError, "Linear in train mode"),
        (lambda: interop.from_torch(LINEAR, X, dynamic_dims=(-1,)), ValueError, "count from the first.*found -1"),
        (
            lambda: interop.from_torch(LINEAR, X, compute_dtype="text"),
            ValueError,
            "compute_dtype is a floating.*'text'",
        ),
        (lambda: interop.from_torch(LINEAR, X, compute_dtype=jnp.int32), ValueError, "compute_dtype is a floating"),
        (lambda: interop.from_torch(torch.nn.Module(), X), interop.TraceError, 'missing the required "forward"'),
        (lambda: interop.from_torch(Failing(3, 2), X), interop.TraceError, r"Failing\.eval\(\) fails: KeyError: 'key'"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dynamic_dims": None}, "dynamic_dims is a sequence of dimensions.*found None"),
        ({"dynamic_dims": 0}, "dynamic_dims is a sequence"),
        ({"dynamic_dims": "0"}, "dynamic_dims is a sequence"),
        ({"dynamic_dims": (0.5,)}, "dynamic_dims are numbers of dimensions, found 0.5"),
    ],
)
def test_wrong_dimensions_are_named(arguments, says):
    from interop.tracing.refusals import refuse_other_arguments

    check = getattr(refuse_other_arguments, "__wrapped__", refuse_other_arguments)  # without the suite's check of types
    with pytest.raises(TypeError, match=says):
        check(LINEAR, (X,), {}, arguments["dynamic_dims"])
