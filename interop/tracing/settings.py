"""What is set for the whole process: random states, and the switches of PyTorch and NumPy that code may turn."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch


class Setting(NamedTuple):
    """One thing that is set, as it was."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    found: Any

    def restore(self) -> None:
        """Sets it to what it was, where it is something else now."""
        if not _same(self.read(), self.found):
            self.write(self.found)


def settings() -> list[Setting]:
    """All of them as they are now."""
    return [Setting(name, read, write, read()) for name, read, write in _known()]


def random_states() -> dict[str, Any]:
    """Python's and NumPy's, by the names of their modules."""
    return {"random": random.getstate(), "numpy.random": _numpy_state()}


def _numpy_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return (state[0], state[1].tobytes(), *state[2:])


def _set_numpy_state(state: Any) -> None:
    np.random.set_state((state[0], np.frombuffer(state[1], np.uint32), *state[2:]))


def _known() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    yield "random", random.getstate, random.setstate
    yield "numpy.random", _numpy_state, _set_numpy_state
    yield "torch.random", torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield "torch.cuda.random", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    yield "default dtype", torch.get_default_dtype, torch.set_default_dtype
    yield "default device", torch.get_default_device, _set_default_device
    yield "gradients", torch.is_grad_enabled, torch.autograd.set_grad_enabled
    for device in ("cpu", "cuda"):
        for what in ("enabled", "dtype"):
            read = getattr(torch, f"is_autocast_{what}" if what == "enabled" else f"get_autocast_{what}")
            write = getattr(torch, f"set_autocast_{what}")
            yield f"autocast {what} on {device}", partial(read, device), partial(write, device)
    yield "autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    yield (
        "deterministic algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda state: torch.use_deterministic_algorithms(state[0], warn_only=state[1]),
    )
    yield (
        "anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda state: torch.autograd.set_detect_anomaly(*state),
    )
    yield "matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield "threads", torch.get_num_threads, torch.set_num_threads
    for backend, names in (("cudnn", ("enabled", "benchmark", "deterministic")), ("mkldnn", ("enabled",))):
        owner = getattr(torch.backends, backend)
        for name in names:
            yield f"{backend}.{name}", partial(getattr, owner, name), partial(setattr, owner, name)
    yield "numpy errors", np.geterr, lambda state: np.seterr(**state)
    yield "numpy printing", np.get_printoptions, lambda state: np.set_printoptions(**state)
    yield "recursion limit", sys.getrecursionlimit, sys.setrecursionlimit


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
