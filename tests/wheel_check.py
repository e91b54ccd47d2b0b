"""What an installed wheel does: `python wheel_check.py EXTRA`, in an environment that has the wheel alone.

`make release-check` runs this file outside the tree, once for each extra; the suite does not collect it.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile


def without_torch():
    """Statistics of two replicas, and a checkpoint there and back."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import interop
    import jaxnorm

    assert "torch" not in sys.modules
    x = jax.random.normal(jax.random.key(0), (2, 8, 3)) * 5 + 100
    norm = functools.partial(jaxnorm.batch_norm, scale=jnp.ones(3), bias=jnp.zeros(3), epsilon=1e-5, axis_name="batch")
    y, _ = jax.vmap(norm, axis_name="batch")(x)
    np.testing.assert_array_equal(jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)).var[...], 1)
    np.testing.assert_allclose(y.reshape(-1, 3).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.reshape(-1, 3).var(0), 1, atol=1e-4)
    for name in ("state.safetensors", "state.pth"):
        interop.save_checkpoint(name, {"weight": jnp.arange(3.0)})
        np.testing.assert_array_equal(interop.load_checkpoint(name)["weight"], np.arange(3.0, dtype=np.float32))
    assert "torch" not in sys.modules


def with_torch():
    """The first snippet of the README, with a model of a few lines."""
    import torch
    from torch import nn

    import interop
    import jaxnorm

    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = interop.from_torch(module, torch.zeros(2, 3, 8, 8))
    model = jaxnorm.convert_sync_batchnorm(model, axis_name="batch")
    interop.save_checkpoint("model.pth", model)
    module.load_state_dict(torch.load("model.pth", weights_only=True), strict=True)


def command():
    for arguments in (["--version"], ["--help"], ["inspect", "state.pth"]):
        subprocess.run([pathlib.Path(sys.executable).with_name("jaxnorm"), *arguments], check=True)


def pod():
    import orbax.checkpoint  # noqa: F401
    from grain import MapDataset

    assert list(MapDataset.range(3)) == [0, 1, 2]


def hub():
    import huggingface_hub  # noqa: F401


CHECKS = {"": (), "torch": (with_torch,), "cli": (with_torch, command), "pod": (pod,), "hub": (hub,)}


def main(extra):
    here = pathlib.Path(__file__).resolve().parent.parent
    import interop
    import jaxnorm

    for package in (interop, jaxnorm):
        assert here not in pathlib.Path(package.__file__).resolve().parents, f"{package} is not the wheel's"
        assert pathlib.Path(package.__file__).with_name("py.typed").exists()
    if extra not in ("torch", "cli"):
        assert importlib.util.find_spec("torch") is None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for check in (without_torch, *CHECKS[extra]):
            check()
        os.chdir(here)
    print(f"jaxnorm {importlib.metadata.version('jaxnorm')}[{extra}]: {len(CHECKS[extra]) + 1} checks")


if __name__ == "__main__":
    main(sys.argv[1])
