"""The site: a page for whatever is public, every link kept, and nothing asked of another host."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import get_args
from urllib.parse import unquote, urlsplit

import pytest
from helpers.browser import CHROMIUM, Browser, browser

import ctlens as ct
from ctlens.analysis import Directions, Recording, Result, States

ROOT = Path(__file__).parents[1]
ASSETS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
RELATIONS_THAT_LOAD = {"stylesheet", "icon", "preload", "preconnect", "manifest", "modulepreload"}
"""What a `link` of the head may be that a browser fetches or connects to; a `next` or `prev` is none."""

TAKEN = (States, Directions, Recording)
"""The results that answer nothing by themselves: other analyses take them."""


class Links(HTMLParser):
    """The names that a page can be entered at, the links it has, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in ASSETS and (tag != "link" or RELATIONS_THAT_LOAD & set(given.get("rel", "").split())):
            self.loaded.add(given.get(ASSETS[tag], ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path) for path in sorted(site.rglob("*.html"))}


def analyses() -> Iterator[str]:
    """The public functions that look inside: those that return a result."""
    for name, value in vars(ct.analysis).items():
        if isinstance(value, FunctionType) and not name.startswith("_"):
            returned = inspect.signature(value, eval_str=True).return_annotation
            kinds = [kind for kind in (returned, *get_args(returned)) if isinstance(kind, type)]
            if any(issubclass(kind, Result) and kind not in TAKEN for kind in kinds):
                yield name


@pytest.mark.slow
@pytest.mark.processes
def test_every_analysis_has_its_entry_and_says_what_it_answers(pages: dict[Path, Links]) -> None:
    entries = {anchor for path, page in pages.items() if path.parent.name == "analyses" for anchor in page.anchors}
    guide = (ROOT / "docs/guide.md").read_text()

    names = list(analyses())

    assert len(names) > 20 and {"patch", "steer", "probe"} <= {*names}
    assert [name for name in names if f"{getattr(ct.analysis, name).__module__}.{name}" not in entries] == []
    assert [name for name in names if f"`{name}`" not in guide] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("Adds.\n\n>>> 1 + 1\n2\n\nMore.", "Adds.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."),
        ("- a:\n  >>> 1\n  1", "- a:\n  ```pycon\n  >>> 1\n  1\n  ```"),
        (
            "Args:\n    one, two: what\n        both are.\n    three: more.",
            "Args:\n    one: what\n        both are.\n    two: what\n        both are.\n    three: more.",
        ),
        ("The mean, low: as here, there.", "The mean, low: as here, there."),
        ("Losses.\n\nA name imported as itself is public.\n\nMore.", "Losses.\n\nMore."),
    ],
)
def test_a_docstring_is_made_readable(monkeypatch: pytest.MonkeyPatch, written: str, shown: str) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs/pages")

    assert import_module("docstrings").readable(written) == shown


def test_every_analysis_is_drawn_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "figures")
    computed = import_module("analyses")
    calls = "".join(path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb"))
    calls += "".join(inspect.getsource(function) for function in computed.SHOWN.values())

    assert {path.stem for path in computed.HELD.iterdir()} == {*computed.SHOWN}
    assert [name for name in analyses() if f"analysis.{name}(" not in calls] == ["gap_recovered", "shift_similarity"]


@pytest.mark.parametrize("name", ["mediation", "relearn"])
def test_what_was_computed_for_a_page_is_drawn_today(name: str) -> None:
    kind = inspect.signature(getattr(ct.analysis, name), eval_str=True).return_annotation

    assert kind.load(ROOT / f"figures/data/analyses/{name}.safetensors").figure().data


@pytest.mark.slow
@pytest.mark.processes
def test_every_loss_has_its_page(site: Path, pages: dict[Path, Links]) -> None:
    for name, kind in ct.losses.LOSSES.items():
        assert f"{kind.__module__}.{kind.__name__}" in pages[site / f"docs/losses/{name}.html"].anchors


@pytest.mark.slow
@pytest.mark.processes
def test_every_threat_and_every_public_name_has_its_entry(pages: dict[Path, Links]) -> None:
    entries = {anchor for page in pages.values() for anchor in page.anchors}
    kinds = [type(ct.threats.get(name)) for name in (*ct.threats.names(), *ct.threats.natural_names())]
    public = [value for name in ct.__all__ if hasattr(value := getattr(ct, name), "__qualname__")]

    missing = [one for one in (*kinds, *public) if f"{one.__module__}.{one.__qualname__}" not in entries]

    assert len(kinds) == 13 and missing == []


@pytest.mark.slow
@pytest.mark.processes
def test_nothing_is_asked_of_another_host(site: Path, pages: dict[Path, Links]) -> None:
    loaded = {(path.name, url) for path, page in pages.items() for url in page.loaded}
    styles = "\n".join(path.read_text() for path in site.rglob("*.css"))

    assert {url for _, url in loaded if url.endswith(".js")}
    assert [found for found in loaded if urlsplit(found[1]).scheme not in ("", "data") or found[1][:2] == "//"] == []
    assert not re.search(r"(url\(|@import\s+)[\"']?(https?:)?//", styles)


@pytest.mark.slow
@pytest.mark.processes
def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Links]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme or path.name == "404.html":
                continue
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in pages[target].anchors):
                broken.append((str(path.relative_to(site)), link))

    assert broken == []


@pytest.mark.slow
@pytest.mark.processes
def test_the_search_of_a_site_without_a_server_finds_what_pages_say(site: Path) -> None:
    index = json.loads((site / "search/search_index.js").read_text().removeprefix("var __index = "))
    places = {entry["location"] for entry in index["docs"] if "Kullback-Leibler" in entry["text"]}

    assert "docs/first-hour.html" in {place.split("#")[0] for place in places}


@pytest.mark.slow
@pytest.mark.processes
def test_a_page_of_an_analysis_shows_the_cells_that_call_it(site: Path) -> None:
    page = (site / "docs/analyses/transplant.html").read_text()

    assert "05 · Patching" in page and "figures/sycophancy-transplant.png" in page
    assert 'class="figure"' in (site / "docs/analyses/mediation.html").read_text()
    assert ">>>" in (site / "docs/analyses/gap_recovered.html").read_text().replace("&gt;", ">")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on the path")
def test_a_reader_finds_words_and_figures_in_a_folder(site: Path, chromium: Browser) -> None:
    box = "document.querySelector('.md-search__input')"
    chromium.open(site / "index.html")
    chromium.run(f"{box}.focus(), {box}.value = 'saliency', {box}.dispatchEvent(new Event('keyup')), 0")
    chromium.wait("document.querySelectorAll('.md-search-result__item a').length")

    found = chromium.run("[...document.querySelectorAll('.md-search-result__item a')].map(link => link.href)")

    assert any("docs/analyses/saliency_agreement.html" in link for link in found)
    assert chromium.errors() == chromium.requests() == []
    chromium.open(site / "docs/analyses/saliency_agreement.html")
    chromium.wait("document.querySelector('.figure .main-svg')")
    assert chromium.errors() == chromium.requests() == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on the path")
@pytest.mark.parametrize(
    "page", ["index", "docs/losses", "docs/losses/attct", "docs/analyses/patch", "docs/api/plots", "docs/findings"]
)
def test_a_page_is_as_wide_as_a_phone(site: Path, chromium: Browser, page: str) -> None:
    chromium.open(site / f"{page}.html", width=390)

    assert chromium.run("document.documentElement.scrollWidth") == 390
