"""Two processes of two devices each give the numbers of one device: statistics, outputs, gradients."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm

WORKER = pathlib.Path(__file__).parent / "processes_worker.py"


def batch():
    x, dy = np.random.default_rng(0).standard_normal((2, 8, 3, 5)) * 2 + 1
    return x, dy


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one_device(tmp_path):
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), port, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=240)
            assert worker.returncode == 0, output.decode()
    finally:
        for worker in workers:  # the one that is left, if the other failed
            worker.kill()
            worker.communicate()
    x, dy = map(jnp.asarray, batch())

    def forward(x):
        y, moments = jaxnorm.batch_norm(x)
        return y, (moments.mean, moments.variance(correction=1))

    y, vjp, (mean, variance) = jax.vjp(forward, x, has_aux=True)
    for how in ("jit", "shard_map"):
        parts = [np.load(tmp_path / f"{how}{rank}.npz") for rank in range(2)]
        for name, whole in (("y", y), ("dx", vjp(dy)[0])):
            np.testing.assert_allclose(
                np.concatenate([p[name] for p in parts]), whole, rtol=1e-10, atol=1e-10, err_msg=f"{how} {name}"
            )
        for part in parts:
            np.testing.assert_allclose(part["mean"], mean, rtol=1e-10)
            np.testing.assert_allclose(part["variance"], variance, rtol=1e-10)
