"""Calls public functions with the wrong kind of everything, one argument at a time; `test_errors_jaxnorm.py` runs it.

In a process of its own, without the type checks that the suite adds: what leaves a function here leaves it for users.
Prints a line for each call that ends otherwise than it may: with a TypeError or ValueError of the library's own, whose
message has the argument's name in it; or with a result, where the value will do.
"""

import pathlib
import sys
import tempfile
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import interop
import jaxnorm

PACKAGES = ("jaxnorm", "interop")

WRONG = {
    "None": None,
    "text": "text",
    "empty text": "",
    "bytes": b"x",
    "negative": -1,
    "part": 1.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 2**70,
    "flag": True,
    "empty list": [],
    "list": [["a"], 1],
    "dict": {"a": object()},
    "object": object(),
    "function": lambda *args, **kwargs: None,
    "type": int,
    "texts": np.array(["a", "b"]),
    "other shape": np.zeros((7, 5, 3)),
    "complex": np.array([1j]),
    "no numbers": jnp.zeros((0, 3)),
    "scalar": jnp.zeros(()),
}


class Net(nnx.Module):
    def __init__(self):
        self.norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.norm(x))


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
ROW, MASK = jnp.ones(3), np.ones((4, 1), bool)


def loss(model, batch):
    return jnp.mean(model(batch["x"]) ** 2), {}


def metrics(model, batch):
    return {"loss": model(batch["x"]).sum(1)}


TX, EMA = optax.sgd(0.1), jaxnorm.Ema(0.9)
STATE = jaxnorm.TrainState.create(Net(), TX, ema=EMA)
STEP = jaxnorm.train_step(loss)
EVALUATION = jaxnorm.data_parallel(jaxnorm.eval_step(metrics))
BATCH = {"x": X}
RUNNING = {"mean": jnp.zeros(3), "var": jnp.ones(3)}


def called(kind, **fields):
    """A layer with these fields, made and called."""
    if issubclass(kind, nnx.Module):
        return kind(**fields)(X)
    layer = kind(**fields)
    return layer.apply(layer.init(jax.random.key(0), X), X, mutable=["batch_stats"])


