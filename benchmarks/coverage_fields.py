"""Whether models with BatchNorm from other fields than image classification import, and then compute what PyTorch does.

    python benchmarks/coverage_fields.py                               # the models that have no row yet
    python benchmarks/coverage_fields.py --models 'speech:*' --again   # those that match; failed ones once more
    python benchmarks/coverage_fields.py --models speech:crdnn --again --trace     # with the traceback of a failure
    python benchmarks/coverage_fields.py --report docs/coverage_fields.md          # only the table, from the rows

The models are those of benchmarks/fields/, which says how to add one. What is measured, and how, is what
benchmarks/coverage.py measures: in a process of its own, in float64, with randomised weights and running statistics and
dropout off, a model is imported; its state dict comes out bit for bit and PyTorch loads it strictly; eval outputs and
one training step (loss, every gradient, every running statistic) agree; eval outputs agree in float32. The rows, one
line of JSON a model, are committed; beside each difference is its condition: how far PyTorch's own result moves when
every floating number of the inputs moves to a neighbour.
"""

import argparse
import collections
import fnmatch
import importlib.metadata
import json
import pathlib
import resource
import sys
import traceback

import coverage
import coverage_models
import fields
from coverage_table import TOLERANCE, TOLERANCE_FLOAT32, read_rows

OURS = ("fields", "torch", "builtins")  # where classes come from that say nothing of a package
HEADER = f"""# Coverage of other fields

Written by `python benchmarks/coverage_fields.py --report docs/coverage_fields.md` from the rows in
`benchmarks/results/coverage_fields.jsonl`. The models are in `benchmarks/fields/`, a file a field. A model passes with
eval outputs, loss, every gradient and every running statistic within {TOLERANCE:g} of PyTorch (relative, norm-wise,
float64), a bit-exact export that loads strictly, and eval outputs within {TOLERANCE_FLOAT32:g} in float32: what
[coverage.md](coverage.md) asks of image models, measured in the same way.

Models are small instances of their architecture. Those without a package are written here after the source that is
named, as its authors write them; a model that does not import stays in the table.
"""


def measure(name):
    """One row: what was found for one model."""
    import torch

    row = {"model": name, "stage": "build", "ok": False}
    watch = coverage.Watch(row)
    try:
        watch.start("build")
        torch.manual_seed(0)
        with coverage_models.all_in_float64(torch):  # tensors that are no buffers would stay in float32
            module, inputs = fields.listed()[name].build()
        row["parameters"] = sum(p.numel() for p in module.parameters())
        row["packages"] = packages_of(module)
        module = coverage_models.prepare(module, torch)
        row["input"] = [list(x.shape) for x in inputs]
        with torch.compiler.set_stance("force_eager"):  # a compiled submodule computes what it does when it is not
            coverage.check(row, watch, module, inputs)
    except Exception as error:
        row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        row["trace"] = traceback.format_exc()
    watch.stop()
    row["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def packages_of(module):
    """{package: version} of the classes of the module's layers, PyTorch aside."""
    tops = {type(m).__module__.partition(".")[0] for m in module.modules()} - set(OURS)
    known = importlib.metadata.packages_distributions() if tops else {}
    names = {known[top][0] for top in tops if top in known}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def short(value):
    """Numbers with as many digits as a table needs."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    return float(f"{value:.2g}") if isinstance(value, float) and abs(value) < 1e-2 else value


def report(rows, path):
    """Writes the table."""
    known = fields.listed()
    groups = collections.defaultdict(list)
    for name in known:
        groups[known[name].field].append(name)
    ran = [rows[name] for name in known if name in rows]
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "torch")}
    for row in ran:
        versions |= row.get("packages", {})
    lines = [HEADER, f"Versions: {', '.join(f'{p} {v}' for p, v in versions.items())}. On a CPU.", ""]
    lines += ["| field | pass | of | not run |", "|---|---|---|---|"]
    for field, names in sorted(groups.items()):
        found = [rows[n] for n in names if n in rows]
        lines.append(f"| {field} | {sum(r['ok'] for r in found)} | {len(found)} | {len(names) - len(found)} |")
    lines.append(f"| all | {sum(r['ok'] for r in ran)} | {len(ran)} | {len(known) - len(ran)} |")
    lines += ["", "## By model", ""]
    lines.append("| model | source | parameters | BatchNorm | import s | eval | gradients | statistics | |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in sorted(known):
        row = rows.get(name)
        if row is None:
            continue
        figures = [f"{row[key]:.0e}" if key in row else "" for key in ("eval", "gradients", "statistics")]
        seconds = row.get("seconds", {}).get("import")
        size, norms = row.get("parameters"), row.get("batch_norms", "")
        cells = [f"`{name}`", known[name].source, "" if size is None else f"{size:,}", norms]
        cells += [
            "" if seconds is None else f"{seconds:.1f}",
            *figures,
            "pass" if row["ok"] else f"fails: {row['stage']}",
        ]
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    calmed = [f"`{row['model']}`" for row in ran if row.get("calmed")]
    lines += ["", f"With halved scales (see [coverage.md](coverage.md)): {', '.join(calmed)}."] if calmed else []
    failed = [row for row in ran if not row["ok"]]
    lines += ["", "## Failures", ""] + ([] if failed else ["None."])
    for row in sorted(failed, key=lambda r: r["model"]):
        lines.append(f"- `{row['model']}` ({row['stage']}): {' '.join(row.get('reason', '').split())}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["*"], help="patterns such as 'speech:*'")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, default=300, help="seconds of processor time for one model")
    parser.add_argument("--rows", type=pathlib.Path, default=coverage.ROOT / "benchmarks/results/coverage_fields.jsonl")
    parser.add_argument("--again", action="store_true", help="run failed models again")
    parser.add_argument("--trace", action="store_true", help="print the traceback of each failure")
    parser.add_argument("--report", type=pathlib.Path, help="only write the table")
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    if arguments.report:
        report(rows, arguments.report)
        return
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    names = [n for n in fields.listed() if any(fnmatch.fnmatch(n, p) for p in arguments.models)]
    todo = [n for n in names if n not in rows or (arguments.again and not rows[n]["ok"])]
    coverage.ready()
    for done, row in enumerate(coverage.rows_of(todo, arguments.jobs, arguments.limit, measure), 1):
        trace = row.pop("trace", "")
        rows[row["model"]] = short(row)
        arguments.rows.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
        status = "pass" if row["ok"] else f"FAIL at {row['stage']}: {row.get('reason', '')[:300]}"
        print(f"[{done}/{len(todo)}] {row['model']} {row['cpu']} s {status}", flush=True)
        if arguments.trace and trace:
            print(trace, flush=True)


if __name__ == "__main__":
    sys.exit(main())
