"""docs/coverage.md from the rows of benchmarks/coverage.py: totals, worst differences, the reason of each failure."""

import collections
import json

TOLERANCE, TOLERANCE_FLOAT32 = 1e-8, 1e-4
HEADER = f"""# Coverage

Written by `python benchmarks/coverage.py --report docs/coverage.md` from the rows of its runs. A model passes with eval
outputs, loss, every gradient and every running statistic within {TOLERANCE:g} of PyTorch (relative, norm-wise,
float64), a bit-exact export that loads strictly, and eval outputs within {TOLERANCE_FLOAT32:g} in float32. XLA compiles
with less optimisation than usual (`xla_backend_optimization_level` 0 or 1), since a model takes most of its time in the
compiler.
"""


def read_rows(path):
    """The rows by model; a later row of the same model replaces an earlier one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["model"]: row for row in rows}


def report(rows, names, families, path):
    """Writes the table. `names` are the models that were to run: {name: family}."""
    import importlib.metadata as metadata

    groups = collections.defaultdict(list)
    for row in rows.values():
        groups[row["family"]].append(row)
    versions = ", ".join(
        f"{p} {metadata.version(p)}" for p in ("jax", "flax", "torch", "timm", "torchvision", "ultralytics")
    )
    lines = [HEADER, f"Versions: {versions}. On a CPU, one process for each model.", ""]
    lines += totals(rows, names, families)
    lines += ["", "## By family", "", "| family | pass | models | import s | worst eval | worst gradient |"]
    lines.append("|---|---|---|---|---|---|")
    for family, members in sorted(groups.items()):
        shown = ", ".join(r["model"].split(":")[1] for r in members[:4]) + (" ..." if len(members) > 4 else "")
        seconds = max(r.get("seconds", {}).get("import", 0.0) for r in members)
        worst = [f"{max((r[k] for r in members if k in r), default=float('nan')):.0e}" for k in ("eval", "gradients")]
        passed = f"{sum(r['ok'] for r in members)} of {len(members)}"
        lines.append(f"| {family} | {passed} | {shown} | {seconds:.0f} | {worst[0]} | {worst[1]} |")
    failed = [r for r in rows.values() if not r["ok"]]
    lines += ["", "## Failures", ""] + ([] if failed else ["None."])
    for row in sorted(failed, key=lambda r: r["model"]):
        reason = " ".join(row.get("reason", "").split())[:400].replace("|", "\\|")
        lines.append(f"- `{row['model']}` ({row['stage']}): {reason}")
    missing = sorted(set(names) - set(rows))
    if missing:
        lines += ["", "## Not run", "", ", ".join(f"`{name}`" for name in missing) + "."]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def totals(rows, names, families):
    """A line for each group of models."""
    from coverage_models import smallest_of_each

    smallest = smallest_of_each(families)
    others = [n for n in names if n.startswith("timm:") and n not in smallest]
    groups = {"timm, smallest of each family": list(smallest), "timm, drawn at random up to 100 M parameters": others}
    for name, family in names.items():
        if not name.startswith("timm:"):
            groups.setdefault(family, []).append(name)
    lines = ["| models | to run | run | pass | fail |", "|---|---|---|---|---|"]
    for group, members in groups.items():
        ran = [rows[n] for n in members if n in rows]
        passed = sum(r["ok"] for r in ran)
        if members:
            lines.append(f"| {group} | {len(members)} | {len(ran)} | {passed} | {len(ran) - passed} |")
    beyond = [r for n, r in rows.items() if n not in names]
    if beyond:
        passed = sum(r["ok"] for r in beyond)
        lines.append(f"| others that were tried | {len(beyond)} | {len(beyond)} | {passed} | {len(beyond) - passed} |")
    return lines