LAYER = {
    "use_running_average": False,
    "axis": -1,
    "momentum": 0.9,
    "epsilon": 1e-5,
    "dtype": None,
    "param_dtype": jnp.float32,
    "use_bias": True,
    "use_scale": True,
    "bias_init": nnx.initializers.zeros_init(),
    "scale_init": nnx.initializers.ones_init(),
    "axis_name": None,
    "axis_index_groups": None,
    "correction": 1,
    "track_running_stats": True,
    "count_batches": True,
    "activation": None,
}
FIXED = ("axis", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale", "activation")
NORMALISED = {"scale": ROW, "bias": ROW, "axis": -1, "epsilon": 1e-5, "mask": MASK, "activation": None, "dtype": None}

CALLS = {
    "batch_norm": (
        jaxnorm.batch_norm,
        {"x": X, **NORMALISED, "axis_name": None, "axis_index_groups": None, "shift": ROW},
    ),
    "normalize": (jaxnorm.normalize, {"x": X, "mean": ROW, "var": ROW, **NORMALISED}),
    "moments": (jaxnorm.moments, {"x": X, "axis": -1, "mask": MASK}),
    "Moments.variance": (jaxnorm.moments(X).variance, {"correction": 1}),
    "merge": (lambda merge: jaxnorm.merge(jaxnorm.moments(X), merge), {"merge": jaxnorm.moments(X)}),
    "nnx.BatchNorm": (
        lambda **fields: called(jaxnorm.nnx.BatchNorm, **fields),
        {"num_features": 3, **LAYER, "rngs": nnx.Rngs(0), "bias_metadata": {},
         "promote_dtype": jaxnorm.nnx.input_dtype},
    ),
    "nnx.BatchNorm()": (
        lambda **given: jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(**given),
        {"x": X, "use_running_average": False, "mask": MASK, "axis": -1},
    ),
    "nnx.BatchNorm() in eval": (
        lambda **given: jaxnorm.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))(**given),
        {"x": X, "mask": MASK, "axis": -1},
    ),
    "linen.BatchNorm": (lambda **fields: called(jaxnorm.linen.BatchNorm, **fields), LAYER),
    "linen.BatchNorm()": (
        lambda **given: jaxnorm.linen.BatchNorm().apply(
            {"params": {"scale": ROW, "bias": ROW}, "batch_stats": RUNNING}, mutable=["batch_stats"], **given),
        {"x": X, "use_running_average": False, "mask": MASK},
    ),
    "nnx.BatchRenorm": (
        lambda **fields: called(jaxnorm.nnx.BatchRenorm, **fields),
        {"num_features": 3, **LAYER, "rngs": nnx.Rngs(0), "r_max": 3.0, "d_max": 5.0},
    ),
    "nnx.BatchRenorm()": (
        lambda **given: jaxnorm.nnx.BatchRenorm(3, rngs=nnx.Rngs(0))(**given),
        {"x": X, "use_running_average": False, "mask": MASK, "axis": -1, "r_max": 3.0, "d_max": jnp.ones(())},
    ),
    "linen.BatchRenorm": (
        lambda **fields: called(jaxnorm.linen.BatchRenorm, **fields), {**LAYER, "r_max": 3.0, "d_max": 5.0}
    ),
    "linen.BatchRenorm()": (
        lambda **given: jaxnorm.linen.BatchRenorm().apply(
            {"params": {"scale": ROW, "bias": ROW}, "batch_stats": RUNNING}, mutable=["batch_stats"], **given),
        {"x": X, "use_running_average": False, "mask": MASK, "r_max": 3.0, "d_max": jnp.ones(())},
    ),
    "nnx.FrozenBatchNorm": (
        lambda **fields: called(jaxnorm.nnx.FrozenBatchNorm, **fields),
        {"num_features": 3, **{name: LAYER[name] for name in FIXED}, "rngs": None},
    ),
    "nnx.FrozenBatchNorm()": (
        lambda **given: jaxnorm.nnx.FrozenBatchNorm(3)(**given),
        {"x": X, "use_running_average": False, "mask": MASK, "axis": -1},
    ),
    "linen.FrozenBatchNorm": (lambda **fields: called(jaxnorm.linen.FrozenBatchNorm, **fields), LAYER),
    "linen.FrozenBatchNorm()": (
        lambda **given: jaxnorm.linen.FrozenBatchNorm().apply(
            {"batch_stats": {"scale": ROW, "bias": ROW, **RUNNING}}, **given),
        {"x": X, "use_running_average": False, "mask": MASK},
    ),
    "convert_frozen_batchnorm": (jaxnorm.convert_frozen_batchnorm, {"model": Net()}),
    "revert_frozen_batchnorm": (jaxnorm.revert_frozen_batchnorm, {"model": Net()}),
    "convert_sync_batchnorm": (
        jaxnorm.convert_sync_batchnorm, {"model": Net(), "axis_name": "batch", "axis_index_groups": None}
    ),
    "revert_sync_batchnorm": (jaxnorm.revert_sync_batchnorm, {"model": Net()}),
    "Ema": (
        lambda **given: jaxnorm.Ema(**given).init({"a": X}),
        {"decay": 0.9, "min_decay": 0.0, "update_after_step": 0, "use_warmup": False, "warmup_gamma": 1.0,
         "warmup_power": 0.5, "device": None, "exclude_buffers": False, "dtype": None, "seed": 0, "integers": "copy",
         "counts_itself": False},
    ),
    "Ema.averaged_model": (jaxnorm.Ema.averaged_model, {"decay": 0.9, "use_buffers": False, "device": None}),
    "Ema.torchvision": (jaxnorm.Ema.torchvision, {"decay": 0.9, "device": None}),
    "Ema.init": (EMA.init, {"tree": {"a": X}}),
    "Ema.update": (EMA.update, {"tree": {"a": X}, "state": EMA.init({"a": X}), "step": 1, "taken": None}),
    "Ema.value": (EMA.value, {"state": EMA.init({"a": X})}),
    "Ema.get_decay": (EMA.get_decay, {"step": 1}),
    "LossScale.dynamic": (jaxnorm.LossScale.dynamic, {"initial": 8.0}),
    "LossScale.update": (jaxnorm.LossScale.dynamic().update, {"finite": True, "interval": 3}),
    "Mean.of": (jaxnorm.Mean.of, {"values": X, "mask": MASK}),
    "pad_batch": (jaxnorm.pad_batch, {"batch": BATCH, "size": 8, "mask": "mask"}),
    "TrainState.create": (
        jaxnorm.TrainState.create,
        {"model": Net(), "tx": TX, "ema": None, "rng": jax.random.key(0), "loss_scale": None},
    ),
    "TrainState.with_ema_model": (STATE.with_ema_model, {"model": Net(), "updates": 3}),
    "TrainState.apply_gradients": (STATE.apply_gradients, {"grads": STATE.params}),
    "train_step": (
        jaxnorm.train_step,
        {"loss_fn": loss, "axis_name": None, "accumulate": 1, "statistics": "batch", "compute_dtype": None,
         "clip_norm": 1.0},
    ),
    "eval_step": (jaxnorm.eval_step, {"metrics_fn": metrics, "axis_name": None, "mask": "mask", "compute_dtype": None}),
    "eval_step()": (lambda state: jaxnorm.eval_step(metrics)(state, BATCH), {"state": STATE}),
    "evaluate": (jaxnorm.evaluate, {"step": EVALUATION, "state": STATE, "batches": [BATCH], "progress": False}),
    "data_parallel(eval_step)()": (lambda state: EVALUATION(state, BATCH), {"state": STATE}),
    "in_top_k": (jaxnorm.in_top_k, {"logits": X, "labels": jnp.zeros(len(X), int), "k": 1}),
    "Confusion.counts": (
        jaxnorm.Confusion.of(X, jnp.zeros(len(X), int)).counts, {"mask": jnp.ones(len(X), bool)},
    ),
    "Confusion.of": (jaxnorm.Confusion.of, {"logits": X, "labels": jnp.zeros(len(X), int)}),
    "train_step()": (STEP, {"state": STATE, "batch": BATCH}),
    "loss_fn's result": (
        lambda loss_fn: jaxnorm.train_step(lambda model, batch: loss_fn)(STATE, BATCH), {"loss_fn": (jnp.zeros(()), {})}
    ),
    "data_parallel": (
        jaxnorm.data_parallel,
        {"step": STEP, "how": "jit", "axis_name": "batch", "devices": None, "donate": False, "check_vma": True},
    ),
    "data_parallel()": (jaxnorm.data_parallel(STEP, "jit"), {"state": STATE, "batch": BATCH}),
    "replicate": (jaxnorm.replicate, {"tree": {"a": X}, "devices": None, "axis_name": "batch"}),
    "unreplicate": (jaxnorm.unreplicate, {"tree": {"a": jnp.ones((1, 2))}, "merge": False, "rank": None}),
    "unreplicate of a rank": (jaxnorm.unreplicate, {"tree": {"a": jnp.ones((1, 2))}, "rank": 0}),
    "replica_divergence": (jaxnorm.replica_divergence, {"tree": {"a": jnp.ones((1, 2))}}),
    "recalibrate": (
        jaxnorm.recalibrate,
        {"model": Net(), "batches": [X], "forward": None, "layer_by_layer": False, "progress": False},
    ),
    "join_processes": (
        jaxnorm.join_processes,
        {"coordinator_address": None, "num_processes": 1, "process_id": 0, "initialization_timeout": 3,
         "heartbeat_timeout": 3, "shutdown_timeout": 3},
    ),
    "plan": (jaxnorm.plan, {"step": STEP, "state": STATE, "batch": BATCH, "topology": "none", "how": "jit"}),
}  # fmt: skip

