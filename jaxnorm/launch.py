"""Several processes on this machine, for trying out a program meant for many: `python -m jaxnorm.launch`.

    python -m jaxnorm.launch --processes 2 --devices 4 train.py --steps 100

runs `python train.py --steps 100` twice, with 4 virtual CPU devices each, as one run of 8 devices. The program calls
`jaxnorm.join_processes()` first, and is started as it is on a cluster. Each line of output begins with the number of
the process that wrote it. When a process fails, the others are killed and the launcher says which one failed, and how.
"""

import argparse
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and gives the exit status: 0, or that of the process that failed first."""
    options = _parse(arguments)
    command = [sys.executable, *(["-m"] if options.module else []), options.program, *options.arguments]
    before = signal.signal(signal.SIGTERM, _terminated)
    address = f"127.0.0.1:{_free_port()}"
    ended: queue.Queue[int] = queue.Queue()
    processes: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    try:
        for rank in range(options.processes):
            process = subprocess.Popen(
                command,
                env=_environment(address, rank, options),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            processes.append(process)
            for target in (_forward, _wait):
                threads.append(threading.Thread(target=target, args=(rank, process, ended), daemon=True))
                threads[-1].start()
        for _ in processes:
            rank = ended.get()
            status = processes[rank].returncode
            if status:
                _kill(processes)
                _join(threads)
                print(f"jaxnorm.launch: process {rank} {_ending(status)}; the others were stopped.", file=sys.stderr)
                return status if status > 0 else 128 - status
        _join(threads)
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
        _kill(processes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=_positive, default=2, help="how many (default 2)")
    parser.add_argument("--devices", type=_positive, default=1, help="virtual CPU devices of each (default 1)")
    parser.add_argument("-m", "--module", action="store_true", help="the program is a module, as in python -m")
    parser.add_argument("program", help="a Python file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def _environment(address: str, rank: int, options: argparse.Namespace) -> dict[str, str]:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(rank),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices),
        "XLA_FLAGS": flags.strip(),
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _forward(rank: int, process: subprocess.Popen[str], ended: Any) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            sys.stdout.write(f"[{rank}] {line.rstrip()}\n")  # one write, so that lines of two processes do not mix
            sys.stdout.flush()


def _wait(rank: int, process: subprocess.Popen[str], ended: "queue.Queue[int]") -> None:
    # A thread for each, so that they are reported in the order in which they ended: the first is the cause.
    process.wait()
    ended.put(rank)


def _kill(processes: list[subprocess.Popen[str]]) -> None:
    # Not SIGTERM: JAX's preemption service takes it for a notice, and the process goes on.
    for process in processes:
        process.kill()


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(timeout=5)  # a grandchild may hold the pipe open


def _ending(status: int) -> str:
    if status > 0:
        return f"failed with exit status {status}"
    return f"was killed by signal {-status} ({signal.Signals(-status).name})"


def _terminated(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
