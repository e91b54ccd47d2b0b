"""The pages of the documentation as a Markdown parser sees them: blocks of code, commands in prose, headings, links."""

import functools
import linecache
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = ("python", "py", "python3")


class Block(NamedTuple):
    """A block of code between fences."""

    page: str  # its path from the repository's root
    line: int  # of its first line, in the page
    section: str  # the anchor of the heading that it stands under
    language: str
    text: str

    def compiled(self) -> types.CodeType:
        return compile("\n" * (self.line - 1) + self.text, str(ROOT / self.page), "exec")

    def run(self, names: dict[str, Any]) -> None:
        """Runs it in these names. A traceback has the page's lines; an error says which block it comes from."""
        file = str(ROOT / self.page)
        linecache.cache[file] = (0, None, _as_python(self.page), file)  # `from_torch` reads it as a file of Python
        try:
            exec(self.compiled(), names)
        except BaseException as error:
            error.add_note(f"in the program at {self.page}:{self.line}:\n\n{self.text}")
            raise


class Words(NamedTuple):
    """What a page says in one place: code in a line of text, or where a link leads."""

    page: str
    line: int
    text: str


@functools.cache
def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """A heading's anchor on GitHub: in lower case, spaces as hyphens, of all else letters, digits, hyphens and _."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: str) -> list[str]:
    """The anchors of a page: of a heading that is there again with a number, from 1 on; those written as HTML; and the
    names that mkdocstrings makes headings of."""
    found: list[str] = []
    for before, token in zip(tokens(page), tokens(page)[1:], strict=False):
        if before.type == "heading_open":
            text = "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))
            same = sum(re.fullmatch(re.escape(anchor(text)) + r"(-\d+)?", other) is not None for other in found)
            found.append(f"{anchor(text)}-{same}" if anchor(text) in found else anchor(text))
    text = (ROOT / page).read_text(encoding="utf-8")
    return found + re.findall(r'<a (?:id|name)="([^"]+)"', text) + re.findall(r"^::: (\S+)", text, re.M)


def blocks(page: str) -> list[Block]:
    """The page's blocks of code, in order."""
    found, headings, section = [], iter(anchors(page)), ""
    for token in tokens(page):
        if token.type == "heading_open":
            section = next(headings)
        if token.type == "fence" and token.map:
            found.append(Block(page, token.map[0] + 2, section, (token.info.split() or [""])[0], token.content))
    return found


def programs(page: str, section: str | None = None) -> list[Block]:
    """The blocks of Python of a page, or of one of its sections."""
    return [block for block in blocks(page) if block.language in PYTHON and section in (None, block.section)]


@functools.cache
def _as_python(page: str) -> list[str]:
    """The page's lines, all but those of its programs empty."""
    lines = ["\n"] * len((ROOT / page).read_text(encoding="utf-8").splitlines())
    for block in programs(page):
        code = block.text.splitlines(keepends=True)
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    return lines


def _inline(page: str) -> Iterator[tuple[int, Token]]:
    for token in tokens(page):
        for child in token.children or ():
            yield (token.map[0] + 1 if token.map else 0), child


def spans(page: str) -> list[Words]:
    """Code in lines of text."""
    return [Words(page, line, token.content) for line, token in _inline(page) if token.type == "code_inline"]


def links(page: str) -> list[Words]:
    """Where links and pictures lead, as they are written; HTML's, too."""
    found = [
        Words(page, line, str(token.attrGet("href") or token.attrGet("src")))
        for line, token in _inline(page)
        if token.type in ("link_open", "image")
    ]
    html = [(line, token) for line, token in _inline(page) if token.type == "html_inline"]
    html += [(token.map[0] + 1 if token.map else 0, token) for token in tokens(page) if token.type == "html_block"]
    return found + [
        Words(page, line, target)
        for line, token in html
        for target in re.findall(r'(?:href|src)="([^"]+)"', token.content)
    ]
