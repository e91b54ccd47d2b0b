"""The command line, `jaxnorm`: checkpoints and models from the shell. One file for each command.

What a command needs besides numpy and jax (typer, rich, matplotlib, torch) is imported when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 where a comparison found a difference, 2 for an error.

    An error is one line on stderr; `--traceback` before the command shows where it came from.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from interop.cli.app import command
    except ImportError as error:
        return _fail(f"the command line needs {error.name}: pip install 'jaxnorm[cli]'")
    try:
        result = command().main(given, prog_name="jaxnorm", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `jaxnorm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--traceback" in given:
            raise
        return _fail(_described(error))


def _described(error: Exception) -> str:
    """The message in one line, for errors that are not worded for users with their kind."""
    if hasattr(error, "format_message"):  # of the command line itself
        return f"{error.format_message()} (see --help)"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    worded = isinstance(error, ValueError | OSError | NotImplementedError | ImportError)
    return text if worded and text else f"{type(error).__name__}: {text}"


def _fail(message: str) -> int:
    line = ""
    for part in filter(None, map(str.strip, message.splitlines())):
        line += part if not line else f" {part}" if line.endswith((":", ",")) else f"; {part}"
    print(f"jaxnorm: {line}", file=sys.stderr)
    return 2
