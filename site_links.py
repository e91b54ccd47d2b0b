"""What the site needs beside mkdocs.yml: pages lead out of docs/, to tables of benchmarks and to programs.

A link of a page to a file of the repository outside docs/ becomes one to a page of the site that is made of the file:
Markdown as it is, code as code. Links on those pages are followed in turn.
"""

import logging
import os
import pathlib
import posixpath
import re
import tomllib
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

logger = logging.getLogger("mkdocs.hooks.site_links")  # its warnings are errors of a strict build
ROOT = pathlib.Path(__file__).resolve().parent
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
NOTEBOOK_LINK = re.compile(r'href="([^":#]+\.(?:md|py))(#[^"]*)?"')
CODE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$|`[^`\n]+`", re.M | re.S)
KINDS = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".txt": "text", ".cff": "yaml"}


def on_config(config: Any) -> Any:
    """The version in the head of every page: pyproject.toml alone has it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    config["site_name"] = f"{config['site_name']} {version}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of what is linked outside docs/."""
    waiting = [place(file.src_uri) for file in files.documentation_pages() if file.src_uri.endswith(".md")]
    while waiting:
        source = waiting.pop()
        for target in outside(source):
            uri = page_of(target)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=text_of(target)))
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links to those pages."""
    source = place(page.file.src_uri)
    folder = os.path.dirname(page.file.src_uri) or "."
    for link in reversed(links(markdown)):
        if target := aimed(source, link):
            there = f"{link[1]}{os.path.relpath(page_of(target), folder)}{link[3] or ''}"
            markdown = markdown[: link.start()] + there + markdown[link.end() :]
    return markdown


def on_page_content(html: str, page: Any, files: Files, **_: Any) -> str:
    """Leads a notebook's links to pages: its cells are HTML by now, which MkDocs does not look through."""

    def led(link: re.Match[str]) -> str:
        target = files.get_file_from_path(posixpath.normpath(posixpath.join(folder, link[1])))
        if target is None:
            logger.warning("%s links to %s, which is no page", page.file.src_uri, link[1])
            return link[0]
        return f'href="{get_relative_url(target.url, page.file.url)}{link[2] or ""}"'

    folder = posixpath.dirname(page.file.src_uri)
    return NOTEBOOK_LINK.sub(led, html) if page.file.src_uri.endswith(".py") else html


def links(markdown: str) -> list[re.Match[str]]:
    """The relative links of a page, in order, beside those that are code."""
    code = [range(*found.span()) for found in CODE.finditer(markdown)]
    return [link for link in LINK.finditer(markdown) if not any(link.start() in part for part in code)]


def place(uri: str) -> pathlib.Path:
    """The file of the repository that a page is made of."""
    path = ROOT / "docs" / uri
    if path.exists() or not uri.startswith("repository/"):
        return path
    path = ROOT / uri.removeprefix("repository/")
    return path if path.exists() else path.with_suffix("")


def aimed(source: pathlib.Path, link: re.Match[str]) -> pathlib.Path | None:
    """The file of the repository that a link leads to."""
    target = (source.parent / link[2]).resolve()
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def outside(source: pathlib.Path) -> list[pathlib.Path]:
    """The files outside docs/ that a page links to."""
    if source.suffix != ".md" or not source.is_file():
        return []
    found = [aimed(source, link) for link in links(source.read_text(encoding="utf-8"))]
    return [target for target in found if target and not target.is_relative_to(ROOT / "docs")]


def page_of(target: pathlib.Path) -> str:
    """The page of a file of the repository: its own under docs/; else under repository/."""
    if target.is_relative_to(ROOT / "docs"):
        return target.relative_to(ROOT / "docs").as_posix()
    uri = f"repository/{target.relative_to(ROOT).as_posix()}"
    return uri if target.suffix in (".md", ".png", ".svg") else f"{uri}.md"


def text_of(target: pathlib.Path) -> str | bytes:
    if target.suffix in (".png", ".svg"):
        return target.read_bytes()
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    return f"# {target.name}\n\n````{KINDS.get(target.suffix, 'text')}\n{text}\n````\n"
