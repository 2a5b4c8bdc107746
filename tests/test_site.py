"""The book of the project builds, holds every notebook, and asks no other host for anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from bandmask import files

ROOT = files.project_root()
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page loads, what it links and what can be linked in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        if tag in LOADED and found.get("rel") not in {"canonical", "next", "prev"}:
            self.loads += [found.get(LOADED[tag]) or ""]
        if tag == "a":
            self.links += [found.get("href") or ""]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", ROOT / "docs", "-d", folder / "trees", ROOT]
    made = subprocess.run([*build, folder / "html"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return {path.resolve(): Page(path) for path in (folder / "html").rglob("*.html")}


def test_every_notebook_is_a_page(pages):
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= {path.stem for path in pages}


def test_no_page_loads_anything_from_another_host(pages):
    assert not [(path.name, url) for path, page in pages.items() for url in page.loads if re.match("(https?:)?//", url)]


def test_every_link_inside_the_book_leads_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target in pages and (not parts.fragment or unquote(parts.fragment) in pages[target].anchors)
            if not known and not (target.exists() and target not in pages):
                broken.append((path.name, link))
    assert not broken


def test_what_builds_the_project_elsewhere_calls_commands_that_exist():
    commands = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    workflow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8"))
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {command for step in steps for command in re.findall(r"\bmake ([a-z-]+)", step)} <= commands
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    binder = (ROOT / ".binder/postBuild").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", ROOT / ".binder/postBuild"], check=False).returncode == 0
    for install in (container["postCreateCommand"], binder):
        assert "--torch-backend cpu" in install
        assert "models]" in install, "notebook 12 asks a model of others"
