"""One of the two processes of test_processes.py: `python processes_worker.py PORT RANK FOLDER`."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_processes import batch

import jaxnorm


def main(port: str, rank: int, folder: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    own = slice(4 * rank, 4 * rank + 4)  # each process brings its own half of the data
    x, dy = (jax.make_array_from_process_local_data(NamedSharding(mesh, P("batch")), a[own]) for a in batch())

    def step(x, dy, axis_name):
        def forward(x):
            y, moments = jaxnorm.batch_norm(x, axis_name=axis_name)
            return y, (moments.mean, moments.variance(correction=1))

        y, vjp, statistics = jax.vjp(forward, x, has_aux=True)
        return y, vjp(dy)[0], *statistics

    mapped = jax.shard_map(
        lambda x, dy: step(x, dy, "batch"), mesh=mesh, in_specs=P("batch"), out_specs=(P("batch"), P("batch"), P(), P())
    )
    shardings = tuple(NamedSharding(mesh, spec) for spec in (P("batch"), P("batch"), P(), P()))
    for how, run in {"shard_map": mapped, "jit": lambda x, dy: step(x, dy, None)}.items():
        found = jax.jit(run, out_shardings=shardings)(x, dy)
        local = {
            name: np.concatenate([s.data for s in sorted(a.addressable_shards, key=lambda s: s.device.id)])
            if name in ("y", "dx")
            else np.asarray(a.addressable_data(0))
            for name, a in zip(("y", "dx", "mean", "variance"), found, strict=True)
        }
        np.savez(f"{folder}/{how}{rank}.npz", **local)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
