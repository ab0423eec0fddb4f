"""The pages made from what owns their facts: docstrings, the guide's table of analyses, notebooks and figures."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from executed import cells_with, markdown, title
from listing import ROOT, Exported, arguments, definition, docstring, exported, imported, returned
from nbformat import NotebookNode
from plotted import computed

ANALYSIS = "ctlens.analysis"
LOSSES = "ctlens.losses"
THREATS = "ctlens.threats"
BASE = f"{LOSSES}.base"
NULLS = f"{ANALYSIS}.base.nulls"
EVERY = "every analysis that takes pairs"
"""How the list of nulls says which null is one of all analyses."""
FIGURES = {
    "residual_shift": "sycophancy-residual-last",
    "shift_similarity": "sycophancy-similarity",
    "transplant": "sycophancy-transplant",
    "gap_recovered": "sycophancy-gap-dose",
}
"""The committed figure of each analysis that has one."""


@dataclass(frozen=True)
class Page:
    """A page of the site: where it lies beside the committed ones, its name in the navigation, and its Markdown."""

    uri: str
    title: str
    text: str


@cache
def analyses() -> dict[str, list[Page]]:
    """A page per module of analyses, by the folder of its question."""
    found: defaultdict[str, list[Page]] = defaultdict(list)
    for module, names in _analyses().items():
        found[_folder(module)].append(_analysis(module, names))
    return dict(sorted(found.items()))


def analyses_index() -> Page:
    """Lists every analysis with what it answers, by the folder of its question."""
    parts = ["# Analyses", _docstring(ANALYSIS)]
    for folder, pages in analyses().items():
        parts += [
            f"## {label(folder)}",
            docstring(f"{ANALYSIS}.{folder}"),
            "| analysis | what it answers |\n|---|---|",
        ]
        parts[-1] += "".join(f"\n| [{page.title}]({posixpath.basename(page.uri)}) | {_told(page)} |" for page in pages)
    return Page("docs/analyses/index.md", "Analyses", _joined(parts))


def label(folder: str) -> str:
    """The name of a folder of analyses in the navigation."""
    return folder.replace("_", " ").capitalize()


@cache
def losses() -> list[Page]:
    """A page per loss: its formula, its options, and what has been published under its name."""
    names = [one for one in exported(LOSSES) if one.module not in (LOSSES, BASE)]
    pages = [_of_module(module, names, "losses") for module, names in _by_module(names).items()]
    return [Page(page.uri, page.title, page.text + _published(page.title.lower())) for page in pages]


@cache
def threats() -> dict[str, list[Page]]:
    """A page per file of threats, of the micro-world and natural: strength, metrics, wrappers."""
    registered = [one for one, public in imported(THREATS) if not public and one.room == THREATS]
    found: dict[str, list[Page]] = {"Micro-world": [], "Natural": []}
    for module, names in _by_module(registered).items():
        kind = "Natural" if module.startswith(f"{THREATS}.natural.") else "Micro-world"
        found[kind].append(_of_module(module, names, "threats", {"members": ["wrappers"]}))
    return found


def api() -> list[Page]:
    """A page per package with the public names that have no page of their own, and links to those that have."""
    listed = exported("ctlens")
    rooms = sorted({one.path if one.module == "ctlens" else one.room for one in listed} - {ANALYSIS})
    elsewhere = {path: page for page in losses() for path in re.findall(r"^::: (\S+)$", page.text, flags=re.MULTILINE)}
    named = {room: [one for one in listed if one.room == room != one.module] for room in rooms}
    named[LOSSES] = [Exported(name, BASE) for name in ("InternalLoss", "VectorLoss")]  # what a loss derives from
    return [_room(room, [*exported(room), *named[room]], elsewhere) for room in rooms]


def study() -> Page:
    """The folder of a study, and the columns of its tables."""
    parts = [
        "# The study's folder and its columns",
        _docstring("ctlens.study.runner"),
        "## `results.csv`",
        _object("ctlens.study.results.RESULT_COLUMNS"),
        "## `claims.csv`",
        "One row per claim, threat and setting. The columns are the attributes of a claim:",
        _object("ctlens.study.claims.claim.Claim"),
        "## The results of analyses",
        "A file of `analyses/` is loaded by the class that its [analysis](analyses/index.md) returns, such as\n"
        '`ct.analysis.Transplant.load("...")`; the docstring of its `to_dataframe` names its columns.',
    ]
    return Page("docs/study.md", "The study's folder", _joined(parts))


def _analyses() -> dict[str, list[Exported]]:
    """The public names of the analyses by module; a result stands with the function that returns it."""
    everything = [one for package in (ANALYSIS, "ctlens") for one in exported(package) if one.room == ANALYSIS]
    homes = {name: one.module for one in everything for name in re.findall(r"\w+", returned(one))}
    found: defaultdict[str, list[Exported]] = defaultdict(list)
    for one in sorted(everything, key=lambda one: (not returned(one), one.module, definition(one).lineno)):
        found[homes.get(one.name, one.module)].append(one)
    return dict(found)


def _analysis(module: str, names: list[Exported]) -> Page:
    functions = [one.name for one in names if returned(one)]
    heading = ", ".join(functions or [one.name for one in names])
    answers = list(dict.fromkeys(_answers()[name] for name in functions if name in _answers()))
    parts = [f"# {heading}"]
    parts += [f'!!! question "What it answers"\n\n    {answer[0].upper()}{answer[1:]}.' for answer in answers]
    parts.append(_docstring(module))
    if module != NULLS and (nulls := _nulls_of(names)):
        parts += ["## Its null", "\n".join(nulls)]
    if figures := [FIGURES[name] for name in functions if name in FIGURES]:
        parts += ["## Its figure", *(f"![{heading}](../../figures/{figure}.png)" for figure in figures)]
    parts += [*_in_notebooks(functions), *_computed(one for one in names if returned(one))]
    parts += ["## Reference", *(_object(one.path) for one in names)]
    return Page(f"docs/analyses/{(functions or [module.split('.')[-1]])[0]}.md", heading, _joined(parts))


def _in_notebooks(functions: Iterable[str]) -> list[str]:
    """The cells that call some analyses, with their figures, of the first notebook that calls each."""
    found: defaultdict[Path, list[NotebookNode]] = defaultdict(list)
    for name in functions:
        for path, cells in cells_with(f"analysis.{name}(")[:1]:
            found[path] += [cell for cell in cells if cell not in found[path]]
    parts = []
    for path, cells in found.items():
        parts += [f"From [{title(path)}](../../notebooks/{path.name}):", markdown(cells, "docs/analyses")]
    return ["## In a notebook", *parts] if parts else []


def _computed(functions: Iterable[Exported]) -> list[str]:
    """The calls of analyses that no notebook makes, with their figures."""
    found = [part for part in map(computed, functions) if part]
    told = "On few pairs, with models and pairs as in [figures/analyses.py](../../figures/analyses.py); no finding."
    return ["## In code", told, *found] if found else []


@cache
def _answers() -> Mapping[str, str]:
    """What each analysis answers, from the guide's table."""
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    table = guide.split("| `ct.analysis.` | what it answers |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    return {name: answer for names, answer in rows for name in re.findall(r"`(\w+)`", names)}


def _nulls_of(names: Iterable[Exported]) -> list[str]:
    """What some analyses are held against: the nulls that name one of them, and that of all that take pairs."""
    functions = [one for one in names if returned(one)]
    pairs = any(argument.arg == "pairs" for one in functions for argument in arguments(one))
    listed = [null.strip().rstrip(".;") for null in re.split(r"^- ", docstring(NULLS), flags=re.MULTILINE)[1:]]
    named = [null for null in listed if any(f"`{one.name}`" in null for one in functions)]
    general = [null for null in listed if pairs and EVERY in null]
    return [f"- {null}." for null in (*named, *general)]


def _published(method: str) -> str:
    """The sources that define a method, from the committed table of all definitions."""
    table = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith(f"| {method} |")]
    found = [f'- `ct.losses.preset("{method}", "{row[1]}")`: {row[-1]}' for row in rows[1:]]
    told = "[Side by side](../losses.md) with all other losses, whose sources that page names."
    return _joined(["", "## As published", *(["\n".join(found)] if found else []), told])


