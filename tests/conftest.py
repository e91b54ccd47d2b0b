"""What holds for every test: eight virtual CPU devices, float64, full precision, a torchvision that imports."""

import gc
import os
import pathlib
import sys

# Before jax is imported: the number of devices is read once, when jax starts its backend.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402
import torch  # noqa: E402
import torchvision_cpu  # noqa: E402, F401
from fuzzing import TIMES  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Compilation makes first examples slow. The suite draws the same examples each time, `make fuzz` new ones.
settings.register_profile(
    "jaxnorm",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=100 * TIMES,
    derandomize=TIMES == 1,
    database=None,
    print_blob=True,
)
settings.load_profile("jaxnorm")


@pytest.fixture(autouse=True)
def same_weights():
    """PyTorch's layers start with the same weights in every run, whichever tests came before."""
    torch.manual_seed(0)


def pytest_collection_finish():
    """What is imported by now, and what JAX and PyTorch keep of each compilation, stays for good: the garbage collector
    need not walk through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 100)
