"""The documentation holds: its programs run, its commands exist, its links lead somewhere.

What a page takes for granted (a loader, a loss, a model) stands in the file of the page's name under tests/pages, whose
names the page's programs are run with, one after the other. A function `in_SECTION(names)` there is a generator: each
`yield` is one program of that section, so that it can prepare the program before and check after what the page says.
A page without such a file stands alone. New pages are found by themselves.
"""

import ast
import itertools
import pathlib
import runpy
import sys

import jax
import pytest
import torch
from page_reader import ROOT, Block, anchors, links, programs

pytestmark = pytest.mark.once

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if not path.is_relative_to(ROOT / "docs" / "reference") and not path.is_relative_to(ROOT / "docs" / "tutorials")
)
LINKED = sorted({"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}) + sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
)
# Programs that a test of what they do runs: of a page, or of a section.
ELSEWHERE = {
    "docs/changing_models.md": "test_surgery.py::test_the_page_about_changing_models_runs",
    "docs/faq.md": "test_faq.py::test_a_program_of_the_page_runs",
    "docs/hand_written.md#where-a-model-differs": "test_compare.py::test_the_page_about_hand_written_models_compares",
    "docs/pods.md#a-model-out-of-a-run": "test_checkpoints.py::test_the_page_about_pods_takes_a_model_out_of_a_run",
    "docs/porting.md": "test_porting.py::test_the_page_about_porting_runs",
    "docs/recipes.md": "test_recipes.py::test_every_recipe_is_tried",
    "docs/training.md#accumulation": "test_accumulation.py::test_the_page_about_training_accumulates",
    "docs/training.md#checkpoints-of-training-scripts": "test_resume.py::test_the_page_about_training_resumes",
    "docs/training.md#evaluation": "test_evaluation.py::test_the_page_about_training_evaluates",
    "docs/training.md#optimizers-of-timm": "test_timm_optimizers.py::test_the_page_about_timms_optimizers",
    "docs/training.md#schedules": "test_schedules.py::test_the_page_about_training_schedules",
    "docs/yolo.md": "test_yolo.py::test_the_program_of_the_page",
}


def run_here(page: str) -> list[Block]:
    return [b for b in programs(page) if not {page, f"{page}#{b.section}"} & ELSEWHERE.keys()]


@pytest.fixture
def as_for_a_reader(tmp_path, monkeypatch):
    """An empty folder, JAX's own 32 bits, PyTorch's own dtype, and what a page puts on the path taken off again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")  # what is left to find out in a process that has used JAX before
    with jax.enable_x64(False):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)])
def test_the_programs_of_a_page_run(page, as_for_a_reader):
    given = ROOT / "tests" / "pages" / pathlib.Path(page.lower()).relative_to("docs" if "/" in page else ".")
    given = given.with_suffix(".py")
    names = runpy.run_path(str(given)) if given.exists() else {}
    names |= {"__name__": pathlib.Path(page).stem}
    said = {name for name in names if name.startswith("in_")}
    for section, found in itertools.groupby(run_here(page), lambda block: block.section):
        group, name = list(found), f"in_{section.replace('-', '_')}"
        said -= {name}
        steps = names[name](names) if name in names else [None] * len(group)
        for _, block in zip(steps, group, strict=True):  # one `yield` for each program
            block.run(names)
    assert not said, f"{given} speaks of sections that have no programs: {said}"


@pytest.mark.parametrize("where", ELSEWHERE)
def test_programs_that_run_elsewhere_do(where):
    """The test is there, and takes the programs from this page and section."""
    page, _, section = where.partition("#")
    assert programs(page, section or None), f"{where} has no programs"
    file, _, name = ELSEWHERE[where].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "programs"]
    assert tuple(filter(None, (page, section))) in {tuple(map(ast.literal_eval, call.args)) for call in calls}


def test_a_program_that_fails_is_named(as_for_a_reader):
    block = Block("docs/faq.md", 40, "", "python", "x = 1\nassert x == 2\n")
    with pytest.raises(AssertionError) as found:
        block.run({})
    assert found.traceback[-1].lineno + 1 == 41
    assert found.value.__notes__ == ["in the program at docs/faq.md:40:\n\nx = 1\nassert x == 2\n"]


@pytest.mark.parametrize("page", LINKED)
def test_every_link_of_a_page_leads_somewhere(page):
    dead = []
    for link in links(page):
        target, _, heading = link.text.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            dead.append(f"{page}:{link.line}: there is no {target}")
        elif heading and path.suffix == ".md":
            name = path.resolve().relative_to(ROOT.resolve()).as_posix()
            if heading not in anchors(name):
                dead.append(f"{page}:{link.line}: {name} has no heading #{heading}")
    assert not dead, "\n".join(dead)
