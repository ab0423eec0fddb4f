"""What is gained against what it costs: methods as points, a panel per case or cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from ctlens.plots.arrays import require_some
from ctlens.plots.intervals import Curve, Intervals, checked_intervals, whiskers
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import drawn_for, finish, style

_LAYOUT = PanelLayout(height=330, gap=70, below=60, side=0.09)
_WIDTH = 1100  # pixels, chosen by eye
_HOVER = (
    "%{text}: %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}], "
    "%{y:.3g} [%{customdata[2]:.3g}, %{customdata[3]:.3g}]<extra></extra>"
)


class TradeoffPanel(NamedTuple):
    """One panel: the names of its points, what each gains and what it costs, with their intervals.

    Attributes:
        names: of the points; those of methods have their looks.
        gained: value, low and high along x.
        cost: the same along y.
        y_title: the cost with its unit.
    """

    names: tuple[str, ...]
    gained: Curve
    cost: Curve
    y_title: str


def tradeoff(
    panels: Mapping[str, TradeoffPanel],
    title: str,
    *,
    x_title: str,
    caption: str,
    subtitle: str | None = None,
) -> go.Figure:
    """Which method gains most for its cost? Points with whiskers, to the right what gains, up what costs.

    Args:
        panels: per name of a panel, its points.
        title: the question or the answer.
        x_title: what is gained, with its unit.
        caption: how to read the figure.
        subtitle: one line under the title.

    Raises:
        CtlensError: no panel, no point in one, or an array that is not one number per point.
    """
    require_some("panels", panels)
    figure = panel_grid(list(panels), _LAYOUT)
    listed: set[str] = set()
    for subplot, (name, panel) in zip(subplots(len(panels)), panels.items(), strict=True):
        require_some(f"points of {name!r}", panel.names)
        gained = checked_intervals(f"what is gained in {name!r}", panel.gained, len(panel.names))
        cost = checked_intervals(f"the cost in {name!r}", panel.cost, len(panel.names))
        for number, method in enumerate(panel.names):
            at = _at(gained, number), _at(cost, number)
            figure.add_trace(_point(method, *at, listed=method not in listed), **subplot.at)
            listed.add(method)
    finish(figure, title, subtitle, kind="tradeoff", caption=caption)
    for subplot, panel in zip(subplots(len(panels)), panels.values(), strict=True):
        figure.update_xaxes(title_text=x_title if subplot.lowest else None, **subplot.at)
        figure.update_yaxes(title_text=panel.y_title, **subplot.at)
    return fit_panels(figure, len(panels), _LAYOUT).update_layout(width=_WIDTH)


def _at(numbers: Intervals, number: int) -> Intervals:
    """One of the numbers, as an array of one."""
    return Intervals(numbers.value[[number]], numbers.low[[number]], numbers.high[[number]])


def _point(method: str, gained: Intervals, cost: Intervals, *, listed: bool) -> go.Scatter:
    """The marker of one method, with whiskers both ways."""
    look = style(method)
    return go.Scatter(
        x=gained.value.tolist(),
        y=cost.value.tolist(),
        error_x=whiskers(gained, slim=True),
        error_y=whiskers(cost, slim=True),
        mode="markers",
        name=look.label,
        legendgroup=method,
        showlegend=listed,
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        customdata=[np.concatenate([gained.low, gained.high, cost.low, cost.high]).tolist()],
        text=[look.label],
        hovertemplate=_HOVER,
        meta=drawn_for(method),
    )
