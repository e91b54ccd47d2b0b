"""docs/comparison.md says what benchmarks/results/comparison.md has, and its links lead somewhere."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "comparison.md").read_text()
COLUMNS = {  # of the page: those of the benchmark's table whose figures stand there, in this order
    "jaxnorm": ["jaxnorm nnx"],
    "torchax": ["torchax"],
    "PyTorch": ["PyTorch"],
    "Flax": ["Flax nnx", "Flax nnx, use_fast_variance=False"],
    "Equinox": ['Equinox, "batch"'],
    "Keras": ["Keras on JAX"],
}
ROWS = {
    "error of the output, float32, mean at 1e3 deviations": "output, mean 1000",
    "at 1e4 deviations": "output, mean 10000",
    "error of the running variance at 1e4 deviations": "running variance, mean 10000",
    "error of BatchNorm in eval mode at 1e4 deviations": "eval output, mean 10000",
    "replicas with unequal counts": "replicas with 8 and 2 of 8 examples",
}
FIGURE = re.compile(r"\b\de[+-]\d\d\b")


def table(text: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head = next(line for line in lines if not line[0])
    rows = lines[lines.index(head) + 2 :]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("row", ROWS)
def test_figures_on_the_page_are_those_measured(row: str) -> None:
    measured = table((ROOT / "benchmarks" / "results" / "comparison.md").read_text())[ROWS[row]]
    said = table(PAGE[PAGE.index("## Facts") : PAGE.index('What "not looked at"')])[row]
    seen = 0
    for column, cell in said.items():
        figures = FIGURE.findall(cell)
        found = [measured[name] for name in COLUMNS.get(column.split()[0], [])]
        assert figures == [value for value in found if FIGURE.fullmatch(value)][: len(figures)], column
        seen += len(figures)
    assert seen


def test_files_and_sections_that_the_page_links_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    local = [link for link in links if not link.startswith(("http", "#"))]
    assert local and all((ROOT / "docs" / link.split("#")[0]).exists() for link in local)
    titles = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", PAGE, re.M)}
    assert {link[1:] for link in links if link.startswith("#")} <= titles
    named = set(re.findall(r"\]\[([\w-]+)\]", PAGE))
    assert named == set(re.findall(r"^\[([\w-]+)\]: https://", PAGE, re.M))
