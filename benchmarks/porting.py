"""Which PyTorch models can be written as Flax source, and how long the source is.

    python benchmarks/porting.py                                 # the smallest model of each of timm's families
    python benchmarks/porting.py timm:resnet50 torchvision:vgg11 # these
    python benchmarks/porting.py --report                        # only the table, from the rows there are

Each model runs in a process of its own at the smallest input that it takes: `interop.flax_source`, which compares what
it has written with PyTorch in float64 before it hands it over. A row of JSON for each; models that have a row are not
run again (`--again` runs those that failed). The families' smallest models are those of docs/coverage.md.
"""

import argparse
import contextlib
import copy
import json
import os
import pathlib
import re
import resource
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]
ROWS = ROOT / "benchmarks" / "results" / "porting.jsonl"
TABLE = ROOT / "docs" / "ported.md"
SIZES = (64, 128, 160, 224, 256)
LIMIT = 900  # seconds for one model


def families():
    """The first model of each of timm's families in docs/coverage.md."""
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| timm \w+ \| \d+ of \d+ \| ([\w.]+)", text, re.MULTILINE)
    return [f"timm:{name}" for name in dict.fromkeys(found)]


def measure(name):
    """The row of one model."""
    import torch

    import interop
    from interop.cli.models import build

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = build(name, {})
    configuration = getattr(module, "pretrained_cfg", {}) or {}
    channels, *_, own = configuration.get("input_size", (3, 224))
    sizes = [own] if configuration.get("fixed_input_size") else [*SIZES, own]
    title = re.sub(r"\W", "_", name.partition(":")[2])
    problem = None
    for size in dict.fromkeys(sizes):
        start = time.perf_counter()
        # BatchNorm of pooled features has one value a channel for each image: two of these say nothing of a gradient.
        example = torch.zeros(8 if size <= 64 else 4 if size <= 160 else 2, channels, size, size)
        try:
            with torch.no_grad():
                copy.deepcopy(module).eval()(example)
        except Exception as error:
            problem = error
            continue
        text = interop.flax_source(module, example, name=title, origin=name)
        doc = text.split('"""')[1]
        parity = {what: float(x) for what, x in re.findall(r"(eval|train|gradients|statistics) (\d\S*e[-+]\d+)", doc)}
        return {
            "model": name, "ok": True, "size": size, "lines": len(text.splitlines()),
            "classes": len(re.findall(r"^class ", text, re.MULTILINE)), **parity,
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
    raise problem


def run(name):
    """The row, from a process of its own."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        os.setpgid(0, 0)
        try:
            row = measure(name)
        except BaseException as error:
            row = {"model": name, "ok": False, "reason": f"{type(error).__name__}: {error}"[:1500]}
        row["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        with os.fdopen(here, "w") as file:
            file.write(json.dumps(row))
        os._exit(0)
    os.close(here)
    with os.fdopen(there) as file:
        text = file.read()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what compares, where the child's time was up
    os.waitpid(child, 0)
    return json.loads(text) if text else {"model": name, "ok": False, "reason": f"more than {LIMIT} s, or no memory"}


def rows():
    """The last row of each model."""
    if not ROWS.exists():
        return {}
    found = (json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines())
    return {row["model"]: row for row in found}


def report():
    """Writes docs/ported.md."""
    import importlib.metadata

    there = rows()
    ours = [there[name] for name in families() if name in there]
    passed = [row for row in ours if row["ok"]]
    named = ("jax", "flax", "torch", "timm")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in named)
    lines = [
        "# Ported",
        "",
        "Written by `python benchmarks/porting.py --report` from the rows of its runs. Each model was written as Flax",
        "source by `interop.flax_source`, which compares it with PyTorch in float64 before it hands it over; the",
        f"differences are relative to the largest value of each array. {versions}. On a CPU.",
        "",
        f"Of timm's {len(families())} families {len(ours)} were run, {len(passed)} passed. The smallest model of each:",
        "",
        "| model | size | lines | classes | eval | train | gradients | statistics |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(there.values(), key=lambda row: (not row["ok"], row["model"])):
        if row["ok"]:
            cells = [row["model"], row["size"], row["lines"], row["classes"]]
            cells += [f"{row.get(key, 0):.0e}" for key in ("eval", "train", "gradients", "statistics")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    failed = [row for row in there.values() if not row["ok"]]
    lines += ["", "Not written:", ""] if failed else []
    lines += [f"- {row['model']}: {' '.join(row['reason'].split())[:300]}" for row in failed]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="library:name")
    parser.add_argument("--again", action="store_true", help="run those that failed, too")
    parser.add_argument("--report", action="store_true", help="only the table")
    options = parser.parse_args()
    if not options.report:
        import torchvision_cpu  # noqa: F401  operator schemas that torchvision lacks beside a PyTorch for CPUs

        import interop  # noqa: F401
        from interop.porting import assembling  # noqa: F401

        there = rows()
        for name in options.models or families():
            if name in there and (there[name]["ok"] or not options.again):
                continue
            row = run(name)
            with open(ROWS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    report()


if __name__ == "__main__":
    main()
