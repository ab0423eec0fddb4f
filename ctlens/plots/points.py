"""Numbers with their intervals, one per row: easy to read, however long the names and however many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.intervals import Curve, checked_intervals, whiskers
from ctlens.plots.theme import MUTED, finish, style

_ROW_HEIGHT = 30  # pixels, chosen by eye


def points(
    rows: Mapping[str, Sequence[str]],
    numbers: Mapping[str, Curve],
    title: str,
    *,
    x_title: str,
    marks: Mapping[str, float] | None = None,
    subtitle: str | None = None,
    caption: str = "Whiskers are 95% intervals.",
) -> go.Figure:
    """How large is a number for each name? One row per name, its number and interval along x.

    Args:
        rows: per series, the names of its rows, in the order from the top; names of one series share a
            look, and a series that is a method looks like the method.
        numbers: per series, value, low and high of its rows.
        title: the question or the answer.
        x_title: the quantity with its unit.
        marks: dotted lines by name, where the number means something.
        subtitle: one line under the title.
        caption: how to read the figure.

    Raises:
        CtlensError: a series has no row, or an array is not one number per row.
    """
    figure = go.Figure()
    names: list[str] = []
    for series, of_series in rows.items():
        first = len(names)
        names += of_series
        several = len(rows) > 1 and len(of_series) > 1
        _draw_series(figure, series, of_series, numbers[series], first, listed=several)
    for name, value in (marks or {}).items():
        at = {"annotation_text": name, "annotation_position": "top", "annotation_font_size": 11}
        figure.add_vline(x=value, line={"color": MUTED, "dash": "dot", "width": 1}, **at)
    finish(figure, title, subtitle, x_title=x_title, kind="points", caption=caption)
    ticks = {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [style(name).label for name in names],
    }
    figure.update_yaxes(**ticks, autorange="reversed", showgrid=False, automargin=True)
    around = figure.layout.margin.t + figure.layout.margin.b
    return figure.update_layout(height=around + _ROW_HEIGHT * (len(names) + 1))


def _draw_series(
    figure: go.Figure, series: str, names: Sequence[str], curve: Curve, first: int, *, listed: bool
) -> None:
    """The rows of one series, from row number `first` on."""
    look = style(series)
    numbers = checked_intervals(f"numbers {series!r}", curve, len(names))
    figure.add_scatter(
        x=numbers.value.tolist(),
        y=list(range(first, first + len(names))),
        error_x=whiskers(numbers),
        mode="markers",
        name=look.label,
        legendgroup=series,
        showlegend=listed,
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        customdata=np.stack([numbers.low, numbers.high], 1).tolist(),
        text=list(names),
        hovertemplate="%{text}: %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra></extra>",
    )
