"""How the bad rate depends on the strength of the attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from ctlens.plots.arrays import checked, require_some
from ctlens.plots.panels import Place, fit, panels, places
from ctlens.plots.rates import PERCENT, interval_hover, whiskers
from ctlens.plots.theme import MUTED, finish, style

StrengthCurve = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]
"""Strengths, value, lower end and upper end of the interval, each `[strength]`."""

HEIGHT, GAP, BELOW = 180, 54, 54
DODGE = 0.07
BAND_COLOUR = "rgba(128, 128, 128, 0.13)"


def attack_strength(
    curves: Mapping[str, Mapping[str, StrengthCurve]],
    title: str,
    *,
    subtitle: str | None = None,
    band: tuple[float, float] | None = None,
) -> go.Figure:
    """Does a stronger attack work more often, on each threat and each kind of prompt?

    One panel a threat, all on one scale; strengths compare within a threat, not between threats.

    Args:
        curves: per threat and per split, the strengths (whole numbers from 1), and at each the bad
            rate (0 to 1) with its interval; NaN where not measured.
        title: the question or the answer.
        subtitle: one line under the title.
        band: lower and upper end of the target rate, shaded in every panel.

    Raises:
        CtlensError: no threat, a threat without a split, or an array that is not one number per strength.
    """
    require_some("curves", curves)
    figure = panels(list(curves), height=HEIGHT, gap=GAP, side=0.04)
    listed: set[str] = set()
    for (threat, lines), (place, *_) in zip(curves.items(), places(len(curves)), strict=True):
        _draw(figure, place, threat, lines, listed)
    caption = "Markers are rates, whiskers their 95% intervals, side by side at each strength."
    caption += "" if band is None else f" The shaded band, {band[0]:.0%} to {band[1]:.0%}, is the target."
    finish(figure, title, subtitle, kind="attack_strength", caption=caption)
    for place, first, last in places(len(curves)):
        figure.update_xaxes(title_text="attack strength" if last else None, showgrid=False, **place)
        figure.update_yaxes(**PERCENT, title_text="bad rate" if first else None, showticklabels=first, **place)
    _shade(figure, band)
    return fit(figure, len(curves), height=HEIGHT, gap=GAP, below=BELOW)


def _draw(figure: go.Figure, place: Place, threat: str, lines: Mapping[str, StrengthCurve], listed: set[str]) -> None:
    """One panel; `listed` are the splits that the legend already names."""
    require_some(f"curves[{threat!r}]", lines)
    reached: list[float] = []
    for number, (split, curve) in enumerate(lines.items()):
        name = f"curve {split!r} of {threat!r}"
        strengths, value, low, high = (checked(name, array, np.size(curve[0])) for array in curve)
        reached += strengths.tolist()
        look = style(split)
        figure.add_scatter(
            x=(strengths + DODGE * (number - (len(lines) - 1) / 2)).tolist(),
            y=value.tolist(),
            error_y={**whiskers(value, low, high), "thickness": 1.2, "width": 2},
            mode="lines+markers",
            name=look.label,
            legendgroup=split,
            showlegend=split not in listed,
            line={"color": look.colour, "dash": look.dash, "width": 2},
            marker={"color": look.colour, "symbol": look.symbol, "size": 7},
            **interval_hover(look.label, low, high),
            **place,
        )
        listed.add(split)
    first, last = int(min(reached)), int(max(reached))
    ticks = {"tickvals": list(range(first, last + 1)), "ticktext": [str(s) for s in range(first, last + 1)]}
    figure.update_xaxes(**ticks, range=[first - 0.4, last + 0.4], **place)


def _shade(figure: go.Figure, band: tuple[float, float] | None) -> None:
    if band is None:
        return
    everywhere: dict[str, Any] = {"row": "all", "col": "all", "layer": "below"}
    figure.add_hrect(*band, fillcolor=BAND_COLOUR, line_width=0, **everywhere)
    figure.layout.shapes[0].update(name=f"target: {band[0]:.0%} to {band[1]:.0%}", showlegend=True)
    for end in band:
        figure.add_hline(end, line={"color": MUTED, "dash": "dot", "width": 1}, **everywhere)
