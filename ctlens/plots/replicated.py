"""The figure of numbers that were measured again in other models: each model's, and the pooled one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from ctlens.core.errors import CtlensError
from ctlens.plots.intervals import Curve, checked_intervals, side_by_side, whiskers
from ctlens.plots.theme import MUTED, finish, literal, ordered

# Chosen by eye: the height of a row in pixels, the width of its name in letters, and how far groups stand apart in it.
_ROW_HEIGHT = 58
_NAME_WIDTH = 46
_APART = 0.24
_ENDS = "[%{customdata[0]:.3g}, %{customdata[1]:.3g}]"


def replicated(
    rows: Sequence[str],
    models: Mapping[str, Sequence[Sequence[float]]],
    numbers: Mapping[str, Curve],
    title: str,
    *,
    x_title: str,
    subtitle: str | None = None,
    caption: str = "Filled: the mean over models with its 95% interval. Open: each model.",
) -> go.Figure:
    """How alike is a number in several models? One row per number, a line of it per group of models.

    Args:
        rows: the names of the numbers, in the order from the top.
        models: per group, each row's numbers, one per model; a row may have none.
        numbers: per group, mean, low and high of each row; a row without a mean has no marker.
        title: the question or the answer.
        x_title: the quantity with its unit.
        subtitle: one line under the title.
        caption: how to read the figure.

    Raises:
        CtlensError: the groups differ, or a group has not one entry per row.
    """
    if list(models) != list(numbers):
        raise CtlensError(f"models are of {', '.join(models)} and means of {', '.join(numbers)}: give both for each.")
    figure = go.Figure()
    shifts = _APART * side_by_side(len(models))
    for (group, look), shift in zip(ordered(list(models)).items(), shifts, strict=True):
        if len(models[group]) != len(rows):
            raise CtlensError(f"{group} has numbers for {len(models[group])} of {len(rows)} rows: give some for each.")
        at = [(row + shift, value) for row, values in enumerate(models[group]) for value in values]
        figure.add_scatter(
            x=[value for _, value in at],
            y=[row for row, _ in at],
            mode="markers",
            name=f"{group}, each model",
            legendgroup=group,
            showlegend=False,
            marker={"color": look.colour, "symbol": f"{look.symbol}-open", "size": 6},
            hovertemplate=f"{literal(group)}, one model: %{{x:.3g}}<extra></extra>",
        )
        pooled = checked_intervals(f"means of {group!r}", numbers[group], len(rows))
        figure.add_scatter(
            x=pooled.value.tolist(),
            y=(np.arange(len(rows)) + shift).tolist(),
            error_x=whiskers(pooled),
            mode="markers",
            name=literal(group),
            legendgroup=group,
            marker={"color": look.colour, "symbol": look.symbol, "size": 10},
            customdata=np.stack([pooled.low, pooled.high], 1).tolist(),
            hovertemplate=f"{literal(group)}: %{{x:.3g}} {_ENDS}<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dot", "width": 1})
    finish(figure, title, subtitle, x_title=x_title, kind="replicated", caption=caption)
    names = ["<br>".join(literal(line) for line in textwrap.wrap(row, _NAME_WIDTH)) for row in rows]
    ticks = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": names, "tickfont": {"size": 11}}
    figure.update_yaxes(**ticks, range=[len(rows) - 0.5, -0.5], showgrid=False, automargin=True)
    around = figure.layout.margin.t + figure.layout.margin.b
    return figure.update_layout(height=around + _ROW_HEIGHT * len(rows))
