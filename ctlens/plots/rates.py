"""How often a behaviour occurs, per method and arm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked
from ctlens.plots.theme import finish, style

PERCENT = {"tickformat": ".0%", "range": [-0.04, 1.04], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
SPREAD = 0.72


def behaviour(
    methods: Sequence[str],
    arms: Sequence[str],
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    metric: str,
    title: str,
    subtitle: str | None = None,
) -> go.Figure:
    """How often does each method show the behaviour, with the wrapper and without? One threat, one metric.

    Args:
        methods: names of the methods and controls, in the order of the markers.
        arms: names of the arms, left to right.
        values: rates `[method, arm]`, 0 to 1.
        low: lower ends of their intervals `[method, arm]`.
        high: upper ends `[method, arm]`.
        metric: what the rate counts, for the y axis, for example `"bad rate"`.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: an array's shape is not `[method, arm]`, or nothing is given.
    """
    shape = (len(methods), len(arms))
    rates, lows, highs = checked("values", values, *shape), checked("low", low, *shape), checked("high", high, *shape)
    offsets = (np.arange(len(methods)) - (len(methods) - 1) / 2) * SPREAD / len(methods)
    figure = go.Figure()
    for row, method in enumerate(methods):
        look = style(method)
        figure.add_scatter(
            x=(np.arange(len(arms)) + offsets[row]).tolist(),
            y=rates[row].tolist(),
            error_y={
                "array": (highs[row] - rates[row]).tolist(),
                "arrayminus": (rates[row] - lows[row]).tolist(),
                "thickness": 1.6,
                "width": 4,
            },
            mode="markers",
            name=look.label,
            legendgroup=method,
            marker={"color": look.colour, "symbol": look.symbol, "size": 9},
            customdata=np.stack([lows[row], highs[row]], axis=1).tolist(),
            hovertemplate=f"{look.label}: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]<extra></extra>",
        )
    finish(
        figure,
        title,
        subtitle,
        x_title="prompt",
        y_title=f"{metric} (share of answers)",
        kind="behaviour",
        caption="Whiskers are 95% intervals. The methods of one prompt kind stand side by side.",
    )
    figure.update_yaxes(**PERCENT)
    arm_ticks = {"tickmode": "array", "tickvals": list(range(len(arms))), "ticktext": list(arms), "showgrid": False}
    return figure.update_xaxes(**arm_ticks, range=[-0.5, len(arms) - 0.5])
