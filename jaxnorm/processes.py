"""Many processes as one program: joining them, and stopping where one of them is lost."""

import os
import sys
import threading
from types import TracebackType

import jax

from jaxnorm import _checks as check

_TIMED_OUT = 75  # sysexits.h, EX_TEMPFAIL: trying again may help


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
    shutdown_timeout: int = 300,
) -> int:
    """Makes this process one of the run's, and says how many there are. The first call of a program that uses JAX.

    ```python
    jaxnorm.join_processes()                     # the same line on one host, under SLURM, on GKE, on TPUs
    print(jax.process_index(), jax.process_count(), len(jax.devices()))
    ```

    It is `jax.distributed.initialize`, which knows SLURM, Open MPI, Kubernetes and Cloud TPU, with three additions:

    - Where there is no cluster, the program is one process, and nothing is joined.
    - `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say what JAX cannot find out;
      `python -m jaxnorm.launch` sets them.
    - No process waits for one that is lost, see below.

    **Arguments:**

    - `coordinator_address`, `num_processes`, `process_id`: as `jax.distributed.initialize` has them; from the
      environment or the cluster by default. `num_processes=1` joins nothing.
    - `initialization_timeout`: seconds until all processes must have joined. Then those that are there say so, and
      exit with status 75.
    - `heartbeat_timeout`: seconds without a sign of life after which a process counts as lost. JAX then ends the
      others, with a message that names it. On a CPU, and where process 0 is lost, they notice at once.
    - `shutdown_timeout`: seconds that a process which has finished waits for the others.

    A process that fails with an exception prints it and exits at once with status 1. (By itself JAX would wait at the
    exit until the others are done, while these wait for this one's part of a sum: for `shutdown_timeout` seconds.)
    `sys.exit` is an orderly end, and waits.

    **Returns:** the number of processes, 1 where nothing was joined.

    **Raises:**

    - `TypeError`: for an address that is no text.
    - `ValueError`: for numbers that are none, here or in the environment; where one of the three is given or set and
      the others are neither and cannot be found.
    - `RuntimeError`: in an indexed Kubernetes job whose other pods JAX cannot find, and where JAX was used before.
    """
    if coordinator_address is not None:
        check.instance("coordinator_address", coordinator_address, str, "host:port")
    for name, value, least in (("num_processes", num_processes, 1), ("process_id", process_id, 0)):
        if value is not None:
            check.whole(name, value, least=least)
    seconds = {
        "initialization_timeout": initialization_timeout,
        "heartbeat_timeout": heartbeat_timeout,
        "shutdown_timeout": shutdown_timeout,
    }
    for name, value in seconds.items():
        check.whole(name, value, least=1)
    num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
    process_id = _from_environment("JAX_PROCESS_ID", process_id)
    if num_processes == 1:
        return 1
    asked = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    described = (
        f"process {'?' if process_id is None else process_id} of {'?' if num_processes is None else num_processes}"
    )
    watch = threading.Timer(initialization_timeout, _give_up, (described, asked, initialization_timeout))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # JAX ends the process with a stack trace of C++ when its own time is up; ours comes first, with words.
            initialization_timeout=initialization_timeout + 30,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=shutdown_timeout,
        )
    except ValueError as error:
        given = (coordinator_address, num_processes, process_id, asked)
        if "coordinator_address should be defined" not in str(error) or any(x is not None for x in given):
            raise
        _refuse_lonely_pod()
        return 1
    finally:
        watch.cancel()
    if jax.distributed.is_initialized():
        sys.excepthook = _exit_at_once
    return jax.process_count()


def _from_environment(name: str, value: int | None) -> int | None:
    if value is not None or name not in os.environ:
        return value
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(f"{name} is a number; it is set to {text!r}")
    return int(text)


def _give_up(described: str, address: str | None, seconds: int) -> None:
    print(
        f"jaxnorm.join_processes: {described} has waited {seconds} s, and not all processes have joined "
        f"(coordinator {address or 'found by JAX'}). Did all of them start, with the same number of processes? Can "
        "they reach process 0 at this address? See their output, and initialization_timeout.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(_TIMED_OUT)  # the main thread waits in C++, where no exception reaches it


def _refuse_lonely_pod() -> None:
    """Pods of one job that each run by themselves would write over each other's checkpoints."""
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        raise RuntimeError(
            "this is a pod of an indexed Kubernetes job, and JAX found no way to its other pods: install jax[k8s], "
            "or set JAX_NUM_PROCESSES=1 if each pod is a run of its own"
        )


def _exit_at_once(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, traceback)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