# Values that would be taken for a number, a name or a flag and make the result wrong in silence.
REFUSED = [
    *(("batch_norm", "epsilon", wrong) for wrong in ("negative", "nan", "infinite", "text", "None", "flag")),
    *(("nnx.BatchNorm", name, wrong) for name in ("epsilon", "momentum", "correction") for wrong in ("nan", "text")),
    *(("linen.BatchNorm", name, wrong) for name in ("epsilon", "momentum", "correction") for wrong in ("nan", "text")),
    *(
        (title, name, wrong)
        for title in ("nnx.BatchRenorm", "nnx.BatchRenorm()", "linen.BatchRenorm", "linen.BatchRenorm()")
        for name in ("r_max", "d_max")
        for wrong in ("negative", "nan", "text", "flag")
    ),
    ("nnx.BatchRenorm", "track_running_stats", "None"),
    ("nnx.BatchNorm", "param_dtype", "None"),
    ("linen.BatchNorm", "param_dtype", "None"),
    *(("Ema", name, wrong) for name in ("decay", "min_decay", "warmup_gamma") for wrong in ("None", "nan", "negative")),
    *(("LossScale.dynamic", "initial", wrong) for wrong in ("negative", "nan", "infinite", "huge")[:3]),
    *(("train_step", "clip_norm", wrong) for wrong in ("negative", "nan", "text")),
    ("train_step", "accumulate", "flag"),
    ("unreplicate", "rank", "part"),
    ("pad_batch", "size", "part"),
]


