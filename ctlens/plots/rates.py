"""The figure of how often a behaviour occurs, per method and prompt side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked
from ctlens.plots.intervals import MARKERS_SPREAD, Intervals, interval_hover, side_by_side, whiskers
from ctlens.plots.theme import METHOD_STYLES, Style, finish, ordered, style

PERCENT = {"tickformat": ".0%", "range": [-0.04, 1.04], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
"""Plotly's settings of an axis of rates, with air for markers at 0 and 1."""
_TICK_WIDTH = 12  # letters of a label under the axis, chosen by eye


def behaviour(
    methods: Sequence[str],
    prompt_sides: Sequence[str],
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    metric: str,
    title: str,
    subtitle: str | None = None,
    x_title: str = "prompt",
    stages: bool = False,
) -> go.Figure:
    """How often does each method show the behaviour, with the wrapper and without? One threat, one metric.

    With `stages`, the same question of one model at several stages, for example before and after inoculation.

    Args:
        methods: names of the methods and controls, or of the stages, in the order of the markers.
        prompt_sides: names of the prompt sides, or of other groups of answers, left to right.
        values: rates `[method, prompt_side]`, 0 to 1.
        low: lower ends of their intervals `[method, prompt_side]`.
        high: upper ends `[method, prompt_side]`.
        metric: what the rate counts, for the y axis, for example `"bad rate"`.
        title: the question or the answer.
        subtitle: one line under the title.
        x_title: what the groups are.
        stages: rows that are no known methods are stages in an order: coloured from dark to light.

    Raises:
        CtlensError: an array's shape is not `[method, prompt_side]`, or nothing is given.
    """
    shape = (len(methods), len(prompt_sides))
    rates, lows, highs = checked("values", values, *shape), checked("low", low, *shape), checked("high", high, *shape)
    offsets = side_by_side(len(methods)) * MARKERS_SPREAD / len(methods)
    looks = _looks(methods, stages)
    figure = go.Figure()
    for row, method in enumerate(methods):
        _draw_markers(figure, method, looks[method], offsets[row], Intervals(rates[row], lows[row], highs[row]))
    y_title = f"{metric} (share of answers)"
    caption = "Whiskers are 95% intervals. The markers of one prompt kind stand side by side."
    finish(figure, title, subtitle, x_title=x_title, y_title=y_title, kind="behaviour", caption=caption)
    figure.update_yaxes(**PERCENT)
    names = ["<br>".join(textwrap.wrap(name, _TICK_WIDTH)) for name in prompt_sides]
    ticks = {"tickmode": "array", "tickvals": list(range(len(prompt_sides))), "ticktext": names}
    return figure.update_xaxes(**ticks, showgrid=False, range=[-0.5, len(prompt_sides) - 0.5])


def _looks(methods: Sequence[str], stages: bool) -> dict[str, Style]:
    """The style of each method; with `stages`, names of no method go from dark to light in their order."""
    looks = {method: style(method) for method in methods}
    if stages:
        looks |= ordered([method for method in methods if method not in METHOD_STYLES])
    return looks


def _draw_markers(figure: go.Figure, method: str, look: Style, offset: float, numbers: Intervals) -> None:
    """The markers of one method, each `offset` steps beside the label of its prompt side."""
    figure.add_scatter(
        x=(np.arange(len(numbers.value)) + offset).tolist(),
        y=numbers.value.tolist(),
        error_y=whiskers(numbers),
        mode="markers",
        name=look.label,
        legendgroup=method,
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        **interval_hover(look.label, numbers),
    )
