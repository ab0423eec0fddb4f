"""Numbers of several models side by side, in groups, one panel per quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import require_some
from ctlens.plots.intervals import MARKERS_SPREAD, checked_intervals, side_by_side, whiskers
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, finish, style

_LAYOUT = PanelLayout(height=270, gap=60, below=64, side=0.08)

Groups = tuple[Sequence[str], Mapping[str, Sequence[ArrayLike] | np.ndarray]]
"""Names of the groups, and per model its values with the lower and upper ends of their intervals, `[3, group]`."""


def agreement(panels: Mapping[str, Groups], title: str, *, subtitle: str | None = None) -> go.Figure:
    """Do several ways to score tokens agree, and where do they point, before training and after?

    Args:
        panels: by the quantity, with its unit.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no panel or model, or numbers do not fit the groups.
    """
    require_some("panels", panels)
    figure = panel_grid(list(panels), _LAYOUT)
    for subplot, (groups, models) in zip(subplots(len(panels)), panels.values(), strict=True):
        require_some("models", models)
        offsets = side_by_side(len(models)) * MARKERS_SPREAD / len(models)
        for offset, (name, values) in zip(offsets, models.items(), strict=True):
            numbers = checked_intervals(f"model {name!r}", values, len(groups))
            look = style(name)
            figure.add_scatter(
                x=(np.arange(len(groups)) + offset).tolist(),
                y=numbers.value.tolist(),
                error_y=whiskers(numbers),
                mode="markers",
                name=look.label,
                legendgroup=name,
                showlegend=subplot.leftmost,
                marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                **subplot.at,
            )
        ticks = {"tickvals": list(range(len(groups))), "ticktext": list(groups), "showgrid": False}
        figure.update_xaxes(**ticks, range=[-0.5, len(groups) - 0.5], **subplot.at)
    caption = "Markers are means over pairs, whiskers their 95% intervals."
    finish(figure, title, subtitle, kind="agreement", caption=caption)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, zerolinewidth=1)
    return fit_panels(figure, len(panels), _LAYOUT)
