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

The condition is how far PyTorch's own result moves when each number of the input moves to a neighbour in float64: a
difference of that size says nothing of the import. Running statistics are drawn about those of what each layer is given
in eval mode; where PyTorch's own float32 outputs are then further than {TOLERANCE_FLOAT32 / 5:g} from its float64 ones,
BatchNorm's scales are halved and its biases drawn from -1 to 1 (`calm` in benchmarks/coverage_models.py).
"""
DRAWN_BEFORE = """Under the same tolerances, {count} models were measured with running statistics drawn otherwise: about
those of training, or, those without a condition, without regard to the activations. Models were added over several
versions of the library: a row is of the version of its day.
"""


def read_rows(path):
    """The rows by model; a later row of the same model replaces an earlier one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["model"]: row for row in rows}


def report(rows, peers, names, families, path):
    """Writes the table. `names` are the models that were to run: {name: family}; `peers` are rows of torchax."""
    import importlib.metadata as metadata

    groups = collections.defaultdict(list)
    for row in rows.values():
        groups[row["family"]].append(row)
    versions = ", ".join(
        f"{p} {metadata.version(p)}" for p in ("jax", "flax", "torch", "timm", "torchvision", "ultralytics")
    )
    lines = [HEADER, f"Versions: {versions}. On a CPU, one process for each model.", ""]
    lines += totals(rows, names, families)
    before = sum(row.get("weights", 1) < 3 for row in rows.values() if row["ok"])
    lines += ["", DRAWN_BEFORE.format(count=before).strip()] if before else []
    calmed = sorted(row["model"] for row in rows.values() if row.get("calmed"))
    lines += ["", f"With halved scales: {', '.join(f'`{name}`' for name in calmed)}."] if calmed else []
    lines += ["", "## By family", ""]
    lines += ["| family | pass | models | import s | worst eval | its condition | worst gradient | its condition |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for family, members in sorted(groups.items()):
        shown = ", ".join(r["model"].split(":")[1] for r in members[:4]) + (" ..." if len(members) > 4 else "")
        seconds = max(r.get("seconds", {}).get("import", 0.0) for r in members)
        cells = [cell for key in ("eval", "gradients") for cell in worst(members, key)]
        passed = f"{sum(r['ok'] for r in members)} of {len(members)}"
        lines.append(f"| {family} | {passed} | {shown} | {seconds:.0f} | {' | '.join(cells)} |")
    failed = [r for r in rows.values() if not r["ok"]]
    lines += ["", "## Failures", ""] + ([] if failed else ["None."])
    for row in sorted(failed, key=lambda r: r["model"]):
        reason = " ".join(row.get("reason", "").split())[:400].replace("|", "\\|")
        lines.append(f"- `{row['model']}` ({row['stage']}): {reason}")
    lines += beside(rows, peers)
    missing = sorted(set(names) - set(rows))
    if missing:
        lines += ["", "## Not run", "", ", ".join(f"`{name}`" for name in missing) + "."]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def worst(members, key):
    """The largest difference among the rows, and how well the result is determined in that row."""
    row = max((r for r in members if key in r), key=lambda r: r[key], default={})
    condition = row.get("condition", {}).get(key)
    return f"{row.get(key, float('nan')):.0e}", "" if condition is None else f"{condition:.0e}"


PEER = """## torchax beside it

The same models and inputs in torchax 0.0.13 (`python benchmarks/coverage.py --peer torchax`), from a copy in whose
tables the overloads (`aten.norm.names_dim` and their like) that torch 2.13 no longer has are taken out: without that it
does not import. An export is not asked of it. The weights are the same too, but for the rows marked "other weights",
which were measured here before they were drawn as now.
"""


def beside(rows, peers):
    """The section of the peer: what differs by how much, or why there is nothing to compare."""
    if not peers:
        return []
    both = [(rows[name], peers[name]) for name in sorted(peers) if name in rows]
    lines = ["", *PEER.splitlines(), ""]
    for key, title in (("eval", "eval outputs"), ("gradients", "gradients"), ("statistics", "running statistics")):
        found = [sum(pair[side].get(key, 1) < TOLERANCE for pair in both) for side in (0, 1)]
        lines.append(f"- {title} within {TOLERANCE:g}: here {found[0]}, torchax {found[1]}, of {len(both)} models")
    lines += ["", "| model | | eval | loss | gradients | running statistics | |", "|---|---|---|---|---|---|---|"]
    for ours, theirs in both:
        for title, row in (("here", ours), ("torchax", theirs)):
            keys = ("eval", "loss", "gradients", "statistics")
            cells = [f"{row[k]:.0e}" if k in row else "" for k in keys]
            reason = " ".join(row.get("reason", "").split())[:120].replace("|", "\\|")
            other = row.get("weights") != theirs.get("weights")
            note = "other weights" if other else reason
            lines.append(f"| {row['model']} | {title} | {' | '.join(cells)} | {note} |")
    return lines


def totals(rows, names, families):
    """A line for each group of models."""
    from coverage_models import smallest_of_each

    smallest = smallest_of_each(families)
    others = [n for n in names if n.startswith("timm:") and n not in smallest]
    groups = {"timm, smallest of each family": list(smallest), "timm, drawn at random up to 100 M parameters": others}
    for name, family in names.items():
        if not name.startswith("timm:"):
            groups.setdefault(family, []).append(name)
    lines = ["| models | to run | run | pass | fail | not run |", "|---|---|---|---|---|---|"]
    for group, members in groups.items():
        ran = [rows[n] for n in members if n in rows]
        passed = sum(r["ok"] for r in ran)
        if members:
            counts = len(members), len(ran), passed, len(ran) - passed, len(members) - len(ran)
            lines.append(f"| {group} | {' | '.join(map(str, counts))} |")
    beyond = [r for n, r in rows.items() if n not in names]
    if beyond:
        passed = sum(r["ok"] for r in beyond)
        lines.append(
            f"| others that were tried | {len(beyond)} | {len(beyond)} | {passed} | {len(beyond) - passed} | 0 |"
        )
    return lines
