"""Promises about the site: it is built without a warning, asks nobody else for anything, and can be read on a phone."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from filelock import FileLock

from waferlab.config import ExperimentConfig

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def site(tmp_path_factory, executed_chapter):
    """With what each chapter prints and draws, which test_guide.py may have run already; built once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "html/objects.inv").exists():
            build_site(folder, executed_chapter)
    return folder / "html"


def build_site(folder, executed_chapter):
    made = shutil.ignore_patterns("_build", "_generated", "__pycache__", "api", "deploy")
    docs = shutil.copytree(ROOT / "docs", folder / "repository/docs", ignore=made)
    for chapter in docs.glob("guide/[0-9]*.py"):
        shutil.copy(executed_chapter(ROOT / "docs/guide" / chapter.name), chapter.parent)
        chapter.unlink()
    for page in docs.rglob("*.md"):
        page.write_text(re.sub(r"(\d\d_\w+)\.py\)", r"\1.ipynb)", page.read_text()))
    for name in ("benchmarks", "deploy", "waferlab", "examples"):
        (folder / "repository" / name).symlink_to(ROOT / name)
    for file in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        (folder / "repository" / file.name).symlink_to(file)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "nb_execution_mode=off"]
    done = subprocess.run(
        [*command, str(docs), str(folder / "html")], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def pages_of(site):
    return sorted(page for page in site.rglob("*.html") if "_modules" not in page.parts)


def test_every_page_is_reached_from_the_first(site):
    seen, left = set(), [site / "index.html"]
    while left:
        page = left.pop()
        if page not in seen:
            seen.add(page)
            links = re.findall(r'href="([^"#:?]+\.html)', page.read_text())
            left += [target for link in links if (target := (page.parent / link).resolve()).exists()]
    assert {page.resolve() for page in pages_of(site)} <= {page.resolve() for page in seen}


def test_a_chapter_shows_what_it_printed_and_drew_and_comes_as_a_notebook(site):
    for chapter in sorted((ROOT / "docs/guide").glob("[0-9]*.py")):
        page = (site / "guide" / f"{chapter.stem}.html").read_text()
        assert "output_area" in page or 'class="cell_output' in page, chapter
        assert f'href="{chapter.stem}.ipynb"' in page, chapter
        notebook = json.loads((site / "guide" / f"{chapter.stem}.ipynb").read_text())
        assert any(cell.get("outputs") for cell in notebook["cells"])
    assert list((site / "_images").glob("*.png"))


def test_links_to_elsewhere_are_whole_addresses():
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs/guide").glob("*.py")]
    texts += [*(ROOT / "deploy").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    links = [link for file in texts for link in re.findall(r"\]\((\w+:[^)\s]*)\)", file.read_text())]
    assert len(links) > 20
    for link in links:
        address = urlsplit(link)
        assert address.scheme in ("http", "https") and re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", address.netloc), link


def test_every_option_stands_on_the_page_of_the_configuration_with_its_meaning(site):
    text = (site / "configuration.html").read_text()
    for one in fields(ExperimentConfig):
        rows = re.findall(rf"<code[^>]*><span[^>]*>{one.name}</span></code>.*?</tr>", text, re.S)
        assert rows and len(re.sub(r"<[^>]+>", "", rows[-1])) > 30, one.name


def test_the_site_asks_nobody_but_itself(site):
    for page in pages_of(site):
        asked = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:)?//[^"]*"', page.read_text())
        assert not asked, page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_and_a_screen_and_nothing_goes_wrong(site, browser, scheme):
    wrong, grounds = [], set()
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        for file in pages_of(site) if scheme == "light" else [site / "index.html"]:
            page.goto(file.as_uri())
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 1, (file.relative_to(site), width, wide)
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert not wrong
    (ground,) = grounds
    bright = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert bright > 200 if scheme == "light" else bright < 60