LAYERS = [f"{room}.{kind}" for room in ("nnx", "linen") for kind in ("BatchNorm", "BatchRenorm", "FrozenBatchNorm")]
# What a function of the user's own makes of it, and what would start a cluster.
SKIPPED = {
    *((layer, name, wrong) for layer in LAYERS
      for name in ("bias_init", "scale_init", "promote_dtype") for wrong in ("function", "type")),
    *((title, "activation", "type") for title in ("batch_norm", "normalize", *LAYERS)),
    *((title, "batch", wrong) for title in ("train_step()", "data_parallel()")
      for wrong in ("other shape", "complex", "no numbers")),
    ("recalibrate", "forward", "type"),
    # a step as any other, of which there is no checkpoint
    *((title, "step", "huge") for title in ("Checkpoints.restore", "restore_model")),
    ("recalibrate", "batches", "complex"),
    *(("plan", "batch", wrong) for wrong in WRONG if wrong not in ("None", "text", "object")),
    ("Checkpoints", "directory", "text"),
    ("optax_from_torch", "learning_rate", "type"),
    ("join_processes", "num_processes", "None"),
}  # fmt: skip
# What a message may call them.
CALLED = {"x": "input", "forward": "model", "batches": "batches"}


def ours(error):
    """Whether the library itself raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return any(part in PACKAGES for part in pathlib.Path(frame.filename).parts[-3:])


def complaint(function, arguments, name, value, allowed=(TypeError, ValueError)):
    """What is wrong with how the call ends; None if nothing is. And whether it was refused."""
    try:
        function(**{**arguments, name: value})
    except Exception as error:
        if not isinstance(error, (*allowed, NameError) if name == "axis_name" else allowed):
            return f"{type(error).__name__}: {error!s:.150}", True
        if not ours(error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"raised elsewhere, {frame.filename}:{frame.lineno}: {type(error).__name__}: {error!s:.150}", True
        if not any(word in f"{error}" for word in (name, name.rstrip("s"), CALLED.get(name, name))):
            return f"does not name it: {type(error).__name__}: {error!s:.150}", True
        return None, True
    return None, False


FEW = ("None", "text", "negative", "part", "nan", "huge", "object", "other shape")


def run(calls, refused, values=WRONG):
    """Prints what is wrong, and gives the number of calls and of complaints."""
    made = bad = 0
    refusals = set()
    for title, (function, arguments) in calls.items():
        function(**arguments) if title != "plan" else None  # the call itself is right
        for name in arguments:
            for wrong, value in ((wrong, WRONG[wrong]) for wrong in values):
                if (title, name, wrong) in SKIPPED:
                    continue
                made += 1
                found, was_refused = complaint(function, arguments, name, value)
                if was_refused:
                    refusals.add((title, name, wrong))
                if found:
                    bad += 1
                    print(f"{title}, {name}={wrong}: {found}")
    for one in sorted(set(refused) - refusals):
        bad += 1
        print(f"{one[0]}, {one[1]}={one[2]}: taken in silence")
    return made, bad


def restored(step):
    with tempfile.TemporaryDirectory() as folder, jaxnorm.Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"a": X})
        checkpoints.wait()
        return checkpoints.restore({"a": X}, step)


def out_of_a_run(**given):
    with tempfile.TemporaryDirectory() as folder:
        with jaxnorm.Checkpoints(folder) as checkpoints:
            checkpoints.save(1, jaxnorm.TrainState.create(Linear(), optax.sgd(0.1)))
            checkpoints.wait()
        return jaxnorm.restore_model(**{"directory": folder, **given})


def saved(**given):
    with tempfile.TemporaryDirectory() as folder, jaxnorm.Checkpoints(folder) as checkpoints:
        checkpoints.save(**given)


def opened(**given):
    with tempfile.TemporaryDirectory() as folder:
        jaxnorm.Checkpoints(**{"directory": folder, **given}).close()


class Linear(nnx.Module):
    """With PyTorch's names and layouts."""

    def __init__(self):
        self.weight, self.bias = nnx.Param(jnp.zeros((2, 3))), nnx.Param(jnp.zeros(2))


