"""The house: which room may use which, and no circle between rooms or files. CONTRIBUTING.md has the picture."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "interop"
# The files outside the rooms, from the bottom; everything may use them. The door (`interop` itself) uses everything.
SHARED = ("errors", "dtypes", "arrays", "conventions", "variables")
DOOR = ("__init__", "_clash", "_flax_source", "_from_torch")
USES = {
    "program": set(),
    "ops": {"program"},
    "tracing": {"program", "ops"},
    "files": set(),
    "running": {"program", "ops", "files"},
    "weights": {"program", "files"},
    "optimizers": {"program", "weights"},
    "linting": {"files", "weights"},
    "comparing": {"program", "running", "weights"},
    "porting": {"program", "ops", "running", "weights", "tracing"},
    "cli": {
        "the door",
        "program",
        "ops",
        "running",
        "tracing",
        "files",
        "weights",
        "optimizers",
        "linting",
        "comparing",
        "porting",
    },
}


def module_of(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def room_of(module):
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in USES:
        return parts[1]
    return "shared" if len(parts) > 1 and parts[1] in SHARED else "the door"


def imports(tree):
    """(line, module) of everything of interop that is imported, anywhere in the file but for annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else node.module


def arrows():
    for module, path in MODULES.items():
        for line, target in imports(ast.parse(path.read_text())):
            if target.split(".")[0] == "interop" and target != module:
                yield module, target, f"{path.relative_to(ROOT.parent)}:{line} imports {target}"


def test_rooms_use_only_those_below_them():
    wrong = []
    for module, target, shown in arrows():
        here, there = room_of(module), room_of(target)
        allowed = here == "the door" or there in (here, "shared") or there in USES.get(here, ())
        if here == "shared":
            allowed = there == "shared" and SHARED.index(target.split(".")[1]) < SHARED.index(module.split(".")[1])
        wrong += [] if allowed else [shown]
    assert wrong == []


def test_there_is_no_circle_between_files():
    uses = {}
    for module, target, _ in arrows():
        if room_of(module) != "the door" and room_of(target) != "the door":
            uses.setdefault(module, set()).add(target)
    done, path = set(), []

    def walk(module):
        if module in path:
            pytest.fail("a circle: " + " -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for target in sorted(uses.get(module, ())):
                walk(target)
            done.add(path.pop())

    for module in MODULES:
        walk(module)


def test_nothing_but_the_shared_files_is_outside_a_room():
    assert {path.stem for path in ROOT.glob("*.py")} == {*SHARED, *DOOR}
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*USES}


def test_torch_is_imported_at_the_top_in_tracing_alone():
    for module, path in MODULES.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        torch = {name for name in names if name.split(".")[0] == "torch"}
        assert not torch or room_of(module) == "tracing", f"{module} imports {torch} at its top"
    program = "import interop, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_room_knows_no_library_that_is_not_its_business():
    for module, path in MODULES.items():
        if room_of(module) == "program":
            names = {target.split(".")[0] for _, target in imports(ast.parse(path.read_text()))}
            assert not names & {"torch", "jax", "flax", "numpy"}, module


PUBLIC = """
Buffer Checkpoint CheckpointError Comparison Constant Finding Frozen LayerDifference Plateau PortError ProgramError
Suggestion TraceError TracedModule apply_config compare config features first_epoch flax_source freeze from_torch
layouts lint load load_checkpoint load_config load_optimizer_state load_state_dict optax_from_torch
optimizer_state_dict plateau_from_torch register save save_checkpoint schedule_from_torch state_dict suggest_rename
to_torch unfreeze
"""


def test_public_names():
    import interop

    assert sorted(interop.__all__) == PUBLIC.split()
    assert all(hasattr(interop, name) for name in interop.__all__)
