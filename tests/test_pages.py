"""The documentation holds: its programs run, its links lead somewhere.

What a page takes for granted (a loader, a loss, a model) stands in the file of the page's name under tests/pages, whose
names the page's programs are run with, one after the other. A function `in_SECTION(names)` there is a generator: each
`yield` is one program of that section, so that it can prepare the program before and check after what the page says.
`NEEDS = {section: package}` there names what is no dependency of ours: without it the section's programs are compiled
alone. A page without such a file stands alone. New pages are found by themselves.
"""

import ast
import importlib.util
import itertools
import pathlib
import runpy
import sys

import jax
import pytest
import torch
from page_reader import PYTHON, ROOT, Block, anchors, blocks, links, programs, tokens

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
    "docs/batch_norm_variants.md": "test_batch_norm_variants.py::test_the_pages_programs_run",
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


def given(page: str) -> pathlib.Path:
    """The file of what the page takes for granted, if there is one."""
    return (ROOT / "tests" / "pages" / page.lower().removeprefix("docs/")).with_suffix(".py")


def run_all(found: list[Block], names: dict) -> None:
    needs = names.get("NEEDS", {})
    said = {name for name in names if name.startswith("in_")} | {f"in_{section}" for section in needs}
    for section, group in itertools.groupby(found, lambda block: block.section):
        name, those = f"in_{section.replace('-', '_')}", list(group)
        said -= {name, f"in_{section}"}
        if section in needs and importlib.util.find_spec(needs[section]) is None:
            for block in those:
                block.compiled()
            continue
        steps = names[name](names) if name in names else [None] * len(those)
        try:
            for _, block in zip(steps, those, strict=True):  # one `yield` for each program
                block.run(names)
        except Exception as error:
            error.add_note(f"{those[0].page}#{section} has programs at lines {[block.line for block in those]}")
            raise
    assert not said, f"sections that have no programs: {said}"


@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)])
def test_the_programs_of_a_page_run(page, as_for_a_reader):
    names = runpy.run_path(str(given(page))) if given(page).exists() else {}
    run_all(run_here(page), names | {"__name__": pathlib.Path(page).stem})


def test_names_are_given_to_pages_that_have_programs():
    files = {given(page) for page in PAGES if run_here(page)}
    assert set((ROOT / "tests" / "pages").rglob("*.py")) <= files


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_programs_that_are_not_seen(page):
    """Under another language's name, or in a block that a Markdown parser does not take for one of code."""
    assert {block.language for block in blocks(page)} <= {*PYTHON, "", "text", "shell", "json", "yaml", "toml"}
    assert not [token for token in tokens(page) if token.type == "code_block" and "```" in token.content]


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
        run_all([block], {})
    assert found.traceback[-1].lineno + 1 == 41
    assert found.value.__notes__[0] == "in the program at docs/faq.md:40:\n\nx = 1\nassert x == 2\n"


def test_programs_of_packages_that_are_absent_are_compiled():
    block = Block("docs/faq.md", 40, "tensor-flow", "python", "import no_such_package\n")
    run_all([block], {"NEEDS": {"tensor-flow": "no_such_package"}})
    with pytest.raises(SyntaxError):
        run_all([block._replace(text="import 3\n")], {"NEEDS": {"tensor-flow": "no_such_package"}})
    with pytest.raises(ModuleNotFoundError):
        run_all([block], {"NEEDS": {"tensor-flow": "numpy"}})
    with pytest.raises(AssertionError, match="no programs"):
        run_all([], {"NEEDS": {"tensor-flow": "no_such_package"}})


def test_a_section_s_steps_are_its_programs():
    block, done = Block("docs/faq.md", 40, "a-b", "python", "x += 1\n"), []

    def in_a_b(names):
        names["x"] = 1
        yield
        assert names["x"] == 2
        yield
        done.append(names["x"])

    run_all([block, block], {"in_a_b": in_a_b})
    assert done == [3]
    for count in (1, 3):
        with pytest.raises(ValueError, match="zip") as found:
            run_all([block] * count, {"in_a_b": in_a_b})
        assert found.value.__notes__ == [f"docs/faq.md#a-b has programs at lines {[40] * count}"]


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
