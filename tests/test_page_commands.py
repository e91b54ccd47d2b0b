"""The commands that the documentation shows exist, with their options: jaxnorm's, the examples', make's, pip's extras.

Nothing is run: jaxnorm's parser and the examples' own parsers take the command lines apart. A command in a line of text
may leave arguments out (`jaxnorm inspect`); one in a block is whole.
"""

import argparse
import ast
import importlib.util
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator

import pytest
from page_reader import PYTHON, ROOT, Words, blocks, spans
from test_pages import LINKED

from interop.cli.app import command
from jaxnorm import launch

pytestmark = pytest.mark.once

COMMAND = re.compile(r"(\$ |\w+=\S* )*(jaxnorm|python3?|make|pip|srun|gcloud) ")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {target for line in re.findall(r"^([a-z][\w -]*):", MAKEFILE, re.M) for target in line.split()}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def shown(page: str) -> Iterator[tuple[Words, bool]]:
    """The page's command lines, and whether they are whole. In a block of text, or with prompts, others are output."""
    for block in blocks(page):
        lines = block.text.splitlines() if block.language not in PYTHON else []
        prompts = block.language == "text" or any(line.startswith("$ ") for line in lines)
        for number, line in enumerate(lines):
            if COMMAND.match(line) and prompts is line.startswith("$ "):
                yield Words(page, block.line + number, line.removeprefix("$ ")), True
    for span in spans(page):
        if COMMAND.match(span.text):
            yield span, False


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line: its program and arguments, without what starts it elsewhere (srun)."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word.startswith("--command="):
            yield from commands(word.partition("=")[2])
        if word not in ("|", "&&", ";"):
            words.append(word)
            continue
        start = next((i for i, w in enumerate(words) if re.fullmatch("jaxnorm|python3?|make|pip", w)), len(words))
        if words[start:]:
            yield [w for w in words[start:] if w != "..."]
        words = []


def check(words: list[str], whole: bool) -> None:
    program, *arguments = words
    {"jaxnorm": of_jaxnorm, "make": of_make, "pip": of_pip}.get(program, of_python)(arguments, whole)


def of_jaxnorm(arguments: list[str], whole: bool) -> None:
    group = command()
    options = list(itertools.takewhile(lambda word: word.startswith("-"), arguments))
    name, *rest = arguments[len(options) :] or ["COMMAND"]
    try:
        if options:
            group.make_context("jaxnorm", [*options, "COMMAND"])
        if name != "COMMAND":
            group.commands[name].make_context(name, rest)
    except Exception as error:
        left_out = type(error).__name__ == "MissingParameter" and not whole  # arguments that are given come first
        if not left_out and type(error).__name__ != "Exit":  # of --help and --version
            raise


def of_python(arguments: list[str], whole: bool) -> None:
    if arguments[0] == "-m":
        if arguments[1] != "jaxnorm.launch":
            assert importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"
        elif arguments[2:] or whole:
            launched = launch._parse(arguments[2:])
            of_python([*(["-m"] if launched.module else []), launched.program, *launched.arguments], whole)
        return
    file = ROOT / arguments[0]
    if "/" not in arguments[0] or file.stem.isupper():  # a file of the reader's, or any of a folder's
        assert file.parent.is_dir()
    elif file.parent.name == "examples":
        sys.argv = [file.name, *arguments[1:]]
        runpy.run_path(str(file), run_name=file.stem)["parse"]()
    else:  # a benchmark: importing it changes much
        known = [
            ast.literal_eval(call.args[0])
            for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument")
        ]
        wrong = [word for word in arguments[1:] if word.startswith("--") and word.partition("=")[0] not in known]
        assert not wrong, f"{arguments[0]} has no {wrong}"


def of_make(arguments: list[str], whole: bool) -> None:
    for word in arguments:
        name, given, options = word.partition("=")
        if not given:
            assert word in TARGETS, f"the Makefile has no target {word}"
            continue
        assert f"$({name})" in MAKEFILE, f"the Makefile has no {name}"
        if arguments[0] == "demo" and name == "OPTIONS":
            of_python(["examples/finetune.py", *shlex.split(options)], whole)
        for file in re.findall(r"\S+\.py", options):
            assert (ROOT / file).exists(), f"there is no {file}"


def of_pip(arguments: list[str], whole: bool) -> None:
    for extras in re.findall(r"(?:jaxnorm|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= EXTRAS.keys(), f"pyproject.toml has no extra {extras}"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    monkeypatch.setattr(sys, "argv", [])
    # A parser ends the process at what it does not know.
    monkeypatch.setattr(argparse.ArgumentParser, "error", _raise)


def _raise(parser: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)


@pytest.mark.parametrize("page", [page for page in LINKED if any(shown(page))])
def test_every_command_of_a_page_exists(page, examples):
    wrong = []
    for line, whole in shown(page):
        for words in commands(line.text):
            try:
                check(words, whole)
            except SystemExit as end:  # of --help
                assert not end.code
            except Exception as error:
                wrong.append(f"{page}:{line.line}: {line.text}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_page_about_the_command_line_shows_every_command():
    lines = [words for line, whole in shown("docs/command_line.md") if whole for words in commands(line.text)]
    assert {words[1] for words in lines if words[0] == "jaxnorm"} == set(command().commands)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("jaxnorm inspct x.pth", "inspct"),
        ("jaxnorm inspect x.pth --dpth 0", "No such option: --dpth"),
        ("jaxnorm inspect x.pth --depth nought", "valid integer"),
        ("jaxnorm --trace inspect x.pth", "No such option: --trace"),
        ("jaxnorm convert x.pth", "Missing parameter: out"),
        ("python examples/pod.py --output runs/a", "unrecognized arguments: --output runs/a"),
        ("python -m jaxnorm.launch --process 2 examples/pod.py --stepz 3", "unrecognized arguments: --stepz 3"),
        ("srun --tasks=8 python examples/pods.py", "pods.py"),
        ('gcloud ssh x --command="python examples/pod.py --nothing"', "unrecognized arguments: --nothing"),
        ("python benchmarks/training.py --nothing", "has no ['--nothing']"),
        ("python -m jaxnorm.lunch x.py", "there is no module jaxnorm.lunch"),
        ("make demos", "no target demos"),
        ('make demo OPTIONS="--replica 4 --stepz 100"', "unrecognized arguments: --stepz 100"),
        ('make test OPTIONS="tests/test_nothing.py"', "there is no tests/test_nothing.py"),
        ("pip install '.[pods]'", "no extra pods"),
    ],
)
def test_a_wrong_command_is_found(line, found, examples):
    with pytest.raises(Exception, match=re.escape(found)):
        for words in commands(line):
            check(words, True)
