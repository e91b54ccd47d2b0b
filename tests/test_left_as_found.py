"""from_torch leaves the user's objects as they were, whether it gives a model or an error."""

import collections
import functools
import random
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from parity_tools import normal, relative, to_jax

import interop
from interop.errors import TraceError
from interop.tracing import private
from interop.tracing.snapshot import Snapshot

HELD: dict = {}
COUNT = 0


@functools.lru_cache(maxsize=4)
def table(n):
    return torch.arange(n, dtype=torch.float64).cos()


def memoised(function):
    known = {}

    def call(n):
        if n not in known:
            known[n] = function(n)
        return known[n]

    return call


angles = memoised(lambda n: torch.arange(n, dtype=torch.float64).sin())


class Net(torch.nn.Module):
    """Two layers, and a function that is called between them."""

    seen: ClassVar[list] = []

    def __init__(self, function, **held):
        super().__init__()
        self.fc, self.bn, self.function = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), function
        self.scale, self.history, self.where = torch.ones(4, dtype=torch.float64), [], {"deep": [{}]}
        self.double()
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        y = self.fc(x)
        z = self.function(self, y)
        return self.bn(y if z is None else z)


class Slotted:
    __slots__ = ("value",)


def writes_parameters(self, y):
    with torch.no_grad():
        self.fc.weight.mul_(1.5)
        self.bn.weight.data.add_(1)


def keeps_in_nested_containers(self, y):
    cached = self.where["deep"][0].setdefault("cos", torch.arange(4, dtype=y.dtype).cos())
    return y * cached


def keeps_in_a_named_tuple_of_dicts(self, y):
    self.pair.first.setdefault("cos", torch.arange(4, dtype=y.dtype).cos())
    return y * self.pair.first["cos"]


def calls_a_cached_function(self, y):
    return y * table(4)


def calls_a_cached_method(self, y):
    return y * Cached.ones(4)


class Cached:
    @staticmethod
    @functools.lru_cache
    def ones(n):
        return torch.ones(n, dtype=torch.float64)


def calls_a_memoised_function(self, y):
    return y * angles(4)


def sets_class_attributes(self, y):
    type(self).last, type(self).calls = y, 1
    self.seen.append(y)


def sets_globals(self, y):
    global COUNT
    COUNT += 1
    HELD["y"] = y


def keeps_in_ordered_containers(self, y):
    self.lru.move_to_end("a")
    self.lru["c"], self.counts["x"] = y, 5
    self.recent.append(y), self.names.add("y"), self.bytes.extend(b"abc")


def sets_on_other_objects(self, y):
    self.slotted.value, self.space.y = y, y
    self.fc.weight.tag = "seen"


def writes_arrays(self, y):
    self.array += 1
    self.objects[0] = y


def sets_flags(self, y):
    self.bn.momentum, self.bn.eps = 0.5, 0.1
    self.fc.weight.requires_grad_(False)
    self.train(not self.training)
    self.train(not self.training)


def registers(self, y):
    self.register_forward_hook(lambda *_: None)
    self.register_buffer("late", torch.ones(4, dtype=y.dtype))
    self.extra = torch.nn.Identity()


def draws(self, y):
    random.random(), np.random.rand(), torch.rand(1)
    self.numpy.random(), self.python.random(), torch.rand(1, generator=self.torch)


def turns_switches(self, y):
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    np.seterr(over="raise"), np.set_printoptions(precision=3)


def deletes(self, y):
    self.where.clear()
    del self.history
    self.scale = None


FUNCTIONS = {
    writes_parameters: {},
    keeps_in_nested_containers: {},
    keeps_in_a_named_tuple_of_dicts: lambda: {"pair": collections.namedtuple("Pair", "first second")({}, {})},
    calls_a_cached_function: {},
    calls_a_cached_method: {},
    calls_a_memoised_function: {},
    sets_class_attributes: {},
    sets_globals: {},
    keeps_in_ordered_containers: lambda: {
        "lru": collections.OrderedDict(a=1, b=2),
        "counts": collections.Counter("xyx"),
        "recent": collections.deque([1, 2], maxlen=2),
        "names": {"a"},
        "bytes": bytearray(b"x"),
    },
    sets_on_other_objects: lambda: {"slotted": Slotted(), "space": types.SimpleNamespace(x=1)},
    writes_arrays: lambda: {"array": np.ones(3), "objects": np.array([None, 1], dtype=object)},
    sets_flags: {},
    registers: {},
    draws: lambda: {"numpy": np.random.default_rng(0), "python": random.Random(0), "torch": torch.Generator()},
    turns_switches: {},
    deletes: {},
}


def made(function):
    held = FUNCTIONS[function]
    module = Net(function, **(held() if callable(held) else held))
    module.fc.weight.grad = torch.ones_like(module.fc.weight)
    return module


def fails(layer, given, output):
    raise KeyError("after all else")


