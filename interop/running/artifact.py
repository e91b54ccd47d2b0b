"""The artifact: a traced model in a directory, for machines without torch.

`program.json` holds the graphs, the layers' flags and the entries of the state (format of `interop.program.nodes`);
`model.safetensors` the arrays by PyTorch's names, constants included. Reading executes nothing but operations looked
up by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
from flax import nnx

import jaxnorm
from interop.conventions import torch_momentum
from interop.errors import ProgramError
from interop.files import safetensors_file, strict_json
from interop.files.budget import Budget
from interop.files.disk import CheckpointError, Data, files_in, kind, path_of
from interop.files.replacing import clear, exclusive, put, settle, steady, target, temporary
from interop.program.encoding import decode_model, digest, encode_model
from interop.program.nodes import BatchNormLayer, Entry, Model
from interop.program.recorded import other_values
from interop.running.batch_norm import TracedBatchNorm
from interop.running.module import TracedModule
from interop.running.places import module_at, variable
from interop.running.surgery import replaced_paths
from interop.variables import Frozen, to_numpy

PROGRAM, _ARRAYS = "program.json", "model.safetensors"
_BROKEN = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)  # of a changed program


def save(model: nnx.Module, directory: str | os.PathLike[str]) -> None:
    """Writes an imported model as it is now: arrays, each layer's flags, both graphs. `load` reads it, without torch.

    An older artifact in the directory is replaced by one rename, that of `program.json`, when everything is on the
    disk: after a crash, on a full disk and beside other writers there is one artifact, whole.

    Axis names (`convert_sync_batchnorm`) and random state belong to a run and are not kept.

    **Arguments:**

    - `model`: a model of `from_torch` or `load`.
    - `directory`: the folder, made where it is missing: `program.json` and `model.safetensors`.

    **Raises:**

    - `TypeError`: for a module that `from_torch` or `load` did not make, one of which a layer was replaced, and for a
      path that is none.
    - `interop.CheckpointError`: where the disk refuses.
    """
    if not isinstance(model, TracedModule):
        raise TypeError(f"expected a model from interop.from_torch, found {type(model).__name__}")
    if changed := list(replaced_paths(model, model._interop.model)):
        raise TypeError(
            f"{', '.join(map(repr, changed))} of the model was replaced by a Flax module, of which an artifact has no "
            "program: save its state (interop.save_checkpoint, jaxnorm.Checkpoints), or import the PyTorch module with "
            "that layer replaced"
        )
    path = target(path_of(directory))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(path, f"cannot be a folder: {error.strerror}") from error
    description = _current(model)
    arrays = {e.name: to_numpy(variable(model, e.name)) for e in description.entries if e.same_as is None}
    with temporary(path / _ARRAYS) as new, temporary(path / PROGRAM) as program:
        metadata = {"format": "pt", "digest": digest(description), "save": new.token}
        safetensors_file.write(new.path, arrays, metadata, path / _ARRAYS, share=False)
        settle(new.path)
        document = {
            **encode_model(description),
            "training": not model.deterministic,
            "compute_dtype": None if (dtype := model._interop.compute_dtype) is None else dtype.name,
            "save": new.token,  # of the arrays that belong to it
        }
        program.path.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False), encoding="utf-8")
        with exclusive(path):
            try:
                put(program, path / PROGRAM)
                with contextlib.suppress(OSError):  # they are found under either name
                    put(new, path / _ARRAYS)
            finally:
                new.kept = not program.path.exists()
            clear(path / _ARRAYS)
            clear(path / PROGRAM)


def load(directory: str | os.PathLike[str], rngs: nnx.Rngs | None = None) -> TracedModule:
    """The model that `save` wrote. Needs no torch.

    **Arguments:**

    - `directory`: what `save` was given.
    - `rngs`: the `flax.nnx.Rngs` that dropout and its like draw from; `nnx.Rngs(0)` if None.

    **Returns:** the `TracedModule`, in the mode in which it was saved.

    **Raises:**

    - `interop.CheckpointError`: for files that are missing, damaged, of another version, or do not belong together;
      everything is checked before the model is built.
    - `NotImplementedError`: for operations that are not registered here.
    - `TypeError`: for a path that is none.
    """
    path = path_of(directory)
    model, arrays, training, compute_dtype = steady(path / PROGRAM, lambda: _read(path))
    try:
        return TracedModule(model, arrays, training=training, rngs=rngs, compute_dtype=compute_dtype)
    except NotImplementedError:
        raise
    except _BROKEN as error:
        raise CheckpointError(path / PROGRAM, f"cannot become a model: {_kind(error)}{error}") from error


def _read(path: pathlib.Path) -> tuple[Model, dict[str, np.ndarray], bool, str | None]:
    """The program, its arrays, and the model's mode and compute dtype."""
    size = sum(files_in(path).values()) if kind(path) == "a folder" else 0
    document = _document(Data.map(path / PROGRAM, Budget(path / PROGRAM, size)))
    token = document.pop("save", None)
    if token is not None and not (isinstance(token, str) and re.fullmatch("[0-9a-f]{16}", token)):
        raise CheckpointError(path / PROGRAM, "'save' does not say which arrays belong to it")
    training, compute_dtype = document.pop("training", None), document.pop("compute_dtype", None)
    if not isinstance(training, bool) or compute_dtype not in (None, "bfloat16", "float16", "float32", "float64"):
        raise CheckpointError(path / PROGRAM, f"training is {training!r} and compute_dtype {compute_dtype!r}")
    try:
        model = decode_model(document)
        expected = digest(model)
    except _BROKEN as error:
        raise CheckpointError(path / PROGRAM, f"{_kind(error)}{error}") from error
    return model, _arrays(path, model, expected, token), training, compute_dtype


