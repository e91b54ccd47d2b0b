"""The programs of docs/faq.md, each alone."""

import re

import pytest
from page_reader import ROOT, programs

PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", programs("docs/faq.md"), ids=lambda program: program.section)
def test_a_program_of_the_page_runs(program):
    program.run({"__name__": "faq"})


def test_every_question_names_a_thread():
    titles = re.findall(r"^### (.*)", PAGE, re.M)
    assert len(titles) == 20 == PAGE.count("\n(["), titles
