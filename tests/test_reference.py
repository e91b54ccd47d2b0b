"""The API reference has every public name, and every docstring says what goes in, what comes out and what is raised."""

import importlib
import inspect
import os
import pathlib
import re
from contextlib import redirect_stdout
from io import StringIO
from unittest import mock

import pytest

import interop
import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.once

ROOMS = {
    "jaxnorm": jaxnorm,
    "jaxnorm.nnx": jaxnorm.nnx,
    "jaxnorm.linen": jaxnorm.linen,
    "interop": interop,
    "interop.layouts": interop.layouts,
}
PAGES = pathlib.Path(__file__).parent.parent / "docs" / "reference"
BULLET = re.compile(r"^- (`\*{0,2}\w+`(?:, `\*{0,2}\w+`)*)", re.MULTILINE)
HEADING = re.compile(r"^\*\*(\w+):\*\*", re.MULTILINE)
# Classes whose objects the library makes, and users meet: their constructors are not for them.
MADE = (Exception, interop.Buffer, interop.Constant, interop.Frozen, interop.Checkpoint, interop.TracedModule)
NONE = (None, "None", inspect.Signature.empty)


def defined(module):
    """The public names of a module without `__all__`: the functions and classes that it defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isroutine(value) or inspect.isclass(value)) and value.__module__ == module.__name__
        if not name.startswith("_")
    ]


def public():
    """(path, object) of every public name and of every public method of a public class."""
    for room, module in ROOMS.items():
        for name in getattr(module, "__all__", None) or defined(module):
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            yield f"{room}.{name}", value
            if inspect.isclass(value):
                yield from ((f"{room}.{name}.{method}", getattr(value, method)) for method in methods(value))


def methods(cls):
    """The methods and properties that the class itself defines."""
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__call__":
            continue
        if inspect.isroutine(value) or isinstance(value, (classmethod, staticmethod, property)):
            yield name


def parameters(value):
    """Of a function but `self`; of a class those of its constructor, unless the library alone calls it."""
    if inspect.isclass(value):
        if issubclass(value, MADE) or getattr(value, "_is_protocol", False):
            return []
        value = value.__new__ if value.__init__ is object.__init__ else value.__init__
    found = list(inspect.signature(value).parameters)
    return found[1:] if found[:1] in (["self"], ["_cls"]) else found


def sections(text):
    """The text of each section of a docstring, by its heading."""
    parts = HEADING.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def described(text):
    """The names that the bullets under Arguments or Attributes begin with."""
    found = sections(text)
    bullets = BULLET.findall(found.get("Arguments", "") + found.get("Attributes", ""))
    return {name for bullet in bullets for name in re.findall(r"\w+", bullet)}


def complaints(path, value):
    """What a docstring lacks."""
    text = inspect.getdoc(value) or ""
    if not text:
        return [f"{path} has no docstring"]
    if isinstance(value, property):
        return []
    found = [f"{path}: no bullet for `{name}`" for name in parameters(value) if name not in described(text)]
    if inspect.isclass(value):
        return found
    if inspect.signature(value).return_annotation not in NONE and "Returns" not in sections(text):
        found.append(f"{path}: no **Returns:**")
    if "Raises" not in sections(text):
        found.append(f"{path}: no **Raises:**, which may say: nothing of its own")
    return found


NAMES = dict(public())
METHODS = [path for path in NAMES if path.rpartition(".")[0] in NAMES]


def test_docstrings_say_what_goes_in_what_comes_out_and_what_is_raised():
    assert [line for path, value in NAMES.items() for line in complaints(path, value)] == []


def directives():
    """(page, path) of each `:::` line."""
    for page in sorted(PAGES.rglob("*.md")):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            yield page.name, path


def found_by_mkdocstrings(path):
    """The object of a dotted path, None where there is none. Where a module and a function have one name (the files are
    read, not run), it is the module."""
    first, *parts = path.split(".")
    value = importlib.import_module(first)
    for part in parts:
        if inspect.ismodule(value):
            try:
                value = importlib.import_module(f"{value.__name__}.{part}")
                continue
            except ModuleNotFoundError:
                pass
        value = getattr(value, part, None)
    return value


def test_the_reference_names_only_functions_and_classes_that_exist():
    found = {f"{page}: {path}": found_by_mkdocstrings(path) for page, path in directives()}
    assert [line for line, value in found.items() if not callable(value)] == []


def test_every_public_name_is_in_the_reference_and_its_index_once():
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    places = [(f"{page}#{path}", found_by_mkdocstrings(path)) for page, path in directives()]
    wrong = []
    for path, value in NAMES.items():
        if path in METHODS:
            continue
        links = [place for place, shown in places if shown is value]
        if len(links) != 1 or index.count(f"| [`{path}`]({links[0]}) | ") != 1:
            wrong.append(f"{path}: on {links or 'no page'}")
    assert wrong == []


def helps(width=80):
    """The page of the command line's help, as a terminal of that width shows it."""
    from interop.cli import main
    from interop.cli.app import command

    parts = []
    with mock.patch.dict(os.environ, COLUMNS=str(width)):
        for name in ("", *command().commands):
            with redirect_stdout(StringIO()) as shown:
                main([*name.split(), "--help"])
            parts.append(f"## {f'jaxnorm {name}'.strip()}\n\n```text\n{shown.getvalue().strip()}\n```\n")
    title = "# Command line reference\n\nWhat `--help` prints. [The command line](../command_line.md) is the guide.\n"
    return "\n".join([title, *parts])


HELP = PAGES / "command_line_reference.md"


def test_the_command_line_reference_is_what_help_prints():
    renew = "run python tests/test_reference.py, which writes it"
    assert HELP.read_text(encoding="utf-8") == helps(), renew


if __name__ == "__main__":
    HELP.write_text(helps(), encoding="utf-8")
