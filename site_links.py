"""What the site needs beside mkdocs.yml: pages lead out of docs/, to tables of benchmarks and to programs.

A page of the navigation whose name begins with repository/ is made of the file of that name outside docs/: Markdown as
it is, code as code. A page's link to such a file becomes one to its page. Links on those pages are followed in turn.
"""

import logging
import os
import pathlib
import re
import tomllib
from typing import Any

from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.site_links")  # a warning ends a strict build
ROOT = pathlib.Path(__file__).resolve().parent
MADE = "repository/"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$|`[^`\n]+`", re.M | re.S)
KINDS = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".txt": "text", ".cff": "yaml"}


def on_config(config: Any) -> Any:
    """The version in the head of every page: pyproject.toml alone has it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    config["site_name"] = f"{config['site_name']} {version}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of what is linked outside docs/."""
    waiting = [ROOT / uri.removeprefix(MADE) for uri in named(config["nav"]) if uri.startswith(MADE)]
    for file in files.documentation_pages():
        waiting += outside(place(file.src_uri))
    while waiting:
        target = waiting.pop()
        uri = page_of(target)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=text_of(target)))
            waiting += outside(target)
    return files


def named(nav: Any) -> list[str]:
    """The pages that the navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [uri for item in (nav.values() if isinstance(nav, dict) else nav) for uri in named(item)]


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
    """Leads a notebook's links to pages, which come as they were written."""
    if not page.file.src_uri.endswith(".py"):
        return html

    def led(link: re.Match[str]) -> str:
        uri = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), link[1]))
        file = files.get_file_from_path(uri)
        if file is None:
            LOG.warning("%s links to %s, which is no page", page.file.src_uri, link[1])
            return link[0]
        return f'href="{file.url_relative_to(page.file)}{link[2] or ""}"'

    return re.sub(r'href="([^":#]+\.(?:md|py))(#[^"]*)?"', led, html)


def links(markdown: str) -> list[re.Match[str]]:
    """The relative links of a page, in order, beside those that are code."""
    code = [range(*found.span()) for found in CODE.finditer(markdown)]
    return [link for link in LINK.finditer(markdown) if not any(link.start() in part for part in code)]


def place(uri: str) -> pathlib.Path:
    """The file of the repository that a page is made of."""
    path = ROOT / "docs" / uri
    if path.exists() or not uri.startswith(MADE):
        return path
    path = ROOT / uri.removeprefix(MADE)
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
    uri = f"{MADE}{target.relative_to(ROOT).as_posix()}"
    return uri if target.suffix in (".md", ".png", ".svg") else f"{uri}.md"


def text_of(target: pathlib.Path) -> str | bytes:
    if target.suffix in (".png", ".svg"):
        return target.read_bytes()
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    return f"# {target.name}\n\n````{KINDS.get(target.suffix, 'text')}\n{text}\n````\n"