def _current(module: TracedModule) -> Model:
    """The model's description with the flags, shapes and dtypes of now."""
    model: Model = module._interop.model

    def entry(e: Entry) -> Entry:
        found = variable(module, e.name)
        value = to_numpy(found)
        kind = e.kind
        if kind in ("parameter", "frozen"):
            kind = "frozen" if isinstance(found, Frozen) else "parameter"
        return dataclasses.replace(e, kind=kind, shape=tuple(value.shape), dtype=value.dtype.name)

    def layer(described: BatchNormLayer) -> BatchNormLayer:
        node = module_at(module, described.path)
        return dataclasses.replace(
            described,
            eps=float(node.epsilon),
            momentum=torch_momentum(node.momentum),
            training=not node.use_running_average,
            frozen=isinstance(node, jaxnorm.nnx.FrozenBatchNorm) or (isinstance(node, TracedBatchNorm) and node.frozen),
            counts=not isinstance(node, TracedBatchNorm) or node.counts,
        )

    return dataclasses.replace(
        model, entries=tuple(map(entry, model.entries)), batch_norms=tuple(map(layer, model.batch_norms))
    )


def _document(data: Data) -> dict[str, Any]:
    try:
        return strict_json.loads(data.read(0, data.size), "the program", data.budget)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(data.path, str(error)) from error


def _kind(error: Exception) -> str:
    """The kind of an error whose message was not written for a file."""
    return "" if isinstance(error, ProgramError) else f"{type(error).__name__}: "


def _arrays(folder: pathlib.Path, model: Model, digest: str, token: str | None) -> dict[str, np.ndarray]:
    unnamed = folder / f".{_ARRAYS}.{token}.tmp"  # of a save that was ended between its two renames
    path = unnamed if unnamed.exists() else folder / _ARRAYS
    tensors, metadata = safetensors_file.read(Data.map(path))
    if (metadata.get("digest"), metadata.get("save")) != (digest, token):
        raise CheckpointError(path, f"belongs to another program than {PROGRAM} beside it, or to another save of it")
    wanted = {e.name: e for e in model.entries if e.same_as is None}
    problems = [f"{name!r} is missing" for name in wanted if name not in tensors]
    problems += [f"{name!r} is not part of the program" for name in tensors if name not in wanted]
    for name, e in wanted.items():
        if name in tensors and (tensors[name].shape, tensors[name].dtype.name) != (e.shape, e.dtype):
            problems.append(
                f"{name!r} is {tensors[name].dtype.name}{tensors[name].shape}, the program says {e.dtype}{e.shape}"
            )
        elif name in tensors and (problem := tensors[name].problem()):
            problems.append(f"{name!r}: {problem}")
    if problems:
        raise CheckpointError(path, "; ".join(problems))
    arrays = {name: tensors[name].array() for name in wanted}
    if problems := other_values(model, arrays):
        raise CheckpointError(path, "; ".join(problems))
    return arrays
