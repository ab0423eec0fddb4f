"""The saved figures of a study, ready for the page: in which part, in which order, how wide, with their numbers."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctlens.core.errors import CtlensError
from ctlens.core.reading import read_columns, read_json

SavedFigure = dict[str, Any]
PagePart = dict[str, list[SavedFigure]]
"""The figures of one part of the page, by threat; those of no single threat first, under an empty name."""

_PARTS = {
    "behaviour": ("cross_threat", "attack_strength", "behaviour"),
    "training": ("dose_response", "history", "hook_history"),
}
_OTHER_PART = "mechanism"
FIRST_PART = "first"
_FIRST = ("cross-threat", "{}-residual-last", "{}-graft", "{}-bad-rate")
"""The figures of the first screen, by name, those of a threat of the first that has them; at most `_N_FIRST`."""
_N_FIRST = 3
_MECHANISM_ORDER = (
    "curve_panels",
    "layer_curves",
    "points",
    "similarity",
    "similarity_curves",
    "exchange_curves",
    "graft_bars",
    "cross_loss",
    "cross_loss_steps",
    "evidence",
    "attention_heads",
    "knockout",
)
_KIND_ORDER = (*_PARTS["behaviour"], *_PARTS["training"], *_MECHANISM_ORDER)
_PANEL_WIDTH = 290  # pixels, chosen by eye
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")


def read_figures(folder: Path, threats: Sequence[str]) -> dict[str, PagePart]:
    """Sorts the figures of a folder by part of the page and by threat; a figure of an unknown kind is of the mechanism.

    Args:
        folder: with `*.json` and, where the numbers are wanted as tables, `*.data.csv` of the same names.
        threats: the names with which a figure of one threat begins, in their order.

    Raises:
        CtlensError: there is no figure, or a file that is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise CtlensError(f"{folder} holds no figure (*.json): run the study to its end first.")
    figures = sorted((_figure(path) for path in paths), key=lambda figure: figure["order"])
    parts: dict[str, PagePart] = {
        part: {name: [] for name in ("", *threats)} for part in (FIRST_PART, *_PARTS, _OTHER_PART)
    }
    named = {figure["name"]: figure for figure in figures}
    wanted = [next((name for threat in threats if (name := kind.format(threat)) in named), "") for kind in _FIRST]
    first = [name for name in wanted if name][:_N_FIRST]
    parts[FIRST_PART][""] = [named.pop(name) for name in first]
    for figure in named.values():
        part = next((part for part, kinds in _PARTS.items() if figure["kind"] in kinds), _OTHER_PART)
        threat = next((threat for threat in threats if figure["name"].startswith(f"{threat}-")), "")
        parts[part][threat].append(figure)
    return parts


def _figure(path: Path) -> SavedFigure:
    """A saved figure with its title moved out of the drawing, where it can wrap on a narrow page."""
    figure = read_json(path)
    layout = figure.get("layout")
    if not isinstance(figure.get("data"), list) or not isinstance(layout, dict):
        raise CtlensError(f"{path} is not a plotly figure: check that only figures are in the folder.")
    meta = layout.get("meta") or {}
    title = html.unescape(re.sub(r"<[^>]*>", " ", layout.pop("title", {}).get("text") or path.stem))
    kind = meta.get("kind")
    return {
        "title": meta.get("title") or title,
        "subtitle": meta.get("subtitle"),
        "caption": meta.get("caption"),
        "kind": kind,
        "name": path.stem,
        "order": _KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER),
        "width": _narrowest(layout),
        "height": layout.get("height", 450),
        "numbers": _numbers(path.with_suffix(".data.csv")),
        "json": {"data": figure["data"], "layout": layout},
    }


def _narrowest(layout: dict[str, Any]) -> int:
    """The width that a figure needs, in pixels; on a narrower page it is made smaller, or scrolls."""
    columns = {tuple(axis["domain"]) for name, axis in layout.items() if name.startswith("xaxis") and "domain" in axis}
    panels = _PANEL_WIDTH * len(columns) if len(columns) > 1 else 0
    return max(panels, layout.pop("width", 0))


def _numbers(path: Path) -> list[list[str]]:
    """The table of a figure with its header, without the columns that are empty; none where there is no file."""
    if not path.is_file():
        return []
    used = {name: texts for name, texts in read_columns(path).items() if any(texts)}
    return [list(used), *map(list, zip(*(map(_short, texts) for texts in used.values()), strict=True))]


def _short(cell: str) -> str:
    """A number with four digits, anything else as it is.

    >>> _short("0.123456"), _short("96"), _short("L0H1")
    ('0.1235', '96', 'L0H1')
    """
    return f"{float(cell):.4g}" if _NUMBER.fullmatch(cell) else cell
