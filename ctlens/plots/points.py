"""Numbers with their intervals, one a row: easy to read, whatever the names and however many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.curves import Curve
from ctlens.plots.theme import MUTED, finish, style

ROW = 30


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
    """A row a name, its number and interval along x; names of one series share a look.

    Args:
        rows: per series, the names of its rows, in the order from the top; a series that is a
            method looks like the method.
        numbers: per series, value, low and high of its rows.
        title: the question or the answer.
        x_title: what the numbers are, with their unit.
        marks: dotted lines by name, where the number means something.
        subtitle: one line under the title.
        caption: how to read it.
    """
    names = [(series, name) for series, of_series in rows.items() for name in of_series]
    figure = go.Figure()
    for series in rows:
        look, at = style(series), [number for number, (of, _) in enumerate(names) if of == series]
        value, low, high = (np.asarray(end, dtype=float) for end in numbers[series])
        figure.add_scatter(
            x=value.tolist(),
            y=at,
            error_x={
                "array": (high - value).tolist(),
                "arrayminus": (value - low).tolist(),
                "thickness": 1.6,
                "width": 4,
            },
            mode="markers",
            name=look.label,
            legendgroup=series,
            showlegend=len(rows) > 1 and len(at) > 1,
            marker={"color": look.colour, "symbol": look.symbol, "size": 9},
            customdata=np.stack([low, high], 1).tolist(),
            text=[names[number][1] for number in at],
            hovertemplate="%{text}: %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra></extra>",
        )
    for name, place in (marks or {}).items():
        figure.add_vline(x=place, line={"color": MUTED, "dash": "dot", "width": 1}, annotation_text=name)
    finish(figure, title, subtitle, x_title=x_title, kind="points", caption=caption)
    labels = [style(name).label for _, name in names]
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(names))), ticktext=labels, autorange="reversed", showgrid=False,
        automargin=True,
    )  # fmt: skip
    return figure.update_layout(height=figure.layout.margin.t + figure.layout.margin.b + ROW * (len(names) + 1))