@pytest.mark.parametrize("ends", ["with a model", "with an error"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_everything_a_module_reaches_is_as_it_was(function, ends):
    table(2), Cached.ones(2)
    module, x = made(function), normal(6, 3)
    if ends == "with an error":
        module.bn.register_forward_hook(fails)
    snapshot, before = Snapshot(module, (x,)), picture(module)
    loss = module.fc(x).square().sum()  # a graph that keeps the weight, in its version of now
    try:
        interop.from_torch(module, x)
    except (TraceError, NotImplementedError):
        pass
    else:
        assert ends == "with a model"
    assert picture(module) == before
    assert [change.name for change in snapshot.changes()] == [] and snapshot.written() == []
    loss.backward()


def picture(module):
    """What a user may compare."""
    state = module.state_dict(keep_vars=True)
    layers = [(path, id(layer), layer.training, sorted(vars(layer))) for path, layer in module.named_modules()]
    return {
        "state": [
            (name, id(x), private.version(x), x.tolist(), x.requires_grad, str(x.grad)) for name, x in state.items()
        ],
        "layers": layers,
        "attributes": [repr({k: v for k, v in vars(layer).items() if k[0] != "_"}) for layer in module.modules()],
        "containers": repr((HELD, COUNT, Net.seen, dict(vars(Net)), vars(module.fc.weight))),
        "caches": (table.cache_info(), Cached.ones.cache_info()),
        "switches": (torch.get_default_dtype(), np.geterr(), np.get_printoptions()["precision"]),
        "more switches": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "random states": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
    }


class Merging(torch.nn.Linear):
    """Adds a product to its weight in eval mode."""

    def __init__(self):
        super().__init__(3, 4)
        self.a, self.merged = torch.nn.Parameter(torch.ones(4, 3)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.a
            self.merged = not mode
        return self

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight if self.merged else self.weight + self.a, self.bias)


class Averaging(torch.nn.BatchNorm1d):
    """Moves its running mean when it leaves train mode, and when it goes there."""

    def train(self, mode=True):
        if self.training != mode:
            self.running_mean = self.running_mean + 1
        return super().train(mode)


class Keeping(torch.nn.Linear):
    """Keeps a product of its weight in eval mode."""

    kept = None

    def train(self, mode=True):
        self.kept = None if mode else self.weight.detach().exp()
        return super().train(mode)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.exp() if self.kept is None else self.kept)


class Replacing(torch.nn.Sequential):
    def train(self, mode=True):
        self[1] = torch.nn.BatchNorm1d(4) if mode else torch.nn.Identity()
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: torch.nn.Sequential(Merging(), torch.nn.BatchNorm1d(4)), r"0\.weight.*Merging\.train \(0\)"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), Averaging(4)), r"1\.running_mean.*Averaging\.train \(1\)"),
        (lambda: torch.nn.Sequential(Keeping(3, 4)), r"0\.kept.*Keeping\.train \(0\)"),
        (lambda: Replacing(torch.nn.Linear(3, 4), torch.nn.Identity()), r"Replacing\.train \(the module itself\)"),
    ],
)
def test_a_mode_switch_that_writes_state_is_refused_and_undone(make, names, training):
    module = make().double().train(training)
    snapshot, state = Snapshot(module), {name: x.tolist() for name, x in module.state_dict().items()}
    says = rf"(train|eval)\(\) changes what the module holds: .*{names}.*one state for both"
    with pytest.raises(TraceError, match=says):
        interop.from_torch(module, normal(6, 3))
    assert {name: x.tolist() for name, x in module.state_dict().items()} == state
    assert [change.name for change in snapshot.changes()] == [] and snapshot.written() == []


def test_a_mode_switch_that_sets_flags_and_drops_caches_is_none_that_writes_state():
    class Dropping(torch.nn.Linear):
        kept, scale = None, 1.0

        def train(self, mode=True):
            self.kept, self.scale = None, 1.0 if mode else 2.0
            return super().train(mode)

        def forward(self, x):
            if self.kept is None:
                self.kept = torch.arange(4, dtype=x.dtype)
            return super().forward(x) * self.scale + self.kept

    module, x = torch.nn.Sequential(Dropping(3, 4), torch.nn.BatchNorm1d(4)).double(), normal(6, 3)
    expected = module.eval()(x).detach()
    model = interop.from_torch(module, x)
    assert module[0].kept is not None and relative(model(to_jax(x)), expected) < 1e-12
    model.train()
    assert relative(model(to_jax(x)), module.train()(x).detach()) < 1e-9


@pytest.mark.parametrize("first", [True, False])
def test_a_module_works_after_the_import_whatever_it_keeps(first):
    module, x = made(keeps_in_nested_containers), normal(6, 3)
    expected = made(keeps_in_nested_containers)
    expected.load_state_dict(module.state_dict())
    if first:
        module(x), expected(x)
    model = interop.from_torch(module, x)
    assert relative(model(to_jax(x)), expected(x).detach()) < 1e-9
    assert torch.equal(module(x), made_again(expected, module)(x))


def made_again(module, like):
    module.load_state_dict(like.state_dict())
    return module


def test_state_outside_parameters_and_buffers_is_refused_where_forward_reads_it(caplog):
    def carried(self, y):
        z = y + self.where["deep"][0]["last"]
        self.where["deep"][0]["last"] = y.detach().mean(0)
        return z

    module = Net(carried, where={"deep": [{"last": torch.zeros(4, dtype=torch.float64)}]})
    with pytest.raises(TraceError, match=r"forward replaces tensors that it reads: where\['deep'\]\[0\]\['last'\]"):
        interop.from_torch(module, normal(6, 3))

    def begun(self, y):
        last = self.where["deep"][0].get("last")
        self.where["deep"][0]["last"] = y.detach().mean(0)
        self.where["deep"][0]["cos"] = torch.zeros_like(y) + torch.arange(4)
        return y if last is None else y + last

    interop.from_torch(Net(begun), normal(6, 3))
    assert "sets where['deep'][0]['last'], which the imported model does not" in caplog.text
