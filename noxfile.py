"""The suite with other versions than those of constraints.txt, each lane in an environment of its own under .nox.

    make lowest         Python 3.11 and the floors of pyproject.toml
    make newest-torch   Python 3.11, the newest torch there is for it, and the newest of all else
    make newest         the newest Python at hand and the newest releases

    make release-check  sdist and wheel, and what the wheel alone does in a fresh environment, with each extra

An environment is kept, and every run makes it again what its lane asks for: what has a newer release is replaced, what
is no longer asked for is removed. lanes.py runs the tests and reports the versions.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

import nox

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

FLOOR = "3.11"
NEWEST_TORCH = ("torch==2.14.1", "torchvision==0.29.1")

# Not installed: ultralytics' opencv-python, whose files are those of opencv-python-headless over again, but for windows
# and the libraries that these need; and what only makes lanes.
LEFT_OUT = ("opencv-python", "nox", "uv")
# Caps that a user may have set for other work.
CAPS = {"UV_CONSTRAINT": None, "UV_OVERRIDE": None, "UV_EXCLUDE_NEWER": None}


def newest_python() -> tuple[str, str]:
    """The path and version of the newest released Python of this machine, from 3.12 on.

    Looks for python3.X on PATH and in pyenv's versions, and asks each for its version: a shim of pyenv for a version
    that is not active does not run. Where there is none, ("3.12", "3.12"): nox has uv fetch it.
    """
    folders = [pathlib.Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
    found = [path for folder in folders for path in sorted(folder.glob("python3.*"))]
    found += sorted(pyenv.glob("versions/*/bin/python3.*"))
    question = (
        "import sys, sysconfig; v = sys.version_info; print(*v[:3]) if v.releaselevel == 'final' and "
        "sys.implementation.name == 'cpython' and not sysconfig.get_config_var('Py_GIL_DISABLED') else sys.exit(1)"
    )
    best: tuple[tuple[int, ...], str] = ((3, 12), "3.12")
    for path in found:
        minor = re.fullmatch(r"python3\.(\d+)", path.name)
        if minor is None or int(minor[1]) < 12:
            continue
        try:
            answer = subprocess.run([path, "-c", question], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0:
            version = tuple(map(int, answer.stdout.split()))
            best = max(best, (version, str(path)), key=lambda python: python[0])
    return best[1], ".".join(map(str, best[0]))


def is_of(lane: str, python: str) -> bool:
    """Whether the lane's environment, if there is one, is of this version of Python; if not, it is made anew."""
    settings = pathlib.Path(".nox", lane, "pyvenv.cfg")
    lines = settings.read_text(encoding="utf-8").splitlines() if settings.exists() else []
    found = next((line.partition("=")[2].strip() for line in lines if line.startswith("version_info")), "")
    return f"{found}.".startswith(f"{python}.")


PATH, NEWEST = newest_python()
PYTHONS = {"lowest": FLOOR, "newest-torch": FLOOR, "newest": NEWEST}
KEPT = {lane: is_of(lane, python) for lane, python in PYTHONS.items()}


def run(session: nox.Session, *wanted: str) -> None:
    """Installs the package with what a developer needs, and runs the suite.

    --upgrade sets aside what a kept environment has, but also fetches again what uv has in its cache: a new environment
    does without.
    """
    upgrade = ["--upgrade"] if KEPT[session.name] else []
    with tempfile.TemporaryDirectory() as folder:
        left_out = pathlib.Path(folder, "left_out.txt")
        left_out.write_text("\n".join(LEFT_OUT), encoding="utf-8")
        session.install(*upgrade, "--exact", "--excludes", str(left_out), *wanted, "-e", ".[dev]", env=CAPS)
    session.run("python", "lanes.py", session.name, *session.posargs)


@nox.session(python=FLOOR, reuse_venv=KEPT["lowest"])
def lowest(session: nox.Session) -> None:
    """Python 3.11 and the floors of pyproject.toml."""
    run(session, "--resolution", "lowest-direct")


@nox.session(name="newest-torch", python=FLOOR, reuse_venv=KEPT["newest-torch"])
def newest_torch(session: nox.Session) -> None:
    """Python 3.11, torch 2.14.1, and the newest releases of all else."""
    run(session, *NEWEST_TORCH)


@nox.session(python=PATH, reuse_venv=KEPT["newest"])
def newest(session: nox.Session) -> None:
    """The newest Python at hand and the newest releases, without caps."""
    run(session)


def contents(wheel: pathlib.Path) -> dict[str, bytes]:
    """A wheel's files."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@nox.session(name="release-check", venv_backend="none")
def release_check(session: nox.Session) -> None:
    """Builds sdist and wheel, and tries the wheel with each extra that needs no accelerator."""
    uv = (sys.executable, "-m", "uv")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        session.run(*uv, "build", "--quiet", "--out-dir", str(folder / "dist"))  # the wheel out of the sdist
        session.run(*uv, "build", "--quiet", "--wheel", "--out-dir", str(folder / "tree"))
        (wheel,) = (folder / "dist").glob("*.whl")
        (of_tree,) = (folder / "tree").glob("*.whl")
        if contents(wheel) != contents(of_tree):
            session.error("the wheel that the sdist makes is not the wheel that the tree makes")
        session.run(*uv, "tool", "run", "twine", "check", "--strict", *map(str, (folder / "dist").glob("jaxnorm-*")))
        for extra in ("", "torch", "cli", "pod", "hub"):
            environment = folder / (extra or "alone")
            session.run(sys.executable, "-m", "venv", str(environment))
            python = str(environment / "bin" / "python")
            wanted = f"{wheel}[{extra}]" if extra else str(wheel)
            session.run(
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "-c",
                "constraints.txt",
                wanted,
            )
            session.run(python, "tests/wheel_check.py", extra)
            shutil.rmtree(environment)
