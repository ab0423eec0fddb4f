"""Puts the site together: every file lies in it where it lies in the repository, so links hold in both places."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from executed import NOTEBOOKS
from executed import page as notebook_page
from executed import title as notebook_title
from listing import ROOT
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page as SitePage
from plotted import LIBRARY
from reference import Page, analyses, analyses_index, api, label, losses, study, threats

BESIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "figures/*.png",
    "figures/analyses.py",
    LIBRARY,
    "benchmarks/*.*",
)
"""What the pages link to outside `docs`."""


def generated() -> list[Page]:
    """Every page that is no file."""
    notebooks = [Page(f"notebooks/{path.stem}.md", notebook_title(path), notebook_page(path)) for path in NOTEBOOKS]
    grouped = [page for groups in (analyses(), threats()) for pages in groups.values() for page in pages]
    return [*notebooks, analyses_index(), *grouped, *losses(), study(), *api()]


def on_config(config: MkDocsConfig) -> None:
    """Fills the sections of the navigation that `mkdocs.yml` leaves empty."""
    of_analyses = [{label(folder): _entries(pages)} for folder, pages in analyses().items()]
    filled: dict[str, list[Any]] = {
        "Notebooks": [{notebook_title(path): f"notebooks/{path.stem}.md"} for path in NOTEBOOKS],
        "Analyses": [analyses_index().uri, *of_analyses],
        "Losses": _entries(losses()),
        "Threats": [{kind: _entries(pages)} for kind, pages in threats().items()],
        "API": _entries(api()),
    }
    for section in config.nav or ():
        for name in section.keys() & filled:
            section[name] += filled[name]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Moves what lies in `docs` there, and adds what lies beside it and the pages that are no files."""
    moved = [_moved(file, config) if file.src_dir == config.docs_dir else file for file in files]
    beside = [path for pattern in BESIDE for path in sorted(ROOT.glob(pattern))]
    added = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in beside]
    made = [File.generated(config, page.uri, content=page.text) for page in generated()]
    return Files([*moved, *added, *made])


def on_page_markdown(markdown: str, *, page: SitePage, **_: Any) -> str:
    """Lets links to notebooks lead to their pages."""
    return re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", markdown)


def _entries(pages: Iterable[Page]) -> list[dict[str, str]]:
    return [{page.title: page.uri} for page in pages]


def _moved(file: File, config: MkDocsConfig) -> File:
    inclusion = {"inclusion": file.inclusion}
    return File.generated(config, f"docs/{file.src_uri}", abs_src_path=str(file.abs_src_path), **inclusion)
