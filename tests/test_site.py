"""The site is built without a warning: each page has its place, each link and each name leads somewhere."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_links_lead_out_of_docs_and_back(site):
    page = (site / "training" / "index.html").read_text(encoding="utf-8")
    link = re.search(r'href="([^"]*results/accumulation/)"', page)[1]
    assert (site / "training" / link / "index.html").resolve().exists()
    page = (site / "repository" / "CONTRIBUTING" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../versions/"' in page


def test_a_notebook_links_to_pages(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.glob("tutorials/*/index.html")}
    assert len(pages) == 8
    for path, page in pages.items():
        links = [link for link in re.findall(r'href="([^":#]+)"', page) if not link.endswith((".css", ".svg", ".png"))]
        assert links and all((path.parent / link).exists() for link in links), (path, links)


def test_every_page_says_the_version(site):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("index.html")]
    assert pages and all(f"jaxnorm {version}" in page for page in pages)


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?://', page), path
