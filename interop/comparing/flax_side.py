"""A Flax model's run, seen layer by layer: NNX's by probes in a copy, Linen's by an interceptor, imported ones by their
program. And a layer by itself, with other settings than its own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from interop.program.regions import value_of
from interop.running._features import features
from interop.running.module import TracedModule

MISSING = object()


@dataclasses.dataclass
class Seen:
    """What layers were given and gave in one run, by their paths, and the model's outputs."""

    given: dict[str, np.ndarray]
    results: dict[str, np.ndarray]
    outputs: list[np.ndarray]


class NnxModel:
    """An `nnx.Module`, written by hand or imported."""

    def __init__(self, model: nnx.Module) -> None:
        self.model = model

    def run(self, inputs: tuple[Any, ...], paths: Iterable[str], *, training: bool) -> Seen:
        copied = self._copy(training)
        if isinstance(copied, TracedModule):
            return _run_imported(copied, inputs, paths)
        seen = Seen({}, {}, [])
        for path in paths:
            layer = _at(copied, path)
            if path and layer is not None:
                _probe(layer, path, seen)
        seen.outputs = _leaves(copied(*inputs))
        return seen

    def setting(self, path: str, name: str) -> Any:
        return getattr(_at(self.model, path), name, MISSING)

    def kind(self, path: str) -> Any:
        return _at(self.model, path)

    def alone(self, path: str, x: Any, changes: Mapping[str, Any], *, training: bool) -> tuple[Any, dict[str, Any]]:
        """What the layer gives for `x`, with these of its settings changed, and its statistics afterwards."""
        layer = _at(self._copy(training), path)
        for name, value in changes.items():
            if name == "num_groups":  # Flax keeps their size, too
                layer.group_size = layer.group_size * layer.num_groups // value
            setattr(layer, name, value)
        y = layer(x)
        return y, {name: np.asarray(v[...]) for name, v in vars(layer).items() if isinstance(v, nnx.BatchStat)}

    def _copy(self, training: bool) -> nnx.Module:
        copied = nnx.clone(self.model)
        copied.train() if training else copied.eval()
        for _, layer in nnx.iter_graph(copied):
            if isinstance(layer, nnx.Dropout):
                layer.rate = 0.0
        return copied


class LinenModel:
    """Linen's `(module, variables)`."""

    def __init__(self, module: linen.Module, variables: Mapping[str, Any]) -> None:
        self.module, self.variables = module, variables
        self.layers: dict[str, tuple[linen.Module, Mapping[str, Any]]] = {}

    def run(self, inputs: tuple[Any, ...], paths: Iterable[str], *, training: bool) -> Seen:
        wanted, seen = set(paths), Seen({}, {}, [])

        def look(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            layer, path = context.module, ".".join(context.module.path)
            if isinstance(layer, linen.Dropout) and args and context.method_name == "__call__":
                return args[0]
            own = context.method_name == "__call__" and path in wanted and path not in seen.results
            if own:
                self.layers.setdefault(path, (layer.clone(parent=None, name=None), dict(layer.variables)))
            y = call(*args, **kwargs)
            if own and args and isinstance(y, jax.Array):
                seen.given[path], seen.results[path] = np.asarray(args[0]), np.asarray(y)
            return y

        with linen.intercept_methods(look):
            told: Any = _mode(self.module, training)
            y, _ = self.module.apply(self.variables, *inputs, mutable=True, **told)
        seen.outputs = _leaves(y)
        return seen

    def arguments(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        """A call in eval mode by the names of its arguments."""
        names = list(inspect.signature(type(self.module).__call__).parameters)[1:]
        return {**dict(zip(names, inputs, strict=False)), **_mode(self.module, False)}

    def setting(self, path: str, name: str) -> Any:
        return getattr(self.layers[path][0], name, MISSING) if path in self.layers else MISSING

    def kind(self, path: str) -> Any:
        return self.layers[path][0] if path in self.layers else None

    def alone(self, path: str, x: Any, changes: Mapping[str, Any], *, training: bool) -> tuple[Any, dict[str, Any]]:
        layer, variables = self.layers[path]
        if isinstance(layer, linen.BatchNorm):
            changes = {"use_running_average": not training, **changes}
        y, moved = layer.clone(**changes).apply(variables, x, mutable=True)
        return y, {name: np.asarray(value) for name, value in moved.get("batch_stats", {}).items()}


def _run_imported(model: TracedModule, inputs: tuple[Any, ...], paths: Iterable[str]) -> Seen:
    known = []
    for path in paths:
        try:
            for program in (model._interop.model.train, model._interop.model.eval):
                value_of(program, path)
        except ValueError:
            continue
        known.append(path)
    outputs = _leaves(nnx.clone(model)(*inputs))
    results = features(model, known)(*inputs) if known else {}
    return Seen({}, {path: np.asarray(y) for path, y in results.items() if isinstance(y, jax.Array)}, outputs)


def _probe(layer: Any, path: str, seen: Seen) -> None:
    """Makes one module of a copy tell its calls: a subclass of its own, so that no other sees it."""
    cls = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = cls.__call__(self, *args, **kwargs)
        if path not in seen.results and args and isinstance(y, jax.Array):
            seen.given[path], seen.results[path] = np.asarray(args[0]), np.asarray(y)
        return y

    object.__setattr__(layer, "__class__", type(cls.__name__, (cls,), {"__call__": call}))


def _mode(module: linen.Module, training: bool) -> dict[str, bool]:
    """The argument by which a Linen model is told its mode."""
    names = inspect.signature(type(module).__call__).parameters
    told = {"train": training, "training": training, "is_training": training}
    told |= {"deterministic": not training, "use_running_average": not training}
    return {name: value for name, value in told.items() if name in names}


def _at(model: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        if isinstance(model, (list, tuple, nnx.List)) and part.isdecimal():
            model = model[int(part)]
        elif isinstance(model, nnx.Sequential) and part.isdecimal():
            model = model.layers[int(part)]
        elif isinstance(model, Mapping):
            model = model.get(part)
        else:
            model = getattr(model, part, None)
    return model


def _leaves(result: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(result)]