MODULE = torch.nn.Linear(3, 2)
OPTIMIZER = torch.optim.Adam(MODULE.parameters(), 0.1)
MODULE(torch.randn(4, 3)).square().sum().backward()
OPTIMIZER.step()
SCHEDULER = torch.optim.lr_scheduler.ExponentialLR(OPTIMIZER, 0.9)
HANDED = jaxnorm.TrainState.create(Linear(), interop.optax_from_torch(OPTIMIZER))
OPTIMIZERS = {
    "optax_from_torch": (
        interop.optax_from_torch,
        {"optimizer": OPTIMIZER, "names": MODULE, "model": Linear(), "learning_rate": lambda count: 0.1},
    ),
    "schedule_from_torch": (interop.schedule_from_torch, {"scheduler": SCHEDULER, "steps": 3, "every": 1}),
    "load_optimizer_state": (
        interop.load_optimizer_state, {"state": HANDED, "optimizer": OPTIMIZER, "names": MODULE, "step": 1}),
    "load_optimizer_state of a state dict": (
        interop.load_optimizer_state,
        {"state": HANDED, "optimizer": OPTIMIZER.state_dict(), "names": MODULE, "step": 1}),
    "optimizer_state_dict": (
        interop.optimizer_state_dict,
        {"state": interop.load_optimizer_state(HANDED, OPTIMIZER, names=MODULE), "optimizer": OPTIMIZER,
         "names": MODULE},
    ),
}  # fmt: skip


def places(tree, path=()):
    """The paths of everything in a state dict."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutated(source, path, value):
    if not path:
        return value
    copy = dict(source) if isinstance(source, dict) else list(source)
    copy[path[0]] = mutated(copy[path[0]], path[1:], value)
    return copy


def mutations():
    """State dicts with one wrong value each: what is raised is the library's own ValueError or TypeError."""
    made = bad = 0
    source = OPTIMIZER.state_dict()
    for path in places(source):
        for wrong, value in ((wrong, WRONG[wrong]) for wrong in FEW):
            for function in (interop.load_optimizer_state, interop.optimizer_state_dict):
                made += 1
                try:
                    function(HANDED, mutated(source, path, value), names=MODULE)
                except (TypeError, ValueError) as error:
                    if ours(error):
                        continue
                    found = error
                except Exception as error:
                    found = error
                else:
                    continue
                frame = traceback.extract_tb(found.__traceback__)[-1]
                bad += 1
                print(f"{function.__name__}, {path}={wrong}: {type(found).__name__}: {found!s:.150} "
                      f"({frame.filename}:{frame.lineno})")  # fmt: skip
    return made, bad


CHECKPOINTS = {
    "Checkpoints": (opened, {"directory": tempfile.mkdtemp(), "config": None, "keep": 3, "timeout": 600}),
    "Checkpoints.save": (saved, {"step": 1, "state": {"a": X}, "data": None}),
    "Checkpoints.restore": (restored, {"step": 1}),
    "restore_model": (out_of_a_run, {"model": Linear(), "step": 1, "average": False}),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    counts = [run(CALLS, REFUSED), run(OPTIMIZERS | CHECKPOINTS, [], FEW), mutations()]
    made, bad = (sum(column) for column in zip(*counts, strict=True))
    print(f"{made} calls, {bad} complaints")
    sys.exit(int(bad > 0))
