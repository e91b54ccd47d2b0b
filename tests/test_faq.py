"""The programs of docs/faq.md, each alone."""

import pathlib
import re

import pytest

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "faq.md").read_text(encoding="utf-8")
PROGRAMS = {
    title: program
    for title, answer in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M)
    for program in re.findall(r"```python\n(.*?)```", answer, re.S)
}


@pytest.mark.parametrize("title", PROGRAMS)
def test_a_program_of_the_page_runs(title):
    exec(compile(PROGRAMS[title], title, "exec"), {"__name__": "faq"})


def test_every_question_names_a_thread():
    titles = re.findall(r"^### (.*)", PAGE, re.M)
    assert len(titles) == 20 == PAGE.count("\n(["), titles
