"""The artifact: a traced model in a directory, for machines without torch.

`program.json` holds the graphs, the layers' flags and the entries of the state (format of `interop.program.nodes`);
`model.safetensors` the arrays by PyTorch's names, constants included. Reading executes nothing but operations looked
up by name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
from flax import nnx

from interop.conventions import torch_momentum
from interop.errors import ProgramError
from interop.files import safetensors_file, strict_json
from interop.files.disk import CheckpointError, Data, replacing
from interop.program.nodes import BatchNormLayer, Entry, Model, decode_model, encode_model
from interop.program.recorded import other_values
from interop.running.batch_norm import TracedBatchNorm
from interop.running.module import TracedModule
from interop.running.places import module_at, variable
from interop.variables import to_numpy

_PROGRAM, _ARRAYS = "program.json", "model.safetensors"


def save(model: nnx.Module, directory: str | os.PathLike[str]) -> None:
    """Writes an imported model as it is now: arrays, each layer's flags, both graphs. Each file is replaced at once,
    the arrays first.

    Axis names (`convert_sync_batchnorm`) and random state belong to a run and are not kept.

    Raises:
        TypeError: for a module that `from_torch` or `load` did not make.
    """
    if not isinstance(model, TracedModule):
        raise TypeError(f"expected a model from interop.from_torch, found {type(model).__name__}")
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    description = _current(model)
    arrays = {e.name: to_numpy(variable(model, e.name)) for e in description.entries if e.same_as is None}
    document = {
        **encode_model(description),
        "training": not model.deterministic,
        "compute_dtype": None if (dtype := model._interop.compute_dtype) is None else dtype.name,
    }
    safetensors_file.write(path / _ARRAYS, arrays, {"format": "pt", "digest": description.digest}, share=False)
    with replacing(path / _PROGRAM) as temporary:
        temporary.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False), encoding="utf-8")


def load(directory: str | os.PathLike[str], rngs: nnx.Rngs | None = None) -> TracedModule:
    """The model that `save` wrote. Needs no torch.

    Raises:
        CheckpointError: for files that are missing, damaged, of another version, or do not belong together;
            everything is checked before the model is built.
        NotImplementedError: for operations that are not registered here.
    """
    path = pathlib.Path(directory)
    document = _document(path / _PROGRAM)
    training, compute_dtype = document.pop("training", None), document.pop("compute_dtype", None)
    if not isinstance(training, bool) or compute_dtype not in (None, "bfloat16", "float16", "float32", "float64"):
        raise CheckpointError(path / _PROGRAM, f"training is {training!r} and compute_dtype {compute_dtype!r}")
    try:
        model = decode_model(document)
    except (ProgramError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(path / _PROGRAM, str(error)) from error
    arrays = _arrays(path / _ARRAYS, model)
    return TracedModule(model, arrays, training=training, rngs=rngs, compute_dtype=compute_dtype)


def _current(module: TracedModule) -> Model:
    """The model's description with the flags, shapes and dtypes of now."""
    model: Model = module._interop.model

    def entry(e: Entry) -> Entry:
        value = to_numpy(variable(module, e.name))
        return dataclasses.replace(e, shape=tuple(value.shape), dtype=value.dtype.name)

    def layer(described: BatchNormLayer) -> BatchNormLayer:
        node = module_at(module, described.path)
        return dataclasses.replace(
            described,
            eps=float(node.epsilon),
            momentum=torch_momentum(node.momentum),
            training=not node.use_running_average,
            frozen=isinstance(node, TracedBatchNorm) and node.frozen,
            counts=not isinstance(node, TracedBatchNorm) or node.counts,
        )

    return dataclasses.replace(
        model, entries=tuple(map(entry, model.entries)), batch_norms=tuple(map(layer, model.batch_norms))
    )


def _document(path: pathlib.Path) -> dict[str, Any]:
    try:
        return strict_json.loads(path.read_bytes(), "the program")
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error


def _arrays(path: pathlib.Path, model: Model) -> dict[str, np.ndarray]:
    data = Data.map(path)
    tensors, metadata = safetensors_file.read(data)
    if metadata.get("digest") != model.digest:
        raise CheckpointError(path, f"belongs to another program than {_PROGRAM} beside it")
    wanted = {e.name: e for e in model.entries if e.same_as is None}
    problems = [f"{name!r} is missing" for name in wanted if name not in tensors]
    problems += [f"{name!r} is not part of the program" for name in tensors if name not in wanted]
    for name, e in wanted.items():
        if name in tensors and (tensors[name].shape, tensors[name].dtype.name) != (e.shape, e.dtype):
            problems.append(
                f"{name!r} is {tensors[name].dtype.name}{tensors[name].shape}, the program says {e.dtype}{e.shape}"
            )
    if problems:
        raise CheckpointError(path, "; ".join(problems))
    arrays = {name: tensors[name].array() for name in wanted}
    if problems := other_values(model, arrays):
        raise CheckpointError(path, "; ".join(problems))
    return arrays
