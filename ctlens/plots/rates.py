"""How often a behaviour occurs, per method and prompt side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked
from ctlens.plots.theme import METHODS, finish, ordered, style

PERCENT = {"tickformat": ".0%", "range": [-0.04, 1.04], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
SPREAD = 0.72


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
    looks = {method: style(method) for method in methods}
    looks |= ordered([method for method in methods if method not in METHODS]) if stages else {}
    offsets = (np.arange(len(methods)) - (len(methods) - 1) / 2) * SPREAD / len(methods)
    figure = go.Figure()
    for row, method in enumerate(methods):
        look = looks[method]
        figure.add_scatter(
            x=(np.arange(len(prompt_sides)) + offsets[row]).tolist(),
            y=rates[row].tolist(),
            error_y=whiskers(rates[row], lows[row], highs[row]),
            mode="markers",
            name=look.label,
            legendgroup=method,
            marker={"color": look.colour, "symbol": look.symbol, "size": 9},
            **interval_hover(look.label, lows[row], highs[row]),
        )
    finish(
        figure,
        title,
        subtitle,
        x_title=x_title,
        y_title=f"{metric} (share of answers)",
        kind="behaviour",
        caption="Whiskers are 95% intervals. The markers of one prompt kind stand side by side.",
    )
    figure.update_yaxes(**PERCENT)
    side_ticks = {
        "tickmode": "array",
        "tickvals": list(range(len(prompt_sides))),
        "ticktext": list(prompt_sides),
        "showgrid": False,
    }
    return figure.update_xaxes(**side_ticks, range=[-0.5, len(prompt_sides) - 0.5])


def whiskers(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, object]:
    """Plotly's error bars from `low` to `high`; none where something is NaN."""
    return {"array": (high - value).tolist(), "arrayminus": (value - low).tolist(), "thickness": 1.6, "width": 4}


def interval_hover(name: str, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """What a trace shows under the pointer: its name, the rate and the interval."""
    return {
        "customdata": np.stack([low, high], axis=1).tolist(),
        "hovertemplate": f"{name}: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]<extra></extra>",
    }
