"""The page of an exploration: its figures and their calls in one file that opens without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ctlens.core.files import write_text
from ctlens.data.pairs import Prompt
from ctlens.exploring.views import VIEWS, ExplorationViews, drawn_or_refused
from ctlens.plots import Figure
from ctlens.plots.export import plotly_source


def write_page(explored: ExplorationViews, path: Path) -> Path:
    """Writes every view of what is chosen into one page, and returns its path."""
    page = Environment(
        loader=PackageLoader("ctlens", "exploring"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    text = page.render(
        views={view: view_of(explored, view) for view in VIEWS},
        chosen=explored.selection,
        prompts=_prompts(explored),
        stage=stage_module(),
        style=stage_file("stage.css"),
    )
    write_text(path, text)
    return path


def view_of(explored: ExplorationViews, view: str) -> dict[str, Any]:
    """A view for a page: its figure as JSON, or in its stead the sentence that says why there is none; and its call."""
    found = drawn_or_refused(explored, view)
    figure = json.loads(str(found.to_json())) if isinstance(found, Figure) else None
    return {"figure": figure, "message": "" if figure else found, "code": explored.code(view)}


def stage_module() -> str:
    """The JavaScript that draws the views, with plotly.js inside, kept from looking for a loader of modules outside."""
    library = f"(function (module, exports, define) {{{plotly_source()}\n}})(holder, holder.exports, undefined);"
    return f"const holder = {{exports: {{}}}};\n{library}\nconst Plotly = holder.exports;\n{stage_file('stage.js')}"


def stage_file(name: str) -> str:
    """The text of a file that the page and the panel share."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _prompts(explored: ExplorationViews) -> dict[str, list[tuple[str, str]]]:
    """Who says what in the clean prompt, in the one that is shown, and in the benign twin."""
    shown = {"clean": explored.pair.clean, explored.selection.prompt_side: explored.pair.wrapped}
    if explored.pair.benign is not None:
        shown["benign"] = explored.pair.benign
    return {side: _said(prompt) for side, prompt in shown.items()}


def _said(prompt: Prompt) -> list[tuple[str, str]]:
    """Who says what in a prompt."""
    return [(turn.role, turn.content) for turn in prompt.turns]
