"""Runs the suite in the environment of this Python and says what it ran with: `python lanes.py LANE [OPTIONS]`.

The versions that are really installed are printed before the tests and again after them, the counts last. After a whole
run (without OPTIONS, which pytest is given) the lane's row of docs/versions.md is replaced; where CI is set the row is
printed instead. The exit status is pytest's. Only the standard library is needed: `make test` and every environment of
noxfile.py run this file.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

LANES = ("lowest", "locked", "newest-torch", "newest")
TABLE = pathlib.Path(__file__).parent / "docs" / "versions.md"
START, END = "<!-- lanes.py: rows -->\n", "<!-- lanes.py: end -->\n"
# Annotations are checked at run time in the locked lane alone: elsewhere the library runs as it does for its users.
UNCHECKED = ["-o", "addopts=--strict-markers --strict-config"]
# In CI, what hangs on no version is run in the locked lane alone: CI has less than an hour.
ONCE = ["-m", "not once"]
COLUMNS = ("python", "torch", "torchvision", "jax", "flax", "optax", "numpy", "timm", "ultralytics")
OTHERS = ("jaxlib", "ml_dtypes", "orbax-checkpoint", "safetensors", "jaxtyping", "beartype", "hypothesis", "pytest")


def version(package: str) -> str:
    """What is installed here, whatever was asked for; "none" where it is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def print_versions() -> None:
    print("\n".join(f"{package} {version(package)}" for package in COLUMNS + OTHERS), flush=True)


def accepted(flags: list[str]) -> list[str]:
    """Those of the flags that this environment's XLA knows: it ends the process at any other."""

    def starts(some: list[str]) -> bool:
        environment = os.environ | {"XLA_FLAGS": " ".join(some), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    return flags if starts(flags) else [flag for flag in flags if starts([flag])]


def counts(report: pathlib.Path) -> tuple[int, int, int, float]:
    """Passed, failed (errors too), skipped, and seconds, of a JUnit report."""
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{report} has no test suite")
    passed = failed = skipped = 0
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped, float(suite.get("time", "nan"))


def slowest(report: pathlib.Path, most: int = 25) -> list[str]:
    """The files whose tests took longest, of a JUnit report: seconds of all of a file's, and how many they are."""
    seconds: dict[str, list[float]] = {}
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        seconds.setdefault(".".join(case.get("classname", "").split(".")[1:2]), []).append(
            float(case.get("time", "nan"))
        )
    found = sorted(seconds.items(), key=lambda item: -sum(item[1]))[:most]
    return [f"{sum(times):8.1f} s {len(times):5d} tests  {name}" for name, times in found]


def replace_row(text: str, lane: str, row: str) -> str:
    """The page with the lane's row replaced, or put in at its place in LANES; all else stays."""
    head, start, rest = text.partition(START)
    table, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{TABLE} has no lines {START.strip()} and {END.strip()}")
    title, rule, *old = table.strip().splitlines()
    rows = {line.split("|")[1].strip(): line for line in old} | {lane: row}
    ordered = [rows.pop(name) for name in LANES if name in rows]
    return head + start + "\n" + "\n".join([title, rule, *ordered, *rows.values()]) + "\n\n" + end + tail


def main(lane: str, options: list[str]) -> int:
    if lane not in LANES:
        raise SystemExit(f"no lane {lane}: one of {', '.join(LANES)}")
    flags = accepted(os.environ.get("QUICK", "").split())
    environment = os.environ | {"XLA_FLAGS": " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()}
    print_versions()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", f"--junitxml={report}"]
        command += [] if lane == "locked" else UNCHECKED
        command += ONCE if lane != "locked" and "CI" in os.environ and not options else []
        print(f"XLA_FLAGS: {environment['XLA_FLAGS']}", flush=True)
        status = subprocess.run([*command, *options], env=environment, cwd=TABLE.parent.parent).returncode
        print_versions()
        if status not in (0, 1):  # interrupted, or an error outside the tests: what the report holds is not the suite
            print(f"{lane}: the run did not end (pytest's exit status is {status})", flush=True)
            return status
        passed, failed, skipped, seconds = counts(report)
        print("\n".join(slowest(report)))
    shown = f"{passed} ({skipped} skipped)" if skipped else str(passed)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    row = f"| {' | '.join([lane, *map(version, COLUMNS), today, shown, str(failed)])} |"
    if not options and "CI" not in os.environ:
        new = TABLE.with_suffix(".md.new")
        new.write_text(replace_row(TABLE.read_text(encoding="utf-8"), lane, row), encoding="utf-8")
        new.replace(TABLE)
    elif not options:
        print(row)
    parts = [(failed, "failed"), (passed, "passed"), (skipped, "skipped")]
    print(", ".join(f"{n} {name}" for n, name in parts if n or name == "passed"), f"in {seconds:.2f}s", flush=True)
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
