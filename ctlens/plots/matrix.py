"""What training against one threat does to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.colors import sample_colorscale

from ctlens.plots import panels as multiples
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.theme import INK, finish, label

Panel = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Value, lower end and upper end of the interval, each `[trained, evaluated]`, or `[1, evaluated]` without a threat."""

# The darkest Purples would hide the outlines.
COLOURS = sample_colorscale("Purples", np.linspace(0, 0.8, 9).tolist())
WHITE_FROM = 0.78
CELL, GAP, BELOW = 47, 44, 104
NO_THREAT = "no threat"


def cross_threat(
    trained: Sequence[str],
    evaluated: Sequence[str],
    panels: Mapping[str, Panel],
    title: str,
    *,
    subtitle: str | None = None,
    metric: str = "bad rate",
) -> go.Figure:
    """Does training against one threat protect against the others?

    One matrix a method, all on one scale; a cell whose row and column are the same threat is outlined.

    Args:
        trained: the threats trained on, from top to bottom.
        evaluated: the threats evaluated on, left to right.
        panels: per method, the rate (0 to 1) and its interval `[trained, evaluated]`, or `[1, evaluated]`
            for a model that was trained on no threat; NaN where not measured, drawn empty.
        title: the question or the answer.
        subtitle: one line under the title.
        metric: what the rate counts.

    Raises:
        CtlensError: no method, no threat, or an array of another shape.
    """
    require_some("panels", panels)
    require_some("trained", trained)
    size = {"height": CELL * len(trained), "gap": GAP}
    columns = min(multiples.COLUMNS, len(panels))
    figure = multiples.panels([label(method) for method in panels], **size, side=0.26 / columns)
    spots = list(multiples.places(len(panels)))
    rows: list[list[str]] = []
    for (method, panel), (place, *_) in zip(panels.items(), spots, strict=True):
        untrained = np.shape(panel[0])[:1] == (1,) and (len(trained) > 1 or method == "none")
        rows.append([NO_THREAT] if untrained else list(trained))
        figure.add_trace(_matrix(method, panel, rows[-1], evaluated, metric), **place)
    caption = "Cells are rates with their 95% intervals, in percent; outlined: evaluated on the threat trained on."
    finish(figure, title, subtitle, kind="cross_threat", caption=caption)
    for names, (place, first, last) in zip(rows, spots, strict=True):
        _label(figure, place, names, evaluated, len(trained), first=first, last=last)
    name = {"text": metric, "side": "right", "font": {"size": 13}}
    bar = {"title": name, "tickformat": ".0%", "thickness": 12, "len": 0.6, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": COLOURS, "cmin": 0, "cmax": 1, "colorbar": bar})
    figure.update_layout(width=max(880, 400 * columns))
    return multiples.fit(figure, len(panels), **size, below=BELOW)


def _matrix(method: str, panel: Panel, rows: Sequence[str], columns: Sequence[str], metric: str) -> go.Heatmap:
    shape = (len(rows), len(columns))
    value, low, high = (checked(f"panel {method!r}", array, *shape) for array in panel)
    texts = [[_cell(*ends) for ends in zip(*row, strict=True)] for row in zip(value, low, high, strict=True)]
    names = [[f"trained on {row}, evaluated on {column}" for column in columns] for row in rows]
    return go.Heatmap(
        z=value.tolist(),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        customdata=np.stack([names, low, high], axis=-1).tolist(),
        hovertemplate=f"{label(method)}, %{{customdata}}: {metric} %{{z:.1%}}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _cell(value: float, low: float, high: float) -> str:
    """The rate and, smaller, its interval, in percent; what is NaN is left out."""
    if np.isnan(value):
        return ""
    interval = "" if np.isnan(low + high) else f"{100 * low:.0f}–{100 * high:.0f}"
    colour = "white" if value >= WHITE_FROM else INK
    return f'<span style="color: {colour}">{value:.0%}<br><span style="font-size: 10px">{interval}</span></span>'


def _label(
    figure: go.Figure,
    place: multiples.Place,
    rows: Sequence[str],
    columns: Sequence[str],
    height: int,
    *,
    first: bool,
    last: bool,
) -> None:
    """Names the rows and columns of one panel, and outlines the cells where they are the same threat."""
    plain = {"tickmode": "array", "showgrid": False, "showline": False, "ticks": "", "tickfont": {"size": 12}}
    figure.update_xaxes(**plain, **_names(columns), tickangle=-40, showticklabels=last, **place)
    figure.update_yaxes(
        **plain, **_names(rows), automargin=True, ticklabelstandoff=4, range=[height - 0.5, -0.5], **place
    )
    if last:
        figure.update_xaxes(title_text="evaluated on", **place)
    if first:
        figure.update_yaxes(title_text="trained on", **place)
    for row, column in ((row, columns.index(name)) for row, name in enumerate(rows) if name in columns):
        edges = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        figure.add_shape(type="rect", **edges, line={"color": INK, "width": 2}, **place)


def _names(names: Sequence[str]) -> dict[str, list]:
    return {"tickvals": list(range(len(names))), "ticktext": list(names)}
