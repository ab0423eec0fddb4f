"""Numbers of several models side by side, in groups, one panel per quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import require_some
from ctlens.plots.intervals import MARKERS_SPREAD, checked_intervals, side_by_side, whiskers
from ctlens.plots.panels import PanelLayout, fit_panels, panel_grid, subplots
from ctlens.plots.theme import MUTED, finish, looks_of

_LAYOUT = PanelLayout(height=270, gap=60, below=64, side=0.08)

# Chosen by eye: how many names of groups stand level beside each other; the slant of more of them in degrees, and the
# pixels that a letter then takes from top to bottom.
_LEVEL = 3
_SLANT = -40
_LETTER = 4

Groups = tuple[Sequence[str], Mapping[str, Sequence[ArrayLike] | np.ndarray]]
"""Names of the groups, and per model its values with the lower and upper ends of their intervals, `[3, group]`."""


def agreement(
    panels: Mapping[str, Groups],
    title: str,
    *,
    subtitle: str | None = None,
    caption: str = "Markers are means over pairs, whiskers their 95% intervals.",
) -> go.Figure:
    """Do numbers of several models agree, group by group? Methods have their looks; other things go from dark to light.

    Args:
        panels: by the quantity, with its unit.
        title: the question or the answer.
        subtitle: one line under the title.
        caption: how to read the figure.

    Raises:
        CtlensError: there is no panel or model, or numbers do not fit the groups.
    """
    require_some("panels", panels)
    layout = _layout(panels)
    figure = panel_grid(list(panels), layout)
    looks = looks_of(dict.fromkeys(name for _, models in panels.values() for name in models))
    listed: set[str] = set()
    for subplot, (groups, models) in zip(subplots(len(panels)), panels.values(), strict=True):
        require_some("models", models)
        offsets = side_by_side(len(models)) * MARKERS_SPREAD / len(models)
        for offset, (name, values) in zip(offsets, models.items(), strict=True):
            numbers = checked_intervals(f"model {name!r}", values, len(groups))
            look = looks[name]
            figure.add_scatter(
                x=(np.arange(len(groups)) + offset).tolist(),
                y=numbers.value.tolist(),
                error_y=whiskers(numbers),
                mode="markers",
                name=look.label,
                legendgroup=name,
                showlegend=name not in listed,
                marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                **subplot.at,
            )
            listed.add(name)
        ticks = {"tickvals": list(range(len(groups))), "ticktext": list(groups), "showgrid": False}
        figure.update_xaxes(**ticks, range=[-0.5, len(groups) - 0.5], **subplot.at)
    finish(figure, title, subtitle, kind="agreement", caption=caption)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, zerolinewidth=1)
    if layout != _LAYOUT:
        figure.update_xaxes(tickangle=_SLANT)
    return fit_panels(figure, len(panels), layout)


def _layout(panels: Mapping[str, Groups]) -> PanelLayout:
    """The layout with room under the panels for the names of many groups, which are slanted."""
    many = [groups for groups, _ in panels.values() if len(groups) > _LEVEL]
    room = _LETTER * max((len(name) for groups in many for name in groups), default=0)
    return _LAYOUT._replace(gap=_LAYOUT.gap + room, below=_LAYOUT.below + room)