def _told(page: Page) -> str:
    """What an analysis answers, or else the first sentence of what its module says."""
    answer = re.search(r'"What it answers"\n\n    (.*)', page.text)
    return answer[1] if answer else _first_sentence(re.findall(r"^::: (\S+)", page.text, flags=re.MULTILINE)[0])


def _of_module(module: str, names: list[Exported], folder: str, options: Mapping[str, object] | None = None) -> Page:
    heading = ", ".join(one.name for one in names)
    parts = [f"# {heading}", _docstring(module), "## Reference", *(_object(one.path, options) for one in names)]
    return Page(f"docs/{folder}/{module.split('.')[-1]}.md", heading, _joined(parts))


def _room(room: str, names: list[Exported], elsewhere: Mapping[str, Page]) -> Page:
    here = dict.fromkeys(one.path for one in names if one.path not in elsewhere)
    links = [
        f"[`{one.name}`](../{elsewhere[one.path].uri.removeprefix('docs/')})" for one in names if one.path in elsewhere
    ]
    parts = [f"# {room}", _docstring(room)]
    if links:
        parts.append(f"With a page of their own: {', '.join(links)}.")
    parts += [_object(path) for path in here]
    return Page(f"docs/api/{room.split('.')[-1]}.md", room, _joined(parts))


def _docstring(module: str) -> str:
    """What the docstring of a module says, and nothing else of it."""
    return _object(module, {"members": False, "show_root_heading": False, "show_root_toc_entry": False})


def _object(path: str, options: Mapping[str, object] | None = None) -> str:
    """An object by its docstring, with options of mkdocstrings."""
    lines = [
        f"        {name}: {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in (options or {}).items()
    ]
    return "\n".join([f"::: {path}", *(["    options:", *lines] if lines else [])])


def _by_module(names: Iterable[Exported]) -> dict[str, list[Exported]]:
    found: defaultdict[str, list[Exported]] = defaultdict(list)
    for one in names:
        found[one.module].append(one)
    return dict(found)


def _folder(module: str) -> str:
    """The folder of a module of analyses, the name of its question."""
    return (*module.split("."), "base")[2]


def _first_sentence(module: str) -> str:
    return docstring(module).split("\n\n")[0].replace("\n", " ")


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"
