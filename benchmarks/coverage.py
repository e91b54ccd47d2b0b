"""Which PyTorch models import, and whether they then compute what PyTorch computes.

    python benchmarks/coverage.py                                # the smallest model of each family of each library
    python benchmarks/coverage.py --models 'timm:resnet*'        # whatever matches
    python benchmarks/coverage.py --random 150 --seed 0          # so many other models of timm up to 100 M parameters
    python benchmarks/coverage.py --report docs/coverage.md      # only the table, from the rows there are

Each model runs in a process of its own, in float64, with randomised weights (running statistics and affine parameters
included), dropout and stochastic depth off, at the smallest input that it takes: import, eval outputs, one training
step (loss, every gradient, every running statistic), export, strict load by PyTorch, and eval outputs in float32. A
row of JSON for each; models that have a row are not run again.
"""

import argparse
import collections
import concurrent.futures
import copy
import fnmatch
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOLERANCE, TOLERANCE_FLOAT32 = 1e-8, 1e-4
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)

ULTRALYTICS = {
    "detect": ("yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"),
    "segment": ("yolov8n-seg", "yolo11n-seg"),
    "pose": ("yolov8n-pose", "yolo11n-pose"),
    "classify": ("yolov8n-cls", "yolo11n-cls"),
}
TORCHVISION_FAMILIES = {
    "classification": [
        *(
            "alexnet",
            "convnext_tiny",
            "densenet121",
            "efficientnet_b0",
            "efficientnet_v2_s",
            "googlenet",
            "inception_v3",
        ),
        *(
            "maxvit_t",
            "mnasnet0_5",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "regnet_x_400mf",
            "regnet_y_400mf",
            "resnet18",
        ),
        *(
            "resnet18",
            "resnext50_32x4d",
            "shufflenet_v2_x0_5",
            "squeezenet1_1",
            "swin_t",
            "swin_v2_t",
            "vgg11_bn",
            "vit_b_32",
        ),
        "wide_resnet50_2",
    ],
    "segmentation": [
        *("segmentation.lraspp_mobilenet_v3_large", "segmentation.deeplabv3_mobilenet_v3_large"),
        "segmentation.fcn_resnet50",
    ],
    "video": [f"video.{name}" for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v2_s", "swin3d_t")],
    "detection backbones": ["backbone.resnet18_fpn", "backbone.mobilenet_v3_large_fpn"],
}


def build(name):
    """The module, and the shapes of input to try, smallest first."""
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        module = timm.create_model(model)
        channels, *default = (getattr(module, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
        return module, [*((channels, n, n) for n in SIZES if n < default[0]), (channels, *default)]
    if library == "torchvision":
        import torchvision

        kind, _, short = model.rpartition(".")
        if kind == "backbone":
            detection = torchvision.models.detection.backbone_utils
            if short.startswith("mobilenet"):
                return detection.mobilenet_backbone("mobilenet_v3_large", weights=None, fpn=True), [(3, 64, 64)]
            return detection.resnet_fpn_backbone(backbone_name="resnet18", weights=None), [(3, 64, 64)]
        keywords = {"weights_backbone": None} if kind == "segmentation" else {}
        if short in ("googlenet", "inception_v3"):
            keywords["init_weights"] = True
        module = torchvision.models.get_model(short, weights=None, **keywords)
        if kind == "video":
            return module, [(3, 16, n, n) for n in (64, 112, 224)]
        return module, [(3, n, n) for n in (*SIZES[:7], 299, 320)]
    from ultralytics.nn import tasks

    kind = next(kind for kind, names in ULTRALYTICS.items() if model in names)
    classes = {
        "detect": "DetectionModel",
        "segment": "SegmentationModel",
        "pose": "PoseModel",
        "classify": "ClassificationModel",
    }
    return getattr(tasks, classes[kind])(f"{model}.yaml", verbose=False), [(3, 64, 64)]


def prepared(module, torch):
    """In float64, every constant parameter shaken, running statistics random, everything random off."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(uniform(parameter, -0.3, 0.3))
        for layer in module.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
                layer.running_mean.copy_(uniform(layer.running_mean, -0.3, 0.3))
                layer.running_var.copy_(uniform(layer.running_var, 0.5, 1.5))
            if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
                layer.p = 0.0
            for attribute in ("drop_prob", "drop_path_rate", "p_stochastic_depth", "stochastic_depth_prob"):
                if isinstance(getattr(layer, attribute, None), float):
                    setattr(layer, attribute, 0.0)
            if type(layer).__name__ == "StochasticDepth":
                layer.p = 0.0
    return module


def smallest_input(module, shapes, batch, torch):
    """The first shape that the module takes in both modes, and what it said of the others."""
    error = None
    for shape in shapes:
        try:
            with torch.no_grad():
                for mode in (True, False):
                    module.train(mode)
                    module(torch.zeros(batch, *shape, dtype=torch.float64))
            return shape
        except Exception as problem:
            error = problem
    raise RuntimeError(f"the module takes none of the inputs tried: {error}")


def measure(name):
    """One row: what was found for one model."""
    sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    import numpy as np
    import parity_tools as tools
    import torch
    import torchvision_cpu  # noqa: F401  torchvision beside a CPU build of torch

    import interop

    row = {"model": name, "stage": "build", "ok": False}
    watch = Watch(row)
    try:
        module, shapes = build(name)
        row["parameters"] = sum(p.numel() for p in module.parameters())
        module = prepared(module, torch)
        initial = copy.deepcopy(module.state_dict())
        batch = 2 if name.startswith("torchvision:video") else 4
        shape = smallest_input(module, shapes, batch, torch)
        module.load_state_dict(initial)
        row["input"] = [batch, *shape]
        row["batch_norms"] = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())
        images = tools.normal(batch, *shape)
        module.train()

        watch.start("import")
        model = interop.from_torch(module, images)
        watch.start("export")
        exported = interop.state_dict(model)
        expected = module.state_dict()
        assert list(exported) == list(expected), "the names differ"
        for key, value in expected.items():
            assert exported[key].tobytes() == value.numpy().tobytes(), f"{key} differs"
        for key, value in exported.items():
            expected[key] = torch.from_numpy(np.array(value))
        module.load_state_dict(
            expected, strict=True
        )  # a state dict with the versions of its layers, which some ask for

        watch.start("eval")
        module.eval(), model.eval()
        row["eval"] = compare(tools, module, model, images, torch)
        assert row["eval"] < TOLERANCE, f"eval outputs differ by {row['eval']:.1e}"

        watch.start("train")
        module.train(), model.train()
        found, wanted = tools.jax_step(model, tools.to_jax(images)), tools.torch_step(module, images)
        row |= differences(found, wanted, tools, np)
        for key in ("loss", "gradients", "statistics"):
            assert row[key] < TOLERANCE, f"{key} differ by {row[key]:.1e}" + (
                f", {row['worst']}" if key == "gradients" else ""
            )

        watch.start("float32")
        module = module.float().eval()
        single = interop.from_torch(module, images.float())
        row["eval32"] = compare(tools, module, single, images.float(), torch)
        assert row["eval32"] < TOLERANCE_FLOAT32, f"eval outputs in float32 differ by {row['eval32']:.1e}"
        row |= {"stage": "done", "ok": True}
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {error}"[:2000]
        row["trace"] = traceback.format_exc()[-3000:]
    watch.stop()
    row["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


class Watch:
    """Seconds for each stage."""

    def __init__(self, row):
        self.row, self.stage, self.since = row, None, 0.0
        row["seconds"] = {}

    def start(self, stage):
        self.stop()
        self.row["stage"] = self.stage = stage
        self.since = time.perf_counter()

    def stop(self):
        if self.stage is not None:
            self.row["seconds"][self.stage] = round(time.perf_counter() - self.since, 2)
        self.stage = None


def compare(tools, module, model, images, torch):
    with torch.no_grad():
        expected = tools.flat(module(images))
    found = tools.flat(tools.jax_eval(model, tools.to_jax(images)))
    assert len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}"
    return max(float(tools.relative(a, b)) for a, b in zip(found, expected, strict=True))


def differences(found, wanted, tools, np):
    floor = 1e-3 * float(np.median([np.linalg.norm(g) for g in wanted.grads.values()]))
    gradients = {key: float(tools.relative(found.grads[key], g, floor)) for key, g in wanted.grads.items()}
    worst = max(gradients, key=gradients.get)
    statistics = [float(tools.relative(found.state[key], value)) for key, value in wanted.state.items()]
    return {
        "loss": abs(found.loss - wanted.loss) / max(abs(wanted.loss), 1e-300),
        "gradients": gradients[worst],
        "worst": worst,
        "statistics": max(statistics, default=0.0),
    }


def timm_families(cache):
    """{family: {model: parameters}}; counted once, on the meta device, and kept."""
    if cache.exists():
        return json.loads(cache.read_text())
    code = (
        "import torchvision_cpu, timm, torch, json, sys\n"
        "sizes = {}\n"
        "for family in timm.list_modules():\n"
        "    for name in timm.list_models(module=family):\n"
        "        try:\n"
        "            with torch.device('meta'): module = timm.create_model(name)\n"
        "            sizes.setdefault(family, {})[name] = sum(p.numel() for p in module.parameters())\n"
        "        except Exception: pass\n"
        "json.dump(sizes, open(sys.argv[1], 'w'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(cache)], check=True, cwd=ROOT / "examples")
    return json.loads(cache.read_text())


def chosen(arguments, families):
    """{name: family} of the models to run."""
    smallest = {f"timm:{min(models, key=models.get)}": f"timm {family}" for family, models in families.items()}
    everything = {f"timm:{model}": f"timm {family}" for family, models in families.items() for model in models}
    others = {f"torchvision:{m}": f"torchvision {f}" for f, models in TORCHVISION_FAMILIES.items() for m in models}
    others |= {f"ultralytics:{m}": f"ultralytics {f}" for f, models in ULTRALYTICS.items() for m in models}
    names = smallest | others
    if arguments.models:
        return {n: f for n, f in (everything | others).items() if any(fnmatch.fnmatch(n, p) for p in arguments.models)}
    if arguments.random:
        sizes = {f"timm:{m}": n for models in families.values() for m, n in models.items()}
        pool = sorted(n for n in everything if n not in smallest and sizes[n] <= 100e6)
        names |= {
            n: everything[n] for n in random.Random(arguments.seed).sample(pool, min(arguments.random, len(pool)))
        }
    return names


def run_one(name, family, timeout):
    """The row of a process of its own, also if it is killed."""
    command = [sys.executable, __file__, "--one", name]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        row = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row = {"model": name, "ok": False, "stage": "time", "reason": f"took longer than {timeout} s"}
    except (ValueError, IndexError):
        row = {
            "model": name,
            "ok": False,
            "stage": "process",
            "reason": f"exit {done.returncode}: {done.stderr[-300:]}",
        }
    return {**row, "family": family, "wall": round(time.perf_counter() - started, 1)}


def read_rows(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["model"]: row for row in rows}


def report(rows, path, families):
    """The table: totals by library and family, the worst numbers, and the reason for each failure."""
    import importlib.metadata as metadata

    groups = collections.defaultdict(list)
    for row in rows.values():
        groups[row["family"]].append(row)
    versions = ", ".join(
        f"{p} {metadata.version(p)}" for p in ("jax", "flax", "torch", "timm", "torchvision", "ultralytics")
    )
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/coverage.py --report docs/coverage.md` from the rows of its runs. A model",
        f"passes with eval outputs, loss, every gradient and every running statistic within {TOLERANCE:g} of PyTorch",
        "(relative, norm-wise, float64), a bit-exact export that loads strictly, and eval outputs within",
        f"{TOLERANCE_FLOAT32:g} in float32.",
        "",
        "Only the models listed below have run so far; `benchmarks/coverage.py` goes on where it stopped.",
        "",
        f"Versions: {versions}. One CPU process for each model.",
        "",
        "| library | models run | pass | families run |",
        "|---|---|---|---|",
    ]
    for library in ("timm", "torchvision", "ultralytics"):
        mine = [r for r in rows.values() if r["model"].startswith(library)]
        ran = {r["family"] for r in mine}
        total = f"{len(ran)} of {len(families)}" if library == "timm" else f"{len(ran)}"
        lines.append(f"| {library} | {len(mine)} | {sum(r['ok'] for r in mine)} | {total} |")
    lines += ["", "## By family", "", "| family | pass | models | import s | worst eval | worst gradient |"]
    lines.append("|---|---|---|---|---|---|")
    for family, members in sorted(groups.items()):
        names = ", ".join(r["model"].split(":")[1] for r in members[:4]) + (" ..." if len(members) > 4 else "")
        seconds = max(r.get("seconds", {}).get("import", 0.0) for r in members)
        worst = [f"{max((r[k] for r in members if k in r), default=float('nan')):.0e}" for k in ("eval", "gradients")]
        passed = f"{sum(r['ok'] for r in members)} of {len(members)}"
        lines.append(f"| {family} | {passed} | {names} | {seconds:.0f} | {worst[0]} | {worst[1]} |")
    failed = [r for r in rows.values() if not r["ok"]]
    lines += ["", "## Failures", ""] + ([] if failed else ["None."])
    for row in sorted(failed, key=lambda r: r["model"]):
        reason = " ".join(row.get("reason", "").split())[:400].replace("|", "\\|")
        lines.append(f"- `{row['model']}` ({row['stage']}): {reason}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="patterns such as 'timm:resnet*'")
    parser.add_argument("--random", type=int, default=0, help="so many further models of timm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds for one model")
    parser.add_argument("--rows", type=pathlib.Path, default=ROOT / "benchmarks" / "out" / "coverage.jsonl")
    parser.add_argument("--again", action="store_true", help="run failed models again")
    parser.add_argument("--report", type=pathlib.Path, help="only write the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    families = timm_families(arguments.rows.with_name("timm_parameters.json"))
    rows = read_rows(arguments.rows)
    if arguments.report:
        report(rows, arguments.report, families)
        return
    names = chosen(arguments, families)
    sizes = {f"timm:{m}": n for models in families.values() for m, n in models.items()}
    todo = [n for n in names if n not in rows or (arguments.again and not rows[n]["ok"])]
    todo.sort(key=lambda n: sizes.get(n, 0))
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [pool.submit(run_one, name, names[name], arguments.timeout) for name in todo]
        for done, future in enumerate(concurrent.futures.as_completed(runs), 1):
            row = future.result()
            with arguments.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            status = "pass" if row["ok"] else f"FAIL at {row['stage']}: {row['reason'][:160]}"
            print(f"[{done}/{len(todo)}] {row['model']} {row['wall']} s {status}", flush=True)


if __name__ == "__main__":
    main()
