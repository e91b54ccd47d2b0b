"""Whatever is given in whatever place: what leaves a public function is an error that it documents, in our own words.

This is about the functions that compute with what they are given, or write it. Files that are read have their own tests
(test_unpickle.py, test_checkpoint_fuzz.py), and so have tracing and the optimizers.

The calls are made in a process of their own, this file's `main`: in the suite's own process beartype and jaxtyping look
at all arguments first, and what a user meets is never reached.
"""

import contextlib
import json
import linecache
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import traceback
import types
import warnings

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import interop
import jaxnorm
from interop import conventions, layouts

pytestmark = pytest.mark.once

ROOTS = tuple(str(pathlib.Path(package.__file__).parent) for package in (interop, jaxnorm))


class Odd:
    """An object of no kind."""


class Dense(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(3)(x)


class Net(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.bn = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def nested(depth: int) -> dict:
    tree: dict = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def endless() -> dict:
    tree: dict = {}
    tree["a"] = tree
    return tree


def norm(mean, var, **more) -> dict:
    return {"a.running_mean": mean, "a.running_var": var, **{f"a.{name}": value for name, value in more.items()}}


LINEN = Dense()
VARIABLES = LINEN.init(jax.random.key(0), jnp.zeros((1, 2)))


def wrong() -> dict:
    """Things of every kind; each is right in some place, and wrong in most."""
    date = np.array(["2020-01-01"], "datetime64[D]")
    abstract = jax.ShapeDtypeStruct((2,), jnp.float32)
    return {
        "None": None, "number": 3, "negative": -1, "huge": 10**5000, "fraction": 1.5, "NaN": float("nan"), "True": True,
        "text": "abc", "empty": "", "zero byte": "\0", "half a character": "\ud800", "long": "a" * 300 + ".pth",
        "bytes": b"x", "object": Odd(), "class": Odd, "function": lambda: 0, "function of all": lambda *a: None,
        "failing": lambda *a: 1 / 0, "module": types, "generator": iter(()), "set": {1},
        "list": [], "numbers": [1], "Nones": (None, None), "pair": (1, 2), "itself": endless(), "deep": nested(3000),
        "dict": {}, "by numbers": {1: 2}, "by None": {None: np.ones(1)}, "to None": {"a": None}, "to text": {"a": "b"},
        "to object": {"0.weight": Odd()}, "to huge": {"a": 10**5000}, "to set": {"a": {1}}, "to list": {"0.weight": []},
        "array": np.ones(2), "scalar": np.array(1), "objects": np.array([Odd()], object), "texts": np.array(["a"]),
        "dates": date, "records": np.zeros(2, [("a", "i4")]), "jax": jnp.ones(2), "key": jax.random.key(0),
        "torch": torch.ones(2), "sparse": torch.ones(2, 2).to_sparse(), "meta": torch.ones(2, device="meta"),
        "abstract": abstract, "params": {"params": {"a": 1}}, "collections": {"params": None},
        "stats": {"batch_stats": 3},
        "stats of text": {"batch_stats": {"a": {"mean": None, "var": "x"}}}, "deep arrays": {"params": nested(3000)},
        "of objects": norm(*[np.array([Odd()], object)] * 2), "of texts": norm(*[np.array(["a"])] * 2),
        "of dates": norm(date, date, bias=date), "of keys": {"a": jax.random.key(0)},
        "of sparse": {"a": torch.eye(2).to_sparse()},
        "of meta": norm(*[torch.ones(2, device="meta")] * 2), "of abstract": norm(abstract, abstract),
        "of complex": norm(*[np.ones(2, complex)] * 2, weight=np.ones(2, complex)), "of none": norm(*[np.ones(0)] * 2),
        "of NaN": norm(*[np.full(2, np.nan)] * 2, num_batches_tracked=np.array(np.nan), weight=np.full(2, np.inf)),
        "odd names": {"": np.ones(1), "a\0": np.ones(1), "__metadata__": np.ones(1), "\ud800": np.ones(1)},
        "nnx": Net(), "linen": LINEN, "variables": VARIABLES, "no variables": (LINEN, None),
        "few": (LINEN, {"params": {}}),
        "torch module": torch.nn.Linear(2, 3), "torch class": torch.nn.Linear,
        "pattern": {"(": layouts.Linear()}, "layout class": {"a": layouts.Linear}, "no layout": {"a": 3},
        "other layout": {".*": layouts.Conv(2)}, "patterns": [("(", "b")], "three": [("a", "b", "c")],
        "no group": [("a", r"\9")], "no way back": [("a", "b", "(", "a")],
        "failing pair": (lambda n: 1 / 0, lambda n: n),
        "to numbers": (lambda n: 3, lambda n: n), "settings": {"1": {"kind": "BatchNorm", "eps": "x"}},
        "odd settings": {"": {"kind": Odd()}}, "other kind": {"1": {"kind": "Dropout", "p": 0.5}},
    }  # fmt: skip


def calls(folder: pathlib.Path) -> dict:
    """Each function with arguments that are right."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model = interop.from_torch(module, torch.zeros(2, 2))
    state = interop.state_dict(model)
    settings = interop.config(model)

    def with_layout(kind):
        return lambda **options: interop.state_dict(Net(), layouts={"a": kind(**options)})

    return {
        "state_dict": (interop.state_dict, {"target": model, "rename": None, "layouts": None, "inputs": None}),
        "state_dict of Linen": (
            interop.state_dict,
            {"target": (LINEN, VARIABLES), "rename": None, "layouts": None, "inputs": jnp.ones((1, 2))}),
        "load_state_dict": (
            interop.load_state_dict,
            {"target": model, "state_dict": state, "rename": None, "strict": True, "layouts": None, "inputs": None}),
        "load_state_dict, not strict": (
            interop.load_state_dict,
            {"target": Net(), "state_dict": {"a.weight": np.ones((3, 2))}, "rename": None, "strict": False}),
        "load_state_dict of Linen": (
            interop.load_state_dict, {"target": (LINEN, VARIABLES), "state_dict": {}, "rename": None, "strict": False}),
        "suggest_rename": (
            interop.suggest_rename, {"target": model, "state_dict": state, "layouts": None, "inputs": None}),
        "lint": (lambda target: interop.lint(target) if not isinstance(target, str) else None, {"target": model}),
        "config": (interop.config, {"source": model, "rename": None, "inputs": None}),
        "load_config": (interop.load_config, {"target": model, "source": settings, "rename": None, "inputs": None}),
        "apply_config": (interop.apply_config, {"module": module, "config": settings}),
        "to_torch": (interop.to_torch, {"tree": state}),
        "flax_momentum": (conventions.flax_momentum, {"torch_momentum": 0.1}),
        "torch_momentum": (conventions.torch_momentum, {"flax_momentum": 0.9}),
        "register": (
            lambda name, function, **options: interop.register(name, **options)(function),
            {"name": "mylib::op", "function": len, "layout": "plain", "since": None}),
        "save_checkpoint, safetensors": (
            interop.save_checkpoint,
            {"path": folder / "x.safetensors", "target": state, "metadata": None, "ema": None, "layout": None,
             "max_shard_size": None}),
        "save_checkpoint, pth": (
            interop.save_checkpoint,
            {"path": folder / "x.pth", "target": model, "metadata": {}, "ema": state, "layout": "torchvision"}),
        "save_checkpoint, n_averaged": (
            lambda number: interop.save_checkpoint(
                folder / "y.pth", state, {"n_averaged": number}, ema=state, layout="torchvision"), {"number": 3}),
        "freeze": (lambda model, pattern: interop.freeze(model, pattern), {"model": Net(), "pattern": "a"}),
        "unfreeze": (lambda model, pattern: interop.unfreeze(model, pattern), {"model": Net(), "pattern": "a"}),
        "checkpoint": (lambda pattern: model.checkpoint(pattern), {"pattern": "1"}),
        "features": (interop.features, {"model": model, "names": ["0"]}),
        "first_epoch": (interop.first_epoch, {"checkpoint": {"epoch": 3}}),
        "save": (interop.save, {"model": model, "directory": folder / "artifact"}),
        "layouts.Linear": (with_layout(layouts.Linear), {"inputs": 1, "outputs": 1, "flattened": None}),
        "layouts.Conv": (with_layout(layouts.Conv), {"spatial": None}),
        "layouts.ConvTranspose": (with_layout(layouts.ConvTranspose), {"transpose_kernel": False, "spatial": None}),
        "layouts.Norm": (with_layout(layouts.Norm), {"channels_last": None}),
        "layouts.Same": (with_layout(layouts.Same), {"names": {}}),
    }  # fmt: skip


def raised_by_us(error: BaseException) -> bool:
    """Whether the error comes from a `raise` of this project, and is not one that Python or a library ran into."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = [linecache.getline(last.filename, number) for number in range(max(1, last.lineno - 8), last.lineno + 1)]
    return last.filename.startswith(ROOTS) and any(line.lstrip().startswith("raise") for line in lines)


def complaints(function, arguments: dict) -> list[str]:
    """What leaves the function that is no TypeError or ValueError of ours, with each thing in each place."""
    found = []
    for argument in arguments:
        for kind, value in wrong().items():
            try:
                function(**{**arguments, argument: value})
            except (TypeError, ValueError) as error:
                if not raised_by_us(error) or not str(error).strip():
                    found.append(f"{argument}={kind}: {type(error).__name__} that says nothing of it: {error}")
            except BaseException as error:
                found.append(f"{argument}={kind}: {type(error).__name__}: {error}")
    return [complaint[:300] for complaint in found]


NAMED = [
    (lambda m: interop.state_dict(m, rename=3), "rename is a list of pairs (pattern, replacement), a mapping"),
    (lambda m: interop.state_dict(m, rename=[("(", "b", "a", "b")]), "rename: '(' is no pattern"),
    (lambda m: interop.load_state_dict(m, {}, rename=[1]), "a mapping or a function; found 1"),
    (lambda m: interop.load_state_dict(m, {"x": np.ones(1)}, rename=lambda n: 1 / 0), "rename fails for 'x'"),
    (lambda m: interop.load_state_dict(m, {}, strict="no"), "strict is True or False, found str"),
    (lambda m: interop.state_dict(m, layouts={"a": 3}), "layouts=: 'a' has a member of interop.layouts"),
    (lambda m: interop.state_dict(m, layouts=[1]), "to members of interop.layouts; found list"),
    (lambda m: interop.suggest_rename(m, {"x": 3}), "entry 'x' of the state dict is no array but int"),
    (lambda m: interop.state_dict({"params": {"a": {"kernel": "x"}}}), "'params.a.kernel' is no array but str"),
    (lambda m: interop.lint({"a": torch.eye(2).to_sparse()}), "entries 'a' of the state dict are not arrays"),
    (lambda m: interop.apply_config(3, {}), "expected a torch.nn.Module, found builtins.int"),
    (lambda m: interop.to_torch({"a": jax.random.key(0)}), "torch has no dtype key<fry>"),
    (lambda m: conventions.flax_momentum("0.1"), "a momentum is a number from 0 to 1 or None, found '0.1'"),
    (lambda m: interop.save_checkpoint("x.pth", {}, max_shard_size=0), "max_shard_size is a number of bytes, found 0"),
    (lambda m: interop.save_checkpoint(b"x.pth", {}), "expected a path (a string or os.PathLike), found bytes"),
    (
        lambda m: interop.save_checkpoint("x.pth", {"a": np.ones(1)}, {"a": 2**3000}),
        "entry 'a': an integer of 3001 bits",
    ),
    (lambda m: layouts.Linear(inputs="2"), "Linear: inputs is an integer from 1 to 64, found '2'"),
]
"""Calls, and what their errors have to say."""


def main() -> None:
    """Prints all complaints as JSON."""
    warnings.simplefilter("ignore")
    folder = pathlib.Path(tempfile.mkdtemp())
    os.chdir(folder)  # where a name without a folder is written
    found = {name: complaints(*call) for name, call in calls(folder).items()}
    for call, message in NAMED:
        said = "no error"
        with contextlib.suppress(Exception):
            try:
                call(Net())
            except (TypeError, ValueError) as error:
                said = str(error)
        found[message] = [] if message in said else [said]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict:
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent), "JAX_ENABLE_X64": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


FUNCTIONS = [
    "state_dict", "load_state_dict", "suggest_rename", "lint", "config", "load_config", "apply_config", "to_torch",
    "flax_momentum", "torch_momentum", "register", "freeze", "unfreeze", "checkpoint", "features", "first_epoch",
    "save_checkpoint", "save", "layouts",
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_documented_errors_leave_and_say_what_was_given(found, function):
    mine = {name: complaints for name, complaints in found.items() if re.split(r"\W", name)[0] == function}
    assert mine
    problems = [f"{name}: {complaint}" for name, complaints in mine.items() for complaint in complaints]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("message", [message for _, message in NAMED])
def test_an_error_names_the_item(found, message):
    assert not found[message], found[message]


def test_a_train_state_is_a_target_and_a_config_s_error_says_what_to_do():
    model = interop.from_torch(torch.nn.Linear(2, 3), torch.zeros(2, 2))
    state = jaxnorm.TrainState.create(model, optax.sgd(0.1))
    assert list(interop.state_dict(state)) == ["weight", "bias"]
    with pytest.raises(TypeError, match="set those of the model it is made from"):
        interop.load_config(state, interop.config(model))


if __name__ == "__main__":
    main()
