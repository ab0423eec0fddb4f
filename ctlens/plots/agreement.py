"""Numbers of several models side by side, in groups, a panel a quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots import panels as multiples
from ctlens.plots.arrays import checked, require_some
from ctlens.plots.rates import SPREAD, whiskers
from ctlens.plots.theme import MUTED, finish, style

HEIGHT, GAP, BELOW, SIDE = 270, 60, 64, 0.08

Groups = tuple[Sequence[str], Mapping[str, ArrayLike]]
"""Names of the groups, and per model its values with the lower and upper ends of their intervals, `[3, group]`."""


def agreement(panels: Mapping[str, Groups], title: str, *, subtitle: str | None = None) -> go.Figure:
    """Do several ways to score tokens agree, and where do they point, before training and after?

    Args:
        panels: by what they count, with its unit.
        title: the question or the answer.
        subtitle: one line under the title.

    Raises:
        CtlensError: there is no panel or model, or numbers do not fit the groups.
    """
    require_some("panels", panels)
    figure = multiples.panels(list(panels), height=HEIGHT, gap=GAP, side=SIDE)
    for (place, first, _), (groups, models) in zip(multiples.places(len(panels)), panels.values(), strict=True):
        require_some("models", models)
        for row, (name, numbers) in enumerate(models.items()):
            value, low, high = checked(f"model {name!r}", numbers, 3, len(groups))
            offset = (row - (len(models) - 1) / 2) * SPREAD / len(models)
            look = style(name)
            figure.add_scatter(
                x=(np.arange(len(groups)) + offset).tolist(),
                y=value.tolist(),
                error_y=whiskers(value, low, high),
                mode="markers",
                name=look.label,
                legendgroup=name,
                showlegend=first,
                marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                **place,
            )
        ticks = {"tickvals": list(range(len(groups))), "ticktext": list(groups), "showgrid": False}
        figure.update_xaxes(**ticks, range=[-0.5, len(groups) - 0.5], **place)
    caption = "Markers are means over pairs, whiskers their 95% intervals."
    finish(figure, title, subtitle, kind="agreement", caption=caption)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, zerolinewidth=1)
    return multiples.fit(figure, len(panels), height=HEIGHT, gap=GAP, below=BELOW)
